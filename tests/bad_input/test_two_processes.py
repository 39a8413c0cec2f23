"""The bad inputs on two processes: each ends on both, in the same way and with its words, whether both meet it or one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import _two, _two_runs
from tests.bad_input._two_case import CASES, GONE, Case
from tests.bad_input.common import ANSWERS, MODEL, RANKED, trainer
from tests.bad_input.test_all_rows import ROWS
from tests.launch import ROOT, launch

#: Rows of the table that do not run on two processes, with the reason.
LISTED: dict[int, str] = {}
#: Rows whose bad input one process cannot meet alone, with the reason.
NEVER_ALONE: dict[int, str] = {
    **dict.fromkeys(
        (46, 47, 48, 49, 50, 51, 52, 54, 55, 56),
        "settings are read before the processes meet; 53 shows a process whose settings alone are refused, and the cases "
        "'differs' processes whose settings are fine but not the same",
    ),
    80: "settings and data of one process alone are other ones than those of process 0: the cases 'differs' and 'here'",
    81: "the number of processes is one number",
}
#: A few of each kind, for every run of the tests; the others are slow.
QUICK = (
    "05 empty prompt, second", "05 empty prompt skipped, second", "17 broken line, second", "20 evaluation of 1 pairs, both",
    "32 reward head newly made, second", "34 NaN, first", "36 all None for 2 steps here, second", "40 raises, second",
    "62 adapter keys unmatched, second", "66 mask of numbers in sft, second", "67 wrong shape, first", "69 -inf, second",
    "70 NaN that is masked, second", "70 nothing wrong, both", "78 newest checkpoint damaged there, second",
    "84 out of memory, second", "00 other rows, second", "00 other answers for the reward, second",
    "80 another config of the model, both", "00 learning rate differs, second",
)  # fmt: skip


def run(folder: Path, names: list[str], timeout: float) -> dict[str, list[dict[str, Any]]]:
    """Name -> what each rank met. One start of two processes; a case that hangs ends them with a stack dump."""
    (folder / "cases.json").write_text(json.dumps(names))
    launch("tests.bad_input._two", folder, 2, timeout=timeout)
    ranks = [[json.loads(line) for line in (folder / f"said{r}.jsonl").read_text().splitlines()] for r in (0, 1)]
    assert [[line["name"] for line in lines] for lines in ranks] == [names, names]
    return {name: [zero, one] for name, zero, one in zip(names, *ranks, strict=True)}


def faults(case: Case, lines: list[dict[str, Any]]) -> list[str]:
    """What is not as the case says; empty when all is well."""
    wrong = []
    ends = ["trains" if not line["said"] else "refused" for line in lines]
    if ends[0] != ends[1] or case.end not in ("either", ends[0]):
        return [f"expected {case.end} on both, got {ends}"]
    for rank, line in enumerate(lines):
        if ends[rank] == "refused" and case.end != "either":
            words = case.expects(rank)
            wrong += [f"{word!r} is not in what {rank} says" for word in words if word not in line["said"]]
            if not words and not any(sign in line["said"].lower() for sign in GONE):
                wrong.append(f"{rank} does not say that it is alone")
        if line["seconds"] > _two.PATIENCE / 2:
            wrong.append(f"{rank} took {line['seconds']:.0f} s")
        if case.at is not None and (line["step"], line["saved"]) != (case.at, f"checkpoint-{case.at}"):
            wrong.append(f"{rank} ends at step {line['step']} with {line['saved']}, expected {case.at}")
    if case.warns and not any(all(w in text for w in case.warns) for line in lines for text in line["heard"]):
        wrong.append(f"nobody warns of {case.warns}: {[line['heard'] for line in lines]}")
    if case.at is not None and lines[0]["weights"] != lines[1]["weights"]:
        wrong.append("the processes end with different weights")
    if not case.words and case.end == "refused":
        wrong.append("the case does not say which words it expects")
    return wrong


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    wrong = []
    for name, lines in found.items():
        if problems := faults(CASES[name], lines):
            said = [f"  {rank}: {line['said'][:300]!r}" for rank, line in enumerate(lines)]
            wrong.append("\n".join([f"{name}: {'; '.join(problems)}", *said]))
    assert not wrong, "\n".join(wrong)
    clean = found.get("70 nothing wrong, both", [{}])[0]
    for name in found:
        if name.startswith("70 NaN that is masked, "):
            assert found[name][0]["value"] == clean["value"], "what is masked changed the weights"


@pytest.mark.timeout(300)
def test_some_bad_inputs_on_two_processes(tmp_path: Path) -> None:
    check(run(tmp_path, list(QUICK), timeout=280))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_bad_input_on_two_processes(tmp_path: Path) -> None:
    _two_runs.stopped(trainer(tmp_path / "first", "rloo", RANKED, beta=0.1, save_steps=1))
    (tmp_path / "first" / "run").rename(tmp_path / _two_runs.BY_ONE)
    found = run(tmp_path, list(CASES), timeout=1700)
    check(found)
    orders = [line["value"] for line in found["74 rows in another order in agro_off_policy, second"]]
    assert orders[0] == pytest.approx(orders[1], rel=1e-12)


def test_every_row_runs_on_two_processes_or_is_listed() -> None:
    """84 of 84, and each of them met by one process alone, where it can be."""
    rows = {case.row for case in CASES.values()} - {0}
    assert rows | LISTED.keys() == set(range(1, ROWS + 1))
    assert not rows & LISTED.keys()
    alone = {case.row for case in CASES.values() if case.whose != "both"} - {0}
    assert alone | NEVER_ALONE.keys() | LISTED.keys() == set(range(1, ROWS + 1))
    assert not alone & NEVER_ALONE.keys()
    assert all([*LISTED.values(), *NEVER_ALONE.values()])
    assert set(QUICK) <= set(CASES)


# -- under the launcher ---------------------------------------------------------------------------------------------------
def launched(folder: Path, *settings: str) -> tuple[int, str]:
    """``rlft train`` on two processes under torch's launcher; its exit code, and all that was printed."""
    rows = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    for rank in (0, 1):
        (folder / f"rows{rank}.jsonl").write_text(rows)
    base = {
        "objective": "sft", "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(folder / "rows${RANK}.jsonl"),
        "max_steps": 2, "per_device_train_batch_size": 4, "output_dir": str(folder / "run"), "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(base))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rlft.cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "train", str(folder / "run.yaml"), *settings],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_launcher_shows_what_is_wrong(tmp_path: Path) -> None:
    """Settings that are refused before processes meet, and a file and a reward that fail on one of them."""
    assert launched(tmp_path)[0] == 0, "without anything bad the command trains"
    code, said = launched(tmp_path, "learning_rat=0.1", f"output_dir={tmp_path / 'b'}")
    assert code != 0
    assert "rlft: unknown setting 'learning_rat'; did you mean 'learning_rate'?" in said
    code, said = launched(tmp_path, f"train_data={tmp_path}/rows${{RANK}}1.jsonl", f"output_dir={tmp_path / 'c'}")
    assert code != 0
    assert "rows01.jsonl" in said
    (tmp_path / "own.py").write_text(
        "import os\n\n\ndef own(completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n        raise OSError('gone')\n    return [0.5] * len(completions)\n"
    )
    code, said = launched(
        tmp_path, "objective=rloo", "beta=0.0", "num_generations=4", f"rewards=[{tmp_path}/own.py:own]",
        "max_completion_length=4", f"output_dir={tmp_path / 'd'}",
    )  # fmt: skip
    assert code != 0
    assert (
        "rlft: reward function 'own' raised OSError: gone at step 1, for row 0, found by scoring rows one by one"
        in said
    )
    assert (tmp_path / "d" / "checkpoint-0").is_dir(), "both processes save before they leave"
