"""Old log-probs without a pass: where the sampler runs the policy itself, what it noted while sampling is what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlft.run.checks import before as selfcheck
from rlft.run.step import update as guard
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["agree", "of_sampler", "trusted"]


def of_sampler(trainer: Trainer) -> bool:
    """Whether the sampler's log-probs are those of the policy that trains, so that no pass has to make old ones.

    They are for samplers that read the live weights, in float32, without a filter after the temperature; not for replayed
    answers, nor where the two are to be told apart (``sampler_correction``).
    """
    c = trainer.config
    unfiltered = c.top_p == 1.0 and not c.top_k and not c.min_p and c.repetition_penalty == 1.0
    return (
        trainer.sampler_agrees is not False
        and bool(getattr(trainer.sampler, "reads_live_weights", False))
        and unfiltered
        and trainer.replay is None
        and trainer.opponent is None  # whose answers may come from a mixture
        and c.sampler_correction is None
        and c.mixed_precision == "no"
        # the sampler notes float32: enough for float32 policies alone
        and {p.dtype for p in trainer.policy.hf_model.parameters()} == {torch.float32}
    )


def trusted(trainer: Trainer) -> bool:
    """Whether they are taken without another look: once :func:`agree` has found them equal, or where it is switched off."""
    checked = trainer.sampler_agrees or not trainer.config.checks_itself("on_policy")
    return bool(checked) and of_sampler(trainer)


def agree(trainer: Trainer, batch: Batch, scored: Tensor, noted: Tensor) -> bool:
    """Compare the sampler's log-probs of a generation with the policy's own, once in a run. Collective.

    Args:
        trainer: keeps the answer, which is part of its state.
        batch: the generation.
        scored: ``[B, T]`` by the forward pass that trains.
        noted: ``[B, T]`` by the sampler.

    Returns:
        Whether they agree on every process.
    """
    gap = (scored - noted).abs()[batch.completion_mask]
    worst = gap.max().double() if gap.numel() else torch.zeros((), dtype=torch.float64)
    apart = (~(worst <= selfcheck.EXACT)).double().reshape(1).to(trainer.device)  # NaN does not agree either
    trainer.sampler_agrees = float(trainer.accelerator.reduce(apart, reduction="sum")) == 0
    if not trainer.sampler_agrees:
        guard.told(
            trainer,
            "sampler logps",
            f"step {trainer.step + 1}: log-probs noted while sampling and those of the policy differ by up to "
            f"{float(worst):.2g} nats (bound {selfcheck.EXACT:g}), so old log-probs are scored again for every generation "
            f"(slower)",
        )
    return trainer.sampler_agrees
