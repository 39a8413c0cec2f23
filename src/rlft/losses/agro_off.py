"""AGRO off-policy: the same loss with other estimators, weights, or units.

The first three use what is known of the policy that sampled to take out noise, and stay unbiased for the off-policy loss.
Like all of AGRO they return the sample variance over 2 beta as value; see :mod:`rlft.losses.agro`. They help where the
policy has drifted from the reference for reasons unrelated to reward; near the optimum plain
:func:`rlft.losses.agro_off_policy`, whose noise vanishes there, is better.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.losses.agro import Regularised, from_here_on, regularised, spread
from rlft.losses.ppo import safe_ratio
from rlft.types import LossOutput

__all__ = [
    "agro_off_policy_cv",
    "agro_off_policy_per_token",
    "agro_off_policy_rb",
    "agro_off_policy_rb2",
    "agro_off_policy_weighted",
]


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy_rb(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    behaviour_log_ratio: Float[Tensor, "B T"],
    behaviour_log_ratio_sq: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """One-step terms replaced by their exact means under the policy mu that sampled.

    Surrogate ``-[r_i - r_others] l_i + beta sum_t { q_t/2 + sg[P_t - D_others] d_t + sg[sum of d after t] logp_t }``, with
    d and q the first and second moment of the log-ratio under mu, D the sum of d, P the log-ratio before t.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        behaviour_log_ratio: ``[B, T]`` d: ``sum_a mu(a) log(pi(a)/ref(a))`` of each position, differentiable.
        behaviour_log_ratio_sq: ``[B, T]`` q: ``sum_a mu(a) log(pi(a)/ref(a))^2``, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612; the expectations under the behaviour policy are ours.
    """
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy_rb")
    d, q = _base.token_values(
        r.mask,
        learned=2,
        like=logps,
        behaviour_log_ratio=behaviour_log_ratio,
        behaviour_log_ratio_sq=behaviour_log_ratio_sq,
    )
    constant = d.detach()
    past = r.log_ratio.cumsum(-1) - r.log_ratio - r.groups.others_mean(constant.sum(-1)).unsqueeze(-1)
    term = 0.5 * q + past * d + (from_here_on(constant) - constant) * r.logps
    return _reward_and(r, term, beta)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy_rb2(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    behaviour_log_ratio: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """Causal terms, with the part that is not zero off-policy put back as its exact mean under the policy mu.

    Surrogate ``-[r_i - r_others] l_i + beta sum_t { sg[F_t - S_others] logp_t + sg[P_t] d_t }``, d the mean log-ratio
    under mu, P and F the log-ratio before t and from t on.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        behaviour_log_ratio: ``[B, T]`` d: ``sum_a mu(a) log(pi(a)/ref(a))`` of each position, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612; the expectations under the behaviour policy are ours.
    """
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy_rb2")
    (d,) = _base.token_values(r.mask, learned=1, like=logps, behaviour_log_ratio=behaviour_log_ratio)
    ahead = from_here_on(r.log_ratio) - r.groups.others_mean(r.log_ratio.sum(-1)).unsqueeze(-1)
    term = ahead * r.logps + (r.log_ratio.cumsum(-1) - r.log_ratio) * d
    return _reward_and(r, term, beta)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy_cv(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """A control variate from the sampled tokens' probabilities: ``-sg[A_i + beta rho_t P_t] grad logp_t``.

    rho is the ratio to the policy that sampled, P the log-ratio to the reference before t; the added part has mean zero.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, ``beta`` out of range, or a ratio that overflows.

    References:
        Tang et al. 2025, arXiv 2503.19612; the control variate is ours.
    """
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy_cv")
    ratio = safe_ratio((logps.detach() - old_logps).where(r.mask, 0.0))
    past = r.log_ratio.cumsum(-1) - r.log_ratio
    weights = r.advantages.unsqueeze(-1) + beta * ratio * past
    return r.output(-weights.where((r.groups.count > 1).unsqueeze(-1), 0.0) * r.logps)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy_weighted(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    weights: Float[Tensor, " B"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """Answers weighted, in pairs: ``1/(4n(n-1)) sum over i != j of w_i w_j (R_i - R_j)^2``, over beta.

    For bounded weights (truncated importance weights, priorities) it is the loss under the reweighted policy; the optimum
    stays where it is, whatever the weights. With all weights 1 it is :func:`rlft.losses.agro_off_policy`.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        weights: ``[B]`` w >= 0, constants.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy` (without weights).

    Raises:
        ValueError: for wrong shapes or dtypes, a negative weight, a group of one row, or ``beta`` out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612; the weighted form is ours.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy_weighted")
    _check.floating(weights=weights)
    _check.rows(r.logps, weights=weights)
    (weights,) = _check.detach(weights)
    _check.finite(r.groups.member, weights=weights)
    weights = weights.where(r.groups.member, 0.0)
    if bool((weights < 0).any()):
        raise ValueError(f"weights must be >= 0, got {weights.min().item():.6g}; clamp them before passing them")
    others = (r.groups.count - 1).clamp(min=1)
    centred = r.groups.centred(r.metrics["objective/rlhf_reward"])
    # sum_j w_j (R_i - R_j)^k for k = 1, 2, from sums over the group; centring first keeps the digits.
    mass, first, second = (r.groups.total(weights * centred**k) for k in range(3))
    advantages = weights * (centred * mass - first) / others
    pairs = weights * (centred.square() * mass - 2 * centred * first + second) / (4 * others)
    value = spread(pairs / beta, r.mask)
    return r._replace(value=value).output(-advantages.unsqueeze(-1) * r.logps)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy_per_token(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """AGRO with the *mean* log-ratio per token in place of the sum: R = r - beta S / T, T the answer's length.

    At one length it is :func:`rlft.losses.agro_off_policy` at beta / T. With lengths that differ the optimum is another
    policy, ``ref exp(T (r - c) / beta)``: longer answers are pulled to the reference less. A choice, never a default.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference per token, > 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`, with objective/kl still the sum.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, with a length-averaged log-ratio.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    r = regularised(
        logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy_per_token", per_token=True
    )
    length = r.mask.sum(-1, keepdim=True).clamp(min=1)
    return r.output(-r.advantages.unsqueeze(-1) * r.logps / length)


def _reward_and(r: Regularised, term: Tensor, beta: float) -> LossOutput:
    """``-[r_i - r_others] logp + beta term``, zero for a row without siblings."""
    reward = r.groups.against_others(r.rewards).unsqueeze(-1)
    surrogate = beta * term - reward * r.logps
    return r.output(surrogate.where((r.groups.count > 1).unsqueeze(-1), 0.0))
