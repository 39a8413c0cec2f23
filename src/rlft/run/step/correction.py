"""Corrects for a sampler that is not exactly the policy: every loss is weighed by pi_trainer / pi_sampler."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft import reduce
from rlft._terms import BEHAVIOUR
from rlft.config import Config
from rlft.losses.importance import importance_weights
from rlft.objective import Objective
from rlft.rules.correction import corrected, correction_settings
from rlft.run.measure.journal import Journal
from rlft.run.step.watchers import Watcher
from rlft.types import Batch, LossOutput

__all__ = ["SamplerCorrection", "corrected_for"]

logger = logging.getLogger("rlft")

#: Settings that make the sampler draw from another distribution than the policy at this temperature.
_FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def corrected_for(sampler: Any, config: Config, objective: Objective, *, warns: bool) -> Objective:
    """The objective of an online run, corrected where the settings say so. Logs what no weight can repair.

    Args:
        sampler: of the run.
        config: settings, checked.
        objective: of the run.
        warns: whether this process is the one that says it.
    """
    own, kind = bool(getattr(sampler, "reads_live_weights", False)), type(sampler).__name__
    filters = [name for name, off in _FILTERS.items() if getattr(config, name) != off]
    options = correction_settings(config)
    if options is None:
        biased = objective.on_policy_only or bool(BEHAVIOUR & objective.needs)
        if biased and not own and warns:
            logger.warning(
                f"objective {objective.name!r} takes the policy's own distribution for the sampler's, and "
                f"{kind} may differ from it; use agro_off_policy, which does not mind"
                + ("" if BEHAVIOUR & objective.needs else ", or sampler_correction: {level: sequence}")
            )
        return objective
    if warns and filters:
        logger.warning(
            f"sampler_correction cannot bring back tokens that {filters[0]}={getattr(config, filters[0])!r} never draws: what it "
            f"corrects is within the tokens that are left; drop {filters[0]} for an unbiased gradient"
        )
    elif warns and own and not config.replay_probability:
        logger.warning(
            f"sampler_correction has next to nothing to do: {kind} samples from the policy itself, so "
            f"weights are 1 up to rounding; it is meant for another engine (sampler: vllm)"
        )
    return corrected(objective, options)


class SamplerCorrection(Watcher):
    """Measures how far the sampler is from the trainer, and what the weights did.

    Args:
        options: of the correction, with defaults.
        journal: takes the metrics.
    """

    def __init__(self, options: Mapping[str, Any], journal: Journal) -> None:
        self.options, self.journal = options, journal

    @torch.no_grad()
    def saw(self, batch: Batch, outputs: Mapping[str, Tensor], results: Sequence[LossOutput]) -> None:
        """Metrics of one micro-batch."""
        options, metrics = self.options, self.journal.metrics
        mask, rows = batch.mask, batch.mask.any(-1)
        old_logps = batch.old_logps if batch.old_logps is not None else outputs["logps"].detach()
        gap = (old_logps - batch.extras["sampler_logps"]).double().where(mask, 0.0)
        weights = importance_weights(old_logps, batch.extras["sampler_logps"], mask, **options).double()
        if options["level"] == "sequence":
            log_weights, shown, where = reduce.sequence_sum(gap, mask), weights.amax(-1), rows
        else:
            log_weights, shown, where = gap, weights, mask
        outside = log_weights > math.log(options["cap"])
        if options["floor"] > 0:
            outside |= log_weights < math.log(options["floor"])
        metrics.add("sampling/importance_sampling_ratio/mean", shown, where)
        metrics.add_max("sampling/importance_sampling_ratio/max", shown, where)
        name = "sampling/truncated_fraction" if options["mode"] == "truncate" else "sampling/masked_fraction"
        metrics.add(name, outside.double(), where)
        metrics.add("sampling/sampling_logp_difference/mean", gap.abs(), mask)
        metrics.add_max("sampling/sampling_logp_difference/max", gap.abs(), mask)
        # k3 on the sampler's tokens estimates KL(sampler || trainer); beyond 50 nats a float64 says no more than that
        bounded = gap.clamp(max=50.0)
        metrics.add("sampling/kl", bounded.expm1() - bounded, mask)
