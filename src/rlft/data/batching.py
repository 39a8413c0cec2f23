"""Examples -> :class:`rlft.types.Batch`: :func:`collate`, and :func:`pad_batch` for ids from elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.data.example import Example
from rlft.types import Batch

__all__ = ["collate", "pad_batch"]


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int,
    pair_rewards: Sequence[float] | None = None,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Examples as one batch: a group each, in order, their answers in order.

    ``rewards`` is there when every answer has one, ``labels`` likewise, and ``extras["margin"]`` when every example has
    one (both rows of a pair hold it). Masks come from lengths, never from ids, so ``pad_id`` may be any id.

    Args:
        examples: with at least one answer each.
        pad_id: id in padded places.
        pair_rewards: rewards for (chosen, rejected), so that objectives over rewards train on pairs.
        pad_to_multiple_of: round both widths up to a multiple of this.

    Returns:
        The batch, on the CPU, right-padded.

    Raises:
        ValueError: there is no example, one has no answer, or ``pair_rewards`` meets something that is no pair.
    """
    if not examples:
        raise ValueError("collate needs at least one example, got none")
    for example in examples:
        if not example.completions:
            raise ValueError(
                f"example {example.index} is a prompt without answers; sample answers first and build the batch with "
                f"pad_batch"
            )
    answers = [completion for example in examples for completion in example.completions]
    batch = pad_batch(
        [example.prompt_ids for example in examples],
        [[completion.ids for completion in example.completions] for example in examples],
        masks=[[completion.mask for completion in example.completions] for example in examples],
        pad_id=pad_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    changes: dict[str, Any] = {}
    if pair_rewards is not None:
        changes["rewards"] = _pair_rewards(examples, pair_rewards)
    elif all(answer.reward is not None for answer in answers):
        changes["rewards"] = torch.tensor([answer.reward for answer in answers], dtype=torch.float32)
    if all(answer.label is not None for answer in answers):
        changes["labels"] = torch.tensor([answer.label for answer in answers], dtype=torch.bool)
    if all(example.margin is not None for example in examples):
        margins = [example.margin for example in examples for _ in example.completions]
        changes["extras"] = {"margin": torch.tensor(margins, dtype=torch.float32)}
    return batch.replace(**changes)


def _pair_rewards(examples: Sequence[Example], pair_rewards: Sequence[float]) -> Tensor:
    if len(pair_rewards) != 2:
        raise ValueError(f"pair_rewards must be two numbers (chosen, rejected), got {list(pair_rewards)}")
    for example in examples:
        kinds = {(c.reward is None, c.label is None) for c in example.completions}
        if len(example.completions) != 2 or kinds != {(True, True)}:
            raise ValueError(
                f"pair_rewards is for preference pairs; example {example.index} has {len(example.completions)} answers "
                f"or rewards or labels of its own: leave pair_rewards out"
            )
    return torch.tensor([*pair_rewards] * len(examples), dtype=torch.float32)


def pad_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    masks: Sequence[Sequence[Sequence[bool]]] | None = None,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Ids as one right-padded batch, each prompt once.

    Args:
        prompts: ids of each prompt, at least one each.
        completions: for each prompt, the ids of its answers.
        pad_id: id in padded places.
        masks: for each id of each answer whether it is trained on; None = all are.
        pad_to_multiple_of: round both widths up to a multiple of this.

    Raises:
        ValueError: counts or lengths do not fit.
    """
    if isinstance(pad_id, bool) or not isinstance(pad_id, int) or pad_id < 0:
        raise ValueError(
            f"pad_id must be a token id >= 0, got {pad_id!r}; the tokenizer has no pad token: give any id, "
            f"the mask comes from lengths"
        )
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
    if len(prompts) != len(completions):
        raise ValueError(f"completions must have one list per prompt, {len(prompts)}, got {len(completions)}")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no token; a first answer token needs one before it to be scored from")
    rows = [ids for group in completions for ids in group]
    row_masks = [[True] * len(ids) for ids in rows] if masks is None else [mask for group in masks for mask in group]
    lengths = [len(ids) for ids in rows]
    if [len(mask) for mask in row_masks] != lengths:
        raise ValueError("masks must have one bool per id of every answer; their lengths differ")
    prompt_ids, prompt_mask = _pad(prompts, pad_id, pad_to_multiple_of)
    completion_ids, completion_mask = _pad(rows, pad_id, pad_to_multiple_of)
    mask = torch.zeros_like(completion_mask)
    mask[completion_mask] = _flat(row_masks, "B", torch.uint8) != 0
    sizes = torch.tensor([len(group) for group in completions])
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        mask=mask,
        group_ids=torch.arange(len(prompts)).repeat_interleave(sizes),
    )


def _pad(rows: Sequence[Sequence[int]], pad_id: int, multiple: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    width = max(1, int(lengths.max())) if len(rows) else 1
    width = -(-width // multiple) * multiple
    exists = torch.arange(width)[None] < lengths[:, None]
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    ids[exists] = _flat(rows, "q", torch.long)
    return ids, exists


def _flat(rows: Iterable[Iterable[int]], code: str, dtype: torch.dtype) -> Tensor:
    """All numbers in a row: arrays take them up several times as fast as torch takes a list of them."""
    flat = bytearray().join([array(code, row).tobytes() for row in rows])
    return torch.frombuffer(flat, dtype=dtype) if flat else torch.empty(0, dtype=dtype)
