"""One variant in a process of its own: ``python -m benchmarks.worker module:function '{"parameter": 1}'``.

The variant is a function ``f(tick, **parameters)``. It prepares, calls ``tick()``, and from then on calls
``tick(**facts)`` after every unit of work. A tick stops the clocks, reports to the parent and waits to be told to go on.
So the parent decides whose turn it is, and the clocks never run while another variant works.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import resource
import sys
import time
from typing import Any, TextIO

__all__ = ["Finished", "Tick", "main"]


class Finished(BaseException):
    """The parent has seen enough. A BaseException, so that no trainer catches it."""


class Tick:
    """The clocks of a worker."""

    def __init__(self, commands: TextIO, reports: TextIO) -> None:
        self.commands, self.reports = commands, reports
        self.base: float | None = None
        self.cpu = self.wall = 0.0

    def __call__(self, **facts: Any) -> None:
        """End a unit of work (the first call: the preparation), and wait for the next turn."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        if self.base is None:
            gc.collect()
            self.base = resident()
            self._report({"ready": True})
        else:
            self._report({"cpu": cpu, "wall": wall, "peak": peak() - self.base, "facts": facts})
        if self.commands.readline().strip() != "go":
            raise Finished
        gc.collect()
        reset_peak()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def _report(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self.reports, flush=True)


def _status(key: str) -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        found = re.search(rf"^{key}:\s+(\d+) kB", status.read(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def resident() -> float:
    """Resident memory now, MiB."""
    try:
        return _status("VmRSS")
    except OSError:
        return peak()


def peak() -> float:
    """The largest resident memory since :func:`reset_peak` (or, where that is impossible, since the start), MiB."""
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Forget the largest resident memory. Linux only; elsewhere the peak is that of the whole process."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return


def main(target: str, parameters: str) -> None:
    """Run one variant until the parent has seen enough."""
    # Libraries print: the reports get a channel of their own, and everything else goes to stderr.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, _, name = target.partition(":")
    variant = getattr(importlib.import_module(module), name)
    try:
        variant(Tick(sys.stdin, reports), **json.loads(parameters))
    except Finished:
        # Trainers and libraries leave threads and temporary state behind; there is nothing to save.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
