"""A few cases of each section of the campaign (`make kill-tests` has them all), and the harness seen to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft._failpoint import failpoints_in_source
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


_ALONE = "a checkpoint alone: tests/test_checkpoint_kill.py kills at it, and holds that it misses none of these"
_PAGE = "a report on a full disk: half a page is taken back, and `rlft report` writes it at any time"
#: Instants that the runs of the campaign do not pass -> who kills at them, or why nobody needs to.
NOT_IN_A_RUN = {
    "checkpoint.leftover.file": _ALONE,
    "checkpoint.leftover.folder": _ALONE,
    "checkpoint.part.open": _ALONE,
    "checkpoint.part.remove": _ALONE,
    "checkpoint.part.sync": _ALONE,
    "checkpoint.part.write": _ALONE,
    "checkpoint.run.mkdir": _ALONE,
    "ref_cache.stale": "an hour-old leftover in a folder that runs share: tests/trainer/test_ref_cache.py",
    "report.page.remove": _PAGE,
    "report.picture.remove": _PAGE,
}


def test_no_instant_of_the_source_is_left_out() -> None:
    """The stored campaign killed runs at every named instant of today's source, but for a list with reasons."""
    reached = set(json.loads(campaign.STORE.read_text())["named"]["reached"])
    source = failpoints_in_source()
    listed = {f"{stem}.{side}" for stem in NOT_IN_A_RUN for side in ("before", "after")}
    assert listed <= source
    assert source - reached - listed == set(), "new instants: run python -m tests.reliability named"
    assert reached - source == set(), "instants that are gone: run python -m tests.reliability named"
    assert reached & listed == set(), "these are killed at by now: take them off the list"


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
