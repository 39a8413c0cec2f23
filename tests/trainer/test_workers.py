"""Runs whose rows are read and tokenised by worker processes: the same bits for any number of them, and clear ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer
from rlft.config import Config, ConfigError
from rlft.errors import DataError, Interrupted
from tests.launch import ROOT, launch
from tests.reliability.runs import MODEL
from tests.test_workers import gone
from tests.tiny import char_tokenizer
from tests.trainer.common import PAIRS, PROMPTS, bits, log_of, run
from tests.trainer.test_streaming import ROWS, written


def settings_of(kind: str, path: Path) -> dict[str, Any]:
    """A run on the rows of a file; 10 or 12 of them, and six steps of four or more: past the end, more than once."""
    objective, _, way = kind.partition(" ")
    extra: dict[str, Any] = {
        "sft": {"online": False},
        "dpo": {"beta": 0.1, "online": False, "rows": PAIRS},
        "grpo": {"beta": 0.1, "num_iterations": 2, "online": True, "rows": PROMPTS},
    }[objective]
    rows = extra.pop("rows", ROWS)
    streaming = {"streaming": True, "shuffle_buffer": 4} if way == "stream" else {}
    return {"objective": objective, "rows": str(written(path, rows)), "max_steps": 6, **streaming, **extra}


def go(folder: Path, settings: dict[str, Any], workers: int, **extra: Any) -> Trainer:
    return run(folder, **{**settings, "dataloader_num_workers": workers, **extra})


@pytest.fixture
def few_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of ten rows is worth workers."""
    monkeypatch.setattr("rlft.data.dataset._CHUNK", 2)
    monkeypatch.setattr("rlft.data.dataset._WORTH", 0)


def stop_at(step: int) -> Any:
    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


def same_for_any_number(folder: Path, kind: str, stop: int, before: int, after: int) -> None:
    """Stopped with so many workers and continued with others, against a run without any that was never stopped."""
    settings = settings_of(kind, folder)
    whole = go(folder / "whole", settings, 0)
    whole.train()
    cut = go(folder / "cut", settings, before, callbacks=[stop_at(stop)])
    with pytest.raises(Interrupted, match=f"after step {stop}"):
        cut.train()
    resumed = go(folder / "cut", settings, after)
    resumed.train()
    assert bits(resumed) == bits(whole)
    assert log_of(folder / "cut") == log_of(folder / "whole")


def test_a_stream_stopped_with_two_workers_goes_on_with_one(tmp_path: Path) -> None:
    same_for_any_number(tmp_path, "sft stream", 3, before=2, after=1)


def test_a_data_set_tokenised_by_workers(tmp_path: Path, few_rows_are_many: None) -> None:
    """Past an epoch's end, whose last step is a short one (10 rows in steps of 4)."""
    same_for_any_number(tmp_path, "sft map", 4, before=1, after=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft stream", "dpo stream", "grpo stream", "sft map", "dpo map", "grpo map"])
@pytest.mark.parametrize(("stop", "before", "after"), [(1, 1, 3), (2, 3, 0), (3, 0, 2), (5, 2, 1)])
def test_the_same_bits_for_any_number_of_workers(
    tmp_path: Path, few_rows_are_many: None, kind: str, stop: int, before: int, after: int
) -> None:
    same_for_any_number(tmp_path, kind, stop, before, after)


def test_a_worker_that_is_killed_stops_the_run_and_costs_no_step(tmp_path: Path) -> None:
    """The message names it, the last finished step is saved, and nobody is left; without workers the run goes on."""
    settings = settings_of("sft stream", tmp_path)
    whole = go(tmp_path / "whole", settings, 0)
    whole.train()
    pids: list[int] = []

    def kill(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == 3:
            pids.extend(t.source.order.stream.workers.pids)  # type: ignore[attr-defined]
            os.kill(pids[1], signal.SIGKILL)
            gone(pids[1])

    t = go(tmp_path / "cut", settings, 2, callbacks=[kill])
    with pytest.raises(
        DataError, match=r"rows into epoch \d: data worker 2 of 2 \(process \d+\) was killed by SIGKILL"
    ):
        t.train()
    assert t.step in (3, 4, 5)  # what it had handed over before is used
    assert (tmp_path / "cut" / "run" / f"checkpoint-{t.step}").is_dir()
    assert all(gone(pid, 0.1) for pid in pids)
    resumed = go(tmp_path / "cut", settings, 0)
    resumed.train()
    assert bits(resumed) == bits(whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_broken_line_stops_the_run_where_it_would_without_workers(tmp_path: Path) -> None:
    rows = [ROWS[i % 10] for i in range(300)]  # more than are looked at before the first step
    path = written(tmp_path, rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:280], '{"prompt": ', *lines[281:]]) + "\n")
    settings = {"objective": "sft", "rows": str(path), "online": False, "streaming": True, "max_steps": 5,
                "per_device_train_batch_size": 64}  # fmt: skip
    t = go(tmp_path, settings, 2)
    with pytest.raises(DataError, match=r"read on, 280 rows into epoch 1: .*rows\.jsonl:281: broken JSON"):
        t.train()
    assert t.step == 4
    path.write_text("\n".join(lines) + "\n")
    t = go(tmp_path, settings, 1)
    t.train()
    assert [line["step"] for line in log_of(tmp_path)] == [
        1,
        2,
        3,
        4,
        5,
    ]  # step 4 was saved, though nothing asked for it


@pytest.mark.slow
def test_too_many_bad_rows_stop_the_run_where_they_would_without_workers(tmp_path: Path) -> None:
    rows = [*[ROWS[i % 10] for i in range(280)], *[{"prompt": "7=", "completion": ""}] * 20]
    settings = {"objective": "sft", "rows": str(written(tmp_path, rows)), "online": False, "streaming": True,
                "max_steps": 9, "per_device_train_batch_size": 64}  # fmt: skip
    said = []
    for workers in (0, 2):
        with pytest.raises(DataError, match="3 of 283 rows") as caught:
            go(tmp_path / str(workers), settings, workers).train()
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_worker_killed_while_it_tokenises_a_data_set(tmp_path: Path, few_rows_are_many: None) -> None:
    """Before the first step: an error, and no worker left."""
    from rlft import _workers

    original = _workers.Workers.receive
    pools: list[Any] = []

    def receive(self: Any, number: int, waiting: Any = None) -> Any:
        pools.append(self)
        os.kill(self.pids[number], signal.SIGKILL)
        gone(self.pids[number])
        return original(self, number, waiting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers.Workers, "receive", receive)
        with pytest.raises(DataError, match="was killed by SIGKILL"):
            go(tmp_path, settings_of("sft map", tmp_path), 2)
    assert all(gone(pid, 0.1) for pid in pools[0].pids)


def local_rows() -> Iterator[dict[str, str]]:
    yield from ROWS


@pytest.mark.slow
def test_a_function_of_a_module_is_read_by_workers(tmp_path: Path) -> None:
    settings = {"objective": "sft", "rows": local_rows, "online": False, "streaming": True, "max_steps": 4}
    whole, helped = (go(tmp_path / str(n), settings, n) for n in (0, 2))
    whole.train()
    helped.train()
    assert bits(helped) == bits(whole)


# -- refused ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [-1, 257, 1.5, "2", True])
def test_a_number_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="dataloader_num_workers"):
        Config(objective="sft", dataloader_num_workers=value)


def test_what_cannot_be_sent_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "sft", "online": False, "streaming": True, "max_steps": 2}
    with pytest.raises(ValueError, match=r"sends what the rows are read from between processes.*lambda"):
        go(tmp_path, {**settings, "rows": lambda: iter(ROWS)}, 1, model={"model_type": "no such model"})


def test_the_number_of_workers_is_no_part_of_what_a_run_is() -> None:
    one, two = (Config(objective="sft", dataloader_num_workers=n) for n in (0, 3))
    assert one.digest() == two.digest()


# -- from outside ------------------------------------------------------------------------------------------------------------
def started(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """``rlft train`` on a stream, as a user starts it, with a mark in the environment of every process that it starts."""
    folder.mkdir(exist_ok=True)
    char_tokenizer().save_pretrained(folder / "tokenizer")
    config = {"objective": "sft", "model": MODEL, "tokenizer": str(folder / "tokenizer"), "disable_tqdm": True,
              "train_data": str(written(folder, ROWS)), "streaming": True, "shuffle_buffer": 4, "max_steps": 300,
              "learning_rate": 1e-2, "report_to": [], "per_device_train_batch_size": 4, "self_checks": False,
              "dataloader_num_workers": workers, "output_dir": str(folder / "run")}  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RLFT_TEST_MARK": str(folder)}
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "rlft.cli", "train", str(folder / "run.yaml")],
            cwd=ROOT, env=env, start_new_session=True, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finished(folder: Path, process: subprocess.Popen[bytes]) -> bytes:
    """The weights of a run that comes to its end."""
    assert process.wait(timeout=200) == 0, (folder / "said").read_text()
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def marked(folder: Path) -> list[int]:
    """Every living process with the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"RLFT_TEST_MARK={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the run ends with that has no workers and is never stopped."""
    folder = tmp_path_factory.mktemp("twin")
    return finished(folder, started(folder, 0))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("everyone", [False, True], ids=["the run", "all its processes"])
def test_no_process_is_left_and_the_run_goes_on(tmp_path: Path, twin: bytes, number: int, everyone: bool) -> None:
    """Schedulers signal the process of the run, or every process of the job."""
    process, end = started(tmp_path, 2), time.monotonic() + 120
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        while not (log.exists() and log.read_bytes().count(b"\n") >= 20):
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        mine = marked(tmp_path)
        assert len(mine) == 3
        for pid in mine if everyone else [process.pid]:
            os.kill(pid, number)
        status = process.wait(timeout=60)
        assert status == (75 if number == signal.SIGTERM else -signal.SIGKILL), (tmp_path / "said").read_text()
        assert all(gone(pid) for pid in mine)
    finally:
        process.kill()
        process.wait()
    assert finished(tmp_path, started(tmp_path, 1)) == twin
    assert marked(tmp_path) == []


@pytest.mark.slow
def test_two_processes_with_workers_do_what_they_do_without(tmp_path: Path) -> None:
    """Streams and data sets, offline and online; and a worker that dies on one stops both, saved."""
    launch("tests.trainer._workers_of_two", tmp_path, 2, timeout=280)
    said = [json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        for kind in ("sft stream", "grpo stream", "dpo map"):
            assert said[rank][f"{kind} 2"] == said[rank][f"{kind} 0"], (rank, kind)
        assert said[rank]["resumed"] == said[rank]["sft stream 0"]
        assert said[rank]["step"] == said[0]["step"]
    assert "was killed by SIGKILL" in said[1]["error"]
    assert "process 1 of 2 says" in said[0]["error"]
