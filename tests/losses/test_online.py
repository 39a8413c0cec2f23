"""Policy gradients, PPO, GRPO, DRO: enumerated expectations, clipping by hand, limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import advantages, kl, losses
from rlft.worlds import World, expected_loss
from tests.losses.enumeration import Setting, early_eos

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-12}
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def tokens(seed: int = 0, rows: int = 4, length: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps, old, ref = (-2 * torch.rand(rows, length, generator=g, dtype=F64) for _ in range(3))
    mask = torch.rand(rows, length, generator=g) > 0.3
    mask[:, 0] = True
    return logps.requires_grad_(), old, ref, torch.randn(rows, generator=g, dtype=F64), mask


def test_sft_is_the_negative_log_likelihood() -> None:
    logps = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]], dtype=F64).requires_grad_()
    output = losses.sft(logps, torch.tensor([[True, True], [True, False]]))
    output.mean().backward()
    assert output.mean().item() == pytest.approx(7 / 3, rel=1e-15)
    assert logps.grad.tolist() == [[-1 / 3, -1 / 3], [-1 / 3, 0]]


# -- reinforce and rloo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("baseline", ["zero", "constant", "leave_one_out"])
def test_reinforce_ascends_the_reward(n: int, baseline: str) -> None:
    s = early_eos()

    def loss(answers: Tensor, ids: Tensor) -> losses.LossOutput:
        r = s.rewards[answers]
        a = {"zero": r, "constant": r - 3, "leave_one_out": advantages.leave_one_out(r, ids)}[baseline]
        return losses.reinforce(s.logps[answers], a, s.world.mask[answers])

    found = s.gradient(expected_loss(s.world, n, s.policy, loss))
    torch.testing.assert_close(found, -s.gradient(s.world.expected(s.rewards, s.logits)), **EXACT)


def test_reward_to_go_is_reinforce_with_less_noise() -> None:
    """Token rewards: charging each token only with what follows leaves the expectation and lowers the variance."""
    s = early_eos()
    table = torch.randn(s.world.num_states, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    per_token = table[s.world.states, s.world.tokens].where(s.world.mask, 0.0)  # known once the token is
    to_go = per_token.flip(-1).cumsum(-1).flip(-1)
    truth = -s.gradient(s.world.expected(per_token.sum(-1), s.logits))

    def moments(advantage: Tensor) -> tuple[Tensor, float]:
        weights, mean, square = s.policy.detach(), 0.0, 0.0
        for i in range(s.world.num_answers):
            one = slice(i, i + 1)
            g = s.gradient(losses.reinforce(s.logps[one], advantage[one], s.world.mask[one]).mean())
            mean, square = mean + weights[i] * g, square + weights[i] * g.square().sum()
        return mean, (square - mean.square().sum()).item()

    whole, noise = moments(per_token.sum(-1))
    causal, less = moments(to_go)
    torch.testing.assert_close(whole, truth, **EXACT)
    torch.testing.assert_close(causal, truth, **EXACT)
    assert less < noise


def test_rloo_by_hand() -> None:
    logps = torch.tensor([[-0.5, -1], [-2, 0]], dtype=F64).requires_grad_()
    ref = torch.tensor([[-1, -0.75], [-1.25, 0]], dtype=F64)
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    output = losses.rloo(logps, ref, torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0, 0]), mask, beta=0.5)
    # S = .25, -.75; R = .875, .375; A = .5, -.5
    assert output.loss.tolist() == [[0.25, 0.5], [-1.0, 0]]
    output.mean().backward()
    assert logps.grad.tolist() == [[-0.25, -0.25], [0.25, 0]]
    assert output.metrics["objective/rlhf_reward"].tolist() == [0.875, 0.375]
    assert output.metrics["objective/kl"].tolist() == [0.25, -0.75]


def test_rloo_is_leave_one_out_reinforce_on_the_regularised_reward() -> None:
    logps, _, ref, r, mask = tokens()
    ids = torch.tensor([0, 1, 0, 1])
    regularised = r - 0.3 * (logps.detach() - ref).where(mask, 0.0).sum(-1)
    a = losses.rloo(logps, ref, r, ids, mask, beta=0.3).loss
    b = losses.reinforce(logps, advantages.leave_one_out(regularised, ids), mask).loss
    torch.testing.assert_close(a, b, **TIGHT)


# -- the KL-regularised policy gradient -------------------------------------------------------------------------------


def test_kl_policy_gradient_is_right_on_policy_in_a_bandit() -> None:
    s = Setting(World.bandit(5))
    ascent = -s.objective_gradient()
    for value in ("k1", "k2", "k3"):
        for gradient in ("k2", "ratio_k3"):
            found = s.expected(losses.kl_policy_gradient, 2, kl_value=value, kl_gradient=gradient)
            torch.testing.assert_close(found, ascent, **EXACT)
    torch.testing.assert_close(s.expected(losses.kl_policy_gradient_exact, 2), ascent, **EXACT)
    reward_only = -s.gradient(s.world.expected(s.rewards, s.logits))
    for gradient in ("k1", "none"):  # beta does nothing
        found = s.expected(losses.kl_policy_gradient, 2, kl_gradient=gradient)
        torch.testing.assert_close(found, reward_only, **EXACT)


def test_kl_policy_gradient_has_the_wrong_fixed_point_off_policy() -> None:
    """At pi* its expected gradient on others' samples is far from zero for every estimator; AGRO's is zero."""
    s = Setting(World.bandit(5))
    s.logits = s.world.optimal_logits(s.ref, s.rewards, s.beta).requires_grad_()
    for gradient in ("k1", "k2", "k3", "ratio_k3"):
        found = s.expected(losses.kl_policy_gradient, 2, behaviour=s.behaviour, kl_gradient=gradient)
        assert found.abs().max() > 0.05, gradient
    assert s.expected(losses.kl_policy_gradient_exact, 2, behaviour=s.behaviour).abs().max() > 0.05
    assert s.expected(losses.agro_off_policy, 2, behaviour=s.behaviour).abs().max() < 1e-13


def test_kl_policy_gradient_value_is_reward_plus_penalty() -> None:
    logps, _, ref, r, mask = tokens()
    ids = torch.tensor([0, 1, 0, 1])
    output = losses.kl_policy_gradient(logps, ref, r, ids, mask, beta=0.3, kl_value="k3")
    plain = losses.reinforce(logps, advantages.leave_one_out(r, ids), mask).loss
    torch.testing.assert_close(output.loss, plain + 0.3 * kl.k3(logps, ref, mask), **TIGHT)
    torch.testing.assert_close(output.metrics["kl"], kl.k3(logps, ref, mask).detach(), **TIGHT)
    token_kl = torch.rand(4, 3, generator=torch.Generator().manual_seed(9), dtype=F64)
    output = losses.kl_policy_gradient_exact(logps, token_kl, r, ids, mask, beta=0.3)
    torch.testing.assert_close(output.loss, plain + 0.3 * token_kl.where(mask, 0.0), **TIGHT)


# -- ppo --------------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.2, 0.3
CLIPPING = [  # ratio, advantage, loss, does the gradient stay, low, high
    (0.5, 1.0, -0.5, True, 0, 0),
    (0.5, -1.0, 0.8, False, 1, 0),
    (0.9, 1.0, -0.9, True, 0, 0),
    (0.9, -1.0, 0.9, True, 0, 0),
    (1.25, 1.0, -1.25, True, 0, 0),
    (1.5, 1.0, -1.3, False, 0, 1),
    (1.5, -1.0, 1.5, True, 0, 0),
    (5.0, -1.0, 5.0, True, 0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "stays", "low", "high"), CLIPPING)
def test_ppo_clipping_by_hand(ratio: float, advantage: float, loss: float, stays: bool, low: int, high: int) -> None:
    leaf = torch.tensor([[-1.0]], dtype=F64).requires_grad_()
    old = leaf.detach() - math.log(ratio)
    if ratio < 1 / math.e:
        pytest.fail("old log-prob would be positive")
    output = losses.ppo_clip(
        leaf, old, torch.tensor([advantage], dtype=F64), torch.ones(1, 1).bool(), clip_eps=LOW, clip_eps_high=HIGH
    )
    assert output.loss.item() == pytest.approx(loss, rel=1e-13)
    output.mean().backward()
    assert leaf.grad.item() == pytest.approx(-ratio * advantage if stays else 0.0, rel=1e-13)
    assert output.metrics["clip_ratio/low"].item() == low
    assert output.metrics["clip_ratio/high"].item() == high
    assert output.metrics["clip_ratio/region"].item() == low + high
    assert output.metrics["policy/approxkl"].item() == pytest.approx(math.log(ratio) ** 2 / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "stays"), [(5.0, -1.0, 3.0, False), (2.0, -1.0, 2.0, True), (5.0, 1.0, -1.2, False)]
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, stays: bool) -> None:
    leaf = torch.tensor([[-1.0]], dtype=F64).requires_grad_()
    old = leaf.detach() - math.log(ratio)
    a = torch.tensor([advantage], dtype=F64)
    output = losses.ppo_clip(leaf, old, a, torch.ones(1, 1).bool(), clip_eps=0.2, dual_clip=3.0)
    assert output.loss.item() == pytest.approx(loss, rel=1e-13)
    output.mean().backward()
    assert (leaf.grad.item() != 0) == stays


def test_ppo_on_fresh_samples_is_reinforce() -> None:
    logps, _, _, a, mask = tokens()
    found = torch.autograd.grad(losses.ppo_clip(logps, logps.detach(), a, mask, clip_eps=0.2).loss.sum(), logps)[0]
    expected = torch.autograd.grad(losses.reinforce(logps, a, mask).loss.sum(), logps)[0]
    torch.testing.assert_close(found, expected, **TIGHT)


def test_ppo_without_clipping_is_importance_weighting() -> None:
    """One token, samples from another policy: the gradient of E_pi[A], exactly."""
    s = Setting(World.bandit(5))
    a = s.rewards - s.rewards.mean()
    old = s.world.token_logps(s.behaviour_logits)
    output = losses.ppo_clip(s.logps, old, a, s.world.mask, clip_eps=1.0, clip_eps_high=1e6)
    found = s.gradient((s.behaviour * output.loss.sum(-1)).sum())
    torch.testing.assert_close(found, -s.gradient(s.world.expected(a, s.logits)), **EXACT)


def test_a_ratio_that_overflows_is_refused_with_a_remedy() -> None:
    far, near = torch.full((1, 1), -90.0), torch.full((1, 1), -0.5)
    mask, a = torch.ones(1, 1).bool(), torch.ones(1)
    with pytest.raises(ValueError, match=r"logps - old_logps is 89\.5 nats at \[0, 0\].*fewer updates per rollout"):
        losses.ppo_clip(near, far, a, mask, clip_eps=0.2)
    assert losses.ppo_clip(far, near, a, mask, clip_eps=0.2).loss.item() == pytest.approx(0.0, abs=1e-30)


def test_clip_ranges_are_checked() -> None:
    logps, old, _, a, mask = tokens()
    for bad in ({"clip_eps": 0.0}, {"clip_eps": 1.5}, {"clip_eps": 0.2, "clip_eps_high": 0.0}):
        with pytest.raises(ValueError, match="clip_eps"):
            losses.ppo_clip(logps, old, a, mask, **bad)
    with pytest.raises(ValueError, match="dual_clip must be > 1"):
        losses.ppo_clip(logps, old, a, mask, clip_eps=0.2, dual_clip=1.0)


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 1.0, 3.0]], dtype=F64).requires_grad_()
    old, returns = torch.tensor([[0.5, 0.9, 3.5]], dtype=F64), torch.tensor([[2.0, 0.0, 2.0]], dtype=F64)
    mask = torch.ones(1, 3).bool()
    assert losses.value_loss(values, old, returns, mask).loss.tolist() == [[0.5, 0.5, 0.5]]
    output = losses.value_loss(values, old, returns, mask, clip_eps=0.2)
    # clipped values: .7, 1.0, 3.3; the larger error counts
    torch.testing.assert_close(output.loss.detach(), torch.tensor([[0.845, 0.5, 0.845]], dtype=F64), **TIGHT)
    assert output.metrics["val/clipfrac"].tolist() == [[1, 0, 1]]
    assert output.metrics["val/error"].tolist() == [[-1, 1, 1]]
    output.loss.sum().backward()
    assert values.grad.tolist() == [[0, 1, 0]]


def test_value_loss_without_clipping_ignores_old_values() -> None:
    values, old, returns, mask = torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3).bool()
    assert torch.equal(
        losses.value_loss(values, old, returns, mask).loss, losses.value_loss(values, old + 9, returns, mask).loss
    )


# -- grpo -------------------------------------------------------------------------------------------------------------


def test_grpo_is_ppo_plus_k3() -> None:
    logps, old, ref, a, mask = tokens()
    found = losses.grpo(logps, old, ref, a, mask, clip_eps=0.2, clip_eps_high=0.28, beta=0.04)
    surrogate = losses.ppo_clip(logps, old, a, mask, clip_eps=0.2, clip_eps_high=0.28)
    torch.testing.assert_close(found.loss, surrogate.loss + 0.04 * kl.k3(logps, ref, mask), **TIGHT)
    torch.testing.assert_close(found.metrics["kl"], kl.k3(logps, ref, mask).detach(), **TIGHT)
    for name in surrogate.metrics:
        assert torch.equal(found.metrics[name], surrogate.metrics[name])
    assert found.reduction == "sequence_mean"
    assert surrogate.reduction == "token_mean"


def test_grpo_at_the_reference_with_equal_rewards_is_silent() -> None:
    logps, _, _, _, mask = tokens()
    a = advantages.group_norm(torch.full((4,), 0.1, dtype=F64), torch.tensor([0, 0, 1, 1]))
    output = losses.grpo(logps, logps.detach(), logps.detach(), a, mask, clip_eps=0.2, beta=0.1)
    output.mean().backward()
    assert output.loss.eq(0).all()
    assert logps.grad.eq(0).all()


def test_grpo_kl_gradient_is_a_choice_that_leaves_the_value() -> None:
    logps, old, ref, a, mask = tokens()
    outputs = [
        losses.grpo(logps, old, ref, a, mask, clip_eps=0.2, beta=0.5, kl_gradient=k) for k in ("k3", "k2", "ratio_k3")
    ]
    grads = [torch.autograd.grad(o.loss.sum(), logps)[0] for o in outputs]
    for i in (1, 2):
        torch.testing.assert_close(outputs[i].loss, outputs[0].loss, **TIGHT)
        assert (grads[i] - grads[0]).abs().max() > 1e-2
    s = early_eos()
    ones = torch.zeros(s.world.num_answers, dtype=F64)  # no advantage: the KL term alone
    (reverse,) = torch.autograd.grad(s.world.expected(s.world.token_kl(s.logits, s.ref)[:, 0], s.logits), s.logits)
    for k in ("k2", "ratio_k3"):
        output = losses.grpo(
            s.logps, s.logps.detach(), s.ref_logps, ones, s.world.mask, clip_eps=0.2, beta=1.0, kl_gradient=k
        )
        found = s.gradient((s.policy.detach() * output.loss[:, 0]).sum())
        torch.testing.assert_close(found, reverse, **EXACT)


# -- dro --------------------------------------------------------------------------------------------------------------


def dro(s: Setting, value: Tensor, behaviour: Tensor) -> Tensor:
    """Expected DRO loss when every answer has the one value."""
    n = s.world.num_answers
    output = losses.dro(s.logps, s.ref_logps, value.expand(n), s.rewards, s.world.mask, beta=s.beta)
    return (behaviour.detach() * output.loss).sum()


def regularised(s: Setting) -> Tensor:
    return s.rewards - s.beta * (s.world.answer_logps(s.logits) - s.world.answer_logps(s.ref)).detach()


def test_dro_with_the_mean_as_value_is_agro() -> None:
    s = early_eos()
    mean = (s.behaviour * regularised(s)).sum()
    torch.testing.assert_close(s.gradient(dro(s, mean, s.behaviour)), s.loss_gradient(s.behaviour), **EXACT)
    assert (s.gradient(dro(s, mean + 1, s.behaviour)) - s.loss_gradient(s.behaviour)).abs().max() > 1e-2


def test_dro_on_policy_takes_any_value() -> None:
    s = early_eos()
    for value in (-2.0, 0.0, 5.0):
        found = s.gradient(dro(s, torch.tensor(value, dtype=F64), s.policy))
        torch.testing.assert_close(found, -s.beta * s.objective_gradient(), **EXACT)


def test_dro_learns_the_value_and_rests_at_the_optimum() -> None:
    s = early_eos()
    value = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(dro(s, value, s.behaviour), value)
    torch.testing.assert_close(slope, value.detach() - (s.behaviour * regularised(s)).sum(), **EXACT)
    s.logits = s.world.optimal_logits(s.ref, s.rewards, s.beta).requires_grad_()
    best = s.world.optimal_value(s.ref, s.rewards, s.beta).detach().requires_grad_()
    loss = dro(s, best, s.behaviour)
    assert loss < 1e-24
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, [s.logits, best]))
