"""What every loss shares: the marks a trainer reads, and checking, detaching and masking at the door.

Metrics are detached and unreduced. An entry that does not apply (the reward of a "chosen" answer in a row that was
not chosen) is NaN, to be skipped when averaging; a masked entry is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.advantages import Groups
from rlft.reduce import Reduction
from rlft.types import LossOutput

P = ParamSpec("P")


def loss_function(
    *,
    reduction: Reduction,
    min_group: int = 1,
    on_policy_only: bool = False,
    couples_rows: bool = False,
    advantage_weighted: bool = False,
    imitates: bool = False,
) -> Callable[[Callable[P, LossOutput]], Callable[P, LossOutput]]:
    """Mark a loss with what a trainer must know before the forward pass; the function itself is unchanged.

    Args:
        reduction: the paper's averaging, equal to that of the LossOutput.
        min_group: how many rows of one prompt the loss needs.
        on_policy_only: True = biased on tokens that the current policy did not sample.
        couples_rows: True = compares rows of different prompts, so that a batch cannot be split at all.
        advantage_weighted: True = a row whose advantages are 0 has no loss and no gradient (where a ``beta`` is 0).
        imitates: True = makes every answer it sees more likely, good or bad.

    Returns:
        a decorator that sets attributes of these names on the function.
    """

    def mark(fn: Callable[P, LossOutput]) -> Callable[P, LossOutput]:
        vars(fn).update(
            reduction=reduction,
            min_group=min_group,
            on_policy_only=on_policy_only,
            couples_rows=couples_rows,
            advantage_weighted=advantage_weighted,
            imitates=imitates,
        )
        return fn

    return mark


def token_logps(mask: Tensor, **logps: Tensor) -> tuple[Tensor, ...]:
    """Check ``[B, T]`` log-probs; the first is the policy's and keeps its gradient. All zero where masked."""
    (first_name, first), *others = logps.items()
    _check.matrix(**logps)
    _check.bool_mask(mask, first, like_name=first_name)
    _check.log_probs(mask, **logps)
    kept = (_check.upcast(first), *_check.detach(*(tensor for _, tensor in others)))
    return tuple(tensor.where(mask, 0.0) for tensor in kept)


def token_values(mask: Tensor, *, learned: int, like: Tensor | None = None, **values: Tensor) -> tuple[Tensor, ...]:
    """Check ``[B, T]`` numbers that are no log-probs; the first ``learned`` keep their gradient. Zero where masked."""
    _check.matrix(**({} if like is None else {"logps": like}), **values)
    (first_name, first), *_ = values.items()
    _check.bool_mask(mask, first, like_name=first_name)
    _check.finite(mask, **values)
    kept = [_check.upcast(x if i < learned else x.detach()) for i, x in enumerate(values.values())]
    return tuple(tensor.where(mask, 0.0) for tensor in kept)


def pair_logps(*, learned: int = 2, **logps: Tensor) -> tuple[Tensor, ...]:
    """Check ``[P]`` sums of log-probs; the first ``learned`` are the policy's and keep their gradient."""
    _check.vector(**logps)
    _check.log_probs(**logps)
    return tuple(_check.upcast(x if i < learned else x.detach()) for i, x in enumerate(logps.values()))


def detached(logps: Tensor) -> Tensor:
    """One tensor as a float32 or float64 constant."""
    return _check.detach(logps)[0]


def lengths(like: Tensor, **counts: Tensor) -> tuple[Tensor, ...]:
    """Check ``[P]`` token counts, integer or floating, at least 1, and give them the dtype of ``like``."""
    _check.rows(like, count_name="chosen_logps", **counts)
    for name, count in counts.items():
        if bool((~(count >= 1)).any()):
            raise ValueError(
                f"{name} must be at least 1 token everywhere, got {count.min().item()}; drop pairs with an empty answer"
            )
    return tuple(count.detach().to(like.dtype) for count in counts.values())


def advantage_tokens(advantages: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` or ``[B, T]`` advantages as constants ``[B, T]``, zero where masked."""
    _check.floating(advantages=advantages)
    _check.tokens_or_rows(logps, advantages=advantages)
    (advantages,) = _check.detach(advantages)
    wide = advantages.unsqueeze(-1).expand_as(mask) if advantages.ndim == 1 else advantages
    _check.finite(mask, advantages=wide)
    return wide.where(mask, 0.0)


def scored_rows(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, *, min_group: int, wanted_by: str
) -> tuple[Tensor, Groups, Tensor]:
    """Rewards as constants, the groups of the rows that count, and the mask without the rows that do not.

    A row counts when it has an unmasked token and a reward that is not NaN.
    """
    _check.floating(rewards=rewards)
    _check.rows(mask, rewards=rewards)
    _check.group_ids(group_ids, mask)
    (rewards,) = _check.detach(rewards)
    member = mask.any(-1) & ~rewards.isnan()
    _check.finite(member, rewards=rewards)
    groups = Groups.of(group_ids, member, at_least=min_group, wanted_by=wanted_by)
    return rewards.where(member, 0.0), groups, mask & member.unsqueeze(-1)


def implicit_rewards(
    beta: float, chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``beta`` times the log-ratios of the chosen and of the rejected answer, differentiable, and their metrics."""
    _check.number("beta", beta, low=0.0, open_low=True)
    chosen, rejected, ref_chosen, ref_rejected = pair_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    metrics = pair_metrics(beta, chosen, rejected, ref_chosen, ref_rejected)
    return beta * (chosen - ref_chosen), beta * (rejected - ref_rejected), metrics


def smoothing(label_smoothing: float) -> None:
    """Refuse a share of flipped labels outside ``[0, 0.5)``."""
    _check.number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    if label_smoothing == 0.5:
        raise ValueError("label_smoothing must be < 0.5 (at 0.5 the labels say nothing), got 0.5; lower it")


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """``-(1-e) logsigmoid(margin) - e logsigmoid(-margin)``."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, accurate near zero and far from it; -inf at zero."""
    near = x > -math.log(2)
    close = (-x.expm1()).log()
    # where() before as well: the branch not taken must not put NaN into the gradient where exp(x) rounds to 1.
    far = (-x.where(~near, -1.0).exp()).log1p()
    return close.where(near, far)


def pair_metrics(
    beta: float, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
) -> dict[str, Tensor]:
    """The metrics of preference pairs; implicit rewards are ``beta`` times the log-ratio (or the log-prob)."""
    chosen, rejected = chosen.detach(), rejected.detach()
    chosen_rewards = beta * (chosen if ref_chosen is None else chosen - ref_chosen)
    rejected_rewards = beta * (rejected if ref_rejected is None else rejected - ref_rejected)
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen.dtype),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
