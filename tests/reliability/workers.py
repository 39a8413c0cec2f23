"""Runs whose rows are read by worker processes: the run killed, at random instants and in named ones, and a worker killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path

from tests.reliability import runs
from tests.reliability.bench import Bench, Figures
from tests.reliability.forker import Ended, Job, Running
from tests.reliability.kills import POINT, _stage

#: In the environment of every worker, and of nothing else: a forked run's own is that of the campaign.
MARK = "RLFT_TEST_MARK"
STAGES = ("batch", "backward", "optimizer", "evaluate")


def alive(folder: Path) -> list[int]:
    """Workers of a run that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={folder}".encode() not in (path / "environ").read_bytes().split(b"\0"):
                continue
            if (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":  # an orphan that init has yet to bury
                found.append(int(path.name))
    return found


def worker_kills(bench: Bench, counts: dict[str, int]) -> Figures:
    """SIGKILL of the run (two of three cases) or of one of its workers; no process may be left, and no bit may differ.

    The run is continued with none to two workers, and compared with one that never had any.
    """
    figures = bench.begin("SIGKILL of a run with worker processes, or of a worker", sum(counts.values()))
    where: Counter[str] = Counter()
    figures.notes |= {"runs": counts, "the run killed": 0, "a worker killed": 0, "steps lost with a worker": 0}
    for name, count in counts.items():
        bench.twin(name)
        done = 0
        for index in range(4 * count):
            if done == count:
                break
            folder = bench.folder()
            env = {MARK: str(folder)}
            if index % 3 == 2:
                hit = _kill_a_worker(bench, name, folder, env)
            else:
                hit = _kill_the_run(bench, name, folder, env, named=index % 3 == 1, where=where)
            done += hit
            _nobody_left(bench, f"{name}, case {index}", folder)
            more = bench.random.randrange(3)  # as many as before, or others, or none
            bench.finish(name, folder, f"{name}, case {index}", env=env, settings=(f"dataloader_num_workers={more}",))
            _nobody_left(bench, f"{name}, case {index}, at its end", folder)
        figures.cases += done
    figures.notes["last instant passed before the run was killed"] = bench.stages(where)
    return figures


def _nobody_left(bench: Bench, label: str, folder: Path) -> None:
    end = time.monotonic() + 10
    while left := alive(folder):
        if time.monotonic() > end:
            bench.fail(label, f"workers are left: {left}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _kill_the_run(
    bench: Bench, name: str, folder: Path, env: dict[str, str], *, named: bool, where: Counter[str]
) -> bool:
    if named:
        point = f"train.{bench.random.choice(STAGES)}.before"
        passage = bench.random.randint(1, bench.passages[name][point])
        label = f"{name}, killed at {point}:{passage}"
        ended = bench.launch(name, folder, label, env={**env, POINT: f"{point}:{passage}"})
    else:
        instant = bench.random.uniform(0, bench.seconds[name])
        label = f"{name}, killed after {instant:.3f} s"
        ended = bench.launch(name, folder, label, stop_after=instant, env=env)
    if ended.status != -signal.SIGKILL:
        if ended.status:
            bench.fail(label, f"ended with {ended.status}: {ended.text[-600:]}")
        return False
    bench.notes("the run killed", 1)
    where[_stage(ended.at) if ended.at else "start"] += 1
    return True


def _kill_a_worker(bench: Bench, name: str, folder: Path, env: dict[str, str]) -> bool:
    """The run must stop by itself, say which worker it was, and have saved its last finished step."""
    child = Running(Job(bench.paths[name], folder, env=env))
    while not (workers := alive(folder)) and not child.poll():
        time.sleep(0.005)
    time.sleep(bench.random.uniform(0, 0.8 * bench.seconds[name]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(bench.random.choice(workers or [os.getpid() + 2**22]), signal.SIGKILL)
    ended = child.ended()
    if ended.status == 0:  # all of its answers had been taken
        return False
    label = f"{name}, a worker killed"
    bench.notes("a worker killed", 1)
    _said(bench, label, folder, ended)
    return True


def _said(bench: Bench, label: str, folder: Path, ended: Ended) -> None:
    if ended.status != 1 or "was killed by SIGKILL" not in ended.text or "data worker" not in ended.text:
        bench.fail(label, f"ended with {ended.status}: {ended.text[-800:]}")
    lost = ended.steps - (runs.newest(folder) if folder.exists() else 0)
    bench.notes("steps lost with a worker", lost)
    if lost:
        bench.fail(label, f"{ended.steps} steps were taken, the checkpoint is of step {runs.newest(folder)}")
