"""Corrects for a sampler that is not exactly the policy: every loss is weighed by pi_trainer / pi_sampler."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import _check, reduce
from rlft._terms import BEHAVIOUR, Term
from rlft.config import Config, ConfigError
from rlft.losses.importance import importance_weights
from rlft.objective import Objective
from rlft.run.measure.journal import Journal
from rlft.run.step.watchers import Watcher
from rlft.types import Batch, LossOutput

__all__ = ["DEFAULTS", "SamplerCorrection", "check_correction", "corrected", "corrected_for", "correction_settings"]

logger = logging.getLogger("rlft")

DEFAULTS: dict[str, Any] = {"level": "token", "mode": "truncate", "cap": 2.0, "floor": 0.0}
#: Settings that make the sampler draw from another distribution than the policy at this temperature.
_FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def correction_settings(config: Config) -> dict[str, Any] | None:
    """The options of the correction, with defaults; None where there is none."""
    return None if config.sampler_correction is None else {**DEFAULTS, **config.sampler_correction}


def check_correction(config: Config, objective: Objective) -> None:
    """Refuse a correction that cannot work, for an online run.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    options = correction_settings(config)
    if options is None:
        return
    for name in options:
        if name not in DEFAULTS:
            raise ConfigError(f"sampler_correction has no {name!r}{_check.suggestion(name, list(DEFAULTS))}")
    try:
        zeros = torch.zeros(1, 1)
        importance_weights(zeros, zeros, zeros == 0, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"sampler_correction: {error}") from error
    if not {"rewards", "advantages", "win_rates"} & objective.needs:
        raise ConfigError(
            f"sampler_correction makes samples count as the policy's own, and objective {objective.name!r} imitates answers "
            f"whoever drew them; drop sampler_correction"
        )
    whole = [term.name for term in objective.terms if term.reduction == "mean"]
    if whole:
        raise ConfigError(
            f"sampler_correction weighs losses per token, and {whole[0]} is per answer or pair; drop sampler_correction"
        )
    if any(term.lr_coef for term in objective.terms):
        raise ConfigError(
            f"sampler_correction leaves the likelihood-ratio term of objective {objective.name!r} biased: its baselines come "
            f"from answers of the sampler; set lr_coef: 0, use agro_off_policy, or drop sampler_correction"
        )
    if objective.on_policy_only and options["level"] == "token":
        raise ConfigError(
            f"objective {objective.name!r} weighs tokens by what comes after them, so weights per token leave it biased; set "
            f"sampler_correction.level: sequence, or use agro_off_policy"
        )
    if BEHAVIOUR & objective.needs:
        raise ConfigError(
            f"objective {objective.name!r} is right for any policy that sampled, if its distribution is known; sampler_correction "
            f"would turn it into another loss: drop it"
        )


def corrected(objective: Objective, options: Mapping[str, Any]) -> Objective:
    """The objective with every term weighed by :func:`rlft.losses.importance.importance_weights`; the counts stay."""
    changed = copy.copy(objective)
    changed.terms = tuple(_weighed(term, options) for term in objective.terms)
    return changed


def _weighed(term: Term, options: Mapping[str, Any]) -> Term:
    @functools.wraps(term.function)
    def weighed(*tensors: Tensor, **hyper: Any) -> LossOutput:
        *own, old_logps, sampler_logps, mask = tensors
        output = term.function(*own, **hyper)
        if isinstance(output, Tensor):
            output = LossOutput(output, {}, term.reduction, mask)  # type: ignore[arg-type]
        return replace(output, loss=output.loss * importance_weights(old_logps, sampler_logps, mask, **options))

    return replace(term, function=weighed, tensors=(*term.tensors, "old_logps", "sampler_logps", "mask"))


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
