"""The benchmark harness: fair turns, honest refusals; and once, slowly, the whole command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import page, run
from benchmarks.harness import Case, Variant, VariantResult, measure

HERE = "tests.test_benchmarks"
ROOT = Path(__file__).resolve().parents[1]


def works(tick: Any, *, megabytes: int, answer: float, log: str, name: str) -> None:
    """A variant for the harness: writes its name at each turn, and takes some memory for a moment."""
    tick()
    while True:
        with open(log, "a", encoding="utf-8") as file:
            file.write(name)
        block = bytearray(megabytes * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        del block
        tick(answer=answer, tokens=10)


def breaks(tick: Any, **_: Any) -> None:
    """A variant that fails after its first turn."""
    tick()
    raise RuntimeError("no such luck")


def variant(name: str, log: Path, *, megabytes: int = 1, answer: float = 1.0) -> Variant:
    return Variant(name, f"{HERE}:works", {"megabytes": megabytes, "answer": answer, "log": str(log), "name": name})


@pytest.mark.slow
def test_turns_alternate_and_memory_is_that_of_the_variant(tmp_path: Path) -> None:
    log = tmp_path / "turns"
    small, large = variant("a", log, megabytes=1), variant("b", log, megabytes=200)
    absent = Variant("c", f"{HERE}:works", needs=("no_such_module",))
    case = Case("turns", "nothing", {"n": 1}, [small, large, absent], rounds=3, same=("answer",), per="tokens")
    result = measure(case, say=lambda line: None)
    assert log.read_text() == "ab" + "ba" + "ab" + "ba"
    a, b, c = result.variants
    assert [len(v.cpu) for v in (a, b, c)] == [3, 3, 0]
    assert b.costs == [seconds / 10 for seconds in b.cpu]
    assert a.peak < 50
    assert 190 < b.peak < 300
    assert c.skipped == "no_such_module not installed"
    rows = result.as_dict()["variants"]
    assert rows[0]["ratio"]["median"] == 1
    assert rows[2] == {"name": "c", "skipped": c.skipped}


@pytest.mark.slow
def test_variants_that_differ_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "turns"
    case = Case("liars", "nothing", {}, [variant("a", log), variant("b", log, answer=1.1)], rounds=1, same=("answer",))
    with pytest.raises(RuntimeError, match=r"answer is 1 in 'a' and 1\.1 in 'b'"):
        measure(case, say=lambda line: None)


@pytest.mark.slow
def test_a_variant_that_fails_shows_its_error(tmp_path: Path) -> None:
    case = Case("broken", "nothing", {}, [Variant("x", f"{HERE}:breaks")], rounds=1)
    with pytest.raises(RuntimeError, match=r"(?s)'x' stopped:.*no such luck"):
        measure(case, say=lambda line: None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_command_at_tiny_sizes(tmp_path: Path) -> None:
    record = run.main(["--quick", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == record
    text = (tmp_path / "benchmarks.md").read_text()
    for case in record["cases"]:
        assert f"### {case['name']}" in text
        assert case["variants"][0]["cpu_s"][0] > 0
    assert not re.search(r"/(home|root|tmp|work)/", text)
    assert record["accuracy"][0]["ways"]["rlft linear_logps"]["kl_error"] < 1e-4


def test_ratio_is_taken_within_a_round() -> None:
    ours = VariantResult("ours", cpu=[1.0, 4.0], work=[1.0, 2.0])
    theirs = VariantResult("theirs", cpu=[3.0, 4.0], work=[1.0, 1.0])
    assert theirs.ratios(ours) == [3.0, 2.0]


def test_table_names_what_was_skipped() -> None:
    ratio = {"of_minima": 1.0, "median": 1.0, "low": 1.0, "high": 1.0, "memory": None}
    measured = {"name": "ours", "skipped": "", "cpu_s": [0.5, 0.25], "peak_mib": 0.4, "ratio": ratio}
    text = page.table({"variants": [measured, {"name": "peer", "skipped": "peer not installed"}]})
    assert "| ours | 0.250 | 0.375 | 1 | 0 |  |" in text
    assert "| peer | skipped: peer not installed |" in text


def test_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--quick", "--only", "no such case"])
    assert "no case is called" in capsys.readouterr().err


def test_library_never_imports_the_benchmarks() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks", file.read_text(encoding="utf-8"), re.MULTILINE), file


def test_the_page_is_of_the_figures_beside_it_and_gives_a_reason_for_every_miss() -> None:
    record = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text == page.page(record)
    assert "no reason is given" not in text


def test_every_aim_names_a_case_and_its_variants(tmp_path: Path) -> None:
    cases = {case.name: {v.name for v in case.variants} for case in run.cases(tmp_path)}
    for aim in page.AIMS:
        assert {aim.against, aim.ours or aim.against} <= cases[aim.case]


def test_a_ratio_between_two_of_a_case_and_a_miss_without_reason() -> None:
    def row(name: str, time: float) -> dict[str, Any]:
        return {"name": name, "skipped": "", "ratio": {"median": time, "memory": None}}

    variants = [row("rlft agro_off_policy", 1.0), row("rlft rloo", 2.0), row("TRL RLOOTrainer", 8.0)]
    text = page.targets_table([{"name": page.AGRO, "kind": "", "variants": variants}])
    assert "| off-policy AGRO step | TRL RLOOTrainer | 4.5x | 8.0x | reached |" in text
    assert "| RLOO step | TRL RLOOTrainer | 4.5x | 4.0x | missed: **no reason is given yet** |" in text
