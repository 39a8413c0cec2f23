"""The two autograd functions over :func:`rlft.ops.tiles.scan`: stored bases (frozen head), or recomputed logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.ops.fused import FusedRows, fused_d_logits
from rlft.ops.tiles import Problem, Rows, Workspace, logits, scan

__all__ = ["RecomputePlan", "TilePlan"]


class TilePlan(torch.autograd.Function):
    """Frozen head. The forward stores one ``[N, D]`` row of derivatives per differentiable output."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, problem: Problem, want: tuple[str, ...], grad: tuple[str, ...]) -> Any:
        needed = frozenset(grad) if ctx.needs_input_grad[0] else frozenset()
        with torch.autocast(hidden.device.type, enabled=False):
            result = scan(problem, frozenset(want), needed, FusedRows if problem.fused else Rows)
        ctx.set_materialize_grads(False)
        ctx.names, ctx.hidden_dtype = want, hidden.dtype
        ctx.bases = tuple(sorted(needed))
        ctx.save_for_backward(*(result.basis[name] for name in ctx.bases))
        outputs = tuple(result.values[name] for name in want)
        ctx.mark_non_differentiable(*(out for name, out in zip(want, outputs, strict=True) if name not in grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        given = dict(zip(ctx.names, upstream, strict=True))
        total: Tensor | None = None
        for name, basis in zip(ctx.bases, ctx.saved_tensors, strict=True):
            g = given[name]
            if g is None:
                continue
            # A zero upstream (a masked token) stays zero even where the basis is not finite.
            part = torch.where(g[:, None] != 0, g[:, None] * basis, 0.0)
            total = part if total is None else total.add_(part)
        return None if total is None else total.to(ctx.hidden_dtype), None, None, None


class RecomputePlan(torch.autograd.Function):
    """Trainable head. The forward keeps per-row statistics; the backward walks the tiles again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        want: tuple[str, ...],
        grad: tuple[str, ...],
    ) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            result = scan(problem, frozenset(want), frozenset(), FusedRows if problem.fused else Rows)
        ctx.set_materialize_grads(False)
        ctx.names, ctx.problem = want, problem
        ctx.save_for_backward(hidden, weight, bias, problem.ref_hidden, problem.ref_weight, problem.ref_bias)
        ctx.lse, ctx.mean_delta, ctx.entropy = result.lse, result.mean_delta, result.values.get("entropy")
        outputs = tuple(result.values[name] for name in want)
        ctx.mark_non_differentiable(*(out for name, out in zip(want, outputs, strict=True) if name not in grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        hidden, weight, bias, *_ = ctx.saved_tensors  # raises if one was changed in place since the forward
        given = {name: g for name, g in zip(ctx.names, upstream, strict=True) if g is not None}
        if not given:
            return (None,) * 6
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        p: Problem = ctx.problem
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden = torch.zeros_like(hidden, dtype=p.dtype) if needs_hidden else None
            d_weight = torch.empty_like(weight) if needs_weight else None
            d_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
            _walk(ctx, p, given, d_hidden, d_weight, d_bias)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _walk(
    ctx: Any,
    p: Problem,
    given: dict[str, Tensor],
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Vocabulary outside, rows inside: the sum of the head's gradient is one float32 tile, whatever its dtype."""
    space = Workspace(p)
    needs_ref = "kl" in given
    d_logits = fused_d_logits if p.fused else _d_logits
    for cols in p.column_tiles():
        v = cols.stop - cols.start
        w = p.operand(p.weight[cols])
        tile_weight = (
            torch.zeros(v, p.hidden.shape[1], dtype=p.dtype, device=w.device) if d_weight is not None else None
        )
        tile_bias = torch.zeros(v, dtype=p.dtype, device=w.device) if d_bias is not None else None
        for rows in p.row_tiles():
            h = p.operand(p.hidden[rows])
            hr = p.operand(p.ref_hidden[rows]) if needs_ref and p.ref_hidden is not None else None
            dx = d_logits(ctx, p, space, rows, cols, h, hr, given)
            if d_hidden is not None:
                p.add_matmul(d_hidden[rows], dx, w)
            if tile_weight is not None:
                p.add_matmul(tile_weight, dx.t(), h)
            if tile_bias is not None:
                tile_bias.add_(dx.sum(0))
        if d_weight is not None and tile_weight is not None:
            d_weight[cols] = tile_weight
        if d_bias is not None and tile_bias is not None:
            d_bias[cols] = tile_bias


def _d_logits(
    ctx: Any,
    p: Problem,
    space: Workspace,
    rows: slice,
    cols: slice,
    h: Tensor,
    hr: Tensor | None,
    given: dict[str, Tensor],
) -> Tensor:
    """The gradient of one block of raw head outputs."""
    tile = logits(p, space, rows, cols, h, hr)
    n, v = tile.z.shape
    logp = tile.z.sub_(ctx.lse[rows, None])
    prob = torch.exp(logp, out=space.get("e", n, v))
    dz = space.get("psi", n, v).zero_()
    if "logps" in given:
        g = given["logps"][rows].to(p.dtype)
        dz.addcmul_(g[:, None], prob, value=-1.0)
        targets = p.targets[rows]
        here = (targets >= cols.start) & (targets < cols.stop)
        column = (targets - cols.start).clamp(0, v - 1)[:, None]
        dz.scatter_add_(1, column, torch.where(here, g, 0.0)[:, None])
    if "entropy" in given:  # -p (z - E[z]) with z - E[z] = log p + H
        g = given["entropy"][rows].to(p.dtype)
        centred = logp.add_(ctx.entropy[rows, None])
        dz.addcmul_(g[:, None] * centred, prob, value=-1.0)
    if "kl" in given:  # p (delta - E[delta])
        assert tile.delta is not None
        g = given["kl"][rows].to(p.dtype)
        dz.addcmul_(tile.delta.sub_(ctx.mean_delta[rows, None]), g[:, None] * prob)
    dz.mul_(p.slope)
    return dz if tile.factor is None else dz.mul_(tile.factor)
