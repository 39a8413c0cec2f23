"""Reward-to-go and advantages that are normalised over a step: by hand, by enumeration, over processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Objective, advantages, losses, recipes
from rlft.types import Batch
from rlft.worlds import World


def test_reward_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 99.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    found = advantages.reward_to_go(rewards, mask, gamma=0.5)
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0, 4.0], [2.5, 0.0, 3.0]], dtype=torch.float64))
    flat = advantages.reward_to_go(rewards, mask)
    assert flat.tolist() == [[7.0, 6.0, 4.0], [4.0, 0.0, 3.0]]


def all_answers(world: World, logits: Tensor, ref: Tensor, rewards: Tensor, rows: Tensor) -> Batch:
    """The answers ``rows`` [n] of one prompt, as the policy ``logits`` drew them."""
    old, reference = world.token_logps(logits.detach())[rows], world.token_logps(ref)[rows]
    n = len(rows)
    return Batch(
        prompt_ids=torch.zeros(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        completion_ids=torch.zeros(n, old.shape[1], dtype=torch.long),
        completion_mask=world.mask[rows],
        mask=world.mask[rows],
        group_ids=torch.zeros(n, dtype=torch.long),
        rewards=rewards[rows],
        old_logps=old,
        ref_logps=reference,
    )


@pytest.mark.parametrize(("baseline", "size", "beta"), [("none", 1, 0.0), ("none", 1, 0.7), ("leave_one_out", 2, 0.7)])
def test_the_expected_gradient_is_that_of_the_regularised_reward(baseline: str, size: int, beta: float) -> None:
    """Every group of ``size`` answers of a small autoregressive policy, weighted by its probability."""
    world = World.autoregressive(vocab=3, length=3, eos=0)
    ref, rewards = world.random_logits(seed=1), world.random_rewards(seed=2)
    logits = world.random_logits(seed=3).requires_grad_()
    (truth,) = torch.autograd.grad(world.objective(logits, ref, rewards, beta=beta), logits)
    objective = Objective(
        losses.reinforce, advantage="reward_to_go", baseline=baseline, kl="reward", beta=beta, averaging="sequence_sum"
    )
    total = torch.zeros_like(truth)
    probabilities = world.answer_logps(logits.detach()).exp()
    for rows in world.tuples(size):
        batch = objective.prepare(all_answers(world, logits, ref, rewards, rows))
        loss, _ = objective.compute({"logps": world.token_logps(logits)[rows]}, batch, objective.denominators(batch))
        (gradient,) = torch.autograd.grad(loss, logits)
        total -= probabilities[rows].prod() * gradient
    assert truth.abs().max() > 0.05
    torch.testing.assert_close(total, truth, rtol=1e-9, atol=1e-12)


def batch_of(lengths: list[int], rewards: list[float], groups: list[int]) -> Batch:
    n, width = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(n)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(
        prompt_ids=torch.zeros(max(groups) + 1, 1, dtype=torch.long),
        prompt_mask=torch.ones(max(groups) + 1, 1, dtype=torch.bool),
        completion_ids=torch.zeros(n, width, dtype=torch.long),
        completion_mask=mask,
        mask=mask,
        group_ids=torch.tensor(groups),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        old_logps=-torch.rand(n, width, generator=generator, dtype=torch.float64).where(mask, 0.0),
        ref_logps=-torch.rand(n, width, generator=generator, dtype=torch.float64).where(mask, 0.0),
    )


def test_reinforce_plus_plus_by_hand() -> None:
    batch = batch_of([2, 3, 1], [1.0, 0.0, float("nan")], [0, 0, 1])
    prepared = recipes.build("reinforce_plus_plus", beta=0.5).prepare(batch)
    raw, counted = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.bool)
    for row, (length, reward) in enumerate([(2, 1.0), (3, 0.0)]):
        for t in range(length):
            k1 = (batch.old_logps[row, t:length] - batch.ref_logps[row, t:length]).sum()  # type: ignore[index]
            raw[row, t], counted[row, t] = reward - 0.5 * k1, True
    values = raw[counted]
    expected = torch.zeros_like(raw)
    expected[counted] = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(prepared.advantages, expected, rtol=1e-12, atol=1e-12)


def others(values: Tensor, before: Tensor, after: Tensor) -> Any:
    """A gather over three processes of which this is the second."""
    return torch.cat([before, values, after]), slice(len(before), len(before) + len(values))


@pytest.mark.parametrize("advantage", ["batch_norm", "group_mean_batch_norm"])
def test_a_step_is_normalised_over_all_processes(advantage: str) -> None:
    objective = Objective(losses.reinforce, advantage=advantage)
    whole = batch_of([2, 3, 1, 2, 2, 1, 3], [1.0, 0.0, 4.0, 2.0, float("nan"), 5.0, 7.0], [0, 0, 1, 1, 2, 2, 2])
    expected = objective.prepare(whole).advantages
    assert expected is not None
    parts = [[0, 1], [2, 3], [4, 5, 6]]
    local = []
    for rows in parts:  # what each would put in: its own numbers before they are scaled
        rewards = whole.rewards[rows]  # type: ignore[index]
        if advantage == "group_mean_batch_norm":
            rewards = advantages.group_mean(rewards, whole.group_ids[rows])
        local.append(rewards[~torch.isnan(whole.rewards[rows])])  # type: ignore[index]
    mine = whole.select(torch.tensor(parts[1]))
    found = objective.prepare(mine, lambda values: others(values, local[0], local[2])).advantages
    torch.testing.assert_close(found, expected[parts[1]], rtol=1e-12, atol=1e-12)
    alone = objective.prepare(mine).advantages
    assert alone is not None
    assert (alone - expected[parts[1]]).abs().max() > 0.1  # the test can tell


def test_tokens_of_a_step_are_normalised_over_all_processes() -> None:
    objective = recipes.build("reinforce_plus_plus", beta=0.5)
    whole = batch_of([2, 3, 1, 2], [1.0, 0.0, 4.0, 2.0], [0, 0, 1, 1])
    expected = objective.prepare(whole).advantages
    assert expected is not None
    raw = Objective(losses.ppo_clip, advantage="reward_to_go", baseline="none", kl="reward", beta=0.5, clip_eps=0.2)
    first, second = (whole.select(torch.tensor(rows)) for rows in ([0, 1], [2, 3]))
    before = raw.prepare(first).advantages
    assert before is not None
    sent = before[first.mask]
    found = objective.prepare(second, lambda values: others(values, sent, sent[:0])).advantages
    torch.testing.assert_close(found, expected[2:, : second.mask.shape[1]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "reward_to_go"}, "does nothing: without kl='reward' or gamma < 1"),
        ({"advantage": "reward_to_go", "gamma": 0.9, "baseline": "mean"}, "baseline 'mean' is unknown"),
        ({"advantage": "reward_to_go", "gamma": 1.5}, "gamma"),
        ({"advantage": "reward_to_go", "gamma": 0.9, "whiten": 1}, "whiten must be true or false"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Objective(losses.reinforce, **settings)
