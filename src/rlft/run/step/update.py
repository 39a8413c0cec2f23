"""The optimizer's step: measured, guarded, clipped and applied, or left out; one that spoils a weight is taken back."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlft._failpoint import instant
from rlft.errors import TrainingError
from rlft.run.processes.processes import Processes
from rlft.run.step.parts import Parts
from rlft.run.step.step_errors import StepErrors
from rlft.run.step.trust_region import TrustRegion
from rlft.schedule import learning_rate
from rlft.types import Batch

__all__ = ["Undo", "Update", "not_finite", "undo_for"]

logger = logging.getLogger("rlft")

#: Updates below this cannot carry a sane float32 weight to infinity.
_REACH = 1e20


class Update:
    """Owns the optimizer, and how many steps were left out because they were not finite.

    Args:
        parts: of the run.
        errors: what goes wrong, in words.
        trust_region: moves the policy in place of the optimizer, or None.

    Attributes:
        nonfinite_steps: steps that were left out, over the whole run.
        taken_back: whether the last step was, because it spoilt a weight.
        tolerated: whether outputs that are not finite go on to the update: steps may be skipped, or other processes wait in
            the backward pass for this one.
    """

    def __init__(self, parts: Parts, errors: StepErrors, trust_region: TrustRegion | None) -> None:
        self.config, self.model, self.optimizer = parts.config, parts.model, parts.optimizer
        self.processes, self.progress, self.journal = parts.processes, parts.processes.progress, parts.journal
        self.errors, self.trust_region, self.own_schedule = errors, trust_region, parts.own_schedule
        self.tolerated = parts.config.max_nonfinite_steps > 0 or parts.processes.world_size > 1
        self.nonfinite_steps = 0
        self.taken_back = False

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def facts(self) -> dict[str, float]:
        """What is logged of every step beside loss and gradient norm."""
        values: dict[str, float] = {}
        if self.trust_region is None or self.trust_region.of_critic:
            values["learning_rate"] = self.rate
        if self.config.max_nonfinite_steps:
            values["nonfinite_steps"] = float(self.nonfinite_steps)
        return values

    # -- the step -----------------------------------------------------------------------------------------------------------
    def apply(self, loss: float, *, update: bool) -> float:
        """See :meth:`rlft.Trainer.optimizer_step`.

        Args:
            loss: the step's loss.
            update: False when nothing was scored.

        Returns:
            The gradient norm before clipping.

        Raises:
            TrainingError: when loss, gradient or an updated weight is not finite.
        """
        self.taken_back = False
        # a trust-region step has the length that its KL allows; it clips the critic's gradient itself
        limit = self.config.max_grad_norm if self.trust_region is None else None
        clip = self.processes.accelerator.clip_grad_norm_
        norm = float(clip(self.model.parameters(), limit if limit is not None else float("inf")))
        step = self.progress.step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            if self._skips(f"loss={loss}, gradient norm={norm}", loss=loss, grad_norm=norm):
                return norm
            raise TrainingError(
                f"step {step + 1}: loss={loss}, gradient norm={norm}; the step was not applied and the weights are "
                f"those of step {step}. {self._smaller_step()}, or look at the batch: "
                f"rewards and log-probs must be finite"
            )
        if update:
            if self.own_schedule:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._scheduled(step)
            self._step(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _scheduled(self, step: int) -> float:
        c = self.config
        return learning_rate(
            step,
            peak=c.learning_rate,
            schedule=c.lr_scheduler_type,
            warmup_steps=c.warmup_steps,
            total_steps=self.progress.max_steps,
        )

    def _step(self, loss: float, norm: float) -> None:
        """Let the optimizer step; a step that leaves a weight that is not finite is taken back."""
        undo = undo_for(self.optimizer, norm) if self.trust_region is None else Undo(self.optimizer)
        try:
            with (
                self.errors.explained("optimizer" if undo is None else "undone"),
                instant("train.optimizer"),
                self.journal.meter.phase("optimizer"),
            ):
                if self.trust_region is not None:
                    self.trust_region.apply()
                self.optimizer.step()
        except BaseException:
            if undo is not None:
                undo.back()
            raise
        bad = not_finite(self.model, self.processes)
        if bad is None:
            return
        if undo is not None:
            undo.back()
        self.taken_back = True
        self.optimizer.zero_grad(set_to_none=True)
        if self._skips(f"the update left {bad} not finite", allowed=undo is not None, loss=loss, grad_norm=norm):
            return
        step = self.progress.step
        state = f"it was taken back, and the weights are those of step {step}" if undo else "they are spoilt in memory"
        raise TrainingError(
            f"step {step + 1}: the update left {bad} not finite; {state}. {self._smaller_step()}; "
            f"the newest checkpoint is intact: the same command resumes from it"
        )

    def _smaller_step(self) -> str:
        """What to change where steps are too large."""
        if self.trust_region is not None and not self.trust_region.of_critic:
            return f"Lower max_kl (now {self.trust_region.region.max_kl:g})"
        return f"Lower learning_rate (now {self.rate:g})"

    # -- steps that are not finite ------------------------------------------------------------------------------------------
    def _skips(self, what: str, *, allowed: bool = True, **raw: float) -> bool:
        """Whether a step that is not finite is left out and the run goes on; counted over the whole run, stops included.

        Args:
            what: was found.
            allowed: False where the weights could not be put back.
            raw: the step's numbers as they are. They are in the log at once, where the step's own row will not have them.
        """
        step = self.progress.step + 1
        if not allowed or self.nonfinite_steps >= self.config.max_nonfinite_steps:
            self.journal.write(raw, ahead=1)
            return False
        if step % self.config.logging_steps and step != self.progress.max_steps:
            self.journal.write({**raw, "nonfinite_steps": self.nonfinite_steps + 1.0}, ahead=1)
        self.nonfinite_steps += 1
        if self.processes.is_main:
            logger.warning(
                f"step {step}: {what}; the step was not applied ({self.nonfinite_steps} of "
                f"max_nonfinite_steps={self.config.max_nonfinite_steps} skipped)"
            )
        return True

    def note_refused(self, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """An objective refused a micro-batch: where outputs are not finite, the log says so before the run stops."""
        if not _all_finite(outputs, batch):
            self.journal.write({"loss": math.nan}, ahead=1)

    def poisoned(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor | None:
        """A loss of NaN where the model's outputs hold NaN or infinity; None where they are finite.

        Objectives refuse such outputs with an error. Where that is ``tolerated``, the step goes through with a loss that
        says what it is, and every process sees the same.
        """
        if _all_finite(outputs, batch):
            return None
        grown = [t for t in outputs.values() if t.requires_grad]
        return torch.stack([t.sum() for t in grown]).sum() * float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Steps that were left out; the optimizer's moments are a part of the checkpoint by themselves."""
        return {"nonfinite_steps": self.nonfinite_steps}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
        self.nonfinite_steps = values.get("nonfinite_steps", self.nonfinite_steps)


def _all_finite(outputs: Mapping[str, Tensor], batch: Batch) -> bool:
    mask = batch.mask
    used = [t[mask] if t.shape == mask.shape else t for t in outputs.values() if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in used)


# -- undoing a step ---------------------------------------------------------------------------------------------------------
class Undo:
    """A copy of what an optimizer step changes.

    Args:
        optimizer: about to take a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self.state = {p: {name: _copied(value) for name, value in s.items()} for p, s in optimizer.state.items()}

    @torch.no_grad()
    def back(self) -> None:
        """Put weights and moments back, bit for bit."""
        for parameter, before in self.weights:
            parameter.copy_(before)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def undo_for(optimizer: torch.optim.Optimizer, norm: float) -> Undo | None:
    """A copy to go back to, where the update might overflow; None where arithmetic says that it cannot.

    Adam moves a weight by a few learning rates at most, and SGD by learning rate times gradient: with finite gradients
    and ordinary settings no copy is spent. An optimizer that is not known is not trusted.

    Args:
        optimizer: about to take a step.
        norm: of the gradient, finite.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        return Undo(optimizer)
    for group in optimizer.param_groups:
        reach = float(group["lr"]) * (1.0 + float(group["weight_decay"])) * max(1.0, norm)
        if not reach / max(1e-6, 1.0 - float(group.get("momentum", 0.0))) < _REACH or group.get("eps", 1.0) <= 0:
            return Undo(optimizer)
    return None


def not_finite(module: nn.Module, processes: Processes) -> str | None:
    """The name of a trained tensor that holds NaN or infinity, on any process; None when all are finite."""
    trained: list[tuple[str, Any]] = [(name, p.detach()) for name, p in module.named_parameters() if p.requires_grad]
    # of sharded ones each process looks at its own part, which may be empty: that has no largest entry
    trained = [(name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained]
    parts = [p for _, p in trained if p.numel()]
    largest = nn.utils.get_total_norm(parts, float("inf")) if parts else torch.zeros((), device=processes.device)
    bad = (~torch.isfinite(largest)).float().reshape(1)
    if float(processes.sum(bad)) == 0:  # one process must not stop alone
        return None
    return next((name for name, p in trained if not bool(torch.isfinite(p).all())), "a weight of another process")
