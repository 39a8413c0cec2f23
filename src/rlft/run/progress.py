"""How far a run is. The loop moves it; everything else reads it. It is ``trainer.state``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Progress"]

#: Of the fields, those that are no part of the state: the plan of a run, and what stands in metrics.jsonl.
_NOT_KEPT = ("step", "max_steps", "steps_per_epoch", "log_history", "is_world_process_zero")
#: Field -> its name in a checkpoint, where that is another.
_KEPT_AS = {"generations": "rollouts"}


@dataclass
class Progress:
    """Where a run stands, under the names that callbacks of transformers know.

    Attributes:
        max_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the data; None for a stream.
        step: optimizer steps taken.
        tokens_seen: tokens trained on, over all processes.
        generations: generations that this process sampled.
        evaluated_at: step of the last evaluation; -1 before the first.
        finished: the run came to its end.
        checked: the first step has passed its self-checks.
        resumed_from: id and path of the checkpoint that was asked for by name.
        best_metric: best value so far of ``metric_for_best_model``.
        best_global_step: the step of that value.
        best_model_checkpoint: the newest checkpoint that was written at such a step.
        log_history: every row that was logged, with its ``step``.
        is_world_process_zero: whether this process writes the files of the run.
    """

    max_steps: int
    steps_per_epoch: int | None = None
    step: int = 0
    tokens_seen: int = 0
    generations: int = 0
    evaluated_at: int = -1
    finished: bool = False
    checked: bool = False
    resumed_from: dict[str, str] | None = None
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_world_process_zero: bool = True
    log_history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def global_step(self) -> int:
        """``step``, as transformers calls it."""
        return self.step

    @property
    def epoch(self) -> float:
        """Passes over the data so far; 0 for a stream, whose length is not known."""
        return self.step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def better(self, values: Mapping[str, float], metric: str, *, greater: bool) -> bool:
        """Note a new best value of a metric.

        Args:
            values: of an evaluation.
            metric: its name.
            greater: whether more is better.

        Returns:
            Whether this is the best so far; a NaN never is.
        """
        value = values.get(metric)
        if value is None or value != value:
            return False
        if self.best_metric is not None and (value <= self.best_metric if greater else value >= self.best_metric):
            return False
        self.best_metric, self.best_global_step = float(value), self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside the step."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _NOT_KEPT]
        return {_KEPT_AS.get(name, name): getattr(self, name) for name in names}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back; what an older version did not keep stays as it is."""
        for name in self.state_dict():
            if name in values:
                setattr(self, {kept: own for own, kept in _KEPT_AS.items()}.get(name, name), values[name])
