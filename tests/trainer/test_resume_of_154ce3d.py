"""Runs that commit 154ce3d stopped are continued by the present code, and end as 154ce3d ended those it never stopped.

The old source comes out of git, and one process makes all runs with it, see :mod:`tests.trainer.old_runs`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlft
from rlft.metrics import comparable, read_metrics
from tests.trainer import old_runs
from tests.trainer.old_runs import RUNS

COMMIT = "154ce3d"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of the old code, whole and stopped."""
    if shutil.which("git") is None:
        pytest.skip(f"needs git, to read the source of {COMMIT}")
    archive = subprocess.run(["git", "archive", "--format=tar", COMMIT, "src"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(
            f"{COMMIT} is not in the history here (an sdist, a shallow clone?): {archive.stderr.decode().strip()}"
        )
    folder = tmp_path_factory.mktemp("of-154ce3d")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    # as many threads as here: sums over another number of them round otherwise
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tests.trainer.old_runs", str(folder / "src"), str(folder / "runs")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert not Path(rlft.__file__).is_relative_to(folder), "the runs must be continued by the present code"
    return folder / "runs"


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor of every file in a folder, the exported model's too, to the bit."""
    return {
        f"{path.relative_to(folder)}: {name}": (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for path in sorted(folder.rglob("*.safetensors"))
        for name, t in load_file(path).items()
    }


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def records(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, but for the clock, the settings and the versions; none is as good as absent."""
    found = {path.stem: record(folder, path.stem) for path in sorted(folder.glob("*.json"))}
    del found["manifest"], found["config"], found["trainer"]["made_of"]
    # in bytes: how long a row of the log is hangs on the digits of its times
    del found["trainer"]["log_offset"]
    entries = [(f"{stem}.json: {name}", value) for stem, values in found.items() for name, value in values.items()]
    return {name: value for name, value in entries if value is not None}


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what is no longer there or has another value; short, where tensors would not be."""
    return [name for name, value in before.items() if name not in now or now[name] != value]


def holds_what_it_should(checkpoint: Path, run: old_runs.Run, stop: int) -> None:
    """Without this a run could stop carrying over what it is here for, and nobody would see."""
    for stem in run.tensors:
        assert load_file(checkpoint / f"{stem}.safetensors"), f"{stem} is empty"
    expected = {name: value[stop] if isinstance(value, dict) else value for name, value in run.record.items()}
    assert {name: record(checkpoint, "trainer")[name] for name in expected} == expected
    assert record(checkpoint, "source").get("queued", 0) == run.queued
    assert bool(record(checkpoint, "metrics")) == run.half_logged
    assert bool(record(checkpoint, "trainer")["resumed_from"]) == ("resume" in run.settings)


@pytest.mark.parametrize(("name", "stop"), [(name, stop) for name, run in RUNS.items() for stop in run.stops])
def test_ends_as_the_run_that_was_never_stopped(made: Path, tmp_path: Path, name: str, stop: int) -> None:
    whole, resumed = made / name, tmp_path / "run"
    shutil.copytree(old_runs.stopped(name, stop, made), resumed)
    assert sorted(p.name for p in resumed.glob("checkpoint-*"))[-1] == f"checkpoint-{stop}"
    assert not (resumed / "model").exists()
    holds_what_it_should(resumed / f"checkpoint-{stop}", RUNS[name], stop)
    steps: list[int] = []
    t = old_runs.trainer(
        name, made, resumed, callbacks=[lambda event, t, values: steps.append(t.step) if event == "step" else None]
    )
    t.train()
    later = range(stop + 1, t.step + 1)
    assert steps == list(later)
    # the checkpoint of every step: by the last one, a counter that was lost may have caught up
    for part in (*(f"checkpoint-{step}" for step in later), "model"):
        before, now = tensors(whole / part), tensors(resumed / part)
        assert before
        assert before.keys() == now.keys()
        assert changed(before, now) == [], part
        if part != "model":  # a later version may note more than this one did
            assert changed(records(whole / part), records(resumed / part)) == [], part
    assert comparable(read_metrics(resumed)) == comparable(read_metrics(whole))
