"""The stages of a trainer that the objects of a run call back: a subclass may override each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlft.types import Batch

__all__ = ["Stages"]


class Stages(Protocol):
    """See the methods of :class:`rlft.Trainer`."""

    def rollout(self, indices: Sequence[Any], step: int) -> Batch: ...

    def score(
        self, examples: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> Any: ...

    def prepare(self, batch: Batch) -> Batch: ...

    def forward(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]: ...

    def save_model(self, folder: str | Path) -> None: ...
