"""The optimizer's step: measured, guarded, clipped and applied, or left out; one that spoils a weight is taken back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlft._failpoint import instant
from rlft.errors import TrainingError
from rlft.run.step import update as guard

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["step"]


def step(trainer: Trainer, loss: float, *, update: bool) -> float:
    """See :meth:`rlft.Trainer.optimizer_step`.

    Args:
        trainer: the run, with the step's gradient.
        loss: the step's loss.
        update: False when nothing was scored.

    Returns:
        The gradient norm before clipping.

    Raises:
        TrainingError: when loss, gradient or an updated weight is not finite.
    """
    # a trust-region step has the length that its KL allows; it clips the critic's gradient itself
    limit = trainer.config.max_grad_norm if trainer.trust_step is None else None
    norm = float(
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), limit if limit is not None else float("inf"))
    )
    if not (math.isfinite(loss) and math.isfinite(norm)):
        trainer.optimizer.zero_grad(set_to_none=True)
        if guard.skips(trainer, f"loss={loss}, gradient norm={norm}", loss=loss, grad_norm=norm):
            return norm
        raise TrainingError(
            f"step {trainer.step + 1}: loss={loss}, gradient norm={norm}; the step was not applied and the weights are "
            f"those of step {trainer.step}. {_smaller_step(trainer)}, or look at the batch: "
            f"rewards and log-probs must be finite"
        )
    if update:
        if trainer.own_schedule:
            rate = trainer._rate(trainer.step)
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate
        _apply(trainer, loss, norm)
    trainer.optimizer.zero_grad(set_to_none=True)
    return norm


def _apply(trainer: Trainer, loss: float, norm: float) -> None:
    """The optimizer's step; one that leaves a weight that is not finite is taken back."""
    undo = guard.undo_for(trainer.optimizer, norm) if trainer.trust_step is None else guard.Undo(trainer.optimizer)
    try:
        with (
            guard.explained(trainer, "optimizer" if undo is None else "undone"),
            instant("train.optimizer"),
            trainer.meter.phase("optimizer"),
        ):
            if trainer.trust_step is not None:
                trainer.trust_step.apply()
            trainer.optimizer.step()
    except BaseException:
        if undo is not None:
            undo.back()
        raise
    bad = guard.not_finite(trainer.model, trainer.accelerator)
    if bad is None:
        return
    if undo is not None:
        undo.back()
    trainer.optimizer.zero_grad(set_to_none=True)
    if guard.skips(trainer, f"the update left {bad} not finite", allowed=undo is not None, loss=loss, grad_norm=norm):
        return
    state = (
        f"it was taken back, and the weights are those of step {trainer.step}" if undo else "they are spoilt in memory"
    )
    raise TrainingError(
        f"step {trainer.step + 1}: the update left {bad} not finite; {state}. {_smaller_step(trainer)}; "
        f"the newest checkpoint is intact: the same command resumes from it"
    )


def _smaller_step(trainer: Trainer) -> str:
    """What to change where steps are too large."""
    if trainer.trust_step is not None and not trainer.trust_step.of_critic:
        return f"Lower max_kl (now {trainer.trust_step.region.max_kl:g})"
    return f"Lower learning_rate (now {trainer.optimizer.param_groups[0]['lr']:g})"
