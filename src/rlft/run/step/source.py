"""Where a step's micro-batches come from: a dataset, or answers sampled from the policy. Exact state for resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlft.run.step.parts import Stages
from rlft.types import Batch

__all__ = ["OfflineSource", "OnlineSource", "Refill", "Source"]

Together = Callable[[], contextlib.AbstractContextManager[Any]]


class Source(Protocol):
    """Gives this process the micro-batches of one optimizer step, in order, and says where it stands.

    Attributes:
        waiting: whether a generation is not used up yet.
    """

    @property
    def waiting(self) -> bool: ...

    def next(self, step: int) -> list[Batch]: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load(self, tensors: dict[str, Tensor], record: dict[str, Any], *, anew: bool = False) -> None: ...

    def start(self) -> None: ...

    def close(self) -> None: ...


class _Ordered:
    """What the sources share: processes may read ahead for an order, and end when the run does."""

    order: Any
    waiting = False

    def start(self) -> None:
        """Let the order begin to read ahead, where it does."""
        if hasattr(self.order, "start"):
            self.order.start()

    def close(self) -> None:
        """End what it started; asked again, it would start anew where the run is."""
        if hasattr(self.order, "close"):
            self.order.close()


class OfflineSource(_Ordered):
    """Examples from a dataset, collated; one draw per optimizer step.

    Args:
        order: yields this process's example indices for one step; has ``state_dict`` and ``load_state_dict``.
        make_batch: what was drawn -> Batch.
        stages: ``prepare`` fills in what the objective needs before the forward pass.
        split: Batch -> micro-batches.
        together: what surrounds the work that this process does for itself, see :meth:`rlft.run.processes.processes.Processes.together`.
    """

    def __init__(
        self,
        order: Any,
        make_batch: Callable[[Any], Batch],
        stages: Stages,
        split: Callable[[Batch], list[Batch]],
        together: Together = contextlib.nullcontext,
    ) -> None:
        self.order, self.make_batch, self.stages, self.split = order, make_batch, stages, split
        self.together = together

    def next(self, step: int) -> list[Batch]:
        with self.together():
            indices = next(self.order)
            batch = self.make_batch(indices) if indices else None
        return self.split(self.stages.prepare(batch)) if batch is not None else []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"order": self.order.state_dict()}

    def load(self, tensors: dict[str, Tensor], record: dict[str, Any], *, anew: bool = False) -> None:
        self.order.load_state_dict(record["order"])


@dataclass(frozen=True, slots=True)
class Refill:
    """Dynamic sampling: keep drawing until enough prompts have answers that earn differently.

    Attributes:
        prompts: how many such prompts a generation must hold.
        tries: generations that may be added; what is missing then is filled with the prompts that were dropped.

    References:
        Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2.
    """

    prompts: int
    tries: int


class OnlineSource(_Ordered):
    """Answers sampled from the policy: one generation feeds ``updates`` optimizer steps, ``iterations`` times.

    The steps that are still to be fed wait in a queue, which is part of the state: a run that stops in the middle of a
    generation resumes in the middle of it (TRL 1.16 regenerates instead).

    Args:
        order: yields this process's prompt indices for one generation.
        stages: ``rollout`` gives a Batch with rewards; ``prepare`` fills in what the objective needs, once per generation,
            under the weights that sampled it.
        cut: Batch -> one Batch per optimizer step.
        split: Batch -> micro-batches.
        iterations: passes over one generation.
        refill: dynamic sampling, or None.
        together: what surrounds the work that this process does for itself, see :meth:`rlft.run.processes.processes.Processes.together`.
    """

    def __init__(
        self,
        order: Any,
        stages: Stages,
        cut: Callable[[Batch], list[Batch]],
        split: Callable[[Batch], list[Batch]],
        iterations: int,
        refill: Refill | None = None,
        together: Together = contextlib.nullcontext,
    ) -> None:
        self.order, self.stages, self.cut, self.split = order, stages, cut, split
        self.iterations, self.refill, self.together = iterations, refill, together
        self.queue: list[Batch] = []

    @property
    def waiting(self) -> bool:
        return bool(self.queue)

    def without_reference(self) -> None:
        """The reference has moved: what is left of a generation is compared with it as it is now."""
        self.queue = [batch.replace(ref_logps=None, ref_states=None) for batch in self.queue]

    def next(self, step: int) -> list[Batch]:
        if not self.queue:
            with self.together():
                batch = self._generate(step)
            self.queue = self.cut(self.stages.prepare(batch)) * self.iterations
        return self.split(self.queue.pop(0))

    def _generate(self, step: int) -> Batch:
        batch = self.stages.rollout(next(self.order), step)
        if self.refill is None:
            return batch
        useful, flat = _by_spread(batch)
        for _ in range(self.refill.tries):
            if sum(b.num_groups for b in useful) >= self.refill.prompts:
                break
            more, less = _by_spread(self.stages.rollout(next(self.order), step))
            useful, flat = useful + more, flat + less
        kept = Batch.concat([*useful, *flat])
        return kept.split_groups(self.refill.prompts)[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{i}/{name}": t for i, batch in enumerate(self.queue) for name, t in batch.tensors().items()}
        return tensors, {"order": self.order.state_dict(), "queued": len(self.queue)}

    def load(self, tensors: dict[str, Tensor], record: dict[str, Any], *, anew: bool = False) -> None:
        """Go on where :meth:`state` was taken.

        Args:
            tensors: of this process.
            record: of this process; with ``anew`` of any one, the same for all.
            anew: begin with a new generation. Another number of processes cannot share out what waited in the queues.
        """
        self.order.load_state_dict(record["order"])
        self.queue = []
        for i in range(0 if anew else record["queued"]):
            prefix = f"{i}/"
            self.queue.append(
                Batch.from_tensors({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            )


def _by_spread(batch: Batch) -> tuple[list[Batch], list[Batch]]:
    """Groups whose scored rewards differ, and the others; one batch each (an empty list where there is none)."""
    assert batch.rewards is not None
    useful, flat = [], []
    for group in range(batch.num_groups):
        rows = (batch.group_ids == group).nonzero()[:, 0]
        scored = batch.rewards[rows]
        scored = scored[~torch.isnan(scored)]
        (useful if scored.numel() > 1 and bool((scored != scored[0]).any()) else flat).append(rows)
    return ([batch.select(torch.cat(useful))] if useful else []), ([batch.select(torch.cat(flat))] if flat else [])
