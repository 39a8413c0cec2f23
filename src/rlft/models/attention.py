"""Attention over a packed row in which the completions of a group share their prompt's keys, without a dense mask.

A packed row holds *segments*: prompts and completions (:mod:`rlft.models.segments`). A segment attends causally to itself;
a completion also attends to the whole of its prompt. Both calls are free of masks, so the fast kernels serve
(:mod:`rlft.models.attention_kernels`); which one is decided by device and dtype, and each is proved on a small row
before its first use.

Models need no change: :class:`GroupMask` poses as their 4-D attention mask, which transformers hands on untouched to
``scaled_dot_product_attention``, and answers that call itself. So the layout travels with the arguments of each layer:
nothing global is switched, and a checkpointed layer that is recomputed sees the same layout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlft.models.attention_kernels import (
    ByBlocks,
    ByOffsets,
    CpuFlash,
    CudaEfficient,
    CudaFlash,
    Dense,
    SegmentKernel,
)
from rlft.models.attention_views import ByViews
from rlft.models.segments import Segments, plan_segments

__all__ = ["DEVICES", "GroupMask", "NoKernelError", "Segments", "attend", "candidates", "flaw", "plan_segments"]

#: Types of device that have kernels.
DEVICES = ("cpu", "cuda")

_HALF = (torch.bfloat16, torch.float16)
_CPU = (ByViews(CpuFlash()),)
_CUDA: dict[torch.dtype, tuple[SegmentKernel, ...]] = {
    **dict.fromkeys(_HALF, (ByOffsets(CudaFlash()), ByBlocks(CudaEfficient()))),
    torch.float32: (ByBlocks(CudaEfficient()),),
    torch.float64: (ByOffsets(Dense()),),
}
# How far a kernel may be from the definition, relative to the largest entry: several times its rounding (that of TF32 for
# float32), and far less than what a wrong mask, length or log-sum-exp makes.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class NoKernelError(ValueError):
    """No kernel here computes attention over a packed row; the message says why."""


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[SegmentKernel, ...]:
    """The kernels for a device and dtype, the fastest first; empty where there are none."""
    if device.type == "cpu":
        return _CPU
    return _CUDA.get(dtype, ()) if device.type == "cuda" else ()


def choose(q: Tensor, k: Tensor) -> SegmentKernel:
    """The kernel for queries ``[1, H, N, d]`` and keys ``[1, K, N, d]``: the first candidate without a flaw.

    Raises:
        NoKernelError: where every candidate has one, or there is none.
    """
    found = []
    for kernel in candidates(q.device, q.dtype):
        heads = q.shape[1], k.shape[1] if kernel.grouped else q.shape[1]
        wrong = flaw(kernel, q.device, q.dtype, heads, q.shape[-1])
        if wrong is None:
            return kernel
        found.append(f"{kernel.name}: {wrong}")
    raise NoKernelError("; ".join(found) or f"there is no kernel for {q.dtype} on {q.device.type}")


@functools.cache
def flaw(
    kernel: SegmentKernel, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int
) -> str | None:
    """What is wrong with a kernel for these heads, on a small row with every kind of segment; None where nothing is.

    Output and gradients are compared with float64 arithmetic by the definition. Found once per process.

    Args:
        kernel: to look at.
        device, dtype: of the tensors.
        heads: of queries, and of keys.
        size: of a head.
    """
    # two groups, one of equal lengths; a completion of one token; a row on its own
    segments = [(0, 5), (5, 3), (8, 3), (11, 1), (12, 40), (52, 1), (53, 7)]
    plan = plan_segments(segments, [((8, 4), (0, 5)), ((12, 41), (5, 3))], device=device)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(plan.tokens, count, size, generator=generator).to(device, dtype)

    q, k, v, grad = draw(heads[0]), draw(heads[1]), draw(heads[1]), draw(heads[0])
    scale = size**-0.5
    oracle = ByOffsets(Dense())
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            out, lse = kernel.forward(q, k, v, plan, scale)
            mine = out, *kernel.backward(grad, q, k, v, out, lse, plan, scale)
            q, k, v = q.double(), k.double(), v.double()
            true_out, true_lse = oracle.forward(q, k, v, plan, scale)
            truth = true_out, *oracle.backward(grad.double(), q, k, v, true_out, true_lse, plan, scale)
            for name, a, b in zip(("output", "dq", "dk", "dv"), mine, truth, strict=True):
                error = float((a.double() - b).abs().max() / b.abs().max())
                if not error <= _ROUNDING.get(dtype, 0.0):
                    return f"its {name} is off by {error:.1e} on a small row"
    except torch.OutOfMemoryError:  # says nothing about the kernel, and must not be remembered
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # what torch says where a kernel is missing
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"
    return None


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, kernel: SegmentKernel
    ) -> Tensor:
        # [N, H, d] each.
        out, lse = kernel.forward(q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale, ctx.kernel = segments, scale, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.backward(grads[0], *ctx.saved_tensors, ctx.segments, ctx.scale), None, None, None


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
        ValueError: for a shape that does not fit the segments.
        NoKernelError: (a ValueError) where no kernel computes this device, dtype and head size.
    """
    if q.device.type not in DEVICES:
        raise NoKernelError(f"prompts are shared on {' and '.join(DEVICES)} only, got {q.device}; use layout='padded'")
    if q.shape[0] != 1 or q.shape[2] != segments.tokens or k.shape[2] != segments.tokens:
        raise ValueError(
            f"expected one packed row of {segments.tokens} tokens, got queries {list(q.shape)} and keys {list(k.shape)}"
        )
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"queries of {q.shape[-1]} and values of {v.shape[-1]} dimensions; use layout='padded'")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    kernel = choose(q, k)
    if k.shape[1] != q.shape[1] and not kernel.grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    # kernels read a head's entries as one run of memory
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = _SegmentAttention.apply(q, k, v, segments, q.shape[-1] ** -0.5 if scale is None else scale, kernel)
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


def _dropped(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rate: float, scale: float | None) -> Tensor:
    """Attention with dropout by torch's own, one call for segments of similar length.

    The two parts of an answer that shares a prompt cannot be merged: what is dropped in one is not known in the other.
    """
    if segments.grouped:
        raise NoKernelError(f"a shared prompt has no attention dropout, got {rate:g}; use layout='padded'")
    out = q.new_zeros(q.shape[2] + 1, q.shape[1], v.shape[-1])
    for block in segments.own_blocks:
        found = torch.nn.functional.scaled_dot_product_attention(
            *(block.take(x[0].transpose(0, 1)) for x in (q, k, v)),
            dropout_p=rate,
            is_causal=True,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        out = block.replaced(out.to(found.dtype), found)
    return out[:-1].transpose(0, 1)[None]


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
    if not isinstance(attn_mask, GroupMask) or is_causal:
        raise TypeError("the mask of a packed row stands alone, as it is; use layout='padded'")
    if dropout_p > 0.0:
        return _dropped(query, key, value, attn_mask.segments, dropout_p, scale)
    return attend(query, key, value, attn_mask.segments, scale=scale)
