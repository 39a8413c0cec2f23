"""Hashes of what stands in the cells of a data set: equal for equal content, in every process and every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rlft._words import without_address

__all__ = ["cells_hash", "row_hash"]


def cells_hash(cells: Iterable[Any]) -> str:
    """A hash of the cells of a column, in their order.

    Args:
        cells: whatever a row may hold. Mappings are compared by their entries in any order, arrays and tuples as lists, and
            objects that JSON does not know by their type and text.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for cell in cells:
        text = _text(cell)
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def row_hash(row: Mapping[str, Any]) -> bytes:
    """A hash of one row, 8 bytes; cells as in :func:`cells_hash`."""
    return hashlib.blake2b(_text(row), digest_size=8).digest()


def _text(cell: Any) -> bytes:
    try:
        return json.dumps(cell, sort_keys=True, default=_plain).encode("ascii")
    except (TypeError, ValueError):  # keys of several kinds, or a cell that holds itself
        return without_address(repr(cell)).encode("ascii", "backslashreplace")


def _plain(value: Any) -> Any:
    """What JSON does not know, in what it does."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # arrays, tensors, and the numbers in them
        return value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(map(repr, value))}
    return {type(value).__name__: without_address(repr(value))}
