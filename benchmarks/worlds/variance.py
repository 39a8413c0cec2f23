"""Exact variance of AGRO's gradient estimators: every group of two answers, weighted by its probability."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.worlds.field import Field
from benchmarks.worlds.problem import Problem
from benchmarks.worlds.rows import Row

__all__ = ["FRESH", "OTHER", "Spread", "places", "spread"]

_FORMS = tuple(
    Row(f"agro_on_policy_{form}", {"baseline": baseline})
    for form in ("causal", "exact_kl")
    for baseline in ("none", "sequence", "position")
)
#: Estimators of one and the same gradient, the first the plain one. With samples of the policy itself:
FRESH: dict[str, tuple[Row, ...]] = {
    "Policy gradient of reward minus beta KL": (Row("agro_off_policy"), *_FORMS),
    "The same with the likelihood-ratio term": (
        Row("agro_on_policy", {"lr_coef": 1.0}),
        Row("agro_on_policy_lr_causal"),
        Row("agro_on_policy_lr_token", {"square": "h1", "linear": "g1"}),
        Row("agro_on_policy_lr_token", {"square": "h2", "linear": "g2"}),
        Row("agro_on_policy_lr_kl", {"square": "h3", "linear": "g3"}),
        Row("agro_on_policy_lr_moments"),
    ),
}
#: With samples of a policy that stays fixed:
OTHER: dict[str, tuple[Row, ...]] = {
    "Gradient of the off-policy loss": (
        Row("agro_off_policy"),
        Row("agro_off_policy_cv"),
        Row("agro_off_policy_rb"),
        Row("agro_off_policy_rb2"),
    ),
}


@dataclass(frozen=True)
class Spread:
    """Mean ``[S V]`` and total variance of a gradient estimator."""

    mean: Tensor
    variance: float


def places(problem: Problem) -> dict[str, Tensor]:
    """Policies at which variances are worked out: on the way from the reference to pi*, and off that way."""
    world, start, best = problem.world, problem.ref.log_softmax(-1), problem.best.log_softmax(-1)
    return {
        "at pi*": best,
        "nine tenths of the way": start + 0.9 * (best - start),
        "half way": start + 0.5 * (best - start),
        "the reference": start,
        "half way, drifted": start + 0.5 * (best - start) + 2 * world.random_logits(seed=3000),
    }


def spread(problem: Problem, row: Row, logits: Tensor, behaviour: Tensor | None) -> Spread:
    """Mean and total variance (trace of the covariance) of the gradient from one group.

    Args:
        problem: the world.
        row: the estimator.
        logits: the policy.
        behaviour: logits of what draws the answers; None = the policy.
    """
    gradients, weights = Field(problem, row, behaviour).per_group(logits)
    mean = weights @ gradients
    return Spread(mean, (weights * (gradients - mean).square().sum(-1)).sum().item())
