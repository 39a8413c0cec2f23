"""Rewards for the shape of a completion: format, length, repetition. None of them needs a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlft import _check
from rlft.rewards.text import completion_text

__all__ = ["LengthReward", "RegexReward", "RepetitionPenalty", "SoftOverlong", "TagFormat"]


class TagFormat:
    """1 when a completion is exactly ``<think>...</think> <answer>...</answer>``, 0 when not.

    Each tag stands once, in order; only whitespace may stand before, between and after the blocks. Found by plain
    string search, so the time is linear whatever the text.

    Args:
        tags: names of the blocks, in order.
        name: the metric name.
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer"), *, name: str = "format_reward") -> None:
        if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag for tag in tags):
            raise ValueError(f"tags must be a list of at least one name, got {tags!r}")
        self.tags = tuple(tags)
        self.__name__ = name

    def matches(self, text: str) -> bool:
        """Whether a text has the format."""
        position = 0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return False
            start, end = text.find(opening), text.find(closing)
            if text[position:start].strip() or start < position or end < start:
                return False
            position = end + len(closing)
        return not text[position:].strip()

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Score completions."""
        return [float(self.matches(completion_text(completion))) for completion in completions]


class RegexReward:
    """1 when a regular expression matches a completion from its start, 0 when not.

    Python's regular expressions can take exponential time on hostile text and cannot be interrupted meanwhile. So a
    pattern with a repeated group that itself repeats or branches (``(a+)*``, ``(a|b)+``) or with a back-reference is
    refused, and a text beyond ``max_chars`` scores 0. What is left is polynomial. :class:`TagFormat` is linear.

    Args:
        pattern: the expression; ``.`` matches newlines too.
        full: whether it must match the whole text.
        max_chars: a longer text scores 0.
        name: the metric name.

    Raises:
        ValueError: for a pattern that does not compile or may take exponential time.
    """

    def __init__(self, pattern: str, *, full: bool = True, max_chars: int = 4096, name: str = "format_reward") -> None:
        _check.number("max_chars", max_chars, low=1)
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        reason = _explosive(pattern)
        if reason:
            raise ValueError(
                f"pattern {pattern!r} may take exponential time: {reason}; use a character class ([ab]+ for (a|b)+), "
                f"or TagFormat"
            )
        self.full, self.max_chars = full, max_chars
        self.__name__ = name

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Score completions."""
        match = self._pattern.fullmatch if self.full else self._pattern.match
        found = []
        for completion in completions:
            text = completion_text(completion)
            found.append(float(len(text) <= self.max_chars and match(text) is not None))
        return found


_REPEAT = re.compile(r"[*+]|\{[0-9]*,?[0-9]*\}")


def _explosive(pattern: str) -> str | None:
    """Why a pattern might backtrack exponentially, None where it cannot. Errs on the side of refusing."""
    if re.search(r"(?<!\\)(?:\\\\)*\\[1-9]|\(\?P=|\(\?\(", pattern):
        return "it holds a back-reference or a conditional group"
    risky = [False]  # per open group: does it repeat or branch inside?
    position = 0
    while position < len(pattern):
        character = pattern[position]
        closed = False
        if character == "\\":
            position += 1
        elif character == "[":
            end = pattern.find("]", position + (3 if pattern[position + 1 : position + 2] == "^" else 2))
            while end > 0 and _escaped(pattern, end):
                end = pattern.find("]", end + 1)
            position = end if end > 0 else len(pattern)
        elif character == "(":
            risky.append(False)
        elif character == ")":
            inner = risky.pop() if len(risky) > 1 else False
            risky[-1] = risky[-1] or inner
            closed = inner
        elif character == "|":
            risky[-1] = True
        position += 1
        repeat = _REPEAT.match(pattern, position)
        if repeat and character not in "(|":
            if closed:
                return f"the repeated group that ends at character {position} repeats or branches inside"
            risky[-1] = True
    return None


def _escaped(pattern: str, position: int) -> bool:
    slashes = 0
    while pattern[position - 1 - slashes] == "\\":
        slashes += 1
    return slashes % 2 == 1


class LengthReward:
    """How near a completion's length is to a target: 1 at the target, falling linearly to 0 at 0 and at twice it.

    Args:
        target: the wanted length.
        unit: ``"tokens"`` (of ``completion_ids``), ``"words"`` or ``"chars"`` (of the text).
        name: the metric name.
    """

    def __init__(self, target: int = 256, *, unit: str = "tokens", name: str = "length_reward") -> None:
        _check.number("target", target, low=1)
        if unit not in _LENGTHS:
            raise ValueError(f"unit {unit!r} is unknown{_check.suggestion(str(unit), list(_LENGTHS))}")
        self.target, self.unit = target, unit
        self.__name__ = name

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        """Score completions."""
        measure = _LENGTHS[self.unit]
        lengths = [measure(completion, ids) for completion, ids in zip(completions, completion_ids, strict=True)]
        return [max(0.0, 1.0 - abs(length - self.target) / self.target) for length in lengths]


_LENGTHS = {
    "tokens": lambda completion, ids: len(ids),
    "words": lambda completion, ids: len(completion_text(completion).split()),
    "chars": lambda completion, ids: len(completion_text(completion)),
}


class RepetitionPenalty:
    """The share of n-grams that repeat earlier ones, times ``penalty``: 0 where all differ.

    ``penalty * (1 - distinct n-grams / n-grams)``; 0 for a text shorter than an n-gram.

    Args:
        ngram: words or tokens per n-gram.
        penalty: the lowest reward, below 0.
        unit: ``"words"`` (lower-cased) or ``"tokens"`` (of ``completion_ids``).
        name: the metric name.

    References:
        Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv:2502.03373), appendix on the
        repetition penalty.
    """

    def __init__(
        self, ngram: int = 3, *, penalty: float = -1.0, unit: str = "words", name: str = "repetition_penalty"
    ) -> None:
        _check.number("ngram", ngram, low=1)
        _check.number("penalty", penalty, high=0.0)
        if unit not in ("words", "tokens"):
            raise ValueError(f"unit {unit!r} is unknown{_check.suggestion(str(unit), ['words', 'tokens'])}")
        self.ngram, self.penalty, self.unit = ngram, penalty, unit
        self.__name__ = name

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        """Score completions."""
        scores: list[float | None] = []
        for completion, ids in zip(completions, completion_ids, strict=True):
            items = list(ids) if self.unit == "tokens" else completion_text(completion).lower().split()
            total = len(items) - self.ngram + 1
            distinct = len({tuple(items[start : start + self.ngram]) for start in range(max(0, total))})
            scores.append(self.penalty * (1.0 - distinct / total) if total > 0 else 0.0)
        return scores


class SoftOverlong:
    """0 up to ``max_length - cache`` tokens, then falling linearly to -1 at ``max_length``, and -1 beyond.

    Args:
        max_length: L_max, tokens.
        cache: L_cache, the width of the slope, tokens.
        name: the metric name.

    Raises:
        ValueError: unless ``0 < cache <= max_length``.

    References:
        Yu et al., "DAPO" (arXiv:2503.14476), equation 13 (L_max 20480, L_cache 4096).
    """

    def __init__(self, max_length: int = 20480, cache: int = 4096, *, name: str = "soft_overlong") -> None:
        _check.number("max_length", max_length, low=1)
        _check.number("cache", cache, low=1, high=max_length)
        self.max_length, self.cache = max_length, cache
        self.__name__ = name

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """Score completions by their tokens."""
        free = self.max_length - self.cache
        return [max(-1.0, min(0.0, (free - len(ids)) / self.cache)) for ids in completion_ids]
