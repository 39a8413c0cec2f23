"""What looks on while a step is made: self-checks, controllers, corrections. A run has those that its settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlft.types import Batch, LossOutput

__all__ = ["Watcher"]


class Watcher:
    """Override what you need; the trainer calls every watcher of its list at each optimizer step, in order.

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
