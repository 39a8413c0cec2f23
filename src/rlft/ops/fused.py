"""The passes of :mod:`rlft.ops.tiles` and :mod:`rlft.ops.plans` with Triton kernels between the matrix products.

A tile is then read once for all that is between two GEMMs, where torch's operators read and write it a dozen times.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from rlft.ops.tiles import FAR, Problem, Rows, Workspace

__all__ = ["FusedRows", "fused_d_logits", "require"]

_BLOCK = 2048  # columns that one program holds in registers at a time, at most


def require(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("plan 'triton' needs the package triton (it comes with torch's CUDA builds); use plan='tile'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"plan 'triton' needs a CUDA device, and the tensors are on {device}; use plan='tile' (or 'auto')"
        )


def _kernels() -> Any:
    from rlft.ops import kernels

    return kernels


def _rows(tile: Tensor) -> int:
    """Rows of one program: one, but under the interpreter, where a program costs as much as its arithmetic."""
    return 1 if tile.is_cuda else 64


def _grid(n: int, raw: dict[str, Any]) -> tuple[int]:
    return (-(-n // raw["ROWS"]),)


def _raw(p: Problem, space: Workspace, rows: slice, cols: slice, h: Tensor, hr: Tensor | None) -> dict[str, Any]:
    """The matrix products of a tile, and the arguments of a kernel that say how to read them."""
    n, v = rows.stop - rows.start, cols.stop - cols.start
    w = p.operand(p.weight[cols])
    z = p.matmul(h, w.t(), space.get("z", n, v))
    by_difference = p.ref_weight is None and w.dtype == z.dtype
    ref, ref_bias = z, None
    if hr is not None:
        own = w if p.ref_weight is None else p.operand(p.ref_weight[cols])
        ref = p.matmul(h - hr if by_difference else hr, own.t(), space.get("ref", n, v))
        ref_bias = p.bias if p.ref_weight is None else p.ref_bias
    return {
        "z_ptr": z, "ref_ptr": ref, "n": n,
        "bias_ptr": None if p.bias is None else p.bias[cols].contiguous(),
        "ref_bias_ptr": None if ref_bias is None else ref_bias[cols].contiguous(),
        "v": v, "first_column": cols.start, "pre": p.pre, "post": 1.0 if p.post is None else p.post,
        "HAS_REF": hr is not None, "BY_DIFFERENCE": by_difference, "SOFTCAP": p.post is not None, "ROWS": _rows(z),
        "BLOCK": min(_BLOCK, 1 << (v - 1).bit_length()),
    }  # fmt: skip


class FusedRows(Rows):
    """The online state of one block of rows, as one tensor that the kernel updates."""

    rescale: Tensor
    shift: Tensor
    moved: Tensor

    def __init__(self, p: Problem, rows: slice, want: frozenset[str], basis: frozenset[str], space: Workspace) -> None:
        super().__init__(p, rows, want, basis, space)
        self.kernels = _kernels()
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
        self.kernels.fold[_grid(n, raw)](
            targets_ptr=self.targets, state_ptr=self.state, e_ptr=e, ez_ptr=ez, ed_ptr=ed,
            FIRST=self.first, WANT_KL="kl" in self.want, FAR=FAR, **raw,
        )  # fmt: skip
        if self.e_w is None or e is None:
            return
        rescale = self.rescale[:, None]
        if self.ez_w is not None and ez is not None:
            self.ez_w.addcmul_(self.shift[:, None], self.e_w).mul_(rescale)
            p.add_matmul(self.ez_w, ez, w)
        self.e_w.mul_(rescale)
        p.add_matmul(self.e_w, e, w)
        if self.ed_w is not None and ed is not None:
            self.ed_w.mul_(rescale)
            p.add_matmul(self.ed_w, ed, w)
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
    """The gradient of one block of raw head outputs, in the dtype that the next product wants."""
    n, v = rows.stop - rows.start, cols.stop - cols.start
    raw = _raw(p, space, rows, cols, h, hr)
    out = space.get("dz", n, v)

    def row(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows].to(p.dtype).contiguous()

    _kernels().d_logits[_grid(n, raw)](
        targets_ptr=p.targets[rows].contiguous(), lse_ptr=row(ctx.lse),
        entropy_ptr=row(ctx.entropy if "entropy" in given else None),
        mean_delta_ptr=row(ctx.mean_delta if "kl" in given else None),
        g_logps_ptr=row(given.get("logps")), g_entropy_ptr=row(given.get("entropy")), g_kl_ptr=row(given.get("kl")),
        out_ptr=out, slope=p.slope, **raw,
    )  # fmt: skip
    return out
