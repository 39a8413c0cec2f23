"""Bad input 75-83 on two processes: folders, checkpoints and the processes themselves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlft import Trainer
from rlft._json import loads
from rlft.checkpoint._manifest import _sealed
from rlft.errors import TrainingError
from rlft.run.processes import launch
from rlft.runlock import RunLock
from tests.bad_input._two_case import Hold, add
from tests.bad_input.common import ANSWERS, MODEL, RANKED, trainer

SHARED = ("must agree", "another checkpoint to go on from", "put output_dir", "on a file system that they share")


def run(folder: Path, **changes: Any) -> Trainer:
    return trainer(folder, "rloo", changes.pop("rows", RANKED), **{"beta": 0.1, "save_steps": 1, **changes})


def stopped(t: Trainer) -> None:
    """Train to the first checkpoint."""

    def callback(event: str, now: Trainer, values: Any) -> None:
        if event == "save":
            raise KeyboardInterrupt

    t.callbacks.append(callback)
    with contextlib.suppress(KeyboardInterrupt):
        t.train()


def again(row: int, what: str, end: str, *words: str, spoil: Callable[[Path], None] | None = None, **rest: Any) -> None:
    """A second run in the folder of a first, which both processes see; ``spoil`` happens in between."""
    changes, first_run = rest.pop("changes", {}), rest.pop("first_run", Trainer.train)

    def go(folder: Path, met: bool, hold: Hold) -> None:
        first = run(folder)
        first_run(first)
        first.accelerator.wait_for_everyone()
        if spoil is not None and first.is_main:
            spoil(folder / "run")
        first.accelerator.wait_for_everyone()
        hold.trainer = run(folder, **changes)
        hold.trainer.train()

    add(row, what, end, go, words=words, **rest)


def apart(row: int, what: str, end: str, spoil: Callable[[Path], None], *words: str, **rest: Any) -> None:
    """Machines that share no folder: the one that meets it sees its own copy of the run, in which something is wrong."""

    def go(folder: Path, met: bool, hold: Hold) -> None:
        first = run(folder)
        first.train()
        first.accelerator.wait_for_everyone()
        if met:
            shutil.copytree(folder / "run", folder / "copy")
            spoil(folder / "copy")
        first.accelerator.wait_for_everyone()
        hold.trainer = run(folder, output_dir=str(folder / ("copy" if met else "run")))
        hold.trainer.train()

    add(row, f"{what} there", end, go, whose=("second",), words=words, **rest)


def _emptied(folder: Path) -> None:
    (folder / "checkpoint-2" / "trainable.safetensors").write_bytes(b"")


def _manifest(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name / "manifest.json"
        body = {key: value for key, value in loads(path.read_bytes()).items() if key != "seal"}
        path.write_bytes(_sealed({**body, **changes}))

    return spoil


def _without_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


NEWER = _manifest("checkpoint-2", version=99)
again(
    75,
    "folder of another run",
    "refused",
    "holds checkpoint-1",
    "choose another output directory",
    changes={"resume": "never"},
)
again(
    78,
    "newest checkpoint damaged",
    "trains",
    spoil=_emptied,
    at=2,
    warns=("checkpoint skipped", "checkpoint-2", "falling back"),
)
again(
    79, "checkpoint of a newer format", "refused", "checkpoint-2 has checkpoint format 99", "upgrade rlft", spoil=NEWER
)
again(
    80, "other settings", "refused", "other settings", "beta: 0.1 -> 0.2", "another output_dir", changes={"beta": 0.2}
)
again(80, "other data", "refused", "training data changed", "restore the data", changes={"rows": RANKED[::-1]})
again(
    80, "another config of the model", "refused", "begun with something else", "config of the policy: rms_norm_eps",
    "accept_changed: [weights]", changes={"model": {**MODEL, "rms_norm_eps": 0.1}},
)  # fmt: skip


def _stream_changed(folder: Path, met: bool, hold: Hold) -> None:
    """Row 271, which process 1 was given, is another one when the run goes on; the first 256 rows are as they were."""
    path = folder / "stream.jsonl"

    def streamed(answer: str, **extra: Any) -> Trainer:
        rows = [{"prompt": f"{i % 10}=", "completion": answer if i == 271 else "a"} for i in range(400)]
        if os.environ["RANK"] == "0":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"streaming": True, "max_steps": 4, "per_device_train_batch_size": 70, "save_steps": 2, **extra}
        launch.meet()
        torch.distributed.barrier()
        return trainer(folder, "sft", str(path), **settings)

    stopped(streamed("a"))
    hold.trainer = streamed("b")
    hold.trainer.train()


add(
    80, "stream changed", "refused", _stream_changed,
    words=("the first 280 rows of epoch 1 are not those that were trained on", "accept_changed: [data]"),
)  # fmt: skip
again(81, "written by four processes", "trains", spoil=_manifest("checkpoint-1", world_size=4), first_run=stopped, at=2,
      warns=("written by 4 processes and 2 resume it", "not bit for bit"))  # fmt: skip
again(82, "complete", "trains", at=2)
apart(78, "newest checkpoint damaged", "refused", _emptied, *SHARED)
apart(79, "checkpoint of a newer format", "refused", NEWER, "checkpoint-2 has checkpoint format 99", "upgrade rlft")
apart(82, "complete, no checkpoint", "refused", _without_checkpoints, *SHARED)


def _of_one(folder: Path, met: bool, hold: Hold) -> None:
    """The run that the test made on one process goes on here."""
    if os.environ["RANK"] == "0":
        shutil.copytree(folder.parent / BY_ONE, folder / "run")
    hold.trainer = run(folder)
    hold.trainer.train()


#: Beside the cases: a run that was stopped after a step on one process.
BY_ONE = "by-one"
add(
    81,
    "written by one process",
    "trains",
    _of_one,
    at=2,
    warns=("written by 1 process and 2 resume it", "not bit for bit"),
)


# -- folders --------------------------------------------------------------------------------------------------------------
def place(row: int, what: str, name: str, *words: str, **rest: Any) -> None:
    """A folder that cannot be used, where it is met."""

    def go(folder: Path, met: bool, hold: Hold) -> None:
        (folder / "file").write_text("in the way")
        (folder / "other").mkdir(exist_ok=True)
        output = str(folder / (name if met else "run"))
        hold.trainer = trainer(folder, "sft", ANSWERS, output_dir=output)
        hold.trainer.train()

    add(row, what, "refused", go, words=words, **rest)


NOT_SHARED = ("dry_checkpoint", "does not see", "on a file system that all processes share")
ONE_FAILED = ("dry_checkpoint", "ranks [1] could not write their files; see their own errors")
place(75, "folder of another machine", "other", *NOT_SHARED, whose=("second",), told=ONE_FAILED)
place(76, "file in the way", "file/run", "file/run cannot be written: Not a directory", "choose another output directory",
      whose=("both", "first"))  # fmt: skip
place(76, "file in the way there", "file/run", *NOT_SHARED, whose=("second",), told=ONE_FAILED)


def _full(folder: Path, met: bool, hold: Hold) -> None:
    kept, real = shutil.disk_usage, shutil.disk_usage(folder)
    if met:
        shutil.disk_usage = lambda path: real._replace(free=1000)
    try:
        hold.trainer = trainer(folder, "sft", ANSWERS)
        hold.trainer.train()
    finally:
        shutil.disk_usage = kept


add(
    76,
    "disk full",
    "refused",
    _full,
    whose=("both", "first"),
    words=("/run", "0.0 MiB free", "one checkpoint takes", "free some space"),
)
add(
    76,
    "disk full there",
    "refused",
    _full,
    whose=("second",),
    told=ONE_FAILED,
    words=("dry_checkpoint", "/run", "needed", "Make room"),
)


def _locked(folder: Path, met: bool, hold: Hold) -> None:
    hold.trainer = trainer(folder, "sft", ANSWERS)
    with contextlib.ExitStack() as stack:
        if met:
            stack.enter_context(RunLock(folder / "run"))
        hold.trainer.train()


add(77, "two runs in one folder", "refused", _locked, whose=("first",),
    words=("/run is in use by process", "wait for that run, stop it, or choose another output directory"))  # fmt: skip


# -- processes ------------------------------------------------------------------------------------------------------------
def _meeting(folder: Path, met: bool, hold: Hold, *, comes: bool = True) -> None:
    waited, launch.SECONDS = launch.SECONDS, 3
    try:
        if not comes and met:
            raise TrainingError("never came")
        hold.trainer = trainer(folder, "sft", ANSWERS)
    finally:
        launch.SECONDS = waited


def _port_in_use(folder: Path, met: bool, hold: Hold) -> None:
    with socket.socket() as taken:
        if os.environ["RANK"] == "0":
            taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            taken.listen()
        _meeting(folder, met, hold)


def _missing(folder: Path, met: bool, hold: Hold) -> None:
    _meeting(folder, met, hold, comes=False)


ALONE = ("of 2 could not meet the others at 127.0.0.1:", "within 3 s", "set another MASTER_PORT", "start all 2 of them")
add(83, "port in use", "refused", _port_in_use, words=ALONE)
add(83, "process missing", "refused", _missing, whose=("first", "second"), words=("never came",), told=False)
