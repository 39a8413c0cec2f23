"""Loops: what is measured about them, and that none is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlft.config import Config
from tests.proofs.loops import LOOPS, Loop, check
from tests.proofs.proof import Measured

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_identities_and_limits(loop: Loop) -> None:
    for proof in (*loop.equals, *loop.limits):
        if isinstance(proof, Measured):
            check(loop, proof)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_it_has_every_proof(loop: Loop) -> None:
    assert loop.settings
    assert loop.truth
    assert loop.equals
    assert loop.limits
    assert loop.trained_by
    assert set(loop.settings) <= Config.__dataclass_fields__.keys()


def test_every_loop_of_the_manual_is_here() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    table = text.partition("## Loops on sampled answers")[2].partition("\n## ")[0]
    names = re.findall(r"^\| (?!For \|)([^|]+?) \|", table, re.M)
    assert names == [loop.name for loop in LOOPS if loop.documented], (
        "add a Loop to tests/proofs/loops.py, or a row there"
    )


def test_every_setting_of_comparisons_belongs_to_a_loop() -> None:
    used = {setting for loop in LOOPS for setting in loop.settings}
    assert not {field.name for field in Config.groups()["comparisons"]} - used, "add a Loop to tests/proofs/loops.py"
