"""Starts runs in forked children of a process that has imported everything, and stops them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import mmap
import os
import pkgutil
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import rlft
from rlft import _failpoint, cli
from rlft.data import dataset

_PAGE = 4096
_STEPS, _PASSAGES, _NAME = 0, 8, 16  # where the shared page holds what


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        status: exit code, or minus the signal.
        steps: optimizer steps taken in this process.
        at: the last failpoint that was passed.
        seconds: from fork to end.
        text: everything it printed.
    """

    status: int
    steps: int
    at: str
    seconds: float
    text: str


@dataclass
class Job:
    """One ``rlft train``.

    Attributes:
        config: YAML file.
        folder: output_dir.
        settings: further ``key=value``.
        env: environment on top; ``RLFT_FAILPOINT`` among it.
        file_limit: RLIMIT_FSIZE in bytes.
        user: id of the user to become, so that permissions count.
        trace: file that gets a line for each failpoint: its name and how often it was passed.
        probe: file that gets ``step rss_bytes descriptors`` lines, every 100 steps.
    """

    config: Path
    folder: Path
    settings: tuple[str, ...] = ()
    env: dict[str, str] | None = None
    file_limit: int | None = None
    user: int | None = None
    trace: Path | None = None
    probe: Path | None = None


class Running:
    """A started child."""

    def __init__(self, job: Job) -> None:
        self.page = mmap.mmap(-1, _PAGE)
        self.log = tempfile.TemporaryFile()
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                status = _child(job, self.page, self.log.fileno())
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def read(self) -> tuple[int, int, str]:
        """Steps taken, failpoints passed, and the last one's name, now."""
        steps, passages = (struct.unpack_from("q", self.page, at)[0] for at in (_STEPS, _PASSAGES))
        return steps, passages, bytes(self.page[_NAME : _NAME + 100]).split(b"\0")[0].decode()

    def poll(self) -> bool:
        """Whether it has ended."""
        done = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return done is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self, timeout: float = 120.0) -> Ended:
        """Wait for the end; a child that does not come to one is killed and shown as status 124."""
        while not self.poll():
            if time.monotonic() - self.started > timeout:
                self.kill()
                os.waitpid(self.pid, 0)
                return self._result(124)
            time.sleep(0.002)
        return self._result(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))

    def _result(self, status: int) -> Ended:
        seconds = time.monotonic() - self.started
        steps, _, name = self.read()
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        self.log.close()
        self.page.close()
        return Ended(status, steps, name, seconds, text)


def run(job: Job, *, stop_after: float | None = None, number: int = signal.SIGKILL, timeout: float = 120.0) -> Ended:
    """Run to the end, or send a signal after some seconds."""
    child = Running(job)
    while stop_after is not None and not child.poll():
        left = stop_after - (time.monotonic() - child.started)
        if left <= 0:
            child.kill(number)
            break
        time.sleep(min(left, 0.005))
    return child.ended(timeout)


def _child(job: Job, page: mmap.mmap, log: int) -> int:
    os.dup2(log, 1)
    os.dup2(log, 2)
    gc.enable()
    warnings.resetwarnings()
    os.environ.update(job.env or {})
    torch.manual_seed(os.getpid())  # a run must not depend on what was drawn before it
    _watch(job, page)
    if os.environ.get("RLFT_TEST_BREAK") == "rng":  # a library with this fault must be found out
        rlft.checkpoint.set_rng_state = lambda tensors, record: None
    if job.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, resource.RLIM_INFINITY))
    if job.user is not None:
        os.setgid(job.user)
        os.setuid(job.user)
    return cli.main(["train", str(job.config), f"output_dir={job.folder}", *job.settings])


def _watch(job: Job, page: mmap.mmap) -> None:
    """Count steps and failpoints where the parent can read them, also after a kill."""
    original, counts, passed = _failpoint.failpoint, Counter[str](), 0
    probe = job.probe.open("w") if job.probe else None

    def failpoint(called: str) -> None:
        nonlocal passed
        passed += 1
        point = "".join(_failpoint._within) + called
        counts[point] += 1
        struct.pack_into("q", page, _PASSAGES, passed)
        page[_NAME : _NAME + 100] = point.encode().ljust(100, b"\0")
        if point == "train.optimizer.after":
            struct.pack_into("q", page, _STEPS, counts[point])
            if probe is not None and counts[point] % 100 == 0:
                gc.collect()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
                probe.write(f"{counts[point]} {resident} {len(os.listdir('/proc/self/fd'))}\n")
                probe.flush()
        if job.trace is not None:
            with job.trace.open("w") as file:
                file.writelines(f"{name} {count}\n" for name, count in counts.items())
        original(called)

    _failpoint.failpoint = failpoint


def warm() -> None:
    """Import, in this process, whatever a run imports; nothing is built or computed here."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("transformers.models.llama.modeling_llama", "peft", "accelerate", "datasets", "torch.profiler"):
            importlib.import_module(name)
        for module in pkgutil.walk_packages(rlft.__path__, "rlft."):
            if not any(part in module.name for part in ("vllm", "worker", "__main__")):
                with contextlib.suppress(ImportError):  # an extra that is not installed
                    importlib.import_module(module.name)
        from peft import PeftModel
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # a quarter of a tiny run; kept by transformers once computed
        PeftModel.create_or_update_model_card = lambda self, folder: None  # another fifth, for a text
    dataset._CHUNK, dataset._WORTH = 4, 0  # fourteen rows are enough for workers to share
    gc.collect()
    gc.freeze()


def passages(job: Job) -> tuple[Ended, dict[str, int]]:
    """A run, and how often it passed each failpoint, in the order of their first passage."""
    assert job.trace is not None
    job.trace.write_text("")
    ended = run(job)
    return ended, {name: int(count) for name, count in map(str.split, job.trace.read_text().splitlines())}
