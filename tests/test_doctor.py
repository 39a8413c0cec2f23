"""``rlft doctor`` against what a start really does, in every state in which a run's folder can be left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer, cli
from rlft._json import loads
from rlft.checkpoint import CheckpointError, CheckpointVersionError
from rlft.checkpoint._manifest import _sealed
from rlft.doctor import diagnose, survey
from rlft.errors import Interrupted
from rlft.runlock import RunLock, RunLockError
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
ID = "a" * 32


def run(folder: Path, *, stop: int | None = None, **extra: Any) -> Trainer:
    def callback(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {
        "objective": "dpo", "beta": 0.1, "output_dir": str(folder), "max_steps": 4, "save_steps": 1, "save_total_limit": 3,
        "per_device_train_batch_size": 4, "max_prompt_length": 8, "max_completion_length": 4, "disable_tqdm": True,
        "report_to": [], "self_checks": False, "learning_rate": 1e-2, **extra,
    }  # fmt: skip
    model = tiny_llama(hidden_size=16, num_hidden_layers=1)
    return Trainer(model, settings, train_dataset=PAIRS, processing_class=char_tokenizer(), callbacks=[callback])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that was stopped after step 3, and one that is complete; for copies."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.raises(Interrupted):
        run(folder / "stopped", stop=3).train()
    run(folder / "complete").train()
    return {name: folder / name for name in ("stopped", "complete")}


def copied(made: dict[str, Path], tmp_path: Path, name: str = "stopped") -> Path:
    """A folder as it was left. Settings name no folder that decides anything."""
    return Path(shutil.copytree(made[name], tmp_path / "run"))


def outcome(folder: Path) -> tuple[str, int | None]:
    """What a start does: its kind, and the step it goes on from."""
    steps: list[int] = []
    t = run(folder)
    t.callbacks.append(lambda event, t, values: steps.append(t.step) if event == "step" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            t.train()
        except (CheckpointError, RunLockError, ValueError):
            return "refused", None
    if not steps:
        return "complete", t.step
    return ("begins", None) if steps[0] == 1 else ("continues", steps[0] - 1)


def damage(folder: Path, step: int) -> None:
    path = folder / f"checkpoint-{step}" / "trainable.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def newer(folder: Path, step: int) -> None:
    path = folder / f"checkpoint-{step}" / "manifest.json"
    body = {key: value for key, value in loads(path.read_bytes()).items() if key != "seal"}
    path.write_bytes(_sealed({**body, "version": 99}))


def aside(folder: Path, step: int, number: str = ID) -> None:
    (folder / f"checkpoint-{step}").rename(folder / f".old-{step}-{number}")


def each(*actions: Callable[[Path], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for action in actions:
            action(folder)

    return act


def log(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return act


def gone(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def linked(folder: Path) -> None:
    (folder / "checkpoint-3").rename(folder / "elsewhere")
    (folder / "checkpoint-3").symlink_to(folder / "elsewhere")


def leftovers(folder: Path) -> None:
    for name in (f".tmp-4-{ID}", f".del-1-{ID}", ".tmp-model", ".old-model"):
        (folder / name).mkdir()
        (folder / name / "x").write_text("x")
    (folder / f".tmp-config.json-{ID}").write_text("{")


STATES: dict[str, tuple[str, Callable[[Path], None], tuple[str, int | None]]] = {
    "as it was left": ("stopped", each(), ("continues", 3)),
    "newest damaged": ("stopped", lambda f: damage(f, 3), ("continues", 2)),
    "two damaged": ("stopped", each(lambda f: damage(f, 3), lambda f: damage(f, 2)), ("continues", 1)),
    "all damaged": ("stopped", each(*(lambda f, s=s: damage(f, s) for s in (1, 2, 3))), ("refused", None)),
    "newest of a newer format": ("stopped", lambda f: newer(f, 3), ("refused", None)),
    "an older one of a newer format": ("stopped", lambda f: newer(f, 2), ("continues", 3)),
    "damaged, then a newer format": ("stopped", each(lambda f: damage(f, 3), lambda f: newer(f, 2)), ("refused", None)),
    "newest set aside": ("stopped", lambda f: aside(f, 3), ("continues", 3)),
    "only one, set aside": (
        "stopped",
        each(lambda f: aside(f, 3), gone("checkpoint-2"), gone("checkpoint-1")),
        ("continues", 3),
    ),
    "set aside and damaged": ("stopped", each(lambda f: damage(f, 3), lambda f: aside(f, 3)), ("continues", 2)),
    "set aside and written anew": (
        "stopped",
        lambda f: shutil.copytree(f / "checkpoint-3", f / f".old-3-{ID}"),
        ("continues", 3),
    ),
    "set aside under another step": (
        "stopped",
        lambda f: (f / "checkpoint-3").rename(f / f".old-9-{ID}"),
        ("continues", 2),
    ),
    "renamed to another step": ("stopped", lambda f: (f / "checkpoint-3").rename(f / "checkpoint-8"), ("continues", 2)),
    "unfinished newest": ("stopped", gone("checkpoint-3/manifest.json"), ("continues", 2)),
    "newest is a link": ("stopped", linked, ("continues", 2)),
    "no checkpoints": ("stopped", each(*(gone(f"checkpoint-{s}") for s in (1, 2, 3))), ("begins", None)),
    "leftovers of kills": ("stopped", leftovers, ("continues", 3)),
    "log gone": ("stopped", gone("metrics.jsonl"), ("continues", 3)),
    "log cut short": ("stopped", log(lambda lines: lines[:1]), ("continues", 3)),
    "log with half a line": ("stopped", log(lambda lines: [*lines, '{"step": 4, "lo']), ("continues", 3)),
    "log with a line more": ("stopped", log(lambda lines: [*lines, '{"step": 4}\n']), ("continues", 3)),
    "log with garbage at its end": ("stopped", log(lambda lines: [*lines, "garbage\n"]), ("refused", None)),
    "log with garbage in the middle": ("stopped", log(lambda lines: ["garbage\n", *lines]), None),  # type: ignore[dict-item]
    "run.json gone": ("stopped", gone("run.json"), ("continues", 3)),
    "run.json garbage": ("stopped", lambda f: (f / "run.json").write_text("garbage"), ("refused", None)),
    "summary and config gone": ("stopped", each(gone("summary.json"), gone("config.json")), ("continues", 3)),
    "complete": ("complete", each(), ("complete", 4)),
    "complete, model gone": ("complete", gone("model"), ("complete", 4)),
    "complete, newest damaged": ("complete", lambda f: damage(f, 4), ("continues", 3)),
    "complete, set aside": ("complete", lambda f: aside(f, 4), ("complete", 4)),
    "complete, log garbage": ("complete", log(lambda lines: ["garbage\n", *lines, "garbage\n"]), ("complete", 4)),
}


@pytest.mark.parametrize("name", STATES)
def test_the_doctor_says_what_a_start_does(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    kind, act, expected = STATES[name]
    folder = copied(made, tmp_path, kind)
    act(folder)
    before = contents(folder)
    verdict = diagnose(folder)
    said = (verdict.kind, verdict.step)
    code = cli.main(["doctor", str(folder)])
    assert contents(folder) == before  # it changes nothing
    happened = outcome(folder)
    assert said == happened, verdict.text
    if expected is not None:
        assert happened == expected
    assert code == (0 if happened[0] in ("continues", "complete") else 1)


def contents(folder: Path) -> dict[str, tuple[Any, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    cli.main(["doctor", str(folder)])
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())


def test_it_shows_settings_versions_and_the_model(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    said = shown(copied(made, tmp_path, "complete"), capsys)
    for word in (
        "objective='dpo'",
        "beta=0.1",
        "max_steps=4",
        f"torch {torch.__version__}",
        "policy: in memory",
        "MiB in",
    ):
        assert word in said
    assert "max_grad_norm" not in said  # at its default
    assert "installed now" not in said
    assert "not exported yet" in shown(made["stopped"], capsys)
    monkeypatch.setattr("rlft.run.keep.record.versions", lambda device: {"torch": "9.9", "device": "cpu"})
    assert f"installed now: torch {torch.__version__} -> 9.9" in shown(made["stopped"], capsys)


def test_it_tells_of_a_run_that_holds_the_folder(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(made, tmp_path)
    with RunLock(folder):
        assert diagnose(folder).kind == "refused"
        said = shown(folder, capsys)
        assert f"in use by process {os.getpid()}" in said
        assert "then: the same command continues from step 3" in said
    assert diagnose(folder).kind == "continues"


def test_a_live_process_is_told_and_not_disturbed(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    code = "import sys, time; from rlft.runlock import RunLock; RunLock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            text = diagnose(folder).text
            assert f"in use by process {other.pid} on " in text
            assert "lives on" not in text
        finally:
            other.kill()
    deadline = time.monotonic() + 10
    while diagnose(folder).kind == "refused" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert diagnose(folder).kind == "continues"


def test_what_it_lists(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = copied(made, tmp_path)
    damage(folder, 2)
    newer(folder, 1)
    aside(folder, 3)
    leftovers(folder)
    assert [(item.step, item.state, item.aside) for item in survey(folder)] == [
        (3, "sound", True), (2, "damaged", False), (1, "newer", False),
    ]  # fmt: skip
    said = shown(folder, capsys)
    assert "set aside by a killed save" in said
    assert "left by a killed run, cleared or put back at the next start: .del-1-" in said
    assert " and 3 more" in said


def test_a_folder_with_nothing_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").touch()
    assert cli.main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "starts from the beginning" in out
    assert "metrics.jsonl: not there" in out


def test_a_run_that_is_not_to_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, stop=2, resume="never").train()
    verdict = diagnose(tmp_path)
    assert (verdict.kind, verdict.code) == ("refused", 1)
    assert "with resume: auto it continues from step 2" in verdict.text
    with pytest.raises(RunLockError):
        run(tmp_path, resume="never").train()
    assert outcome(tmp_path) == ("continues", 2)


def test_a_checkpoint_that_no_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from rlft import checkpoint

    checkpoint.save(tmp_path, 1, tensors={"model": {"w": torch.zeros(2)}}, records={}, config_hash="x", keep=None)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "was not written by a run" in capsys.readouterr().out


def test_what_files_say_steers_no_terminal(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(made, tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": "\\u001b[31m[bold]"}\n')
    (folder / "run.json").write_text("\x1b[31m")
    said = shown(folder, capsys)
    assert "\x1b[31m" not in said


def test_a_newer_format_is_what_a_start_says(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    newer(folder, 3)
    with pytest.raises(CheckpointVersionError) as raised:
        run(folder).train()
    assert str(raised.value) in diagnose(folder).text
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 4
