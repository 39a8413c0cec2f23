"""Preference losses that see tokens: length-desensitised DPO, RRHF, unlikelihood."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check, reduce
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["ld_dpo", "rrhf", "unlikelihood"]


@_base.loss_function(reduction="mean", min_group=2)
def ld_dpo(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    ld_alpha: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """DPO in which the tokens beyond the shorter answer's length count ``ld_alpha``: less reward for sheer length.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        group_ids: ``[B]`` which pair a row belongs to; two rows each, the chosen one first.
        mask: ``[B, T]`` True = a token that counts; a pair with an empty row takes no part.
        beta: strength of the pull to the reference, > 0.
        ld_alpha: weight of the excess tokens, in [0, 1]; 1 is DPO.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[B]``, the pair's in both of its rows, averaged over rows; implicit rewards of each row as metrics, NaN
        where they do not apply.

    Raises:
        ValueError: for wrong shapes or dtypes, groups that are no pairs, or hyper-parameters out of range.

    References:
        Liu et al. 2024, arXiv 2409.06411, equation 9.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("ld_alpha", ld_alpha, low=0.0, high=1.0)
    _base.smoothing(label_smoothing)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    other, is_chosen = _partners(group_ids, mask)
    member = mask.any(-1) & mask.any(-1)[other]
    mask = mask & member.unsqueeze(-1)
    shared = torch.minimum(mask.sum(-1), mask.sum(-1)[other]).unsqueeze(-1)
    weights = torch.ones_like(logps).where(mask.cumsum(-1) <= shared, ld_alpha)
    reward = beta * reduce.sequence_sum(weights * (logps - ref_logps), mask)
    sign = torch.ones_like(reward).where(is_chosen, -1.0)
    margin = sign * (reward - reward[other])
    loss = _base.smoothed_logistic(margin, label_smoothing).where(member, 0.0)
    nan = torch.full_like(reward, torch.nan)
    row_logps = reduce.sequence_sum(logps.detach(), mask)
    metrics = {
        "rewards/chosen": reward.detach().where(is_chosen & member, nan),
        "rewards/rejected": reward.detach().where(~is_chosen & member, nan),
        "rewards/margins": margin.detach().where(member, nan),
        "rewards/accuracies": (margin > 0).where(member, nan),
        "logps/chosen": row_logps.where(is_chosen & member, nan),
        "logps/rejected": row_logps.where(~is_chosen & member, nan),
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=member)


def _partners(group_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the index of the other row of its pair, and whether it is the first of the two."""
    _check.group_ids(group_ids, mask)
    unique, counts = torch.unique(group_ids, return_counts=True)
    if bool((counts != 2).any()):
        bad = int((counts != 2).nonzero()[0])
        raise ValueError(
            f"group_ids must pair the rows up, chosen first; group {unique[bad].item()} has {counts[bad].item()} rows: "
            f"give each pair its own id, and keep both rows in one batch"
        )
    order = torch.argsort(group_ids, stable=True)
    first, second = order[0::2], order[1::2]
    other = torch.empty_like(order)
    other[first], other[second] = second, first
    is_chosen = torch.zeros_like(order, dtype=torch.bool)
    is_chosen[first] = True
    return other, is_chosen


@_base.loss_function(reduction="mean", min_group=2)
def rrhf(
    logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Per prompt ``sum over r_i < r_j of max(0, p_i - p_j)  -  nll_weight l_best``, p the mean and l the sum of log-probs.

    A group's loss is spread over its rows so that the mean over the rows is the loss: a row carries the pairs it loses,
    and the likelihood term if it is (or shares) the best. Equal rewards are no pair.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        rewards: ``[B]`` scores that rank the answers, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        nll_weight: weight of the likelihood of the best answer, >= 0; 1 in the paper.

    Returns:
        loss ``[B]``, averaged over rows; metrics logps/mean, and nll_loss of the best answers (NaN for the others).

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or ``nll_weight`` out of range.

    References:
        Yuan et al. 2023, arXiv 2304.05302, equations 2 to 4.
    """
    _check.number("nll_weight", nll_weight, low=0.0)
    (logps,) = _base.token_logps(mask, logps=logps)
    rewards, groups, mask = _base.scored_rows(rewards, group_ids, mask, min_group=2, wanted_by="rrhf")
    member = groups.member
    total = reduce.sequence_sum(logps, mask)
    mean = total / mask.sum(-1)  # NaN for rows that are no members, dropped below
    worse = groups.together() & (rewards[:, None] < rewards[None, :])
    ranking = (mean[:, None] - mean[None, :]).relu().where(worse, 0.0).sum(-1)
    best = member & ~worse.any(-1)
    nll = -total / groups.total(best)
    loss = groups.count * (ranking + nll_weight * nll.where(best, 0.0))
    loss = loss.where(member & (groups.count > 1), 0.0)
    nan = torch.full_like(total, torch.nan)
    metrics = {"logps/mean": mean.detach().where(member, 0.0), "nll_loss": -total.detach().where(best, nan)}
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=member)


@_base.loss_function(reduction="token_mean")
def unlikelihood(
    logps: Float[Tensor, "B T"],
    labels: Bool[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    weight: float = 1.0,
    eps: float = 1e-4,
) -> LossOutput:
    """Desirable rows ``-log p``, undesirable rows ``-weight log(1 - (1 - eps) p)``, per token.

    ``eps`` keeps the loss and its gradient finite where p is one: at most ``-log eps`` and ``1/eps``.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        labels: ``[B]`` bool, True = desirable.
        mask: ``[B, T]`` True = a token that counts.
        weight: weight of the undesirable tokens, >= 0.
        eps: in (0, 1); 0 would be the paper's loss, infinite at p = 1.

    Returns:
        loss ``[B, T]``, averaged over tokens; metrics nll_loss and unlikelihood, NaN where the label does not apply.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Welleck et al. 2019, arXiv 1908.04319, equation 4.
    """
    _check.number("weight", weight, low=0.0)
    _check.number("eps", eps, low=0.0, high=1.0, open_low=True)
    if eps == 1:
        raise ValueError("eps must be < 1 (at 1 the loss is zero), got 1; lower it")
    (logps,) = _base.token_logps(mask, logps=logps)
    _check.rows(logps, labels=labels)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool (True = desirable), got {labels.dtype}; pass labels.bool()")
    good, bad = labels.unsqueeze(-1) & mask, ~labels.unsqueeze(-1) & mask
    # Rounding can leave a log-prob slightly above zero; p cannot exceed one.
    against = -_base.log1mexp(logps.clamp(max=0.0) + math.log1p(-eps))
    loss = (-logps).where(good, 0.0) + weight * against.where(bad, 0.0)
    nan = torch.full_like(loss, torch.nan).where(mask, 0.0)
    metrics = {"nll_loss": -logps.detach().where(good, nan), "unlikelihood": against.detach().where(bad, nan)}
    return LossOutput(loss=loss, metrics=metrics, reduction="token_mean", mask=mask)
