"""Finding the final answer in a completion."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from rlft.rewards.answers import MAX_CHARS, parse_answer
from rlft.rewards.cleaning import clean, plain_characters

__all__ = ["extract_answer", "is_answer", "marker_pattern"]

_TAIL = 4 * MAX_CHARS
_HITS = 16
"""So many of the last places of a marker are looked at: an answer is one of them, or the text is no answer."""
_BOXES = re.compile(r"\\(?:boxed|fbox|framebox|bbox)$", re.IGNORECASE)
_TAG = re.compile(r"<([A-Za-z][\w-]*)(?:\s[^<>]{0,100})?>$|\[([A-Za-z][\w-]*)\]$")
_LABEL = re.compile(
    r"(?:[\s*_#]*(?:so|thus|hence|therefore|the|my|our|final|correct|short)[ ,])*[\s*_]*(?:answer|result|solution)s?\b[*_]*"
    r"(?: is| are|[ ]?[:=]|[*_])*[\s*_:]*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:step|part|case|check|verif|note|explan|summary|conclu|example|remark|proof|solution|answer|reason|approach|analysis|"
    r"review|recap|sanity|alternativ|method|final|result|here|confirm|test)",
    re.IGNORECASE,
)
#: What is said of an answer, and is none.
_REMARK = re.compile(
    r"\s*(?:(?:indeed|also|not|now|thus|therefore|clearly) )*(?:correct|right|wrong|incorrect|verified|valid|reasonable|consistent|"
    r"confirmed|clear|obvious|unclear|as follows|below|above|given (?:by|above|below)|shown)\b",
    re.IGNORECASE,
)
_ENUMERATED = re.compile(r"\(?[0-9]{1,2}[.)] +\S")
_END = re.compile(r"\.(?=\s|$|</|<\|)|\u3002|\n|</[A-Za-z][\w-]*\s*>|</s>|<\||<eos>|<end_of_turn>|\[/[A-Za-z]\w*\]")
_FENCE = re.compile(r"[\s:*_]*(?:(?:\$\$|\\\[|```\w*)[ \t]*\n\s*)?")
_LAST_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?%?")
_TAGS_AROUND = re.compile(r"^(?:\s*<[A-Za-z][\w-]*>)+|(?:</[A-Za-z][\w-]*>\s*|<\|[\w|]{1,40}>\s*|</s>\s*)+$")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def marker_pattern(marker: str) -> re.Pattern[str]:
    r"""What finds a marker, in any capitals: ``\boxed`` stands for its relatives, a tag may have attributes."""
    if marker.lower() == r"\boxed":
        return re.compile(r"\\(?:boxed|fbox|framebox|bbox)(?![A-Za-z])", re.IGNORECASE)
    if re.fullmatch(r"<[A-Za-z][\w-]*>", marker):
        return re.compile(re.escape(marker[:-1]) + r"(?:\s[^<>]{0,100})?>", re.IGNORECASE)
    return re.compile(re.escape(marker), re.IGNORECASE)


def _braced(text: str, start: int) -> str | None:
    """What ``{...}`` at ``start`` (spaces allowed) encloses, braces within balanced; None if it does not close soon."""
    window = text[start : start + MAX_CHARS + 16]
    opened = len(window) - len(window.lstrip())
    if window[opened : opened + 1] != "{":
        return None
    depth, position = 0, opened
    while position < len(window):
        character = window[position]
        if character == "\\":  # an escaped brace is one of a set, and may stand alone
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return window[opened + 1 : position]
        position += 1
    return None


_OPTION = re.compile(r"(?:\s{0,3}\[[^\[\]{}]{0,40}\]){0,2}")
_BARE_END = re.compile(r"\s|\$|\\[)\]]|\.(?:\s|$)|[,;](?:\s|$)|$")


def _boxed(text: str, start: int) -> str | None:
    r"""What a box at ``start`` holds: ``{5}``, ``[2pt]{5}``, or the formula that follows (``\boxed 5``)."""
    options = _OPTION.match(text, start)
    start = options.end() if options else start
    window = text[start : start + MAX_CHARS]
    if window.lstrip()[:1] == "{":
        return _braced(text, start)
    window = window.lstrip(" ")
    depth = 0
    for end in _BARE_END.finditer(window):
        depth = window[: end.start()].count("{") - window[: end.start()].count("}") if end.start() < 200 else 0
        if depth <= 0:
            return window[: end.start()]
    return None


def is_answer(text: str) -> bool:
    """Whether a text is an answer on its own, and no sentence about one."""
    cleaned = clean(text[:MAX_CHARS])
    if not re.search(r"[^\W_]|\\[A-Za-z]", cleaned):
        return False
    return not _LONG_WORD.search(cleaned) or (not cleaned[0].isalpha() and parse_answer(text) is not None)


def _after(text: str, hit: re.Match[str]) -> tuple[str | None, bool]:
    """The text that follows a marker, and whether it is surely the answer."""
    marker, start = hit.group(), hit.end()
    if _BOXES.search(marker):
        found = _boxed(text, start)
        return found, bool(found and clean(found))
    if tag := _TAG.search(marker):
        closing = f"</{tag.group(1)}" if tag.group(1) else f"[/{tag.group(2)}]"
        window = text[start : start + 2 * MAX_CHARS]
        end = window.lower().find(closing.lower())
        if end >= 0:
            inner = _FENCE.sub("", window[:end].strip(), count=1)
            inner = inner.removesuffix("```").strip()
            label = _LABEL.match(inner)
            return inner[label.end() :] if label and label.end() < len(inner) else inner, bool(clean(inner))
    window = text[start : start + 2 * MAX_CHARS]
    window = window[_FENCE.match(window).end() :]  # type: ignore[union-attr]
    labelled = _LABEL.match(window)
    if labelled and labelled.end() < len(window):
        window = window[labelled.end() :]
        window = window[_FENCE.match(window).end() :]  # type: ignore[union-attr]
    again = window.lower().find(marker.lower())
    window = window if again < 0 else window[:again]
    end = _END.search(window)
    found = window[: end.start()] if end else window
    rest = window[end.start() :] if end else ""
    if not found.strip():
        return None, False
    if _REMARK.match(found):
        return found, False
    heading = marker.startswith("#") and bool(_ENUMERATED.match(window) or _HEADING.match(found.lstrip("* ")))
    if is_answer(found):
        return found, not heading
    # Words are an answer where nothing comes after them; a heading has a text under it.
    return found, not heading and not re.search(r"\w", rest)


def extract_answer(text: str, markers: Sequence[re.Pattern[str]], *, fallback: str = "whole") -> str | None:
    r"""The text of the final answer in a completion: what follows the last marker that an answer follows.

    Args:
        text: the completion.
        markers: of :func:`marker_pattern`; after a box the answer is what its braces enclose, after a tag what it
            encloses, after any other it runs to the end of the sentence or line. A marker before nothing, before a box
            that does not close, or that is a heading (``#### Check``, with text under it) gives way to the one before.
        fallback: without a marker: ``"none"``, ``"whole"`` (the whole text, or what follows ``</think>``, if short enough
            to be an answer alone) or ``"last_number"`` (the last number in the last 4,000 characters).

    Returns:
        The answer's text, or None. Never raises, and takes time linear in the text.
    """
    hits: list[re.Match[str]] = []
    for marker in markers:
        hits += deque(marker.finditer(text), maxlen=_HITS)
    second = None
    for hit in sorted(hits, key=lambda match: match.end(), reverse=True):
        found, sure = _after(text, hit)
        if sure:
            return found
        second = second if second is not None else found
    if hits:
        return second
    if fallback == "whole":
        thought, _, rest = text.rpartition("</think>")
        text = rest if thought and rest.strip() else text
        if len(text) > MAX_CHARS:
            return None
        return _TAGS_AROUND.sub("", text)
    if fallback == "last_number":
        last = deque(_LAST_NUMBER.finditer(plain_characters(text[-_TAIL:])), maxlen=1)
        return last[0].group() if last else None
    return None
