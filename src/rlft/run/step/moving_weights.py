"""Weights that follow the policy: a reference that moves, and the moving average that an opponent plays with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlft.config import Config
from rlft.run.progress import Progress
from rlft.run.step.source import OnlineSource, Source
from rlft.run.step.watchers import Watcher

__all__ = ["AverageFollows", "ReferenceFollows"]


class ReferenceFollows(Watcher):
    """Mixes the policy into the reference every ``ref_model_sync_steps`` steps (``sync_ref_model``).

    Args:
        config: the run's settings.
        policy: holds the reference.
        source: what is left of a generation is compared with the reference as it is after the move.
        progress: of the run.
    """

    def __init__(self, config: Config, policy: Any, source: Source, progress: Progress) -> None:
        self.every, self.alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
        self.policy, self.source, self.progress = policy, source, progress

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
