"""What a run is made of, and how it is saved and continued bit for bit."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft import checkpoint, display
from rlft._redact import redact
from rlft.config import ConfigError
from rlft.errors import TrainingError
from rlft.metrics import MetricsLog, MetricSums
from rlft.runlock import RunLock, RunLockError

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Light", "export", "light", "locked", "open_log", "resume", "save", "save_boundary"]


_COUNTERS = ("tokens_seen", "unscored_steps", "rollouts", "evaluated_at", "finished")


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
        {name: getattr(trainer, name) for name in _COUNTERS} | {"log_offset": trainer.metrics_log.offset},
        copy.copy(trainer.source.state()),
        checkpoint.rng_state(),
        trainer.replay.state_dict() if trainer.replay is not None else None,
        copy.deepcopy(trainer.metrics),
    )


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the present step; every process takes part."""
    trainer._boundary = light(trainer)
    return save_boundary(trainer)


def save_boundary(trainer: Trainer) -> Path:
    """Write a checkpoint of the last boundary: the weights have not moved since, whatever was begun after it."""
    state = trainer._boundary
    assert state is not None
    trainer.metrics_log.sync()
    # collective where the model is sharded: every process takes part
    trainables, reference = trainer.policy.trainable_state(), _reference_state(trainer)
    for name, tensor in trainables.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"step {state.step}: {name} holds NaN or infinity, so no checkpoint was written over a good one; look for "
                f"what changed it (a callback?), and resume from the newest checkpoint with the same command"
            )
    moments, groups = checkpoint.optimizer_to_tensors(trainer.optimizer, _optimizer_names(trainer))
    tensors: dict[str, dict[str, Tensor]] = {"rng": state.rng[0], "source": state.source[0]}
    records: dict[str, Any] = {"rng": state.rng[1], "source": state.source[1], "metrics": state.metrics.state_dict()}
    if state.replay is not None:
        tensors["replay"], records["replay"] = state.replay
    if trainer.is_main:
        tensors |= {"trainable": trainables, "optimizer": moments, "reference": reference}
        records |= {
            "optimizer": groups,
            "trainer": {
                "step": state.step,
                "data": trainer.train_data.fingerprint,
                "data_facts": _data_facts(trainer),
                **state.counters,
            },
            "config": redact(trainer.config.to_dict()),
        }
    written = checkpoint.save(
        trainer.run_dir,
        state.step,
        tensors={stem: values for stem, values in tensors.items() if values},
        records=records,
        config_hash=trainer.config.digest(),
        keep=trainer.config.save_total_limit,
        rank=trainer.rank,
        world_size=trainer.world_size,
        barrier=trainer.accelerator.wait_for_everyone,
        extra_writer=(lambda folder: trainer.save_model(folder / "model")) if trainer.is_main else None,
    )
    trainer._call("save", {"path": str(written)})
    return written


def export(trainer: Trainer) -> None:
    """Leave the trained model in ``<run>/model``: written beside it and renamed, so that it is whole or not there."""
    if not trainer.is_main:
        return
    final, fresh = trainer.run_dir / "model", trainer.run_dir / ".tmp-model"
    for old in (fresh, trainer.run_dir / ".old-model"):
        if old.exists():
            shutil.rmtree(old)
    trainer.save_model(fresh)
    if final.exists():
        final.rename(trainer.run_dir / ".old-model")
    fresh.rename(final)
    shutil.rmtree(trainer.run_dir / ".old-model", ignore_errors=True)


def resume(trainer: Trainer, given: str | bool | None) -> int | None:
    """Load the newest sound checkpoint of the run, or the one that was asked for.

    Returns:
        Where its metrics log ended, in bytes; None when there is nothing to resume.
    """
    wish = trainer.config.resume if given is None else {True: "auto", False: "never"}.get(given, given)  # type: ignore[call-overload]
    if wish == "never":
        return None
    if wish == "auto":
        found = checkpoint.load_latest(trainer.run_dir, rank=trainer.rank)
        if found is None:
            return None
    else:
        found = checkpoint.load(wish, rank=trainer.rank)
        if trainer.is_main:  # an older one was asked for: what came after it is another history
            checkpoint.discard_newer(trainer.run_dir, found.step)
    _check_same_run(trainer, found)
    if found.manifest.world_size != trainer.world_size:
        display.warn(
            trainer,
            f"the checkpoint was written by {found.manifest.world_size} processes and {trainer.world_size} resume it: "
            f"the run goes on, but not bit for bit",
        )
    record = found.records["trainer"]
    trainer.policy.load_trainable_state(found.tensors["trainable"])
    if hasattr(trainer.policy, "load_reference_state"):
        trainer.policy.load_reference_state(found.tensors.get("reference", {}))
    checkpoint.optimizer_from_tensors(
        trainer.optimizer, _optimizer_names(trainer), found.tensors.get("optimizer", {}), found.records["optimizer"]
    )
    trainer.source.load(found.tensors.get("source", {}) if "source" in found.own else {}, found.records["source"])
    if trainer.replay is not None:
        trainer.replay.load_state_dict(found.tensors.get("replay", {}), found.records["replay"])
    trainer.metrics = MetricSums.from_state(found.records["metrics"])
    trainer.step = record["step"]
    for name in _COUNTERS:
        setattr(trainer, name, record[name])
    if "rng" in found.own:  # last: building anything above may draw random numbers
        checkpoint.set_rng_state(found.tensors["rng"], found.records["rng"])
    return record["log_offset"]


def _check_same_run(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    if found.records["trainer"]["data"] != trainer.train_data.fingerprint:
        then, now = found.records["trainer"].get("data_facts", {}), _data_facts(trainer)
        changes = [f"{name}: {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
        raise ConfigError(
            f"the training data changed since {found.path} was written "
            f"({', '.join(changes) or 'as many examples and tokens, but other ones or in another order'}); continuing would "
            f"mix two runs: restore the data, the tokenizer and the limits, or use another output_dir"
        )
    if found.manifest.config_hash == trainer.config.digest():
        return
    # compared as JSON: a tuple in memory is a list in the file
    then = json.loads(json.dumps(found.records.get("config", {})))
    now = json.loads(json.dumps(redact(trainer.config.to_dict())))
    deciding = trainer.config.identity()
    changes = [f"  {k}: {then.get(k)!r} -> {now[k]!r}" for k in deciding if then.get(k) != now[k]]
    raise ConfigError(
        f"{trainer.run_dir} holds a run with other settings; continuing it would mix two runs:\n"
        + "\n".join(changes)
        + "\nuse the settings it was started with, or another output_dir (resume=never does not overwrite it either)"
    )


def _data_facts(trainer: Trainer) -> dict[str, Any]:
    """What a person can compare when the data of a run has changed."""
    data = trainer.train_data
    prompt_tokens = sum(len(e.prompt_ids) for e in data.examples)
    return {
        "format": data.format,
        "examples": len(data.examples),
        "prompt tokens": prompt_tokens,
        "trained tokens": data.report.trained_tokens,
    }


def _reference_state(trainer: Trainer) -> dict[str, Tensor]:
    """The reference's own tensors; a reward model has none."""
    return trainer.policy.reference_state() if hasattr(trainer.policy, "reference_state") else {}


def _optimizer_names(trainer: Trainer) -> list[str]:
    """Parameter names in the optimizer's order."""
    by_id = {id(p): name for name, p in trainer.policy.named_parameters()}
    return [by_id[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def locked(trainer: Trainer) -> Iterator[None]:
    """Hold the run's folder: two runs cannot share one."""
    lock = RunLock(
        trainer.run_dir,
        trainer.config.identity(),
        config_hash=trainer.config.digest(),
        resume=trainer.config.resume != "never",
    )
    failure: Exception | None = None
    if trainer.is_main:
        try:
            lock.acquire()
            _check_space(trainer)
        except RunLockError as error:
            lock.release()
            failure = error
    # the other processes must hear of a refusal before anyone waits for anyone
    refused = trainer.accelerator.reduce(
        torch.tensor([float(failure is not None)], device=trainer.device), reduction="sum"
    )
    if failure is not None:
        raise failure
    if float(refused.sum()) > 0:
        raise RunLockError(f"process 0 could not take {trainer.run_dir}; see its own error")
    try:
        if trainer.is_main:
            checkpoint.remove_stale(trainer.run_dir)
        trainer.accelerator.wait_for_everyone()
        yield
    finally:
        if trainer.is_main:
            lock.release()


def _check_space(trainer: Trainer) -> None:
    """Refuse a disk that could not take one checkpoint (weights, two moments, the exported model)."""
    trained = sum(p.numel() * p.element_size() for p in trainer.policy.parameters() if p.requires_grad)
    exported = sum(p.numel() * p.element_size() for p in trainer.policy.hf_model.parameters())
    needed = 3 * trained + (trained if trainer.config.use_peft else exported)
    free = shutil.disk_usage(trainer.run_dir).free
    if free < needed:
        raise RunLockError(
            f"{trainer.run_dir} has {free / 2**20:.1f} MiB free and one checkpoint takes about {needed / 2**20:.1f} MiB; "
            f"free some space, or choose another output_dir"
        )


def open_log(trainer: Trainer, offset: int | None) -> MetricsLog:
    """The run's metrics.jsonl, cut back to where the resumed checkpoint left it; trackers are started."""
    log = MetricsLog(trainer.run_dir / "metrics.jsonl", enabled=trainer.is_main)
    log.truncate_to(trainer.step, offset or 0)
    if trainer.is_main:
        text = json.dumps(redact(trainer.config.to_dict()), indent=2)
        (trainer.run_dir / "config.json").write_text(text + "\n")
        report = trainer.train_data.report
        facts = {
            "rows": report.rows,
            "kept": report.kept,
            "skipped": report.skipped,
            "format": trainer.train_data.format,
        }
        (trainer.run_dir / "summary.json").write_text(json.dumps({"data": facts}, indent=2) + "\n")
    plain = {k: v for k, v in redact(trainer.config.to_dict()).items() if isinstance(v, (int, float, str, bool))}
    trainer.accelerator.init_trackers("rlft", config=plain)
    return log
