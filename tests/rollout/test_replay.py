"""Replay: the mixture's probability, the same prompt only, and an exact resume."""

from __future__ import annotations

import json

import pytest
import torch

from rlft.rollout import ReplayBuffer, ReplayItem, Rollout
from rlft.rollout.replay import prompt_key

NAN = float("nan")


def rollout(tag, prompts, n, version=0):
    rows = [[tag, p, k] for p in range(prompts) for k in range(n)]
    rewards = torch.tensor([float(100 * tag + 10 * p + k) for _, p, k in rows])
    return Rollout(rows, [[-0.1 * tag, -0.2, -0.3] for _ in rows], [k % 2 == 0 for _, _, k in rows], version), rewards


def item(reward=1.0, ids=(1,)):
    return ReplayItem(tuple(ids), (-1.0,) * len(ids), reward, True, 0)


def test_nothing_stored_or_probability_zero_changes_nothing():
    sampled, rewards = rollout(1, 3, 4)
    buffer = ReplayBuffer(8, probability=1.0)
    mixed, mixed_rewards = buffer.mix([[1], [2], [3]], sampled, rewards, seed=0)
    assert mixed == sampled
    assert torch.equal(mixed_rewards, rewards)
    assert len(buffer) == 12
    never = ReplayBuffer(8, probability=0.0)
    for tag in (1, 2):
        sampled, rewards = rollout(tag, 3, 4)
        assert never.mix([[1], [2], [3]], sampled, rewards, seed=tag)[0] == sampled


def test_probability_one_replays_only_older_answers_of_the_same_prompt():
    buffer = ReplayBuffer(4, probability=1.0)
    prompts = [[1], [2], [3]]
    buffer.mix(prompts, *rollout(1, 3, 4, version=7), seed=0)
    sampled, rewards = rollout(2, 3, 4, version=8)
    mixed, mixed_rewards = buffer.mix(prompts, sampled, rewards, seed=1)
    for row, (ids, logps) in enumerate(zip(mixed.completion_ids, mixed.logps, strict=True)):
        tag, prompt, k = ids
        assert (tag, prompt) == (1, row // 4)
        assert mixed_rewards[row].item() == 100 + 10 * prompt + k  # its own reward, length and flag travel along
        assert mixed.finished[row] == (k % 2 == 0)
        assert logps[0] == -0.1
    assert [i.completion_ids[0] for i in buffer.items([2])] == [2] * 4  # stored after the draw, oldest pushed out
    assert buffer.items([2])[0].weight_version == 8


def test_the_share_and_the_choice_are_uniform():
    buffer = ReplayBuffer(4, probability=0.3)
    prompts = [[p] for p in range(50)]
    buffer.mix(prompts, *rollout(1, 50, 4), seed=0)
    sampled, rewards = rollout(2, 50, 200)
    mixed, _ = buffer.mix(prompts, sampled, rewards, seed=1)
    old = [ids for ids in mixed.completion_ids if ids[0] == 1]
    total = len(mixed)
    assert abs(len(old) - 0.3 * total) < 4 * (0.3 * 0.7 * total) ** 0.5
    counts = torch.bincount(torch.tensor([ids[2] for ids in old]), minlength=4).double()
    assert ((counts - len(old) / 4) ** 2 / (len(old) / 4)).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_seed_decides():
    def run(seed):
        buffer = ReplayBuffer(4, probability=0.5)
        buffer.mix([[1]], *rollout(1, 1, 8), seed=0)
        return buffer.mix([[1]], *rollout(2, 1, 8), seed=seed)[0].completion_ids

    assert run(1) == run(1)
    assert len({str(run(seed)) for seed in range(5)}) > 1


def test_unscored_and_empty_answers_are_not_kept():
    buffer = ReplayBuffer(4, probability=1.0)
    sampled, rewards = rollout(1, 1, 3)
    rewards[1] = NAN
    _, mixed_rewards = buffer.mix([[1]], sampled, rewards, seed=0)
    assert torch.isnan(mixed_rewards[1])  # a fresh unscored row stays in its group
    assert len(buffer) == 2
    buffer.add([1], item(ids=()))
    buffer.add([1], item(reward=float("inf")))
    assert len(buffer) == 2


def test_examples_may_be_records_and_dtype_is_kept():
    class Example:
        prompt_ids = (1, 2)

    buffer = ReplayBuffer(2)
    buffer.add([1, 2], item(5.0, (9,)))
    assert buffer.items(Example.prompt_ids)[0].reward == 5.0
    mixed, rewards = ReplayBuffer(2).mix([Example()], *rollout(1, 1, 2), seed=0)
    assert rewards.dtype == torch.float32
    assert prompt_key([1, 23]) != prompt_key([12, 3])
    with pytest.raises(ValueError, match="the same number of rows for each of 2 prompts"):
        buffer.mix([[1], [2]], mixed, rewards[:1], seed=0)


def test_resume_is_exact_and_through_json():
    first = ReplayBuffer(3, probability=0.5)
    prompts = [[5], [6, 7]]
    for tag in range(1, 4):
        sampled, rewards = rollout(tag, 2, 2, version=tag)
        first.mix(prompts, sampled, rewards / 3, seed=tag)
    tensors, record = first.state_dict()
    frozen = {name: tensor.clone() for name, tensor in tensors.items()}
    second = ReplayBuffer(3, probability=0.5)
    second.load_state_dict(tensors, json.loads(json.dumps(record)))
    for tag in range(4, 8):
        sampled, rewards = rollout(tag, 2, 2)
        left, right = (buffer.mix(prompts, sampled, rewards, seed=tag) for buffer in (first, second))
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1])
    assert first.items([5]) == second.items([5])
    assert all(torch.equal(tensors[name], frozen[name]) for name in frozen)  # a saved state does not move


def test_an_empty_buffer_saves_and_loads():
    tensors, record = ReplayBuffer(3).state_dict()
    buffer = ReplayBuffer(3)
    buffer.load_state_dict(tensors, record)
    assert len(buffer) == 0
    buffer.add([1], item())
    buffer.load_state_dict({}, record)
    assert len(buffer) == 0


def test_a_wrong_state_is_refused_and_changes_nothing():
    source = ReplayBuffer(3)
    source.add([1], item(2.0, (4, 5)))
    tensors, record = source.state_dict()
    buffer = ReplayBuffer(3)
    buffer.add([9], item())
    for changes, broken, match in (
        ({}, {"format": 2}, "saved in format 2"),
        ({}, {"capacity": 4}, "replay_capacity is 3 and the saved buffer's 4"),
        ({}, {"counts": [2]}, "do not fit together"),
        ({"ids": torch.tensor([1])}, {}, "do not fit together"),
        ({"rewards": torch.tensor([])}, {}, "do not fit together"),
    ):
        with pytest.raises(ValueError, match=match):
            buffer.load_state_dict({**tensors, **changes}, {**record, **broken})
    assert len(buffer.items([9])) == 1


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"capacity": 0}, "replay_capacity must be"), ({"capacity": 1, "probability": 1.5}, "replay_probability must be")],
)
def test_wrong_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ReplayBuffer(**kwargs)
