"""Operators that torch has on CUDA alone, computed on a CPU: their arguments checked as the real ones check them.

So the code that calls them runs where there is no GPU. The checks are those of torch's own sources
(``aten/src/ATen/native/transformers/cuda``: flash_attn/flash_api.cpp, attention.cu and attention_backward.cu), and what
the real kernels merely assume (contiguous log-sum-exps, padded to 32 for memory-efficient attention) is checked too.
The arithmetic is float64 on dense scores, and shares nothing with rlft.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: How often each operator ran, by name.
CALLS: Counter[str] = Counter()


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``[..., H, T, d]`` by ``[..., K, S, d]``, in float64."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    """What a flash backward gives for the output and log-sum-exp it is handed, in float64."""
    heads, shared = q.shape[-3], k.shape[-3]
    wide_k, wide_v = (x.repeat_interleave(heads // shared, -3) for x in (k, v))
    weights = (torch.einsum("...qd,...kd->...qk", q, wide_k) * scale - lse[..., None]).exp()
    if causal:
        weights = weights.tril()
    slope = weights * (torch.einsum("...qd,...kd->...qk", grad, wide_v) - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = torch.einsum("...qk,...qd->...kd", slope, q), torch.einsum("...qk,...qd->...kd", weights, grad)
    dk, dv = (x.unflatten(-3, (shared, heads // shared)).sum(-3) for x in (dk, dv))
    return [slope @ wide_k, dk, dv]


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


# -- flash attention, sequences end to end ----------------------------------------------------------------------------
def _check_flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    _check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _check(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    _check(cu_q.dtype == cu_k.dtype == torch.int32, "cu_seqlens must have dtype int32")
    _check(cu_q.is_contiguous() and cu_k.is_contiguous(), "cu_seqlens must be contiguous")
    _check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    _check(q.dim() == k.dim() == v.dim() == 3, "expected [total, heads, head_size]")
    _check(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head_size must be a multiple of 8 of at most 256")
    _check(k.shape == v.shape and q.shape[1] % k.shape[1] == 0, "heads do not fit")
    _check(len(cu_q) == len(cu_k) and len(cu_q) > 1, "batch size must be positive")
    for offsets, total, longest in ((cu_q, q.shape[0], max_q), (cu_k, k.shape[0], max_k)):
        sizes = offsets.diff()
        _check(int(offsets[0]) == 0 and int(offsets[-1]) == total, f"offsets {offsets.tolist()} for {total} tokens")
        _check(bool((sizes > 0).all()) and int(sizes.max()) <= longest, "a sequence is longer than the longest")
    # in that case the kernel lays grouped queries out anew, as for one step of generation
    _check(not (max_q == 1 and q.shape[1] > k.shape[1]), "queries taken for one step of generation")


def _spans(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for i in range(len(cu_q) - 1):
        yield slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["flash forward"] += 1
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    _check(dropout_p == 0.0 and not return_debug_mask and not any(v is not None for v in unused.values()), "settings")
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
    for queries, keys in _spans(cum_seq_q, cum_seq_k):
        q, k, v = (x.transpose(0, 1).double() for x in (query[queries], key[keys], value[keys]))
        _check(not is_causal or q.shape[1] == k.shape[1], "causal with unequal lengths is aligned at the end")
        mine, norm = _attention(q, k, v, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
        out[queries], lse[:, queries] = mine.transpose(0, 1).to(out.dtype), norm.float()
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.empty(0)


def flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["flash backward"] += 1
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    _check(grad_out.dtype == out.dtype == query.dtype, "query and dout must have the same dtype")
    _check(grad_out.shape == out.shape == query.shape, "shapes of dout and out")
    _check(
        logsumexp.dtype == torch.float32 and logsumexp.is_contiguous(), "the kernel assumes a contiguous log-sum-exp"
    )
    _check(logsumexp.shape == (query.shape[1], query.shape[0]), "the kernel assumes a log-sum-exp [heads, total]")
    _check(rng_state.dtype == torch.uint64 and rng_state.shape == (2,), "rng_state")
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    for queries, keys in _spans(cum_seq_q, cum_seq_k):
        g, q, o = (x[queries].transpose(0, 1).double() for x in (grad_out, query, out))
        k, v = (x[keys].transpose(0, 1).double() for x in (key, value))
        parts = _gradients(
            g, q, k, v, o, logsumexp[:, queries].double(), is_causal, q.shape[-1] ** -0.5 if scale is None else scale
        )
        for total, span, part in zip((dq, dk, dv), (queries, keys, keys), parts, strict=True):
            total[span] = part.transpose(0, 1).to(total.dtype)
    return dq, dk, dv


# -- memory-efficient attention ---------------------------------------------------------------------------------------
def _check_efficient(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check(q.dtype in (torch.float16, torch.bfloat16, torch.float32), f"not implemented for {q.dtype}")
    _check(q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape, "expected [batch, heads, tokens, head_size]")
    _check(q.shape[:2] == k.shape[:2], "as many key heads as query heads are expected")
    _check(all(x.stride(-1) == 1 for x in (q, k, v)), "last dimension must be contiguous")


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["efficient forward"] += 1
    _check_efficient(query, key, value)
    _check(attn_bias is None and compute_log_sumexp and dropout_p == 0.0, "settings")
    q, k, v = (x.double() for x in (query, key, value))
    mine, norm = _attention(q, k, v, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    n, heads, tokens, size = q.shape
    out = torch.empty(n, tokens, heads, size, dtype=query.dtype).transpose(1, 2)
    out.copy_(mine)
    lse = torch.full((n, heads, -(-tokens // 32) * 32), torch.inf)
    lse[..., :tokens] = norm
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, seed, seed.clone()


def efficient_backward(
    grad_out_: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, out: Tensor, logsumexp: Tensor,
    philox_seed: Tensor, philox_offset: Tensor, dropout_p: float, grad_input_mask: Any, is_causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    CALLS["efficient backward"] += 1
    _check_efficient(query, key, value)
    tokens = query.shape[2]
    _check(attn_bias is None and list(grad_input_mask) == [True, True, True, False], "settings")
    _check(out.transpose(1, 2).is_contiguous(), "the kernel assumes out [batch, tokens, heads, head_size] contiguous")
    _check(
        logsumexp.dtype == torch.float32 and logsumexp.is_contiguous(), "the kernel assumes a contiguous log-sum-exp"
    )
    _check(logsumexp.shape[-1] == -(-tokens // 32) * 32, "the kernel reads blocks of 32 log-sum-exps")
    _check(bool((logsumexp[..., tokens:] > 1e20).all()), "padding must have no weight")
    grad, q, k, v, o = (x.double() for x in (grad_out_, query, key, value, out))
    lse = logsumexp[..., :tokens].double()
    parts = _gradients(grad, q, k, v, o, lse, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    return (*(p.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2) for p in parts), None)


# -- half-precision products with float32 sums ------------------------------------------------------------------------
def _check_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> None:
    _check(a.dtype == b.dtype, f"self and mat2 must have the same dtype, but got {a.dtype} and {b.dtype}")
    _check(out_dtype in (a.dtype, torch.float32), "out_dtype must be the same as input dtype or fp32")
    _check(a.dim() == b.dim() == 2, "matrices expected")


def product(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    CALLS["product"] += 1
    _check_product(self, mat2, out_dtype)
    return (self.float() @ mat2.float()).to(out_dtype)


def add_product(
    self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    CALLS["add product"] += 1
    _check_product(mat1, mat2, out_dtype)
    _check(self.dtype == out.dtype == out_dtype, "out_dtype must be the dtype of the provided out tensor")
    return out.copy_(beta * self + alpha * (mat1.float() @ mat2.float()).to(out_dtype))


@contextlib.contextmanager
def standins() -> Iterator[Counter[str]]:
    """The operators answer on CPU tensors; gives the count of their calls."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    CALLS.clear()
    try:
        library.impl("_flash_attention_forward", flash_forward)
        library.impl("_flash_attention_backward", flash_backward)
        library.impl("_scaled_dot_product_efficient_attention", efficient_forward)
        library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward)
        library.impl("mm.dtype", product)
        library.impl("addmm.dtype_out", add_product)
        yield CALLS
    finally:
        library._destroy()
