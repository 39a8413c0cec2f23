"""From what a reward function is handed to the text it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["completion_text", "texts"]


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of one completion: a string as it is, or the last assistant message of a conversation.

    Args:
        completion: a string, or messages ``[{"role": ..., "content": ...}, ...]``. Content may be a string or a list
            of parts, of which those of type ``"text"`` are joined.

    Returns:
        The text; empty where the conversation holds no assistant message or its content is None (a bare tool call).

    Raises:
        ValueError: for anything else.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or not all(isinstance(message, Mapping) for message in completion):
        raise ValueError(
            f"a completion must be a string or a list of messages {{'role', 'content'}}, "
            f"got {type(completion).__name__}"
        )
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return _content_text(message.get("content"))
    return ""


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        return "".join(str(part.get("text", "")) for part in content if part.get("type", "text") == "text")
    raise ValueError(f"a message's content must be a string or a list of parts, got {type(content).__name__}")


def texts(completions: Sequence[Any]) -> list[str]:
    """:func:`completion_text` of every completion."""
    return [completion_text(completion) for completion in completions]
