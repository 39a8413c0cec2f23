"""Verifiers: rewards that check an answer against a reference, without running anything the model wrote."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlft import _check
from rlft.rewards.extract import extract_answer, marker_pattern
from rlft.rewards.judge import judge
from rlft.rewards.text import as_python, completion_text

__all__ = ["EquationVerifier", "ExactMatch", "MathVerifier"]

logger = logging.getLogger("rlft.rewards")

MARKERS = ("the final answer is", r"\boxed", "####")
"""What may announce an answer, in any capitals; the one that comes last in the text counts."""
FALLBACKS = ("whole", "last_number", "none")


class MathVerifier:
    r"""1 when the final answer of a completion equals the reference, 0 when not, None when that cannot be told.

    The answer is what follows the last marker ("The final answer is 5.", ``\boxed{5}``, ``#### 5``), or what the last
    ``<answer>`` tags enclose; a marker that no answer follows gives way to the one before. ``\boxed`` stands for
    ``\fbox`` and ``\boxed 5`` too.

    Text that is the reference's is right. Else both are read by a closed grammar: numbers, fractions, decimals, percent,
    units, names (``x = 5``), intervals and inequalities, tuples, sets, lists, letters of a choice, words; values are
    exact fractions. No sympy, no ``eval``; hostile text gives 0, never an error, and takes linear time. Units must agree
    where both sides have one (60 minutes is an hour), names likewise. None (unscored) is what a formula gets that is
    written otherwise than the reference (``symbolic`` can compare it), and what may mean two things (``1, 2`` for
    ``(1, 2)``).

    Args:
        markers: literals that announce an answer, matched in any capitals. The answer after a tag (``<answer>``) ends
            where the tag is closed. The default markers include ``<answer>``.
        fallback: how to read a completion without a marker: ``"whole"`` (the completion, or what follows ``</think>``,
            is an answer and nothing else), ``"last_number"``, or ``"none"`` (it scores 0).
        tolerance: relative; used only where one side was written as a decimal. 0 compares exactly.
        percent_is_ratio: whether ``50%`` is 1/2, or the sign is dropped like a unit (GSM8K references want that).
        symbolic: asked when the grammar does not decide: True for a :class:`~rlft.rewards.SymbolicChecker` (extra
            ``rlft[math]``), or any ``(answer, reference) -> bool | None``. False: such answers are unscored, or 0 where
            the reference is a number.
        name: the metric name.

    Raises:
        ValueError: for an unknown fallback, no marker with ``fallback="none"``, or a bad tolerance.
    """

    def __init__(
        self,
        *,
        markers: Sequence[str] = MARKERS,
        fallback: str = "whole",
        tolerance: float = 0.0,
        percent_is_ratio: bool = True,
        symbolic: bool | Callable[[str, str], bool | None] = False,
        name: str = "math_reward",
    ) -> None:
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback {fallback!r} is unknown{_check.suggestion(str(fallback), FALLBACKS)}")
        if isinstance(markers, str) or not all(isinstance(marker, str) and marker for marker in markers):
            raise ValueError(f"markers must be a list of non-empty strings, got {markers!r}")
        if not markers and fallback == "none":
            raise ValueError("without markers and with fallback='none' no completion can score; give one of the two")
        _check.number("tolerance", tolerance, low=0.0)
        self._markers = patterns(markers)
        self.fallback, self.tolerance, self.percent_is_ratio = fallback, tolerance, percent_is_ratio
        self.symbolic: Callable[[str, str], bool | None] | None = symbolic if callable(symbolic) else None
        if symbolic is True:
            from rlft.rewards.symbolic import SymbolicChecker

            self.symbolic = SymbolicChecker()
        self.__name__ = name
        self._warned = False

    def extract(self, text: str) -> str | None:
        """The text of the final answer in a completion, None where there is none."""
        return extract_answer(text, self._markers, fallback=self.fallback)

    def verify(self, completion: str, reference: Any) -> bool | None:
        """Whether the completion's final answer equals the reference; None where the reference cannot be judged.

        Args:
            completion: the text of a completion.
            reference: text (a bare answer, or a solution that ends in one) or a number.
        """
        expected = reference_text(reference, self._markers)
        if expected is None:
            return None
        answer = self.extract(completion)
        if answer is None:
            return False
        return judge(answer, expected, tolerance=self.tolerance, percent=self.percent_is_ratio, symbolic=self.symbolic)

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Score completions against the column ``answer``, or ``solution`` where there is no ``answer``.

        Raises:
            ValueError: when the dataset has neither column.
        """
        references = answer if answer is not None else solution
        if references is None:
            raise ValueError(f"{self.__name__} needs the column 'answer' or 'solution'; add one to the dataset")
        scores = []
        for completion, reference in zip(completions, references, strict=True):
            correct = self.verify(completion_text(completion), reference)
            if correct is None and not self._warned:
                self._warned = True
                logger.warning(
                    f"{self.__name__} cannot judge against the reference {str(reference)[-80:]!r}: "
                    f"such rows are unscored"
                )
            scores.append(None if correct is None else float(correct))
        return scores


def reference_text(reference: Any, markers: Sequence[re.Pattern[str]]) -> str | None:
    """The text of a reference's answer, whatever type it came in; None where it has none.

    Args:
        reference: text (a bare answer, or a solution that ends in one), a number or a truth value, also of numpy or torch.
        markers: of :func:`rlft.rewards.extract.marker_pattern`.
    """
    reference = as_python(reference)
    if isinstance(reference, bool):
        return str(reference)
    if isinstance(reference, (int, float, Fraction, Decimal)):
        value = _fraction(reference)
        if value is None:
            return None
        # a float is a decimal, and may be a rounded one
        return _decimal(reference) if isinstance(reference, (float, Decimal)) else str(value)
    if not isinstance(reference, str) or not reference.strip():
        return None
    return extract_answer(reference, markers, fallback="whole")


def patterns(markers: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """What finds the markers. The recorded default cannot grow; who names markers gets those and no others."""
    return tuple(
        marker_pattern(marker) for marker in ((*markers, "<answer>") if tuple(markers) == MARKERS else markers)
    )


def _decimal(number: float | Decimal) -> str:
    text = f"{number:f}" if isinstance(number, Decimal) else repr(float(number))
    return text if "." in text or "e" in text else f"{text}.0"


def _fraction(number: Any) -> Fraction | None:
    """The value a number shows when printed: 0.1 is 1/10, not the nearest binary fraction."""
    if isinstance(number, float):
        return Fraction(repr(float(number))) if math.isfinite(number) else None
    if isinstance(number, Decimal):
        # An exponent of a million would be a million-digit fraction.
        return Fraction(number) if number.is_finite() and abs(number.adjusted()) <= 1000 else None
    return Fraction(number)


class EquationVerifier:
    """1 when a completion is a prefix equation whose value is the answer, 0 when not, None without a reference.

    ``- number0 number1`` with ``numbers = [8, 2]`` is 6. Operators ``+ - * /``; operands ``number<k>`` or plain decimal
    constants. Values are exact fractions; a malformed equation or a division by zero scores 0.

    Args:
        tolerance: relative (absolute below 1): the references of such datasets are floats rounded to 4 digits or so.
        constants: whether an equation may contain constants. Without them a policy cannot score by writing the answer.
        max_tokens: a longer equation scores 0.
        name: the metric name.
    """

    def __init__(
        self, *, tolerance: float = 1e-4, constants: bool = True, max_tokens: int = 64, name: str = "equation_reward"
    ) -> None:
        _check.number("tolerance", tolerance, low=0.0)
        _check.number("max_tokens", max_tokens, low=1)
        self.tolerance, self.constants, self.max_tokens = tolerance, constants, max_tokens
        self.__name__ = name

    def evaluate(self, equation: str, numbers: Sequence[float]) -> Fraction | None:
        """The value of a prefix equation, None where it is malformed, too long or divides by zero."""
        if len(equation) > 32 * self.max_tokens:
            return None
        tokens = equation.split()
        if not 0 < len(tokens) <= self.max_tokens:
            return None
        stack: list[Fraction] = []
        for token in reversed(tokens):  # prefix notation read backwards needs a stack and no recursion
            if token in ("+", "-", "*", "/"):
                if len(stack) < 2:
                    return None
                left, right = stack.pop(), stack.pop()
                if token == "/" and right == 0:
                    return None
                stack.append(_OPERATORS[token](left, right))
            elif (operand := self._operand(token, numbers)) is not None:
                stack.append(operand)
            else:
                return None
        return stack[0] if len(stack) == 1 else None

    def _operand(self, token: str, numbers: Sequence[float]) -> Fraction | None:
        if match := _NUMBER_NAME.fullmatch(token):
            index = int(match.group(1))
            return _fraction(numbers[index]) if index < len(numbers) else None
        if self.constants and _CONSTANT.fullmatch(token):
            return Fraction(token)
        return None

    def __call__(
        self, completions: Sequence[Any], numbers: Sequence[Any], answer: Sequence[Any], **_: Any
    ) -> list[float | None]:
        """Score completions against the columns ``numbers`` (a list per row) and ``answer``."""
        scores: list[float | None] = []
        for completion, values, reference in zip(completions, numbers, answer, strict=True):
            reference, values = as_python(reference), as_python(values)
            expected = _fraction(reference) if isinstance(reference, (int, float)) else None
            if expected is None or values is None:
                scores.append(None)
                continue
            found = self.evaluate(completion_text(completion), [as_python(value) for value in values])
            slack = Fraction(self.tolerance) * max(Fraction(1), abs(expected))
            scores.append(float(found is not None and abs(found - expected) <= slack))
        return scores


_NUMBER_NAME = re.compile(r"number([0-9]{1,3})")
_CONSTANT = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")
_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


class ExactMatch:
    """1 when the completion's text is the reference's, 0 when not, None where the reference is missing (None or NaN).

    Surrounding whitespace is ignored. A reference that is no text, as a CSV file, pandas or numpy give it, has lost how it
    was written: a truth value is met in any capitals (``true``), a whole number by its digits (``007`` for 7), a float by
    every plain decimal of its value (``1.10`` for 1.1).

    Args:
        column: the dataset column that holds the reference (a string, or a list of strings of which any will do).
        ignore_case: compare in any capitals.
        name: the metric name.
    """

    def __init__(self, *, column: str = "answer", ignore_case: bool = False, name: str = "exact_match") -> None:
        self.column, self.ignore_case = column, ignore_case
        self.__name__ = name

    def _form(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()

    def _same(self, text: str, reference: Any) -> bool:
        text, form = self._form(text), self._form(str(reference))
        if text == form:
            return True
        if isinstance(reference, bool):
            return text.casefold() == form.casefold()
        if isinstance(reference, (int, float)):
            pattern = _WHOLE if isinstance(reference, int) else _DECIMAL
            return len(text) <= 100 and bool(pattern.fullmatch(text)) and Fraction(text) == _fraction(reference)
        return False

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completions against the column.

        Raises:
            ValueError: when the dataset has no such column.
        """
        if columns.get(self.column) is None:
            raise ValueError(
                f"{self.__name__} needs the column {self.column!r}{_check.suggestion(self.column, sorted(columns))}"
            )
        scores: list[float | None] = []
        for completion, reference in zip(completions, columns[self.column], strict=True):
            reference = as_python(reference)
            accepted = reference if isinstance(reference, (list, tuple)) else [reference]
            accepted = [
                item for item in map(as_python, accepted) if item is not None and item == item
            ]  # NaN is not itself
            if not accepted:
                scores.append(None if not isinstance(reference, (list, tuple)) else 0.0)
                continue
            text = completion_text(completion)
            scores.append(float(any(self._same(text, item) for item in accepted)))
        return scores


_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
