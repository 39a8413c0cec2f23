"""Where descent along an expected gradient comes to rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.worlds.clips import slide
from benchmarks.worlds.field import Field
from benchmarks.worlds.problem import F64, Problem
from benchmarks.worlds.region import step_on
from benchmarks.worlds.rows import Row

__all__ = ["LIMIT", "Rest", "rest"]

#: Logits that differ by more nats than this are on their way to infinity.
LIMIT = 25.0


@dataclass(frozen=True)
class Rest:
    """Where descent along the expected gradient ends.

    Attributes:
        kl: KL(pi || target) there, relative to the start's.
        residual: largest component of the expected gradient there; where ratios are held at their clip, of what is left
            after the forces that hold them.
        stable: every direction of the policy contracts there.
        how: ``"rest"``, ``"runs off"`` (a probability goes to zero), ``"clip"`` (ratios are held at their clip),
            ``"steps on"`` (trust-region steps that do not shrink), ``"no step"`` (none that the line search takes) or ``"unsettled"``.
        logits: the policy.
        values: the critic's.
    """

    kl: float
    residual: float
    stable: bool
    how: str
    logits: Tensor
    values: Tensor


def rest(problem: Problem, row: Row, behaviour: Tensor | None, *, steps: int = 1000) -> Rest:
    """Follow the expected gradient downhill from the reference until it vanishes.

    Args:
        problem: the world; descent starts at its reference.
        row: the objective.
        behaviour: logits of what draws the answers; None = the policy itself.
        steps: at most so many.
    """
    flow = Field(problem, row, behaviour)
    if flow.objective.trust_region is not None:
        x, slope, stable, how = step_on(flow, LIMIT)
    elif row.clip and behaviour is not None:
        x, slope, stable, how = slide(flow, LIMIT, steps)
    else:
        x, slope, stable, how = _flow(flow, steps)
    world, goal = problem.world, problem.target(row.target, behaviour)
    relative = (world.kl(flow.table(x), goal) / world.kl(problem.ref, goal)).abs().item()
    return Rest(relative, slope.abs().max().item(), stable, how, flow.table(x), x[flow.cells :])


def _flow(flow: Field, steps: int) -> tuple[Tensor, Tensor, bool, str]:
    """Implicit Euler steps whose length grows as fast as the policy settles.

    Gradient flow at first, Newton's method at the end, so that slow directions cost nothing and the last digits are reached.
    """
    x, dt, how = flow.start(flow.problem.ref), 1.0, "unsettled"
    free, eye = flow.free(), torch.eye(flow.start(flow.problem.ref).numel(), dtype=F64)
    slope, matrix = flow.linearise(x)
    for _ in range(steps):
        if slope.abs().max() < 1e-14:
            how = "rest"
            break
        move = torch.linalg.solve(eye / dt + matrix + free, -slope)
        while move.abs().max() > 0.5:  # a leap could land in another basin
            dt /= 2
            move = torch.linalg.solve(eye / dt + matrix + free, -slope)
        x, dt = x + move, min(2 * dt, 1e12)
        slope, matrix = flow.linearise(x)
        if reach(flow.table(x)) > LIMIT:
            break
    if reach(flow.table(x)) > LIMIT / 2:  # the gradient may vanish sooner than the logits stop
        how = "runs off"
    stable = torch.linalg.eigvals(matrix + free).real.min().item() > -1e-6
    return x, slope, stable, how


def reach(logits: Tensor) -> float:
    """The largest difference between two logits of a prefix."""
    return (logits.amax(-1) - logits.amin(-1)).max().item()
