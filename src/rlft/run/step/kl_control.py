"""The KL controller of a run: beta of the objective moves between optimizer steps, by the KL that was measured.

Two KLs have a weight that a controller can move. The pull to the *reference* (in the reward, in the loss or inside the
objective) is measured as ``objective/kl``, nats per answer, on the answers that are trained on; beta moves after every step,
or once per generation where the KL is part of the reward. The penalty on the *step*, from the policy that sampled
(PPO-penalty), is measured as ``policy/approxkl``, nats per token; beta moves after the last step of a generation, since the
first one always measures zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import kl, reduce
from rlft.config import ConfigError
from rlft.objective import Objective
from rlft.rules.kl_weight import STEP_KL, controller_for, kl_weights, with_beta
from rlft.run.step.parts import Parts
from rlft.run.step.source import Source
from rlft.run.step.watchers import Watcher
from rlft.types import Batch, LossOutput

__all__ = ["KLControl"]

#: Beta stays within this factor of its start: halved for ever it would become zero, which cannot be undone.
RANGE = 2.0**20


class KLControl(Watcher):
    """Owns the controller of a run: adds up what a step measures, and moves beta.

    Args:
        parts: of a run with a ``kl_controller``; the objective has one weight of a KL.
        source: tells when a generation is used up.

    Attributes:
        controller: the rule, at the beta of now.
        weight: where that beta is.
    """

    def __init__(self, parts: Parts, source: Source) -> None:
        config, sizes, self.processes, self.journal = parts.config, parts.sizes, parts.processes, parts.journal
        assert config.kl_controller is not None
        (self.weight,) = kl_weights(parts.objective)
        self.controller = rule = controller_for(config.kl_controller, self.weight.beta)
        self.start, self.source = rule.beta, source
        once_per_generation = self.weight.place == "reward" or self.weight.measured == STEP_KL
        groups = sizes.draws if once_per_generation else sizes.groups_per_step
        self.answers = groups * config.num_generations * parts.processes.world_size  # between two moves of beta
        self.forget()
        if isinstance(rule, kl.ProportionalKL) and rule.limit * self.answers >= rule.horizon:
            raise ConfigError(
                f"kl_controller.horizon={rule.horizon:g} is not above limit x answers between two moves of beta ({rule.limit:g} x "
                f"{self.answers}), so one move could turn beta negative; raise horizon (10000 is customary)"
            )

    def forget(self) -> None:
        """Begin to measure anew."""
        self.total, self.count, self.rows = 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is measured inside, in an evaluation, is no step's."""
        kept = self.total, self.count, self.rows
        try:
            yield
        finally:
            self.total, self.count, self.rows = kept

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
        self.journal.metrics.add(name, values, rows)
        self._take(values, rows, int(rows.sum()))

    def after_update(self, *, moved: bool) -> dict[str, float]:
        """Move beta by what the step measured on all processes. Collective.

        Returns:
            ``kl/beta``, the weight that the step was taken with.
        """
        used = {"kl/beta": self.controller.beta}
        sums = torch.tensor([self.total, self.count, self.rows], dtype=torch.float64)
        total, count, rows = self.processes.sum(sums).tolist()
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

    def state_dict(self) -> dict[str, Any]:
        """The controller as plain values."""
        return {"kl_controller": self.controller.state_dict()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back; the trainer's objective follows by :meth:`steered`."""
        if values.get("kl_controller") is not None:
            self.forget()
            self.controller = kl.controller_from_state_dict(values["kl_controller"])

    def describe(self) -> str:
        """A line for the table shown before a run."""
        values = {k: v for k, v in self.controller.state_dict().items() if k not in ("kind", "beta")}
        unit = "nats per token" if self.weight.measured == STEP_KL else "nats per answer"
        settings = "".join(f", {k} {v:g}" + (f" {unit}" if k == "target" else "") for k, v in values.items())
        kind = self.controller.state_dict()["kind"]
        return f"{kind}{settings}; by {self.weight.measured}, beta now {self.controller.beta:g}"
