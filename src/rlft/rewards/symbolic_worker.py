"""The process that compares expression trees with sympy. Run as a script; imports sympy and the standard library alone.

Reads one JSON line per question ``[tree, tree]`` and answers ``1`` (equal), ``0`` (different), ``?`` (undecided) or
``!ValueError: why`` (sympy failed). It never parses text as mathematics: trees come from :mod:`rlft.rewards.latex` and are
turned into sympy objects node by node.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def limit(memory_mb: int) -> None:
    """No more memory than this, no files written, no core dumps. The parent's clock limits the time."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """SIGXCPU after so much more CPU time, should the parent be gone when its own clock runs out."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def build(tree: list[Any], sympy: Any) -> Any:
    """A sympy object from a tree, or a tuple ``("items", brackets, [...])`` / ``("eq", a, b)`` of them."""
    kind, *rest = tree
    if kind == "num":
        return sympy.Rational(rest[0])
    if kind == "sym":
        return sympy.Symbol(rest[0])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[rest[0]]
    if kind == "items":
        return ("items", rest[0], [build(part, sympy) for part in rest[1:]])
    if kind == "eq":
        return ("eq", build(rest[0], sympy), build(rest[1], sympy))
    if kind == "call":
        names = {"ln": "log", "abs": "Abs", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
        allowed = "sqrt sin cos tan cot sec csc asin acos atan sinh cosh tanh log exp Abs factorial".split()
        name = names.get(rest[0], rest[0])
        if name not in allowed:
            raise ValueError(name)
        return getattr(sympy, name)(build(rest[1], sympy))
    parts = [build(part, sympy) for part in rest]
    if kind == "add":
        return sympy.Add(*parts)
    if kind == "mul":
        return sympy.Mul(*parts)
    if kind == "neg":
        return sympy.Mul(sympy.Integer(-1), parts[0])
    if kind == "div":
        return sympy.Mul(parts[0], sympy.Pow(parts[1], sympy.Integer(-1)))
    if kind == "pow":
        return sympy.Pow(parts[0], parts[1])
    raise ValueError(kind)


def same(left: Any, right: Any, sympy: Any) -> bool | None:
    """Whether two built answers are equal; None where sympy cannot tell."""
    if isinstance(left, tuple) or isinstance(right, tuple):
        if not (isinstance(left, tuple) and isinstance(right, tuple)) or left[0] != right[0]:
            return False
        if left[0] == "eq":  # the same equation, whichever way round and times any number
            first, second = left[1] - left[2], right[1] - right[2]
            return any_true(zero(first - second, sympy), zero(first + second, sympy), multiple(first, second, sympy))
        if left[1] != right[1] or len(left[2]) != len(right[2]):
            return False
        if left[1] in ("", "{}"):
            return unordered(left[2], right[2], sympy)
        return all_true(*(same(a, b, sympy) for a, b in zip(left[2], right[2], strict=True)))
    if left == right:
        return True
    return zero(left - right, sympy)


def zero(difference: Any, sympy: Any) -> bool | None:
    if difference == 0:
        return True
    if difference.has(sympy.nan, sympy.zoo, sympy.oo):
        return False
    if sympy.simplify(difference) == 0:
        return True
    return difference.equals(0)


def multiple(first: Any, second: Any, sympy: Any) -> bool:
    """Whether one is the other times a number: 2x = 10 and x = 5."""
    if first == 0 or second == 0:
        return False
    ratio = sympy.simplify(first / second)
    return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)


def unordered(left: list[Any], right: list[Any], sympy: Any) -> bool | None:
    left = list(left)
    doubt = False
    for item in right:
        verdicts = [same(other, item, sympy) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            doubt = True
        else:
            return False
    return None if doubt else True


def any_true(*verdicts: bool | None) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def all_true(*verdicts: bool | None) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def failure(error: Exception) -> str:
    """One short line of plain characters."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    return f"!{type(error).__name__}: {said[:200]}".encode("ascii", "backslashreplace").decode()


def main() -> None:
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    import sympy

    limit(memory_mb)
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        limit_cpu(seconds)
        try:
            left, right = json.loads(line)
            verdict = same(build(left, sympy), build(right, sympy), sympy)
            reply = {True: "1", False: "0", None: "?"}[verdict]
        except Exception as error:  # whatever sympy stumbles over; the parent counts it
            reply = failure(error)
        out.write(reply.encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
