"""KL controllers of a run: beta of the objective moves between optimizer steps, by the KL that was measured.

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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft import _check, kl, reduce
from rlft._terms import REFERENCE
from rlft.config import Config, ConfigError
from rlft.objective import Objective, _exact_kl_loss, _sampled_kl_loss
from rlft.run.step import update as guard
from rlft.run.step.batch_sizes import steps_per_generation
from rlft.run.step.source import OnlineSource
from rlft.types import Batch, LossOutput

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = [
    "Control",
    "after_step",
    "before_step",
    "check",
    "describe",
    "load",
    "make",
    "observe",
    "observe_reward",
    "state",
    "with_beta",
]

TYPES = {"fixed": kl.FixedKL, "proportional": kl.ProportionalKL, "halve_double": kl.HalveDoubleKL}
#: Beta stays within this factor of its start: halved for ever it would become zero, which cannot be undone.
RANGE = 2.0**20
REFERENCE_KL, STEP_KL = "objective/kl", "policy/approxkl"


@dataclass(frozen=True)
class Weight:
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


def weights(objective: Objective) -> list[Weight]:
    """Every weight of a KL in an objective."""
    found = []
    if objective.kl == "reward" and objective.beta > 0:
        found.append(Weight("reward", REFERENCE_KL, -1, objective.beta))
    for index, term in enumerate(objective.terms):
        beta = float(term.hyper.get("beta") or 0.0)
        if inspect.unwrap(term.function) in (_sampled_kl_loss, _exact_kl_loss):
            found.append(Weight("loss", REFERENCE_KL, index, objective.beta or term.weight))
        elif beta > 0 and not term.per_pair:
            if REFERENCE & set(term.sources):
                found.append(Weight("inside", REFERENCE_KL, index, beta))
            elif "old_logps" in term.sources:
                found.append(Weight("inside", STEP_KL, index, beta))
    return found


def with_beta(objective: Objective, beta: float) -> Objective:
    """The same objective with another weight of its KL."""
    (weight,) = weights(objective)
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


def check(config: Config, objective: Objective) -> None:
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
    found = weights(objective)
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


class Control:
    """A controller bound to a run: adds up what a step measures, and moves beta.

    Args:
        controller: the rule, at the objective's beta.
        weight: where that beta is.
    """

    def __init__(self, controller: kl.KLController, weight: Weight) -> None:
        self.controller, self.weight, self.start = controller, weight, controller.beta
        self.reset()

    def reset(self) -> None:
        """Forget what the step measured."""
        self.total, self.count, self.rows = 0.0, 0.0, 0.0

    def add(self, values: Tensor, mask: Tensor, rows: int) -> None:
        """Take measured KLs in, under the mask of the logged metric; ``rows`` answers were looked at."""
        self.total += float(values.detach().double().where(mask, 0.0).sum())
        self.count += float(mask.sum())
        self.rows += rows


def make(trainer: Trainer) -> Control | None:
    """The run's controller, or None."""
    given = trainer.config.kl_controller
    if given is None:
        return None
    (weight,) = weights(trainer.objective)
    control = Control(_controller(given, weight.beta), weight)
    rule, answers = control.controller, _answers(trainer, weight)
    if isinstance(rule, kl.ProportionalKL) and rule.limit * answers >= rule.horizon:
        raise ConfigError(
            f"kl_controller.horizon={rule.horizon:g} is not above limit x answers between two moves of beta ({rule.limit:g} x "
            f"{answers}), so one move could turn beta negative; raise horizon (10000 is customary)"
        )
    return control


def _answers(trainer: Trainer, weight: Weight) -> int:
    """Answers between two moves of beta, over all processes."""
    p, n = trainer.plan, trainer.config.num_generations * trainer.world_size
    once_per_generation = weight.place == "reward" or weight.measured == STEP_KL
    return (p.draws if once_per_generation else p.groups_per_step) * n


def before_step(trainer: Trainer) -> None:
    """Forget what was measured outside a step, by a callback that prepared a batch, say."""
    if trainer.kl_control is not None:
        trainer.kl_control.reset()


def _measuring(trainer: Trainer) -> Control | None:
    """The controller, where what is computed now belongs to a training step."""
    return None if trainer.evaluating else trainer.kl_control


def observe(trainer: Trainer, batch: Batch, outputs: Mapping[str, Tensor], results: Sequence[LossOutput]) -> None:
    """Measure the KL on one micro-batch of a step."""
    control = _measuring(trainer)
    if control is None or control.weight.place == "reward":
        return
    name, rows = control.weight.measured, batch.mask.any(-1)
    logged = results[control.weight.term].metrics.get(name)
    if logged is not None:
        control.add(logged, rows if logged.ndim == 1 else batch.mask, int(rows.sum()))
        return
    ref_logps = outputs.get("ref_logps", batch.ref_logps)
    # the exact KL of each position on the policy's own prefixes has the KL of the answers as its expectation too
    per_token = outputs["token_kl"] if ref_logps is None else outputs["logps"] - ref_logps
    values = reduce.sequence_sum(per_token.detach().where(batch.mask, 0.0), batch.mask)
    trainer.metrics.add(name, values, rows)
    control.add(values, rows, int(rows.sum()))


def observe_reward(trainer: Trainer, batch: Batch) -> None:
    """Log the KL that is about to be taken off the rewards, and in a training step measure it."""
    assert batch.old_logps is not None
    assert batch.ref_logps is not None
    rows = batch.mask.any(-1)
    values = reduce.sequence_sum((batch.old_logps - batch.ref_logps).where(batch.mask, 0.0), batch.mask)
    trainer.metrics.add(REFERENCE_KL, values, rows)
    control = _measuring(trainer)
    if control is not None and control.weight.place == "reward":
        control.add(values, rows, int(rows.sum()))


def after_step(trainer: Trainer) -> dict[str, float]:
    """Move beta by what the step measured on all processes.

    Returns:
        ``kl/beta``, the weight that the step was taken with; empty without a controller.
    """
    control = trainer.kl_control
    if control is None:
        return {}
    used = {"kl/beta": control.controller.beta}
    sums = torch.tensor([control.total, control.count, control.rows], dtype=torch.float64, device=trainer.device)
    total, count, rows = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    control.reset()
    by_generation = control.weight.measured == STEP_KL
    waiting = isinstance(trainer.source, OnlineSource) and bool(trainer.source.queue)
    if count == 0 or not math.isfinite(total) or (by_generation and waiting):
        return used
    samples = _answers(trainer, control.weight) if by_generation else int(rows)
    moved = control.controller.update(total / count, samples=samples)
    low, high = control.start / RANGE, control.start * RANGE
    if not low <= moved.beta <= high:
        guard.told(
            trainer,
            "beta",
            f"step {trainer.step}: the KL controller asks for beta={moved.beta:.3g}, a millionfold from its start "
            f"{control.start:g}; it is held there. The target {control.controller.state_dict().get('target')} cannot be reached: "
            f"look at {control.weight.measured} in the log",
        )
        moved = replace(moved, beta=min(max(moved.beta, low), high))
    _set(trainer, control, moved)
    return used


def _set(trainer: Trainer, control: Control, controller: kl.KLController) -> None:
    if controller.beta != control.controller.beta:
        trainer.objective = with_beta(trainer.objective, controller.beta)
    control.controller = controller


def state(trainer: Trainer) -> dict[str, float | str] | None:
    """The controller as plain values, for a checkpoint."""
    return trainer.kl_control.controller.state_dict() if trainer.kl_control is not None else None


def load(trainer: Trainer, saved: Mapping[str, float | str] | None) -> None:
    """Restore :func:`state`."""
    if trainer.kl_control is not None and saved is not None:
        trainer.kl_control.reset()
        _set(trainer, trainer.kl_control, kl.controller_from_state_dict(saved))


def describe(trainer: Trainer) -> str | None:
    """A line for the table shown before a run."""
    control = trainer.kl_control
    if control is None:
        return None
    values = {k: v for k, v in control.controller.state_dict().items() if k not in ("kind", "beta")}
    unit = "nats per token" if control.weight.measured == STEP_KL else "nats per answer"
    settings = "".join(f", {k} {v:g}" + (f" {unit}" if k == "target" else "") for k, v in values.items())
    kind = control.controller.state_dict()["kind"]
    return f"{kind}{settings}; by {control.weight.measured}, beta now {control.controller.beta:g}"
