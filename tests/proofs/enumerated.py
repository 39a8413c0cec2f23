"""Every answer of a small policy: the expectation of an estimator, as a sum, against the exact gradient it estimates.

The worlds and their exact gradients are those of ``tests/losses/enumeration.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlft import advantages, losses
from rlft.types import LossOutput
from rlft.worlds import World, expected_loss
from tests.losses.enumeration import Setting, early_eos, small
from tests.proofs.proof import Measured

#: Of a world: the table of logits of the policy that samples.
Sampler = Callable[[Setting], Tensor]
Truth = Callable[[Setting, Tensor], Tensor]
Loss = Callable[[Setting, Tensor, Tensor, Tensor], LossOutput]

BANDIT = "a bandit of five arms"


def bandit() -> Setting:
    return Setting(World.bandit(5))


SAMPLERS: dict[str, Sampler] = {
    "fresh samples": lambda s: s.logits.detach(),
    "a stranger's samples": lambda s: s.behaviour_logits,
    "the reference's samples": lambda s: s.ref,
}


def descent(s: Setting, mu: Tensor) -> Tensor:
    """Minus the gradient of J = E[r] - beta KL."""
    return -s.objective_gradient()


def reward_descent(s: Setting, mu: Tensor) -> Tensor:
    """Minus the gradient of E[r]."""
    return -s.gradient(s.world.expected(s.rewards, s.logits))


def variance(s: Setting, mu: Tensor) -> Tensor:
    """The gradient of half the variance of R under the sampler, over beta."""
    return s.loss_gradient(s.world.answer_logps(mu).exp().detach()) / s.beta


def whole_variance(s: Setting, mu: Tensor) -> Tensor:
    """The gradient of half the variance of R under the policy, through its sampling as well, over beta."""
    return s.loss_gradient(s.policy) / s.beta


def everything(s: Setting, answers: Tensor, mu: Tensor) -> dict[str, Tensor]:
    """What a loss may ask of the world about some answers, besides what ``Setting.rows`` gives."""
    table = s.world.log_ratio_table(s.logits, s.ref)
    return {
        "token_log_ratio_sq": s.world.token_expectation(table.square(), s.logits)[answers],
        "behaviour_log_ratio": s.world.token_expectation(table, mu)[answers],
        "behaviour_log_ratio_sq": s.world.token_expectation(table.square(), mu)[answers],
        "old_logps": s.world.token_logps(mu)[answers].detach(),
    }


def called(loss: Callable[..., LossOutput], **hyper: Any) -> Loss:
    """A loss that takes rewards and groups."""
    return lambda s, i, g, mu: s.call(loss, i, g, **everything(s, i, mu), **hyper)


def with_advantages(loss: Callable[..., LossOutput], **hyper: Any) -> Loss:
    """A loss that takes advantages: those of leave-one-out."""

    def run(s: Setting, i: Tensor, g: Tensor, mu: Tensor) -> LossOutput:
        found = advantages.leave_one_out(s.rewards[i], g)
        return s.call(loss, i, g, **everything(s, i, mu), advantages=found, **hyper)

    return run


def expectation(
    loss: Loss,
    truth: Truth,
    to: str,
    *,
    over: str = "fresh samples",
    make: Callable[[], Setting] = small,
    n: int = 2,
    factor: float = 1.0,
) -> Measured:
    """The expected gradient over all groups of n answers, against the truth."""

    def error(_: float) -> float:
        s = make()
        mu = SAMPLERS[over](s)
        weights = s.world.answer_logps(mu).exp().detach()
        found = s.gradient(expected_loss(s.world, n, weights, lambda i, g: loss(s, i, g, mu)))
        exact = factor * truth(s, mu)
        assert float(exact.abs().max()) > 1e-3
        return float((found - exact).abs().max() / exact.abs().max())

    return Measured(f"all groups of {n} from {over}", to, error)


def off_policy(loss: Callable[..., LossOutput], **hyper: Any) -> list[Measured]:
    """Unbiased for the off-policy loss, whoever sampled."""
    return [
        expectation(called(loss, **hyper), variance, "∇ of half the variance of R, /beta", over=over, n=n)
        for over, n in (("fresh samples", 2), ("a stranger's samples", 3), ("the reference's samples", 2))
    ]


def on_policy(loss: Callable[..., LossOutput], **hyper: Any) -> list[Measured]:
    """Unbiased for the regularised objective on fresh samples."""
    to = "-∇(E[r] - beta KL)"
    return [expectation(called(loss, **hyper), descent, to, n=n, make=make) for n, make in ((2, early_eos), (3, small))]


def likelihood_ratio(loss: Callable[..., LossOutput], **hyper: Any) -> list[Measured]:
    """Unbiased for the on-policy loss, through the sampling as well."""
    to = "∇ of half the variance of R, through the sampling, /beta"
    return [
        expectation(called(loss, **{"lr_coef": 1.0, **hyper}), whole_variance, to, n=n, make=make)
        for n, make in ((3, small), (2, early_eos))
        if n == 3 or hyper.get("lr_baseline") != "unbiased"
    ]


def in_a_bandit(loss: Loss, truth: Truth, to: str, over: str = "fresh samples") -> Measured:
    """Answers of one token, where a ratio per token is the whole answer's."""
    found = expectation(loss, truth, to, over=over, make=bandit)
    return Measured(f"{BANDIT}, {found.parameter}", to, found.errors)


def step_kl(_: float) -> float:
    """PPO-penalty's term, value and gradient, over the tokens of the old policy: KL(old || policy)."""
    s = bandit()
    old, zero = s.world.token_logps(s.behaviour_logits), torch.zeros(5, dtype=torch.float64)
    penalty = losses.ppo_penalty(s.logps, old, zero, s.world.mask, beta=1.0)
    mean, exact = (s.behaviour * penalty.loss.sum(-1)).sum(), s.world.kl(s.behaviour_logits, s.logits)
    slope, truth = s.gradient(mean), s.gradient(exact)
    value = abs(float((s.behaviour * losses.ppo_penalty(s.logps, old, zero, s.world.mask, beta=1.0).loss.sum(-1)).sum().detach())
                - float(s.world.kl(s.behaviour_logits, s.logits).detach()))  # fmt: skip
    return max(value, float((slope - truth).abs().max() / truth.abs().max()))


def nash(_: float) -> float:
    """Every meeting of an answer of the policy with one of a fixed opponent, who wins in circles."""
    s = early_eos()
    n = s.world.num_answers
    raw = torch.rand(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    table = (raw + 1 - raw.T) / 2
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    output = losses.nash_md_pg(s.logps[i], s.ref_logps[i], table[i, j], s.world.mask[i], beta=s.beta)
    weights = s.policy.detach()[i] * s.behaviour[j]
    found = s.gradient((weights * output.loss.sum(-1)).sum())
    target = s.world.expected(table @ s.behaviour, s.logits) - s.beta * s.world.kl(s.logits, s.ref)
    truth = -s.gradient(target)
    return float((found - truth).abs().max() / truth.abs().max())


def drifted_value(_: float) -> float:
    """DRO with the mean of R under the sampler as value: the off-policy loss's gradient."""
    s = early_eos()
    mean = (s.behaviour * (s.rewards - s.beta * (s.logps - s.ref_logps).sum(-1).detach())).sum()
    value = mean.expand(s.world.num_answers)
    output = losses.dro(s.logps, s.ref_logps, value, s.rewards, s.world.mask, beta=s.beta)
    found, truth = s.gradient((s.behaviour * output.loss).sum()), s.loss_gradient(s.behaviour)
    return float((found - truth).abs().max() / truth.abs().max())
