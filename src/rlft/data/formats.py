"""Formats of data: which columns mean what.

==================  ==================================================  ==========================================
format              columns                                             becomes
==================  ==================================================  ==========================================
``prompt``          ``prompt``                                          a prompt, to be answered by the policy
``prompt_completion``  ``prompt, completion``                           one answer
``preference``      ``prompt, chosen, rejected``, or ``chosen,          two answers, chosen first
                    rejected`` that begin alike; optional ``margin``
``unpaired``        ``prompt, completion, label``                       one answer with a label
``ranked``          ``prompt, completions, scores`` (or ``rewards``)    n answers with rewards
``text``            ``text`` or ``messages``                            language modelling / assistant turns
==================  ==================================================  ==========================================

A cell is text, or a conversation: a list of ``{"role", "content"}``. Conversational rows may carry ``tools`` and
``chat_template_kwargs``. Every other column stays with the row, for reward functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from rlft import _check

__all__ = ["FORMATS", "Format", "check_format", "detect_format"]

Format = Literal["prompt", "prompt_completion", "preference", "unpaired", "ranked", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen",), ("rejected",)),
    "ranked": (("prompt",), ("completions",), ("scores", "rewards")),
    "unpaired": (("prompt",), ("completion",), ("label",)),
    "prompt_completion": (("prompt",), ("completion",)),
    "text": (("text", "messages"),),
    "prompt": (("prompt",),),
}
_KNOWN_COLUMNS = (
    "prompt", "completion", "chosen", "rejected", "label", "completions", "scores", "rewards", "text", "messages",
)  # fmt: skip
_ALIASES = {
    "question": "prompt", "instruction": "prompt", "query": "prompt", "problem": "prompt", "input": "prompt",
    "answer": "completion", "response": "completion", "output": "completion", "solution": "completion",
    "conversation": "messages", "conversations": "messages", "dialogue": "messages", "content": "text",
}  # fmt: skip


def detect_format(columns: Iterable[str]) -> Format:
    """The format of data with these columns.

    Args:
        columns: column names.

    Returns:
        One of :data:`FORMATS`.

    Raises:
        ValueError: no format fits (the message lists the columns that are there and near misses), or two do.
    """
    present = list(columns)
    fits = [name for name, needs in _NEEDS.items() if all(any(c in present for c in options) for options in needs)]
    if not fits:
        raise ValueError(f"no data format fits the columns {present}{_hints(present)}; expected {_expected()}")
    if "text" in fits and "prompt" in fits and fits[0] in ("prompt_completion", "text"):
        other = next(name for name in fits if name != "text")
        rivals = [name for name in ("prompt", "completion", "text", "messages") if name in present]
        raise ValueError(f"the columns {rivals} fit two formats; say which with format='text' or format={other!r}")
    check_format(fits[0], present)
    return fits[0]  # pyright: ignore[reportReturnType]


def check_format(format: str, columns: Iterable[str]) -> None:
    """Refuse an unknown format, or columns it cannot be read from.

    Raises:
        ValueError: naming what is missing, what is there, and near misses.
    """
    present = list(columns)
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown{_check.suggestion(format, FORMATS)}")
    for options in _NEEDS[format]:
        there = [name for name in options if name in present]
        if not there:
            raise ValueError(
                f"format {format!r} needs the column {' or '.join(map(repr, options))}; the data has {present}"
                f"{_hints(present, options)}"
            )
        if len(there) > 1 and format != "text":  # messages go before the text rendered from them
            raise ValueError(f"columns {there} mean the same in format {format!r}; drop one")


def _hints(present: list[str], wanted: Sequence[str] = _KNOWN_COLUMNS) -> str:
    """Near misses: ``; did you mean 'chosen' by 'choosen'?``"""
    import difflib

    found = []
    for name in present:
        if name in _KNOWN_COLUMNS:
            continue
        close = difflib.get_close_matches(str(name).lower(), wanted, n=1, cutoff=0.75)  # of rows in memory: any key
        meant = close[0] if close else _ALIASES.get(str(name).lower())
        if meant is not None and meant in wanted and meant not in present:
            found.append(f"{meant!r} by {name!r}")
    if not found:
        return ""
    return f"; did you mean {', '.join(found)}? rename with columns={{expected: name in the data}}"


def _expected() -> str:
    return ", ".join(f"{' + '.join('|'.join(options) for options in needs)} ({name})" for name, needs in _NEEDS.items())
