"""Named instants at which a test may kill the process or break the disk.

A failpoint does nothing until the environment says otherwise::

    RLFT_FAILPOINT="checkpoint.rename.before:1"                   SIGKILL this process at the first passage
    RLFT_FAILPOINT="checkpoint.record.write.before:3:oserror:ENOSPC"    raise OSError(ENOSPC) at the third passage
    RLFT_FAILPOINT="train.sample.before:2:signal:SIGTERM"               send this process SIGTERM at the second passage

Several, separated by commas, act together (a full disk, then a kill while cleaning up).

Everything that writes to disk goes through helpers that take the name of the instant as their first parameter,
``point``. :func:`failpoints_in_source` reads those names from the code, so a test can kill the process at each one
and notice a new write that has none.
"""

from __future__ import annotations

import ast
import errno
import os
import signal
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["VARIABLE", "failpoint", "failpoints_in_source", "instant", "within"]

VARIABLE = "RLFT_FAILPOINT"

_passages: Counter[str] = Counter()
_within: list[str] = []


def failpoint(point: str) -> None:
    """Do nothing, or fail here when the environment names this point and this passage.

    Args:
        point: dotted name, unique in the code.

    Raises:
        OSError: with the errno asked for, under ``name:count:oserror:ERRNO``.
        ValueError: when the variable cannot be read.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    point = "".join(_within) + point
    for name, count, action, number in map(_parse, wanted.split(",")):
        if name != point:
            continue
        _passages[point] += 1
        if _passages[point] != count:
            continue
        if action == "oserror":
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), number)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Put ``<prefix>.`` before every name passed inside: a rehearsal is not counted with the real thing."""
    _within.append(f"{prefix}.")
    try:
        yield
    finally:
        _within.pop()


@contextmanager
def instant(point: str) -> Iterator[None]:
    """Failpoints before and after one call to the system: ``<point>.before`` and ``<point>.after``."""
    failpoint(f"{point}.before")
    yield
    failpoint(f"{point}.after")


def _parse(wanted: str) -> tuple[str, int, str, int]:
    parts = wanted.split(":")
    name, count, action, value = [*parts, "signal", "SIGKILL"] if len(parts) == 2 else [*parts, "", "", ""][:4]
    number = getattr({"oserror": errno, "signal": signal}.get(action), value, None)
    if len(parts) not in (2, 4) or not name or not count.isdigit() or int(count) < 1 or not isinstance(number, int):
        raise ValueError(
            f"{VARIABLE} must be 'name:count', 'name:count:oserror:ERRNO' or 'name:count:signal:NAME' with count >= 1, got "
            f"{wanted!r}; for instance 'checkpoint.rename.before:1' or 'checkpoint.rename.before:1:oserror:ENOSPC'"
        )
    return name, int(count), action, int(number)


# -- reading the names from the code ------------------------------------------------------------------------------
# A carrier is a function whose first parameter is called ``point``. Inside a carrier, ``point`` or f"{point}.more" is
# handed on to another carrier; anywhere else the name must be a literal.


def failpoints_in_source(folder: Path | None = None) -> frozenset[str]:
    """Every failpoint name that the code under ``folder`` (this package) can pass.

    Raises:
        ValueError: when a name is computed where only a literal can be enumerated.
    """
    folder = Path(__file__).parent if folder is None else folder
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    carriers: dict[str, ast.FunctionDef | None] = {}
    for path, tree in trees.items():
        for function in _defined(tree):
            if function.name in carriers:
                raise ValueError(
                    f"{path.name}:{function.lineno}: two functions {function.name}(point, ...); rename one"
                )
            carriers[function.name] = function
    carriers["failpoint"] = None  # adds nothing to the name it is given
    inside = {id(node) for function in carriers.values() if function for node in ast.walk(function)}
    names: set[str] = set()
    for path, tree in trees.items():
        visible = {"failpoint"} | {function.name for function in _defined(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                visible |= {alias.name for alias in node.names if alias.name in carriers and alias.asname is None}
        for called, call in _calls(tree, visible):
            if id(call) in inside:
                continue
            first = call.args[0] if call.args else None
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                raise ValueError(
                    f"{path.name}:{call.lineno}: the name of a failpoint must be a literal string here, "
                    f"else it cannot be enumerated; write {called}('some.name', ...)"
                )
            names |= {first.value + rest for rest in _endings(called, carriers, ())}
    return frozenset(names)


def _defined(tree: ast.AST) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if [a.arg for a in function.args.args[:1]] == ["point"]]


def _calls(tree: ast.AST, visible: Collection[str]) -> list[tuple[str, ast.Call]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [(call.func.id, call) for call in calls if isinstance(call.func, ast.Name) and call.func.id in visible]


def _endings(name: str, carriers: Mapping[str, ast.FunctionDef | None], above: tuple[str, ...]) -> set[str]:
    """What a carrier adds to the name it is given, through everything that it calls."""
    function = carriers[name]
    if function is None:
        return {""}
    if name in above:
        return set()
    endings: set[str] = set()
    for called, call in _calls(function, carriers):
        first = call.args[0] if call.args else None
        if isinstance(first, ast.Name) and first.id == "point":
            suffix = ""
        elif isinstance(first, ast.JoinedStr) and len(first.values) == 2 and isinstance(first.values[1], ast.Constant):
            suffix = str(first.values[1].value)
        else:
            raise ValueError(f"{name}() must hand on point or f'{{point}}.more', not {ast.unparse(call)}")
        endings |= {suffix + rest for rest in _endings(called, carriers, (*above, name))}
    return endings
