"""What must be true of the first optimizer step of every run, whatever the objective.

Before the update: every trained tensor has a gradient, the denominators are the counts of the masks that the losses saw,
and fresh samples have importance ratio 1. After it: a trained tensor moved, and no frozen one did.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rlft.config import Config
from rlft.models.tensor_hashes import fingerprint
from rlft.run.checks.before import failed
from rlft.run.step.parts import Parts
from rlft.run.step.probes import exact
from rlft.run.step.watchers import Watcher
from rlft.types import Batch, LossOutput

__all__ = ["FirstStep", "modules_of"]

#: Largest distance of an importance ratio from 1 on fresh samples: float32 and better, and the mean below that.
RATIO, ROUGH_RATIO = 1e-4, 0.05


class FirstStep(Watcher):
    """Sees one optimizer step from the first forward pass to the update, and leaves.

    A step without gradient (nothing was scored, all rewards equal, learning rate 0) proves nothing: the watch then
    goes on for the next.

    Args:
        parts: of the run, before its first step.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.policy, self.optimizer = parts.config, parts.policy, parts.optimizer
        config, processes = parts.config, parts.processes
        self.processes, self.journal, self.temperature = parts.processes, parts.journal, parts.temperature
        self.objective, self.spent = parts.objective, 0.0  # the objective's weights do not matter here
        self.whole = config.checks_itself("first_step")
        self.ratio = config.checks_itself("on_policy") and parts.online
        started = time.perf_counter()
        # sharded weights and gradients are not whole on any process
        self.tensors = self.whole and not processes.sharded
        self.gradients = config.checks_itself("gradients") and not processes.sharded
        self.frozen = self._fingerprints(frozen=True) if self.tensors else {}
        self.trained = self._fingerprints(frozen=False) if self.tensors else {}
        self._reset()
        self.spent += time.perf_counter() - started

    @staticmethod
    def wanted(config: Config) -> bool:
        """Whether any of its checks is on."""
        return any(config.checks_itself(name) for name in ("first_step", "gradients", "on_policy"))

    def _reset(self) -> None:
        self.counts = torch.zeros(len(self.objective.terms), dtype=torch.float64)
        self.divided: Tensor | None = None
        self.said: str | None = None
        self.seen = 0

    def _fingerprints(self, *, frozen: bool) -> dict[str, Tensor]:
        named = self.policy.named_parameters()
        return {name: fingerprint(p) for name, p in named if p.requires_grad is not frozen}

    def begins(self, micro_batches: Sequence[Batch], denominators: Tensor) -> None:
        """Compare what the step will divide by with the masks. Collective."""
        if not self.whole:
            return
        started = time.perf_counter()
        self.divided = denominators.double().cpu()
        local = sum((self._counts_of(b) for b in micro_batches), torch.zeros_like(self.counts))
        self.said = self._wrong_count(self._over_processes(local), "the masks of its batches count")
        self.spent += time.perf_counter() - started

    def saw(self, batch: Batch, outputs: Mapping[str, Tensor], results: Sequence[LossOutput]) -> None:
        """Take in one micro-batch as the objective got it."""
        started = time.perf_counter()
        self.counts += self._counts_of(batch)
        if self.ratio and self.said is None and "logps" in outputs:
            self.said = self._off_policy(batch, outputs["logps"].detach())
        self.seen += 1
        self.spent += time.perf_counter() - started

    def _counts_of(self, batch: Batch) -> Tensor:
        """What each term divides by, counted here from the mask and not by the objective."""
        everything = batch.mask.detach().cpu()
        labels = batch.labels
        counts = []
        for term in self.objective.terms:
            mask = everything
            if term.rows == "chosen":
                mask = everything[0::2] if labels is None else everything[labels.cpu()]
            alive = mask.sum(-1) > 0
            if term.reduction == "mean":
                count = (alive[0::2] & alive[1::2]).sum() if term.per_pair else alive.sum()
            else:
                count = mask.sum() if term.reduction == "token_mean" else alive.sum() * (term.length or 1)
            counts.append(float(count))
        return torch.tensor(counts, dtype=torch.float64)

    def _off_policy(self, batch: Batch, logps: Tensor) -> str | None:
        old = batch.old_logps
        if old is None:
            # the objective takes its own forward pass as the old one; with dropout on by choice that is no other one
            if self.seen or not self.config.disable_dropout:
                return None
            counting = batch.mask.any(-1).nonzero()
            if not len(counting):
                return None
            # one prompt's answers tell; a whole micro-batch would cost as much again as its forward pass
            rows = (batch.group_ids == batch.group_ids[counting[0]]).nonzero()[:, 0]
            batch = batch.select(rows)
            logps = logps[rows, : batch.mask.shape[1]]
            with torch.no_grad():
                old = self.policy(batch, want=frozenset({"logps"}), temperature=self.temperature)["logps"]
        if not bool(batch.mask.any()):
            return None
        gap = (logps.double() - old.double()).expm1().abs()[batch.mask]
        if not bool(torch.isfinite(gap).all()):
            return None  # NaN is the guard's matter, which names the step
        close = exact(self.policy, self.config.mixed_precision)
        value, bound = (float(gap.max()), RATIO) if close else (float(gap.mean()), ROUGH_RATIO)
        if value <= bound:
            return None
        return failed(
            "on_policy",
            f"samples that were just drawn should have importance ratio 1, got {'up to' if close else 'a mean of'} "
            f"{value:.3g} away from it (bound {bound:g}); likely causes: dropout in training (disable_dropout: false), layers "
            f"that behave otherwise under gradient, old log-probs of another temperature, or weights that moved since. Set "
            f"disable_dropout: true",
        )

    def before_update(self, loss: float) -> None:
        """Check gradients, counts and ratios; nothing was applied yet.

        Raises:
            TrainingError: on every process.
        """
        started = time.perf_counter()
        said = self.said
        # rows without loss and gradient may have been left out after the count
        c, objective = self.config, self.objective
        if self.whole and not (c.drop_zero_advantages and objective.advantage_weighted):
            total = self._over_processes(self.counts)
            # an override of compute_loss may not tell, and outputs that are not finite went to no loss
            if self.seen and math.isfinite(loss):
                said = said or self._wrong_count(total, "its losses saw")
        if self.gradients:
            said = said or self._without_gradient()
        self.processes.agree(said)
        self.spent += time.perf_counter() - started

    def _over_processes(self, counts: Tensor) -> Tensor:
        return self.processes.sum(counts).cpu()

    def _wrong_count(self, counted: Tensor, where: str) -> str | None:
        assert self.divided is not None
        for term, mine, theirs in zip(self.objective.terms, counted.tolist(), self.divided.tolist(), strict=True):
            if mine != theirs:
                return failed(
                    "first_step",
                    f"term {term.name!r} was divided by {theirs:g}, but {where} {mine:g} "
                    f"({term.reduction}); likely causes: a stage that changes Batch.mask after the count, or an override of "
                    f"Trainer.count. Change masks in Trainer.prepare",
                )
        return None

    def _without_gradient(self) -> str | None:
        named = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        missing = [name for name, p in named.items() if p.grad is None]
        if not missing:
            return None
        places = modules_of(missing, named)
        return failed(
            "gradients",
            f"every trained tensor should have a gradient, but {len(missing)} of {len(named)} have none ({', '.join(places[:5])}"
            f"{', ...' if len(places) > 5 else ''}); likely causes: layers that the text path does not use (of images, say), an "
            f"adapter that is not active, or a detached output. Freeze what should not train before the Trainer is built "
            f"(requires_grad_(False)), train adapters (use_peft: true), or activate the adapter",
        )

    def after_update(self, *, moved: bool) -> Mapping[str, float]:
        """Check that trained tensors changed and frozen ones did not.

        Raises:
            TrainingError: on every process.
        """
        started = time.perf_counter()
        self.processes.agree(self._wrongly_moved(moved) if self.tensors else None)
        self.spent += time.perf_counter() - started
        if moved:
            self.journal.note(f"self-checks of the first step passed in {self.spent:.2f} s")
            self.done = self.processes.progress.checked = True
        else:
            self._reset()
        return {}

    def _wrongly_moved(self, moved: bool) -> str | None:
        now = self._fingerprints(frozen=True)
        changed = [name for name, value in self.frozen.items() if name not in now or not torch.equal(now[name], value)]
        if changed:
            return failed(
                "first_step",
                f"frozen tensors should not change, but {len(changed)} of {len(self.frozen)} did in the first step "
                f"({', '.join(changed[:3])}); likely causes: an optimizer that holds them, an adapter merged into its base, or "
                f"code that writes to weights. The reference and the policy can no longer be trusted: start again without it",
            )
        if (
            moved
            and self.objective.trust_region is None
            and all(torch.equal(value, self.trained[name]) for name, value in self._fingerprints(frozen=False).items())
        ):
            rate = self.optimizer.param_groups[0]["lr"]
            return failed(
                "first_step",
                f"an update with a gradient should change a trained tensor, but none of {len(self.trained)} did; likely causes: "
                f"an optimizer made for other tensors, or a learning rate (now {rate:g}) below the resolution of the weights. "
                f"Raise learning_rate, or leave the optimizer out",
            )
        return None


def modules_of(missing: Sequence[str], trained: Iterable[str]) -> list[str]:
    """Tensors by name, those of a module that has no other trained ones under the module's.

    Args:
        missing: names of tensors, as ``named_parameters`` gives them.
        trained: names of all trained ones, those among them.

    Returns:
        ``model.vision_tower (152 tensors)``, or the name of a tensor that stands alone.
    """
    total = Counter(part for name in trained for part in _parts(name))
    without = Counter(part for name in missing for part in _parts(name))
    found: dict[str, None] = {}
    for name in missing:
        part = next(part for part in _parts(name) if total[part] == without[part])
        found[name if total[part] == 1 else f"{part} ({total[part]} tensors)"] = None
    return list(found)


def _parts(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    words = name.split(".")
    return [".".join(words[: depth + 1]) for depth in range(len(words))]
