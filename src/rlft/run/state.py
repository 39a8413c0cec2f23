"""What a run is made of, and how it is saved and continued bit for bit."""

from __future__ import annotations

import contextlib
import copy
import filecmp
import json
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
from rlft._files import disk_trouble, move, remove_tree, replace_file, sync_dir, sync_file
from rlft._redact import redact
from rlft.config import Config, ConfigError, digest_of
from rlft.errors import TrainingError
from rlft.metrics import MetricsLog, MetricSums
from rlft.rollout import fold_seed
from rlft.run import controllers, display, guard, meeting
from rlft.runlock import RunLock, RunLockError

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Light", "export", "light", "locked", "open_log", "rehearse", "resume", "save", "save_boundary", "seed"]


_COUNTERS = (
    "tokens_seen",
    "unscored_steps",
    "equal_steps",
    "rollouts",
    "evaluated_at",
    "finished",
    "nonfinite_steps",
    "sampler_agrees",
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
        | {"log_offset": trainer.metrics_log.offset, "kl_controller": controllers.state(trainer)},
        copy.copy(trainer.source.state()),
        checkpoint.rng_state(),
        trainer.replay.state_dict() if trainer.replay is not None else None,
        copy.deepcopy(trainer.metrics),
    )


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the present step; every process takes part."""
    trainer._boundary = None
    return save_boundary(trainer)


def save_boundary(trainer: Trainer) -> Path:
    """Write a checkpoint of the last boundary: the weights have not moved since, whatever was begun after it."""
    trainer.metrics_log.sync()
    with trainer.meter.phase("save"):
        written = _write(trainer, trainer._boundary or light(trainer), trainer.run_dir, trainer.config.save_total_limit)
    trainer._call("save", {"path": str(written)})
    return written


def rehearse(trainer: Trainer) -> str | None:
    """Write a checkpoint of the present state into a folder of its own, read it back, and delete it.

    Returns:
        The name of a trained tensor that came back other than it went in; None when all is well.

    Raises:
        CheckpointError: when it could not be written or does not verify.
    """
    scratch = trainer.run_dir / f".tmp-0-{'0' * 32}"  # a name that the next start clears, should this one be killed
    with within("dry"):
        try:
            written = _write(trainer, light(trainer), scratch, None)
            found = checkpoint.load(written, rank=trainer.rank).tensors["trainable"]
            live = trainer.policy.trainable_state()
            return next((name for name, value in live.items() if not torch.equal(found[name], value)), None)
        finally:
            trainer.accelerator.wait_for_everyone()
            if trainer.is_main and scratch.exists():
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
    moments, groups = checkpoint.optimizer_to_tensors(trainer.optimizer, _optimizer_names(trainer))
    tensors: dict[str, dict[str, Tensor]] = {"rng": state.rng[0], "source": state.source[0]}
    records: dict[str, Any] = {"rng": state.rng[1], "source": state.source[1], "metrics": state.metrics.state_dict()}
    if state.replay is not None:
        tensors["replay"], records["replay"] = state.replay
    if trainer.is_main:
        tensors |= {"trainable": trainables, "optimizer": moments, "reference": reference}
        tensors["behaviour"] = _behaviour_state(trainer)
        tensors["opponent"] = trainer.average.state() if trainer.average is not None else {}
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
        extra_writer=(lambda folder: trainer.save_model(folder / "model")) if trainer.is_main else None,
        extra_bytes=_exported_bytes(trainer) if trainer.is_main else 0,
    )


def export(trainer: Trainer, *, again: bool = True) -> None:
    """Leave the trained model in ``<run>/model`` and the report beside it.

    The model is written apart and renamed, so that it is whole or not there.

    Args:
        trainer: a finished run.
        again: False writes only what is not there.

    Raises:
        TrainingError: when the disk refuses; nothing half-written is left.
    """
    if not trainer.is_main:
        return
    final, fresh, old = (trainer.run_dir / name for name in ("model", ".tmp-model", ".old-model"))
    try:
        for left in (fresh, old):
            if left.exists():
                remove_tree("export.stale", left)
        if again or not _same_files(trainer.run_dir / f"checkpoint-{trainer.step}" / "model", final):
            with instant("export.write"):
                trainer.save_model(fresh)
            for path in sorted(fresh.rglob("*")):
                sync_file("export.file.sync", path)
            if final.exists():
                move("export.aside", final, old)
            move("export.rename", fresh, final)
            sync_dir("export.sync", trainer.run_dir)
            if old.exists():
                remove_tree("export.old", old)
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        needed = _exported_bytes(trainer)
        raise TrainingError(
            f"the trained model was not written to {final}: {disk_trouble(error, trainer.run_dir, needed) or error}; the "
            f"checkpoint of step {trainer.step} holds it: the same command writes it again"
        ) from error
    report = trainer.run_dir / "report.html"
    if trainer.config.report and (again or not report.exists()):
        from rlft.report import write_report

        write_report(trainer.run_dir, report)


def _same_files(one: Path, two: Path) -> bool:
    """Whether two folders hold the same bytes under the same names."""
    first, second = (
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} for folder in (one, two)
    )
    return first.keys() == second.keys() and all(filecmp.cmp(first[n], second[n], shallow=False) for n in first)


def resume(trainer: Trainer, given: str | bool | None) -> int | None:
    """Load the newest sound checkpoint of the run, or the one that was asked for.

    Returns:
        Where its metrics log ended, in bytes; None when there is nothing to resume.
    """
    wish = trainer.config.resume if given is None else {True: "auto", False: "never"}.get(given, given)  # type: ignore[call-overload]
    found = None
    with guard.together(trainer):
        if wish == "auto":
            found = checkpoint.load_latest(trainer.run_dir, rank=trainer.rank)
        elif wish != "never":
            if not isinstance(wish, (str, Path)):
                raise ConfigError(f"resume must be True, False or a checkpoint's folder, got {wish!r}")
            if not Path(wish).is_dir():
                raise ConfigError(
                    f"resume={str(wish)!r} is no folder; give 'auto', 'never', or a checkpoint such as {trainer.run_dir}/checkpoint-100"
                )
            found = checkpoint.load(wish, rank=trainer.rank)
        if found is not None:
            _check_same_run(trainer, found)
    meeting.same(
        trainer.accelerator,
        {"checkpoint to go on from": "none" if found is None else f"{found.path.name} ({found.manifest.id})"},
        remedy=f"All of them must see one folder: put output_dir (here {trainer.run_dir}) on a file system that they share",
    )
    if found is None:
        return None
    with guard.together(trainer):
        if wish != "auto" and trainer.is_main:  # an older one was asked for: what came after it is another history
            if (trainer.run_dir / "model").exists():
                remove_tree("export.newer", trainer.run_dir / "model")
            checkpoint.discard_newer(trainer.run_dir, found.step)
    with instant("train.resume"):
        return _restore(trainer, found)


def seed(trainer: Trainer) -> None:
    """Every global random generator, from the run's seed and the rank: dropout does not depend on what was drawn before."""
    number = fold_seed(trainer.config.seed, rank=trainer.rank, stream="global")
    random.seed(number)
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(number % 2**32)


def _restore(trainer: Trainer, found: checkpoint.Checkpoint) -> int:
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
    if hasattr(trainer.policy, "load_behaviour_state"):
        trainer.policy.load_behaviour_state(found.tensors.get("behaviour", {}))
    if trainer.average is not None:
        trainer.average.load_state(found.tensors.get("opponent", {}))
    checkpoint.optimizer_from_tensors(
        trainer.optimizer, _optimizer_names(trainer), found.tensors.get("optimizer", {}), found.records["optimizer"]
    )
    waiting = found.tensors.get("source", {}) if "source" in found.own else {}
    trainer.source.load({name: t.to(trainer.device) for name, t in waiting.items()}, found.records["source"])
    if trainer.replay is not None:
        trainer.replay.load_state_dict(found.tensors.get("replay", {}), found.records["replay"])
    trainer.metrics = MetricSums.from_state(found.records["metrics"])
    trainer.step = record["step"]
    for name in _COUNTERS:
        if name in record:  # else written before there was such a counter
            setattr(trainer, name, record[name])
    controllers.load(trainer, record.get("kl_controller"))
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
    # compared as JSON: a tuple in memory is a list in the file. A setting that came with a newer version had its default.
    stored = json.loads(json.dumps(found.records.get("config", {})))
    then = json.loads(json.dumps(Config().to_dict())) | stored
    now = json.loads(json.dumps(redact(trainer.config.to_dict())))
    deciding = trainer.config.identity()
    changes = [f"  {k}: {then[k]!r} -> {now[k]!r}" for k in deciding if then[k] != now[k]]
    changes += [f"  {k}: {value!r} -> no setting of this version" for k, value in stored.items() if k not in now]
    if not changes and digest_of({k: then[k] for k in deciding}) == trainer.config.digest():
        return
    changes = changes or ["  a value that is not shown, since it looks like a secret"]
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
def locked(trainer: Trainer) -> Iterator[None]:
    """Hold the run's folder: two runs cannot share one."""
    lock = RunLock(
        trainer.run_dir,
        trainer.config.identity(),
        config_hash=trainer.config.digest(),
        resume=trainer.config.resume != "never",
    )
    try:
        with guard.together(trainer, RunLockError):
            if trainer.is_main:
                lock.acquire()
                _check_space(trainer)
                checkpoint.remove_stale(trainer.run_dir)
        yield
    finally:
        lock.release()


def _check_space(trainer: Trainer) -> None:
    """Refuse a disk that could not take one checkpoint (weights, two moments, the exported model)."""
    trained = sum(p.numel() * p.element_size() for p in trainer.policy.parameters() if p.requires_grad)
    needed = 3 * trained + _exported_bytes(trainer)
    free = shutil.disk_usage(trainer.run_dir).free
    if free < needed:
        raise RunLockError(
            f"{trainer.run_dir} has {free / 2**20:.1f} MiB free and one checkpoint takes about {needed / 2**20:.1f} MiB; "
            f"free some space, or choose another output_dir"
        )


def _exported_bytes(trainer: Trainer) -> int:
    """About how large the saved model is: adapters alone, or all weights."""
    weights = trainer.policy.hf_model.parameters()
    return sum(p.numel() * p.element_size() for p in weights if p.requires_grad or not trainer.config.use_peft)


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
            report = trainer.train_data.report
            facts = {
                "rows": report.rows,
                "kept": report.kept,
                "skipped": report.skipped,
                "format": trainer.train_data.format,
            }
            _write_settings(trainer, "summary.json", {"data": facts})
        plain = {k: v for k, v in redact(trainer.config.to_dict()).items() if isinstance(v, (int, float, str, bool))}
        trainer.accelerator.init_trackers("rlft", config=plain)
    return log


def _write_settings(trainer: Trainer, name: str, values: dict[str, Any]) -> None:
    data = (json.dumps(values, indent=2) + "\n").encode()
    try:
        replace_file("settings", trainer.run_dir / name, data)
    except OSError as error:
        trouble = disk_trouble(error, trainer.run_dir, len(data))
        raise TrainingError(f"{trainer.run_dir / name} could not be written: {trouble}") from error
