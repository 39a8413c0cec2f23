"""Attention over a packed row on a CPU: kernel calls read their tokens where they lie, and add their results there.

Gathering queries, keys, values, outputs and their gradients costs about as much as the attention of short sequences. So
sequences of equal length that follow each other are one call over a view, and those of other lengths are calls of their
own. Keys that serve several heads of queries are not repeated: along those heads their stride is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.attention_kernels import BlockKernel, Grads
from rlft.models.segments import NEVER, Block, Segments, View

__all__ = ["ByViews"]


class ByViews:
    """A packed row in views; see :attr:`rlft.models.segments.Segments.views`.

    Args:
        kernel: of sequences of one length; it must take tensors of any strides.
    """

    grouped = True

    def __init__(self, kernel: BlockKernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """As :class:`~rlft.models.attention_kernels.SegmentKernel`; log-sum-exp ``[N, K, H / K]``."""
        own, across = segments.views
        shape, dtype = q.shape, q.dtype
        q, k, v = _queries(q, k.shape[1]), _keys(k, q.shape[1]), _keys(v, q.shape[1])
        k, v = k.expand(q.shape), v.expand(q.shape)
        out, lse = _sums(q), _sums(q[..., 0])
        for block in own:
            for call in _calls(block, q.shape[1]):
                piece, norm = self.kernel.forward(call.take(q), call.take(k), call.take(v), True, scale)
                call.put(out, piece)
                call.put(lse, norm)
        for queries, keys in across:
            for mine, theirs in _pairs(queries, keys, q.shape[1]):
                piece, norm = self.kernel.forward(mine.take(q), theirs.take(k), theirs.take(v), False, scale)
                total, total_norm = mine.take(out), mine.take(lse)
                total.lerp_(piece.to(total.dtype), torch.sigmoid(norm - total_norm)[..., None])
                total_norm.copy_(torch.logaddexp(norm, total_norm))
        return out[:-1].view(shape).to(dtype), lse[:-1]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        scale: float,
    ) -> Grads:
        """As :class:`~rlft.models.attention_kernels.SegmentKernel`."""
        own, across = segments.views
        shapes, dtype = (q.shape, k.shape, v.shape), q.dtype
        grad, out = _queries(grad, k.shape[1]), _queries(out, k.shape[1])
        q, k, v = _queries(q, k.shape[1]), _keys(k, q.shape[1]), _keys(v, q.shape[1])
        dq, dk, dv = _sums(q), _sums(k), _sums(v)
        k, v = k.expand(q.shape), v.expand(q.shape)

        def parts(mine: _Viewed | _Padded, theirs: _Viewed | _Padded, causal: bool) -> Grads:
            inputs = mine.take(grad), mine.take(q), theirs.take(k), theirs.take(v), mine.take(out), mine.norms(lse)
            return self.kernel.backward(*inputs, causal, scale)

        for block in own:
            for call in _calls(block, q.shape[1]):
                for total, part in zip((dq, dk, dv), parts(call, call, True), strict=True):
                    call.put(total, part)
        for queries, keys in across:
            for mine, theirs in _pairs(queries, keys, q.shape[1]):
                gq, gk, gv = parts(mine, theirs, False)
                mine.add(dq, gq)
                theirs.add(dk, gk)
                theirs.add(dv, gv)
        dq, dk, dv = (x[:-1].view(shape).to(dtype) for x, shape in zip((dq, dk, dv), shapes, strict=True))
        return dq, dk, dv


def _queries(x: Tensor, keys: int) -> Tensor:
    """``[N, H, d]`` to ``[N, K, G, d]``: G heads of queries for each of the keys; all in one group where K is H."""
    return x[:, None] if x.shape[1] == keys else x.unflatten(1, (keys, -1))


def _keys(x: Tensor, queries: int) -> Tensor:
    """``[N, K, d]`` to ``[N, K, 1, d]``, or ``[N, 1, H, d]`` where each head of queries has its own."""
    return x[:, None] if x.shape[1] == queries else x[:, :, None]


def _sums(x: Tensor) -> Tensor:
    """Room for what several calls add up, so in float32 at least; and one row more, where what padding computes ends."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[0] + 1, *x.shape[1:], dtype=wide, device=x.device)


@dataclass(frozen=True, slots=True)
class _Viewed:
    """What one call sees of ``[N, K, G, ...]``: one head of keys in all sequences, or all heads in one sequence."""

    view: View
    head: int | None = None
    sequence: int = 0

    def take(self, x: Tensor) -> Tensor:
        """``[sequences, G, width, ...]`` or ``[K, G, width, ...]``, sharing memory."""
        view, (row, head, group, *rest) = self.view, x.stride()
        if self.head is None:
            count, step, first = x.shape[1], head, (view.start + self.sequence * view.step) * row
        else:
            count, step, first = view.count, view.step * row, view.start * row + self.head * head
        shape = (count, x.shape[2], view.width, *x.shape[3:])
        return x.as_strided(shape, (step, group, row, *rest), x.storage_offset() + first)

    norms = take

    def put(self, x: Tensor, y: Tensor) -> None:
        """Write what :meth:`take` reads; where G heads have one key, their sum."""
        into = self.take(x)
        if into.shape == y.shape:
            into.copy_(y)
        else:
            torch.sum(y, 1, keepdim=True, dtype=x.dtype, out=into)

    def add(self, x: Tensor, y: Tensor) -> None:
        """As :meth:`put`, but adds."""
        into = self.take(x)
        into.add_(y if into.shape == y.shape else y.sum(1, keepdim=True, dtype=x.dtype))


@dataclass(frozen=True, slots=True)
class _Padded:
    """As :class:`_Viewed` for a padded block: all its sequences and heads, gathered."""

    block: Block

    def take(self, x: Tensor) -> Tensor:
        return self._sequences(self._picked(x))

    def norms(self, x: Tensor) -> Tensor:
        """So large in the padding that all weights are 0 in the backward."""
        picked = self._picked(x)
        if self.block.padding is not None:
            picked = picked.index_fill_(0, self.block.padding, NEVER)
        return self._sequences(picked)

    def put(self, x: Tensor, y: Tensor) -> None:
        assert self.block.target is not None
        rows = y.to(x.dtype).transpose(1, 2).reshape(-1, x.shape[1], y.shape[1] // x.shape[1], *x.shape[3:])
        x.index_copy_(0, self.block.target, rows if rows.shape[2] == x.shape[2] else rows.sum(2, keepdim=True))

    def _picked(self, x: Tensor) -> Tensor:
        assert self.block.source is not None
        return x.index_select(0, self.block.source).flatten(1, 2)

    def _sequences(self, picked: Tensor) -> Tensor:
        return picked.unflatten(0, (self.block.count, self.block.width)).transpose(1, 2)


def _viewed(view: View, heads: int) -> list[_Viewed]:
    """The fewest calls that see every head and sequence of a view without a copy."""
    if view.count < heads:
        return [_Viewed(view, sequence=i) for i in range(view.count)]
    return [_Viewed(view, i) for i in range(heads)]


def _calls(block: View | Block, heads: int) -> Sequence[_Viewed | _Padded]:
    return [_Padded(block)] if isinstance(block, Block) else _viewed(block, heads)


def _pairs(queries: View, keys: View, heads: int) -> list[tuple[_Viewed, _Viewed]]:
    return list(zip(_viewed(queries, heads), _viewed(keys, heads), strict=True))
