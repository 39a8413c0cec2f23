"""The benchmark of a GPU on a CPU: what fails costs its own row, pages say what was measured; once, slowly, all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import head, page
from benchmarks.gpu.measure import Recorder, Skipped, need


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(torch.device("cpu"), tmp_path / "x.json", repeats=20, seconds=5.0, quick=False)


def test_repeats_follow_the_warm_up(recorder: Recorder) -> None:
    calls: list[int] = []

    def make() -> Any:
        return lambda: calls.append(1) or {"outputs": 2.0}

    row = recorder.variant(recorder.case("c", "w", {"n": 1}), "a", make, warmup=3)
    assert len(calls) == 3 + 20
    assert len(row.ms) == 20
    assert row.facts == {"outputs": 2.0}
    assert json.loads(recorder.path.read_text())["cases"][0]["rows"][0]["name"] == "a"


def test_long_units_are_repeated_five_times(recorder: Recorder) -> None:
    recorder.seconds = 0.0
    row = recorder.variant(recorder.case("c", "w", {}), "a", lambda: lambda: None)
    assert len(row.ms) == 5


def test_what_fails_costs_its_own_row(recorder: Recorder) -> None:
    case = recorder.case("c", "w", {})

    def raises(error: Exception) -> Any:
        def make() -> Any:
            raise error

        return make

    recorder.variant(case, "ours", lambda: lambda: {"outputs": 1.0, "grad": 5.0}, same=("outputs",))
    recorder.variant(case, "absent", lambda: need("no_such_module.part"))
    recorder.variant(case, "full", raises(torch.OutOfMemoryError("CUDA out of memory")))
    recorder.variant(case, "broken", raises(RuntimeError("no such luck\nand more")))
    recorder.variant(case, "near", lambda: lambda: {"outputs": 1.001, "grad": 5.0}, same=("outputs", "grad"))
    recorder.variant(case, "far", lambda: lambda: {"outputs": 1.0, "grad": 6.0}, same=("outputs", "grad"))
    recorder.variant(case, "lost", lambda: lambda: {"outputs": float("nan")}, same=("outputs",))
    skipped = {row.name: row.skipped for row in case.rows if row.skipped}
    assert skipped == {
        "absent": "no_such_module cannot be imported (No module named 'no_such_module')",
        "full": "out of memory",
        "broken": "failed: RuntimeError: no such luck",
    }
    assert {row.name: row.differs for row in case.rows if row.differs} == {
        "far": "grad 6, not 5",
        "lost": "outputs nan, not 1",
    }
    with recorder.section("one"):
        raise ValueError("whole part")
    assert recorder.failed == ["one: ValueError: whole part"]
    assert json.loads(recorder.path.read_text())["failed"] == recorder.failed


def test_on_cuda_events_are_read_after_the_device_was_waited_for(monkeypatch, recorder: Recorder) -> None:
    now, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, later: Any) -> float:
            assert waited[-1] == "last"
            return 1000 * (later.at - self.at)

    memory = {"memory_allocated": 5 * 2**20, "max_memory_allocated": 12 * 2**20}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: waited.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append("last"))
    recorder.device = torch.device("cuda")

    def unit() -> None:
        now[0] += 0.004

    row = recorder.variant(recorder.case("c", "w", {}), "a", lambda: unit)
    assert row.ms == pytest.approx([4.0] * 20)
    assert row.peak_mib == 7.0


@pytest.mark.parametrize("trains", [False, True])
def test_ways_to_one_number_agree(trains: bool) -> None:
    given = head.inputs(40, 16, 300, torch.float32, torch.device("cpu"))
    for ours, theirs in ((head.ours, head.materialised), (head.ours_joint, head.materialised_joint)):
        one, other = (head.stepping(given, way, trains=trains)() for way in (ours(), theirs))
        assert one == pytest.approx(other, rel=1e-4)
    head.products(given, (2, 2))()


def case(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"name": name, "what": "the work", "shape": {"n": 3}, "note": "", "per": "", "rows": rows, **more}


def row(name: str, *ms: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "skipped": "", "ms": list(ms), "peak_mib": 7.4, "facts": {}, "differs": "", **more}


def test_a_table_by_hand() -> None:
    rows = [
        row("ours", 1.0, 2.0, 9.0),
        row("theirs", 4.0, 4.0, 4.0, differs="grad 1, not 2"),
        row("peer", skipped="absent"),
    ]
    assert page.table(case("c", rows)).splitlines()[2:] == [
        "| ours | 2.00 (1.00 to 9.00) | 1.00 | 7 | 3 |  |",
        "| theirs | 4.00 (4.00 to 4.00) | 2.00 | 7 | 3 | differs: grad 1, not 2 |",
        "| peer | | | | | absent |",
    ]
    per = [row("ours", 2.0, facts={"tokens": 10.0}), row("theirs", 2.0, facts={"tokens": 5.0})]
    assert "| theirs | 2.00 (2.00 to 2.00) | 2.00 |" in page.table(case("c", per, per="tokens"))
    unfinished = [row("ours", skipped="failed: X"), row("theirs", 2.0)]
    assert "| theirs | 2.00 (2.00 to 2.00) |  | 7 |" in page.table(case("c", unfinished))
    assert "| ours | 1.0e-03 |" in page.table(case("accuracy", [row("ours", facts={"error": 1e-3})]))


def test_aims_by_hand() -> None:
    cases = [
        case("joint, 2048 wide", [row("rlft", 10.0), row("bare matrix products of the op (4)", 8.5)]),
        case("GRPO step, LoRA", [row("rlft grpo", 10.0), row("TRL GRPOTrainer", 25.0)]),
        case("log-probs, 2048 wide", [row("rlft", 10.0), row("TRL ChunkedLogProbFunction", skipped="absent")]),
        case("update", [row("shared", 10.0), row("rlft, layout padded", 27.0)], shape={"bound": 3.0}),
    ]
    assert page.aims(cases).splitlines()[2:] == [
        "| joint op against its own matrix products | joint, 2048 wide | at most 1.25x its time | 1.18x | reached |",
        "| GRPO step against TRL with generate | GRPO step, LoRA | 3x | 2.50x | missed |",
        "| shared prompts | update | 2.55x | 2.70x | reached |",
    ]


def test_without_a_gpu_it_says_so(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (([], "there is no CUDA device here; --quick runs"), (["--minutes", "0"], "must be > 0")):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert said in capsys.readouterr().err


def test_a_part_that_hangs_or_dies_costs_its_own_figures(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    seen = []

    def run(line: list[str], timeout: float, **_: Any) -> Any:
        part, path = line[line.index("--part") + 1], Path(line[line.index("--json") + 1])
        seen.append(part)
        path.write_text(json.dumps({"cases": [case(part, [row("ours", 1.0)])], "failed": []}))
        if part == "head":
            raise command.subprocess.TimeoutExpired(line, timeout)
        return type("Done", (), {"returncode": -11 if part == "sharing" else 0})()

    monkeypatch.setattr(command.subprocess, "run", run)
    record = command.main(["--quick", "--output", str(tmp_path)])
    assert seen == list(command.PARTS)
    assert [c["name"] for c in record["cases"]] == seen
    assert record["failed"] == ["head: stopped after 170 s", "sharing: its process ended with -11"]
    assert json.loads((tmp_path / "benchmarks-gpu.json").read_text()) == record
    assert not (tmp_path / "benchmarks-gpu.md").exists()  # no GPU ran
    text = page.page(record)
    assert "- sharing: its process ended with -11" in text


def test_need_names_the_package() -> None:
    with pytest.raises(Skipped, match="no_such_module cannot be imported"):
        need("no_such_module")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_command_at_tiny_sizes(tmp_path: Path) -> None:
    record = command.main(["--quick", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "benchmarks-gpu.json").read_text()) == record
    assert not record["failed"], record["failed"]
    for made in record["cases"]:
        ours = made["rows"][0]
        assert not ours["skipped"], (made["name"], ours["skipped"])
        assert not [r["name"] for r in made["rows"] if r["differs"]]
    assert {"joint, 16 wide", "accuracy", "sampling, ragged", "DPO step, LoRA", "GRPO step, LoRA"} <= {
        made["name"] for made in record["cases"]
    }
    assert not (tmp_path / "benchmarks-gpu.md").exists()
    assert not re.search(r"/(home|root|tmp|work)/", (tmp_path / "benchmarks-gpu.json").read_text())
