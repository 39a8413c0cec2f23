"""Weights that follow the policy: a reference that moves, and the moving average that an opponent plays with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlft.run.step.parts import Parts
from rlft.run.step.source import OnlineSource, Source
from rlft.run.step.watchers import Watcher

__all__ = ["AverageFollows", "ReferenceFollows"]


class ReferenceFollows(Watcher):
    """Mixes the policy into the reference every ``ref_model_sync_steps`` steps (``sync_ref_model``).

    Args:
        parts: of the run.
        source: what is left of a generation is compared with the reference as it is after the move.
    """

    def __init__(self, parts: Parts, source: Source) -> None:
        self.every, self.alpha = parts.config.ref_model_sync_steps, parts.config.ref_model_mixup_alpha
        self.policy, self.progress, self.source = parts.policy, parts.processes.progress, source

    def after_update(self, *, moved: bool) -> Mapping[str, float]:
        if (self.progress.step + 1) % self.every == 0:
            self.policy.update_reference(self.alpha)
            if isinstance(self.source, OnlineSource):
                self.source.without_reference()
        return {}


class AverageFollows(Watcher):
    """Moves the average of the policy's weights after every step (``opponent_ema_decay``).

    Args:
        average: a :class:`rlft.models.MovingAverage`.
    """

    def __init__(self, average: Any) -> None:
        self.average = average

    def after_update(self, *, moved: bool) -> Mapping[str, float]:
        self.average.update()
        return {}
