"""The KL controller of a run: beta of the objective moves between optimizer steps, by the KL that was measured.

Two KLs have a weight that a controller can move. The pull to the *reference* (in the reward, in the loss or inside the
objective) is measured as ``objective/kl``, nats per answer, on the answers that are trained on; beta moves after every step,
or once per generation where the KL is part of the reward. The penalty on the *step*, from the policy that sampled
(PPO-penalty), is measured as ``policy/approxkl``, nats per token; beta moves after the last step of a generation, since the
first one always measures zero.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlft import _check, kl, reduce
from rlft._terms import REFERENCE
from rlft.config import Config, ConfigError
from rlft.objective import Objective, _exact_kl_loss, _sampled_kl_loss
from rlft.run.measure.journal import Journal
from rlft.run.processes.processes import Processes
from rlft.run.step.batch_sizes import BatchSizes, steps_per_generation
from rlft.run.step.source import Source
from rlft.run.step.watchers import Watcher
from rlft.types import Batch, LossOutput

__all__ = ["KLControl", "KLWeight", "check_kl_controller", "kl_weights", "with_beta"]

TYPES = {"fixed": kl.FixedKL, "proportional": kl.ProportionalKL, "halve_double": kl.HalveDoubleKL}
#: Beta stays within this factor of its start: halved for ever it would become zero, which cannot be undone.
RANGE = 2.0**20
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
    _controller(given, found[0].beta)
    if config.replay_probability > 0 and kind != "fixed":
        raise ConfigError(
            f"kl_controller measures the KL on answers that the policy drew, and replay_probability="
            f"{config.replay_probability:g} gives others; drop one of them"
        )
    steps = steps_per_generation(config)
    if found[0].measured == STEP_KL and steps * config.num_iterations == 1 and kind != "fixed":
        raise ConfigError(
            f"kl_controller would measure 0 at every step: beta of objective {objective.name!r} weighs the KL to the policy "
            f"that sampled, and a generation feeds one step only; set num_iterations (or steps_per_generation) higher, or "
            f"drop kl_controller"
        )


def _controller(given: Mapping[str, Any], beta: float) -> kl.KLController:
    """The controller of checked settings, started at the objective's beta."""
    settings = {name: value for name, value in given.items() if name != "type"}
    try:
        return kl.controller_from_state_dict({"kind": given["type"], "beta": beta, **settings})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"kl_controller: {error}") from error


class KLControl(Watcher):
    """Owns the controller of a run: adds up what a step measures, and moves beta.

    Args:
        config: the run's settings, with a ``kl_controller``.
        objective: has one weight of a KL.
        sizes: answers between two moves of beta.
        source: tells when a generation is used up.
        processes: of the run.
        journal: takes the measured KL.

    Attributes:
        controller: the rule, at the beta of now.
        weight: where that beta is.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        sizes: BatchSizes,
        source: Source,
        processes: Processes,
        journal: Journal,
    ) -> None:
        assert config.kl_controller is not None
        (self.weight,) = kl_weights(objective)
        self.controller = rule = _controller(config.kl_controller, self.weight.beta)
        self.start, self.source, self.processes, self.journal = rule.beta, source, processes, journal
        once_per_generation = self.weight.place == "reward" or self.weight.measured == STEP_KL
        groups = sizes.draws if once_per_generation else sizes.groups_per_step
        self.answers = groups * config.num_generations * processes.world_size  # between two moves of beta
        self._forget()
        if isinstance(rule, kl.ProportionalKL) and rule.limit * self.answers >= rule.horizon:
            raise ConfigError(
                f"kl_controller.horizon={rule.horizon:g} is not above limit x answers between two moves of beta ({rule.limit:g} x "
                f"{self.answers}), so one move could turn beta negative; raise horizon (10000 is customary)"
            )

    def _forget(self) -> None:
        self.total, self.count, self.rows = 0.0, 0.0, 0.0

    def _take(self, values: Tensor, mask: Tensor, rows: int) -> None:
        """Take measured KLs in, under the mask of the logged metric; ``rows`` answers were looked at."""
        self.total += float(values.detach().double().where(mask, 0.0).sum())
        self.count += float(mask.sum())
        self.rows += rows

    def saw_reward_kl(self, values: Tensor, rows: Tensor) -> None:
        """Measure the KL that is taken off the rewards, ``[B]`` nats, of the answers in ``rows``."""
        if self.weight.place == "reward":
            self._take(values, rows, int(rows.sum()))

    def saw(self, batch: Batch, outputs: Mapping[str, Tensor], results: Sequence[LossOutput]) -> None:
        """Measure the KL on one micro-batch of a step."""
        if self.weight.place == "reward":
            return
        name, rows = self.weight.measured, batch.mask.any(-1)
        logged = results[self.weight.term].metrics.get(name)
        if logged is not None:
            self._take(logged, rows if logged.ndim == 1 else batch.mask, int(rows.sum()))
            return
        ref_logps = outputs.get("ref_logps", batch.ref_logps)
        # the exact KL of each position on the policy's own prefixes has the KL of the answers as its expectation too
        per_token = outputs["token_kl"] if ref_logps is None else outputs["logps"] - ref_logps
        values = reduce.sequence_sum(per_token.detach().where(batch.mask, 0.0), batch.mask)
        self.journal.add(name, values, rows)
        self._take(values, rows, int(rows.sum()))

    def after_update(self, *, moved: bool) -> dict[str, float]:
        """Move beta by what the step measured on all processes. Collective.

        Returns:
            ``kl/beta``, the weight that the step was taken with.
        """
        used = {"kl/beta": self.controller.beta}
        sums = torch.tensor([self.total, self.count, self.rows], dtype=torch.float64)
        total, count, rows = self.processes.sum(sums).tolist()
        self._forget()
        by_generation = self.weight.measured == STEP_KL
        if count == 0 or not math.isfinite(total) or (by_generation and self.source.waiting):
            return used
        rule = self.controller.update(total / count, samples=self.answers if by_generation else int(rows))
        low, high = self.start / RANGE, self.start * RANGE
        if not low <= rule.beta <= high:
            self.journal.warn_once(
                "beta",
                f"step {self.processes.progress.step + 1}: the KL controller asks for beta={rule.beta:.3g}, a millionfold from "
                f"its start {self.start:g}; it is held there. The target {self.controller.state_dict().get('target')} cannot be "
                f"reached: look at {self.weight.measured} in the log",
            )
            rule = replace(rule, beta=min(max(rule.beta, low), high))
        self.controller = rule
        return used

    def steered(self, objective: Objective) -> Objective:
        """The objective at the controller's beta."""
        (weight,) = kl_weights(objective)
        return objective if weight.beta == self.controller.beta else with_beta(objective, self.controller.beta)

    # -- kept ---------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The controller as plain values."""
        return {"kl_controller": self.controller.state_dict()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back; the trainer's objective follows by :meth:`steered`."""
        if values.get("kl_controller") is not None:
            self._forget()
            self.controller = kl.controller_from_state_dict(values["kl_controller"])

    def describe(self) -> str:
        """A line for the table shown before a run."""
        values = {k: v for k, v in self.controller.state_dict().items() if k not in ("kind", "beta")}
        unit = "nats per token" if self.weight.measured == STEP_KL else "nats per answer"
        settings = "".join(f", {k} {v:g}" + (f" {unit}" if k == "target" else "") for k, v in values.items())
        kind = self.controller.state_dict()["kind"]
        return f"{kind}{settings}; by {self.weight.measured}, beta now {self.controller.beta:g}"
