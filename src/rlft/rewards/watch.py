"""A time limit and a look for signals around user code that runs in the main thread.

Reward functions keep limits of their own with ``SIGALRM`` (math-verify does, and with it TRL's ``accuracy_reward``), and
Python lets nobody but the main thread do so. So the function has the main thread, and it is the watcher that has another:
when time is up, it sends the main thread a signal, whose handler raises inside the function.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["SLICE", "Stopped", "Watch", "can_interrupt"]

logger = logging.getLogger("rlft.rewards")

SLICE = 0.05  # seconds between two looks, so that poll() answers a signal soon
_AGAIN = 0.25  # seconds until code that swallowed the exception, or was not in Python, gets another
_STUCK = 10.0  # seconds after which code that does not come back to Python is named

_active: list[Watch] = []


class Stopped(BaseException):
    """Raised in watched code when it must end. No ``Exception``, so that ``except Exception`` lets it through."""


def can_interrupt() -> bool:
    """Whether code that this thread runs can be stopped from another one: by a POSIX signal, in the main thread."""
    return hasattr(signal, "pthread_kill") and threading.current_thread() is threading.main_thread()


class Watch:
    """Runs in a thread beside code of the main thread, and ends that code when it must.

    The signal is SIGURG, which a process ignores by default, and it is sent only to end something.

    Args:
        late: the error when ``timeout`` is over.
        timeout: seconds; None = no limit.
        poll: called about every :data:`SLICE` seconds, in the watcher's thread; what it raises ends the code.

    Attributes:
        why: what ended the code, to be raised in its place; None while nothing has.
    """

    def __init__(self, late: Exception, *, timeout: float | None, poll: Callable[[], None] | None) -> None:
        self.why: BaseException | None = None
        self._late, self._timeout, self._poll = late, timeout, poll
        self._over, self._lock = threading.Event(), threading.Lock()
        self._before: Any = None

    def begin(self) -> None:
        """Start to watch the main thread, which calls this."""
        _active.append(self)
        self._before = signal.signal(signal.SIGURG, _interrupt)
        threading.Thread(target=self._run, name="rlft-reward-watch", daemon=True).start()

    def end(self) -> None:
        """Stop to watch. Nothing is raised for this watch from here on."""
        while not self._over.is_set():
            try:
                with self._lock:
                    self._over.set()
            except Stopped:
                continue
        _active.remove(self)
        signal.signal(signal.SIGURG, self._before)

    @property
    def due(self) -> bool:
        """Whether the code is to be ended."""
        return self.why is not None and not self._over.is_set()

    def _run(self) -> None:
        started = time.monotonic()
        end = None if self._timeout is None else started + self._timeout
        while not self._over.wait(SLICE if end is None else max(0.0, min(SLICE, end - time.monotonic()))):
            if end is not None and time.monotonic() >= end:
                self.why = self._late
                break
            try:
                if self._poll is not None:
                    self._poll()
            except BaseException as error:
                self.why = error
                break
        self._raise_until_over()

    def _raise_until_over(self) -> None:
        asked, told = time.monotonic(), False
        main = threading.main_thread().ident
        while not self._over.is_set() and main is not None:
            with self._lock:
                if not self._over.is_set():
                    signal.pthread_kill(main, signal.SIGURG)
            self._over.wait(_AGAIN)
            if not told and time.monotonic() > asked + _STUCK:
                told = True
                logger.warning(
                    "a reward function is to be stopped (%s), but it is inside a library that does not come back to Python; "
                    "the run waits for it. Give that call a limit of its own, or do it in a process",
                    str(self.why) or type(self.why).__name__,
                )


def _interrupt(number: int, frame: FrameType | None) -> None:
    if any(watch.due for watch in _active):
        raise Stopped
