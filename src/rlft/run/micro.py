"""How a step becomes micro-batches: by rows or by tokens, groups whole, and without answers that teach nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["blank", "by_tokens", "note_layout", "split", "without_idle_rows"]


def split(trainer: Trainer, batch: Batch) -> list[Batch]:
    """The micro-batches of one process and optimizer step."""
    c, p = trainer.config, trainer.plan
    if c.max_tokens_per_micro_batch is not None:
        return [batch.select(rows) for rows in by_tokens(batch, c.max_tokens_per_micro_batch)]
    if trainer.online and not trainer.objective.needs_groups:
        return batch.split(p.micro_batch_rows, keep_groups=False)
    return batch.split_groups(p.micro_batch_groups)


def by_tokens(batch: Batch, budget: int) -> list[Tensor]:
    """Row numbers of micro-batches that take at most ``budget`` tokens each: rows times the longest row.

    That is what the padded layout computes, and an upper bound where prompts are shared. Groups are sorted by their
    longest row, so that neighbours waste little padding, and are never split: one above the budget stands alone.

    Args:
        batch: any batch.
        budget: tokens, at least 1.

    Returns:
        Row numbers, each row once; the rows of a group side by side and in their order.
    """
    lengths = (batch.prompt_mask.sum(-1)[batch.group_ids.long()] + batch.completion_mask.sum(-1)).tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        members.setdefault(group, []).append(row)
    longest = {group: max(lengths[row] for row in rows) for group, rows in members.items()}
    pieces: list[list[int]] = []
    width = 0
    for group in sorted(members, key=lambda g: (-longest[g], g)):
        rows = members[group]
        if not pieces or (len(pieces[-1]) + len(rows)) * width > budget:
            pieces.append([])
            width = longest[group]  # the first group of a piece is its longest
        pieces[-1] += rows
    return [torch.tensor(piece, dtype=torch.long) for piece in pieces]


def without_idle_rows(trainer: Trainer, micro_batches: list[Batch]) -> list[Batch]:
    """Leave out rows with neither loss nor gradient: advantage 0, and an objective that is the advantage times something.

    The step's denominators are counted before, over all rows, so loss and gradient stay what they are. Metrics of the
    forward pass (entropy, clip ratios) are then over the rows that went through it.

    Args:
        trainer: says whether the objective allows it.
        micro_batches: of one process and step.

    Returns:
        Micro-batches of the rows that are left; one row where none is, since sharded processes pass through the model
        together.
    """
    allowed = trainer.config.drop_zero_advantages and trainer.objective.advantage_weighted
    # the KL of a trust region is over all rows
    if not allowed or not micro_batches or trainer.trust_step is not None:
        return micro_batches
    idle = [_idle(batch) for batch in micro_batches]
    everything = torch.cat(idle)
    trainer.metrics.add("frac_rows_dropped", everything.double(), torch.ones_like(everything))
    if not bool(everything.any()):
        return micro_batches
    kept = [b.select((~rows).nonzero()[:, 0]) for b, rows in zip(micro_batches, idle, strict=True) if not rows.all()]
    if not kept:
        shortest = micro_batches[0].completion_mask.sum(-1).argmin()[None]
        return [micro_batches[0].select(shortest)]
    return split(trainer, Batch.concat(kept))


def _idle(batch: Batch) -> Tensor:
    advantages = batch.advantages
    assert advantages is not None  # a loss that is weighted by advantages asks for them
    wide = advantages[:, None] if advantages.ndim == 1 else advantages
    return ((wide == 0) | ~batch.mask).all(-1)


def blank(batch: Batch) -> Batch:
    """A batch of one group that counts nowhere, for a process that has fewer micro-batches than another."""
    small = batch.select((batch.group_ids == batch.group_ids[0]).nonzero()[:, 0])
    return small.replace(mask=torch.zeros_like(small.mask))


def note_layout(trainer: Trainer, batch: Batch) -> None:
    """Metrics of the forward pass that just ran: how much of it was padding, and what shared prompts saved."""
    used = trainer.policy.layout_used
    inside = trainer.objective.needs_reference and batch.ref_states is None
    inside = inside and (batch.ref_logps is None or "token_kl" in trainer.objective.needs)
    trainer.meter.passed(used, backward=True, passes=1 + inside)
    if used.computed:
        trainer.metrics.add("padding_efficiency", used.tokens / used.computed, weight=float(used.computed))
        trainer.metrics.add("prompt_sharing", used.repeated / max(1, used.tokens), weight=float(used.tokens))
