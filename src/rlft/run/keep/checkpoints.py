"""What a run is made of, and how it is saved and continued bit for bit."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft import checkpoint
from rlft._failpoint import instant, within
from rlft._files import disk_trouble, remove_tree, replace_file
from rlft._redact import redact
from rlft.errors import TrainingError
from rlft.metrics import MetricsLog, MetricSums
from rlft.rollout import fold_seed
from rlft.run.keep import record as provenance
from rlft.run.keep import resume as resumed
from rlft.run.keep import same_run
from rlft.run.keep.export import export, exported_bytes, save_model, whole_weights, write_model
from rlft.run.measure import streamed_rows as rows_read
from rlft.run.processes import processes as meeting
from rlft.run.step import kl_control as controllers
from rlft.run.step import update as guard
from rlft.runlock import RunLock, RunLockError

if TYPE_CHECKING:
    from rlft.data import DataReport
    from rlft.trainer import Trainer

logger = logging.getLogger("rlft")

__all__ = [
    "Light", "export", "light", "locked", "open_log", "rehearse", "resume", "save", "save_boundary", "save_model", "seed", "write_summary",
]  # fmt: skip


_COUNTERS = (
    "tokens_seen",
    "unscored_steps",
    "equal_steps",
    "rollouts",
    "evaluated_at",
    "finished",
    "nonfinite_steps",
    "sampler_agrees",
    "resumed_from",
)


@dataclass(frozen=True)
class Light:
    """Everything that moves within a step, as it was at a step's boundary; weights move at its end alone."""

    step: int
    counters: dict[str, Any]
    source: tuple[dict[str, Tensor], dict[str, Any]]
    rng: tuple[dict[str, Tensor], dict[str, Any]]
    replay: tuple[dict[str, Tensor], dict[str, Any]] | None
    metrics: MetricSums


def light(trainer: Trainer) -> Light:
    """The cheap part of the state, taken before each step so that an interrupted one loses nothing."""
    return Light(
        trainer.step,
        {name: getattr(trainer, name) for name in _COUNTERS}
        | {
            "log_offset": trainer.metrics_log.offset,
            "kl_controller": controllers.state(trainer),
            "checked": trainer.first_step is None and trainer.step > 0,
        },
        copy.copy(trainer.source.state()),
        checkpoint.rng_state(),
        trainer.replay.state_dict() if trainer.replay is not None else None,
        copy.deepcopy(trainer.metrics),
    )


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the present step; every process takes part."""
    trainer._boundary = None
    return save_boundary(trainer)


def save_boundary(trainer: Trainer, *, stopping: bool = False) -> Path:
    """Write a checkpoint of the last boundary: the weights have not moved since, whatever was begun after it.

    Args:
        trainer: the run.
        stopping: the run ends for a reason of its own, which a callback that raises must not replace: that is logged.
    """
    trainer.metrics_log.sync()
    with trainer.meter.phase("save"):
        written = _write(trainer, trainer._boundary or light(trainer), trainer.run_dir, trainer.config.save_total_limit)
    for callback in trainer.callbacks:
        try:
            callback("save", trainer, {"path": str(written)})
        except Exception as error:
            if not stopping:
                raise
            logger.warning(f"a callback raised {type(error).__name__}: {error} at 'save'; the run was saved and stops")
    return written


def rehearse(trainer: Trainer) -> str | None:
    """Write a checkpoint of the present state into a folder of its own, read it back, and delete it.

    Returns:
        The name of a trained tensor that came back other than it went in; None when all is well.

    Raises:
        CheckpointError: when it could not be written or does not verify.
    """
    scratch = trainer.run_dir / f".tmp-0-{'0' * 32}"  # a name that the next start clears, should this one be killed
    try:
        with within("dry"):
            written = _write(trainer, light(trainer), scratch, None)
        found = checkpoint.load(written, rank=trainer.rank).tensors["trainable"]
        live = trainer.policy.trainable_state()
        return next((name for name, value in live.items() if not torch.equal(found[name], value)), None)
    finally:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_main and scratch.exists():
            with instant("rehearsal.remove"):
                shutil.rmtree(scratch, ignore_errors=True)  # the next start clears what a kill leaves


def _write(trainer: Trainer, state: Light, folder: Path, keep: int | None) -> Path:
    # collective where the model is sharded: every process takes part
    trainables, reference = trainer.policy.trainable_state(), _reference_state(trainer)
    for name, tensor in trainables.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"step {state.step}: {name} holds NaN or infinity, so no checkpoint was written over a good one; look for "
                f"what changed it (a callback?), and resume from the newest checkpoint with the same command"
            )
    names, opponent = _optimizer_names(trainer), trainer.average.state() if trainer.average is not None else {}
    moments, groups = checkpoint.optimizer_to_tensors(trainer.optimizer, names, keep=trainer.is_main)
    whole = whole_weights(trainer)
    tensors: dict[str, dict[str, Tensor]] = {"rng": state.rng[0], "source": state.source[0]}
    records: dict[str, Any] = {"rng": state.rng[1], "source": state.source[1], "metrics": state.metrics.state_dict()}
    if state.replay is not None:
        tensors["replay"], records["replay"] = state.replay
    if not trainer.is_main:  # those of the main process are in its own record, with what all of them share
        records["counters"] = {name: state.counters[name] for name in _COUNTERS}
    if trainer.is_main:
        tensors |= {"trainable": trainables, "optimizer": moments, "reference": reference}
        tensors["behaviour"] = _behaviour_state(trainer)
        tensors["opponent"] = opponent
        records |= {
            "optimizer": groups,
            "trainer": {
                "step": state.step,
                "data": trainer.train_data.fingerprint,
                "data_facts": provenance.data_facts(trainer),
                "made_of": trainer.made_of,
                **state.counters,
            },
            "config": redact(trainer.config.to_dict()),
        }
    return checkpoint.save(
        folder,
        state.step,
        tensors={stem: values for stem, values in tensors.items() if values},
        records=records,
        config_hash=trainer.config.digest(),
        keep=keep,
        rank=trainer.rank,
        world_size=trainer.world_size,
        barrier=trainer.accelerator.wait_for_everyone,
        extra_writer=(lambda folder: write_model(trainer, folder / "model", whole)) if trainer.is_main else None,
        extra_bytes=exported_bytes(trainer) if trainer.is_main else 0,
    )


def resume(trainer: Trainer, given: str | bool | None) -> int | None:
    """Load the newest sound checkpoint of the run, or the one that was asked for.

    A checkpoint that was asked for is begun from once: the run notes it in those it writes, and the same command goes on
    from the newest of them.

    Returns:
        Where its metrics log ended, in bytes; None when there is nothing to resume.
    """
    wish = resumed.wish(trainer, given)
    found, place, taken = None, None, None
    with guard.together(trainer):
        if wish == "auto":
            found = checkpoint.load_latest(trainer.run_dir, rank=trainer.rank)
        elif wish != "never":
            found, taken = resumed.asked_for(trainer, wish)
        if found is not None:
            same_run.check(trainer, found)
            place = resumed.place(trainer, found)
    meeting.same(
        trainer.accelerator,
        {"checkpoint to go on from": "none" if found is None else f"{found.path.name} ({found.manifest.id})"},
        remedy=f"All of them must see one folder: put output_dir (here {trainer.run_dir}) on a file system that they share",
    )
    offset = None
    if found is not None:
        with guard.together(trainer):
            if taken is not None and trainer.is_main:  # an older one: what came after it is another history
                if (trainer.run_dir / "model").exists():
                    remove_tree("export.newer", trainer.run_dir / "model")
                checkpoint.discard_newer(trainer.run_dir, found.step)
        with instant("train.resume"):
            offset = _restore(trainer, found, place)
        trainer.resumed_from = taken or trainer.resumed_from
    with guard.together(trainer, RunLockError):
        if trainer.is_main and not trainer.finished:
            _check_space(trainer)
    return offset


def seed(trainer: Trainer) -> None:
    """Every global random generator, from the run's seed, the rank and the step: not from what was drawn before."""
    number = fold_seed(trainer.config.seed, rank=trainer.rank, step=trainer.step, stream="global")
    random.seed(number)
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(number % 2**32)


def _restore(trainer: Trainer, found: checkpoint.Checkpoint, place: dict[str, Any] | None) -> int:
    record, others = found.records["trainer"], found.manifest.world_size != trainer.world_size
    assert place is not None
    trainer.policy.load_trainable_state(found.tensors["trainable"])
    if hasattr(trainer.policy, "load_reference_state"):
        trainer.policy.load_reference_state(found.tensors.get("reference", {}))
    if hasattr(trainer.policy, "load_behaviour_state"):
        trainer.policy.load_behaviour_state(found.tensors.get("behaviour", {}))
    if trainer.average is not None:
        trainer.average.load_state(found.tensors.get("opponent", {}))
    checkpoint.optimizer_from_tensors(
        trainer.optimizer, _optimizer_names(trainer), found.tensors.get("optimizer", {}), found.records["optimizer"]
    )
    waiting = found.tensors.get("source", {}) if "source" in found.own else {}
    with guard.together(trainer, ValueError):  # each process reads its own share of a stream again
        trainer.source.load({name: t.to(trainer.device) for name, t in waiting.items()}, place, anew=others)
    if trainer.replay is not None:
        trainer.replay.load_state_dict(found.tensors.get("replay", {}), found.records["replay"])
    if "metrics" in found.own:  # else they are another process's, and would count twice
        trainer.metrics = MetricSums.from_state(found.records["metrics"])
    trainer.step = record["step"]
    counters = record | (found.records["counters"] if "counters" in found.own else {})
    for name in _COUNTERS:
        if name in counters:  # else written before there was such a counter
            setattr(trainer, name, counters[name])
    trainer.checked = record.get("checked", trainer.step > 0)
    controllers.load(trainer, record.get("kl_controller"))
    if others:
        resumed.warn_of_others(trainer, found, place)
    # last: building anything above may draw random numbers
    if "rng" in found.own:
        checkpoint.set_rng_state(found.tensors["rng"], found.records["rng"])
    else:
        seed(trainer)
    return record["log_offset"]


def _behaviour_state(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that sampled what is still to be trained on, where an objective asks for their distribution."""
    return trainer.policy.behaviour_state() if hasattr(trainer.policy, "behaviour_state") else {}


def _reference_state(trainer: Trainer) -> dict[str, Tensor]:
    """The reference's own tensors; a reward model has none."""
    return trainer.policy.reference_state() if hasattr(trainer.policy, "reference_state") else {}


def _optimizer_names(trainer: Trainer) -> list[str]:
    """Parameter names in the optimizer's order."""
    by_id = {id(p): name for name, p in trainer.policy.named_parameters()}
    return [by_id[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def locked(trainer: Trainer, given: str | bool | None) -> Iterator[None]:
    """Hold the run's folder: two runs cannot share one, and one that is not to resume gets an empty one.

    Args:
        trainer: the run.
        given: as of :func:`resume`.
    """
    lock = RunLock(
        trainer.run_dir,
        trainer.config.identity(),
        config_hash=trainer.config.digest(),
        resume=resumed.wish(trainer, given) != "never",
    )
    try:
        with guard.together(trainer, RunLockError):
            if trainer.is_main:
                lock.acquire()
                checkpoint.remove_stale(trainer.run_dir)
        yield
    finally:
        lock.release()


def _check_space(trainer: Trainer) -> None:
    """Refuse a disk that could not take one checkpoint (weights, two moments, the exported model)."""
    trained = sum(p.numel() * p.element_size() for p in trainer.policy.parameters() if p.requires_grad)
    needed = 3 * trained + exported_bytes(trainer)
    free = shutil.disk_usage(trainer.run_dir).free
    if free < needed:
        raise RunLockError(
            f"{trainer.run_dir} has {free / 2**20:.1f} MiB free and one checkpoint takes about {needed / 2**20:.1f} MiB; "
            f"free some space, or choose another output_dir"
        )


def open_log(trainer: Trainer, offset: int | None) -> MetricsLog:
    """The run's metrics.jsonl, cut back to where the resumed checkpoint left it; trackers are started."""
    with guard.together(trainer):
        path = trainer.run_dir / "metrics.jsonl"
        try:
            log = MetricsLog(path, enabled=trainer.is_main)
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be opened: {error.strerror}; move it away, or make it writable"
            ) from error
        log.truncate_to(trainer.step, offset or 0)
        if trainer.is_main:
            _write_settings(trainer, "config.json", redact(trainer.config.to_dict()))
            write_summary(trainer, trainer.train_data.report)
        plain = {k: v for k, v in redact(trainer.config.to_dict()).items() if isinstance(v, (int, float, str, bool))}
        trainer.accelerator.init_trackers("rlft", config=plain)
    return log


def write_summary(trainer: Trainer, rows: DataReport) -> None:
    """Leave ``summary.json``: what became of the rows, and what computed and from where. On the main process."""
    _write_settings(trainer, "summary.json", {"data": rows_read.facts(rows), **provenance.shown(trainer.made_of)})


def _write_settings(trainer: Trainer, name: str, values: dict[str, Any]) -> None:
    data = (json.dumps(values, indent=2) + "\n").encode()
    try:
        replace_file("settings", trainer.run_dir / name, data)
    except OSError as error:
        trouble = disk_trouble(error, trainer.run_dir, len(data))
        raise TrainingError(f"{trainer.run_dir / name} could not be written: {trouble}") from error
