"""Start a test module on several processes that meet over gloo, and end them all when one is too slow."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def launch(module: str, folder: Path, processes: int, *, timeout: float) -> None:
    """Run ``python -m module folder`` once per rank; AssertionError with the ends of the logs when one fails or hangs.

    Args:
        module: importable from the repository's root.
        folder: where the ranks write; their logs go there too.
        processes: how many.
        timeout: seconds for all of them together.
    """
    port = str(free_ports(1)[0])
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    logs = [(folder / f"log{rank}.txt").open("w") for rank in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)], cwd=ROOT, stdout=logs[rank], stderr=subprocess.STDOUT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    ends = time.monotonic() + timeout
    codes: list[int | str] = []
    try:
        for process in started:
            try:
                codes.append(process.wait(timeout=max(0.1, ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append("hangs")
    finally:
        for process in started:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    tails = "\n".join((folder / f"log{rank}.txt").read_text()[-2500:] for rank in range(processes))
    assert codes == [0] * processes, f"ends of {module}: {codes}\n{tails}"
