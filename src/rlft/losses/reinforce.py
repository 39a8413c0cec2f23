"""Policy gradients without clipping: REINFORCE, RLOO, and the KL-regularised policy gradient AGRO is compared with."""

from __future__ import annotations

from typing import get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check, kl, reduce
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["kl_policy_gradient", "kl_policy_gradient_exact", "reinforce", "rloo"]


@_base.loss_function(reduction="sequence_sum", advantage_weighted=True)
def reinforce(logps: Float[Tensor, "B T"], advantages: Float[Tensor, "B ..."], mask: Bool[Tensor, "B T"]) -> LossOutput:
    """``-sg[A] logp``, summed over a row's tokens.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        advantages: ``[B]`` per sequence, or ``[B, T]`` per token (reward-to-go minus a baseline).
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences.

    Raises:
        ValueError: for wrong shapes or dtypes, or unmasked entries that are not finite.

    References:
        Williams 1992.
    """
    (logps,) = _base.token_logps(mask, logps=logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    return LossOutput(loss=-advantages * logps, metrics={}, reduction="sequence_sum", mask=mask)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def rloo(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """``-sg[R_i - mean of the others' R] logp``, R = r - beta S, S the current policy's log-ratio summed over tokens.

    S is recomputed from ``logps`` at every call, so on stale samples this is the gradient of AGRO's off-policy loss
    over beta. Trainers that keep S from sampling time agree on fresh samples alone.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: weight of the KL in the reward, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        Ahmadian et al. 2024, arXiv 2402.14740.
    """
    _check.number("beta", beta, low=0.0)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    rewards, groups, mask = _base.scored_rows(rewards, group_ids, mask, min_group=2, wanted_by="rloo")
    log_ratio = (logps.detach() - ref_logps).where(mask, 0.0)
    regularised = rewards - beta * log_ratio.sum(-1)
    advantages = groups.against_others(regularised).unsqueeze(-1)
    metrics = {"kl": log_ratio, "objective/kl": log_ratio.sum(-1), "objective/rlhf_reward": regularised}
    return LossOutput(loss=-advantages * logps, metrics=metrics, reduction="sequence_sum", mask=mask)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def kl_policy_gradient(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    kl_value: kl.KLValue = "k3",
    kl_gradient: kl.KLGradient = "k2",
) -> LossOutput:
    """``-sg[r_i - mean of the others' r] logp + beta KL_t``: reward baseline, and the KL as a term of the loss.

    On samples that the current policy did not draw, its fixed point is not the optimum of the regularised objective,
    whatever the estimator; this is the baseline that AGRO's off-policy loss is compared with.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: weight of the KL, >= 0.
        kl_value: estimator of the KL's value: k1, k2 or k3.
        kl_gradient: estimator of its gradient, see :mod:`rlft.kl`.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or hyper-parameters out of range.

    References:
        The baseline of Tang et al. 2025, arXiv 2503.19612, section 8.2, with a sampled KL.
    """
    _check.number("beta", beta, low=0.0)
    _check.one_of("kl_value", kl_value, get_args(kl.KLValue))
    _check.one_of("kl_gradient", kl_gradient, get_args(kl.KLGradient))
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    rewards, groups, mask = _base.scored_rows(rewards, group_ids, mask, min_group=2, wanted_by="kl_policy_gradient")
    return _reward_and_penalty(
        logps, rewards, groups, mask, kl.penalty(logps, ref_logps, mask, value=kl_value, gradient=kl_gradient), beta
    )


@_base.loss_function(reduction="sequence_sum", min_group=2)
def kl_policy_gradient_exact(
    logps: Float[Tensor, "B T"],
    token_kl: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """:func:`kl_policy_gradient` with the exact KL of every position, summed along the sampled answer.

    For answers of one token, a bandit, the KL and its gradient are exact whoever drew the samples.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        token_kl: ``[B, T]`` exact KL(policy || reference) of each position, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: weight of the KL, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        The baseline of Tang et al. 2025, arXiv 2503.19612, section 8.2.
    """
    _check.number("beta", beta, low=0.0)
    (logps,) = _base.token_logps(mask, logps=logps)
    (token_kl,) = _base.token_values(mask, learned=1, like=logps, token_kl=token_kl)
    rewards, groups, mask = _base.scored_rows(
        rewards, group_ids, mask, min_group=2, wanted_by="kl_policy_gradient_exact"
    )
    return _reward_and_penalty(logps, rewards, groups, mask, token_kl, beta)


def _reward_and_penalty(
    logps: Tensor, rewards: Tensor, groups: _base.Groups, mask: Tensor, token_kl: Tensor, beta: float
) -> LossOutput:
    advantages = groups.against_others(rewards).unsqueeze(-1)
    token_kl = token_kl.where(mask, 0.0)
    metrics = {"kl": token_kl.detach(), "objective/kl": reduce.sequence_sum(token_kl.detach(), mask)}
    return LossOutput(loss=-advantages * logps + beta * token_kl, metrics=metrics, reduction="sequence_sum", mask=mask)
