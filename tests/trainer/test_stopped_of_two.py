"""Two processes that are stopped: with as many they go on bit for bit, with more or fewer they go on and say so."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from rlft import checkpoint
from tests.launch import launch
from tests.reliability.runs import digest
from tests.trainer import _stopped_of_two as job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One launch for all; before it, one process stops what the two go on with."""
    folder = tmp_path_factory.mktemp("stopped")
    assert "RANK" not in os.environ
    for kind in job.KINDS:
        assert job.run(folder / "more", kind, stop=True).step == job.STOP
    launch("tests.trainer._stopped_of_two", folder, 2, timeout=240)
    return folder, [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", job.KINDS)
def test_as_many_processes_go_on_bit_for_bit(two: tuple[Path, list[dict[str, Any]]], kind: str) -> None:
    folder, said = two
    for rank in range(2):
        own = said[rank][kind]
        assert own["stopped"]["step"] == job.STOP
        assert own["bits"][0] == own["bits"][1], f"process {rank}"
        assert own["generations"][0] == own["generations"][1]
    assert digest(folder / "whole" / kind) == digest(folder / "cut" / kind)


def test_refills_were_not_the_same_on_both(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Else the test above would prove nothing of what each process counts for itself."""
    _, said = two
    assert said[0]["refills"]["stopped"]["generations"] != said[1]["refills"]["stopped"]["generations"]


def _inside_a_generation(path: Path) -> int:
    return checkpoint.load(path, only=["source"]).records["source"].get("queued", 0)


@pytest.mark.parametrize("kind", job.KINDS)
def test_more_processes_go_on_with_a_warning(two: tuple[Path, list[dict[str, Any]]], kind: str) -> None:
    folder, said = two
    for rank in range(2):
        assert said[rank][f"more {kind}"]["step"] == 6
    assert said[0][f"more {kind}"]["bits"] == said[1][f"more {kind}"]["bits"]
    _check_warning(said[0][f"more {kind}"]["said"], kind, 1, 2)
    assert not any("written by" in text for text in said[1][f"more {kind}"]["said"]), "once, not once a process"
    assert checkpoint.load(folder / "more" / kind / "checkpoint-6").manifest.world_size == 2


@pytest.mark.parametrize("kind", job.KINDS)
def test_fewer_processes_go_on_with_a_warning(two: tuple[Path, list[dict[str, Any]]], kind: str) -> None:
    folder, _ = two
    stopped = folder / "fewer" / kind / f"checkpoint-{job.STOP}"
    assert (_inside_a_generation(stopped) > 0) is (kind in ("generation", "replay"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = job.run(folder / "fewer", kind)
    assert t.step == 6
    _check_warning([str(w.message) for w in caught], kind, 2, 1)


def _check_warning(texts: list[str], kind: str, before: int, now: int) -> None:
    (said,) = [text for text in texts if "written by" in text]
    assert f"{before} process{'es' if before > 1 else ''} and {now} resume it" in said
    assert f"from step {job.STOP}, but not bit for bit, and a step is of {now} x per_device_train_batch_size" in said
    assert ("what was still to be trained on of the last generation" in said) is (kind in ("generation", "replay"))
    assert ("kept for replay" in said) is (kind == "replay")
