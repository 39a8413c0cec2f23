"""Attention over a packed row by the kernels that torch has: one merged forward, one backward per part.

A token of a completion attends to two parts, its own segment and its prompt. Each part is a call without a mask, and the
results are merged by the log-sum-exp that each call returns. The backward calls each kernel's own backward with the
*merged* output and log-sum-exp: with them ``exp(score - lse)`` is the weight over both parts, and
``sum(grad * out)`` the term that the softmax's derivative needs.

Two forms: :class:`ByBlocks` for kernels that want sequences of one length (they are padded, in buckets), and
:class:`ByOffsets` for kernels that take sequences of any length end to end.

References:
    Merging partial softmaxes: Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867); with the backward of each
    part: Liu et al. 2023, Ring Attention (https://arxiv.org/abs/2310.01889). Variable lengths: Dao 2023, FlashAttention-2
    (https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rlft.models.segments import Block, Segments, Stretch

__all__ = [
    "ByBlocks",
    "ByOffsets",
    "CpuFlash",
    "CudaEfficient",
    "CudaFlash",
    "Dense",
    "SegmentKernel",
]

Grads = tuple[Tensor, Tensor, Tensor]


class SegmentKernel(Protocol):
    """Attention over one packed row.

    Attributes:
        name: for messages.
        grouped: keys and values may have fewer heads than queries.
    """

    name: str
    grouped: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """Output ``[N, H, d]`` and log-sum-exp (in the kernel's own layout) of ``q [N, H, d]``, ``k, v [N, K, d]``."""
        ...

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
        """Gradients of ``q, k, v`` from that of the output; ``out`` and ``lse`` are those of :meth:`forward`."""
        ...


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -- sequences of one length ------------------------------------------------------------------------------------------
class BlockKernel(Protocol):
    """One call: ``q [n, H, T, d]``, ``k, v [n, H, S, d]``; log-sum-exp ``[n, H, T]``."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Grads: ...


class CpuFlash:
    """Flash attention on a CPU: float32, float64 and bfloat16."""

    name = "flash attention for CPUs"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Grads:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


class CudaEfficient:
    """Memory-efficient attention on CUDA: float32 too, which flash attention does not take."""

    name = "memory-efficient attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]  # which the kernel pads

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Grads:
        if torch.version.hip is None:  # the backward reads whole blocks of 32: exp(score - inf) is 0
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is not there
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse.contiguous(), seed, seed, 0.0, [True, True, True, False], causal, scale=scale
        )
        return dq, dk, dv


class ByBlocks:
    """A packed row in blocks of sequences of about one length.

    Args:
        kernel: of one block.
    """

    grouped = False

    def __init__(self, kernel: BlockKernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """As :class:`SegmentKernel`; log-sum-exp ``[N, H]``."""
        wide = _wide(q)
        out_buffer, lse_buffer = _buffer(q), _buffer(q[..., 0], wide)
        out, lse = out_buffer[:-1], lse_buffer[:-1]
        for block in segments.own_blocks:
            piece, norm = self.kernel.forward(block.take(q), block.take(k), block.take(v), True, scale)
            block.put(out_buffer, piece)
            block.put(lse_buffer, norm)
        for queries, keys in segments.across_blocks:
            piece, norm = self.kernel.forward(queries.take(q), keys.take(k), keys.take(v), False, scale)
            own, own_norm = queries.take(out), queries.take_norms(lse)
            share = torch.sigmoid(norm - own_norm)[..., None]
            queries.put(out_buffer, torch.lerp(own.to(wide), piece.to(wide), share).to(out.dtype))
            queries.put(lse_buffer, torch.logaddexp(norm, own_norm))
        return out, lse

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
        """As :class:`SegmentKernel`."""
        dq, dk, dv = (_buffer(x) for x in (q, k, v))

        def call(queries: Block, keys: Block, causal: bool) -> Grads:
            pieces = (queries.take(grad), queries.take(q), keys.take(k), keys.take(v), queries.take(out))
            return self.kernel.backward(*pieces, queries.take_norms(lse), causal, scale)

        for block in segments.own_blocks:
            for total, part in zip((dq, dk, dv), call(block, block, True), strict=True):
                block.put(total, part)
        for queries, keys in segments.across_blocks:
            gq, gk, gv = call(queries, keys, False)
            queries.add(dq, gq)
            keys.add(dk, gk)
            keys.add(dv, gv)
        return dq[:-1], dk[:-1], dv[:-1]


def _buffer(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for ``x``, and a row for what padding computes."""
    return torch.empty(x.shape[0] + 1, *x.shape[1:], dtype=dtype or x.dtype, device=x.device)


# -- sequences of any length, end to end ------------------------------------------------------------------------------
class OffsetsKernel(Protocol):
    """One call: ``q [T, H, d]``, ``k, v [S, K, d]``, sequence i of the keys for sequence i of the queries; lse ``[H, T]``."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Stretch, keys: Stretch, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Stretch,
        keys: Stretch,
        causal: bool,
        scale: float,
    ) -> Grads: ...


class CudaFlash:
    """Flash attention for sequences of any length on CUDA: bfloat16 and float16, head size up to 256 in steps of 8.

    What ``torch.nn.attention.varlen`` is made of; called below it, because the backward needs another log-sum-exp than
    the forward returned.
    """

    name = "flash attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Stretch, keys: Stretch, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, queries.offsets, keys.offsets, *_longest(queries, keys), 0.0, causal, False, scale=scale
        )
        if lse.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(f"expected log-sum-exp [{q.shape[1]}, {q.shape[0]}], got {list(lse.shape)}")
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Stretch,
        keys: Stretch,
        causal: bool,
        scale: float,
    ) -> Grads:
        # of a dropout that is not there
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        lengths = (queries.offsets, keys.offsets, *_longest(queries, keys))
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, state, unused, scale=scale
        )


def _longest(queries: Stretch, keys: Stretch) -> tuple[int, int]:
    # Never 1: with grouped heads the kernel then takes the queries for one step of generation, and lays them out anew.
    return max(2, queries.longest), max(2, keys.longest)


class Dense:
    """Attention by its definition, one sequence at a time: any device and dtype, with all scores of a sequence in memory.

    What the others are proved against, and what serves float64 on CUDA, for which there is no other kernel.
    """

    name = "attention by its definition"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Stretch, keys: Stretch, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=_wide(q), device=q.device)
        for (begin, end), (first, last) in zip(queries.pairs, keys.pairs, strict=True):
            scores = self._scores(q[begin:end], k[first:last], causal, scale)
            norm = scores.logsumexp(-1)
            weights = (scores - norm[..., None]).exp()
            values = self._heads(v[first:last], q.shape[1])
            out[begin:end] = (weights @ values).transpose(0, 1).to(out.dtype)
            lse[:, begin:end] = norm
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Stretch,
        keys: Stretch,
        causal: bool,
        scale: float,
    ) -> Grads:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for (begin, end), (first, last) in zip(queries.pairs, keys.pairs, strict=True):
            weights = (self._scores(q[begin:end], k[first:last], causal, scale) - lse[:, begin:end, None]).exp()
            upstream, mine = (x[begin:end].transpose(0, 1).to(weights.dtype) for x in (grad, out))
            values, others = (self._heads(x[first:last], q.shape[1]) for x in (v, k))
            slope = weights * (upstream @ values.mT - (upstream * mine).sum(-1, keepdim=True)) * scale
            dq[begin:end] = (slope @ others).transpose(0, 1).to(dq.dtype)
            dk[first:last] = self._summed(slope.mT @ q[begin:end].transpose(0, 1).to(slope.dtype), k.shape[1], dk.dtype)
            dv[first:last] = self._summed(weights.mT @ upstream, v.shape[1], dv.dtype)
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        """``[H, T, S]``; a causal sequence has as many keys as queries."""
        scores = q.transpose(0, 1).to(_wide(q)) @ self._heads(k, q.shape[1]).mT * scale
        if not causal:
            return scores
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """``[S, K, d]`` to ``[H, S, d]``."""
        return x.to(_wide(x)).transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)

    def _summed(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """``[H, S, d]`` to ``[S, K, d]``: a key's head served several of the queries'."""
        return x.unflatten(0, (heads, -1)).sum(1).transpose(0, 1).to(dtype)


class ByOffsets:
    """A packed row as it is: nothing is padded, and keys may have fewer heads.

    Args:
        kernel: of one call.
    """

    grouped = True

    def __init__(self, kernel: OffsetsKernel) -> None:
        self.kernel, self.name = kernel, kernel.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """As :class:`SegmentKernel`; log-sum-exp ``[H, N]``."""
        out, lse = self.kernel.forward(q, k, v, segments.own, segments.own, True, scale)
        if segments.across is not None:
            queries, keys = segments.across
            piece, norm = self.kernel.forward(queries.take(q), keys.take(k), keys.take(v), queries, keys, False, scale)
            norm, own, own_norm = norm.t(), queries.take(out), queries.take(lse.t())
            share = torch.sigmoid(norm - own_norm)[..., None]
            wide = lse.dtype
            queries.put(out, torch.lerp(own.to(wide), piece.to(wide), share).to(out.dtype))
            queries.put(lse.t(), torch.logaddexp(norm, own_norm))
        return out, lse

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
        """As :class:`SegmentKernel`."""
        own = segments.own
        dq, dk, dv = self.kernel.backward(grad, q, k, v, out, lse, own, own, True, scale)
        if segments.across is not None:
            queries, keys = segments.across
            parts = (queries.take(grad), queries.take(q), keys.take(k), keys.take(v), queries.take(out))
            norm = queries.take(lse.t()).t()
            gq, gk, gv = self.kernel.backward(*parts, norm, queries, keys, False, scale)
            queries.add(dq, gq)
            keys.add(dk, gk)
            keys.add(dv, gv)
        return dq, dk, dv
