"""Examples with answers as a batch, with what the data know of them beside the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlft.objective import Objective
from rlft.run.step.parts import Parts
from rlft.types import Batch

__all__ = ["Collator", "RefLogps", "with_columns"]


class RefLogps:
    """Log-probs of every answer of some datasets under the reference, computed before the first step."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}
        self._kept: list[Sequence[Any]] = []  # an id belongs to its object for as long as that lives

    def add(self, examples: Sequence[Any], flat: Tensor) -> None:
        """Take in a dataset.

        Args:
            examples: its examples.
            flat: the log-probs of all tokens of all answers, in order.
        """
        self._kept.append(examples)
        pieces = iter(flat.split([len(c.ids) for e in examples for c in e.completions]))
        for example in examples:
            self._rows[id(example)] = [next(pieces) for _ in example.completions]

    def fill(self, batch: Batch, examples: Sequence[Any]) -> Batch:
        """The batch with ``ref_logps``, where all its examples are known; else as it is."""
        if not all(id(example) in self._rows for example in examples):
            return batch
        padded = pad_sequence([row for example in examples for row in self._rows[id(example)]], batch_first=True)
        width = batch.completion_ids.shape[1]
        padded = torch.nn.functional.pad(padded, (0, width - padded.shape[1]))
        return batch.replace(ref_logps=padded.to(batch.device))


class Collator:
    """Makes batches of examples with answers, on the device.

    Attributes:
        ref_logps: what is known of the reference before the first step; None without ``precompute_ref_log_probs``.
    """

    def __init__(self, parts: Parts) -> None:
        self.objective, self.device, self.data = parts.objective, parts.processes.device, parts.train_data
        pair_rewards = parts.config.pair_rewards
        self.pad_id, self.pair_rewards = parts.tokenizer.pad_token_id, tuple(pair_rewards) if pair_rewards else None
        self.ref_logps: RefLogps | None = None

    def drawn(self, indices: Any) -> Batch:
        """The batch of training examples, by their indices (of a stream, the examples themselves)."""
        return self(self.data.pick(indices))

    def __call__(self, examples: Sequence[Any]) -> Batch:
        from rlft.data import collate

        batch = collate(examples, pad_id=self.pad_id, pair_rewards=self.pair_rewards)
        batch = with_columns(batch, examples, self.objective).to(self.device)
        return batch if self.ref_logps is None else self.ref_logps.fill(batch, examples)


def with_columns(batch: Batch, examples: Sequence[Any], objective: Objective) -> Batch:
    """Numeric dataset columns that the objective names, as extras: one number per prompt, or a list with one per answer."""
    if not objective.columns:
        return batch
    extras = dict(batch.extras)
    sizes = torch.bincount(batch.group_ids, minlength=batch.num_groups).tolist()
    for name in sorted(objective.columns):
        if not all(name in e.columns for e in examples):
            continue
        values: list[float] = []
        for example, size in zip(examples, sizes, strict=True):
            cell = example.columns[name]
            cells = list(cell) if isinstance(cell, (list, tuple)) else [cell] * size
            if len(cells) != size or any(isinstance(c, bool) or not isinstance(c, (int, float)) for c in cells):
                raise ValueError(
                    f"column {name!r}, which objective {objective.name!r} names, must hold one number per prompt or per answer "
                    f"({size} here); row {example.index} holds {cell!r}"
                )
            values += [float(c) for c in cells]
        extras[name] = torch.tensor(values)
    return batch.replace(extras=extras)
