"""AGRO against enumeration, golden values, and the identities of its family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft import losses
from rlft.worlds import World, expected_loss
from tests.losses.enumeration import Setting, early_eos, small

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-12}

# Worked by hand; gradients are of the unscaled loss (times beta), rows of one group.
BETA = 0.5
REWARDS = torch.tensor([1, 0, 0.5], dtype=F64)
LOGPS = torch.tensor([[-0.5, -1], [-2, 0], [-1.5, -0.25]], dtype=F64)
REF = torch.tensor([[-1, -0.75], [-1.25, 0], [-1, -1.25]], dtype=F64)
MASK = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
TOKEN_KL = torch.tensor([[0.2, 0.1], [0.2, 0], [0.2, 0.4]], dtype=F64)
IDS = torch.zeros(3, dtype=torch.long)
OFF = [[-0.09375, -0.09375], [0.03125, 0], [0.0625, 0.0625]]
LR_PLAIN = [[0.052734375, 0.052734375], [0.005859375, 0], [0.0234375, 0.0234375]]
LR_PAPER = [[0.0380859375, 0.0380859375], [-0.0322265625, 0], [-0.005859375, -0.005859375]]


def golden(loss, *extra: Tensor, **hyper) -> tuple[Tensor, Tensor, losses.LossOutput]:
    leaf = LOGPS.clone().requires_grad_()
    output = loss(leaf, REF, *extra, REWARDS, IDS, MASK, beta=BETA, **hyper)
    output.mean().backward()
    return BETA * output.mean().detach(), BETA * leaf.grad, output


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def test_golden_off_policy() -> None:
    value, gradient, output = golden(losses.agro_off_policy)
    assert value == 0.0546875
    assert gradient.tolist() == OFF
    assert output.metrics["objective/kl"].tolist() == [0.25, -0.75, 0.5]
    assert output.metrics["objective/rlhf_reward"].tolist() == [0.875, 0.375, 0.25]
    assert output.metrics["kl"].tolist() == [[0.5, -0.25], [-0.75, 0], [-0.5, 1]]
    assert output.metrics["agro/variance"].mean().item() == pytest.approx(2 * 0.0546875, rel=1e-14)
    assert output.metrics["agro/flip_fraction"].tolist() == [0, 0, 0]


def test_golden_on_policy() -> None:
    value, gradient, _ = golden(losses.agro_on_policy)
    assert value == 0.0546875
    assert gradient.tolist() == OFF
    for baseline, expected in (
        ("none", table(LR_PLAIN)),
        ("leave_one_out", table(LR_PAPER)),
        ("unbiased", 4 / 3 * table(LR_PAPER)),
    ):
        for coef in (1.0, 0.25):
            value, gradient, _ = golden(losses.agro_on_policy, lr_coef=coef, lr_baseline=baseline)
            assert value == 0.0546875
            torch.testing.assert_close(gradient, table(OFF) + coef * expected, rtol=1e-13, atol=1e-15)


def test_golden_causal_and_exact_kl() -> None:
    value, gradient, _ = golden(losses.agro_on_policy_causal)
    assert value == 0.0546875
    assert gradient.tolist() == [[-0.09375, -0.1875], [0.03125, 0], [0.0625, 0.09375]]
    kl_leaf = TOKEN_KL.clone().requires_grad_()
    value, gradient, output = golden(losses.agro_on_policy_exact_kl, kl_leaf)
    assert value == 0.0546875
    expected = [[-0.4 / 3, -0.125], [0.3125 / 3, 0], [0.0875 / 3, 0]]
    torch.testing.assert_close(gradient, table(expected), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(BETA * kl_leaf.grad, MASK.to(F64) * BETA**2 / 3, rtol=1e-13, atol=0)
    assert torch.equal(output.metrics["kl"], TOKEN_KL)


# -- expected gradients, exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("make", "n"), [(early_eos, 2), (early_eos, 3), (small, 4)])
def test_off_policy_is_unbiased_whoever_sampled(make, n: int, seed: int) -> None:
    s = make(seed)
    for mu in (s.behaviour, s.world.answer_logps(s.ref).exp(), s.policy.detach()):
        found = s.expected(losses.agro_off_policy, n, behaviour=mu)
        torch.testing.assert_close(s.beta * found, s.loss_gradient(mu), **EXACT)
        value = expected_loss(s.world, n, mu, lambda i, g: s.call(losses.agro_off_policy, i, g))
        exact = s.world.variance_loss(s.logits, s.ref, s.rewards, s.beta, mu)
        torch.testing.assert_close(s.beta * value, exact, **EXACT)


@pytest.mark.parametrize(("make", "n"), [(early_eos, 2), (early_eos, 3), (small, 4)])
def test_on_policy_everything_descends_the_objective(make, n: int) -> None:
    s = make()
    ascent = -s.objective_gradient()
    estimators = [
        (losses.agro_off_policy, {}),
        (losses.agro_on_policy, {}),
        (losses.rloo, {}),
        *[(losses.agro_on_policy_causal, {"baseline": b}) for b in ("none", "sequence", "position")],
        *[(losses.agro_on_policy_exact_kl, {"baseline": b}) for b in ("none", "sequence", "position")],
    ]
    for loss, hyper in estimators:
        torch.testing.assert_close(s.expected(loss, n, **hyper), ascent, **EXACT, msg=lambda m, h=hyper: f"{h} {m}")


@pytest.mark.parametrize(("make", "n"), [(early_eos, 2), (early_eos, 3), (small, 4)])
def test_on_policy_likelihood_ratio_terms(make, n: int) -> None:
    s = make()
    whole = s.loss_gradient(s.policy)  # through the sampling as well
    pathwise = s.loss_gradient(s.policy.detach())
    term = whole - pathwise
    assert term.abs().max() > 0.01

    def found(baseline: str) -> Tensor:
        return s.beta * s.expected(losses.agro_on_policy, n, lr_coef=1.0, lr_baseline=baseline) - pathwise

    torch.testing.assert_close(found("none"), term, **EXACT)
    torch.testing.assert_close(found("leave_one_out"), n * (n - 2) / (n - 1) ** 2 * term, **EXACT)
    if n >= 3:
        torch.testing.assert_close(found("unbiased"), term, **EXACT)


def test_causal_and_exact_kl_are_biased_off_policy() -> None:
    """Why they are marked on_policy_only."""
    s = early_eos()
    truth = s.loss_gradient(s.behaviour) / s.beta
    for loss in (losses.agro_on_policy_causal, losses.agro_on_policy_exact_kl):
        assert loss.on_policy_only
        assert (s.expected(loss, 2, behaviour=s.behaviour) - truth).norm() > 0.05 * truth.norm()
    assert not losses.agro_off_policy.on_policy_only


def test_members_of_a_group_may_come_from_different_policies() -> None:
    """Replay: one fresh answer and one from elsewhere; the expected gradient still vanishes at the optimum."""
    s = early_eos()
    s.logits = s.world.optimal_logits(s.ref, s.rewards, s.beta).requires_grad_()
    pairs = s.world.tuples(2)
    weights = s.policy.detach()[pairs[:, 0]] * s.behaviour[pairs[:, 1]]
    output = s.call(losses.agro_off_policy, pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2))
    gradient = s.gradient((weights.repeat_interleave(2) * output.loss.sum(-1)).sum())
    assert gradient.abs().max() < 1e-13
    other = Setting(s.world, seed=0)
    output = other.call(losses.agro_off_policy, pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2))
    assert other.gradient((weights.repeat_interleave(2) * output.loss.sum(-1)).sum()).abs().max() > 1e-2


# -- identities -------------------------------------------------------------------------------------------------------


def rows(n: int, *, groups: int = 1, seed: int = 0, tokens: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps, ref = (-torch.rand(n * groups, tokens, generator=g, dtype=F64) for _ in range(2))
    mask = torch.rand(n * groups, tokens, generator=g) > 0.25
    mask[:, 0] = True
    rewards = torch.randn(n * groups, generator=g, dtype=F64)
    return logps.requires_grad_(), ref, rewards, torch.arange(groups).repeat(n), mask


@pytest.mark.parametrize("n", [2, 3, 5])
def test_gradient_is_autograd_of_the_variance_and_beta_times_rloo(n: int) -> None:
    logps, ref, rewards, ids, mask = rows(n, groups=3)
    beta = 0.37
    output = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=beta)
    (found,) = torch.autograd.grad(output.mean(), logps)
    regularised = rewards - beta * (logps - ref).where(mask, 0.0).sum(-1)
    variance = torch.stack([regularised[ids == g].var() for g in range(3)])
    torch.testing.assert_close(output.mean(), variance.mean() / (2 * beta), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.metrics["agro/variance"].mean(), variance.mean().detach(), rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(0.5 * variance.mean(), logps)
    torch.testing.assert_close(beta * found, expected, rtol=1e-12, atol=1e-15)
    (rloo,) = torch.autograd.grad(losses.rloo(logps, ref, rewards, ids, mask, beta=beta).mean(), logps)
    torch.testing.assert_close(found, rloo, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_two_samples_are_ipo(spread: float) -> None:
    """AGRO with n = 2 and rewards +-D/2 is beta^2/4 IPO(tau = beta/(2D)); D = 1/2 gives tau = beta."""
    logps, ref, _, ids, mask = rows(2, groups=3)
    beta = 0.2
    rewards = spread / 2 * torch.tensor([1, 1, 1, -1, -1, -1], dtype=F64)
    agro = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=beta).mean()
    sums = [x.where(mask, 0.0).sum(-1) for x in (logps, ref)]
    chosen, rejected = sums[0][:3], sums[0][3:]
    ipo = losses.ipo(chosen, rejected, sums[1][:3], sums[1][3:], beta=beta / (2 * spread)).mean()
    torch.testing.assert_close(beta * agro, beta**2 / 4 * ipo, rtol=1e-12, atol=0)
    (a,) = torch.autograd.grad(beta * agro, logps, retain_graph=True)
    (b,) = torch.autograd.grad(beta**2 / 4 * ipo, logps)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_gvpo_is_agro() -> None:
    """sum_i ((beta S_i - sg[mean beta S]) - (r_i - mean r))^2 / (2(n-1)): same value and gradient."""
    n, beta = 4, 0.3
    logps, ref, rewards, ids, mask = rows(n)
    output = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=beta).mean()
    implicit = beta * (logps - ref).where(mask, 0.0).sum(-1)
    gvpo = ((implicit - implicit.mean().detach()) - (rewards - rewards.mean())).square().sum() / (2 * (n - 1))
    torch.testing.assert_close(beta * output, gvpo, rtol=1e-12, atol=0)
    (a,) = torch.autograd.grad(beta * output, logps, retain_graph=True)
    (b,) = torch.autograd.grad(gvpo, logps)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_half_square_has_the_kl_gradient_on_policy() -> None:
    """grad 1/2 E_sg[pi][S^2] = grad KL(pi || ref); with r = 0 AGRO is that, centred."""
    s = early_eos()
    total = (s.logps - s.ref_logps).sum(-1)
    square = s.gradient(0.5 * (s.policy.detach() * total.square()).sum())
    kl = s.gradient(s.world.kl(s.logits, s.ref))
    torch.testing.assert_close(square, kl, **EXACT)
    s.rewards = torch.zeros_like(s.rewards)
    torch.testing.assert_close(s.expected(losses.agro_off_policy, 2), s.beta * kl, **EXACT)


def test_likelihood_ratio_baselines_tuple_by_tuple() -> None:
    def term(n: int, baseline: str) -> Tensor:
        logps, ref, rewards, ids, mask = rows(n, groups=2, seed=n)
        outputs = [
            losses.agro_on_policy(logps, ref, rewards, ids, mask, beta=0.4, lr_coef=c, lr_baseline=baseline)
            for c in (1.0, 0.0)
        ]
        return torch.autograd.grad(outputs[0].mean() - outputs[1].mean(), logps)[0]

    assert term(2, "leave_one_out").abs().max() < 1e-15
    assert term(2, "none").abs().max() > 1e-2
    for n in (3, 4, 8):
        factor = (n - 1) ** 2 / (n * (n - 2))
        torch.testing.assert_close(term(n, "unbiased"), factor * term(n, "leave_one_out"), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("hyper", [{}, {"lr_coef": 1.0}, {"lr_coef": 1.0, "lr_baseline": "unbiased"}], ids=str)
def test_every_sample_is_silent_at_the_optimum(hyper: dict) -> None:
    """R constant: loss and gradient are exactly zero, row by row, whoever drew the samples."""
    logps, ref, _, ids, mask = rows(4, groups=2)
    logps = (logps.detach() * 64).round().div(64).requires_grad_()  # dyadic, so that sums are exact
    ref = (ref * 64).round() / 64
    rewards = 0.5 * (logps.detach() - ref).where(mask, 0.0).sum(-1) + 3
    output = losses.agro_on_policy(logps, ref, rewards, ids, mask, beta=0.5, **hyper)
    assert output.loss.eq(0).all()
    output.mean().backward()
    assert logps.grad.eq(0).all()


@pytest.mark.parametrize("hyper", [{}, {"lr_coef": 1.0}], ids=str)
def test_rewards_may_shift_per_prompt(hyper: dict) -> None:
    logps, ref, rewards, ids, mask = rows(3, groups=2)
    results = []
    for shift in (0.0, 1.0):
        shifted = rewards + shift * torch.tensor([5.0, -3.0], dtype=F64)[ids]
        loss = losses.agro_on_policy(logps, ref, shifted, ids, mask, beta=0.3, **hyper).mean()
        results.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-11, atol=1e-14)


def test_per_token_beta_at_one_length_is_beta_over_length() -> None:
    """R with a length-averaged log-ratio and beta_tok is R with beta_tok / T."""
    g = torch.Generator().manual_seed(0)
    logps, ref = (-torch.rand(4, 5, generator=g, dtype=F64) for _ in range(2))
    rewards, ids, mask = torch.randn(4, generator=g, dtype=F64), torch.zeros(4).long(), torch.ones(4, 5).bool()
    output = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=2.0 / 5)
    averaged = rewards - 2.0 * (logps - ref).mean(-1)
    torch.testing.assert_close(output.metrics["objective/rlhf_reward"], averaged, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 4])
def test_beta_zero_is_leave_one_out_reinforce_and_the_limit(n: int) -> None:
    logps, ref, rewards, ids, mask = rows(n, groups=2)
    output = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=0.0).mean()
    (found,) = torch.autograd.grad(output, logps)
    others = torch.stack([(rewards[ids == g].sum() - rewards[ids == g]) / (n - 1) for g in (0, 1)], dim=1).flatten()
    plain = losses.reinforce(logps, rewards - others, mask).mean()
    torch.testing.assert_close(found, torch.autograd.grad(plain, logps)[0], rtol=1e-12, atol=1e-15)
    beta = 1e-6
    near = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=beta).mean()
    constant = torch.stack([rewards[ids == g].var() for g in (0, 1)]).mean() / (2 * beta)
    torch.testing.assert_close((near - constant).detach(), output.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(near, logps)[0], found, rtol=1e-5, atol=2e-6)


def test_ragged_groups_weigh_by_their_rows() -> None:
    logps, ref, rewards, _, mask = rows(5)
    ids = torch.tensor([1, 0, 1, 0, 1])
    whole = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=0.3).mean()
    parts = []
    for g in (0, 1):
        m = ids == g
        parts.append(losses.agro_off_policy(logps[m], ref[m], rewards[m], ids[m], mask[m], beta=0.3).mean())
    torch.testing.assert_close(whole, (2 * parts[0] + 3 * parts[1]) / 5, rtol=1e-12, atol=0)


def test_groups_too_small_and_senseless_settings_are_refused() -> None:
    logps, ref, rewards, ids, mask = rows(2)
    with pytest.raises(ValueError, match=r"lr_baseline='unbiased' needs groups of at least 3 rows, group 0 has 2"):
        losses.agro_on_policy(logps, ref, rewards, ids, mask, beta=0.3, lr_coef=1.0, lr_baseline="unbiased")
    with pytest.raises(ValueError, match="beta must be > 0"):
        losses.agro_on_policy(logps, ref, rewards, ids, mask, beta=0.0, lr_coef=1.0)
    with pytest.raises(ValueError, match="did you mean 'leave_one_out'"):
        losses.agro_on_policy(logps, ref, rewards, ids, mask, beta=0.3, lr_coef=1.0, lr_baseline="leave_one")


# -- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("success", "beta", "raises"), [(0.1, 0.05, False), (0.1, 0.5, True), (0.45, 0.08, True)])
def test_the_likelihood_ratio_term_flips_the_sign_when_beta_is_small(success: float, beta: float, raises: bool) -> None:
    """Two arms, rewards 1 and 0, from the reference: the full gradient raises the good arm iff 1 - 2p < 2 beta."""
    assert raises == (1 - 2 * success < 2 * beta)
    s = Setting(World.bandit(2), beta=beta)
    s.ref = torch.tensor([[success, 1 - success]], dtype=F64).log()
    s.logits = s.ref.clone().requires_grad_()
    s.rewards = torch.tensor([1.0, 0.0], dtype=F64)
    full = -s.expected(losses.agro_on_policy, 2, lr_coef=1.0)
    assert (full[0, 0] > 0) == raises
    assert -s.expected(losses.agro_on_policy, 2)[0, 0] > 0
    output = s.call(losses.agro_on_policy, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert output.metrics["agro/flip_fraction"].tolist() == [float(1 > 2 * beta), 0]


def test_off_policy_convergence_against_the_kl_policy_gradient() -> None:
    """Figure 1: samples from the reference; AGRO reaches the optimum, the policy gradient with a KL term does not."""
    s = Setting(World.bandit(10), seed=0, beta=1.0)
    best = s.world.optimal_logits(s.ref, s.rewards, s.beta)
    mu = s.world.answer_logps(s.ref).exp()
    start = s.world.kl(s.ref, best)

    def distance_after(loss, steps: int) -> float:
        s.logits = s.ref.clone().requires_grad_()
        for _ in range(steps):
            s.logits = (s.logits - s.expected(loss, 2, behaviour=mu)).detach().requires_grad_()
        return (s.world.kl(s.logits, best) / start).item()

    assert distance_after(losses.agro_off_policy, 400) < 1e-8
    assert distance_after(losses.kl_policy_gradient_exact, 400) > 0.05
