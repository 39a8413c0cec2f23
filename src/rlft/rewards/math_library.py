"""The verifier of the library math-verify under TRL's signature, beside :class:`~rlft.rewards.MathVerifier`."""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Sequence
from typing import Any

from rlft import _check
from rlft.rewards.answers import MAX_CHARS
from rlft.rewards.extract import extract_answer, is_answer
from rlft.rewards.judge import same_text
from rlft.rewards.text import completion_text
from rlft.rewards.verifiers import MARKERS, patterns, reference_text

__all__ = ["MathVerifyReward"]

logger = logging.getLogger("rlft.rewards")


class MathVerifyReward:
    r"""1 when math-verify finds the final answer of a completion equal to the reference, 0 when not, None when it cannot read the reference.

    The reward ``"math_verify"`` (extra ``rlft[math]``; the library is imported at the first call). It knows more of LaTeX
    than :class:`~rlft.rewards.MathVerifier`, and pays for more wrong answers: docs/rewards.md counts both. The answer is
    found as by ``MathVerifier``; text that is the reference's is right; else the library reads both and compares them
    with sympy.

    The library parses what a model wrote in the process of the training, with no limit on memory. Its limit on time is
    an alarm, which works in the main thread alone, where a Trainer calls rewards; in another there is none.

    Args:
        timeout: whole seconds for each reading and each comparison.
        float_rounding: decimals to which floats are compared.
        name: the metric name.

    Raises:
        ImportError: when math-verify is not installed.
        ValueError: for an option out of range.
    """

    def __init__(self, *, timeout: int = 5, float_rounding: int = 6, name: str = "math_verify_reward") -> None:
        _check.number("timeout", timeout, low=1)
        _check.number("float_rounding", float_rounding, low=0)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "the reward 'math_verify' needs math-verify, which is not installed: pip install 'rlft[math]' "
                "(the reward 'math' needs nothing)"
            )
        self.timeout, self.float_rounding = int(timeout), int(float_rounding)
        self.__name__ = name
        self._markers = patterns(MARKERS)
        self._warned = False

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
        scores: list[float | None] = []
        for completion, reference in zip(completions, references, strict=True):
            correct = self.verify(completion_text(completion), reference)
            if correct is None and not self._warned:
                self._warned = True
                logger.warning(
                    f"math-verify cannot read the reference {str(reference)[-80:]!r}: such rows are unscored"
                )
            scores.append(None if correct is None else float(correct))
        return scores

    def verify(self, completion: str, reference: Any) -> bool | None:
        """Whether the completion's final answer is the reference to the library; None where it cannot read the reference.

        Args:
            completion: the text of a completion.
            reference: text (a bare answer, or a solution that ends in one) or a number.
        """
        expected = reference_text(reference, self._markers)
        found = extract_answer(completion, self._markers)
        if expected is None or not expected.strip() or len(expected) > MAX_CHARS:
            return None
        if found is None or not found.strip() or len(found) > MAX_CHARS:
            return False
        if same_text(found, expected):
            return True
        if extract_answer(completion, self._markers, fallback="none") is None and not is_answer(found):
            return False  # in a text without an answer the library would take any number
        import math_verify  # pyright: ignore[reportMissingImports]

        alarm = self.timeout if threading.current_thread() is threading.main_thread() else None
        if alarm is None:  # the library says at every call that it has no limit
            for part in ("parser", "grader"):
                logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)
        gold = math_verify.parse(_as_formula(expected), parsing_timeout=alarm)
        if not gold:
            return None
        read = math_verify.parse(_as_formula(found), parsing_timeout=alarm)
        return bool(math_verify.verify(gold, read, float_rounding=self.float_rounding, timeout_seconds=alarm))


def _as_formula(text: str) -> str:
    """Between dollar signs, where the library looks for LaTeX."""
    text = re.sub(r"^\s*\$+|\$+\s*$", "", text.replace(r"\$", ""))
    return text if "$" in text else f"${text.strip()}$"
