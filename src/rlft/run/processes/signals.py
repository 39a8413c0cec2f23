"""SIGTERM and SIGUSR1: where a run looks for them, and how its processes leave it together."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["HEEDED", "Signals"]

#: The signals that save a run and stop it.
HEEDED = (signal.SIGTERM, signal.SIGUSR1)
#: Seconds between two looks at whether another process was asked to stop.
EVERY = 0.1

_runs = itertools.count()


class Signals:
    """Whether this process of a run, or another one, was asked to stop.

    Processes that stopped by themselves would leave the others waiting. So there are two kinds of places to look. Inside
    work that each process does for itself (:meth:`rlft.run.processes.processes.Processes.together`: sampling, rewards, its share of an
    evaluation) the one that was asked gives that work up, and says so in the store at which the processes met; the others
    find it there, give up too, and all of them meet at the end of the work, as after an error. Everywhere else they
    decide together, in a reduction that all of them come by.

    Attributes:
        number: of the signal that came; None while there was none.
        alone: how many such pieces of work this process is inside of.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.alone = 0
        self._key = ""
        self._looked = 0.0

    @contextlib.contextmanager
    def heeded(self, world_size: int = 1) -> Iterator[None]:
        """Take note of signals; afterwards they do what they did before. What came before this is forgotten.

        Args:
            world_size: processes of the run.
        """
        self.number, self.alone, self._key = None, 0, f"rlft/stop/{next(_runs)}"

        def note(number: int, frame: Any) -> None:
            self.number = number

        try:
            previous = {number: signal.signal(number, note) for number in HEEDED}
        except ValueError:  # not the main thread: signals belong to the caller
            previous = {}
        try:
            with self._heard_while_waiting() if previous and world_size > 1 else contextlib.nullcontext():
                yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _heard_while_waiting(self) -> Iterator[None]:
        """Tell the others also where this process waits for them in a collective, in which Python runs no handler."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        if before != -1:  # an event loop of this thread listens there already
            signal.set_wakeup_fd(before)

        def listen() -> None:
            while heard := ours.recv(1):
                if heard[0] in HEEDED:
                    self.number = heard[0]
                    self.told()

        thread = threading.Thread(target=listen, name="rlft-signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            theirs.close()
            thread.join()
            ours.close()

    def told(self) -> bool:
        """Tell the others, or look whether one of them told."""
        store = _store()
        if self.number is not None:
            if store is not None:  # else they hear of it when they meet
                with contextlib.suppress(RuntimeError):
                    store.set(self._key, "1")
            return True
        if store is None or time.monotonic() < self._looked + EVERY:
            return False
        self._looked = time.monotonic()
        try:
            return bool(store.check([self._key]))
        except RuntimeError:  # it went with the process that kept it: the next meeting says so
            return False


def _store() -> Any:
    """Where the processes met; None where torch does not say."""
    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
