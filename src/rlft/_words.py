"""Numbers and objects in a few characters, for people and for records that are compared."""

from __future__ import annotations

import re

__all__ = ["byte_size", "one_line", "short_number", "without_address"]

#: Where an object lies in memory, as its repr tells: another at every start.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def without_address(text: str) -> str:
    """A repr as it is in every process."""
    return _ADDRESS.sub("", text)


def one_line(text: object) -> str:
    """Text or repr on one line, as it is in every process."""
    return without_address(" ".join(str(text).split()))


def short_number(number: float) -> str:
    """``1536`` as ``1.54k``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def byte_size(number: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
