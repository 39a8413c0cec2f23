"""How a step becomes micro-batches: by rows or by tokens, groups whole, and without answers that teach nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlft._terms import BEHAVIOUR, MOMENTS, Term
from rlft.run.step import update as guard
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = [
    "blank",
    "by_rows",
    "by_tokens",
    "drops_zero_advantages",
    "note_layout",
    "split",
    "unread",
    "without_gradient",
    "without_idle_rows",
]


def split(trainer: Trainer, batch: Batch) -> list[Batch]:
    """The micro-batches of one process and optimizer step."""
    c, p = trainer.config, trainer.plan
    if c.max_tokens_per_micro_batch is not None:
        pieces = by_tokens(batch, c.max_tokens_per_micro_batch, whole=trainer.objective.needs_groups)
        return [batch.select(rows) for rows in pieces]
    if trainer.online and not trainer.objective.needs_groups:
        return batch.split(p.micro_batch_rows, keep_groups=False)
    return batch.split_groups(p.micro_batch_groups)


def without_gradient(trainer: Trainer, batch: Batch, *, alone: bool = False) -> list[Tensor]:
    """Row numbers of passes without gradient: each no larger than a micro-batch, by tokens where the run counts those.

    Args:
        trainer: its settings.
        batch: any batch.
        alone: other processes may have another number of batches. Sharded passes wait for each other, and lengths differ
            between processes, so there rows are counted.
    """
    budget = trainer.config.max_tokens_per_micro_batch
    if budget is not None and not (alone and guard.sharded(trainer)):
        return by_tokens(batch, budget, whole=False)
    return by_rows(batch, max(trainer.plan.micro_batch_rows, 1))


def by_tokens(batch: Batch, budget: int, *, whole: bool = True) -> list[Tensor]:
    """Row numbers of micro-batches that take at most ``budget`` tokens each: rows times the longest row.

    That is what the padded layout computes, and an upper bound where prompts are shared. Groups are sorted by their
    longest row, so that neighbours waste little padding.

    Args:
        batch: any batch.
        budget: tokens, at least 1.
        whole: never split a group: one above the budget stands alone. Else such a group is cut, its longest rows first,
            and only a single row may be above the budget.

    Returns:
        Row numbers, each row once; the rows of a group side by side, and in their order where it is whole.
    """
    return _packed(batch, lambda rows, width: rows * width <= budget, whole=whole)


def by_rows(batch: Batch, rows: int) -> list[Tensor]:
    """Row numbers of passes of at most ``rows`` rows each, groups sorted by their longest row, and whole where they fit."""
    return _packed(batch, lambda count, width: count <= rows, whole=False)


def _packed(batch: Batch, fits: Callable[[int, int], bool], *, whole: bool) -> list[Tensor]:
    """Row numbers in pieces that ``fits(rows, longest row)`` allows."""
    lengths = (batch.prompt_mask.sum(-1)[batch.group_ids.long()] + batch.completion_mask.sum(-1)).tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        members.setdefault(group, []).append(row)
    longest = {group: max(lengths[row] for row in rows) for group, rows in members.items()}
    pieces: list[list[int]] = []
    width = 0
    for group in sorted(members, key=lambda g: (-longest[g], g)):
        rows, wide = members[group], max(width, longest[group])
        if not pieces or not fits(len(pieces[-1]) + len(rows), wide):
            pieces.append([])
            wide = longest[group]
        width = wide
        if whole or fits(len(pieces[-1]) + len(rows), width):
            pieces[-1] += rows
            continue
        for row in sorted(rows, key=lambda r: (-lengths[r], r)):
            if pieces[-1] and not fits(len(pieces[-1]) + 1, width):
                pieces.append([])
                width = lengths[row]
            pieces[-1].append(row)
    return [torch.tensor(piece, dtype=torch.long) for piece in pieces]


# -- rows that teach nothing ------------------------------------------------------------------------------------------
def drops_zero_advantages(trainer: Trainer) -> bool:
    """Whether rows with advantage 0 are left out: nothing in the loss but the advantage times something."""
    # the KL of a trust region is over all rows
    return trainer.config.drop_zero_advantages and trainer.objective.advantage_weighted and trainer.trust_step is None


def unread(trainer: Trainer, batch: Batch) -> Tensor:
    """``[B]``: rows whose old and reference log-probs, values and states nothing reads.

    Without a token that counts; and, once advantages are known, those that the update will leave out.
    """
    blank_rows = ~batch.mask.any(-1)
    if batch.advantages is None or not drops_zero_advantages(trainer):
        return blank_rows
    return blank_rows | _weightless(batch)


def without_idle_rows(trainer: Trainer, micro_batches: list[Batch]) -> list[Batch]:
    """Leave out rows with neither loss nor gradient.

    That is: without a token that counts, and, where the objective is the advantage times something, with advantage 0. Where
    a row's place in its group matters, as in pairs, a group goes only as a whole.

    The step's denominators are counted before, over all rows, so loss and gradient stay what they are. Metrics of the
    forward pass (entropy, clip ratios) are then over the rows that went through it.

    Args:
        trainer: says what the objective allows.
        micro_batches: of one process and step.

    Returns:
        Micro-batches of the rows that are left; one row (or group, where the objective compares rows) where none is, since
        sharded processes pass through the model together.
    """
    if not micro_batches or trainer.objective.couples_rows:
        return micro_batches
    # without advantages the loss says that it lacks them
    weighted = drops_zero_advantages(trainer) and all(b.advantages is not None for b in micro_batches)
    idle = [_weightless(batch) if weighted else _blank_rows(trainer, batch) for batch in micro_batches]
    everything = torch.cat(idle)
    if weighted:
        trainer.metrics.add("frac_rows_dropped", everything.double(), torch.ones_like(everything))
    if not bool(everything.any()):
        return micro_batches
    kept = [b.select((~rows).nonzero()[:, 0]) for b, rows in zip(micro_batches, idle, strict=True) if not rows.all()]
    return split(trainer, Batch.concat(kept)) if kept else [_least(trainer, micro_batches[0])]


def _weightless(batch: Batch) -> Tensor:
    """``[B]``: every advantage 0 or masked."""
    advantages = batch.advantages
    assert advantages is not None
    wide = advantages[:, None] if advantages.ndim == 1 else advantages
    return ((wide == 0) | ~batch.mask).all(-1)


def _blank_rows(trainer: Trainer, batch: Batch) -> Tensor:
    """``[B]``: rows without a token that counts; where groups stay whole, only if no row of the group has one."""
    blank_rows = ~batch.mask.any(-1)
    if not any(_keeps_groups(term, batch) for term in trainer.objective.terms):
        return blank_rows
    alive = torch.zeros(batch.num_groups, dtype=torch.bool, device=batch.device)
    alive[batch.group_ids[~blank_rows].long()] = True
    return ~alive[batch.group_ids.long()]


def _keeps_groups(term: Term, batch: Batch) -> bool:
    """Whether a loss reads rows by their place in the group, or may: what is not ours is not known to leave blank rows out."""
    if term.per_pair or (term.rows == "chosen" and batch.labels is None):
        return True
    ours = getattr(term.function, "__module__", "").startswith("rlft.")
    return "group_ids" in term.sources and (term.prefers or not ours)


def _least(trainer: Trainer, batch: Batch) -> Batch:
    """The least that can pass through the model where no row counts."""
    if trainer.objective.needs_groups:
        return blank(batch)
    row = batch.select(batch.completion_mask.sum(-1).argmin()[None])
    # its old log-probs were not computed (see unread), and zeros would be measured as if they were
    unknown = row.old_logps is not None and not bool(row.old_logps.where(row.mask, 0.0).any())
    return row.replace(old_logps=None) if unknown else row


def blank(batch: Batch) -> Batch:
    """A batch of one group that counts nowhere, for a process that has fewer micro-batches than another."""
    small = batch.select((batch.group_ids == batch.group_ids[0]).nonzero()[:, 0])
    return small.replace(mask=torch.zeros_like(small.mask))


def note_layout(trainer: Trainer, batch: Batch) -> None:
    """Metrics of the forward pass that just ran: how much of it was padding, and what shared prompts saved."""
    used, needs = trainer.policy.layout_used, trainer.objective.needs
    inside = trainer.objective.needs_reference and batch.ref_states is None
    inside = inside and (batch.ref_logps is None or bool(needs & {"token_kl", *MOMENTS}))
    behaviour = bool(needs & BEHAVIOUR) and batch.behaviour_states is None and trainer.plan.updates_per_generation > 1
    trainer.meter.passed(used, backward=True, passes=1 + inside + behaviour)
    if used.computed:
        trainer.metrics.add("padding_efficiency", used.tokens / used.computed, weight=float(used.computed))
        trainer.metrics.add("prompt_sharing", used.repeated / max(1, used.tokens), weight=float(used.tokens))
