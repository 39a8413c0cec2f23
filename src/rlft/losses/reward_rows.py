"""Reward models trained on more than pairs: rankings, numbers, labels, steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["process_reward", "reward_binary", "reward_ranking", "reward_regression"]


@_base.loss_function(reduction="mean", min_group=2)
def reward_ranking(
    scores: Float[Tensor, " B"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
) -> LossOutput:
    """Per prompt the mean over pairs with ``r_w > r_l`` of ``-logsigmoid(s_w - s_l)``: K answers, one forward each.

    A prompt's loss is spread over its rows, each carrying the pairs it wins, so that the mean over the rows is the loss.

    Args:
        scores: ``[B]`` the model's reward of each answer, differentiable.
        rewards: ``[B]`` numbers that rank the answers, NaN where unranked.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token of the answer; a row without any takes no part.

    Returns:
        loss ``[B]``, averaged over rows; metrics accuracy (share of a row's pairs in the right order, NaN without any)
        and mean_reward.

    Raises:
        ValueError: for wrong shapes or dtypes, entries that are not finite, or a group of one row.

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 1.
    """
    scores, mask = _scores(scores, mask)
    rewards, groups, _ = _base.scored_rows(rewards, group_ids, mask, min_group=2, wanted_by="reward_ranking")
    member = groups.member
    wins = groups.together() & (rewards[:, None] > rewards[None, :])
    difference = scores[:, None] - scores[None, :]
    pairs = groups.total(wins.sum(-1)).clamp(min=1)
    loss = (-logsigmoid(difference)).where(wins, 0.0).sum(-1) * groups.count / pairs
    right = (wins & (difference > 0)).sum(-1).to(scores.dtype)
    metrics = {
        "accuracy": right / wins.sum(-1),  # NaN where no answer is worse
        "mean_reward": scores.detach().where(member, torch.nan),
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=member)


@_base.loss_function(reduction="mean")
def reward_regression(
    scores: Float[Tensor, " B"], rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> LossOutput:
    """``(s - r)^2 / 2``: a reward model fitted to numbers.

    Args:
        scores: ``[B]`` the model's reward of each answer, differentiable.
        rewards: ``[B]`` the target, NaN where unscored.
        mask: ``[B, T]`` True = a token of the answer; a row without any takes no part.

    Returns:
        loss ``[B]``, averaged over scored rows; metrics error and mean_reward, NaN for rows that take no part.

    Raises:
        ValueError: for wrong shapes or dtypes, or entries that are not finite.

    References:
        Stiennon et al. 2020, arXiv 2009.01325, with the raters' scores as targets.
    """
    scores, mask = _scores(scores, mask)
    _check.floating(rewards=rewards)
    _check.rows(scores, count_name="scores", rewards=rewards)
    (rewards,) = _check.detach(rewards)
    member = mask.any(-1) & ~rewards.isnan()
    _check.finite(member, rewards=rewards)
    error = (scores - rewards).where(member, 0.0)
    metrics = {
        "error": error.detach().where(member, torch.nan),
        "mean_reward": scores.detach().where(member, torch.nan),
    }
    return LossOutput(loss=0.5 * error.square(), metrics=metrics, reduction="mean", mask=member)


@_base.loss_function(reduction="mean")
def reward_binary(scores: Float[Tensor, " B"], labels: Bool[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> LossOutput:
    """``-logsigmoid(s)`` for desirable rows, ``-logsigmoid(-s)`` for the others: a reward model from thumbs.

    Args:
        scores: ``[B]`` the model's logit that an answer is desirable, differentiable.
        labels: ``[B]`` bool, True = desirable.
        mask: ``[B, T]`` True = a token of the answer; a row without any takes no part.

    Returns:
        loss ``[B]``, averaged over rows; metrics accuracy and mean_reward, NaN for rows that take no part.

    Raises:
        ValueError: for wrong shapes or dtypes, or scores that are not finite.

    References:
        Cobbe et al. 2021, arXiv 2110.14168, section 4.2.
    """
    scores, mask = _scores(scores, mask)
    _check.rows(scores, count_name="scores", labels=labels)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool (True = desirable), got {labels.dtype}; pass labels.bool()")
    member = mask.any(-1)
    loss = -logsigmoid(torch.where(labels, scores, -scores)).where(member, 0.0)
    right = (labels == (scores > 0)).to(scores.dtype)
    metrics = {
        "accuracy": right.where(member, torch.nan),
        "mean_reward": scores.detach().where(member, torch.nan),
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=member)


@_base.loss_function(reduction="token_mean")
def process_reward(
    values: Float[Tensor, "B T"], step_labels: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> LossOutput:
    """``-y logsigmoid(v) - (1 - y) logsigmoid(-v)`` at the tokens that end a step: a process reward model.

    Args:
        values: ``[B, T]`` the model's logit that the step ending at a token is right, differentiable.
        step_labels: ``[B, T]`` y in [0, 1]: 0 or 1, or the share of continuations that succeed.
        mask: ``[B, T]`` True = a token that ends a labelled step.

    Returns:
        loss ``[B, T]``, averaged over steps; metric accuracy (0/1, a label above one half counts as right).

    Raises:
        ValueError: for wrong shapes or dtypes, entries that are not finite, or labels outside [0, 1].

    References:
        Lightman et al. 2023, arXiv 2305.20050; Wang et al. 2023, arXiv 2312.08935 (soft labels).
    """
    values, labels = _base.token_values(mask, learned=1, values=values, step_labels=step_labels)
    if bool(((labels < 0) | (labels > 1)).any()):
        worst = labels[(labels < 0) | (labels > 1)][0].item()
        raise ValueError(f"step_labels must lie in [0, 1], got {worst:.6g}; mask out tokens that end no step")
    loss = (-labels * logsigmoid(values) - (1 - labels) * logsigmoid(-values)).where(mask, 0.0)
    right = ((labels > 0.5) == (values > 0)).to(values.dtype).where(mask, 0.0)
    return LossOutput(loss=loss, metrics={"accuracy": right}, reduction="token_mean", mask=mask)


def _scores(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    _check.vector(scores=scores)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be one bool per token, shape [B, T], got {came}")
    _check.bool_mask(mask, mask)
    _check.rows(mask, count_name="mask", scores=scores)
    member = mask.any(-1)
    _check.finite(member, scores=scores)
    return _check.upcast(scores).where(member, 0.0), mask
