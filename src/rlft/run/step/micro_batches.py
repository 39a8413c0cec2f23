"""How a step becomes micro-batches: by rows or by tokens, groups whole, and without answers that teach nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlft._terms import BEHAVIOUR, MOMENTS, Term
from rlft.errors import TrainingError
from rlft.run.processes.processes import on_cpu
from rlft.run.step.parts import Parts
from rlft.types import Batch

__all__ = ["MicroBatches", "blank", "by_rows", "by_tokens"]


class MicroBatches:
    """Cuts the batch of a step, and says what its passes cost. It holds nothing of its own."""

    def __init__(self, parts: Parts) -> None:
        self.sizes, self.online, self.policy = parts.sizes, parts.online, parts.policy
        self.processes, self.journal, self.model = parts.processes, parts.journal, parts.model
        #: Which groups stay whole, and which rows teach nothing; its weights do not matter here.
        self.objective = objective = parts.objective
        config, self.budget = parts.config, parts.config.max_tokens_per_micro_batch
        #: Whether rows with advantage 0 are left out: nothing in the loss but the advantage times something. The KL of a trust
        #: region is over all rows.
        self.drops_zero_advantages = (
            config.drop_zero_advantages and objective.advantage_weighted and objective.trust_region is None
        )

    def split(self, batch: Batch) -> list[Batch]:
        """The micro-batches of one process and optimizer step."""
        if self.budget is not None:
            return [batch.select(rows) for rows in by_tokens(batch, self.budget, whole=self.objective.needs_groups)]
        if self.online and not self.objective.needs_groups:
            return batch.split(self.sizes.micro_batch_rows, keep_groups=False)
        return batch.split_groups(self.sizes.micro_batch_groups)

    def without_gradient(self, batch: Batch, *, alone: bool = False) -> list[Tensor]:
        """Row numbers of passes without gradient: each no larger than a micro-batch, by tokens where the run counts those.

        Args:
            batch: any batch.
            alone: other processes may have another number of batches. Sharded passes wait for each other, and lengths
                differ between processes, so there rows are counted.
        """
        if self.budget is not None and not (alone and self.processes.sharded):
            return by_tokens(batch, self.budget, whole=False)
        return by_rows(batch, max(self.sizes.micro_batch_rows, 1))

    def for_training(self, micro_batches: list[Batch]) -> list[Batch]:
        """Idle rows left out, on the device, and as many on every process: sharded passes wait for each other. Collective."""
        batches = [b.to(self.processes.device) for b in self._without_idle_rows(micro_batches)]
        if self.processes.world_size == 1:
            return batches
        count = self.processes.most(len(batches))
        if not batches:
            raise TrainingError(
                f"step {self.processes.progress.step + 1}: process {self.processes.rank} has no examples; use a larger dataset "
                f"or fewer processes"
            )
        return batches + [blank(batches[0])] * (count - len(batches))

    def one_by_one(self, micro_batches: list[Batch]) -> Iterator[Batch]:
        """Each micro-batch of a step; gradients are exchanged in the last one's backward pass. Looks for signals between."""
        last = len(micro_batches) - 1
        for index, batch in enumerate(micro_batches):
            if index:
                self.processes.poll(boundary=on_cpu())
            with contextlib.nullcontext() if index == last else self.processes.accelerator.no_sync(self.model):
                yield batch
            self._note_layout(batch)

    # -- rows that teach nothing ------------------------------------------------------------------------------------------
    def unread(self, batch: Batch) -> Tensor:
        """``[B]``: rows whose old and reference log-probs, values and states nothing reads.

        Without a token that counts; and, once advantages are known, those that the update will leave out.
        """
        blank_rows = ~batch.mask.any(-1)
        if batch.advantages is None or not self.drops_zero_advantages:
            return blank_rows
        return blank_rows | _weightless(batch)

    def _without_idle_rows(self, micro_batches: list[Batch]) -> list[Batch]:
        """Leave out rows with neither loss nor gradient.

        That is: without a token that counts, and, where the objective is the advantage times something, with advantage 0.
        Where a row's place in its group matters, as in pairs, a group goes only as a whole.

        The step's denominators are counted before, over all rows, so loss and gradient stay what they are. Metrics of the
        forward pass (entropy, clip ratios) are then over the rows that went through it.

        Args:
            micro_batches: of one process and step.

        Returns:
            Micro-batches of the rows that are left; one row (or group, where the objective compares rows) where none is,
            since sharded processes pass through the model together.
        """
        if not micro_batches or self.objective.couples_rows:
            return micro_batches
        # without advantages the loss says that it lacks them
        weighted = self.drops_zero_advantages and all(b.advantages is not None for b in micro_batches)
        idle = [_weightless(batch) if weighted else self._blank_rows(batch) for batch in micro_batches]
        everything = torch.cat(idle)
        if weighted:
            self.journal.metrics.add("frac_rows_dropped", everything.double(), torch.ones_like(everything))
        if not bool(everything.any()):
            return micro_batches
        kept = [
            b.select((~rows).nonzero()[:, 0]) for b, rows in zip(micro_batches, idle, strict=True) if not rows.all()
        ]
        return self.split(Batch.concat(kept)) if kept else [self._least(micro_batches[0])]

    def _blank_rows(self, batch: Batch) -> Tensor:
        """``[B]``: rows without a token that counts; where groups stay whole, only if no row of the group has one."""
        blank_rows = ~batch.mask.any(-1)
        if not any(_keeps_groups(term, batch) for term in self.objective.terms):
            return blank_rows
        alive = torch.zeros(batch.num_groups, dtype=torch.bool, device=batch.device)
        alive[batch.group_ids[~blank_rows].long()] = True
        return ~alive[batch.group_ids.long()]

    def _least(self, batch: Batch) -> Batch:
        """The least that can pass through the model where no row counts."""
        if self.objective.needs_groups:
            return blank(batch)
        row = batch.select(batch.completion_mask.sum(-1).argmin()[None])
        # its old log-probs were not computed (see unread), and zeros would be measured as if they were
        unknown = row.old_logps is not None and not bool(row.old_logps.where(row.mask, 0.0).any())
        return row.replace(old_logps=None) if unknown else row

    # -- what passes cost -------------------------------------------------------------------------------------------------
    def _note_layout(self, batch: Batch) -> None:
        """Metrics of the forward pass that just ran: how much of it was padding, and what shared prompts saved."""
        used, needs = self.policy.layout_used, self.objective.needs
        inside = self.objective.needs_reference and batch.ref_states is None
        inside = inside and (batch.ref_logps is None or bool(needs & {"token_kl", *MOMENTS}))
        behaviour = bool(needs & BEHAVIOUR) and batch.behaviour_states is None and self.sizes.updates_per_generation > 1
        self.journal.meter.passed(used, backward=True, passes=1 + inside + behaviour)
        if used.computed:
            self.journal.metrics.add("padding_efficiency", used.tokens / used.computed, weight=float(used.computed))
            self.journal.metrics.add("prompt_sharing", used.repeated / max(1, used.tokens), weight=float(used.tokens))


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


def _weightless(batch: Batch) -> Tensor:
    """``[B]``: every advantage 0 or masked."""
    advantages = batch.advantages
    assert advantages is not None
    wide = advantages[:, None] if advantages.ndim == 1 else advantages
    return ((wide == 0) | ~batch.mask).all(-1)


def _keeps_groups(term: Term, batch: Batch) -> bool:
    """Whether a loss reads rows by their place in the group, or may: what is not ours is not known to leave blank rows out."""
    if term.per_pair or (term.rows == "chosen" and batch.labels is None):
        return True
    ours = getattr(term.function, "__module__", "").startswith("rlft.")
    return "group_ids" in term.sources and (term.prefers or not ours)


def blank(batch: Batch) -> Batch:
    """A batch of one group that counts nowhere, for a process that has fewer micro-batches than another."""
    small = batch.select((batch.group_ids == batch.group_ids[0]).nonzero()[:, 0])
    return small.replace(mask=torch.zeros_like(small.mask))
