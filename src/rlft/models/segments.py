"""The segments of a packed row, as the two kinds of attention kernel want them: in padded blocks, or end to end.

A packed row holds *segments*: prompts and completions. A segment attends causally to itself; a completion also attends to
the whole of its prompt. Each kernel call is free of masks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NEVER", "Block", "Piece", "Segments", "Stretch", "View", "plan_segments"]

#: (start, length) of some tokens that follow each other.
Piece = tuple[int, int]

# Segments of one padded call may differ in length by this share of the longest, or by this many tokens: padding costs
# time with the square of the length, a call of its own costs a fixed time.
_SHARE, _TOKENS = 0.8, 16
# Runs of up to so many tokens are padded rather than computed one by one; sequences from so many on are cut in two.
_SHORT, _CUT = 24, 192
# The log-sum-exp of padding: exp(score - this) is 0.
NEVER = 1e30


@dataclass(frozen=True, slots=True)
class Block:
    """``[count, width]`` tokens of the packed row, as a kernel for sequences of one length sees them.

    Buffers that are written have one row more than the packed row: what padding computes ends there.

    Attributes:
        count, width: sequences of the call, and tokens of the longest.
        start: first token, where the block is one gapless stretch of the row; else None.
        source: ``[count * width]`` the tokens, padded by the row's first; None where ``start`` says it.
        target: the same, padded by the row's length.
        padding: which of ``count * width`` are padding; None where none are.
    """

    count: int
    width: int
    start: int | None
    source: Tensor | None = None
    target: Tensor | None = None
    padding: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """``[N, H, ...]`` to ``[count, H, width, ...]``, some token in the padding."""
        return self._sequences(self._picked(x))

    def take_norms(self, x: Tensor) -> Tensor:
        """``[N, H]`` to ``[count, H, width]``, so large in the padding that all weights are 0 in the backward."""
        picked = self._picked(x)
        if self.padding is not None:
            picked = picked.index_fill_(0, self.padding, NEVER)
        return self._sequences(picked).contiguous()

    def replaced(self, x: Tensor, y: Tensor) -> Tensor:
        """``[N + 1, H, ...]`` with ``[count, H, width, ...]`` in its place; differentiable."""
        if self.start is None:
            assert self.target is not None
            return x.index_copy(0, self.target, self._rows(y))
        return x.slice_scatter(self._rows(y), 0, self.start, self.start + self.count * self.width)

    def put(self, x: Tensor, y: Tensor) -> None:
        """Write ``[count, H, width, ...]`` into ``[N + 1, H, ...]``."""
        if self.start is not None:
            self._sequences(self._picked(x)).copy_(y)
        else:
            assert self.target is not None
            x.index_copy_(0, self.target, self._rows(y))

    def add(self, x: Tensor, y: Tensor) -> None:
        """As :meth:`put`, but adds."""
        if self.start is not None:
            self._sequences(self._picked(x)).add_(y)
        else:
            assert self.target is not None
            x.index_add_(0, self.target, self._rows(y))

    def _picked(self, x: Tensor) -> Tensor:
        if self.start is not None:
            return x[self.start : self.start + self.count * self.width]
        assert self.source is not None
        return x.index_select(0, self.source)

    def _sequences(self, picked: Tensor) -> Tensor:
        return picked.view(self.count, self.width, *picked.shape[1:]).transpose(1, 2)

    def _rows(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(self.count * self.width, y.shape[1], *y.shape[3:])


@dataclass(frozen=True, slots=True)
class View:
    """``[count, width]`` tokens of the packed row that can be seen without a copy.

    Attributes:
        count, width: sequences, and tokens of each.
        start: first token of the first.
        step: from the first token of one to that of the next.
    """

    count: int
    width: int
    start: int
    step: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Sequences laid end to end, as a kernel for sequences of any length sees them.

    Attributes:
        bounds: where each sequence begins, and the end of the last.
        offsets: the same, int32 ``[sequences + 1]`` (``cu_seqlens``).
        longest: tokens of the longest sequence.
        start: first token in the packed row, where the sequences follow each other there; else None.
        index: ``[tokens]`` the tokens in the packed row, where ``start`` is None.
    """

    bounds: tuple[int, ...]
    offsets: Tensor
    longest: int
    start: int | None
    index: Tensor | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(begin, end) of each sequence."""
        return list(itertools.pairwise(self.bounds))

    def take(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to ``[tokens, ...]``; a view where the tokens follow each other."""
        if self.start is not None:
            return x[self.start : self.start + self.bounds[-1]]
        assert self.index is not None
        return x.index_select(0, self.index)

    def put(self, x: Tensor, y: Tensor) -> None:
        """Write ``[tokens, ...]`` into ``[N, ...]``."""
        if self.start is not None:
            self.take(x).copy_(y)
        else:
            assert self.index is not None
            x.index_copy_(0, self.index, y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """As :meth:`put`, but adds."""
        if self.start is not None:
            self.take(x).add_(y)
        else:
            assert self.index is not None
            x.index_add_(0, self.index, y)


class Segments:
    """Which tokens of a packed row attend to which; see :func:`plan_segments`.

    What a kernel needs is made when it is first asked for, once for all layers of a pass.

    Attributes:
        tokens: length of the row.
        grouped: whether any segment attends to another one, its prompt.
    """

    def __init__(self, pieces: Sequence[Piece], groups: Sequence[tuple[Piece, Piece]], device: torch.device) -> None:
        self._pieces, self._groups, self._device = list(pieces), list(groups), device
        self.tokens = sum(length for _, length in pieces)
        self.grouped = bool(groups)

    # -- padded blocks --------------------------------------------------------------------------------------------
    @functools.cached_property
    def own_blocks(self) -> list[Block]:
        """Causal self-attention; together they hold every token once."""
        prompts = {prompt for _, prompt in self._groups}
        kinds = [p for p in self._pieces if p in prompts], [p for p in self._pieces if p not in prompts]
        return [self._block(bucket) for kind in kinds for bucket in _buckets(kind)]

    @functools.cached_property
    def across_blocks(self) -> list[tuple[Block, Block]]:
        """(queries, keys): completions of some groups, and their whole prompts."""
        across = []
        by_length: dict[int, list[tuple[Piece, Piece]]] = {}
        for queries, prompt in self._groups:  # keys are never padded, so only prompts of one length share a call
            by_length.setdefault(prompt[1], []).append((queries, prompt))
        for members in by_length.values():
            prompt_of = dict(members)
            for bucket in _buckets([queries for queries, _ in members]):
                across.append((self._block(bucket), self._block([prompt_of[queries] for queries in bucket])))
        return across

    def _block(self, pieces: Sequence[Piece]) -> Block:
        width = max(length for _, length in pieces)
        first = pieces[0][0]
        if all(piece == (first + i * width, width) for i, piece in enumerate(pieces)):
            return Block(len(pieces), width, first)
        starts, lengths = torch.tensor(pieces).unbind(-1)
        step = torch.arange(width)
        exists = (step < lengths[:, None]).flatten()
        tokens = (starts[:, None] + step).flatten()
        source, target = (tokens.where(exists, other).to(self._device) for other in (0, self.tokens))
        padding = None if bool(exists.all()) else (~exists).nonzero()[:, 0].to(self._device)
        return Block(len(pieces), width, None, source, target, padding)

    # -- without copies -------------------------------------------------------------------------------------------
    @functools.cached_property
    def views(self) -> tuple[list[View | Block], list[tuple[View, View]]]:
        """Causal self-attention, and (queries, keys) that see each other whole, as views of the row.

        A kernel that multiplies whole blocks of scores, causal or not, wastes half of them: so long sequences are cut, and
        their ends attend to their beginnings without a mask. A few tokens of different lengths are padded blocks.
        """
        own: list[View | Block] = []
        across: list[tuple[View, View]] = []
        short: list[Piece] = []
        for (view,) in _runs([(piece,) for piece in self._pieces]):
            if view.count * view.width > _SHORT:
                _cut(view, own, across)
            else:
                short += [(view.start + i * view.step, view.width) for i in range(view.count)]
        for bucket in _buckets(short):
            block = self._block(bucket)
            own.append(block if block.start is None else View(block.count, block.width, block.start, block.width))
        across += [(queries, keys) for queries, keys in _runs(self._groups)]
        return own, across

    # -- end to end -----------------------------------------------------------------------------------------------
    @functools.cached_property
    def own(self) -> Stretch:
        """Causal self-attention: every segment of the row."""
        return self._stretch(sorted(self._pieces))

    @functools.cached_property
    def across(self) -> tuple[Stretch, Stretch] | None:
        """(queries, keys): the completions of each group as one sequence, and its prompt; None without groups."""
        if not self._groups:
            return None
        members = sorted(self._groups)
        return self._stretch([queries for queries, _ in members]), self._stretch([prompt for _, prompt in members])

    def _stretch(self, pieces: Sequence[Piece]) -> Stretch:
        bounds = (0, *itertools.accumulate(length for _, length in pieces))
        first = pieces[0][0]
        gapless = all(start == first + bound for (start, _), bound in zip(pieces, bounds, strict=False))
        return Stretch(
            bounds=bounds,
            offsets=torch.tensor(bounds, dtype=torch.int32, device=self._device),
            longest=max(length for _, length in pieces),
            start=first if gapless else None,
            index=None
            if gapless
            else torch.cat([torch.arange(start, start + length) for start, length in pieces]).to(self._device),
        )


def plan_segments(
    segments: Sequence[Piece], groups: Sequence[tuple[Piece, Piece]], *, device: torch.device
) -> Segments:
    """Who attends to whom in a packed row.

    Args:
        segments: (start, length) of each segment, which together are the row; lengths > 0.
        groups: for each prompt with completions of its own: (start, length) of the completions' tokens, which follow
            each other, and (start, length) of the prompt.
        device: where the indices go.

    Returns:
        :class:`Segments`.
    """
    return Segments(segments, groups, device)


def _runs(members: Sequence[tuple[Piece, ...]]) -> list[tuple[View, ...]]:
    """Tuples of pieces: together those of equal lengths that follow each other in the row, at every position."""
    runs: list[list[tuple[Piece, ...]]] = []
    for member in sorted(members):
        before = runs[-1][-1] if runs else None
        if before and all(b == (a[0] + a[1], a[1]) for a, b in zip(before, member, strict=True)):
            runs[-1].append(member)
        else:
            runs.append([member])
    return [tuple(View(len(run), length, start, length) for start, length in run[0]) for run in runs]


def _cut(view: View, own: list[View | Block], across: list[tuple[View, View]]) -> None:
    """Halve sequences until they are short: what is left attends to itself, each end to its beginning."""
    if view.width < _CUT:
        own.append(view)
        return
    half = 64 * ((view.width + 64) // 128)
    begin = View(view.count, half, view.start, view.step)
    end = View(view.count, view.width - half, view.start + half, view.step)
    across.append((end, begin))
    if begin.width == end.width and view.step == view.width:
        _cut(View(2 * view.count, half, view.start, half), own, across)
    else:
        _cut(begin, own, across)
        _cut(end, own, across)


def _buckets(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces of similar length together, each bucket in the order of the row."""
    buckets: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (-p[1], p[0])):
        longest = buckets[-1][0][1] if buckets else 0
        if buckets and piece[1] >= min(_SHARE * longest, longest - _TOKENS):
            buckets[-1].append(piece)
        else:
            buckets.append([piece])
    return [sorted(bucket) for bucket in buckets]
