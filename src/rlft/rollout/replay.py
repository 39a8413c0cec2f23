"""Replay: answers of earlier steps mixed into a fresh group of the same prompt."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlft import _check
from rlft.rollout.randomness import fold_seed, row_keys, uniforms
from rlft.rollout.types import Rollout

__all__ = ["ReplayBuffer", "ReplayItem", "prompt_key"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ReplayItem:
    """One scored answer of an earlier policy: tokens and reward, never advantages (those belong to a group).

    Attributes:
        completion_ids: the sampled ids.
        logps: one per id, under the policy that sampled.
        reward: finite.
        finished: whether it ended by itself.
        weight_version: which weights sampled.
    """

    completion_ids: tuple[int, ...]
    logps: tuple[float, ...]
    reward: float
    finished: bool
    weight_version: int


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """The name under which a prompt's answers are kept: a hash of its token ids."""
    return hashlib.sha256(",".join(str(int(token)) for token in prompt_ids).encode()).hexdigest()[:32]


class ReplayBuffer:
    """The last scored answers of each prompt, and the mixture with fresh ones.

    Each fresh sample is replaced, with a fixed probability, by a stored answer of the same prompt, drawn uniformly with
    replacement: the group is then drawn from ``(1 - p) * policy + p * buffer``. AGRO's off-policy loss has the same
    optimum for every such mixture and needs no importance weight; a loss with a ratio needs the policy's own
    log-probs of the replayed tokens and must not use the stored ones as its own.

    The draw is a function of (seed, prompt's place in the batch, sample), so the buffer has no random state to save.

    Args:
        capacity: answers kept per prompt; the oldest go first.
        probability: how likely a fresh sample is replaced, in [0, 1].

    References:
        AGRO (arXiv:2503.19612), section 8.3: each on-policy sample is replaced with probability p.
    """

    def __init__(self, capacity: int, *, probability: float = 0.5) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"replay_capacity must be an integer >= 1 (answers per prompt), got {capacity!r}")
        _check.number("replay_probability", probability, low=0.0, high=1.0)
        self.capacity, self.probability = capacity, probability
        self._items: dict[str, deque[ReplayItem]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def items(self, prompt_ids: Sequence[int]) -> tuple[ReplayItem, ...]:
        """The stored answers of a prompt, oldest first."""
        return tuple(self._items.get(prompt_key(prompt_ids), ()))

    def add(self, prompt_ids: Sequence[int], item: ReplayItem) -> None:
        """Keep an answer. An empty one, or one without a finite reward (unscored), is not kept."""
        if item.completion_ids and math.isfinite(item.reward):
            self._items.setdefault(prompt_key(prompt_ids), deque(maxlen=self.capacity)).append(item)

    def mix(
        self, examples: Sequence[Any], sampled: Rollout, rewards: Float[Tensor, " B"], *, seed: int
    ) -> tuple[Rollout, Float[Tensor, " B"]]:
        """Replace some fresh rows by stored ones of the same prompt, then store the fresh ones.

        Args:
            examples: P prompts: objects with ``prompt_ids``, or the ids themselves.
            sampled: ``P * n`` fresh rows, prompt-major.
            rewards: ``[P * n]`` their rewards, NaN where unscored.
            seed: decides the replacements.

        Returns:
            The mixed rows, and their rewards in the dtype and on the device of ``rewards``. A prompt without stored
            answers keeps its fresh rows. A replayed row carries the log-probs it was sampled with.

        Raises:
            ValueError: when the counts do not fit.
        """
        prompts = [getattr(example, "prompt_ids", example) for example in examples]
        if not prompts or len(sampled) % len(prompts) or rewards.shape != (len(sampled),):
            raise ValueError(
                f"mix needs the same number of rows for each of {len(prompts)} prompts and one reward per row, "
                f"got {len(sampled)} rows and rewards of shape {list(rewards.shape)}"
            )
        n = len(sampled) // len(prompts)
        keys = row_keys(fold_seed(seed, stream="replay"), len(prompts), n)
        replace, pick = uniforms(keys, torch.zeros_like(keys)).tolist(), uniforms(keys, torch.ones_like(keys)).tolist()
        values = rewards.detach().double().tolist()
        fresh = [
            ReplayItem(tuple(ids), tuple(logps), reward, finished, sampled.weight_version)
            for ids, logps, reward, finished in zip(
                sampled.completion_ids, sampled.logps, values, sampled.finished, strict=True
            )
        ]
        mixed = []
        for row, item in enumerate(fresh):
            stored = self._items.get(prompt_key(prompts[row // n]))
            if stored and replace[row] < self.probability:
                item = stored[int(pick[row] * len(stored))]
            mixed.append(item)
        for row, item in enumerate(fresh):
            self.add(prompts[row // n], item)
        rollout = Rollout(
            [list(item.completion_ids) for item in mixed],
            [list(item.logps) for item in mixed],
            [item.finished for item in mixed],
            sampled.weight_version,
        )
        return rollout, rewards.new_tensor([item.reward for item in mixed])

    # -- saving ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All stored answers as (tensors, JSON record); what it gives does not change when the buffer does."""
        order = list(self._items)
        items = [item for key in order for item in self._items[key]]
        tensors = {
            "ids": torch.tensor([token for item in items for token in item.completion_ids], dtype=torch.int64),
            "logps": torch.tensor([value for item in items for value in item.logps], dtype=torch.float64),
            "lengths": torch.tensor([len(item.completion_ids) for item in items], dtype=torch.int64),
            "rewards": torch.tensor([item.reward for item in items], dtype=torch.float64),
            "finished": torch.tensor([item.finished for item in items], dtype=torch.bool),
            "weight_versions": torch.tensor([item.weight_version for item in items], dtype=torch.int64),
        }
        record = {
            "format": _FORMAT,
            "capacity": self.capacity,
            "prompts": order,
            "counts": [len(self._items[key]) for key in order],
        }
        return tensors, record

    def load_state_dict(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, exactly; the buffer is unchanged when that is refused.

        Raises:
            ValueError: for another format or capacity, or parts that do not fit together.
        """
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"the replay buffer was saved in format {record.get('format')!r}, this version reads {_FORMAT}"
            )
        if record.get("capacity") != self.capacity:
            raise ValueError(
                f"replay_capacity is {self.capacity} and the saved buffer's {record.get('capacity')}; set it to the latter"
            )
        order, counts = list(record["prompts"]), list(record["counts"])
        if not sum(counts):
            self._items = {}  # a store may leave out empty tensors
            return
        lengths = tensors["lengths"].tolist()
        rows = [tensors[name] for name in ("rewards", "finished", "weight_versions")]
        tokens = (tensors["ids"], tensors["logps"])
        fits = len(order) == len(counts) and sum(counts) == len(lengths) and all(len(t) == len(lengths) for t in rows)
        if not fits or any(len(t) != sum(lengths) for t in tokens) or any(count > self.capacity for count in counts):
            raise ValueError("the saved replay buffer's parts do not fit together; the checkpoint is damaged")
        ids, logps = (part.split(lengths) for part in tokens)
        rewards, finished, versions = (part.tolist() for part in rows)
        loaded = [
            ReplayItem(tuple(ids[k].tolist()), tuple(logps[k].tolist()), rewards[k], finished[k], versions[k])
            for k in range(len(lengths))
        ]
        found: dict[str, deque[ReplayItem]] = {}
        start = 0
        for key, count in zip(order, counts, strict=True):
            found[key] = deque(loaded[start : start + count], maxlen=self.capacity)
            start += count
        self._items = found
