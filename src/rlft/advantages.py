"""Advantages: what a reward is worth against its baseline.

Groups are rows that answer the same prompt, marked by ``group_ids``; they may be ragged and in any order. A row whose
reward is NaN is *unscored*: no member of its group, no part of a baseline, advantage 0. Mask such rows out of the loss
(``mask & ~rewards.isnan()[:, None]``), or their KL term still counts.

Everything here is a constant for the loss: inputs are detached, results carry no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rlft import _check, reduce

__all__ = [
    "Groups",
    "batch_norm",
    "gae",
    "group_mean",
    "group_mean_batch_norm",
    "group_norm",
    "leave_one_out",
    "reward_to_go",
    "whiten",
]


@dataclass(frozen=True, slots=True)
class Groups:
    """Statistics over the members of each row's own group, returned row by row.

    Attributes:
        index: ``[B]`` a number in ``0 .. size-1`` per row.
        member: ``[B]`` True = the row takes part.
        count: ``[B]`` how many members the row's group has.
        size: number of groups.
    """

    index: Int[Tensor, " B"]
    member: Bool[Tensor, " B"]
    count: Int[Tensor, " B"]
    size: int

    @staticmethod
    def of(
        group_ids: Int[Tensor, " B"],
        member: Bool[Tensor, " B"],
        *,
        at_least: int | None = None,
        wanted_by: str = "",
    ) -> Groups:
        """Group rows by id; refuse groups that have fewer than ``at_least`` rows, scored or not (None: any size)."""
        unique, index, rows = torch.unique(group_ids, return_inverse=True, return_counts=True)
        if at_least is not None and bool((rows < at_least).any()):
            small = int((rows < at_least).nonzero()[0])
            raise ValueError(
                f"{wanted_by} needs groups of at least {at_least} rows, group {unique[small].item()} has "
                f"{rows[small].item()}; sample {at_least} or more completions per prompt, and keep a group in one batch"
            )
        members = torch.zeros_like(rows).index_add(0, index, member.to(rows.dtype))
        return Groups(index=index, member=member, count=members[index], size=unique.numel())

    def _fill(self, x: Tensor, value: float) -> Tensor:
        return x.where(self._wide(self.member, x), value)

    @staticmethod
    def _wide(per_row: Tensor, like: Tensor) -> Tensor:
        return per_row.reshape(per_row.shape + (1,) * (like.ndim - 1)).expand(like.shape)

    def _extreme(self, x: Tensor, kind: Literal["amin", "amax"]) -> Tensor:
        """The smallest or largest member of each row's group; infinite for a group without members."""
        empty = torch.inf if kind == "amin" else -torch.inf
        start = x.new_full((self.size, *x.shape[1:]), empty)
        found = start.scatter_reduce(0, self._wide(self.index, x), self._fill(x, empty), kind)
        return found[self.index]

    def total(self, x: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Sum over the members of each row's group; counts and flags become floating point."""
        return reduce.segment_sum(self._fill(x, 0.0), self.index, self.size)[self.index]

    def mean(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Mean over the members of each row's group; zero for a group without members."""
        return self.total(x) / self._wide(self.count.clamp(min=1), x)

    def centred(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """``x - mean``, zero for non-members, and exactly zero when all members are equal."""
        # Taking the smallest member away first makes equal members exactly zero, and keeps digits when all are large.
        shifted = x - self._extreme(x, "amin")
        return self._fill(shifted - self.mean(shifted), 0.0)

    def against_others(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """``x - (mean of the other members)`` = n/(n-1) (x - mean); zero where there are no others."""
        n = self.count.to(x.dtype)  # before dividing: integers would divide in float32
        return self.centred(x) * self._wide(n / (n - 1).clamp(min=1), x)

    def together(self) -> Bool[Tensor, "B B"]:
        """True for two members of one group, a row and itself included."""
        same = self.index[:, None] == self.index[None, :]
        return same & self.member[:, None] & self.member[None, :]

    def others_mean(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The mean of the other members of a row's group; zero where there are none."""
        others = (self.total(x) - x) / self._wide(self.count - 1, x)
        return others.where(self._wide(self.member & (self.count > 1), x), 0.0)

    def std(self, x: Float[Tensor, "B ..."], *, ddof: int) -> Float[Tensor, "B ..."]:
        """Standard deviation in each row's group, zero for ``ddof`` members or fewer.

        Squares are of shares of the spread, so they cannot overflow.
        """
        spread = self._extreme(x, "amax") - self._extreme(x, "amin")
        unit = self.centred(x) / spread
        std = spread * (self.total(unit.square()) / self._wide(self.count - ddof, x)).sqrt()
        return std.where(spread > 0, 0.0)


def _scored(
    rewards: Tensor, group_ids: Tensor, *, at_least: int | None = None, wanted_by: str = ""
) -> tuple[Tensor, Groups]:
    _check.vector(rewards=rewards)
    _check.group_ids(group_ids, rewards, count_name="rewards")
    (rewards,) = _check.detach(rewards)
    member = ~rewards.isnan()
    _check.finite(member, rewards=rewards)
    return rewards, Groups.of(group_ids, member, at_least=at_least, wanted_by=wanted_by)


def group_mean(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Reward minus the mean of its group (the row itself included): Dr. GRPO's advantage.

    Args:
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers.

    Returns:
        ``[B]`` advantages; 0 for unscored rows and for groups of one.

    Raises:
        ValueError: for wrong shapes or dtypes, or infinite rewards.

    References:
        Liu et al. 2025, arXiv 2503.20783.
    """
    rewards, groups = _scored(rewards, group_ids)
    return groups.centred(rewards)


def leave_one_out(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Reward minus the mean of the *other* rows of its group: RLOO's advantage, n/(n-1) times :func:`group_mean`.

    Args:
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers.

    Returns:
        ``[B]`` advantages; 0 for unscored rows and where every sibling is unscored.

    Raises:
        ValueError: for wrong shapes or dtypes, infinite rewards, or a group of one row.

    References:
        Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    rewards, groups = _scored(rewards, group_ids, at_least=2, wanted_by="leave_one_out")
    return groups.against_others(rewards)


def group_norm(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, eps: float = 1e-4, ddof: int = 1
) -> Float[Tensor, " B"]:
    """(reward - group mean) / (group std + eps): GRPO's advantage.

    Args:
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers.
        eps: added to the standard deviation; 1e-4 is what TRL adds.
        ddof: 1 divides the variance by n - 1 (torch.std, TRL), 0 by n (numpy). Right answers 3 of 8 with 0/1 rewards
            give +1.2074 / -0.7244 under 1 and +1.2907 / -0.7744 under 0, at eps 1e-4.

    Returns:
        ``[B]`` advantages; 0 where the group's rewards are all equal, for unscored rows, and where every sibling is.

    Raises:
        ValueError: for wrong shapes or dtypes, infinite rewards, a group of one row, or bad hyper-parameters.

    References:
        Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.
    """
    _check.number("eps", eps, low=0.0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (divide by n) or 1 (divide by n - 1), got {ddof!r}")
    rewards, groups = _scored(rewards, group_ids, at_least=2, wanted_by="group_norm")
    centred, std = groups.centred(rewards), groups.std(rewards, ddof=ddof)
    return (centred / (std + eps)).where(std > 0, 0.0)


def batch_norm(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, eps: float = 1e-8, ddof: int = 1
) -> Float[Tensor, " B"]:
    """(reward - mean) / sqrt(variance + eps) over all scored rows, whatever prompt they answer: REINFORCE++.

    The statistics are those of the rows given: call it once per global step, not per micro-batch. The KL belongs in the
    reward, before this.

    Args:
        rewards: ``[B]`` sequence rewards (KL taken off), NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; only its shape matters.
        eps: added to the variance.
        ddof: 1 divides the variance by n - 1, 0 by n.

    Returns:
        ``[B]`` advantages; 0 for unscored rows and where all rewards are equal.

    Raises:
        ValueError: for wrong shapes or dtypes, infinite rewards, or bad hyper-parameters.

    References:
        Hu et al. 2025, arXiv 2501.03262, equation 8.
    """
    rewards, groups = _scored(rewards, group_ids)
    return whiten(rewards, groups.member, eps=eps, ddof=ddof)


def group_mean_batch_norm(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, eps: float = 1e-8, ddof: int = 1
) -> Float[Tensor, " B"]:
    """:func:`group_mean`, then normalised over all scored rows: REINFORCE++ with a group baseline.

    The statistics are those of the rows given: call it once per global step, not per micro-batch.

    Args:
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers.
        eps: added to the variance.
        ddof: 1 divides the variance by n - 1, 0 by n.

    Returns:
        ``[B]`` advantages; 0 for unscored rows and where every group's rewards are equal.

    Raises:
        ValueError: for wrong shapes or dtypes, infinite rewards, or bad hyper-parameters.

    References:
        Hu et al. 2025, arXiv 2501.03262, the REINFORCE++-baseline variant.
    """
    rewards, groups = _scored(rewards, group_ids)
    return whiten(groups.centred(rewards), groups.member, eps=eps, ddof=ddof)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation over each row's unmasked tokens; the row ends after its last one.

    ``A_t = sum_k (gamma lam)^k delta_{t+k}``, ``delta_t = r_t + gamma V_{t+1} - V_t``. Masked slots inside a row (a
    tool's output) are stepped over: the token before a gap is followed by the token after it, undiscounted by the gap.

    Args:
        rewards: ``[B, T]`` reward of each token; a sequence reward sits on the last unmasked token.
        values: ``[B, T]`` the critic's value of the state before each token.
        mask: ``[B, T]`` True = a token that counts.
        gamma: discount per token, in [0, 1].
        lam: GAE lambda in [0, 1]; 1 is the Monte Carlo return, 0 the one-step error.

    Returns:
        advantages ``[B, T]`` and returns ``[B, T]`` (advantages + values), both zero where masked.

    Raises:
        ValueError: for wrong shapes or dtypes, unmasked entries that are not finite, or gamma, lam outside [0, 1].

    References:
        Schulman et al. 2016, arXiv 1506.02438, equation 16.
    """
    _check.number("gamma", gamma, low=0.0, high=1.0)
    _check.number("lam", lam, low=0.0, high=1.0)
    _check.matrix(rewards=rewards, values=values)
    _check.bool_mask(mask, rewards, like_name="rewards")
    _check.finite(mask, rewards=rewards, values=values)
    rewards, values = _check.detach(rewards, values)
    advantages = torch.empty_like(values)
    next_value = values.new_zeros(values.shape[0])
    running = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running).where(here, running)
        next_value = values[:, t].where(here, next_value)
        advantages[:, t] = running.where(here, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def reward_to_go(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """The discounted sum of the rewards from each token on: ``R_t = r_t + gamma R_{t+1}``.

    What came before a token cannot depend on it, so leaving it out changes no expected gradient and takes variance off.
    Masked slots inside a row are stepped over, undiscounted.

    Args:
        rewards: ``[B, T]`` reward of each token; a sequence reward sits on the last unmasked token.
        mask: ``[B, T]`` True = a token that counts.
        gamma: discount per token, in [0, 1].

    Returns:
        ``[B, T]``, zero where masked.

    Raises:
        ValueError: for wrong shapes or dtypes, unmasked entries that are not finite, or gamma outside [0, 1].

    References:
        Sutton et al. 1999, policy gradient methods for reinforcement learning with function approximation.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def whiten(
    values: Float[Tensor, "*dims"],
    mask: Bool[Tensor, "*dims"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    ddof: int = 1,
) -> Float[Tensor, "*dims"]:
    """Scale the unmasked entries to mean 0 and variance 1, over the whole tensor it is given.

    Whitening a micro-batch is not whitening the batch: call it once per global step.

    Args:
        values: any shape, usually advantages ``[B, T]``.
        mask: same shape, True = an entry that counts.
        shift_mean: False keeps the mean and scales the deviations from it alone.
        eps: added to the variance.
        ddof: 1 divides the variance by n - 1, 0 by n.

    Returns:
        same shape, zero where masked. A single unmasked entry, or all equal, becomes 0 (its mean without shift_mean).

    Raises:
        ValueError: for wrong shapes or dtypes, unmasked entries that are not finite, or bad hyper-parameters.
    """
    _check.number("eps", eps, low=0.0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (divide by n) or 1 (divide by n - 1), got {ddof!r}")
    _check.floating(values=values)
    _check.bool_mask(mask, values, like_name="values")
    _check.finite(mask, values=values)
    (values,) = _check.detach(values)
    if values.numel() == 0:
        return values
    count = mask.sum()
    # Where nothing counts, what follows is inf or NaN in masked entries alone.
    shift = values.where(mask, torch.inf).amin()
    shifted = (values - shift).where(mask, 0.0)
    mean = shifted.sum() / count
    centred = (shifted - mean).where(mask, 0.0)
    # In units of the spread, squares cannot overflow; equal entries, or a single one, have none.
    spread = shifted.amax()
    unit = centred / spread
    deviation = (unit.square().sum() / (count - ddof) + (math.sqrt(eps) / spread).square()).sqrt()
    scaled = (unit / deviation).where(spread > 0, 0.0)
    return scaled if shift_mean else (scaled + mean + shift).where(mask, 0.0)
