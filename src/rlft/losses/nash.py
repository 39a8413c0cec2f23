"""Learning from a preference oracle, towards the Nash equilibrium of the game between answers."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["ipo_md", "nash_md_pg"]


@_base.loss_function(reduction="sequence_sum", on_policy_only=True)
def nash_md_pg(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    win_rates: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """``-sg[P(y beats y') - 1/2 - beta S] grad l(y)``, S the answer's log-ratio to the reference.

    y is sampled from the policy. y' comes from the geometric mixture of policy and reference (Nash-MD) or from a moving
    average of the policy (Nash-EMA); the loss is the same.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        win_rates: ``[B]`` probability in [0, 1] that the row beats its opponent, from a judge or a preference model;
            NaN where the oracle had no answer.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference (tau), >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics kl, objective/kl and win_rate.

    Raises:
        ValueError: for wrong shapes or dtypes, win rates outside [0, 1], or ``beta`` out of range.

    References:
        Munos et al. 2023, arXiv 2312.00886, section 7.
    """
    _check.number("beta", beta, low=0.0)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    _check.floating(win_rates=win_rates)
    _check.rows(logps, win_rates=win_rates)
    (win_rates,) = _check.detach(win_rates)
    member = mask.any(-1) & ~win_rates.isnan()
    win_rates = win_rates.where(member, 0.5)
    _probabilities("win_rates", win_rates)
    mask = mask & member.unsqueeze(-1)
    log_ratio = (logps.detach() - ref_logps).where(mask, 0.0)
    advantages = (win_rates - 0.5 - beta * log_ratio.sum(-1)).unsqueeze(-1)
    metrics = {"kl": log_ratio, "objective/kl": log_ratio.sum(-1), "win_rate": win_rates.where(member, 0.0)}
    return LossOutput(loss=-advantages * logps, metrics=metrics, reduction="sequence_sum", mask=mask)


@_base.loss_function(reduction="mean")
def ipo_md(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    chosen_win_rates: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``(h - (P(chosen beats rejected) - 1/2) / beta)^2``: IPO with a soft preference, on pairs from the mixture policy.

    Both answers are sampled from the geometric mixture of policy and reference (IPO-MD) or from the policy (online IPO);
    which is called chosen does not matter. At win rate 1 it is :func:`rlft.losses.ipo`.

    Args:
        chosen_logps: ``[P]`` log-prob of the first answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the second answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        chosen_win_rates: ``[P]`` probability in [0, 1] that the first answer beats the second.
        beta: strength of the pull to the reference (tau), > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, win rates outside [0, 1], or ``beta`` out of range.

    References:
        Calandriello et al. 2024, arXiv 2403.08635, equation 9.
    """
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    _check.vector(chosen_logps=chosen_logps, chosen_win_rates=chosen_win_rates)
    _check.finite(chosen_win_rates=chosen_win_rates)
    (win_rates,) = _check.detach(chosen_win_rates)
    _probabilities("chosen_win_rates", win_rates)
    loss = ((chosen - rejected - (win_rates - 0.5)) / beta).square()
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


def _probabilities(name: str, values: Tensor) -> None:
    if bool(((values < 0) | (values > 1)).any()):
        worst = values[(values < 0) | (values > 1)][0].item()
        raise ValueError(f"{name} must lie in [0, 1], got {worst:.6g}; pass probabilities, not scores or logits")
