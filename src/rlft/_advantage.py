"""From rewards to advantages, by name: the step between a batch and a loss, and what is masked before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlft import _check, advantages, reduce
from rlft.types import Batch

__all__ = [
    "ADVANTAGES",
    "PER_TOKEN",
    "SIBLINGS",
    "WHOLE_STEP",
    "Everyone",
    "check_to_go",
    "drop_lone",
    "drop_unscored",
    "group_advantages",
    "to_go",
    "token_rewards",
    "with_gae",
]

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


def drop_unscored(batch: Batch, min_group: int, name: str) -> Batch:
    """Mask unscored rows, and groups that unscored rows made too small to have a baseline."""
    if batch.rewards is None:
        raise ValueError(f"objective {name!r} needs rewards; give reward functions or a dataset with scores")
    sizes = torch.bincount(batch.group_ids, minlength=batch.num_groups)
    if min_group > 1 and bool((sizes == 1).any()):
        raise ValueError(
            f"objective {name!r} compares answers of one prompt: groups need at least {min_group}, got a group of 1; "
            f"set num_generations >= {min_group}, or give several scored completions per prompt"
        )
    scored = ~torch.isnan(batch.rewards) & batch.mask.any(-1)
    members = reduce.segment_sum(scored.double(), batch.group_ids, batch.num_groups)
    usable = scored & (members >= min_group)[batch.group_ids]
    return batch.replace(mask=batch.mask & usable[:, None], rewards=batch.rewards.where(usable, float("nan")))


def drop_lone(batch: Batch, min_group: int) -> Batch:
    """Mask the rest of a group that blank rows made too small for the loss, so that no count has it in."""
    if min_group < 2:
        return batch
    alive = batch.mask.any(-1)
    members = reduce.segment_sum(alive.double(), batch.group_ids, batch.num_groups)
    return batch.replace(mask=batch.mask & (members >= min_group)[batch.group_ids, None])


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


def check_to_go(settings: Mapping[str, Any], *, penalised: bool, per_token: bool, name: str) -> None:
    """Refuse settings of :func:`to_go` that cannot work, or would do nothing.

    Args:
        settings: those that are given.
        penalised: whether a KL penalty is in the reward of each token.
        per_token: whether the loss is.
        name: of the objective, for messages.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    baseline, gamma = settings.get("baseline", "leave_one_out"), settings.get("gamma", 1.0)
    if baseline not in ("leave_one_out", "none"):
        raise ValueError(
            f"baseline {baseline!r} is unknown{_check.suggestion(str(baseline), ['leave_one_out', 'none'])}"
        )
    _check.number("gamma", gamma, low=0.0, high=1.0)
    if not isinstance(settings.get("whiten", False), bool):
        raise ValueError(f"whiten must be true or false, got {settings['whiten']!r}")
    if not penalised and gamma == 1.0:
        raise ValueError(
            "advantage='reward_to_go' does nothing: without kl='reward' or gamma < 1 every token is followed by the "
            "answer's reward alone; use advantage='leave_one_out' or 'reward'"
        )
    if not per_token:
        raise ValueError(f"advantage='reward_to_go' is per token, and {name!r} is per sequence; use 'leave_one_out'")


def with_gae(batch: Batch, penalty: Tensor | None, name: str, **settings: Any) -> Batch:
    """The batch with advantages and returns of :func:`rlft.advantages.gae`, from the critic's values.

    Args:
        batch: with rewards.
        penalty: ``[B, T]`` the KL penalty of each token, or None.
        name: of the objective, for messages.
        **settings: of :func:`rlft.advantages.gae`.

    Raises:
        ValueError: without a critic's values.
    """
    if batch.values is None:
        raise ValueError(f"objective {name!r} needs the critic's values; build the policy with a critic")
    assert batch.rewards is not None
    each = token_rewards(batch, batch.rewards, penalty).to(batch.values.dtype)
    advantage, returns = advantages.gae(each, batch.values, batch.mask, **settings)
    return batch.replace(advantages=advantage, returns=returns)


#: Advantages per token, which need more of a batch than rewards and groups.
PER_TOKEN: dict[str, Callable[..., Any]] = {"gae": advantages.gae, "reward_to_go": to_go}
