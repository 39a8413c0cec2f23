"""The command line: what it prints, what it returns, and that errors are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlft import cli, recipes
from rlft.demo import MODEL, digit_rows

FEW = [{key: row[key] for key in ("prompt", "completion")} for row in digit_rows(8, seed=0)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in FEW))
    path = tmp_path / "run.yaml"
    text = {
        "objective": "sft", "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(data), "max_steps": 2,
        "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "run"), "report_to": [],
    }  # fmt: skip
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def test_train_shows_the_run_and_finishes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "learning_rate=0.001"]) == 0
    out = capsys.readouterr().out
    for part in (
        "objective",
        "sft",
        "averaging",
        "token_mean",
        "8 prompt_completion rows",
        "lr 0.001",
        "step 2/2",
        "done: 2 steps",
    ):
        assert part in out
    assert (config.parent / "run" / "model" / "config.json").exists()
    assert cli.main(["train", str(config), "learning_rate=0.001"]) == 0
    assert "this run is complete" in capsys.readouterr().out


def test_dry_run_trains_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "--dry-run"]) == 0
    assert "tokens per step" in capsys.readouterr().out
    assert not (config.parent / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bta=1"], "did you mean 'beta'"),
        (["objective=spt"], "objective 'spt' is unknown"),
        (["train_data=nowhere.jsonl"], "nowhere.jsonl"),
        (["train_data=${NO_SUCH_VARIABLE}/x.jsonl"], "environment variable that is not set"),
        (["rewards=[math]"], "uses no rewards"),
        (["columns={prompt: question}"], "question"),
    ],
)
def test_errors_are_one_plain_line(
    config: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert cli.main(["train", str(config), *settings]) == cli.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_traceback_on_request(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "bta=1", "--traceback"]) == cli.REFUSED
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "did you mean" in error.splitlines()[-1]


def test_fields_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from rlft.config import Config

    assert cli.main(["train", "--fields"]) == 0
    out = capsys.readouterr().out
    assert all(field.name in out for field in fields(Config))


def test_objectives_come_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["objectives", "--markdown"]) == 0
    page = capsys.readouterr().out
    for name in recipes.names():
        assert name in table
        assert f"`{name}`" in page
    assert cli.main(["objectives", "agro_off_policy"]) == 0
    assert "arXiv 2503.19612" in capsys.readouterr().out
    assert cli.main(["objectives", "agro_of_policy"]) == cli.REFUSED
    assert "did you mean 'agro_off_policy'" in capsys.readouterr().err


def test_doctor(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", str(config)])
    capsys.readouterr()
    assert cli.main(["doctor", str(config.parent / "run")]) == 0
    out = capsys.readouterr().out
    assert "sound" in out
    assert "complete (2 steps)" in out
    (config.parent / "run" / "checkpoint-2" / "trainable.safetensors").write_bytes(b"x")
    assert cli.main(["doctor", str(config.parent / "run")]) == 1
    assert cli.main(["doctor", str(config.parent / "nothing")]) == cli.REFUSED


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "train" in capsys.readouterr().out
