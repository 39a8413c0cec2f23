from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.data import Completion, Example, collate, pad_batch, tokenize
from tests.data.conftest import EOS, PAD, PLAIN_TEMPLATE, assistant, char_tokenizer, user


def test_pairs(char):
    data = tokenize(
        [{"prompt": "pp", "chosen": "abc", "rejected": "d"}, {"prompt": "q", "chosen": "e", "rejected": "fg"}], char
    )
    batch = collate(data.examples, pad_id=PAD)
    ids = char.convert_tokens_to_ids
    p, q, a, b, c, d, e, f, g = (ids(x) for x in "pqabcdefg")
    assert batch.prompt_ids.tolist() == [[p, p], [q, PAD]]
    assert batch.prompt_mask.tolist() == [[True, True], [True, False]]
    assert batch.completion_ids.tolist() == [[a, b, c, EOS], [d, EOS, PAD, PAD], [e, EOS, PAD, PAD], [f, g, EOS, PAD]]
    assert batch.completion_mask.sum(-1).tolist() == [4, 2, 2, 3]
    assert torch.equal(batch.mask, batch.completion_mask)
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.rewards is None
    assert batch.labels is None
    assert dict(batch.extras) == {}
    assert batch.completion_ids.dtype == torch.int64


def test_pair_rewards_and_margins(char):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": m} for m in (1, 2.5)]
    batch = collate(tokenize(rows, char).examples, pad_id=0, pair_rewards=[0.5, -0.5])
    assert batch.rewards.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert batch.rewards.dtype == torch.float32
    assert batch.extras["margin"].tolist() == [1.0, 1.0, 2.5, 2.5]
    mixed = tokenize([rows[0], {**rows[1], "margin": None}], char)
    assert "margin" not in collate(mixed.examples, pad_id=0).extras
    assert collate(mixed.examples, pad_id=0).rewards is None


def test_pair_rewards_need_pairs(char):
    pairs = tokenize([{"prompt": "p", "chosen": "a", "rejected": "b"}], char).examples
    with pytest.raises(ValueError, match="two numbers"):
        collate(pairs, pad_id=0, pair_rewards=[1.0])
    for row in (
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completions": ["c", "d"], "scores": [1, 2]},
        {"prompt": "p", "completion": "c", "label": True},
    ):
        with pytest.raises(ValueError, match="pair_rewards is for preference pairs"):
            collate([*pairs, *tokenize([row], char).examples], pad_id=0, pair_rewards=[0.5, -0.5])


def test_ranked_groups_and_labels(char):
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, None, 3]},
        {"prompt": "q", "completions": ["a"], "scores": [4]},
    ]
    batch = collate(tokenize(rows, char).examples, pad_id=0)
    assert batch.group_ids.tolist() == [0, 0, 0, 1]
    assert batch.rewards[[0, 2, 3]].tolist() == [1.0, 3.0, 4.0]
    assert math.isnan(batch.rewards[1])
    unpaired = [{"prompt": "p", "completion": "c", "label": flag} for flag in (True, False)]
    batch = collate(tokenize(unpaired, char).examples, pad_id=0)
    assert batch.labels.tolist() == [True, False]
    assert batch.labels.dtype == torch.bool
    assert batch.rewards is None


def test_masked_turns_exist_but_are_not_trained():
    tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
    row = {"messages": [user("q"), assistant("x"), user("r"), assistant("z")]}
    batch = collate(tokenize([row, {"messages": [user("q"), assistant("x")]}], tokenizer).examples, pad_id=EOS)
    assert batch.completion_mask.sum(-1).tolist() == [9, 2]
    assert batch.mask[0].tolist() == [True] * 2 + [False] * 5 + [True] * 2
    assert batch.mask[1].tolist() == [True] * 2 + [False] * 7


@pytest.mark.parametrize("pad_id", [PAD, EOS, 17])
def test_masks_come_from_lengths_whatever_the_pad_id(char, pad_id):
    rows = [{"prompt": "p", "completion": "abc"}, {"prompt": "pppp", "completion": "a"}]
    data = tokenize(rows, char).examples
    batch, other = collate(data, pad_id=pad_id), collate(data, pad_id=99)
    assert torch.equal(batch.completion_mask, other.completion_mask)
    assert torch.equal(batch.prompt_mask, other.prompt_mask)
    assert torch.equal(batch.mask, other.mask)
    assert batch.mask[0, 3]  # the EOS, though it may be the pad id
    assert batch.completion_ids[1].tolist()[2:] == [pad_id] * 2


def test_prompts_without_answers_are_refused(char):
    with pytest.raises(ValueError, match="prompt without answers"):
        collate(tokenize([{"prompt": "p"}], char).examples, pad_id=0)
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)


@pytest.mark.parametrize("pad_id", [None, -1, True, 1.0])
def test_bad_pad_id(pad_id):
    with pytest.raises(ValueError, match="pad_id must be a token id"):
        pad_batch([[1]], [[[2]]], pad_id=pad_id)


def test_pad_batch_checks():
    with pytest.raises(ValueError, match="one list per prompt, 2, got 1"):
        pad_batch([[1], [2]], [[[3]]], pad_id=0)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        pad_batch([[1], []], [[[3]], [[4]]], pad_id=0)
    with pytest.raises(ValueError, match="one bool per id"):
        pad_batch([[1]], [[[3, 4]]], pad_id=0, masks=[[[True]]])
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        pad_batch([[1]], [[[3]]], pad_id=0, pad_to_multiple_of=0)
    batch = pad_batch([[1], [2]], [[[3, 4], []], [[5]]], pad_id=0)
    assert batch.group_ids.tolist() == [0, 0, 1]
    assert batch.completion_mask.sum(-1).tolist() == [2, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=5),
            st.lists(
                st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=3
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    pad_id=st.integers(0, 9),
    multiple=st.integers(1, 4),
)
def test_every_id_and_flag_comes_back(groups, pad_id, multiple):
    examples = [
        Example(
            tuple(prompt),
            tuple(
                Completion(tuple(i for i, _ in answer), tuple(f for _, f in answer), reward=1.0) for answer in answers
            ),
            {},
            "",
        )
        for prompt, answers in groups
    ]
    batch = collate(examples, pad_id=pad_id, pad_to_multiple_of=multiple)
    assert batch.prompt_ids.shape[1] % multiple == 0
    assert batch.completion_ids.shape[1] % multiple == 0
    row = 0
    for group, example in enumerate(examples):
        assert tuple(batch.prompt_ids[group][batch.prompt_mask[group]].tolist()) == example.prompt_ids
        for completion in example.completions:
            exists = batch.completion_mask[row]
            assert batch.group_ids[row] == group
            assert tuple(batch.completion_ids[row][exists].tolist()) == completion.ids
            assert tuple(batch.mask[row][exists].tolist()) == completion.mask
            assert exists.tolist() == sorted(exists.tolist(), reverse=True)  # right-padded
            assert not (batch.mask[row] & ~exists).any()
            row += 1
    assert row == batch.num_rows
    assert batch.num_tokens == sum(len(e.prompt_ids) + sum(len(c.ids) for c in e.completions) for e in examples)
