"""One pass over the vocabulary in tiles: online softmax, exact KL, and the derivative of each output as a row.

For a row with logits ``z`` (policy) and ``zr`` (reference), ``p = softmax(z)``, ``delta = z - zr``,
``Lambda = lse(z) - lse(zr)``::

    d logp_t  / dz_v = [v = t] - p_v
    d entropy / dz_v = -p_v (z_v - E_p[z])
    d KL      / dz_v =  p_v (delta_v - E_p[delta])

so with ``dz_v/dh = f_v W_v`` each derivative with respect to the hidden state is a p-weighted sum of rows of ``W``.
The pass accumulates those sums (``[N, D]``, the "basis") beside the statistics, rescaling as in online softmax.
With a frozen head the backward is then ``grad_output * basis``: no logits, no second pass.

KL is summed as ``E_p[e^u - 1 - u]``, ``u = Lambda - delta``: every term is non-negative (a Bregman divergence), so a
KL of 1e-6 keeps its digits where ``E_p[delta] - Lambda`` loses all of them. ``Lambda`` is known at the end only; the
sum is kept around ``centre``, the Lambda of the tiles seen so far, and moved after each tile:
``B(c + d) = e^d B + S (e^d - 1 - d) - A (e^d - 1)`` with ``S = sum e``, ``A = sum e (delta - c)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlft.ops import gemm

__all__ = ["FAR", "Fused", "Problem", "Rows", "Workspace", "logits", "scan"]

#: Kernels of :mod:`rlft.ops.fused` between the matrix products; none: torch's operators.
Fused = Literal["", "triton", "compiled"]
FAR = 30.0  # u beyond this: e * expm1(u) would be 0 * inf for underflowed e; the term is then the reference's mass


@dataclass(frozen=True, slots=True)
class Problem:
    """The inputs of the op, detached and checked. ``z = pre * x``, or ``post * tanh(pre * x)`` with a soft cap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None  # None: the policy's own head
    ref_bias: Tensor | None
    pre: float
    post: float | None
    chunk: tuple[int, int]
    fused: Fused = ""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every sum."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def slope(self) -> float:
        """dz/dx, up to the factor of the soft cap."""
        return self.pre if self.post is None else self.pre * self.post

    def row_tiles(self) -> Iterator[slice]:
        n, size = self.hidden.shape[0], self.chunk[0]
        return (slice(i, min(i + size, n)) for i in range(0, n, size))

    def column_tiles(self) -> Iterator[slice]:
        v, size = self.weight.shape[0], self.chunk[1]
        return (slice(i, min(i + size, v)) for i in range(0, v, size))

    def operand(self, tensor: Tensor) -> Tensor:
        """Half precision stays only where a matrix unit sums it in float32; elsewhere the tile is upcast."""
        half = tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor if half and tensor.device.type == "cuda" else tensor.to(self.dtype)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """``a @ b`` summed and stored in :attr:`dtype`, in ``out`` or in a tensor of its own: use what is returned."""
        if a.dtype == b.dtype == self.dtype:
            return gemm.product(a, b, out)
        half = a.dtype if a.dtype != self.dtype else b.dtype
        return out.copy_(torch.mm(a.to(half), b.to(half), out_dtype=self.dtype))

    def add_matmul(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """``total += a @ b``."""
        if a.dtype == b.dtype == self.dtype:
            gemm.add_product(total, a, b)
        else:
            half = a.dtype if a.dtype != self.dtype else b.dtype
            total.add_(torch.mm(a.to(half), b.to(half), out_dtype=self.dtype))


class Workspace:
    """Tile-sized buffers, allocated once and used for every tile (fresh pages cost more than the arithmetic)."""

    def __init__(self, problem: Problem) -> None:
        rows = min(problem.chunk[0], max(problem.hidden.shape[0], 1))
        columns = min(problem.chunk[1], problem.weight.shape[0])
        self._size = rows * columns
        self._like = problem.hidden
        self._dtype = problem.dtype
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._flat:
            self._flat[name] = torch.empty(self._size, dtype=dtype or self._dtype, device=self._like.device)
        return self._flat[name][: rows * columns].view(rows, columns)


@dataclass(slots=True)
class Tile:
    """One block of logits. ``factor`` is the slope of the soft cap, ``z``, ``delta``, ``ref`` as in the module text."""

    z: Tensor
    factor: Tensor | None
    delta: Tensor | None
    ref: Tensor | None


def logits(p: Problem, space: Workspace, rows: slice, cols: slice, h: Tensor, hr: Tensor | None) -> Tile:
    """The block ``rows x cols`` of the policy's logits, of the reference's, and of their difference."""
    n, v = rows.stop - rows.start, cols.stop - cols.start
    w = p.operand(p.weight[cols])
    z = p.matmul(h, w.t(), space.get("z", n, v))
    if p.bias is not None:
        z.add_(p.bias[cols].to(z.dtype))
    z.mul_(p.pre)
    delta = ref = factor = None
    # With one head, the difference of hidden states goes through it: delta keeps its digits when the two nearly agree,
    # and is exactly zero when they are equal.
    by_difference = p.ref_weight is None and w.dtype == z.dtype
    if hr is not None:
        ref = space.get("ref", n, v)
        delta = space.get("delta", n, v)
        if by_difference:
            delta = p.matmul(h - hr, w.t(), delta).mul_(p.pre)
        else:
            ref = p.matmul(hr, (w if p.ref_weight is None else p.operand(p.ref_weight[cols])).t(), ref)
            ref_bias = p.bias if p.ref_weight is None else p.ref_bias
            if ref_bias is not None:
                ref.add_(ref_bias[cols].to(z.dtype))
            ref.mul_(p.pre)
    if p.post is not None:
        if delta is not None and ref is not None and by_difference:
            torch.sub(z, delta, out=ref).tanh_()
            z.tanh_()
            # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
            delta.tanh_().mul_(ref.mul_(z).neg_().add_(1.0)).mul_(p.post)
        else:
            z.tanh_()
            if ref is not None:
                ref.tanh_().mul_(p.post)
        factor = torch.mul(z, z, out=space.get("factor", n, v)).neg_().add_(1.0)
        z.mul_(p.post)
    if delta is not None and ref is not None:
        if by_difference:
            torch.sub(z, delta, out=ref)
        else:
            torch.sub(z, ref, out=delta)
    return Tile(z, factor, delta, ref)


@dataclass(slots=True)
class Scan:
    """Per-row results ``[N]`` and bases ``[N, D]``, by the name of the output they belong to.

    ``mean_delta`` is ``E_p[delta]``, with as many digits as the deltas have (KL + Lambda has fewer).
    """

    values: dict[str, Tensor]
    lse: Tensor
    mean_delta: Tensor | None
    basis: dict[str, Tensor]


def scan(p: Problem, want: frozenset[str], basis: frozenset[str], kind: type[Rows]) -> Scan:
    """Run the pass; ``basis`` names the outputs whose derivative with respect to ``hidden`` is stored.

    ``kind`` does the arithmetic: :class:`Rows`, or its subclass around fused kernels, which this file need not know.
    """
    n, d = p.hidden.shape

    def per_row() -> Tensor:
        return torch.empty(n, dtype=p.dtype, device=p.hidden.device)

    result = Scan(
        values={name: per_row() for name in sorted(want)},
        lse=per_row(),
        mean_delta=per_row() if "kl" in want else None,
        basis={name: torch.empty(n, d, dtype=p.dtype, device=p.hidden.device) for name in sorted(basis)},
    )
    space = Workspace(p)
    for rows in p.row_tiles():
        kind(p, rows, want, basis, space).run(result)
    return result


class Rows:
    """The online state of one block of rows."""

    def __init__(self, p: Problem, rows: slice, want: frozenset[str], basis: frozenset[str], space: Workspace) -> None:
        self.p, self.rows, self.want, self.basis, self.space = p, rows, want, basis, space
        n, d = rows.stop - rows.start, p.hidden.shape[1]
        like = {"dtype": p.dtype, "device": p.hidden.device}
        self.h = p.operand(p.hidden[rows])
        self.hr = p.operand(p.ref_hidden[rows]) if want & {"ref_logps", "kl"} and p.ref_hidden is not None else None
        self.targets = p.targets[rows]
        self.first = True
        self.top = torch.zeros(n, **like)  # running maximum of z
        self.s = torch.zeros(n, **like)  # sum e, e = exp(z - top)
        self.q = torch.zeros(n, **like)  # sum e (z - top)
        self.ref_top, self.ref_s = torch.zeros(n, **like), torch.zeros(n, **like)
        self.centre = torch.zeros(n, **like)
        self.a, self.b = torch.zeros(n, **like), torch.zeros(n, **like)  # sum e (delta - centre), Bregman sum
        self.target_z, self.target_ref = torch.zeros(n, **like), torch.zeros(n, **like)
        self.e_w = torch.zeros(n, d, **like) if basis else None  # sum e f W
        self.ez_w = torch.zeros(n, d, **like) if "entropy" in basis else None  # sum e (z - top) f W
        self.ed_w = torch.zeros(n, d, **like) if "kl" in basis else None  # sum e (delta - centre) f W
        self.target_factor = torch.ones(n, **like)

    def run(self, result: Scan) -> None:
        for cols in self.p.column_tiles():
            self._fold(cols)
            self.first = False
        self._finish(result)

    def _fold(self, cols: slice) -> None:
        p, space = self.p, self.space
        tile = logits(p, space, self.rows, cols, self.h, self.hr)
        z = tile.z
        n, v = z.shape
        here = (self.targets >= cols.start) & (self.targets < cols.stop)
        column = (self.targets - cols.start).clamp(0, v - 1)[:, None]
        self.target_z = torch.where(here, z.gather(1, column).squeeze(1), self.target_z)
        if tile.factor is not None:
            self.target_factor = torch.where(here, tile.factor.gather(1, column).squeeze(1), self.target_factor)

        top = z.amax(-1) if self.first else torch.maximum(self.top, z.amax(-1))
        shift = self.top - top  # <= 0; the first tile has nothing to rescale
        rescale = torch.zeros_like(shift) if self.first else shift.exp()
        z.sub_(top[:, None])
        wants_z = "entropy" in self.want
        e = torch.exp(z, out=space.get("e", n, v)) if wants_z else z.exp_()
        if wants_z:
            moved = torch.zeros_like(shift) if self.first else self.q + shift * self.s
            self.q = rescale * moved + torch.mul(e, z, out=space.get("psi", n, v)).sum(-1)
            if self.ez_w is not None:
                assert self.e_w is not None
                self.ez_w.addcmul_(shift[:, None], self.e_w).mul_(rescale[:, None])
        self.s = rescale * self.s + e.sum(-1)
        self.top = top
        if self.e_w is not None:
            self.e_w.mul_(rescale[:, None])
        if tile.ref is not None:
            self._fold_reference(tile, e, here, column, rescale)
        self._accumulate(tile, cols, e, z if wants_z else None)
        if "kl" in self.want:
            self._recentre()

    def _fold_reference(self, tile: Tile, e: Tensor, here: Tensor, column: Tensor, rescale: Tensor) -> None:
        ref, delta = tile.ref, tile.delta
        assert ref is not None
        assert delta is not None
        self.target_ref = torch.where(here, ref.gather(1, column).squeeze(1), self.target_ref)
        ref_top = ref.amax(-1) if self.first else torch.maximum(self.ref_top, ref.amax(-1))
        ref_rescale = torch.zeros_like(ref_top) if self.first else (self.ref_top - ref_top).exp()
        ref.sub_(ref_top[:, None]).exp_()
        self.ref_s = ref_rescale * self.ref_s + ref.sum(-1)
        self.ref_top = ref_top
        if "kl" not in self.want:
            return
        if self.first:
            self.centre = self._lambda()
        if self.ed_w is not None:
            self.ed_w.mul_(rescale[:, None])
        u = delta.neg_().add_(self.centre[:, None])
        far = u > FAR if bool((u.amax() > FAR).item()) else None
        psi = torch.clamp(u, max=FAR, out=self.space.get("psi", u.shape[0], u.shape[1])).expm1_().sub_(u).mul_(e)
        if far is not None:
            mass = ref.mul_((self.ref_top - self.top + self.centre).exp()[:, None])
            psi = torch.where(far, mass - e * (1.0 + u), psi)
        weighted = u.neg_().mul_(e)  # e (delta - centre), in delta's buffer
        self.a = rescale * self.a + weighted.sum(-1)
        self.b = rescale * self.b + psi.sum(-1)

    def _accumulate(self, tile: Tile, cols: slice, e: Tensor, z: Tensor | None) -> None:
        """Add this tile's rows of the head to the bases. Consumes the tile's buffers."""
        if self.e_w is None:
            return
        w = self.p.operand(self.p.weight[cols])
        if self.ez_w is not None:
            assert z is not None
            z.mul_(e)
            self.p.add_matmul(self.ez_w, z if tile.factor is None else z.mul_(tile.factor), w)
        if self.ed_w is not None:
            assert tile.delta is not None
            weighted = tile.delta
            self.p.add_matmul(self.ed_w, weighted if tile.factor is None else weighted.mul_(tile.factor), w)
        self.p.add_matmul(self.e_w, e if tile.factor is None else e.mul_(tile.factor), w)

    def _lambda(self) -> Tensor:
        # In this order: equal logits give exactly zero.
        return (self.top - self.ref_top) + (self.s.log() - self.ref_s.log())

    def _recentre(self) -> None:
        new = self._lambda()
        d = new - self.centre
        growth = torch.expm1(d.clamp(-1.0, 1.0))
        near = (1.0 + growth) * self.b + self.s * (growth - d) - self.a * growth
        direct = self.a - d * self.s  # E_p[delta] - Lambda: exact enough once the shift itself is of order one
        self.b = torch.where(d.abs() <= 1.0, near, direct)
        self.a = direct
        if self.ed_w is not None:
            assert self.e_w is not None
            self.ed_w.addcmul_(d[:, None], self.e_w, value=-1.0)
        self.centre = new

    def _finish(self, result: Scan) -> None:
        p, rows = self.p, self.rows
        log_s = self.s.log()
        lse = self.top + log_s
        result.lse[rows] = lse
        mean_w = self.e_w / self.s[:, None] if self.e_w is not None else None
        if "logps" in self.want:
            # (z - top) first: both are of the size of the logits, their difference is not.
            result.values["logps"][rows] = self.target_z - self.top - log_s
        if "entropy" in self.want:
            mean_z = self.q / self.s
            result.values["entropy"][rows] = (log_s - mean_z).clamp(min=0.0)
            if self.ez_w is not None:
                assert mean_w is not None
                out = (self.ez_w / self.s[:, None]).addcmul_(mean_z[:, None], mean_w, value=-1.0)
                result.basis["entropy"][rows] = out.mul_(-p.slope)
        if "ref_logps" in self.want:
            result.values["ref_logps"][rows] = self.target_ref - self.ref_top - self.ref_s.log()
        if "kl" in self.want:
            result.values["kl"][rows] = (self.b / self.s).clamp(min=0.0)
            if result.mean_delta is not None:
                result.mean_delta[rows] = self.centre + self.a / self.s
            if self.ed_w is not None:
                assert mean_w is not None
                out = (self.ed_w / self.s[:, None]).addcmul_((self.a / self.s)[:, None], mean_w, value=-1.0)
                result.basis["kl"][rows] = out.mul_(p.slope)
        if "logps" in self.basis:
            assert mean_w is not None
            target_w = p.weight[self.targets].to(p.dtype)
            if p.post is not None:
                target_w = target_w * self.target_factor[:, None]
            result.basis["logps"][rows] = (target_w - mean_w).mul_(p.slope)
