"""Attention of the sampler's row stores against plain softmax attention over lists of keys, in float64."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from rlft.rollout.prompt_rows import PromptRows
from rlft.rollout.row_cache import RowCache
from rlft.rollout.shared_rows import SharedRows, can_share

F64 = torch.float64
KV, GROUP, SIZE, SCALE = 2, 3, 4, 0.3


def dense(queries, keys, values):
    """One token: ``[K, G, d]`` over lists of ``[K, d]``."""
    k, v = torch.stack(keys, 1), torch.stack(values, 1)
    return (queries @ k.transpose(1, 2) * SCALE).softmax(-1) @ v


def drawn(rng, *shape):
    return torch.randn(*shape, dtype=F64, generator=rng)


@pytest.mark.parametrize("seed", range(4))
def test_shared_rows_against_lists(seed):
    """Rows and prompts come and go, rows move, columns are re-laid; every row sees its prompt and itself alone."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    slots, store = 6, SharedRows(1, 6, 40)
    assert can_share(torch.device("cpu"), F64)
    rows: list[dict] = []  # what each live row should see
    start: list[int] = []
    name, held_most, prompts_gone = 0, 0, 0
    for _ in range(120):
        action = rng.choice(["admit", "step", "step", "step", "drop"])
        if action == "admit" and len(rows) < slots:
            lengths = [rng.choice([1, 2, 3, 20]) for _ in range(2)]
            width = max(lengths)
            keys, values = drawn(torch_rng, 2, KV, width, SIZE), drawn(torch_rng, 2, KV, width, SIZE)
            source = [rng.randrange(2) for _ in range(rng.randint(1, slots - len(rows)))]
            columns = store.columns if rows else 0
            store.admit(
                SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values)]),
                torch.tensor(source),
                columns=columns,
                reserve=rng.choice([1, 3]),
                names=[name + s for s in source],
                lengths=[lengths[s] for s in source],
            )
            name += 2
            for s in source:
                own = slice(width - lengths[s], width)
                rows.append({"k": list(keys[s, :, own].unbind(1)), "v": list(values[s, :, own].unbind(1))})
                start.append(columns)
        elif action == "step" and rows:
            queries = drawn(torch_rng, len(rows), KV, GROUP, SIZE)
            keys, values = drawn(torch_rng, len(rows), KV, SIZE), drawn(torch_rng, len(rows), KV, SIZE)
            store.open(torch.tensor(start))
            found = store.attend(0, queries, keys, values, scale=SCALE)
            for row, q, k, v, mine in zip(rows, queries, keys, values, found, strict=True):
                row["k"].append(k)
                row["v"].append(v)
                torch.testing.assert_close(mine, dense(q, row["k"], row["v"]), rtol=0, atol=1e-12)
        elif action == "drop" and rows:
            before = len(store._names)
            gone = set(rng.sample(range(len(rows)), rng.randint(1, len(rows))))
            left = len(rows) - len(gone)
            target = [slot for slot in sorted(gone) if slot < left]
            source = [slot for slot in range(left, len(rows)) if slot not in gone]
            store.move(torch.tensor(source, dtype=torch.long), torch.tensor(target, dtype=torch.long), left)
            for s, t in zip(source, target, strict=True):
                rows[t], start[t] = rows[s], start[s]
            del rows[left:], start[left:]
            prompts_gone += before - len(store._names)
            if rows and (shift := min(start)):
                store.relayout(store.columns - shift, reserve=0)
                start = [column - shift for column in start]
        held_most = max(held_most, len(store._names))
        assert len(store._names) == len(set(store._home))
    assert held_most > 2
    assert prompts_gone > 5


def test_shared_prompts_are_held_once_and_shrink():
    rng = torch.Generator().manual_seed(0)
    store = SharedRows(1, 8, 2)
    keys = drawn(rng, 2, KV, 20, SIZE)
    layers = SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=keys)])
    names, lengths = [0] * 4 + [1] * 4, [20] * 4 + [5] * 4
    store.admit(layers, torch.tensor(names), columns=0, reserve=4, names=names, lengths=lengths)
    assert store.prompts.past(0)[0].shape == (2, KV, 20, SIZE)
    store.move(torch.tensor([4, 5, 6, 7]), torch.tensor([0, 1, 2, 3]), 4)  # the long prompt's rows have ended
    assert torch.equal(store.prompts.past(0)[0], keys[1:, :, -5:])


def test_rows_against_lists():
    """The cache with whole rows: padded ones see nothing of what stands before them."""
    rng = torch.Generator().manual_seed(0)
    cache = RowCache(1, 3)
    lengths = [4, 1]
    keys, values = drawn(rng, 2, KV, 4, SIZE), drawn(rng, 2, KV, 4, SIZE)
    prefilled = SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values)])
    cache.admit(prefilled, torch.tensor([0, 1, 0]), columns=4, reserve=1)
    rows = [
        {"k": list(keys[s, :, 4 - lengths[s] :].unbind(1)), "v": list(values[s, :, 4 - lengths[s] :].unbind(1))}
        for s in (0, 1, 0)
    ]
    for _ in range(4):
        q, k, v = drawn(rng, 3, KV, GROUP, SIZE), drawn(rng, 3, KV, SIZE), drawn(rng, 3, KV, SIZE)
        cache.open(torch.tensor([0, 3, 0]))
        found = cache.attend(0, q, k, v, scale=SCALE)
        for i, row in enumerate(rows):
            row["k"].append(k[i])
            row["v"].append(v[i])
            torch.testing.assert_close(found[i], dense(q[i], row["k"], row["v"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3], [5, 5, 2, 1], [1, 4, 1]])
def test_prompts_against_lists(lengths):
    rng = torch.Generator().manual_seed(0)
    total, width = sum(lengths), max(lengths)
    q, k, v = drawn(rng, total, KV, GROUP, SIZE), drawn(rng, total, KV, SIZE), drawn(rng, total, KV, SIZE)
    prompts = PromptRows(lengths, 1)
    found = prompts.attend(0, q, k, v, scale=SCALE)
    at = 0
    for prompt, length in enumerate(lengths):
        for t in range(length):
            past = slice(at, at + t + 1)
            expected = dense(q[at + t], list(k[past]), list(v[past]))
            torch.testing.assert_close(found[at + t], expected, rtol=0, atol=1e-12)
        for kept, given in ((prompts.layers[0].keys, k), (prompts.layers[0].values, v)):
            assert torch.equal(kept[prompt, :, width - length :], given[at : at + length].transpose(0, 1))
            assert not kept[prompt, :, : width - length].any()
        at += length
