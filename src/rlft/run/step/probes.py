"""A few real tokens, scored twice: how the rows are made, and how far apart two ways to one number may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.types import Batch

__all__ = ["EXACT", "LOOKED_AT", "ROUGH", "apart", "batch_of", "exact", "probe_batch", "probe_rows"]

#: Rows of the data that are looked at.
LOOKED_AT = 16
#: Largest difference of a log-prob that is computed twice, where arithmetic is float32 or better; elsewhere of the mean.
EXACT, ROUGH = 1e-4, 0.05


def exact(policy: torch.nn.Module, mixed_precision: str) -> bool:
    """Whether log-probs are computed in float32 or better, so that two ways to one number agree closely."""
    narrow = {p.dtype for p in policy.parameters()} - {torch.float32, torch.float64}
    return not narrow and mixed_precision == "no"


def apart(one: Tensor, other: Tensor, *, exact: bool) -> str | None:
    """How far two computations of the same log-probs are apart, where that is too far."""
    gap = (one.double() - other.double()).abs()
    if exact:
        largest = float(gap.max())
        return None if largest <= EXACT else f"up to {largest:.3g} (bound {EXACT:g})"
    mean = float(gap.mean())
    return None if mean <= ROUGH else f"{mean:.3g} on average (bound {ROUGH:g})"


def probe_rows(examples: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every answer where there are some, else of prompts scored as answers."""
    answers = [(list(e.prompt_ids), list(c.ids)) for e in examples for c in e.completions if c.ids]
    return answers or [(list(e.prompt_ids[:1]), list(e.prompt_ids[1:] or e.prompt_ids)) for e in examples]


def probe_batch(examples: Sequence[Any], pad_id: int | None) -> Batch:
    """The answers of some examples where there are some, else their prompts scored as answers; each row its own group."""
    return batch_of(probe_rows(examples), pad_id)


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int | None) -> Batch:
    """A batch of (prompt, answer) token ids, each row its own group, every answer token trained."""

    def padded(lists: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, lists))
        ids = torch.tensor([[*row, *[pad_id or 0] * (width - len(row))] for row in lists])
        lengths = torch.tensor([len(row) for row in lists])
        return ids, torch.arange(width)[None] < lengths[:, None]

    prompts, prompt_mask = padded([prompt for prompt, _ in rows])
    answers, exists = padded([answer for _, answer in rows])
    return Batch(prompts, prompt_mask, answers, exists, exists, torch.arange(len(rows)))
