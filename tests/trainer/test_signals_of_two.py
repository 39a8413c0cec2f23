"""SIGTERM to one of two processes: both leave at the same step, at once, and the resumed run has the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch import launch
from tests.trainer._signals_of_two import AT, PLACES, SOON


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("signals")
    launch("tests.trainer._signals_of_two", folder, 2, timeout=240)
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("place", PLACES)
def test_both_leave_at_once_and_resume_with_the_same_bits(found: list[dict[str, Any]], place: str) -> None:
    for said in (one[place] for one in found):
        # an evaluation comes after its step, the rest belongs to the next
        assert said["said"].startswith(f"Interrupted: interrupted after step {AT};"), said
        assert said["step"] == AT
        assert said["saved"] == f"checkpoint-{AT}"
        assert said["took"] < SOON
        assert said["bits"] == said["whole"]
    assert found[0][place]["bits"] == found[1][place]["bits"]
