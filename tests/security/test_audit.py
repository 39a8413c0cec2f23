"""Nothing that is loaded or verified is run: an audit hook over every door, with sound inputs and with hostile ones."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer, cli
from rlft.config import load_config
from rlft.errors import Interrupted
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
    _prepare_more(folder, settings)
    trainer(folder / "rewards", "bradley_terry", PAIRS, model=model, processing_class=model, max_steps=1).train()
    (folder / "rewards" / "run").rename(folder / "scorer")


def _prepare_more(folder: Path, settings: dict[str, Any]) -> None:
    """Streams, precomputed log-probs, critics, an online run stopped inside a generation, a reward file, a hub dataset."""

    def written(name: str, **changes: Any) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps({**settings, "output_dir": str(folder / name), **changes}))
        return path

    written("stream", streaming=True, tokenizer=str(folder / "run" / "model"))
    written("workers", streaming=True, tokenizer=str(folder / "run" / "model"), dataloader_num_workers=1)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    kept = {
        "objective": "dpo",
        "beta": 0.1,
        "train_data": str(folder / "pairs.jsonl"),
        "precompute_ref_log_probs": True,
    }
    kept |= {"ref_cache_dir": str(folder / "cache")}
    assert cli.main(["train", str(written("computed", **kept))]) == 0
    written("cached", **kept)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ANSWERS))
    sampled = {
        "train_data": str(folder / "prompts.jsonl"), "rewards": [{"name": "length", "target": 4}], "num_generations": 4,
        "per_device_train_batch_size": 8, "model": str(folder / "run" / "model"), "tokenizer": str(folder / "run" / "model"),
    }  # fmt: skip
    for name, critic in (("shared", "shared"), ("own", str(folder / "run" / "model"))):
        assert cli.main(["train", str(written(name, objective="ppo", critic=critic, **sampled))]) == 0
    path = written(
        "online",
        objective="agro_off_policy",
        beta=0.1,
        num_iterations=2,
        replay_probability=0.5,
        max_steps=4,
        **sampled,
    )

    def stop(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        Trainer(args=load_config(path), callbacks=[stop]).train()
    names = {file.name for file in (folder / "online" / "checkpoint-3").iterdir()}
    assert {"replay.safetensors", "source.safetensors"} <= names
    (folder / "rewards.py").write_text(
        "def score(completions, **columns):\n    return [0.0] * len(completions)\n\n\n"
        "def judge(completions, opponents, **columns):\n    return [0.5] * len(completions)\n"
    )
    (folder / "hub").mkdir()
    (folder / "hub" / "train.jsonl").write_text((folder / "data" / "train.jsonl").read_text())


#: Doors that start a process of rlft's own, or run a file that the settings name: what is heard of them, and nothing else.
_WORKERS = (
    r"subprocess\.Popen .*from rlft import _workers; _workers\.serve\(\)|"
    r"pickle\.find_class .*\('(rlft\.[\w.]+|builtins|array)', "
)
OWN = {
    "streaming with workers": _WORKERS,
    "workers of hostile text": _WORKERS,
    "symbolic checker": r"subprocess\.Popen .*'-I', '[^']*/rlft/rewards/symbolic_worker\.py', '1024', '1\.0'\]",
    "reward file": r"(exec|compile) '[^']*/rewards\.py' called in '<frozen importlib",
}


def others(found: dict[str, Any]) -> dict[str, list[str]]:
    """Door -> what was heard of it beyond its own."""
    heard = {
        name: [event for event in door["heard"] if name not in OWN or not re.match(OWN[name], event)]
        for name, door in found.items()
    }
    return {name: events for name, events in heard.items() if events}


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
    assert len(result["sound"]) >= 25
    assert others(result["sound"]) == {}
    assert {
        name: found["said"] for name, found in result["sound"].items() if not found["said"].startswith("returned")
    } == {}


def test_hostile_inputs_run_nothing(result: dict[str, Any]) -> None:
    assert len(result["hostile"]) >= 27
    assert others(result["hostile"]) == {}
    assert result["touched"] is False


def test_hostile_inputs_are_refused(result: dict[str, Any]) -> None:
    """Text in a cell is text, whatever it says; the doctor names what is broken; commands give exit code 2.

    Log-probs that cannot be read are computed anew. The checker says None, or False.
    """
    harmless = {"formulas", "data data.csv", "doctor of pickles", "symbolic checker", "reference log-probs of pickles"}
    harmless |= {"stream of hostile text", "workers of hostile text"}
    passed = {name: f["said"] for name, f in result["hostile"].items() if f["said"].startswith("returned")}
    assert {name for name in passed if passed[name] not in ("returned 1", "returned 2")} <= harmless, passed
    assert passed["sealed checkpoint of pickles"] == "returned 1"
    assert "True" not in result["hostile"]["symbolic checker"]["said"]
    for name in ("value head of pickles", "hub dataset that is a script"):
        assert result["hostile"][name]["said"].startswith("ValueError: "), name


def test_a_thousand_hostile_answers_run_nothing_in_bounded_time(result: dict[str, Any]) -> None:
    assert result["answers"] == []
    assert result["slowest"] < 5.0  # ten answers, by nine rewards, as answer and as reference


def test_own_processes_are_heard(result: dict[str, Any]) -> None:
    """So the doors were gone through: workers were started, sympy's process, and the file that the settings name."""
    for name in OWN:
        kind = "hostile" if name == "workers of hostile text" else "sound"
        assert any(re.match(OWN[name], event) for event in result[kind][name]["heard"]), name
    runs = ("resume", "online resume", "streaming", "streaming with workers", "reference log-probs")
    assert {name: result["sound"][name]["said"] for name in runs} == dict.fromkeys(runs, "returned 0")


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
