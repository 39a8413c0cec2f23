"""The harness of ``make mutants`` makes the faults it says, leaves words alone, and its list of equivalents is current."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation import mutators, run, warm

SOURCE = '''
"""A docstring of 1 and 2."""
__all__ = ["f"]


def f(x: "Tensor[1]", mask, *, low: float = 0.0) -> "Tensor":
    """Another: 3 > 2."""
    if x.ndim > 1 and mask.any():
        wording = f"{x.shape[0]} rows"
        raise ValueError(f"got {x - 1}: {wording}")
    kept = x.detach().where(mask, 0.0)
    return -kept.sum(-1).clamp(min=1) * low
'''


def made(source: str = SOURCE) -> dict[str, str]:
    return {mutant.key: mutant.operator for mutant in mutators.mutants(source)}


def test_faults_are_made_where_they_matter() -> None:
    found = made()
    for key, operator in {
        "f: x.ndim > 1 and mask.any()  ->  x.ndim > 1 or mask.any()": "boolean",
        "f: x.ndim > 1 and mask.any()  ->  x.ndim >= 1 and mask.any()": "comparison",
        "f: x.detach().where(mask, 0.0)  ->  x.detach()": "drop where",
        "f: x.detach().where(mask, 0.0)  ->  x.detach().where(~mask, 0.0)": "swap where",
        "f: x.detach().where(mask, 0.0)  ->  x.detach().where(mask, 1.0)": "constant",
        "f: x.detach().where(mask, 0.0)  ->  x.where(mask, 0.0)": "drop detach",
        "f: kept.sum(-1).clamp(min=1)  ->  kept.sum(0).clamp(min=1)": "dimension",
        "f: kept.sum(-1).clamp(min=1)  ->  kept.sum(-1).clamp(max=1)": "swap min and max",
        "f: kept.sum(-1).clamp(min=1)  ->  kept.mean(-1).clamp(min=1)": "other function",
        "f: -kept.sum(-1).clamp(min=1)  ->  kept.sum(-1).clamp(min=1)": "drop unary",
        "f: -kept.sum(-1).clamp(min=1) * low  ->  -kept.sum(-1).clamp(min=1) / low": "arithmetic",
    }.items():
        assert found.get(key) == operator, (key, sorted(found))


def test_words_are_left_alone() -> None:
    for key in made():
        after = key.split("->")[1]
        assert "docstring" not in key
        assert "Another" not in key
        assert "__all__" not in key
        assert "ValueError" not in after
        assert "rows" not in after


def test_every_mutant_is_another_program_and_has_a_name_of_its_own() -> None:
    found = mutators.mutants(SOURCE)
    assert len({mutant.key for mutant in found}) == len(found)
    original = ast.unparse(ast.parse(SOURCE))
    for mutant in found:
        assert ast.unparse(mutators.mutated(SOURCE, mutant)) != original, mutant.key
        compile(mutators.mutated(SOURCE, mutant), "f", "exec")


def test_a_mutant_runs_in_functions_that_are_held_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held.py").write_text("LIMIT = 2\n\ndef double(x, *, by=LIMIT):\n    return x * by\n")
    monkeypatch.syspath_prepend(tmp_path)
    import held  # type: ignore[import-not-found]

    double, source = held.double, (tmp_path / "held.py").read_text()
    mutant = next(m for m in mutators.mutants(source) if m.operator == "arithmetic")
    warm.install("held", compile(mutators.mutated(source, mutant), "held.py", "exec"), [])
    assert double(8) == 4
    warm.install("held", compile(ast.parse(source), "held.py", "exec"), [])
    assert double(8) == 16
    del sys.modules["held"]


def test_an_endless_loop_is_a_kill() -> None:
    def work(_send) -> None:
        while True:
            pass

    assert warm.in_child(work, cpu_seconds=0) is None
    assert warm.in_child(lambda send: send({"by": "me"}), cpu_seconds=5) == {"by": "me"}


def test_the_list_of_equivalents_is_current_and_short() -> None:
    """Each entry names a mutant that exists, and says why no test can see it."""
    known = run.equivalents()
    files = {key.split("::")[0] for key in known}
    keys = {f"{f}::{m.key}" for f in files for m in mutators.mutants((run.ROOT / f).read_text(encoding="utf-8"))}
    assert not set(known) - keys
    assert all(len(reason) > 20 for reason in known.values())
    assert len(known) < 60


@pytest.mark.slow
def test_a_sample_of_mutants_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.mutation.run", "--sample", "40", "--seed", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
