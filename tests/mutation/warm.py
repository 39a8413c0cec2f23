"""Run tests against one mutant after another from a process that has imported everything once.

Each mutant lives in a forked child: its code goes into the functions that the tests already hold, the tests that call the
function run until the first failure, and the child is gone. Infinite loops meet a limit on CPU time.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mutation.mutators import MODULE, Mutant, mutated


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that saw it, or "" where none did, and how."""

    killed_by: str
    how: str  # name of the exception, "import", "timeout", "crash", or ""
    tests: int
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.how)


@dataclass
class Trace:
    """Which tests call which functions of the files under test, and what each costs."""

    callers: dict[str, set[int]]  # "file::function" -> indices of tests
    seconds: list[float]


class Tests:
    """The collected tests of one session, and children that run some of them."""

    def __init__(self, session: pytest.Session) -> None:
        self.items = session.items
        self.names = [item.nodeid for item in session.items]
        with contextlib.suppress(AssertionError):  # the first failure imports sympy: once here, or in every child
            torch.testing.assert_close(torch.ones(1), torch.zeros(1))
        gc.collect()
        gc.freeze()

    def run(self, order: list[int]) -> Iterator[tuple[int, str]]:
        """In a child: run tests one by one and name each one's exception, "" where it passed."""
        failures: list[str] = []

        class Listener:
            @staticmethod
            def pytest_runtest_logreport(report: pytest.TestReport) -> None:
                if report.failed:
                    crash = getattr(report.longrepr, "reprcrash", None)
                    failures.append((crash.message if crash else "error").split(":")[0].split("\n")[0])

        self.items[0].config.pluginmanager.register(Listener())
        for position, index in enumerate(order):
            item = self.items[index]
            following = self.items[order[position + 1]] if position + 1 < len(order) else None
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            yield index, failures[0] if failures else ""

    def trace(self, files: dict[str, str]) -> Trace:
        """Run every test once in a child, unmutated; ``files``: absolute path -> short name. Refuse failures."""

        def work(send: Callable[[Any], None]) -> None:
            called: dict[str, list[int]] = defaultdict(list)
            seconds, now = [], set()

            def note(frame: types.FrameType, event: str, _argument: object) -> None:
                if event == "call" and frame.f_code.co_filename in files:
                    now.add((files[frame.f_code.co_filename], frame.f_code.co_qualname.split(".<locals>")[0]))

            generator = self.run(list(range(len(self.items))))
            for index in range(len(self.items)):
                now.clear()
                started = time.process_time()
                sys.setprofile(note)
                _, failure = next(generator)
                sys.setprofile(None)
                if failure:
                    send({"failed": f"{self.names[index]}: {failure}"})
                    return
                seconds.append(time.process_time() - started)
                for file, function in sorted(now):
                    called[f"{file}::{function}"].append(index)
            send({"callers": called, "seconds": seconds})

        answer = in_child(work, cpu_seconds=1800)
        if answer is None or "failed" in answer:
            raise SystemExit(f"the tests must pass before anything is mutated, got {answer}; repair them first")
        return Trace({k: set(v) for k, v in answer["callers"].items()}, answer["seconds"])

    def judge(
        self, file: Path, module: str, mutant: Mutant, order: list[int], dependents: list[str], cpu_seconds: float
    ) -> Outcome:
        """Fork, put the mutant in, run tests in this order up to the first failure."""
        started = time.monotonic()
        code = compile(mutated(file.read_text(encoding="utf-8"), mutant), str(file), "exec")

        def work(send: Callable[[Any], None]) -> None:
            try:
                install(module, code, _module_names(file, mutant))
                for dependent in dependents:
                    _mark_again(dependent)
            except Exception as error:
                send({"by": f"import: {error}", "how": "import", "tests": 0})
                return
            count = 0
            for count, (index, failure) in enumerate(self.run(order), 1):
                if failure:
                    send({"by": self.names[index], "how": failure, "tests": count})
                    return
            send({"by": "", "how": "", "tests": count})

        answer = in_child(work, cpu_seconds=cpu_seconds)
        if answer is None:
            answer = {"by": "", "how": "timeout or crash", "tests": 0}
        return Outcome(answer["by"], answer["how"], answer["tests"], time.monotonic() - started)


def in_child(work: Callable[[Callable[[Any], None]], None], *, cpu_seconds: float) -> Any:
    """What ``work`` sends from a forked child, None where it died or ran out of CPU time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            with os.fdopen(writer, "w") as pipe:
                work(lambda value: pipe.write(json.dumps(value)))
        finally:
            os._exit(0)
    os.close(writer)
    pieces, deadline = [], time.monotonic() + 20 * cpu_seconds
    with os.fdopen(reader, "rb") as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe.fileno(), 1 << 16) if ready else b""
            if not piece:
                break
            pieces.append(piece)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    text = b"".join(pieces)
    return json.loads(text) if text else None


def install(module: str, code: types.CodeType, rebound: list[str]) -> None:
    """Put the code of a mutated module into the functions of the one that is loaded; bind ``rebound`` names anew."""
    loaded = sys.modules[module]
    fresh = _run(loaded, code)
    back: dict[int, Any] = {}
    for name, new in fresh.items():
        old = vars(loaded).get(name)
        if getattr(new, "__module__", None) != module or old is None:
            continue
        back[id(new)] = old
        if isinstance(new, types.FunctionType):
            _graft(old, new)
        elif isinstance(new, type):
            for attribute, value in vars(new).items():
                inner, target = _function(value), _function(vars(old).get(attribute))
                if inner is not None and target is not None:
                    _graft(target, inner)
    for name in rebound:
        old, new = vars(loaded)[name], fresh[name]
        if isinstance(new, dict):
            new = {key: back.get(id(value), value) for key, value in new.items()}
        for other in [m for n, m in list(sys.modules.items()) if n.startswith(("rlft", "tests"))]:
            if vars(other).get(name) is old:
                setattr(other, name, new)


def _run(loaded: types.ModuleType, code: types.CodeType) -> dict[str, Any]:
    names = {k: v for k, v in vars(loaded).items() if k.startswith("__") and k != "__builtins__"}
    exec(code, names)
    return names


def _function(value: object) -> types.FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def _graft(old: types.FunctionType, new: types.FunctionType) -> None:
    old.__code__ = new.__code__
    old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    vars(old).clear()
    vars(old).update(vars(new))


def _module_names(file: Path, mutant: Mutant) -> list[str]:
    """The names that the mutated statement of the module itself binds."""
    if mutant.function != MODULE:
        return []
    _, index = mutant.path[0]
    statement = ast.parse(file.read_text(encoding="utf-8")).body[index or 0]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _mark_again(module: str) -> None:
    """Run a module's decorators once more, for what a mutant does while modules are imported."""
    loaded = importlib.import_module(module)
    assert loaded.__file__ is not None
    code = compile(Path(loaded.__file__).read_text(encoding="utf-8"), loaded.__file__, "exec")
    for name, new in _run(loaded, code).items():
        old = vars(loaded).get(name)
        if isinstance(new, types.FunctionType) and new.__module__ == module and isinstance(old, types.FunctionType):
            vars(old).clear()
            vars(old).update(vars(new))
