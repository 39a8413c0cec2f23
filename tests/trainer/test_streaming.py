"""Training rows that are read while training goes on: the same run after a stop, epochs, bad rows, refusals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlft.config import ConfigError
from rlft.data import StreamOrder, stream_rows, tokenize_stream
from rlft.errors import Interrupted, TrainingError
from tests.tiny import char_tokenizer
from tests.trainer.common import PAIRS, PROMPTS, log_of, resumed_equals_whole, run

ROWS = [{"prompt": f"{i}=", "completion": "ab"[i % 2] * (1 + i % 3)} for i in range(10)]


def written(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(rows: Any, draws: int, steps: int, *, rank: int = 0, world: int = 1, **settings: Any) -> list[str]:
    """The prompts of these steps."""
    tokenizer = char_tokenizer()
    order = StreamOrder(tokenize_stream(rows, tokenizer, **settings).open(rank, world), draws)
    return [tokenizer.decode(e.prompt_ids) for _ in range(steps) for e in next(order)]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("objective", "rows", "extra"),
    [
        ("sft", ROWS, {"shuffle_buffer": 4}),
        ("sft", ROWS, {}),
        ("dpo", PAIRS, {"beta": 0.1, "shuffle_buffer": 3}),
        ("grpo", PROMPTS, {"beta": 0.1, "num_iterations": 2, "shuffle_buffer": 3}),
    ],
    ids=["sft shuffled", "sft in order", "dpo", "grpo"],
)
def test_a_resume_changes_no_bit(
    tmp_path: Path, objective: str, rows: list[Any], extra: dict[str, Any], stop: int
) -> None:
    """Six steps of four or more rows: past the end of the data, more than once."""
    path = written(tmp_path, rows)
    resumed_equals_whole(
        tmp_path, objective, stop, rows=str(path), online=objective == "grpo", streaming=True, max_steps=6, **extra
    )


def test_every_row_is_trained_on_once_an_epoch(tmp_path: Path) -> None:
    rows = stream_rows(written(tmp_path, ROWS))
    expected = [row["prompt"] for row in ROWS]
    assert drawn(rows, 5, 4) == expected * 2
    shuffled = drawn(rows, 5, 4, shuffle_buffer=6, seed=3)
    assert sorted(shuffled[:10]) == sorted(shuffled[10:]) == sorted(expected)
    assert shuffled[:10] != expected
    assert shuffled[:10] != shuffled[10:]


def test_processes_share_the_rows(tmp_path: Path) -> None:
    rows = stream_rows(written(tmp_path, ROWS))
    shares = [drawn(rows, 5, 1, rank=rank, world=2, shuffle_buffer=4, seed=1) for rank in range(2)]
    assert not set(shares[0]) & set(shares[1])
    assert set(shares[0]) | set(shares[1]) == {row["prompt"] for row in ROWS}


def test_sources(tmp_path: Path) -> None:
    """Files by name and by pattern, parquet, iterables, functions; renamed columns."""
    import pyarrow
    import pyarrow.parquet

    written(tmp_path / "parts", ROWS[:4], "a.jsonl")
    written(tmp_path / "parts", ROWS[4:], "b.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=3)

    def generate() -> Iterator[dict[str, Any]]:
        yield from ROWS

    for source in (str(tmp_path / "parts" / "*.jsonl"), tmp_path / "rows.parquet", ROWS, generate):
        assert [dict(row) for row in stream_rows(source)()] == ROWS
    renamed = stream_rows(ROWS, columns={"prompt": "completion", "completion": "prompt"})
    assert next(renamed()) == {"prompt": "a", "completion": "0="}
    with pytest.raises(ValueError, match="a column that is not there"):
        next(stream_rows(ROWS, columns={"prompt": "question"})())


def test_a_file_larger_than_what_is_held_is_not_read_ahead(tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        while True:
            read += 1
            yield {"prompt": f"{read % 10}=", "completion": "a"}

    t = run(tmp_path, "sft", online=False, rows=endless, streaming=True, max_steps=3)
    t.train()
    assert t.step == 3
    assert read < 400  # the rows that are looked at before, and those of three steps


def test_a_broken_line_stops_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """300 rows are more than are looked at before the first step."""
    rows = [ROWS[i % 10] for i in range(300)]
    path = written(tmp_path, rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:280], '{"prompt": ', *lines[281:]]) + "\n")
    settings = {
        "rows": str(path),
        "streaming": True,
        "max_steps": 5,
        "per_device_train_batch_size": 64,
        "save_steps": 1,
    }
    t = run(tmp_path, "sft", online=False, **settings)
    with pytest.raises(
        TrainingError, match=r"cannot be read on, 280 rows into epoch 1: .*rows\.jsonl:281: broken JSON"
    ):
        t.train()
    assert t.step == 4
    path.write_text("\n".join(lines) + "\n")
    t = run(tmp_path, "sft", online=False, **settings)
    t.train()
    assert t.step == 5
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_bad_rows_are_skipped_and_too_many_refused(tmp_path: Path) -> None:
    few = [*ROWS, {"prompt": "7=", "completion": ""}]
    found = tokenize_stream(stream_rows(few), char_tokenizer(), max_bad_fraction=0.2)
    assert (found.report.rows, found.report.kept) == (11, 10)
    with pytest.raises(ValueError, match="max_bad_fraction"):
        tokenize_stream(stream_rows(few), char_tokenizer(), max_bad_fraction=0.05)


def test_rows_skipped_after_the_first_ones_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In each line of the log, at the end in words, and in the summary; with and without a stop the same."""
    rows = [{"prompt": f"{i % 10}=", "completion": "" if i in (270, 300) else "a"} for i in range(400)]
    path = written(tmp_path, rows)
    settings = {"streaming": True, "max_steps": 6, "per_device_train_batch_size": 60}
    caplog.set_level("INFO", "rlft")
    resumed_equals_whole(tmp_path, "sft", 5, rows=str(path), online=False, **settings)
    for folder in ("whole", "cut"):
        lines = log_of(tmp_path / folder)
        assert [line["data/skipped_rows"] for line in lines] == [0, 0, 0, 0, 2, 2]
        assert [line["data/rows"] for line in lines] == [60, 120, 180, 240, 302, 362]
        data = json.loads((tmp_path / folder / "run" / "summary.json").read_text())["data"]
        assert data == {"rows": 362, "kept": 360, "skipped": {"empty completion": 2}, "format": "prompt_completion"}
    said = capsys.readouterr().out + caplog.text
    assert said.count("2 of 362 streamed rows were skipped: 2 empty completion (first: row 270)") == 2


def test_rows_that_are_held_are_not_counted_as_streamed(tmp_path: Path) -> None:
    run(tmp_path, "sft", online=False, rows=ROWS, max_steps=1).train()
    assert not [name for name in log_of(tmp_path)[0] if name.startswith("data/")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_changed_before_the_place_is_refused(tmp_path: Path, workers: int) -> None:
    """300 rows in: more than the first ones, of which a hash is kept in any case."""

    def rows(answer: str) -> list[dict[str, str]]:
        return [{"prompt": f"{i % 10}=", "completion": answer if i == 290 else "a"} for i in range(400)]

    path = written(tmp_path, rows("a"))
    settings = {"rows": str(path), "streaming": True, "max_steps": 6, "per_device_train_batch_size": 60}
    settings |= {"dataloader_num_workers": workers, "self_checks": False}

    def stop(event: str, t: Any, values: Any) -> None:
        if event == "step" and t.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path, "sft", online=False, callbacks=[stop], **settings).train()
    written(tmp_path, rows("b"))
    words = r"the first 300 rows of epoch 1 are not those .* accept_changed: \[data\]"
    with pytest.raises((ValueError, TrainingError), match=words):
        run(tmp_path, "sft", online=False, **settings).train()
    t = run(tmp_path, "sft", online=False, accept_changed=["data"], **settings)
    t.train()
    assert t.step == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shuffle_buffer": 10}, "shuffle_buffer does nothing without streaming"),
        ({"streaming": True, "max_steps": None}, "set max_steps"),
        ({"streaming": True, "num_train_epochs": 2.0}, "drop num_train_epochs"),
        ({"streaming": True, "eval_fraction": 0.2}, "eval_fraction needs all training rows"),
        ({"streaming": True, "train_slice": [0, 0.5]}, "train_slice needs all training rows"),
        ({"streaming": True, "shuffle_buffer": 0}, "shuffle_buffer=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, "sft", online=False, rows=ROWS, **{"max_steps": 2, **settings})


def test_sources_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    for source, words in (
        (str(tmp_path / "rows.csv"), "cannot be read row by row"),
        (str(tmp_path / "none.jsonl"), "no file to stream from"),
        (iter(ROWS), "gone through once"),
        (7, "cannot stream rows from a int"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, "sft", online=False, rows=source, streaming=True, max_steps=2)


def test_a_stream_trains_what_the_rows_say(tmp_path: Path) -> None:
    """A step that takes all rows has the loss that it has with the rows in memory."""
    losses = []
    kinds: dict[str, dict[str, Any]] = {"stream": {"streaming": True}, "memory": {}}
    for name, extra in kinds.items():
        run(
            tmp_path / name, "sft", online=False, rows=ROWS, max_steps=1, per_device_train_batch_size=10, **extra
        ).train()
        losses.append(log_of(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
