"""AGRO: minimise the variance of the regularised reward within a group, from any samples or from fresh ones.

With ``S_i`` the log-ratio to the reference summed over answer i's tokens and ``R_i = r_i - beta S_i``, the optimal
policy makes R equal for all answers of a prompt. The loss is half the sample variance of R within the group,

    L = 1/(2(n-1)) sum_i (R_i - mean R)^2,

divided by beta: its gradient then equals RLOO's on the same samples, learning rates carry over, and beta = 0 works
(where the value is the limit ``-cov(r, S)``, the constant ``var(r)/(2 beta)`` left out).

Every function here returns that value, spread evenly over an answer's tokens so that the mean over a group's rows is
the objective; what differs is the gradient estimator it carries. Advantages depend on the current policy, so they are
computed here at every call and never stored; a group must stay in one call. A row whose mask is all False or whose
reward is NaN takes no part; a row whose siblings are all unscored contributes zero.

References: Tang et al. 2025, arXiv 2503.19612.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check
from rlft.advantages import Groups
from rlft.losses import _base
from rlft.types import LossOutput

LRBaseline = Literal["none", "leave_one_out", "unbiased"]
Baseline = Literal["none", "sequence", "position"]

__all__ = ["agro_off_policy", "agro_on_policy", "agro_on_policy_causal", "agro_on_policy_exact_kl"]


class Regularised(NamedTuple):
    """What the estimators share; ``advantages`` are R against the mean of the others, all constants but ``logps``."""

    logps: Tensor
    log_ratio: Tensor
    rewards: Tensor
    advantages: Tensor
    groups: Groups
    mask: Tensor
    value: Tensor
    metrics: dict[str, Tensor]

    def output(self, surrogate: Tensor) -> LossOutput:
        """The objective's value with the surrogate's gradient."""
        return LossOutput(
            loss=self.value + (surrogate - surrogate.detach()),
            metrics=self.metrics,
            reduction="sequence_sum",
            mask=self.mask,
        )


def regularised(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    beta: float,
    *,
    wanted_by: str,
    min_group: int = 2,
    per_token: bool = False,
) -> Regularised:
    """Check, detach, group, and work out R, the advantages, the loss's value and its metrics.

    With ``per_token`` R takes the mean of the log-ratio over an answer's tokens in place of the sum.
    """
    _check.number("beta", beta, low=0.0)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    rewards, groups, mask = _base.scored_rows(rewards, group_ids, mask, min_group=min_group, wanted_by=wanted_by)
    log_ratio = (logps.detach() - ref_logps).where(mask, 0.0)
    total = log_ratio.sum(-1)
    regularised_rewards = rewards - beta * (total / mask.sum(-1).clamp(min=1) if per_token else total)
    advantages = groups.against_others(regularised_rewards)
    centred = groups.centred(regularised_rewards)
    # n/(n-1) (R_i - mean)^2: its mean over the group's rows is the sample variance.
    variance = advantages * centred
    row_value = variance / (2 * beta) if beta > 0 else -groups.against_others(rewards) * groups.centred(total)
    metrics = {
        "kl": log_ratio,
        "objective/kl": total,
        "objective/rlhf_reward": regularised_rewards,
        "agro/variance": variance,
        "agro/flip_fraction": (advantages > 2 * beta).to(total.dtype),
    }
    return Regularised(logps, log_ratio, rewards, advantages, groups, mask, spread(row_value, mask), metrics)


def spread(row_value: Tensor, mask: Tensor) -> Tensor:
    """A number per row, spread evenly over the row's unmasked tokens."""
    return (row_value / mask.sum(-1)).unsqueeze(-1).where(mask, 0.0)


@_base.loss_function(reduction="sequence_sum", min_group=2)
def agro_off_policy(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """Gradient ``-sg[A_i] grad l_i``, A = R against the others' mean: exactly the gradient of the value.

    Unbiased for the off-policy loss whoever drew the samples, with no importance weights; rows of one prompt may come
    from different policies. On fresh samples it is the regularised policy gradient as well.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics kl, objective/kl,
        objective/rlhf_reward, agro/variance and agro/flip_fraction (share of A > 2 beta).

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``beta`` out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, equation 4 (here divided by beta).
    """
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_off_policy")
    return r.output(-r.advantages.unsqueeze(-1) * r.logps)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    lr_coef: float = 0.0,
    lr_baseline: LRBaseline = "none",
) -> LossOutput:
    """:func:`agro_off_policy` plus ``lr_coef`` times the likelihood-ratio term, ``sg[W_i] grad l_i / (2 beta)``.

    The term is the gradient of the variance through the sampling distribution; at 1 the whole is unbiased for the
    gradient of the on-policy loss. ``W = A^2`` under "none", ``A^2 - mean of the others' A^2`` under "leave_one_out"
    (the paper's; in expectation n(n-2)/(n-1)^2 of the term, so nothing at n = 2), and that rescaled to be unbiased
    under "unbiased" (n >= 3).

    Warning: it *lowers* the probability of good answers whose A exceeds 2 beta, and descent on the whole can collapse
    onto a bad answer. Watch agro/flip_fraction; the default leaves the term out.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each, three for "unbiased".
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0, and > 0 with the term.
        lr_coef: weight of the likelihood-ratio term, >= 0; 1 is the paper's on-policy gradient.
        lr_baseline: none, leave_one_out or unbiased.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as :func:`agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, groups that are too small, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, equations 5 and 6 (here divided by beta).
    """
    _check.number("lr_coef", lr_coef, low=0.0)
    _check.number("beta", beta, low=0.0, open_low=lr_coef > 0)
    _check.one_of("lr_baseline", lr_baseline, get_args(LRBaseline))
    r = regularised(
        logps,
        ref_logps,
        rewards,
        group_ids,
        mask,
        beta,
        wanted_by=f"agro_on_policy with lr_baseline={lr_baseline!r}",
        min_group=3 if lr_baseline == "unbiased" else 2,
    )
    weights = -r.advantages
    if lr_coef > 0:
        weights = weights + lr_coef / (2 * beta) * likelihood_ratio_weights(r.advantages, r.groups, lr_baseline)
    return r.output(weights.unsqueeze(-1) * r.logps)


def likelihood_ratio_weights(advantages: Tensor, groups: Groups, baseline: LRBaseline) -> Tensor:
    """W of :func:`agro_on_policy`, a constant per row."""
    squared = advantages.square()
    if baseline == "none":
        return squared
    centred = groups.against_others(squared)
    if baseline == "leave_one_out":
        return centred
    # The leave-one-out form is n(n-2)/(n-1)^2 of the term in expectation, exactly.
    n = groups.count
    return (centred * (n - 1).square() / (n * (n - 2))).where(n >= 3, 0.0)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_causal(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    baseline: Baseline = "position",
) -> LossOutput:
    """Token t is charged the log-ratio from t on alone: ``-sg[r_i - r_others - beta (F_t - b_t)] grad logp_t``.

    ``F_t`` sums the log-ratio over tokens t and later. Unbiased for the regularised policy gradient on fresh samples,
    biased on any other. Unlike :func:`agro_off_policy` its noise does not vanish at the optimum.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.
        baseline: b_t is "none": 0; "sequence": the mean of the others' whole log-ratio; "position": the mean of the
            others' F at the same position, zero past an answer's end.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as :func:`agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, section 6.
    """
    _check.one_of("baseline", baseline, get_args(Baseline))
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_on_policy_causal")
    ahead = from_here_on(r.log_ratio)
    return r.output(-_token_advantages(r, ahead, r.log_ratio.sum(-1), beta, baseline) * r.logps)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_exact_kl(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    token_kl: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    baseline: Baseline = "position",
) -> LossOutput:
    """Log-ratios replaced by exact KLs: ``-sg[r_i - r_others - beta (K_t - b_t)] grad logp_t + beta grad KL_t``.

    ``K_t`` sums the exact KL over the tokens *after* t. Unbiased for the regularised policy gradient on fresh samples,
    biased on any other. Unlike :func:`agro_off_policy` its noise does not vanish at the optimum.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        token_kl: ``[B, T]`` exact KL(policy || reference) of each position, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, >= 0.
        baseline: b_t is "none": 0; "sequence": the mean of the others' whole KL; "position": the mean of the others' K
            at the same position, zero past an answer's end.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as :func:`agro_off_policy`, with
        ``kl`` the exact KL.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, section 6.
    """
    _check.one_of("baseline", baseline, get_args(Baseline))
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_on_policy_exact_kl")
    (token_kl,) = _base.token_values(r.mask, learned=1, like=logps, token_kl=token_kl)
    constant = token_kl.detach()
    after = from_here_on(constant) - constant
    learned_kl = token_kl.where((r.groups.count > 1).unsqueeze(-1), 0.0)
    surrogate = -_token_advantages(r, after, constant.sum(-1), beta, baseline) * r.logps + beta * learned_kl
    r.metrics.update({"kl": constant, "objective/kl": constant.sum(-1)})
    return r.output(surrogate)


def from_here_on(x: Tensor) -> Tensor:
    """Sum over each token and those after it."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _token_advantages(r: Regularised, charge: Tensor, whole: Tensor, beta: float, baseline: Baseline) -> Tensor:
    """``r_i - r_others - beta (charge_t - b_t)``, zero where masked and where a row has no siblings."""
    if baseline == "position":
        charge = charge - r.groups.others_mean(charge)
    elif baseline == "sequence":
        charge = charge - r.groups.others_mean(whole).unsqueeze(-1)
    advantages = r.groups.against_others(r.rewards).unsqueeze(-1) - beta * charge
    return advantages.where(r.mask & (r.groups.count > 1).unsqueeze(-1), torch.zeros_like(advantages))
