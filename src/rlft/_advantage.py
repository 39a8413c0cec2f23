"""From rewards to advantages, by name: the step between a batch and a loss that takes ``advantages``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlft import advantages
from rlft.types import Batch

__all__ = ["ADVANTAGES", "SIBLINGS", "WHOLE_STEP", "Everyone", "group_advantages", "to_go", "token_rewards"]

#: Numbers of this process, ``[n]`` -> those of all processes in their order, and where its own are among them.
Everyone = Callable[[Tensor], tuple[Tensor, slice]]

#: Of (rewards, group_ids), one number per answer. ``gae``, ``reward_to_go`` and ``given`` are not among them: they need more.
ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "reward": lambda rewards, group_ids: rewards,
    "group_mean": advantages.group_mean,
    "leave_one_out": advantages.leave_one_out,
    "group_norm": advantages.group_norm,
    "batch_norm": advantages.batch_norm,
    "group_mean_batch_norm": advantages.group_mean_batch_norm,
}
#: Those that compare an answer with others of its prompt.
SIBLINGS = frozenset({"leave_one_out", "group_norm", "group_mean", "group_mean_batch_norm"})
#: Those whose mean and variance are the whole step's, over all processes: what is taken off first.
WHOLE_STEP: dict[str, Callable[..., Tensor]] = {
    "batch_norm": ADVANTAGES["reward"],
    "group_mean_batch_norm": advantages.group_mean,
}


def group_advantages(
    name: str | Callable[..., Tensor], rewards: Tensor, batch: Batch, everyone: Everyone | None, **settings: Any
) -> Tensor:
    """``[B]`` advantages of whole answers; NaN or 0 where unscored."""
    if callable(name):
        return name(rewards, batch.group_ids, **settings)
    if name not in WHOLE_STEP:
        return ADVANTAGES[name](rewards, batch.group_ids, **settings)
    return _whiten(WHOLE_STEP[name](rewards, batch.group_ids), ~torch.isnan(rewards), everyone, **settings)


def _whiten(values: Tensor, counted: Tensor, everyone: Everyone | None, **settings: Any) -> Tensor:
    """Mean 0 and variance 1 over the counted entries of all processes; 0 elsewhere."""
    own = values[counted].double()  # sums of processes in any order, to the digit
    every, here = (own, slice(None)) if everyone is None else everyone(own)
    scaled = advantages.whiten(every, torch.ones_like(every, dtype=torch.bool), **settings)[here]
    return torch.zeros_like(values).masked_scatter(counted, scaled.to(values.dtype))


def token_rewards(batch: Batch, rewards: Tensor, penalty: Tensor | None) -> Tensor:
    """``[B, T]``: the answer's reward on its last token, minus the KL penalty of each; 0 where masked."""
    zeros = torch.zeros(
        batch.mask.shape, dtype=torch.promote_types(rewards.dtype, torch.float32), device=rewards.device
    )
    each = zeros if penalty is None else -penalty.to(zeros.dtype)
    last = batch.mask.int().cumsum(-1).argmax(-1)
    return each.scatter_add(1, last[:, None], torch.nan_to_num(rewards).to(each.dtype)[:, None]).where(batch.mask, 0.0)


def to_go(
    batch: Batch,
    penalty: Tensor | None,
    everyone: Everyone | None,
    *,
    gamma: float = 1.0,
    baseline: str = "leave_one_out",
    whiten: bool = False,
) -> Tensor:
    """``[B, T]`` reward-to-go: what follows a token, the answer's reward and the KL penalties from it on.

    ``baseline`` is taken off the answer's reward alone: ``leave_one_out`` (the mean of its siblings) or ``none``.
    ``whiten`` scales all tokens of the step, over all processes, to mean 0 and variance 1.
    """
    assert batch.rewards is not None
    rewards = batch.rewards
    if baseline == "leave_one_out":
        rewards = advantages.leave_one_out(rewards, batch.group_ids)
    found = advantages.reward_to_go(token_rewards(batch, rewards, penalty), batch.mask, gamma=gamma)
    if not whiten:
        return found
    return _whiten(found, batch.mask & ~torch.isnan(batch.rewards)[:, None], everyone)
