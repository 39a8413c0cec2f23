"""Sampler correction: every loss is weighed by pi_trainer / pi_sampler, and which objectives that is right for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import _check
from rlft._terms import BEHAVIOUR, Term
from rlft.config import Config, ConfigError
from rlft.losses.importance import importance_weights
from rlft.objective import Objective
from rlft.types import LossOutput

__all__ = ["DEFAULTS", "check_correction", "corrected", "correction_settings"]

DEFAULTS: dict[str, Any] = {"level": "token", "mode": "truncate", "cap": 2.0, "floor": 0.0}


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
