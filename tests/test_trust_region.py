"""The trust-region step against exact truths: quadratics, enumerated worlds, Fisher matrices written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import losses
from rlft.trust_region import (
    Linearised,
    TrustRegion,
    conjugate_gradient,
    flatten,
    softmax_fisher,
    trust_region_step,
    unflatten,
)
from rlft.worlds import World


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(size: int, *, seed: int) -> Tensor:
    half = normal(size, size, seed=seed)
    return half @ half.T + 0.1 * torch.eye(size, dtype=torch.float64)


# -- conjugate gradient -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_conjugate_gradient_solves_a_quadratic_in_as_many_steps_as_it_has_eigenvalues(damping: float) -> None:
    basis = torch.linalg.qr(normal(12, 12, seed=0))[0]
    matrix = basis @ torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).repeat(4)) @ basis.T
    b = normal(12, seed=1)
    found = conjugate_gradient(lambda v: matrix @ v, b, iterations=3, damping=damping)
    truth = torch.linalg.solve(matrix + damping * torch.eye(12, dtype=torch.float64), b)
    torch.testing.assert_close(found.x, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.product, matrix @ found.x, rtol=1e-12, atol=1e-12)  # damping is not in it
    assert found.iterations == 3
    assert found.residual < 1e-13


def test_the_residual_is_that_of_the_solution_when_iterations_run_out() -> None:
    matrix, b = spd(20, seed=2), normal(20, seed=3)
    found = conjugate_gradient(lambda v: matrix @ v, b, iterations=4, damping=0.05)
    truth = (b - matrix @ found.x - 0.05 * found.x).norm() / b.norm()
    assert found.residual == pytest.approx(float(truth), rel=1e-10)
    assert found.residual > 1e-3


def test_the_tolerance_stops_early_and_no_gradient_costs_nothing() -> None:
    matrix, b = spd(20, seed=2), normal(20, seed=3)
    loose = conjugate_gradient(lambda v: matrix @ v, b, iterations=50, tolerance=0.1)
    assert loose.residual <= 0.1
    assert loose.iterations < conjugate_gradient(lambda v: matrix @ v, b, iterations=50, tolerance=1e-8).iterations
    nothing = conjugate_gradient(lambda v: pytest.fail("no product is needed"), torch.zeros(3), iterations=5)
    assert (nothing.iterations, nothing.residual, float(nothing.x.abs().max())) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_direction_without_positive_curvature_ends_the_solve(bad: float) -> None:
    found = conjugate_gradient(lambda v: bad * v, torch.ones(3), iterations=5)
    assert found.iterations == 1
    assert bool(torch.isfinite(found.x).all())


# -- Fisher-vector products -------------------------------------------------------------------------------------------
WORLD = World.autoregressive(vocab=3, length=3, eos=0)


def features(seed: int = 0) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Weights of a small network from prefixes to logits, and the function: its Fisher matrix is not diagonal."""
    inputs = normal(WORLD.num_states, 6, seed=seed)
    weights = [0.5 * normal(4, 6, seed=seed + 1), 0.5 * normal(WORLD.vocab, 4, seed=seed + 2), normal(3, seed=seed + 3)]
    weights = [w.requires_grad_() for w in weights]
    return weights, lambda: torch.tanh(inputs @ weights[0].T) @ weights[1].T + weights[2]


def visits(logits: Tensor) -> Tensor:
    """Share of each prefix among the tokens that the policy draws, by enumeration: it weighs the mean KL."""
    mass = WORLD.answer_logps(logits.detach()).exp()[:, None].expand_as(WORLD.mask)[WORLD.mask]
    weight = torch.zeros(WORLD.num_states, dtype=torch.float64).index_add(0, WORLD.states[WORLD.mask], mass)
    return weight / weight.sum()


def mean_kl(old: Tensor, new: Tensor, weights: Tensor) -> Tensor:
    a, b = old.log_softmax(-1), new.log_softmax(-1)
    return (weights * (a.exp() * (a - b)).sum(-1)).sum()


def product_at(weights: list[Tensor], logits: Callable[[], Tensor], share: Tensor) -> Callable[[Tensor], Tensor]:
    line = Linearised(logits(), weights)

    def product(v: Tensor) -> Tensor:
        moved = line.push(unflatten(v, weights))
        return flatten(line.pull(softmax_fisher(line.outputs.detach(), moved, share)))

    return product


def dense(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    with torch.no_grad():  # as conjugate gradient calls it
        return torch.stack([product(e) for e in torch.eye(size, dtype=torch.float64)], -1)


def exact_fisher(weights: list[Tensor], logits: Callable[[], Tensor], share: Tensor) -> Tensor:
    """E[score score'] with every prefix and token written out."""
    logp = logits().log_softmax(-1)
    size = sum(w.numel() for w in weights)
    total = torch.zeros(size, size, dtype=torch.float64)
    for state in range(WORLD.num_states):
        for token in range(WORLD.vocab):
            score = flatten(torch.autograd.grad(logp[state, token], weights, retain_graph=True))
            total += share[state] * logp[state, token].exp().detach() * torch.outer(score, score)
    return total


def test_the_product_is_the_exact_fisher_matrix_and_the_hessian_of_the_kl() -> None:
    weights, logits = features()
    share = visits(logits())
    size = sum(w.numel() for w in weights)
    mine = dense(product_at(weights, logits, share), size)
    truth = exact_fisher(weights, logits, share)
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-14)
    old = logits().detach()
    slope = flatten(torch.autograd.grad(mean_kl(old, logits(), share), weights, create_graph=True))
    hessian = torch.stack([flatten(torch.autograd.grad(s, weights, retain_graph=True)) for s in slope])
    torch.testing.assert_close(mine, hessian, rtol=1e-8, atol=1e-12)


def test_weights_without_influence_have_no_curvature() -> None:
    weights, logits = features()
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = product_at([*weights, idle], logits, visits(logits()))(normal(24 + 12 + 3 + 2, seed=9))
    assert torch.equal(result[-2:], torch.zeros(2, dtype=torch.float64))
    assert float(result[:-2].norm()) > 0


def test_the_direction_on_a_tabular_world_is_the_inverse_fisher_times_the_gradient() -> None:
    """A table of logits: its Fisher matrix has a null direction per prefix, to which no gradient points."""
    table = WORLD.random_logits(seed=4).requires_grad_()
    rewards = WORLD.random_rewards(seed=5)
    gradient = flatten(torch.autograd.grad(-WORLD.expected(rewards, table), [table]))
    share = visits(table)
    product = product_at([table], lambda: table * 1.0, share)
    found = conjugate_gradient(product, gradient, iterations=200, tolerance=1e-14)
    truth = torch.linalg.pinv(exact_fisher([table], lambda: table * 1.0, share), rtol=1e-12, hermitian=True) @ gradient
    torch.testing.assert_close(found.x, truth, rtol=1e-8, atol=1e-10)


# -- the step -----------------------------------------------------------------------------------------------------------
class Tabular:
    """A policy over WORLD with all its answers, each weighted by its old probability: expectations are exact."""

    def __init__(self, weights: list[Tensor], logits: Callable[[], Tensor], rewards: Tensor) -> None:
        self.weights, self.logits = weights, logits
        self.old = logits().detach()
        self.mass = WORLD.answer_logps(self.old).exp()
        self.old_logps = WORLD.token_logps(self.old)
        self.advantages = rewards - (self.mass * rewards).sum()
        self.share = visits(self.old)

    def surrogate(self) -> Tensor:
        out = losses.trpo(WORLD.token_logps(self.logits()), self.old_logps, self.advantages, WORLD.mask)
        return (self.mass[:, None] * out.loss).sum()

    def step(self, region: TrustRegion, **changes: Any) -> Any:
        gradient = flatten(torch.autograd.grad(self.surrogate(), self.weights))
        product = product_at(self.weights, self.logits, self.share)
        measures = {
            "kl": lambda: float(mean_kl(self.old, self.logits(), self.share)),
            "loss": lambda: float(self.surrogate()),
            "before": float(self.surrogate().detach()),
        }
        return trust_region_step(self.weights, gradient, product, region=region, **{**measures, **changes})


@pytest.mark.parametrize(("max_kl", "at_least"), [(0.01, 25), (1e-4, 190)])
def test_two_hundred_steps_stay_within_the_kl_and_never_worsen_the_surrogate(max_kl: float, at_least: int) -> None:
    """With the wider region the policy is at its optimum after some 30 steps, and every further step is refused."""
    weights, logits = features()
    rewards = WORLD.random_rewards(seed=6)
    region = TrustRegion(max_kl=max_kl, cg_iters=20, cg_damping=1e-5)
    first = float(WORLD.expected(rewards, logits().detach()))
    taken = 0
    for _ in range(200):
        world = Tabular(weights, logits, rewards)
        before = [w.detach().clone() for w in weights]
        done = world.step(region)
        measured = float(mean_kl(world.old, logits().detach(), world.share))
        assert measured <= region.max_kl
        assert done.gain >= 0
        if done.accepted:
            taken += 1
            assert done.kl == measured
            assert done.kl_predicted <= region.max_kl * (1 + 1e-12)
        else:
            assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert taken >= at_least
    assert float(WORLD.expected(rewards, logits().detach())) > first + 0.95 * (float(rewards.max()) - first)


def test_a_small_radius_is_the_plain_natural_gradient_step() -> None:
    """delta -> 0: the step is -sqrt(2 delta / g' F^-1 g) F^-1 g, its KL is delta, its gain what the slope predicts."""
    weights, logits = features()
    world = Tabular(weights, logits, WORLD.random_rewards(seed=6))
    gradient = flatten(torch.autograd.grad(world.surrogate(), weights))
    natural = torch.linalg.pinv(exact_fisher(weights, logits, world.share), rtol=1e-12, hermitian=True) @ gradient
    before = flatten([w.detach().clone() for w in weights])
    delta = 1e-10
    done = world.step(TrustRegion(max_kl=delta, cg_iters=200, cg_damping=0.0, cg_tolerance=1e-14, backtrack=0.999))
    moved = flatten([w.detach() for w in weights]) - before
    cosine = float(-(moved @ natural) / moved.norm() / natural.norm())
    assert 1 - cosine < 1e-8
    assert float(moved.norm()) == pytest.approx(
        math.sqrt(2 * delta / float(gradient @ natural)) * float(natural.norm()), rel=2e-3
    )
    assert done.kl == pytest.approx(done.kl_predicted, rel=1e-3)
    assert done.gain == pytest.approx(done.gain_predicted, rel=1e-3)
    assert (done.accepted, done.backtracks <= 1) == (True, True)


def test_a_step_that_is_refused_every_time_puts_the_weights_back_bit_for_bit() -> None:
    for changes in (
        {"kl": lambda: 1.0},
        {"kl": lambda: math.nan},
        {"loss": lambda: math.inf},
        {"loss": lambda: math.nan},
    ):
        weights, logits = features()
        before = [w.detach().clone() for w in weights]
        world = Tabular(weights, logits, WORLD.random_rewards(seed=6))
        done = world.step(TrustRegion(max_backtracks=4), **changes)
        assert (done.accepted, done.backtracks, done.kl, done.gain) == (False, 5, 0.0, 0.0)
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_an_error_while_measuring_puts_the_weights_back() -> None:
    def broken() -> float:
        raise KeyboardInterrupt

    weights, logits = features()
    before = [w.detach().clone() for w in weights]
    with pytest.raises(KeyboardInterrupt):
        Tabular(weights, logits, WORLD.random_rewards(seed=6)).step(TrustRegion(), loss=broken)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_the_line_search_shortens_until_the_measured_kl_holds() -> None:
    """A radius far beyond where the KL is quadratic: the predicted KL is delta, the measured one is more."""
    weights, logits = features()
    world = Tabular(weights, logits, WORLD.random_rewards(seed=7))
    seen: list[float] = []

    def kl() -> float:
        seen.append(float(mean_kl(world.old, logits(), world.share)))
        return seen[-1]

    region = TrustRegion(max_kl=0.1, cg_iters=50, cg_damping=1e-6, max_backtracks=40)
    done = world.step(region, kl=kl)
    assert done.accepted
    assert done.backtracks == len(seen) - 1 > 0
    assert seen[0] > region.max_kl >= seen[-1] == done.kl
    assert done.kl_predicted == pytest.approx(region.backtrack ** (2 * done.backtracks) * region.max_kl)


def test_no_gradient_moves_nothing() -> None:
    weights, _ = features()
    before = [w.detach().clone() for w in weights]
    done = trust_region_step(
        weights, torch.zeros(39, dtype=torch.float64), lambda v: v, kl=lambda: 0.0, loss=lambda: 0.0, before=0.0,
        region=TrustRegion(),
    )  # fmt: skip
    assert (done.accepted, done.backtracks, done.cg_iterations) == (False, 0, 0)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_kl", 0.0), ("max_kl", math.nan), ("cg_iters", 0), ("cg_iters", 2.0), ("cg_damping", -1.0),
        ("cg_tolerance", 1.0), ("backtrack", 1.0), ("backtrack", 0.0), ("max_backtracks", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        TrustRegion(**{name: value})
