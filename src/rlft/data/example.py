"""The records between a dataset row and a :class:`rlft.types.Batch`: :class:`Example` and :class:`Completion`."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Completion", "DataWarning", "Example"]

# What a reward function receives under names of its own; a column of the same name would clash with it.
_REWARD_ARGUMENTS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state"})


class DataWarning(UserWarning):
    """Something about the data that is allowed, counted, and probably not what was meant."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, as tokens.

    Attributes:
        ids: token ids, the end-of-sequence token included where there is one.
        mask: one bool per id, True = a token that is trained on.
        reward: reward of the whole answer; NaN = unscored, None = this data has no rewards.
        label: True = desirable (unpaired preferences), None = this data has no labels.
        truncated: whether tokens were cut from the end (such an answer holds no end-of-sequence token).
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    reward: float | None = None
    label: bool | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.mask):
            raise ValueError(f"mask must have one bool per id, {len(self.ids)}, got {len(self.mask)}")

    def __reduce__(self) -> Any:
        """Ids and mask as bytes: on the way from a worker, an object per token would cost more than tokenising."""
        mask = None if all(self.mask) else bytes(self.mask)
        return _completion, (array("q", self.ids).tobytes(), mask, self.reward, self.label, self.truncated)


def _completion(ids: bytes, mask: bytes | None, *rest: Any) -> Completion:
    tokens = _ids(ids)
    return Completion(tokens, (True,) * len(tokens) if mask is None else tuple(map(bool, mask)), *rest)


def _ids(data: bytes) -> tuple[int, ...]:
    ids = array("q")
    ids.frombytes(data)
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answers: a group. A preference pair holds two answers, the chosen one first.

    Attributes:
        prompt_ids: token ids of the prompt, exactly those that generation would start from.
        completions: the answers; empty for prompt-only data.
        columns: the row as it was read.
        prompt: the raw prompt, text or messages.
        margin: by how much the chosen answer is better, where the data says so.
        index: which row of the data this is.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    columns: Mapping[str, Any]
    prompt: str | list[dict[str, Any]]
    margin: float | None = None
    index: int = -1

    @property
    def extra_columns(self) -> dict[str, Any]:
        """The columns that a reward function may receive by keyword (those that clash with its own are left out)."""
        return {name: value for name, value in self.columns.items() if name not in _REWARD_ARGUMENTS}

    def __reduce__(self) -> Any:
        """As of :class:`Completion`."""
        rest = (self.completions, self.columns, self.prompt, self.margin, self.index)
        return _example, (array("q", self.prompt_ids).tobytes(), *rest)


def _example(prompt_ids: bytes, *rest: Any) -> Example:
    return Example(_ids(prompt_ids), *rest)
