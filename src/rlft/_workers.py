"""Processes that work ahead of need: each answers its tasks in order, and none outlives the process that started it.

They are fresh interpreters. A fork of a process that has run torch or a fast tokenizer can stand still for ever, because
the threads that hold its locks do not come along; multiprocessing's own fresh processes run the user's script once more
(``__main__``), and one that trains without ``if __name__ == "__main__"`` would train again in each of them. A worker
here imports what its job names, and nothing else.

Job, tasks and answers are pickled as multiprocessing pickles them, and travel through a pair of sockets without a name,
which this process made and no other can open. So nothing that a file, a hub or a network says is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, Protocol

from rlft.errors import DataError

__all__ = ["AHEAD", "Job", "Trouble", "Workers", "check_sendable"]

#: Tasks that a worker has at a time: one that it works at, and the next.
AHEAD = 2
#: Seconds without an answer, or a sign of life, after which a worker counts as stuck.
TIMEOUT = 600.0
_SLICE = 0.1  # seconds between two looks at a signal or the clock while waiting
_PARENT = 2.0  # seconds between two looks at whether the parent is still there
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[3]); from rlft import _workers; _workers.serve()"
#: How a pickle of protocol 4 and later names something of the script that was started.
_MAIN = b"\x8c\x08__main__"


class _Pickler(ForkingPickler):
    """Everything by value: torch registers tensors with the base class as handles to memory, which only its own children get."""

    _extra_reducers: ClassVar[dict[type, Any]] = {}


_loads: Callable[[Any], Any] = ForkingPickler.loads  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]


class Job(Protocol):
    """What a worker is sent once; it and its arguments must be possible to pickle."""

    @property
    def open(self) -> Callable[..., Callable[[Any], Any]]:
        """In the worker: ``open(alive, *arguments)`` gives what answers a task. Where that can take long, ``alive()`` is
        called now and then.
        """
        ...


@dataclass(frozen=True, slots=True)
class Trouble:
    """An exception on its way to another process.

    Attributes:
        kind: name of its class.
        text: what it said.
        expected: whether it was a ``ValueError`` or ``OSError``: something is wrong with data or files.
        trace: where it came from.
    """

    kind: str
    text: str
    expected: bool
    trace: str

    @staticmethod
    def of(error: BaseException) -> Trouble:
        """The exception that is being handled."""
        expected = isinstance(error, (ValueError, OSError))
        return Trouble(type(error).__name__, str(error), expected, traceback.format_exc())

    def error(self) -> Exception:
        """What to raise here."""
        if self.expected:
            return ValueError(self.text)
        return DataError(f"a data worker failed with {self.kind}: {self.text}\n{self.trace.rstrip()}")


def check_sendable(things: dict[str, Any]) -> None:
    """Refuse what cannot be sent to a worker, before anything is started.

    Args:
        things: what to try, by the words for it in the message.

    Raises:
        ValueError: naming the thing, why, and what to do.
    """
    for name, thing in things.items():
        if _MAIN in bytes(_dumps(name, thing)):
            raise ValueError(
                f"dataloader_num_workers sends {name} to other processes, and part of it is defined in the script or notebook "
                f"that was started, which a worker cannot import without running it again; move it to a module of its own "
                f"and import it from there, or set dataloader_num_workers: 0"
            )


def _dumps(name: str, thing: Any) -> Any:
    try:
        return _Pickler.dumps(thing)
    except Exception as error:  # whatever an object's own code raises
        raise ValueError(
            f"dataloader_num_workers sends {name} between processes, and that is not possible ({type(error).__name__}: {error}). "
            f"Give files, plain values in rows, a function or class at the top level of a module (not a lambda, nor one inside "
            f"a function), or set dataloader_num_workers: 0"
        ) from error


class Workers:
    """Processes that answer tasks, each in the order in which it was sent them.

    Args:
        count: of processes, at least 1.
        job: sent to each of them.
        arguments: for each of them, further arguments of ``job.open``.

    Raises:
        DataError: the system does not start them.
        ValueError: on a system without POSIX processes.
    """

    def __init__(self, count: int, job: Job, arguments: Sequence[Sequence[Any]]) -> None:
        if os.name != "posix":
            raise ValueError(
                "dataloader_num_workers needs POSIX processes; set dataloader_num_workers: 0 on this system"
            )
        self.count = count
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, self._processes, self._pipes)
        data = _dumps("what the rows are read with", job)
        try:
            for _ in range(count):
                self._start()
        except OSError as error:
            self.close()
            raise DataError(
                f"{count} data workers could not be started ({error}); lower dataloader_num_workers"
            ) from error
        # all of them are importing by now: the first may take its job long before the last is asked to
        for number in range(count):
            self._write(number, data)
            self.send(number, tuple(arguments[number]))

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        mine, theirs = Pipe()
        with theirs:
            self._pipes.append(mine)
            search = json.dumps([str(path) for path in sys.path])
            descriptor = theirs.fileno()
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _START, str(descriptor), str(os.getpid()), search],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                    # a core each, since the workers are the parallelism; and sets of texts in one order for all of them
                    env={
                        "TOKENIZERS_PARALLELISM": "false",
                        "PYTHONHASHSEED": "0",
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                    },
                    start_new_session=True,  # a Ctrl-C is for the run, which ends them
                )
            )

    def send(self, number: int, task: Any) -> None:
        """Give a worker a task. One that has died is noticed when it is asked for the answer."""
        self._write(number, _dumps("rows", task))

    def _write(self, number: int, data: Any) -> None:
        with contextlib.suppress(OSError):
            self._pipes[number].send_bytes(data)

    def ready(self, number: int) -> bool:
        """Whether :meth:`receive` would not wait."""
        return self._pipes[number].poll()

    def receive(self, number: int, waiting: Callable[[], None] | None = None) -> Any:
        """A worker's next answer.

        Args:
            number: of the worker, from 0.
            waiting: called while there is none; may raise.

        Raises:
            ValueError: the job refused the task, in its own words.
            DataError: it failed in another way, died, or gave no sign of life for :data:`TIMEOUT` seconds.
        """
        pipe = self._pipes[number]
        while True:
            end = time.monotonic() + TIMEOUT
            while not pipe.poll(_SLICE):
                if waiting is not None:
                    waiting()
                if time.monotonic() > end:
                    raise DataError(
                        f"{self._name(number)} gave no sign of life for {TIMEOUT:g} s; look at what it reads from (a disk or a "
                        f"server that does not answer?)"
                    )
            try:
                data = pipe.recv_bytes()
            except (EOFError, OSError):
                if waiting is not None:
                    waiting()  # a signal for all processes has reached this one too, and says more
                raise DataError(f"{self._name(number)} {self._fate(number)}") from None
            answer = _loads(data)
            if isinstance(answer, Trouble):
                raise answer.error()
            if answer is not None:
                return answer[0]

    def _name(self, number: int) -> str:
        return f"data worker {number + 1} of {self.count} (process {self._processes[number].pid})"

    def _fate(self, number: int) -> str:
        process = self._processes[number]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        code = process.returncode
        if code is None:
            return "closed its end without ending"
        if code >= 0:
            return f"ended with code {code}; look for its own words above"
        why = " (the memory of the machine was full?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{why}; lower dataloader_num_workers if this comes back"

    def close(self) -> None:
        """End them at once: they hold nothing that is not elsewhere. May be called again."""
        self._end()


def _end(processes: list[subprocess.Popen[bytes]], pipes: list[Connection]) -> None:
    for process in processes:
        process.kill()  # does nothing in a forked child of the run, whose children they are not
    for process in processes:
        process.wait()
    for pipe in pipes:
        pipe.close()


# -- in the worker --------------------------------------------------------------------------------------------------------
def serve() -> None:
    """What a worker does: take the job, its arguments, then tasks; answer each, until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # schedulers signal every process of a job; the parent decides
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    inbox, outbox = queue.SimpleQueue[bytes](), queue.SimpleQueue[Any]()
    threading.Thread(target=_listen, args=(pipe, inbox, parent), daemon=True).start()
    threading.Thread(target=_tell, args=(pipe, outbox), daemon=True).start()
    told = [time.monotonic()]

    def alive() -> None:
        if time.monotonic() > told[0] + 1.0:
            told[0] = time.monotonic()
            outbox.put(_Pickler.dumps(None))

    try:
        job = _loads(inbox.get())
        work = job.open(alive, *_loads(inbox.get()))
    except Exception as error:
        refusal = Trouble.of(error)
        work = None
    while True:
        task = inbox.get()
        try:
            answer: Any = (work(_loads(task)),) if work is not None else refusal
            data = _dumps("rows", answer)
        except Exception as error:
            data = _Pickler.dumps(Trouble.of(error))
        outbox.put(data)


def _listen(pipe: Connection, inbox: queue.SimpleQueue[bytes], parent: int) -> None:
    """Take in tasks as they come, so that the parent never waits to be rid of one; end with it."""
    try:
        while True:
            # an end of the pipe that some child of the parent inherited would hide that the parent is gone
            while not pipe.poll(_PARENT):
                if os.getppid() != parent:
                    os._exit(0)
            inbox.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _tell(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """Hand over answers while the next task is worked at."""
    try:
        while True:
            pipe.send_bytes(outbox.get())
    except OSError:
        os._exit(0)
