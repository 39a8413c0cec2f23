"""Attention over a packed row in which the completions of a group share their prompt's keys, without a dense mask.

A packed row holds *segments*: prompts and completions. A segment attends causally to itself; a completion also attends to
the whole of its prompt. Both calls are free of masks, so the fast kernels serve, and their results are merged by the
log-sum-exp that each returns. The backward calls each kernel's own backward with the merged output and log-sum-exp.

Models need no change: :class:`GroupMask` poses as their 4-D attention mask, which transformers hands on untouched to
``scaled_dot_product_attention``, and answers that call itself. So the layout travels with the arguments of each layer:
nothing global is switched, and a checkpointed layer that is recomputed sees the same layout.

References:
    Merging partial softmaxes: Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867); with the backward of each
    part: Liu et al. 2023, Ring Attention (https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Block", "GroupMask", "Segments", "attend", "plan_segments"]

# Segments of one kernel call may differ in length by this share of the longest, or by this many tokens: padding costs
# time with the square of the length, a call of its own costs a fixed time.
_SHARE, _TOKENS = 0.8, 16
# The log-sum-exp of padding: exp(score - this) is 0.
_NEVER = 1e30


@dataclass(frozen=True, slots=True)
class Block:
    """``[count, width]`` tokens of the packed row, as one kernel call sees them.

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
            picked = picked.index_fill_(0, self.padding, _NEVER)
        return self._sequences(picked).contiguous()

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
class Segments:
    """Which tokens of a packed row attend to which.

    Attributes:
        tokens: length of the row.
        own: causal self-attention; together they hold every token once.
        across: (queries, keys): completions of some groups, and their whole prompts.
    """

    tokens: int
    own: tuple[Block, ...]
    across: tuple[tuple[Block, Block], ...]


def plan_segments(
    segments: Sequence[tuple[int, int]],
    groups: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    *,
    device: torch.device,
) -> Segments:
    """Sort segments of similar length into kernel calls.

    Args:
        segments: (start, length) of each segment, which together are the row; lengths > 0.
        groups: for each prompt with completions of its own: (start, length) of the completions' tokens, which follow
            each other, and (start, length) of the prompt.
        device: where the indices go.

    Returns:
        :class:`Segments`.
    """
    total = sum(length for _, length in segments)
    prompts = {prompt for _, prompt in groups}
    kinds = [s for s in segments if s in prompts], [s for s in segments if s not in prompts]
    own = [_block(piece, total, device) for kind in kinds for piece in _buckets(kind)]
    across = []
    by_length: dict[int, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for queries, prompt in groups:  # keys are never padded, so only prompts of one length share a call
        by_length.setdefault(prompt[1], []).append((queries, prompt))
    for members in by_length.values():
        prompt_of = dict(members)
        for piece in _buckets([queries for queries, _ in members]):
            keys = _block([prompt_of[queries] for queries in piece], total, device)
            across.append((_block(piece, total, device), keys))
    return Segments(total, tuple(own), tuple(across))


def _buckets(pieces: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pieces of similar length together, each bucket in the order of the row."""
    buckets: list[list[tuple[int, int]]] = []
    for piece in sorted(pieces, key=lambda p: (-p[1], p[0])):
        longest = buckets[-1][0][1] if buckets else 0
        if buckets and piece[1] >= min(_SHARE * longest, longest - _TOKENS):
            buckets[-1].append(piece)
        else:
            buckets.append([piece])
    return [sorted(bucket) for bucket in buckets]


def _block(pieces: Sequence[tuple[int, int]], total: int, device: torch.device) -> Block:
    width = max(length for _, length in pieces)
    first = pieces[0][0]
    if all(piece == (first + i * width, width) for i, piece in enumerate(pieces)):
        return Block(len(pieces), width, first)
    starts, lengths = torch.tensor(pieces).unbind(-1)
    step = torch.arange(width)
    exists = (step < lengths[:, None]).flatten()
    tokens = (starts[:, None] + step).flatten()
    source, target = tokens.where(exists, 0).to(device), tokens.where(exists, total).to(device)
    padding = None if bool(exists.all()) else (~exists).nonzero()[:, 0].to(device)
    return Block(len(pieces), width, None, source, target, padding)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[n, H, T, d]`` and log-sum-exp ``[n, H, T]`` of one call without a mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        # [N, H, d] each.
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out_buffer, lse_buffer = _buffer(q), _buffer(q[..., 0], wide)
        out, lse = out_buffer[:-1], lse_buffer[:-1]
        for block in segments.own:
            piece, norm = _kernel(block.take(q), block.take(k), block.take(v), True, scale)
            block.put(out_buffer, piece)
            block.put(lse_buffer, norm)
        for queries, keys in segments.across:
            piece, norm = _kernel(queries.take(q), keys.take(k), keys.take(v), False, scale)
            own, own_norm = queries.take(out), queries.take_norms(lse)
            share = torch.sigmoid(norm - own_norm)[..., None]
            queries.put(out_buffer, torch.lerp(own.to(wide), piece.to(wide), share).to(out.dtype))
            queries.put(lse_buffer, torch.logaddexp(norm, own_norm))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments: Segments = ctx.segments
        (grad,) = grads
        dq, dk, dv = (_buffer(x) for x in (q, k, v))

        def call(queries: Block, keys: Block, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            pieces = (queries.take(grad), queries.take(q), keys.take(k), keys.take(v), queries.take(out))
            return _kernel_backward(*pieces, queries.take_norms(lse), causal, ctx.scale)

        for block in segments.own:
            for total, part in zip((dq, dk, dv), call(block, block, True), strict=True):
                block.put(total, part)
        for queries, keys in segments.across:
            gq, gk, gv = call(queries, keys, False)
            queries.add(dq, gq)
            keys.add(dk, gk)
            keys.add(dv, gv)
        return dq[:-1], dk[:-1], dv[:-1], None, None


def _buffer(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for ``x``, and a row for what padding computes."""
    return torch.empty(x.shape[0] + 1, *x.shape[1:], dtype=dtype or x.dtype, device=x.device)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None) -> Tensor:
    """Attention over one packed row.

    Args:
        q: ``[1, H, N, d]``.
        k, v: ``[1, K, N, d]`` where K divides H (grouped queries).
        segments: who attends to whom.
        scale: of the scores; None is ``d ** -0.5``.

    Returns:
        ``[1, H, N, d]``.

    Raises:
        ValueError: for a device or a shape that has no kernel here.
    """
    if q.device.type != "cpu":
        raise ValueError(f"prompts are shared on cpu only, got {q.device}; use layout='padded'")
    if q.shape[0] != 1 or q.shape[2] != segments.tokens or k.shape[2] != segments.tokens:
        raise ValueError(
            f"expected one packed row of {segments.tokens} tokens, got queries {list(q.shape)} and keys {list(k.shape)}"
        )
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"queries of {q.shape[-1]} and values of {v.shape[-1]} dimensions; use layout='padded'")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = _SegmentAttention.apply(q, k, v, segments, q.shape[-1] ** -0.5 if scale is None else scale)
    return out.transpose(0, 1)[None]


class GroupMask(torch.Tensor):
    """The mask ``[1, 1, N, N]`` of a packed row, without storage: a model's attention call is answered by :func:`attend`.

    Every other computation with it is a TypeError, so a model that edits its mask fails loudly instead of attending to
    the wrong tokens.
    """

    segments: Segments

    @staticmethod
    def __new__(cls, segments: Segments, device: torch.device) -> GroupMask:
        shape = (1, 1, segments.tokens, segments.tokens)
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.segments = segments
        return mask

    def __repr__(self, **_: Any) -> str:
        return f"GroupMask({self.segments.tokens} tokens)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer attention; let shape, dtype and device be read; refuse the rest."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _answer(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise TypeError(f"{getattr(func, '__name__', func)} is not possible with the mask of a shared prompt")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse: there is no storage."""
        raise TypeError(f"{func} is not possible with the mask of a shared prompt")


_READ = {"__get__", "size", "dim", "get_device", "is_floating_point", "is_complex", "numel", "__len__", "__hash__"}


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not isinstance(attn_mask, GroupMask) or dropout_p > 0.0 or is_causal:
        raise TypeError("a shared prompt has no attention dropout, and its mask stands alone; use layout='padded'")
    return attend(query, key, value, attn_mask.segments, scale=scale)
