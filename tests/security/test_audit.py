"""Nothing that is loaded or verified is run: an audit hook over every door, with sound inputs and with hostile ones."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer, cli
from tests.bad_input.common import ANSWERS, MODEL, PAIRS, trainer

ROOT = Path(__file__).parents[2]


def prepare(folder: Path) -> None:
    """Runs, models and data files as a user has them."""
    import pyarrow as pa
    import pyarrow.parquet

    data = folder / "data"
    data.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    (data / "train.jsonl").write_text(lines)
    (data / "rows.json").write_text(json.dumps(ANSWERS))
    (data / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ANSWERS)
    )
    table = pa.Table.from_pylist(ANSWERS)
    pyarrow.parquet.write_table(table, data / "rows.parquet")
    with pa.OSFile(str(data / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    (data / "folder").mkdir()
    (data / "folder" / "part.jsonl").write_text(lines)
    settings = {
        "objective": "sft", "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(data / "train.jsonl"), "max_steps": 1,
        "per_device_train_batch_size": 4, "max_prompt_length": 8, "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    assert cli.main(["train", str(folder / "run.yaml")]) == 0
    model = str(folder / "run" / "model")
    small = {**settings, "output_dir": str(folder / "lora"), "use_peft": True, "model": model}
    Trainer(args={**small, "tokenizer": model}).train()
    trainer(folder / "rewards", "bradley_terry", PAIRS, model=model, processing_class=model, max_steps=1).train()
    (folder / "rewards" / "run").rename(folder / "scorer")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("audit")
    for name in ("warm", "cold"):
        prepare(folder / name)
    # what looks for the network would be heard
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security._audited", str(folder), str(folder / "sentinel")],
        capture_output=True, text=True, timeout=560, check=False, cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_sound_inputs_are_read_and_nothing_runs(result: dict[str, Any]) -> None:
    assert len(result["sound"]) >= 15
    assert {name: found["heard"] for name, found in result["sound"].items() if found["heard"]} == {}
    assert {
        name: found["said"] for name, found in result["sound"].items() if not found["said"].startswith("returned")
    } == {}


def test_hostile_inputs_run_nothing(result: dict[str, Any]) -> None:
    assert len(result["hostile"]) >= 20
    assert {name: found["heard"] for name, found in result["hostile"].items() if found["heard"]} == {}
    assert result["touched"] is False


def test_hostile_inputs_are_refused(result: dict[str, Any]) -> None:
    """Text in a cell is text, whatever it says; the doctor names what is broken; commands give exit code 2."""
    harmless = {"formulas", "data data.csv", "doctor of pickles"}
    passed = {name: f["said"] for name, f in result["hostile"].items() if f["said"].startswith("returned")}
    assert {name for name in passed if passed[name] != "returned 2"} <= harmless, passed


def test_a_thousand_hostile_answers_run_nothing_in_bounded_time(result: dict[str, Any]) -> None:
    assert result["answers"] == []
    assert result["slowest"] < 5.0  # ten answers, by nine rewards, as answer and as reference


def test_the_hook_hears(result: dict[str, Any]) -> None:
    assert any("planted.py" in event for event in result["control"])


def listens(source: str) -> list[str]:
    """Ways to open a door to the network: servers, and calls that listen."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                n
                for n in names
                if n.split(".")[0] in {"socketserver", "http", "xmlrpc", "flask", "fastapi", "uvicorn", "zmq"}
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found += [node.func.attr] if node.func.attr in {"listen", "start_server", "create_server"} else []
        elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            found.append("0.0.0.0")
    return found


def test_the_library_opens_no_port() -> None:
    sources = sorted((ROOT / "src" / "rlft").rglob("*.py"))
    assert len(sources) > 100
    assert [(path.name, found) for path in sources if (found := listens(path.read_text(encoding="utf-8")))] == []
    assert listens("import http.server\ns.listen(5)\nrun('0.0.0.0')") == ["http.server", "listen", "0.0.0.0"]
