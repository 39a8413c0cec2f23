"""What the oracle is written with: Python floats, one number at a time, and the record it fills in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """The library must say no, with this word in its message."""


@dataclass
class Answer:
    """What a loss must return.

    Attributes:
        loss: entries ``[N]`` or ``[B][T]``, zero where they do not count.
        counted: which entries count.
        slopes: name of a learned tensor -> gradient of the plain sum of the entries (``sequence_mean``: of the sum of a
            row's entries, the row's length not yet divided out).
        scale: largest term that goes into an entry, what an error is measured against: one number, or one per entry.
        slope_scale: the same for the gradients.
        kink: an entry sits so close to a corner that its slope is not determined.
    """

    loss: list[Any]
    counted: list[Any]
    slopes: dict[str, list[Any]]
    scale: float | list[Any] = 1.0
    slope_scale: float | list[Any] = 1.0
    kink: bool = False


def sig(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def checked_exp(x: float, limit: float) -> float:
    """e^x, or the refusal the library owes."""
    if x > limit:
        raise Refused("overflow")
    return math.exp(x)


def near(a: float, b: float) -> bool:
    """Too close to tell which side of a corner a rounded number falls on."""
    return abs(a - b) < 1e-5 * max(1.0, abs(a), abs(b))
