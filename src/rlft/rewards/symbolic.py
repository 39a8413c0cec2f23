"""Symbolic equality, opt-in: sympy in a process that can be killed."""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict
from pathlib import Path

from rlft import _check
from rlft.rewards.latex import Tree, parse_expression

__all__ = ["SymbolicChecker"]

logger = logging.getLogger("rlft.rewards")

_START_SECONDS = 60.0
_WORKER = Path(__file__).with_name("symbolic_worker.py")


class SymbolicChecker:
    r"""Whether two answers are the same mathematics: ``\frac{x^2-1}{x-1}`` and ``x + 1``.

    Pass it to :class:`~rlft.rewards.MathVerifier` as ``symbolic=SymbolicChecker()`` (extra ``rlft[math]``).

    Text is read by :func:`rlft.rewards.latex.parse_expression`, which knows a small grammar and evaluates nothing; sympy
    gets expression trees, never text, in a process of its own with limited memory, an empty environment and no way to
    write files. A question that is not answered in time kills the process, and a new one takes its place: a timeout is
    None (unscored), never a hang and never an error. So is one that sympy fails on. Both are counted (``timeouts``,
    ``errors``), and the first of each kind is logged.

    Args:
        timeout: seconds per question.
        memory_mb: the most memory of the process.
        cache_size: answered questions remembered.

    Raises:
        ImportError: when sympy is not installed.
        ValueError: on a system without POSIX processes, or for a limit out of range.
    """

    def __init__(self, *, timeout: float = 2.0, memory_mb: int = 1024, cache_size: int = 10_000) -> None:
        _check.number("timeout", timeout, low=0.0, open_low=True)
        _check.number("memory_mb", memory_mb, low=256)
        _check.number("cache_size", cache_size, low=0)
        if os.name != "posix":
            raise ValueError("SymbolicChecker limits its process by POSIX means; it does not run on this system")
        if importlib.util.find_spec("sympy") is None:
            raise ImportError("SymbolicChecker needs sympy, which is not installed: pip install 'rlft[math]'")
        self.timeout, self.memory_mb, self.cache_size = float(timeout), int(memory_mb), int(cache_size)
        self.timeouts = 0
        """Questions that ended the process: out of time or memory."""
        self.errors: Counter[str] = Counter()
        """Questions that sympy raised an exception on, by its name; they are unscored."""
        self._cache: OrderedDict[str, bool | None] = OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        _living.add(self)

    def __call__(self, answer: str, reference: str) -> bool | None:
        """Whether ``answer`` equals ``reference``; False for an unreadable answer, None for an unreadable reference.

        None also where sympy cannot decide, or not in time.
        """
        expected, found = _read(reference), _read(answer)
        if expected is None:
            return None
        if found is None:
            return False
        found, expected = _aligned(found, expected)
        if found == expected:
            return True
        question = json.dumps([found, expected])
        with self._lock:
            if question in self._cache:
                self._cache.move_to_end(question)
                return self._cache[question]
            verdict = self._ask(question, answer, reference)
            self._cache[question] = verdict
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
            return verdict

    def close(self) -> None:
        """End the process; a later question starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a forked child must not kill its parent's process
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> SymbolicChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: str, answer: str, reference: str) -> bool | None:
        if self._owner != os.getpid():
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(question.encode() + b"\n")
            process.stdin.flush()
            reply = self._read(self.timeout)
        except OSError:
            reply = None
        asked = f"{answer[:80]!r} = {reference[:80]!r}"
        if reply is None:
            self.timeouts += 1
            self.close()
            if self.timeouts == 1:
                logger.warning(
                    f"sympy ran out of time ({self.timeout:g} s) or memory ({self.memory_mb} MB) on {asked}: such answers are "
                    f"unscored (SymbolicChecker.timeouts counts them)"
                )
        elif reply.startswith(b"!"):
            said = reply[1:].decode("ascii", "replace")
            kind = said.partition(":")[0]
            self.errors[kind] += 1
            if self.errors[kind] == 1:
                logger.warning(
                    f"sympy failed on {asked} with {said}: such answers are unscored (SymbolicChecker.errors counts them)"
                )
        return {b"1": True, b"0": False}.get(reply or b"")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            # -I: no code from the working folder, the environment or the user's site directory
            [sys.executable, "-I", str(_WORKER), str(self.memory_mb), str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        if self._read(_START_SECONDS) != b"ready":
            self.close()
            raise RuntimeError(
                f"the sympy process did not start within {_START_SECONDS:g} s with {self.memory_mb} MB; raise memory_mb"
            )

    def _read(self, seconds: float) -> bytes | None:
        """One line from the process, or None when time is up or it has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        line, end = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(pipe, 4096)
                if not chunk:
                    return None
                line += chunk
        return line.strip()


def _read(text: str) -> Tree | None:
    return parse_expression(text, names=True) if "=" in text else parse_expression(text)


def _parts(tree: Tree) -> list[Tree]:
    return tree[2:] if tree[0] == "items" and tree[1] == "" else [tree]


def _aligned(found: Tree, expected: Tree) -> tuple[Tree, Tree]:
    """Without names where only one side has them: ``x = 5`` for 5, and ``x=1, y=2`` for 1, 2 in that order."""
    sides = [found, expected]
    named = [all(part[0] == "eq" and part[1][0] == "sym" for part in _parts(side)) for side in sides]
    plain = [not any(part[0] == "eq" for part in _parts(side)) for side in sides]
    for one, other in ((0, 1), (1, 0)):
        if named[one] and plain[other]:
            parts = _parts(sides[one])
            values = [part[2] for part in parts]
            several = len({str(part[1]) for part in parts}) > 1
            if len(values) == 1:
                sides[one] = values[0]
            else:
                sides[one] = ["items", "()" if several else "", *values]
            if several and sides[other][:2] == ["items", ""]:
                sides[other] = ["items", "()", *sides[other][2:]]
    return sides[0], sides[1]


_living: weakref.WeakSet[SymbolicChecker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for checker in list(_living):
        checker.close()
