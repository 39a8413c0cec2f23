"""A trust-region step: conjugate gradient on Fisher-vector products, scaling, line search. Needs torch alone.

The step maximises a surrogate under ``mean KL(old || new) <= max_kl`` (TRPO). Nothing here knows a model: a caller brings
the gradient, a function that multiplies by the Fisher matrix, and functions that measure KL and loss.
:class:`Linearised` and :func:`softmax_fisher` make such a product from logits with a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlft import _check

__all__ = [
    "Linearised",
    "Solution",
    "TrustRegion",
    "TrustRegionStep",
    "conjugate_gradient",
    "flatten",
    "softmax_fisher",
    "trust_region_step",
    "unflatten",
]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TrustRegion:
    """How far one step may go, and how it is found.

    Attributes:
        max_kl: largest mean KL(old || new) per token, nats, > 0 (delta in the paper).
        cg_iters: conjugate-gradient iterations at most, >= 1.
        cg_damping: added to the diagonal of the Fisher matrix while solving, >= 0.
        cg_tolerance: stop once ``|g - (F + damping) x| <= cg_tolerance |g|``, in [0, 1).
        backtrack: factor of the step from one trial of the line search to the next, in (0, 1).
        max_backtracks: trials after the full step, >= 0; when all fail, the weights stay as they were.

    Raises:
        ValueError: for a value out of range.
    """

    max_kl: float = 0.001
    cg_iters: int = 10
    cg_damping: float = 0.1
    cg_tolerance: float = 1e-4
    backtrack: float = 0.8
    max_backtracks: int = 10

    def __post_init__(self) -> None:
        _check.number("max_kl", self.max_kl, low=0.0, open_low=True)
        _check.number("cg_damping", self.cg_damping, low=0.0)
        for name, low in (("cg_iters", 1), ("max_backtracks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
        _check.number("cg_tolerance", self.cg_tolerance, low=0.0, high=1.0)
        _check.number("backtrack", self.backtrack, low=0.0, high=1.0, open_low=True)
        if self.cg_tolerance == 1.0 or self.backtrack == 1.0:
            name = "cg_tolerance" if self.cg_tolerance == 1.0 else "backtrack"
            raise ValueError(f"{name} must be below 1, got 1; lower {name}")

    def describe(self) -> str:
        """One line for the table shown before a run."""
        return (
            f"natural gradient, mean KL(old, new) <= {self.max_kl:g} per token; at most {self.cg_iters} conjugate-gradient "
            f"iterations, damping {self.cg_damping:g}; line search x {self.backtrack:g}, at most {self.max_backtracks} times"
        )


# -- solving --------------------------------------------------------------------------------------------------------------
class Solution(NamedTuple):
    """What :func:`conjugate_gradient` found.

    Attributes:
        x: the solution, as long as ``b``.
        product: ``F x``, without damping.
        residual: ``|b - (F + damping) x| / |b|``, from ``product`` and not from the recursion.
        iterations: products that were taken.
    """

    x: Tensor
    product: Tensor
    residual: float
    iterations: int


@torch.no_grad()
def conjugate_gradient(
    product: Product, b: Float[Tensor, " D"], *, iterations: int, damping: float = 0.0, tolerance: float = 0.0
) -> Solution:
    """Solve ``(F + damping) x = b`` for a symmetric positive semi-definite F that is known by its products.

    Args:
        product: ``v -> F v``, vectors of the length of ``b``.
        b: ``[D]``.
        iterations: products at most.
        damping: added to the diagonal of F, >= 0.
        tolerance: relative residual at which to stop.

    Returns:
        :class:`Solution`. In exact arithmetic D iterations solve any system; a direction without curvature ends early.

    References:
        Hestenes and Stiefel 1952, Methods of conjugate gradients for solving linear systems.
    """
    x, carried = torch.zeros_like(b), torch.zeros_like(b)
    left, direction = b.clone(), b.clone()
    start = now = _dot(left, left)
    done = 0
    while done < iterations and now > tolerance**2 * start:
        turned = product(direction)
        curvature = _dot(direction, turned) + damping * _dot(direction, direction)
        done += 1
        if not 0 < curvature < math.inf:
            break
        length = now / curvature
        x += length * direction
        carried += length * turned
        left -= length * (turned + damping * direction)
        before, now = now, _dot(left, left)
        direction = left + (now / before) * direction
    missing = b - carried - damping * x
    return Solution(x, carried, math.sqrt(_dot(missing, missing) / start) if start > 0 else 0.0, done)


class Linearised:
    """Outputs of a network as a linear map of its weights, around the present ones: ``J v`` and ``J' u``.

    ``J v`` is taken by differentiating ``J' u`` in ``u``, so every operation between weights and outputs must be twice
    differentiable (no flash attention, no custom backward). The graph is kept for any number of products.

    Args:
        outputs: a tensor with a graph to ``parameters``.
        parameters: the weights.
    """

    def __init__(self, outputs: Tensor, parameters: Sequence[Tensor]) -> None:
        self.outputs, self.parameters = outputs, tuple(parameters)
        self._probe = torch.zeros_like(outputs, requires_grad=True)
        self._pulled = torch.autograd.grad(outputs, self.parameters, self._probe, create_graph=True, allow_unused=True)

    @torch.enable_grad()
    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        """``J v``, shaped like the outputs; ``tangents`` are shaped like the parameters."""
        total = torch.zeros((), dtype=self.outputs.dtype, device=self.outputs.device)
        for pulled, tangent in zip(self._pulled, tangents, strict=True):
            if pulled is not None:
                total = total + (pulled * tangent).sum()
        return torch.autograd.grad(total, self._probe, retain_graph=True)[0]

    def pull(self, cotangent: Tensor) -> list[Tensor]:
        """``J' u``, shaped like the parameters; zero for those that the outputs do not depend on."""
        parts = torch.autograd.grad(self.outputs, self.parameters, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, parts, strict=True)]


def softmax_fisher(
    logits: Float[Tensor, "N V"], tangent: Float[Tensor, "N V"], weights: Float[Tensor, " N"]
) -> Float[Tensor, "N V"]:
    """``w (diag(p) - p p') dz`` row by row, p = softmax(logits): the Hessian of ``w KL(old || new)`` in the logits, at old.

    Args:
        logits: ``[N, V]`` of the distributions.
        tangent: ``[N, V]`` dz, a change of the logits.
        weights: ``[N]`` of the rows: 1 / count, 0 where a row does not count.

    Returns:
        ``[N, V]``.
    """
    p = logits.softmax(-1)
    return weights[:, None] * p * (tangent - (p * tangent).sum(-1, keepdim=True))


# -- stepping -------------------------------------------------------------------------------------------------------------
class TrustRegionStep(NamedTuple):
    """What :func:`trust_region_step` did.

    Attributes:
        accepted: whether the weights moved.
        kl: measured KL(old || new), 0 where rejected.
        kl_predicted: ``1/2 s' F s`` of the step that was taken, 0 where rejected.
        gain: measured fall of the loss, 0 where rejected.
        gain_predicted: its first-order prediction ``-g' s``.
        backtracks: trials that were refused.
        cg_residual: relative residual of the solve.
        cg_iterations: Fisher-vector products of the solve.
    """

    accepted: bool
    kl: float
    kl_predicted: float
    gain: float
    gain_predicted: float
    backtracks: int
    cg_residual: float
    cg_iterations: int


@torch.no_grad()
def trust_region_step(
    parameters: Sequence[Tensor],
    gradient: Float[Tensor, " D"],
    product: Product,
    *,
    kl: Callable[[], float],
    loss: Callable[[], float],
    before: float,
    region: TrustRegion,
) -> TrustRegionStep:
    """Move the weights by ``-sqrt(2 max_kl / x' F x) x`` with ``x = (F + damping)^-1 g``, shortened until it holds.

    The full step and then ``backtrack`` times the last one are tried; the first with measured ``KL <= max_kl`` and a
    loss that is no higher than before is kept. When none is, or the step is not finite, the weights are put back bit for bit.

    Args:
        parameters: the weights that move, changed in place.
        gradient: ``[D]`` of the loss at the present weights, in the order of :func:`flatten`.
        product: ``v -> F v`` at the present weights.
        kl: measures the mean KL(old || new) of whatever the weights are now.
        loss: measures the loss of whatever the weights are now; asked only where the KL holds.
        before: the loss at the present weights, measured the same way.
        region: limits and settings.

    Returns:
        :class:`TrustRegionStep`.

    References:
        Schulman et al. 2015, arXiv 1502.05477, section 6 and appendix C.
    """
    solved = conjugate_gradient(
        product, gradient, iterations=region.cg_iters, damping=region.cg_damping, tolerance=region.cg_tolerance
    )
    nothing = TrustRegionStep(False, 0.0, 0.0, 0.0, 0.0, 0, solved.residual, solved.iterations)
    curvature = _dot(solved.x, solved.product)
    if not 0 < curvature < math.inf:  # no gradient, no curvature, or NaN
        return nothing
    full = -math.sqrt(2 * region.max_kl / curvature) * solved.x
    slope = -_dot(gradient, full)
    if not bool(torch.isfinite(full).all()):
        return nothing
    old, change = [p.detach().clone() for p in parameters], unflatten(full, parameters)
    trials = region.max_backtracks + 1
    try:
        for tried in range(trials):
            fraction = region.backtrack**tried
            for p, was, part in zip(parameters, old, change, strict=True):
                p.copy_(was + fraction * part)
            moved = kl()
            if not moved <= region.max_kl:
                continue
            gain = before - loss()
            if 0 <= gain < math.inf:
                return TrustRegionStep(
                    True, moved, fraction**2 * region.max_kl, gain, fraction * slope, tried, solved.residual, solved.iterations
                )  # fmt: skip
    except BaseException:
        _restore(parameters, old)
        raise
    _restore(parameters, old)
    return nothing._replace(backtracks=trials)


def _restore(parameters: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    for p, was in zip(parameters, old, strict=True):
        p.copy_(was)


def flatten(tensors: Sequence[Tensor]) -> Float[Tensor, " D"]:
    """All entries in one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Float[Tensor, " D"], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flatten`: views with the shapes of ``like``."""
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
