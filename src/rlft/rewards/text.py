"""From what a reward function is handed to the text it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["as_python", "completion_text", "texts"]


def as_python(value: Any) -> Any:
    """What numpy, torch or pandas wrap, as Python has it: a scalar, a list; everything else as it is.

    A float of few bits gets the digits it prints: ``numpy.float32(0.1)`` is 0.1, and not 0.10000000149.
    """
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    if not hasattr(value, "tolist") or not hasattr(value, "dtype"):
        return value
    plain = value.tolist()
    if not isinstance(plain, float) or "64" in str(value.dtype) or plain != plain:
        return plain
    for digits in range(1, 17):
        short = float(f"{plain:.{digits}g}")
        if _rounded(short, value) == plain:
            return short
    return plain


def _rounded(number: float, like: Any) -> float:
    made = like.new_tensor(number) if hasattr(like, "new_tensor") else like.dtype.type(number)
    return float(made)


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
    messages: Any = as_python(completion)  # a cell of parquet is an array of messages
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"a completion must be a string or a list of messages {{'role', 'content'}}, "
            f"got {type(completion).__name__}"
        )
    for message in reversed(messages):
        if message.get("role") == "assistant":
            return _content_text(message.get("content"))
    return ""


def _content_text(content: Any) -> str:
    content = as_python(content)
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
