"""What looks on while a step is made: self-checks, controllers, corrections. A run has those that its settings ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlft.types import Batch, LossOutput

__all__ = ["Watcher", "Watchers"]


class Watcher:
    """Override what you need; the trainer calls it at each optimizer step.

    Attributes:
        done: True once there is nothing left to watch: then it leaves the list.
    """

    done = False

    def begins(self, micro_batches: Sequence[Batch], denominators: Tensor) -> None:
        """The step's batches are there, and counted.

        Args:
            micro_batches: of this process, before any row is left out of the forward pass.
            denominators: one count per loss term, over all processes.
        """

    def saw(self, batch: Batch, outputs: Mapping[str, Tensor], results: Sequence[LossOutput]) -> None:
        """One micro-batch went through model and objective.

        Args:
            batch: the micro-batch.
            outputs: of the forward pass with gradient.
            results: one per loss term.
        """

    def before_update(self, loss: float) -> None:
        """All gradients are there; nothing was applied yet.

        Args:
            loss: of the step, over all processes.
        """

    def after_update(self, *, moved: bool) -> Mapping[str, float]:
        """The optimizer took its step, or left it out.

        Args:
            moved: whether weights moved: a step was applied, with a learning rate and a gradient above 0.

        Returns:
            Metrics of the step.
        """
        return {}

    def logged(self, values: Mapping[str, float]) -> None:
        """A row of metrics was written."""


class Watchers:
    """Who watches the steps of a run, in order. Only hooks that someone overrides are called.

    Args:
        listed: those that the settings ask for.

    Attributes:
        begins, saw, before_update, after_update, logged: the hooks to call, see :class:`Watcher`.
    """

    def __init__(self, listed: Iterable[Watcher]) -> None:
        self._set(list(listed))

    def __iter__(self) -> Iterator[Watcher]:
        return iter(self._listed)

    def _set(self, listed: list[Watcher]) -> None:
        def hooks(name: str) -> list[Callable[..., Any]]:
            return [getattr(one, name) for one in listed if getattr(type(one), name) is not getattr(Watcher, name)]

        self._listed = listed
        self.begins, self.saw, self.logged = hooks("begins"), hooks("saw"), hooks("logged")
        self.before_update, self.after_update = hooks("before_update"), hooks("after_update")

    def add(self, watcher: Watcher, *, first: bool = False) -> None:
        """Let another one watch from the next step on, before or after the others; it takes the place of one of its kind."""
        others = [one for one in self._listed if type(one) is not type(watcher)]
        self._set([watcher, *others] if first else [*others, watcher])

    def leave(self) -> None:
        """Those that are done leave."""
        if any(watcher.done for watcher in self._listed):
            self._set([watcher for watcher in self._listed if not watcher.done])
