"""The preference game, solved exactly: which point each loop rests at, on answers that beat each other in a circle.

The truth comes from Newton's method on the equilibrium's own equation; the loops use the losses' gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlft import losses
from rlft.models import MovingAverage
from rlft.worlds import World

F64 = torch.float64
TAU = 0.5
WORLDS = {
    "bandit": World.bandit(5),
    "tree": World.autoregressive(vocab=2, length=3, eos=0),
}


def game(world: World, seed: int = 0) -> Tensor:
    """P(i beats j): a circle (each answer beats the next), and noise; antisymmetric around 1/2."""
    n = world.num_answers
    g = torch.Generator().manual_seed(seed)
    raw = 0.3 * torch.rand(n, n, generator=g, dtype=F64)
    for i in range(n):
        raw[i, (i + 1) % n] += 0.65
    return 0.5 + 0.5 * (raw - raw.T)


def nash(world: World, ref: Tensor, table: Tensor) -> Tensor:
    """log pi* of the game regularised by TAU KL(. || ref): the root of log pi - log ref - P pi / TAU + log Z, by Newton."""
    log_ref = world.answer_logps(ref)
    x = log_ref.clone()
    for _ in range(50):
        x = x.detach().requires_grad_()
        pi = x.softmax(0)
        f = x.log_softmax(0) - (log_ref + table @ pi / TAU).log_softmax(0)
        rows = [torch.autograd.grad(f[k], x, retain_graph=True)[0] for k in range(len(x))]
        step = torch.linalg.lstsq(torch.stack(rows), f.detach()).solution
        x = x.detach() - step
    assert float(f.detach().abs().max()) < 1e-13
    return x.log_softmax(0)


def mixed(logits: Tensor, ref: Tensor, a: float) -> Tensor:
    """The token-level mixture policy^(1-a) ref^a, as a table of logits."""
    return (1 - a) * logits.log_softmax(-1) + a * ref.log_softmax(-1)


def sampled_gradient(world: World, logits: Tensor, ref: Tensor, table: Tensor, opponent: Tensor) -> Tensor:
    """Expected gradient of ``nash_md_pg`` over every meeting (y of the policy, y' of the opponent)."""
    n = world.num_answers
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    logits = logits.detach().requires_grad_()
    logps, ref_logps = world.token_logps(logits), world.token_logps(ref)
    output = losses.nash_md_pg(logps[i], ref_logps[i], table[i, j], world.mask[i], beta=TAU)
    weights = (world.answer_logps(logits).detach().exp()[i] * opponent.exp()[j]).detach()
    return torch.autograd.grad((weights * output.loss.sum(-1)).sum(), logits)[0]


def enumerated_gradient(world: World, logits: Tensor, ref: Tensor, table: Tensor, opponent: Tensor) -> Tensor:
    """Minus the gradient of P(policy beats a fixed opponent) - TAU KL(policy || ref), with no loss of ours in it."""
    logits = logits.detach().requires_grad_()
    value = world.expected(table @ opponent.exp(), logits) - TAU * world.kl(logits, ref)
    return -torch.autograd.grad(value, logits)[0]


def descend(
    world: World, step: Callable[[Tensor], Tensor], start: Tensor, *, rate: float = 4.0, steps: int = 600
) -> Tensor:
    logits = start.clone()
    for _ in range(steps):
        logits = logits - rate * step(logits)
    return logits


def gap(world: World, logits: Tensor, logps: Tensor) -> float:
    return float((world.answer_logps(logits).exp() - logps.exp()).abs().max())


@pytest.mark.parametrize("a", [0.0, 0.125, 0.6, 1.0])
@pytest.mark.parametrize("name", WORLDS)
def test_expected_gradient_of_the_loss_is_the_enumerated_one(name: str, a: float) -> None:
    world = WORLDS[name]
    logits, ref, table = world.random_logits(seed=1), world.random_logits(seed=2), game(world)
    opponent = world.answer_logps(mixed(logits, ref, a))
    found = sampled_gradient(world, logits, ref, table, opponent)
    torch.testing.assert_close(found, enumerated_gradient(world, logits, ref, table, opponent), rtol=1e-12, atol=1e-14)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("name", WORLDS)
def test_the_game_goes_in_circles(name: str) -> None:
    """Without that, a reward model would do and the proofs below would prove less."""
    table = game(WORLDS[name])
    n = len(table)
    assert all(table[i, (i + 1) % n] > 0.5 for i in range(n))
    torch.testing.assert_close(table + table.T, torch.ones_like(table))


@pytest.mark.parametrize("name", WORLDS)
def test_self_play_rests_at_the_regularised_nash_equilibrium(name: str) -> None:
    """Mixture share 0: the opponent is the policy itself."""
    world = WORLDS[name]
    ref, table = world.random_logits(seed=2), game(world)
    target = nash(world, ref, table)
    play = lambda x: sampled_gradient(world, x, ref, table, world.answer_logps(x))  # noqa: E731
    found = descend(world, play, world.random_logits(seed=3))
    assert gap(world, world.random_logits(seed=3), target) > 0.05
    assert gap(world, found, target) < 1e-6


@pytest.mark.parametrize("name", WORLDS)
def test_a_moving_average_as_opponent_rests_there_as_well(name: str) -> None:
    """Nash-EMA, with the average that the trainer uses: at rest the average is the policy."""
    world = WORLDS[name]
    ref, table = world.random_logits(seed=2), game(world)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(world.random_logits(seed=3))

    policy = Table()
    average = MovingAverage(policy, 0.8)
    for _ in range(600):
        with average.applied():
            opponent = world.answer_logps(policy.logits.detach())
        grad = sampled_gradient(world, policy.logits, ref, table, opponent)
        with torch.no_grad():
            policy.logits.sub_(4.0 * grad)
        average.update()
    assert gap(world, policy.logits.detach(), nash(world, ref, table)) < 1e-6


@pytest.mark.parametrize("name", WORLDS)
def test_the_reference_as_opponent_gives_the_best_answer_to_it(name: str) -> None:
    """Mixture share 1, in closed form: ref exp(P(y beats ref) / tau) / Z; which is not the equilibrium."""
    world = WORLDS[name]
    ref, table = world.random_logits(seed=2), game(world)
    log_ref = world.answer_logps(ref)
    expected = (log_ref + table @ log_ref.exp() / TAU).log_softmax(0)
    play = lambda x: sampled_gradient(world, x, ref, table, world.answer_logps(mixed(x, ref, 1.0)))  # noqa: E731
    found = descend(world, play, world.random_logits(seed=3))
    assert gap(world, found, expected) < 1e-6
    assert gap(world, found, nash(world, ref, table)) > 1e-3


@pytest.mark.parametrize("name", WORLDS)
def test_a_mixture_rests_at_the_best_answer_to_itself_mixed_and_nears_the_equilibrium(name: str) -> None:
    """Shares between rest at pi = ref exp(P(y beats pi^(1-a) ref^a) / tau) / Z: the equilibrium up to O(a), not on it."""
    world = WORLDS[name]
    ref, table = world.random_logits(seed=2), game(world)
    target, log_ref, gaps = nash(world, ref, table), world.answer_logps(ref), {}
    for a in (0.4, 0.2, 0.1, 0.05):
        play = lambda x, a=a: sampled_gradient(world, x, ref, table, world.answer_logps(mixed(x, ref, a)))  # noqa: E731
        found = descend(world, play, world.random_logits(seed=3), steps=400)
        opponent = world.answer_logps(mixed(found, ref, a)).exp()
        assert gap(world, found, (log_ref + table @ opponent / TAU).log_softmax(0)) < 1e-6
        gaps[a] = gap(world, found, target)
    assert all(1e-5 < gaps[a / 2] < 0.75 * gaps[a] for a in (0.4, 0.2, 0.1)), gaps


@pytest.mark.parametrize("name", WORLDS)
def test_online_ipo_has_the_gradient_of_self_play(name: str) -> None:
    """Both answers from the policy: E grad ipo_md = (4 / tau) E grad nash_md_pg, so they share the equilibrium."""
    world = WORLDS[name]
    logits, ref, table = world.random_logits(seed=1), world.random_logits(seed=2), game(world)
    play = sampled_gradient(world, logits, ref, table, world.answer_logps(logits))
    i, j = world.tuples(2).unbind(-1)

    def ipo(logits: Tensor, opponent: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        logps, ref_logps = world.answer_logps(logits), world.answer_logps(ref)
        loss = losses.ipo_md(logps[i], logps[j], ref_logps[i], ref_logps[j], table[i, j], beta=TAU).loss
        weights = (opponent.exp()[i] * opponent.exp()[j]).detach()
        return torch.autograd.grad((weights * loss).sum(), logits)[0]

    torch.testing.assert_close(ipo(logits, world.answer_logps(logits)), 4 / TAU * play, rtol=1e-10, atol=1e-13)
    # IPO-MD, both answers from the mixture: the fixed point of Nash-MD-PG against that mixture
    a = 0.3
    step = lambda x: sampled_gradient(world, x, ref, table, world.answer_logps(mixed(x, ref, a)))  # noqa: E731
    found = descend(world, step, world.random_logits(seed=3), steps=500)
    assert ipo(found, world.answer_logps(mixed(found, ref, a))).abs().max() < 1e-6
