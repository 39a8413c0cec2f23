"""The passes of :mod:`rlft.ops.tiles` and :mod:`rlft.ops.plans` with fused kernels between the matrix products.

A tile is then read once for all that is between two GEMMs, where torch's operators read and write it a dozen times.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from rlft.ops.tiles import FAR, Problem, Rows, Workspace

__all__ = ["BLOCK", "FusedRows", "fused_d_logits"]

BLOCK = 2048  # columns that one program holds in registers at a time, at most


def _kernels(p: Problem) -> Any:
    if p.fused == "compiled":
        from rlft.ops import compiled

        return compiled
    from rlft.ops import kernels

    return kernels


def _rows(tile: Tensor) -> int:
    """Rows of one program: one, but under the interpreter, where a program costs as much as its arithmetic."""
    return 1 if tile.is_cuda else 64


def _grid(n: int, raw: dict[str, Any]) -> tuple[int]:
    return (-(-n // raw["ROWS"]),)


def _run(kernel: Any, n: int, on: Tensor, arguments: dict[str, Any]) -> None:
    """Launch on the device of the tensors, which need not be the current one.

    Without fused multiply-adds: equal logits of policy and reference must stay equal, so that their KL is exactly 0.
    """
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[_grid(n, arguments)](**arguments, enable_fp_fusion=False)


def _product(p: Problem, a: Tensor, b: Tensor, space: Workspace, name: str) -> Tensor:
    """``a @ b`` in the dtype of the sums; of half-precision operands in a new tensor, which spares a copy of the tile."""
    if a.dtype == b.dtype == p.dtype:
        return p.matmul(a, b, space.get(name, a.shape[0], b.shape[1]))
    half = a.dtype if a.dtype != p.dtype else b.dtype
    return torch.mm(a.to(half), b.to(half), out_dtype=p.dtype)


def _add_product(p: Problem, total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in one pass over ``total`` where cuBLAS may write float32 sums of half-precision products."""
    if a.dtype == b.dtype != p.dtype and _accumulates(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, p.dtype, out=total)
    else:
        p.add_matmul(total, a, b)


@functools.cache
def _accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a half-precision product to a float32 matrix (some versions refuse the mixture)."""
    total, a = torch.ones(16, 16, device=device), torch.eye(16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(torch.equal(total, torch.ones_like(total) + torch.eye(16, device=device)))


@functools.lru_cache(maxsize=64)
def _scales(device: torch.device, dtype: torch.dtype, *values: float) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _raw(p: Problem, space: Workspace, rows: slice, cols: slice, h: Tensor, hr: Tensor | None) -> dict[str, Any]:
    """The matrix products of a tile, and the arguments of a kernel that say how to read them."""
    n, v = rows.stop - rows.start, cols.stop - cols.start
    w = p.operand(p.weight[cols])
    z = _product(p, h, w.t(), space, "z")
    by_difference = p.ref_weight is None and w.dtype == z.dtype
    ref, ref_bias = z, None
    if hr is not None:
        own = w if p.ref_weight is None else p.operand(p.ref_weight[cols])
        ref = _product(p, h - hr if by_difference else hr, own.t(), space, "ref")
        ref_bias = p.bias if p.ref_weight is None else p.ref_bias
    return {
        "z_ptr": z, "ref_ptr": ref, "n": n,
        "bias_ptr": None if p.bias is None else p.bias[cols].contiguous(),
        "ref_bias_ptr": None if ref_bias is None else ref_bias[cols].contiguous(),
        "scales_ptr": _scales(z.device, p.dtype, p.pre, 1.0 if p.post is None else p.post, p.slope),
        "v": v, "first_column": cols.start, "HAS_REF": hr is not None, "BY_DIFFERENCE": by_difference,
        "SOFTCAP": p.post is not None, "ROWS": _rows(z), "BLOCK": min(BLOCK, 1 << (v - 1).bit_length()),
    }  # fmt: skip


class FusedRows(Rows):
    """The online state of one block of rows, as one tensor that the kernel updates."""

    rescale: Tensor
    shift: Tensor
    moved: Tensor

    def __init__(self, p: Problem, rows: slice, want: frozenset[str], basis: frozenset[str], space: Workspace) -> None:
        super().__init__(p, rows, want, basis, space)
        self.kernels = _kernels(p)
        n = rows.stop - rows.start
        self.state = torch.zeros(len(self.kernels.STATE), n, dtype=p.dtype, device=p.hidden.device)
        for name, row in zip(self.kernels.STATE, self.state, strict=True):
            setattr(self, name, row)
        self.targets = self.targets.contiguous()

    def _fold(self, cols: slice) -> None:
        p, n, v = self.p, self.state.shape[1], cols.stop - cols.start
        raw = _raw(p, self.space, self.rows, cols, self.h, self.hr)
        w = p.operand(p.weight[cols])

        def factor(kept: Tensor | None, name: str) -> Tensor | None:
            return None if kept is None else self.space.get(name, n, v, dtype=w.dtype)

        e, ez, ed = factor(self.e_w, "e"), factor(self.ez_w, "ez"), factor(self.ed_w, "ed")
        _run(self.kernels.fold, n, self.state, {
            "targets_ptr": self.targets, "state_ptr": self.state, "e_ptr": e, "ez_ptr": ez, "ed_ptr": ed,
            "FIRST": self.first, "WANT_KL": "kl" in self.want, "FAR": FAR, **raw,
        })  # fmt: skip
        if self.e_w is None or e is None:
            return
        rescale = self.rescale[:, None]
        if self.ez_w is not None and ez is not None:
            self.ez_w.addcmul_(self.shift[:, None], self.e_w).mul_(rescale)
            _add_product(p, self.ez_w, ez, w)
        self.e_w.mul_(rescale)
        _add_product(p, self.e_w, e, w)
        if self.ed_w is not None and ed is not None:
            self.ed_w.mul_(rescale)
            _add_product(p, self.ed_w, ed, w)
            self.ed_w.addcmul_(self.moved[:, None], self.e_w, value=-1.0)


def fused_d_logits(
    ctx: Any,
    p: Problem,
    space: Workspace,
    rows: slice,
    cols: slice,
    h: Tensor,
    hr: Tensor | None,
    given: dict[str, Tensor],
) -> Tensor:
    """The gradient of one block of raw head outputs, in the dtype that the next products want."""
    n, v = rows.stop - rows.start, cols.stop - cols.start
    raw = _raw(p, space, rows, cols, h, hr)
    # a bias sums the entries themselves, which half precision would round
    dtype = p.dtype if ctx.needs_input_grad[2] else p.operand(p.weight[:0]).dtype
    out = space.get("dz", n, v, dtype=dtype)

    def row(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows].to(p.dtype).contiguous()

    _run(_kernels(p).d_logits, n, out, {
        "targets_ptr": p.targets[rows].contiguous(), "lse_ptr": row(ctx.lse),
        "entropy_ptr": row(ctx.entropy if "entropy" in given else None),
        "mean_delta_ptr": row(ctx.mean_delta if "kl" in given else None),
        "g_logps_ptr": row(given.get("logps")), "g_entropy_ptr": row(given.get("entropy")),
        "g_kl_ptr": row(given.get("kl")), "out_ptr": out, **raw,
    })  # fmt: skip
    return out
