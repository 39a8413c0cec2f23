"""One row, its cells checked and brought into one shape: :func:`parse_row`.

A row that cannot be used raises :class:`BadRow`: it is skipped and counted under the reason. What is wrong with the
whole data, such as an unknown role, raises ``ValueError``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlft import _check
from rlft.data.formats import Format

__all__ = ["BadRow", "Message", "ParsedRow", "parse_row"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_FLOAT32 = 3.4028234e38  # the largest number of a batch

Message = dict[str, Any]
Cell = str | list[Message]

# The reasons a row is skipped for. They are counted under these words.
CELL = "missing or non-text cell"
EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
EQUAL_PAIR = "chosen and rejected are equal"
PROMPTS_DIFFER = "chosen and rejected answer different prompts"
INVALID_TEXT = "invalid text (lone surrogate or NUL)"
NO_ANSWER_TURN = "conversation does not end with an assistant turn"
MIXED = "text and messages mixed in one row"
NON_TEXT = "message content is not text"
BAD_LABEL = "label is not a bool"
BAD_SCORES = "scores do not fit the completions"
TOO_LARGE = "number too large for float32"
BAD_MARGIN = "margin is not a number"
BAD_TOOLS = "tools or chat_template_kwargs cannot be read"


class BadRow(Exception):
    """A row that cannot be used; ``reason`` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """One row, checked.

    Attributes:
        prompt: text or messages; for ``text`` rows the empty text, or the messages before the first assistant turn.
        completions: text or messages each.
        rewards: one per completion (NaN = unscored), or None.
        label: of an unpaired row.
        margin: of a pair.
        tools: schemas for the chat template.
        template_kwargs: further arguments for the chat template.
    """

    prompt: Cell
    completions: tuple[Cell, ...] = ()
    rewards: tuple[float, ...] | None = None
    label: bool | None = None
    margin: float | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


# -- one row -----------------------------------------------------------------------------------------------------------
def parse_row(row: Mapping[str, Any], format: Format) -> ParsedRow:
    """Check one row's cells and bring them into one shape.

    Args:
        row: the cells by column name; not changed.
        format: one of :data:`FORMATS`.

    Raises:
        BadRow: this row cannot be used.
        ValueError: a role is unknown, or the conversation is in another layout.
    """
    parsed = _PARSERS[format](row)
    return replace(parsed, **_template_arguments(row)) if isinstance(parsed.prompt, list) else parsed


def _prompt(row: Mapping[str, Any]) -> Cell:
    prompt = _cell(row.get("prompt"))
    _refuse_empty(prompt, EMPTY_PROMPT)
    return prompt


def _parse_prompt(row: Mapping[str, Any]) -> ParsedRow:
    return ParsedRow(_prompt(row))


def _parse_completion(row: Mapping[str, Any]) -> ParsedRow:
    prompt, completions = _align(_prompt(row), [_cell(row.get("completion"))])
    return ParsedRow(prompt, tuple(completions))


def _parse_unpaired(row: Mapping[str, Any]) -> ParsedRow:
    return replace(_parse_completion(row), label=_label(row.get("label")))


def _parse_text(row: Mapping[str, Any]) -> ParsedRow:
    cell = _cell(row.get("messages") if "messages" in row else row.get("text"))
    if isinstance(cell, str):
        _refuse_empty(cell, EMPTY_COMPLETION)
        return ParsedRow("", (cell,))
    first = next((i for i, message in enumerate(cell) if message["role"] == "assistant"), len(cell))
    prompt, completions = _align(cell[:first], [cell[first:]])
    _refuse_empty(prompt, EMPTY_PROMPT)
    return ParsedRow(prompt, tuple(completions))


def _parse_preference(row: Mapping[str, Any]) -> ParsedRow:
    chosen, rejected = _cell(row.get("chosen")), _cell(row.get("rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(MIXED)
    if chosen == rejected:
        raise BadRow(EQUAL_PAIR)
    if "prompt" not in row:
        prompt, chosen, rejected = _split_shared(chosen, rejected)
    else:
        prompt, chosen, rejected = _without_repeat(_cell(row["prompt"]), chosen, rejected)
    _refuse_empty(prompt, EMPTY_PROMPT)
    prompt, completions = _align(prompt, [chosen, rejected])
    margin = row.get("margin")
    return ParsedRow(prompt, tuple(completions), margin=None if margin is None else _number(margin, BAD_MARGIN))


def _without_repeat(prompt: Cell, chosen: Cell, rejected: Cell) -> tuple[Cell, Cell, Cell]:
    """Cut the prompt off answers that are whole conversations and repeat it."""
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
            raise BadRow(MIXED)
        shared, chosen, rejected = _split_shared(chosen, rejected)  # UltraFeedback: the prompt is the question's text
        questions = [m.get("content", "") for m in shared if isinstance(m, dict) and m["role"] == "user"]
        if not questions or questions[-1].strip() != prompt.strip():
            raise BadRow(PROMPTS_DIFFER)
        return shared, chosen, rejected
    length = len(prompt)
    if length and chosen[:length] == prompt == rejected[:length]:
        return prompt, chosen[length:], rejected[length:]
    asks_again = any(answer[0]["role"] != "assistant" for answer in (chosen, rejected))
    if asks_again and prompt and prompt[-1]["role"] != "assistant":
        raise BadRow(PROMPTS_DIFFER)
    return prompt, chosen, rejected


def _parse_ranked(row: Mapping[str, Any]) -> ParsedRow:
    prompt, answers = _prompt(row), row.get("completions")
    scores = row.get("scores") if "scores" in row else row.get("rewards")
    if not isinstance(answers, (list, tuple)) or not isinstance(scores, (list, tuple)):
        raise BadRow(CELL)
    if not answers:
        raise BadRow(EMPTY_COMPLETION)
    if len(scores) != len(answers):
        raise BadRow(BAD_SCORES)
    prompt, completions = _align(prompt, [_cell(answer) for answer in answers])
    rewards = tuple(math.nan if score is None else _number(score, BAD_SCORES, nan=True) for score in scores)
    return ParsedRow(prompt, tuple(completions), rewards=rewards)


_PARSERS: dict[str, Callable[[Mapping[str, Any]], ParsedRow]] = {
    "prompt": _parse_prompt,
    "prompt_completion": _parse_completion,
    "preference": _parse_preference,
    "unpaired": _parse_unpaired,
    "ranked": _parse_ranked,
    "text": _parse_text,
}


def _align(prompt: Cell, completions: list[Cell]) -> tuple[Cell, list[Cell]]:
    """Check answers against their prompt; user turns that begin the answers belong to the prompt."""
    for completion in completions:
        if isinstance(completion, str) != isinstance(prompt, str):
            raise BadRow(MIXED)
    if isinstance(prompt, str):
        for completion in completions:
            _refuse_empty(completion, EMPTY_COMPLETION)
        return prompt, completions
    conversations: list[list[Message]] = [c for c in completions if isinstance(c, list)]
    leads: list[list[Message]] = []
    for index, messages in enumerate(conversations):
        if not messages:
            # Nothing after the last user turn: with a prompt before it, the answer is what is missing.
            raise BadRow(NO_ANSWER_TURN if prompt else EMPTY_COMPLETION)
        if messages[-1]["role"] != "assistant":
            raise BadRow(NO_ANSWER_TURN)
        start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        leads.append(messages[:start])
        conversations[index] = messages[start:]
        _refuse_empty([m for m in conversations[index] if m["role"] == "assistant"], EMPTY_COMPLETION)
    if any(lead != leads[0] for lead in leads):
        raise BadRow(PROMPTS_DIFFER)
    return [*prompt, *leads[0]], list(conversations)


def _split_shared(chosen: Cell, rejected: Cell) -> tuple[Cell, Cell, Cell]:
    """Cut what two whole texts or conversations share off as the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, list):
        if shared == min(len(chosen), len(rejected)):  # one continues the other: one of the answers is nothing
            raise BadRow(EMPTY_COMPLETION)
        if shared == 0 or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":  # pyright: ignore
            raise BadRow(PROMPTS_DIFFER)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    marker = chosen.rfind("\n\nAssistant:", 0, shared)  # the layout of Anthropic's HH
    if marker >= 0:
        cut = marker + len("\n\nAssistant:")
    else:
        # Answers begin at a word: go back to the start of the white space before the first word that differs.
        cut = shared
        while cut > 0 and not chosen[cut - 1].isspace():
            cut -= 1
        while cut > 0 and chosen[cut - 1].isspace():
            cut -= 1
    if not chosen[:cut].strip():
        raise BadRow(PROMPTS_DIFFER)
    return chosen[:cut], chosen[cut:], rejected[cut:]


# -- cells -------------------------------------------------------------------------------------------------------------
def _cell(value: Any) -> Cell:
    """Text, or a cleaned copy of a conversation."""
    if isinstance(value, str):
        _refuse_invalid(value)
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value):
        return [_message(message) for message in value]
    raise BadRow(CELL)


def _message(message: Mapping[str, Any]) -> Message:
    if "role" not in message:
        if "from" in message and "value" in message:
            raise ValueError(
                "messages must be {'role': ..., 'content': ...}, got {'from': ..., 'value': ...} (ShareGPT's layout); "
                "rename from -> role (human -> user, gpt -> assistant) and value -> content"
            )
        raise ValueError(f"a message must have the keys 'role' and 'content', got {sorted(message)}")
    role = message["role"]
    if role not in ROLES:
        meant = _ROLE_ALIASES.get(str(role).lower())
        hint = f"; did you mean {meant!r}?" if meant else _check.suggestion(str(role), ROLES)
        raise ValueError(f"role {role!r} of a message is unknown{hint}")
    # Arrow tables fill keys that other rows have with None: a template would print them.
    cleaned = {key: _without_none(value) for key, value in message.items() if value is not None}
    content = cleaned.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow(NON_TEXT)
        cleaned["content"] = "".join(part for part in parts if part is not None)
    elif not isinstance(content, str) and not cleaned.get("tool_calls"):
        raise BadRow(CELL if content is None else NON_TEXT)
    _refuse_invalid(cleaned)
    return cleaned


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _refuse_invalid(value: Any) -> None:
    """Text that no tokenizer can encode, or that a file cut in the middle leaves behind."""
    if isinstance(value, str):
        if "\x00" in value:
            raise BadRow(INVALID_TEXT)
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise BadRow(INVALID_TEXT) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_invalid(key)
            _refuse_invalid(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_invalid(item)


def _refuse_empty(cell: Cell, reason: str) -> None:
    if isinstance(cell, str):
        empty = not cell.strip()
    else:
        empty = not any(str(message.get("content", "")).strip() or message.get("tool_calls") for message in cell)
    if empty:
        raise BadRow(reason)


def _label(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        raise BadRow(CELL)
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise BadRow(BAD_LABEL)
    return bool(value)


def _number(value: Any, reason: str, *, nan: bool = False) -> float:
    """A float that float32 can hold, as batches do."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (bool, int, float)):
        raise BadRow(reason)
    if value != value and nan:
        return math.nan
    if value != value or value in (math.inf, -math.inf):
        raise BadRow(reason)
    if abs(value) > _FLOAT32:  # an integer of any length too
        raise BadRow(TOO_LARGE)
    return float(value)


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) and kwargs.strip() else kwargs or {}
    except ValueError:
        raise BadRow(BAD_TOOLS) from None
    if not (tools is None or isinstance(tools, (list, tuple))) or not isinstance(kwargs, Mapping):
        raise BadRow(BAD_TOOLS)
    _refuse_invalid(tools)
    _refuse_invalid(kwargs)
    return {"tools": _without_none(tools), "template_kwargs": _without_none(dict(kwargs))}
