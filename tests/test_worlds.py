from __future__ import annotations

import doctest

import pytest
import torch

import rlft.worlds
from rlft.worlds import World

WORLDS = [
    World.bandit(5),
    World.autoregressive(vocab=3, length=3, eos=0),
    World.autoregressive(vocab=2, length=4),
    World.autoregressive(vocab=3, length=4, eos=2),
]


def test_docstring_example() -> None:
    assert doctest.testmod(rlft.worlds).failed == 0
    assert doctest.testmod(rlft.worlds).attempted == 2


def test_answers_by_hand() -> None:
    world = World.autoregressive(vocab=2, length=2, eos=0)
    assert world.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert world.mask.tolist() == [[True, False], [True, True], [True, True]]
    assert world.states.tolist() == [[0, 0], [0, 1], [0, 1]]
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(
        world.answer_logps(logits).exp(), torch.tensor([0.25, 0.375, 0.375], dtype=torch.float64), rtol=1e-14, atol=0
    )
    ref = torch.zeros(2, 2, dtype=torch.float64)
    first = 0.25 * torch.tensor(0.5).double().log() + 0.75 * torch.tensor(1.5).double().log()
    assert world.token_kl(logits, ref)[:, 0].tolist() == pytest.approx([first.item()] * 3, rel=1e-14)
    assert world.token_kl(logits, ref)[:, 1].abs().max() < 1e-15
    assert world.kl(logits, ref).item() == pytest.approx(first.item(), rel=1e-14)


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: f"{w.num_answers}-answers")
def test_probabilities_sum_to_one_and_the_optimum_is_one(world: World) -> None:
    logits, ref = world.random_logits(seed=1).requires_grad_(), world.random_logits(seed=2)
    rewards, beta = world.random_rewards(seed=3), 0.4
    assert world.answer_logps(logits).exp().sum().item() == pytest.approx(1, rel=1e-14)
    best = world.optimal_logits(ref, rewards, beta)
    star = world.answer_logps(best)
    value = world.optimal_value(ref, rewards, beta)
    # R is constant at pi*, and equal to V* = J(pi*)
    regularised = rewards - beta * (star - world.answer_logps(ref))
    torch.testing.assert_close(regularised, value.expand_as(regularised), rtol=1e-12, atol=1e-12)
    assert world.objective(best, ref, rewards, beta).item() == pytest.approx(value.item(), rel=1e-12)
    # Lemma 5: KL(pi || pi*) = (J(pi*) - J(pi)) / beta
    gap = (value - world.objective(logits, ref, rewards, beta)) / beta
    assert gap.item() == pytest.approx(world.kl(logits, best).item(), rel=1e-11)
    # and pi* is where the gradient of J vanishes
    at_best = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(world.objective(at_best, ref, rewards, beta), at_best)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: f"{w.num_answers}-answers")
def test_token_kl_adds_up_to_the_kl(world: World) -> None:
    logits, ref = world.random_logits(seed=4), world.random_logits(seed=5)
    along = world.expected(world.token_kl(logits, ref).sum(-1), logits)
    assert along.item() == pytest.approx(world.kl(logits, ref).item(), rel=1e-12)


def test_variance_loss_is_half_the_variance() -> None:
    world = World.bandit(3)
    logits, ref = world.random_logits(seed=6), world.random_logits(seed=7)
    rewards, mu = world.random_rewards(seed=8), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    regularised = rewards - 0.3 * (world.answer_logps(logits) - world.answer_logps(ref))
    expected = 0.5 * ((mu * regularised**2).sum() - (mu * regularised).sum() ** 2)
    assert world.variance_loss(logits, ref, rewards, 0.3, mu).item() == pytest.approx(expected.item(), rel=1e-12)


def test_tuples_and_samples() -> None:
    world = World.bandit(3)
    assert world.tuples(2).tolist() == [[i, j] for i in range(3) for j in range(3)]
    assert world.tuples(1).shape == (3, 1)
    logits = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).log()
    drawn = world.sample(logits, 20000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / 20000
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.012)


@pytest.mark.parametrize(
    "bad", [{"vocab": 1, "length": 1}, {"vocab": 2, "length": 0}, {"vocab": 2, "length": 2, "eos": 2}]
)
def test_impossible_worlds_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="vocab >= 2"):
        World.autoregressive(**bad)
