"""Worker processes by themselves: order, errors, deaths, signals, and that none is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import _workers
from rlft._workers import AHEAD, Workers, check_sendable
from rlft.errors import DataError, Interrupted
from tests.worker_jobs import Answers

ROOT = Path(__file__).parents[1]


def started(count: int = 1, *arguments: Any) -> Workers:
    return Workers(count, Answers(), [arguments] * count)


@pytest.fixture
def one() -> Iterator[Workers]:
    pool = started()
    yield pool
    pool.close()


def ask(pool: Workers, *task: Any, number: int = 0, **options: Any) -> Any:
    pool.send(number, task)
    return pool.receive(number, **options)


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds; one that nobody waits for has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_each_worker_answers_in_order_with_its_own_arguments() -> None:
    pool = Workers(3, Answers("rows"), [("a",), ("b",), ("c", 1)])
    try:
        for turn in range(AHEAD):
            for number in range(3):
                pool.send(number, ("arguments", None) if turn else ("echo", number))
        assert [pool.receive(number) for number in range(3)] == [0, 1, 2]
        said = [pool.receive(number) for number in range(3)]
        assert [(name, arguments) for name, arguments, _ in said] == [
            ("rows", ("a",)),
            ("rows", ("b",)),
            ("rows", ("c", 1)),
        ]
        assert [pid for _, _, pid in said] == pool.pids
        assert os.getpid() not in pool.pids
    finally:
        pool.close()


def test_large_tasks_and_answers_do_not_wait_for_each_other(one: Workers) -> None:
    """Far more than a pipe holds, both ways at once: nobody may wait for the other to read first."""
    large = os.urandom(3_000_000)
    for _ in range(3):
        one.send(0, ("echo", large))
    assert all(one.receive(0) == large for _ in range(3))


def test_tensors_travel_by_value(one: Workers) -> None:
    """Torch's own way, a handle to shared memory, is for its own children alone."""
    assert torch.equal(ask(one, "echo", torch.arange(5)), torch.arange(5))


def test_errors_keep_their_words_and_the_worker_goes_on(one: Workers) -> None:
    with pytest.raises(ValueError, match=r"^rows\.jsonl:7: broken$"):
        ask(one, "value", "rows.jsonl:7: broken")
    with pytest.raises(DataError, match="KeyError: 'answer'") as caught:
        ask(one, "key", "answer")
    assert "worker_jobs.py" in str(caught.value)  # where it happened
    with pytest.raises(ValueError, match=r"sends rows between processes.*plain values in rows"):
        ask(one, "unsendable", None)
    assert ask(one, "echo", 3) == 3


def test_a_job_that_cannot_begin_says_so() -> None:
    pool = started(1, "refuse")
    with pytest.raises(ValueError, match="nothing to open"):
        ask(pool, "echo", 1)
    pool.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_named(one: Workers, number: int) -> None:
    assert ask(one, "echo", 1) == 1
    one.send(0, ("sleep", 600))
    os.kill(one.pids[0], number)
    began = time.monotonic()
    with pytest.raises(
        DataError, match=rf"worker 1 of 1 \(process {one.pids[0]}\) was killed by {signal.Signals(number).name}"
    ):
        one.receive(0)
    assert time.monotonic() - began < 10
    with pytest.raises(DataError, match="was killed by"):  # and again: sending to it is no error of its own
        ask(one, "echo", 1)


def test_a_worker_that_leaves_is_named(one: Workers) -> None:
    with pytest.raises(DataError, match="ended with code 3; look for its own words above"):
        ask(one, "exit", 3)


def test_a_worker_that_stands_still_is_given_up(one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(one, "echo", 1) == 1
    monkeypatch.setattr(_workers, "TIMEOUT", 2.0)
    assert ask(one, "busy", 40) == "busy"  # four seconds, and a sign of life in each
    with pytest.raises(DataError, match="no sign of life for 2 s"):
        ask(one, "sleep", 600)


def test_a_signal_ends_the_waiting(one: Workers) -> None:
    def waiting() -> None:
        raise Interrupted(7)

    one.send(0, ("sleep", 600))
    with pytest.raises(Interrupted):
        one.receive(0, waiting)
    os.kill(one.pids[0], signal.SIGKILL)  # one that has reached the worker as well is not the worker's fault
    with pytest.raises(Interrupted):
        one.receive(0, waiting)


def test_workers_leave_signals_to_the_run(one: Workers) -> None:
    assert ask(one, "echo", 1) == 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(one.pids[0], number)
    assert ask(one, "echo", 2) == 2


def test_closing_ends_them_at_once() -> None:
    pool = started(2)
    pids = pool.pids
    pool.send(0, ("sleep", 600))
    began = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - began < 5
    assert all(gone(pid, 0.1) for pid in pids)
    dropped = started(2)
    pids = dropped.pids
    del dropped
    gc.collect()
    assert all(gone(pid, 0.1) for pid in pids)


def test_a_fork_of_the_run_does_not_end_them(one: Workers) -> None:
    child = os.fork()
    if child == 0:
        one.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert ask(one, "echo", 1) == 1


def test_none_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    """Not even while one is busy, and a child of the run holds its end of the pipes."""
    said = tmp_path / "pids"
    code = f"from tests.worker_jobs import sleeper; sleeper({str(said)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not said.exists() and time.monotonic() < end:
            time.sleep(0.05)
        pids = [int(pid) for pid in said.read_text().split()]
        assert not any(gone(pid, 0.1) for pid in pids)
        parent.kill()
        parent.wait()
        assert all(gone(pid) for pid in pids)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the forked child; the workers are in sessions of their own
        parent.wait()


def test_the_script_of_the_user_is_not_run_again(tmp_path: Path) -> None:
    """No ``if __name__ == "__main__"`` is needed, and what the script defines itself is refused."""
    script = tmp_path / "script.py"
    script.write_text(
        "from rlft._workers import Workers, check_sendable\n"
        "from tests.worker_jobs import Answers\n"
        "print('begins')\n"
        "pool = Workers(2, Answers(), [(), ()])\n"
        "pool.send(1, ('echo', 'fine'))\n"
        "print(pool.receive(1))\n"
        "def rows(): yield {}\n"
        "try: check_sendable({'the rows': rows})\n"
        "except ValueError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    begins, fine, refusal = done.stdout.splitlines()
    assert (begins, fine, done.stderr) == ("begins", "fine", "")
    assert "defined in the script or notebook" in refusal


def test_what_cannot_be_sent_is_refused_before_anything_starts() -> None:
    check_sendable({"the rows": [1, "a", Answers()]})
    with pytest.raises(ValueError, match=r"sends the rows between processes.*top level of a module \(not a lambda"):
        check_sendable({"the tokenizer": 1, "the rows": lambda: None})


def test_a_system_that_starts_no_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(DataError, match=r"2 data workers could not be started.*lower dataloader_num_workers"):
        started(2)
