"""Which examples come next: :class:`EpochSampler`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch

from rlft import _check
from rlft.data.example import DataWarning

__all__ = ["EpochSampler", "fold"]


def fold(seed: int, *parts: int) -> int:
    """A seed of 63 bits made of a seed and further numbers; near inputs give unrelated outputs."""
    text = ":".join(str(int(part)) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class EpochSampler(Iterator[list[int]]):
    """Endless batches of indices, the same for a seed whatever else draws random numbers.

    An epoch is a permutation of all examples, cut into global batches of ``batch_size * world_size``. A batch never
    holds examples of two epochs. The ranks share each global batch out: disjoint parts, in order, whose sizes differ by
    at most one, so that one process with a batch of 8 and two with 4 train on the same global batches. Every rank makes
    the same number of batches, and none of them is empty.

    The rest of an epoch that fills no global batch is a short last batch (``last="keep"``; when there is not one
    example per rank, it is added to the batch before), or is left out of that epoch (``last="drop"``; which examples
    these are changes with every shuffle).

    Args:
        n_examples: size of the data.
        batch_size: examples per batch and rank.
        seed: of the shuffling; the random state of Python, NumPy and torch is neither read nor changed.
        shuffle: permute each epoch anew; False keeps the order of the data.
        rank: of this process.
        world_size: number of processes.
        last: ``keep`` or ``drop``; None is ``keep``, with a warning where it matters.

    Raises:
        ValueError: an argument is out of range, or the data is smaller than one global batch.
    """

    def __init__(
        self,
        n_examples: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        last: Literal["keep", "drop"] | None = None,
    ) -> None:
        for name, value, low in (
            ("n_examples", n_examples, 1),
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
        if last not in (None, "keep", "drop"):
            raise ValueError(f"last must be 'keep' or 'drop', got {last!r}")
        self.global_batch_size = batch_size * world_size
        if n_examples < self.global_batch_size:
            raise ValueError(
                f"the data has {n_examples} examples, fewer than one global batch of {self.global_batch_size} "
                f"(batch_size {batch_size} x {world_size} processes); lower batch_size or give more data"
            )
        rest = n_examples % self.global_batch_size
        if rest and last is None:
            warnings.warn(
                f"{n_examples} examples are no multiple of the global batch of {self.global_batch_size}: the last "
                f"batch of each epoch holds the remaining {rest}; choose last='keep' or last='drop'",
                DataWarning,
                stacklevel=2,
            )
        self.n_examples, self.batch_size, self.seed, self.shuffle = n_examples, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.last: Literal["keep", "drop"] = last or "keep"
        self.epoch = 0
        self.position = 0  # examples of this epoch that all ranks together have had
        self._order = self._permutation(0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, equal on every rank."""
        full, rest = divmod(self.n_examples, self.global_batch_size)
        return full + (self.last == "keep" and rest >= self.world_size)

    def __iter__(self) -> EpochSampler:
        return self

    def __next__(self) -> list[int]:
        """The indices of this rank's next batch."""
        size = self._next_size()
        if size == 0:
            self.epoch += 1
            self.position = 0
            self._order = self._permutation(self.epoch)
            size = self._next_size()
        window = self._order[self.position : self.position + size]
        self.position += size
        start, end = (size * r // self.world_size for r in (self.rank, self.rank + 1))
        return window[start:end]

    def _next_size(self) -> int:
        """Examples of the next global batch of this epoch, 0 when it is over."""
        remaining = self.n_examples - self.position
        if remaining < self.global_batch_size:
            return remaining if self.last == "keep" and remaining >= self.world_size else 0
        rest = remaining - self.global_batch_size
        return remaining if self.last == "keep" and rest < self.world_size else self.global_batch_size

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.n_examples))
        generator = torch.Generator().manual_seed(fold(self.seed, epoch))
        return torch.randperm(self.n_examples, generator=generator).tolist()

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything the next batch depends on, as plain JSON values; the same on every rank."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "n_examples": self.n_examples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "last": self.last,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        With another batch size or number of processes no example of the epoch is lost or repeated; the batches are
        the same ones only while their product is.

        Raises:
            ValueError: the state is of other data, another seed or another way of sampling.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(
                f"a sampler's state has the keys {sorted(mine)}, got {sorted(state)}; it is of another version"
            )
        different = [key for key in ("n_examples", "seed", "shuffle", "last") if state[key] != mine[key]]
        if different:
            shown = ", ".join(f"{key} {state[key]!r} -> {mine[key]!r}" for key in different)
            raise ValueError(f"the sampler's state is of another run ({shown}); resume with the same data and settings")
        for key in ("epoch", "position"):
            _check.number(key, state[key], low=0.0, high=float("inf") if key == "epoch" else float(self.n_examples))
        if state["batch_size"] * state["world_size"] != self.global_batch_size:
            warnings.warn(
                f"the global batch was {state['batch_size'] * state['world_size']} examples and is "
                f"{self.global_batch_size} now: no example is lost or repeated, but the batches are others",
                DataWarning,
                stacklevel=2,
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._permutation(self.epoch)
