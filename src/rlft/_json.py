"""JSON that comes back as what went in.

Plain JSON turns tuples into lists and integer keys into strings, and writes NaN as something that is not JSON. Here
tuples and non-finite floats are tagged and come back as they were; what has no exact form is refused with the place
where it sits. Floats survive bit for bit (Python writes the shortest text that reads back equal).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

__all__ = ["canonical", "config_diff", "config_hash", "dumps", "loads"]

_TUPLE = "__tuple__"
_FLOAT = "__float__"
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(value: Any, *, what: str = "value") -> bytes:
    """Text (UTF-8) of a value made of mappings with string keys, lists, tuples, strings, numbers, bools and None.

    Raises:
        ValueError: names the place of what cannot be stored exactly.
    """
    return json.dumps(_encode(value, what), ensure_ascii=True, allow_nan=False, indent=1).encode("ascii") + b"\n"


def loads(data: bytes) -> Any:
    """Inverse of :func:`dumps`; plain JSON is read too. Duplicate keys are refused.

    Raises:
        ValueError: for anything that is not such JSON.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_decode, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deeply to be read") from None


def canonical(value: Any, *, what: str = "value") -> bytes:
    """One text per value: keys sorted, no spaces. What :func:`config_hash` and manifests hash."""
    encoded = _encode(value, what)
    return json.dumps(encoded, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":")).encode(
        "ascii"
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a configuration, independent of the order of its keys. Paths count as their text.

    Raises:
        ValueError: when a value has no exact text.
    """
    return hashlib.sha256(canonical(config, what="config")).hexdigest()


def config_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines ``path: old -> new`` for every entry that differs, sorted; empty when equal.

    Args:
        old: one configuration.
        new: the other.
    """
    before, after = _flat(old), _flat(new)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        left, right = before.get(path, "(absent)"), after.get(path, "(absent)")
        if left != right:
            lines.append(f"{path}: {left} -> {right}")
    return lines


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    return {path: canonical(value, what=path).decode("ascii")}


def _encode(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {_FLOAT: "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(inner, f"{place}[{index}]") for index, inner in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(inner, f"{place}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key in (_TUPLE, _FLOAT):
                raise ValueError(
                    f"{place} has the key {key!r}; keys must be strings other than {_TUPLE!r} and {_FLOAT!r}: "
                    f"write it as str({key!r})"
                )
        return {key: _encode(inner, f"{place}.{key}") for key, inner in value.items()}
    raise ValueError(
        f"{place} is a {type(value).__name__}, which has no exact JSON form; "
        f"expected mapping, list, tuple, str, int, float, bool or None: convert it, or store it as a tensor"
    )


def _decode(pairs: list[tuple[str, Any]]) -> Any:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"JSON object has the key {max(keys, key=keys.count)!r} twice")
    if len(result) == 1:
        (key, inner), *_ = result.items()
        if key == _TUPLE and isinstance(inner, list):
            return tuple(inner)
        if key == _FLOAT and isinstance(inner, str) and inner in _FLOATS:
            return _FLOATS[inner]
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"JSON holds {text}, which is not a JSON number")
