"""What a run is made of: fixed before the first step. What moves has an owner of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlft.config import Config
from rlft.objective import Objective
from rlft.run.measure.journal import Journal
from rlft.run.processes.processes import Processes
from rlft.run.step.batch_sizes import BatchSizes
from rlft.run.step.players import Players
from rlft.types import Batch

__all__ = ["Parts", "Stages"]


class Stages(Protocol):
    """Methods of the trainer that a run's objects call back: a subclass may override each."""

    def rollout(self, indices: Sequence[Any], step: int) -> Batch: ...

    def score(
        self, examples: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> Any: ...

    def prepare(self, batch: Batch) -> Batch: ...

    def forward(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]: ...

    def save_model(self, folder: str | Path) -> None: ...


@dataclass(frozen=True)
class Parts:
    """Handed to the constructors of a run's objects, each of which keeps what it uses.

    Attributes:
        objective: as the run begins; a KL controller moves the trainer's own.
        processes, journal: of the run; ``processes.progress`` says how far it is.
        policy, model: the module that is trained, and as accelerate wrapped it.
        own_schedule: whether the learning rate follows the settings; the caller's optimizer has its own.
        train_data, eval_data: as tokens; None without held-out data.
        rewards, judge: each a :class:`rlft.rewards.RewardSet`, or None.
        replay: stored answers, or None.
        made_of: see :func:`rlft.run.keep.record.made_of`.
    """

    config: Config
    objective: Objective
    stages: Stages
    processes: Processes
    journal: Journal
    sizes: BatchSizes
    tokenizer: Any
    policy: Any
    model: Any
    optimizer: torch.optim.Optimizer
    own_schedule: bool
    train_data: Any
    eval_data: Any
    rewards: Any
    judge: Any
    players: Players
    sampler: Any
    replay: Any
    made_of: dict[str, Any]
    run_dir: Path

    @property
    def online(self) -> bool:
        """Whether answers are sampled during training."""
        return self.rewards is not None or self.judge is not None

    @property
    def temperature(self) -> float:
        """Log-probs are those of the distribution that sampled: its temperature divides the logits."""
        return self.config.temperature if self.online else 1.0
