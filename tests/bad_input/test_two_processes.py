"""Bad inputs on two processes: both end, in the same way, whether both met it or one alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bad_input import _two
from tests.launch import free_ports, launch


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bad_inputs_on_two_processes_end_without_a_hang(tmp_path: Path) -> None:
    """One start of two processes for all cases; a case that hangs ends them with a stack dump, which is shown."""
    (tmp_path / "ports.json").write_text(json.dumps(free_ports(len(_two.CASES))))
    launch("tests.bad_input._two", tmp_path, 2, timeout=1700)
    zero, one = ([json.loads(line) for line in (tmp_path / f"said{r}.jsonl").read_text().splitlines()] for r in (0, 1))
    wrong = []
    for first, second in zip(zero, one, strict=True):
        end = _two.CASES[first["name"]][0]
        ends = {"trains" if not said else "refused" for said in (first["said"], second["said"])}
        if len(ends) != 1 or (end != "either" and ends != {end}):
            wrong.append(f"{first['name']}: expected {end}; 0: {first['said'][:200]!r}; 1: {second['said'][:200]!r}")
    assert not wrong, "\n".join(wrong)
    assert [case["name"] for case in zero] == list(_two.CASES)
    assert max(case["seconds"] for case in zero + one) < _two.PATIENCE


def test_the_cases_cover_what_can_meet_a_run() -> None:
    assert len(_two.CASES) >= 70
    assert len({name[:2] for name in _two.CASES}) >= 40
