"""The folds of :mod:`rlft.ops.kernels` written with torch's operators and compiled by torch.compile, for any device.

The two functions have the arguments, and write into the buffers, of the Triton kernels of the same names, so that
:class:`rlft.ops.fused.FusedRows` drives either. torch's inductor makes of each a few loops over a tile, where the
operators one by one read and write it a dozen times.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["STATE", "d_logits", "fold", "require"]

#: As in :data:`rlft.ops.kernels.STATE`, which cannot be imported where there is no triton.
STATE = (
    "top", "s", "q", "ref_top", "ref_s", "centre", "a", "b", "target_z", "target_ref", "target_factor",
    "rescale", "shift", "moved",
)  # fmt: skip


def require() -> None:
    """Raises ValueError where nothing can be compiled."""
    if wrong := _flaw():
        raise ValueError(
            f"plan 'compiled' needs torch.compile, which fails here: {wrong}. On a processor it needs a C++ compiler "
            f"(g++ or clang++) on the PATH; or use plan='tile'"
        )


@functools.cache
def _flaw() -> str | None:
    try:
        torch.compile(lambda x: x.exp().sum(), dynamic=True)(torch.ones(4, 4))
    except Exception as error:  # compilers fail in many ways; the caller is told and has other plans
        return f"{type(error).__name__}: {(str(error).splitlines() or ['without a message'])[0]}"
    return None


def _phi(u: Tensor) -> Tensor:
    """``expm1(u) - u``, to full relative precision: a series near zero, where the difference would lose its digits."""
    series = torch.ones_like(u)
    for i in range(18 if u.dtype == torch.float64 else 10, 2, -1):
        series = 1.0 + u * (series * (1.0 / i))
    return torch.where(u.abs() < 0.5, 0.5 * u * u * series, torch.expm1(u) - u)


def _tile(
    x: Tensor, y: Tensor | None, bias: Tensor | None, ref_bias: Tensor | None, scales: Tensor, by_difference: bool,
    softcap: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Logits, slope of the soft cap, reference logits and their difference."""
    pre, post = scales[0], scales[1]
    if bias is not None:
        x = x + bias.to(x.dtype)
    z = x * pre
    factor = ref = delta = None
    if y is not None and by_difference:
        delta = y * pre
        ref = z - delta
    elif y is not None:
        if ref_bias is not None:
            y = y + ref_bias.to(y.dtype)
        ref = y * pre
        delta = (x - y) * pre
    if softcap:
        t = torch.tanh(z)
        factor = 1.0 - t * t
        if delta is not None and ref is not None:
            if by_difference:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
                delta = torch.tanh(delta) * (1.0 - t * torch.tanh(ref)) * post
            else:
                ref = torch.tanh(ref)
                delta = (t - ref) * post
                ref = ref * post
        z = t * post
    if delta is not None and by_difference:
        ref = z - delta
    return z, factor, ref, delta


def _at(target: Tensor, values: Tensor) -> Tensor:
    """``[n]`` the entry of each row at ``target``; 0 where that is outside the tile."""
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.where(columns[None, :] == target[:, None], values, 0.0).sum(-1)


def _fold(
    x: Tensor, y: Tensor | None, bias: Tensor | None, ref_bias: Tensor | None, target: Tensor, state: Tensor,
    e_out: Tensor | None, ez_out: Tensor | None, ed_out: Tensor | None, scales: Tensor, far: float, by_difference: bool, softcap: bool,
    want_kl: bool,
) -> None:  # fmt: skip
    z, factor, ref, delta = _tile(x, y, bias, ref_bias, scales, by_difference, softcap)
    top_old, s, q, ref_top_old, ref_s, centre, a, b, target_z, target_ref, target_factor = state[:11].unbind(0)
    first = torch.isneginf(top_old)
    top = torch.maximum(top_old, z.amax(-1))
    shift = torch.where(first, 0.0, top_old - top)
    rescale = torch.where(first, 0.0, torch.exp(shift))
    below = z - top[:, None]
    e = torch.exp(below)
    s_here = e.sum(-1)
    q = rescale * (q + shift * s) + (e * below).sum(-1)
    s = rescale * s + s_here
    target_z = target_z + _at(target, z)
    target_factor = target_factor + (_at(target, torch.ones_like(z) if factor is None else factor))
    ref_top, moved = ref_top_old, torch.zeros_like(s)
    if ref is not None:
        ref_top = torch.maximum(ref_top_old, ref.amax(-1))
        ref_e = torch.exp(ref - ref_top[:, None])
        ref_here = ref_e.sum(-1)
        ref_s = torch.where(first, 0.0, torch.exp(ref_top_old - ref_top)) * ref_s + ref_here
        target_ref = target_ref + _at(target, ref)
    if want_kl and ref is not None and delta is not None:
        # The centre is the Lambda of the first tile.
        centre = torch.where(first, (top - ref_top) + (torch.log(s_here) - torch.log(ref_here)), centre)
        u = centre[:, None] - delta
        # u beyond far: e * expm1(u) would be 0 * inf for underflowed e; the term is then the reference's mass
        mass = ref_e * torch.exp(ref_top - top + centre)[:, None]
        psi = torch.where(u > far, mass - e * (1.0 + u), e * _phi(u.clamp(max=far)))
        weighted = -(u * e)
        a = rescale * a + weighted.sum(-1)
        b = rescale * b + psi.sum(-1)
        if ed_out is not None:
            ed_out.copy_(weighted if factor is None else weighted * factor)
        new = (top - ref_top) + (torch.log(s) - torch.log(ref_s))
        moved = new - centre
        small = moved.clamp(-1.0, 1.0)
        phi = _phi(small)
        growth = small + phi
        direct = a - moved * s  # exact enough once the shift itself is of order one
        b = torch.where(moved.abs() <= 1.0, (1.0 + growth) * b + s * phi - a * growth, direct)
        a, centre = direct, new
    if ez_out is not None:
        weighted_z = e * below
        ez_out.copy_(weighted_z if factor is None else weighted_z * factor)
    if e_out is not None:
        e_out.copy_(e if factor is None else e * factor)
    rows = (top, s, q, ref_top, ref_s, centre, a, b, target_z, target_ref, target_factor, rescale, shift, moved)
    state.copy_(torch.stack(rows))


def _d_logits(
    x: Tensor, y: Tensor | None, bias: Tensor | None, ref_bias: Tensor | None, target: Tensor, lse: Tensor,
    entropy: Tensor | None, mean_delta: Tensor | None, g_logps: Tensor | None, g_entropy: Tensor | None,
    g_kl: Tensor | None, out: Tensor, scales: Tensor, by_difference: bool, softcap: bool,
) -> None:  # fmt: skip
    z, factor, _ref, delta = _tile(x, y, bias, ref_bias, scales, by_difference, softcap)
    logp = z - lse[:, None]
    prob = torch.exp(logp)
    dz = torch.zeros_like(z)
    if g_logps is not None:
        columns = torch.arange(z.shape[1], device=z.device)
        dz = dz + g_logps[:, None] * ((columns[None, :] == target[:, None]).to(z.dtype) - prob)
    if g_entropy is not None and entropy is not None:  # -p (z - E[z]) with z - E[z] = log p + H
        dz = dz - g_entropy[:, None] * prob * (logp + entropy[:, None])
    if g_kl is not None and mean_delta is not None and delta is not None:  # p (delta - E[delta])
        dz = dz + g_kl[:, None] * prob * (delta - mean_delta[:, None])
    dz = dz * scales[2]
    out.copy_(dz if factor is None else dz * factor)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True, fullgraph=True)


class _Fold:
    """Called as the Triton kernel is; the grid has no meaning here."""

    def __getitem__(self, grid: object) -> _Fold:
        return self

    def __call__(
        self, *, z_ptr: Tensor, ref_ptr: Tensor, bias_ptr: Tensor | None, ref_bias_ptr: Tensor | None,
        scales_ptr: Tensor, targets_ptr: Tensor, state_ptr: Tensor, e_ptr: Tensor | None, ez_ptr: Tensor | None, ed_ptr: Tensor | None,
        first_column: int, FIRST: bool, HAS_REF: bool, BY_DIFFERENCE: bool, SOFTCAP: bool,
        WANT_KL: bool, FAR: float, **_: Any,
    ) -> None:  # fmt: skip
        if FIRST:
            state_ptr[0], state_ptr[3] = -torch.inf, -torch.inf
        _compiled(_fold)(
            z_ptr, ref_ptr if HAS_REF else None, bias_ptr, ref_bias_ptr, targets_ptr - first_column, state_ptr,
            e_ptr, ez_ptr, ed_ptr, scales_ptr, FAR, BY_DIFFERENCE, SOFTCAP, WANT_KL,
        )  # fmt: skip


class _DLogits:
    """Called as the Triton kernel is; the grid has no meaning here."""

    def __getitem__(self, grid: object) -> _DLogits:
        return self

    def __call__(
        self, *, z_ptr: Tensor, ref_ptr: Tensor, bias_ptr: Tensor | None, ref_bias_ptr: Tensor | None,
        scales_ptr: Tensor, targets_ptr: Tensor, lse_ptr: Tensor, entropy_ptr: Tensor | None, mean_delta_ptr: Tensor | None,
        g_logps_ptr: Tensor | None, g_entropy_ptr: Tensor | None, g_kl_ptr: Tensor | None, out_ptr: Tensor,
        first_column: int, HAS_REF: bool, BY_DIFFERENCE: bool, SOFTCAP: bool,
        **_: Any,
    ) -> None:  # fmt: skip
        _compiled(_d_logits)(
            z_ptr, ref_ptr if HAS_REF else None, bias_ptr, ref_bias_ptr, targets_ptr - first_column, lse_ptr,
            entropy_ptr, mean_delta_ptr, g_logps_ptr, g_entropy_ptr, g_kl_ptr, out_ptr, scales_ptr,
            BY_DIFFERENCE, SOFTCAP,
        )  # fmt: skip


fold, d_logits = _Fold(), _DLogits()
