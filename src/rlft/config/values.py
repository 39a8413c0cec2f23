"""Whether a value of a setting has the declared type, and the words for it where it has not."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from rlft import _check

__all__ = ["ConfigError", "type_name", "typed"]


class ConfigError(ValueError):
    """A setting that cannot work: names the field, the value and the remedy."""


def typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` if it has the declared type (an int passes as a float), else an error that names the type."""
    if (bad := _no_text(value)) is not None:
        raise ConfigError(
            f"{name} holds the text {ascii(bad)[:80]}, which has half a character (a surrogate) or a NUL; retype it"
        )
    if _fits(value, hint):
        if not _wants_float(hint) or isinstance(value, bool) or not isinstance(value, int):
            return value
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name} is a whole number of {len(str(value))} digits, too large to use") from None
    remedy = ""
    if isinstance(value, str):
        try:
            remedy = f"; write it as the number {float(value):g}, e.g. 1.0e-5 in YAML (1e-5 is a string there)"
        except ValueError:
            remedy = ""
    choices = list(_literals(hint))
    expected = " or ".join(map(repr, choices)) if choices and isinstance(value, str) else type_name(hint)
    hint_word = _check.suggestion(value, [str(c) for c in choices]) if choices and isinstance(value, str) else ""
    raise ConfigError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}{remedy}{hint_word}")


def _no_text(value: Any) -> str | None:
    """A string in a value that no file name, tokenizer or log could take; None when there is none."""
    if isinstance(value, str):
        return value if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value) else None
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    parts = value if isinstance(value, (list, tuple)) else ()
    return next((bad for part in parts if (bad := _no_text(part)) is not None), None)


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType) and str not in get_args(hint):
        return [a for part in get_args(hint) for a in _literals(part)]
    return []


def _wants_float(hint: Any) -> bool:
    return hint is float or (get_origin(hint) in (Union, types.UnionType) and float in get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin is dict:
        inner = get_args(hint)[1] if get_args(hint) else Any
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, inner) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(
        hint, str(hint).replace("typing.", "")
    )
