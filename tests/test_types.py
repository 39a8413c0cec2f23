from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft.types import Batch

ROW_TENSORS = ("rewards", "old_logps", "ref_logps", "advantages", "values", "returns", "labels")


def make(seed: int = 0, *, rows: int = 7, groups: int = 3, tokens: int = 5, prompt: int = 4) -> Batch:
    """A ragged batch with every optional tensor; each group has a row, in no order."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=g)
    prompt_lengths = torch.randint(1, prompt + 1, (groups,), generator=g)
    completion_mask = torch.arange(tokens) < lengths[:, None]
    prompt_mask = torch.arange(prompt) < prompt_lengths[:, None]
    ids = torch.cat([torch.arange(groups), torch.randint(0, groups, (rows - groups,), generator=g)])
    token_tensor = {n: torch.randn(rows, tokens, generator=g) for n in ("old_logps", "ref_logps", "values", "returns")}
    return Batch(
        prompt_ids=torch.randint(1, 99, (groups, prompt), generator=g).where(prompt_mask, 0),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(1, 99, (rows, tokens), generator=g).where(completion_mask, 0),
        completion_mask=completion_mask,
        mask=completion_mask & (torch.rand(rows, tokens, generator=g) > 0.3),
        group_ids=ids[torch.randperm(rows, generator=g)],
        rewards=torch.randn(rows, generator=g),
        advantages=torch.randn(rows, generator=g),
        labels=torch.rand(rows, generator=g) > 0.5,
        extras={"margin": torch.randn(rows, generator=g), "token_kl": torch.randn(rows, tokens, generator=g)},
        **token_tensor,
    )


def content(batch: Batch) -> list[tuple[Any, ...]]:
    """What each row says, free of padding and of the numbering of groups."""
    rows = []
    for i in range(batch.num_rows):
        g = int(batch.group_ids[i])
        seen = batch.completion_mask[i]
        n = int(seen.sum())
        row: list[Any] = [tuple(batch.prompt_ids[g][batch.prompt_mask[g]].tolist())]
        row += [tuple(batch.completion_ids[i][:n].tolist()), tuple(batch.mask[i][:n].tolist())]
        for name, tensor in [(n_, getattr(batch, n_)) for n_ in ROW_TENSORS] + sorted(batch.extras.items()):
            if tensor is None:
                row.append((name, None))
            else:
                row.append((name, tensor[i].item() if tensor.ndim == 1 else tuple(tensor[i][:n].tolist())))
        rows.append(tuple(row))
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_select_keeps_what_the_rows_say(seed: int) -> None:
    batch = make(seed)
    order = torch.randperm(batch.num_rows, generator=torch.Generator().manual_seed(seed))[: seed % 7 + 1]
    picked = batch.select(order)
    says = content(batch)
    assert content(picked) == [says[i] for i in order.tolist()]
    assert picked.num_groups == batch.group_ids[order].unique().numel()
    assert picked.completion_ids.shape[1] == picked.completion_mask.sum(-1).max()
    assert picked.prompt_ids.shape[1] == picked.prompt_mask.sum(-1).max()
    same = (batch.group_ids[order][:, None] == batch.group_ids[order]).tolist()
    assert (picked.group_ids[:, None] == picked.group_ids).tolist() == same


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_rows", [1, 2, 4, 100])
def test_split_never_splits_a_group_and_loses_nothing(seed: int, max_rows: int) -> None:
    batch = make(seed)
    pieces = batch.split(max_rows)
    assert sorted(row for piece in pieces for row in content(piece)) == sorted(content(batch))
    assert sum(piece.num_groups for piece in pieces) == batch.num_groups
    for piece in pieces:
        assert piece.num_rows <= max_rows or piece.num_groups == 1
    if max_rows == 100:
        assert len(pieces) == 1


@pytest.mark.parametrize("seed", range(4))
def test_concat_undoes_split(seed: int) -> None:
    batch = make(seed)
    joined = Batch.concat(batch.split(2))
    assert sorted(content(joined)) == sorted(content(batch))
    assert joined.num_groups == batch.num_groups
    assert joined.num_tokens == batch.num_tokens


def test_concat_pads_and_renumbers() -> None:
    a, b = make(1, tokens=3, prompt=2), make(2, rows=5, groups=2, tokens=6, prompt=5)
    joined = Batch.concat([a, b], pad_id=42)
    assert content(joined) == content(a) + content(b)
    assert joined.completion_ids.shape == (12, 6)
    assert joined.prompt_ids.shape == (5, 5)
    assert joined.group_ids.tolist() == a.group_ids.tolist() + (b.group_ids + 3).tolist()
    assert joined.completion_ids[:7, 3:].eq(42).all()
    assert not joined.completion_mask[:7, 3:].any()


def test_concat_refuses() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        Batch.concat([])
    a = make(1)
    with pytest.raises(ValueError, match="different tensors"):
        Batch.concat([a, a.replace(rewards=None)])


def test_counts_and_immutability() -> None:
    batch = make(0)
    assert (batch.num_rows, batch.num_groups) == (7, 3)
    assert batch.num_tokens == int(batch.prompt_mask.sum()) + int(batch.completion_mask.sum())
    with pytest.raises(FrozenInstanceError):
        batch.rewards = None
    changed = batch.replace(rewards=torch.zeros(7))
    assert changed.rewards.eq(0).all()
    assert not batch.rewards.eq(0).all()
    assert changed.to("cpu").device == torch.device("cpu")
    assert content(batch.to("cpu")) == content(batch)


def _fields(batch: Batch) -> dict[str, Tensor]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "mask", "group_ids")
    return {n: getattr(batch, n) for n in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(7, 5)}, "mask must be a bool tensor"),
        ({"mask": torch.ones(7, 1).bool()}, "mask must have the shape of completion_ids"),
        ({"completion_mask": torch.ones(7, 4).bool()}, "completion_mask must have the shape"),
        ({"prompt_mask": torch.ones(3, 1).bool()}, "prompt_mask must have the shape of prompt_ids"),
        ({"group_ids": torch.zeros(7)}, "group_ids must be integers"),
        ({"group_ids": torch.zeros(6, dtype=torch.long)}, "group_ids must have one entry per row"),
        ({"rewards": torch.zeros(7, 1)}, "rewards must have one entry per row"),
        ({"labels": torch.zeros(6).bool()}, "labels must have one entry per row"),
        ({"old_logps": torch.zeros(7)}, "old_logps must have the shape of completion_ids"),
        ({"ref_logps": torch.zeros(7, 1)}, "ref_logps must have the shape of completion_ids"),
        ({"advantages": torch.zeros(7, 4)}, "advantages must be"),
        ({"extras": {"margin": torch.zeros(3)}}, "margin must have 7 rows"),
        ({"extras": {"margin": torch.zeros(7, requires_grad=True)}}, "margin requires grad"),
        ({"old_logps": torch.zeros(7, 5, requires_grad=True)}, "old_logps requires grad"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_tensors_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(**{**_fields(make(0)), **change})
