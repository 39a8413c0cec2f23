"""A few cases of each section of the campaign (`make kill-tests` has them all), and the harness seen to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import __main__ as campaign

ROOT = Path(__file__).parents[1]


def _campaign(folder: Path, *arguments: str, **env: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", "--quick", "--json", str(folder / "figures.json"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    output = folder / "figures.json"
    return done.returncode, json.loads(output.read_text()) if output.exists() else {}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """One process for all sections: importing is the larger part of the cost."""
    return _campaign(tmp_path_factory.mktemp("campaign"))


@pytest.mark.parametrize("section", campaign.QUICK)
def test_a_few_cases_of(quick: tuple[int, dict[str, Any], str], section: str) -> None:
    _, found, said = quick
    assert section in found, said
    assert found[section]["failures"] == []
    assert found[section]["cases"] >= max(1, found[section]["wanted"])


def test_no_instant_of_the_source_is_left_out(quick: tuple[int, dict[str, Any], str]) -> None:
    """What no run of the trainer passes is a matter of several processes, and of tests/test_checkpoint_kill.py."""
    _, found, _ = quick
    assert found["named"]["notes"]["named instants in the source"] > 150


@pytest.mark.slow
def test_a_few_kills_of_a_run_with_workers(tmp_path: Path) -> None:
    """Their start takes seconds, several times."""
    code, found, said = _campaign(tmp_path, "workers")
    assert code == 0, said
    assert found["workers"]["notes"]["a worker killed"] >= 1


def test_a_broken_resume_is_seen(tmp_path: Path) -> None:
    """With random states that are not restored, the run with dropout ends with other bits, and the harness says so."""
    code, found, said = _campaign(tmp_path, "resume", RLFT_TEST_BREAK="rng")
    assert code == 1, said
    assert any("other bits" in failure for failure in found["resume"]["failures"])


def test_the_page_shows_the_figures_that_are_stored() -> None:
    stored = json.loads(campaign.STORE.read_text())
    assert campaign.table(stored) in campaign.PAGE.read_text(encoding="utf-8"), (
        "run: python -m tests.reliability --page"
    )
