"""Damage: to bytes, to text, and to values that are written out again."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

TOKENS = [
    "&a ", "*a", "!!python/object/apply:os.system ['true']", "!!binary x", "!!float ", "!!int ", "? ", ": ", "- ", "{", "}", "[", "]",
    '"', "'", "\t", "\0", "\ufeff", "\ud800", "\n", "---\n", "...\n", "%YAML 9.9\n", "<<: ", "=", "1e999", "-0", "0x", "1_0", ".nan",
    "2001-99-99", "2001-01-01", "1:2:3", "~", "null", "é", "\u2028", "a" * 3000, "9" * 5000, "[" * 2000, "{a: " * 2000, "- " * 2000,
    "e" * 50, "\\", "#", "|", ">", "@", "`", ",",
]  # fmt: skip
ODD_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
]
ODD_TEXTS = [
    "", " ", "x", "1e-5", "none", "None", "true", "nan", "é", "\ud800", "\0", "../../etc/passwd", "/dev/zero", "/", "~", "*", "a b",
    "a" * 5000, "$(true)", "{}", "[1]", "os:system", "dpo", "linear", "cuda", "float64", "meta",
]  # fmt: skip


def odd(rng: Random, depth: int = 0) -> Any:
    """A value nobody meant."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(ODD_NUMBERS)
    if kind < 4:
        return rng.choice(ODD_TEXTS)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice((*ODD_TEXTS, "beta", "kind", "name")): odd(rng, depth + 1) for _ in range(rng.randrange(3))}
    value: Any = odd(rng, 3)
    for _ in range(rng.choice((1, 5, 60))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def value(rng: Random, given: Any, keys: list[str] | None = None) -> Any:
    """A copy with one place of it changed: replaced, dropped, doubled, or renamed."""
    if isinstance(given, dict) and given and rng.random() < 0.85:
        key = rng.choice(list(given))
        what = rng.randrange(6)
        changed = dict(given)
        if what == 0:
            changed.pop(key)
        elif what == 1:
            changed[_typo(rng, key)] = changed.pop(key)
        elif what == 2:
            changed[rng.choice(keys or ODD_TEXTS)] = odd(rng)
        else:
            changed[key] = value(rng, given[key])
        return changed
    if isinstance(given, list) and given and rng.random() < 0.8:
        at = rng.randrange(len(given))
        what = rng.randrange(4)
        changed = list(given)
        if what == 0:
            changed.pop(at)
        elif what == 1:
            changed.insert(at, changed[at])
        else:
            changed[at] = value(rng, given[at])
        return changed
    if isinstance(given, str) and rng.random() < 0.3:
        return _typo(rng, given)
    if isinstance(given, (int, float)) and not isinstance(given, bool) and rng.random() < 0.4:
        return rng.choice((-given, given + 1, given * 1000, given // 3, str(given)[:9]))
    return odd(rng)


def _typo(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(("", "x", "_", "é", text[at : at + 1])) + text[at + 1 :]


def as_json(changed: Any) -> bytes:
    """JSON as a careless writer would leave it: lone surrogates and NaN included."""
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def text(rng: Random, given: bytes) -> bytes:
    """Bytes with a few words of the notation in the wrong place."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(given) + 1)
        word = rng.choice(TOKENS).encode("utf-8", "surrogatepass")
        given = given[:at] + word + given[at + rng.choice((0, 0, 1, len(word))) :]
    return given


def raw(rng: Random, given: bytes) -> bytes:
    """Bytes flipped, cut, dropped, doubled or set to what lengths and counts dislike."""
    changed = bytearray(given)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            break
        at, what = rng.randrange(len(changed)), rng.randrange(7)
        if what < 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            del changed[at:]
        elif what == 3:
            del changed[at : at + rng.randint(1, 40)]
        elif what == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
        elif what == 5:
            width = rng.choice((1, 4, 8))
            changed[at : at + width] = rng.choice((b"\0", b"\xff", b"\x7f")) * width
        else:
            start = rng.randrange(min(16, len(changed)))
            changed[start] = rng.randrange(256)
    return bytes(changed)
