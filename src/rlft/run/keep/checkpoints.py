"""The state of a run in files: saved at the boundary of a step, and loaded bit for bit."""

from __future__ import annotations

import contextlib
import copy
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlft import checkpoint
from rlft._failpoint import instant, within
from rlft._files import remove_tree
from rlft._redact import redact
from rlft.errors import TrainingError
from rlft.metrics import MetricSums
from rlft.rollout import fold_seed
from rlft.run.keep.export import Export
from rlft.run.keep.record import data_facts
from rlft.run.keep.resume import Resume
from rlft.run.step.parts import Parts
from rlft.run.step.source import Source
from rlft.runlock import RunLock, RunLockError

__all__ = ["Checkpoints", "Snapshot", "Stateful"]

#: What each process keeps for itself, beside what the main one keeps for all.
_OF_ALL = ("log_offset", "kl_controller", "checked")


class Stateful(Protocol):
    """What owns a part of the state: plain values under names of its own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """Everything that moves within a step, as it was at a step's boundary; weights move at its end alone."""

    step: int
    counters: dict[str, Any]
    source: tuple[dict[str, Tensor], dict[str, Any]]
    rng: tuple[dict[str, Tensor], dict[str, Any]]
    replay: tuple[dict[str, Tensor], dict[str, Any]] | None
    metrics: MetricSums
    callbacks: dict[str, Any]


class Checkpoints:
    """Owns the boundary that a stopped run is saved at. Every process takes part in what is written and loaded.

    Args:
        parts: of the run.
        source: the place in the data, and what is left of a generation.
        counters: the owners of everything else, in one record.
        callbacks: of the run, as one owner.
        export: writes the model beside a checkpoint.
        saved: is told the folder of a checkpoint, and whether the run is stopping.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        source: Source,
        counters: Sequence[Stateful],
        callbacks: Stateful,
        export: Export,
        saved: Callable[[Path, bool], None],
    ) -> None:
        self.config, self.run_dir, self.data, self.made_of = (
            parts.config,
            parts.run_dir,
            parts.train_data,
            parts.made_of,
        )
        self.policy, self.optimizer = parts.policy, parts.optimizer
        self.processes, self.progress, self.journal = parts.processes, parts.processes.progress, parts.journal
        self.source, self.replay, self.average = source, parts.replay, parts.players.average
        self.counters, self.callbacks, self.export, self._saved = counters, callbacks, export, saved
        self.resume_from = Resume(parts)
        self._boundary: Snapshot | None = None  # None: the present state is one

    # -- saved --------------------------------------------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """The cheap part of the state."""
        counters = {name: value for owner in self.counters for name, value in owner.state_dict().items()}
        return Snapshot(
            self.progress.step,
            {**counters, "log_offset": self.journal.log.offset},
            copy.copy(self.source.state()),
            checkpoint.rng_state(),
            self.replay.state_dict() if self.replay is not None else None,
            copy.deepcopy(self.journal.metrics),
            self.callbacks.state_dict(),
        )

    def step_begins(self) -> None:
        """Remember the boundary, so that an interrupted step loses nothing."""
        self._boundary = self.snapshot()

    def step_ended(self) -> None:
        """The weights have moved: from here to the next step the present state is the boundary."""
        self._boundary = None

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        self._boundary = None
        return self.save_boundary()

    def save_boundary(self, *, stopping: bool = False) -> Path:
        """Write a checkpoint of the last boundary: the weights have not moved since, whatever was begun after it.

        Args:
            stopping: the run ends for a reason of its own, which a callback that raises must not replace.
        """
        self.journal.log.sync()
        if self._is_best(self.progress.step):
            self.progress.best_model_checkpoint = str(self.run_dir / checkpoint.checkpoint_name(self.progress.step))
        with self.journal.meter.phase("save"):
            written = self._write(self._boundary or self.snapshot(), self.run_dir, self.config.save_total_limit)
        self._saved(written, stopping)
        return written

    def rehearse(self) -> str | None:
        """Write a checkpoint of the present state into a folder of its own, read it back, and delete it.

        Returns:
            The name of a trained tensor that came back other than it went in; None when all is well.

        Raises:
            CheckpointError: when it could not be written or does not verify.
        """
        scratch = self.run_dir / f".tmp-0-{'0' * 32}"  # a name that the next start clears, should this one be killed
        try:
            with within("dry"):
                written = self._write(self.snapshot(), scratch, None)
            found = checkpoint.load(written, rank=self.processes.rank).tensors["trainable"]
            live = self.policy.trainable_state()
            return next((name for name, value in live.items() if not torch.equal(found[name], value)), None)
        finally:
            self.processes.accelerator.wait_for_everyone()
            if self.processes.is_main and scratch.exists():
                with instant("rehearsal.remove"):
                    shutil.rmtree(scratch, ignore_errors=True)  # the next start clears what a kill leaves

    def _write(self, state: Snapshot, folder: Path, keep: int | None) -> Path:
        # collective where the model is sharded: every process takes part
        is_main, trainables, reference = self.processes.is_main, self.policy.trainable_state(), self._part("reference")
        for name, tensor in trainables.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"step {state.step}: {name} holds NaN or infinity, so no checkpoint was written over a good one; look for "
                    f"what changed it (a callback?), and resume from the newest checkpoint with the same command"
                )
        opponent = self.average.state() if self.average is not None else {}
        moments, groups = checkpoint.optimizer_to_tensors(self.optimizer, self._optimizer_names(), keep=is_main)
        whole = self.export.whole_weights()
        tensors: dict[str, dict[str, Tensor]] = {"rng": state.rng[0], "source": state.source[0]}
        records: dict[str, Any] = {
            "rng": state.rng[1],
            "source": state.source[1],
            "metrics": state.metrics.state_dict(),
        }
        if state.replay is not None:
            tensors["replay"], records["replay"] = state.replay
        if state.callbacks:
            records["callbacks"] = state.callbacks
        if is_main:
            tensors |= {"trainable": trainables, "optimizer": moments, "reference": reference}
            tensors |= {"behaviour": self._part("behaviour"), "opponent": opponent}
            records |= {
                "optimizer": groups,
                "trainer": {
                    "step": state.step,
                    "data": self.data.fingerprint,
                    "data_facts": data_facts(self.data),
                    "made_of": self.made_of,
                    **state.counters,
                },
                "config": redact(self.config.to_dict()),
            }
        else:  # those of the main process are in its own record, with what all of them share
            records["counters"] = {name: value for name, value in state.counters.items() if name not in _OF_ALL}
        return checkpoint.save(
            folder,
            state.step,
            tensors={stem: values for stem, values in tensors.items() if values},
            records=records,
            config_hash=self.config.digest(),
            keep=keep,
            best=self._is_best(state.step),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            barrier=self.processes.accelerator.wait_for_everyone,
            extra_writer=(lambda folder: self.export.write(folder / "model", whole)) if is_main else None,
            extra_bytes=self.export.size() if is_main else 0,
        )

    def _is_best(self, step: int) -> bool:
        return step > 0 and self.progress.best_global_step == step

    def _part(self, name: str) -> dict[str, Tensor]:
        """Tensors of the reference, or of the policy that sampled what is still to be trained on; a reward model has none."""
        state = getattr(self.policy, f"{name}_state", None)
        return state() if state is not None else {}

    def _optimizer_names(self) -> list[str]:
        """Parameter names in the optimizer's order."""
        by_id = {id(p): name for name, p in self.policy.named_parameters()}
        return [by_id[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    # -- loaded ---------------------------------------------------------------------------------------------------------------
    def resume(self, given: str | bool | None) -> int | None:
        """Load the newest sound checkpoint of the run, or the one that was asked for.

        A checkpoint that was asked for is begun from once: the run notes it in those it writes, and the same command goes
        on from the newest of them.

        Args:
            given: as of :meth:`rlft.Trainer.train`.

        Returns:
            Where its metrics log ended, in bytes; None when there is nothing to resume.
        """
        wish, place = self.resume_from.wish(given), None
        with self.processes.together():
            found, taken = self.resume_from.find(wish)
            if found is not None:
                place = self.resume_from.place(found)
        self.processes.same(
            {"checkpoint to go on from": "none" if found is None else f"{found.path.name} ({found.manifest.id})"},
            remedy=f"All of them must see one folder: put output_dir (here {self.run_dir}) on a file system that they share",
        )
        offset = None
        if found is not None and place is not None:
            with self.processes.together():
                if taken is not None and self.processes.is_main:  # an older one: what came after it is another history
                    if (self.run_dir / "model").exists():
                        remove_tree("export.newer", self.run_dir / "model")
                    checkpoint.discard_newer(self.run_dir, found.step)
            with instant("train.resume"):
                offset = self._restore(found, place)
            self.progress.resumed_from = taken or self.progress.resumed_from
        with self.processes.together(RunLockError):
            if self.processes.is_main and not self.progress.finished:
                self._check_space()
        return offset

    def _restore(self, found: checkpoint.Checkpoint, place: dict[str, Any]) -> int:
        record, others = found.records["trainer"], found.manifest.world_size != self.processes.world_size
        policy = self.policy
        policy.load_trainable_state(found.tensors["trainable"])
        for name in ("reference", "behaviour"):
            if hasattr(policy, f"load_{name}_state"):
                getattr(policy, f"load_{name}_state")(found.tensors.get(name, {}))
        if self.average is not None:
            self.average.load_state(found.tensors.get("opponent", {}))
        checkpoint.optimizer_from_tensors(
            self.optimizer, self._optimizer_names(), found.tensors.get("optimizer", {}), found.records["optimizer"]
        )
        waiting = found.tensors.get("source", {}) if "source" in found.own else {}
        with self.processes.together(ValueError):  # each process reads its own share of a stream again
            self.source.load({name: t.to(self.processes.device) for name, t in waiting.items()}, place, anew=others)
        if self.replay is not None:
            self.replay.load_state_dict(found.tensors.get("replay", {}), found.records["replay"])
        if "metrics" in found.own:  # else they are another process's, and would count twice
            self.journal.metrics = MetricSums.from_state(found.records["metrics"])
        self.progress.step = record["step"]
        counters = {"checked": self.progress.step > 0, **record}  # what an older version did not keep
        counters |= found.records["counters"] if "counters" in found.own else {}
        for owner in self.counters:
            owner.load_state_dict(counters)
        if "callbacks" in found.records:
            self.callbacks.load_state_dict(found.records["callbacks"])
        if others:
            self.resume_from.warn_of_others(found, place)
        # last: building anything above may draw random numbers
        if "rng" in found.own:
            checkpoint.set_rng_state(found.tensors["rng"], found.records["rng"])
        else:
            self.seed()
        return record["log_offset"]

    def seed(self) -> None:
        """Every global random generator, from the run's seed, the rank and the step: not from what was drawn before."""
        number = fold_seed(self.config.seed, rank=self.processes.rank, step=self.progress.step, stream="global")
        random.seed(number)
        torch.manual_seed(number)
        if "numpy" in sys.modules:
            import numpy as np

            np.random.seed(number % 2**32)

    # -- the folder -------------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def locked(self, given: str | bool | None) -> Iterator[None]:
        """Hold the run's folder: two runs cannot share one, and one that is not to resume gets an empty one.

        Args:
            given: as of :meth:`resume`.
        """
        lock = RunLock(
            self.run_dir,
            self.config.identity(),
            config_hash=self.config.digest(),
            resume=self.resume_from.wish(given) != "never",
        )
        try:
            with self.processes.together(RunLockError):
                if self.processes.is_main:
                    lock.acquire()
                    checkpoint.remove_stale(self.run_dir)
            yield
        finally:
            lock.release()

    def _check_space(self) -> None:
        """Refuse a disk that could not take one checkpoint (weights, two moments, the exported model)."""
        trained = sum(p.numel() * p.element_size() for p in self.policy.parameters() if p.requires_grad)
        needed = 3 * trained + self.export.size()
        free = shutil.disk_usage(self.run_dir).free
        if free < needed:
            raise RunLockError(
                f"{self.run_dir} has {free / 2**20:.1f} MiB free and one checkpoint takes about {needed / 2**20:.1f} MiB; "
                f"free some space, or choose another output_dir"
            )
