"""Run by test_two_processes.py, once per rank: bad inputs on two processes, one after the other.

Each case runs under a watchdog that ends the process with a stack dump, and in a process group of its own that is left as the end
of a process leaves it. What each rank met is written down line by line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from rlft import checkpoint
from tests.bad_input import _two_data, _two_models, _two_rewards, _two_runs, _two_settings, _two_tensors
from tests.bad_input._two_case import CASES, Hold
from tests.launch import free_ports

__all__ = ["CASES", "PATIENCE", "SOURCES"]

#: Where the cases are.
SOURCES = (_two_data, _two_models, _two_rewards, _two_runs, _two_settings, _two_tensors)
#: Seconds a case may take before its process is ended.
PATIENCE = 60


def part() -> None:
    """Leave the others as the end of a process does: connections are closed, and who waits for this one hears of it."""
    gc.collect()  # a wrapper of the model holds the connections too
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


def port(folder: Path, number: int, rank: int) -> str:
    """Where the processes meet for this case: the first of them finds a free port, just now, and tells the other."""
    path = folder / f"port{number}"
    if rank == 0:
        path.with_suffix(".tmp").write_text(str(free_ports(1)[0]))
        path.with_suffix(".tmp").rename(path)
    while not path.exists():
        time.sleep(0.005)
    return path.read_text()


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Warnings and log lines."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger("rlft").addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
            lines += [str(w.message) for w in caught]
    finally:
        logging.getLogger("rlft").removeHandler(ear)


def became(hold: Hold) -> dict[str, Any]:
    """What the run left: its step, its weights, and the newest checkpoint that is whole."""
    found: dict[str, Any] = {"value": hold.value}
    if (t := hold.trainer) is not None:
        newest = None
        with contextlib.suppress(checkpoint.CheckpointError):  # spoilt on purpose
            newest = checkpoint.find_latest(t.run_dir) if t.run_dir.is_dir() else None
        found |= {"step": t.step, "saved": None if newest is None else newest.name, "weights": _two_tensors.digest(t)}
    return found


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is not looked through again after every case
    with (folder / f"said{rank}.jsonl").open("w") as out:
        for number, name in enumerate(json.loads((folder / "cases.json").read_text())):
            case, place, hold = CASES[name], folder / f"case{number}", Hold()
            place.mkdir(exist_ok=True)
            print(f"== {name}", flush=True)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            os.environ["MASTER_PORT"] = port(folder, number, rank)
            started, said = time.monotonic(), ""
            with heard() as lines:
                try:
                    case.run(place, case.meets(rank), hold)
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - started
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # checkpoints that were spoilt on purpose
                line = {"name": name, "said": said, "heard": lines, "seconds": seconds, **became(hold)}
            hold.trainer = None
            part()
            faulthandler.cancel_dump_traceback_later()
            out.write(json.dumps(line) + "\n")
            out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
