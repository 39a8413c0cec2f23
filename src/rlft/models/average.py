"""A moving average of a model's trained weights: a second policy that costs one copy of what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from rlft import _check
from rlft.models.adapters import mix
from rlft.models.reference import full_copy, load_tensors

__all__ = ["MovingAverage"]


class MovingAverage:
    """``average <- decay * average + (1 - decay) * weights``, over the tensors that train.

    Args:
        model: whose weights are followed; adapters alone where only they train.
        decay: share of the average that stays at each update, in [0, 1); 0 follows at once.

    Raises:
        ValueError: for a decay out of range, or a model without trainable weights.

    References:
        Munos et al. 2023, arXiv 2312.00886, section 7 (the opponent of Nash-EMA).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        _check.number("decay", decay, low=0.0, high=1.0)
        if decay == 1.0:
            raise ValueError("decay must be below 1, got 1: the average would never move; use a frozen reference")
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._weights:
            raise ValueError("the model has no trainable weights to average; set requires_grad, or add adapters")
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        mix([(p.detach(), self._average[name]) for name, p in self._weights.items()], 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average's weights inside the block, and its own again after it, bit for bit.

        Not while gradients are being computed.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._weights.items():
            parameter.data, self._average[name] = self._average[name], parameter.data

    def state(self) -> dict[str, Tensor]:
        """The average's tensors by name, for a checkpoint."""
        return {name: full_copy(tensor) for name, tensor in self._average.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        load_tensors(self._average, state, what="moving average")
