"""Where an objective keeps the weight of its KL, and which KL controllers can move it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlft import _check, kl
from rlft._terms import REFERENCE
from rlft.config import Config, ConfigError
from rlft.objective import Objective, _exact_kl_loss, _sampled_kl_loss

__all__ = ["REFERENCE_KL", "STEP_KL", "KLWeight", "check_kl_controller", "controller_for", "kl_weights", "with_beta"]

TYPES = {"fixed": kl.FixedKL, "proportional": kl.ProportionalKL, "halve_double": kl.HalveDoubleKL}
#: Metrics that say how large a KL is: to the reference, nats per answer; of the step, nats per token.
REFERENCE_KL, STEP_KL = "objective/kl", "policy/approxkl"


@dataclass(frozen=True)
class KLWeight:
    """Where an objective keeps its beta.

    Attributes:
        place: ``reward``, ``loss`` (a KL term of its own) or ``inside`` (a hyper-parameter of the loss).
        measured: the metric that says how large the KL is.
        term: index among the objective's terms; -1 for ``reward``.
        beta: the weight now.
    """

    place: str
    measured: str
    term: int
    beta: float


def kl_weights(objective: Objective) -> list[KLWeight]:
    """Every weight of a KL in an objective."""
    found = []
    if objective.kl == "reward" and objective.beta > 0:
        found.append(KLWeight("reward", REFERENCE_KL, -1, objective.beta))
    for index, term in enumerate(objective.terms):
        beta = float(term.hyper.get("beta") or 0.0)
        if inspect.unwrap(term.function) in (_sampled_kl_loss, _exact_kl_loss):
            found.append(KLWeight("loss", REFERENCE_KL, index, objective.beta or term.weight))
        elif beta > 0 and not term.per_pair:
            if REFERENCE & set(term.sources):
                found.append(KLWeight("inside", REFERENCE_KL, index, beta))
            elif "old_logps" in term.sources:
                found.append(KLWeight("inside", STEP_KL, index, beta))
    return found


def with_beta(objective: Objective, beta: float) -> Objective:
    """The same objective with another weight of its KL."""
    (weight,) = kl_weights(objective)
    changed = copy.copy(objective)
    if weight.term >= 0:
        old = objective.terms[weight.term]
        new = replace(old, weight=old.weight * beta / weight.beta)
        if weight.place == "inside":
            new = replace(old, hyper={**old.hyper, "beta": beta})
        terms = list(objective.terms)
        terms[weight.term] = new
        changed.terms = tuple(terms)
    changed.beta = beta
    return changed


def check_kl_controller(config: Config, objective: Objective) -> None:
    """Refuse a controller that cannot work, or would do nothing, for an online run.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    given = config.kl_controller
    if given is None:
        return
    kind = given.get("type")
    if kind not in TYPES:
        hint = _check.suggestion(str(kind), list(TYPES))
        raise ConfigError(f"kl_controller.type must be one of {', '.join(TYPES)}, got {kind!r}{hint}")
    known = [name for name in TYPES[kind].__dataclass_fields__ if name != "beta"]
    for name in given:
        if name == "beta":
            raise ConfigError("kl_controller.beta does nothing: the objective's beta is where it starts; set beta")
        if name not in (*known, "type"):
            raise ConfigError(
                f"kl_controller of type {kind} has no {name!r}{_check.suggestion(name, known or ['type'])}"
            )
    found = kl_weights(objective)
    if not found:
        raise ConfigError(
            f"kl_controller does nothing: objective {objective.name!r} has no KL whose weight beta could move (or beta is 0); "
            f"drop kl_controller, or set beta"
        )
    if len(found) > 1:
        raise ConfigError(
            f"kl_controller moves one beta, and objective {objective.name!r} has {len(found)}; drop kl_controller or a term"
        )
    controller_for(given, found[0].beta)
    if config.replay_probability > 0 and kind != "fixed":
        raise ConfigError(
            f"kl_controller measures the KL on answers that the policy drew, and replay_probability="
            f"{config.replay_probability:g} gives others; drop one of them"
        )
    if found[0].measured == STEP_KL and config.updates_per_pass * config.num_iterations == 1 and kind != "fixed":
        raise ConfigError(
            f"kl_controller would measure 0 at every step: beta of objective {objective.name!r} weighs the KL to the policy "
            f"that sampled, and a generation feeds one step only; set num_iterations (or steps_per_generation) higher, or "
            f"drop kl_controller"
        )


def controller_for(given: Mapping[str, Any], beta: float) -> kl.KLController:
    """The controller of checked settings, started at the objective's beta."""
    settings = {name: value for name, value in given.items() if name != "type"}
    try:
        return kl.controller_from_state_dict({"kind": given["type"], "beta": beta, **settings})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"kl_controller: {error}") from error
