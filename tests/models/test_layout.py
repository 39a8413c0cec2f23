"""Rows of prompt and completion: the order of tokens, the positions, and where each scored token sits."""

from __future__ import annotations

import pytest
import torch

from rlft.models.layout import build_rows
from rlft.types import Batch


def two_prompts() -> Batch:
    """Prompt 0: 10 11 12, prompt 1: 20; completions 30 31 | (none) | 50 51 52; row 0 answers prompt 1."""
    return Batch(
        prompt_ids=torch.tensor([[10, 11, 12], [20, 99, 99]]),
        prompt_mask=torch.tensor([[True, True, True], [True, False, False]]),
        completion_ids=torch.tensor([[30, 31, 99], [99, 99, 99], [50, 51, 52]]),
        completion_mask=torch.tensor([[True, True, False], [False, False, False], [True, True, True]]),
        mask=torch.tensor([[True, True, False], [False, False, False], [True, False, True]]),
        group_ids=torch.tensor([1, 0, 0]),
    )


def test_rows_by_hand() -> None:
    rows = build_rows(two_prompts())
    assert rows.input_ids.tolist() == [[20, 30, 31, 0, 0, 0], [10, 11, 12, 0, 0, 0], [10, 11, 12, 50, 51, 52]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert rows.targets.tolist() == [30, 31, 50, 51, 52]
    assert rows.row.tolist() == [0, 0, 2, 2, 2]
    assert rows.column.tolist() == [0, 1, 2, 3, 4]  # one before each target
    assert rows.last.tolist() == [2, 2, 5]


def test_left_padded_rows_by_hand() -> None:
    rows = build_rows(two_prompts(), padding_side="left")
    assert rows.input_ids.tolist() == [[0, 0, 0, 20, 30, 31], [0, 0, 0, 10, 11, 12], [10, 11, 12, 50, 51, 52]]
    assert rows.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert rows.column.tolist() == [3, 4, 2, 3, 4]
    assert rows.last.tolist() == [5, 5, 5]


def test_gather_and_scatter_are_inverse() -> None:
    batch = two_prompts()
    rows = build_rows(batch)
    gathered = rows.gather(rows.input_ids[..., None].double())
    assert gathered.squeeze(-1).tolist() == [20, 30, 12, 50, 51]  # the tokens before the targets
    back = rows.scatter(torch.arange(1.0, 6.0))
    assert back.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    values = torch.arange(1.0, 6.0, requires_grad=True)
    (rows.scatter(values) * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad.tolist() == [0, 1, 6, 7, 8]
    assert rows.gather_last(rows.input_ids).tolist() == [31, 12, 52]


def test_where_the_prompt_padding_sits_is_no_matter() -> None:
    batch = two_prompts()
    left = batch.replace(
        prompt_ids=torch.tensor([[10, 11, 12], [77, 77, 20]]),
        prompt_mask=torch.tensor([[True, True, True], [False, False, True]]),
    )
    for a, b in ((build_rows(left), build_rows(batch)),):
        for name in ("input_ids", "attention_mask", "position_ids", "row", "column", "targets", "last"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_completion_that_does_not_start_at_the_left_edge() -> None:
    """Not what a Batch should hold, but a wrong column here would score the wrong token silently."""
    batch = two_prompts()
    ids, exists = batch.completion_ids.flip(1), batch.completion_mask.flip(1)
    rows = build_rows(batch.replace(completion_ids=ids, completion_mask=exists, mask=exists))
    assert rows.input_ids[0].tolist() == [20, 31, 30, 0, 0, 0]
    assert rows.targets.tolist() == [31, 30, 52, 51, 50]
    assert rows.column.tolist() == [0, 1, 2, 3, 4]
    assert rows.scatter(torch.arange(1.0, 6.0)).tolist() == [[0, 1, 2], [0, 0, 0], [3, 4, 5]]


def test_empty_prompt_is_refused_where_it_matters() -> None:
    batch = two_prompts()
    none = batch.prompt_mask & torch.tensor([[False], [True]])
    with pytest.raises(ValueError, match="row 2 has an empty prompt"):
        build_rows(batch.replace(prompt_mask=none))
    unanswered = batch.replace(prompt_mask=none, completion_mask=batch.completion_mask & (torch.arange(3) < 1)[:, None])
    assert build_rows(unanswered.replace(mask=unanswered.completion_mask)).targets.tolist() == [30, 31]


def test_group_ids_of_any_integer_type() -> None:
    batch = two_prompts()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(
            build_rows(batch.replace(group_ids=batch.group_ids.to(dtype))).input_ids, build_rows(batch).input_ids
        )
