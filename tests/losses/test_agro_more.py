"""AGRO's further estimators: token-level likelihood-ratio terms, off-policy expectations, weights, per-token beta."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft import losses
from rlft.worlds import expected_loss
from tests.losses.cases import CASES
from tests.losses.enumeration import Setting, early_eos, small
from tests.losses.test_agro import BETA, EXACT, IDS, LOGPS, MASK, OFF, REF, REWARDS, TOKEN_KL, golden, rows, table

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-15}


# -- likelihood-ratio terms -------------------------------------------------------------------------------------------


def test_golden_token_terms() -> None:
    value, gradient, _ = golden(losses.agro_on_policy_lr_token)
    assert value.item() == pytest.approx(0.0546875, rel=1e-14)
    expected = [[0.0520833333333333, 0.0364583333333333], [0, 0], [0.0208333333333333, 0.0208333333333333]]
    torch.testing.assert_close(gradient - table(OFF), table(expected), rtol=1e-13, atol=1e-15)
    kl = TOKEN_KL.clone().requires_grad_()
    leaf = LOGPS.clone().requires_grad_()
    losses.agro_on_policy_lr_kl(leaf, REF, kl, REWARDS, IDS, MASK, beta=BETA).mean().backward()
    expected = [[0.05052083333, 0.04947916667], [-0.0234375, 0], [0.01875, 0.04166666667]]
    torch.testing.assert_close(BETA * leaf.grad - table(OFF), table(expected), rtol=0, atol=1e-10)
    expected = [[0.01041666667, 0.05208333333], [-0.03125, 0], [0.02083333333, -0.02083333333]]
    torch.testing.assert_close(BETA * kl.grad, table(expected), rtol=0, atol=1e-10)


def moments(s: Setting, answers: Tensor) -> dict[str, Tensor]:
    """M_t, the exact mean square of the log-ratio at every position."""
    squares = s.world.log_ratio_table(s.logits, s.ref).square()
    return {"token_log_ratio_sq": s.world.token_expectation(squares, s.logits)[answers]}


LR_TERMS = [
    (losses.agro_on_policy_lr_causal, {}),
    *[(losses.agro_on_policy_lr_token, {"square": h, "linear": g}) for h in ("h1", "h2") for g in ("g1", "g2")],
    *[
        (losses.agro_on_policy_lr_kl, {"square": h, "linear": g})
        for h, g in (("h3", "g1"), ("h3", "g2"), ("h3", "g3"), ("h3", "g3n"), ("h1", "g3"), ("h2", "g3n"))
    ],
    (losses.agro_on_policy_lr_moments, {}),
]


def lr_gradient(s: Setting, loss, n: int, **hyper) -> Tensor:
    """The expected gradient of the likelihood-ratio term alone, unscaled."""

    def total(coef: float) -> Tensor:
        return expected_loss(
            s.world, n, s.policy, lambda i, g: s.call(loss, i, g, lr_coef=coef, **moments(s, i), **hyper)
        )

    return s.beta * s.gradient(total(1.0) - total(0.0))


@pytest.mark.parametrize(("make", "n"), [(early_eos, 2), (early_eos, 3), (small, 4)])
@pytest.mark.parametrize(("loss", "hyper"), LR_TERMS, ids=lambda v: v.__name__ if callable(v) else "-".join(v.values()))
def test_every_likelihood_ratio_term_is_unbiased(loss, hyper: dict, make, n: int) -> None:
    s = make()
    term = s.loss_gradient(s.policy) - s.loss_gradient(s.policy.detach())
    torch.testing.assert_close(lr_gradient(s, loss, n, **hyper), term, **EXACT)
    if n >= 3 and loss is not losses.agro_on_policy_lr_causal:
        torch.testing.assert_close(lr_gradient(s, loss, n, lr_baseline="unbiased", **hyper), term, **EXACT)


@pytest.mark.parametrize(("loss", "hyper"), LR_TERMS, ids=lambda v: v.__name__ if callable(v) else "-".join(v.values()))
def test_without_the_term_they_are_off_policy_agro(loss, hyper: dict) -> None:
    s = early_eos()
    answers, ids = torch.tensor([0, 5, 9, 3]), torch.tensor([0, 0, 1, 1])
    found = s.call(loss, answers, ids, lr_coef=0.0, **moments(s, answers), **hyper)
    plain = s.call(losses.agro_off_policy, answers, ids)
    torch.testing.assert_close(found.loss, plain.loss, **TIGHT)
    a, b = (s.gradient(x.mean()) for x in (found, plain))
    torch.testing.assert_close(a, b, **TIGHT)


def test_h1_g1_differs_from_the_plain_term_by_a_zero_mean_term() -> None:
    logps, ref, rewards, ids, mask = rows(3, groups=2)
    common = {"beta": 0.4, "lr_coef": 1.0}
    expanded = losses.agro_on_policy_lr_token(logps, ref, rewards, ids, mask, square="h1", linear="g1", **common)
    plain = losses.agro_on_policy(logps, ref, rewards, ids, mask, **common)
    total = (logps.detach() - ref).where(mask, 0.0).sum(-1)
    others = torch.stack([(total[ids == g].sum() - total[ids == g]) / 2 for g in (0, 1)], 1).flatten()
    left_out = 0.4**2 * others.square() / (2 * 0.4)
    a, b = (torch.autograd.grad(x.mean(), logps)[0] for x in (expanded, plain))
    torch.testing.assert_close(b - a, left_out[:, None].where(mask, 0.0) / 6, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_unbiased_baseline_is_the_variance_of_the_others(n: int) -> None:
    """Row by row: what lr_baseline takes away is n/(n-1) Var(R of the others), for every expansion of the term."""
    logps, ref, rewards, ids, mask = rows(n, groups=2)
    beta = 0.4
    r = rewards - beta * (logps.detach() - ref).where(mask, 0.0).sum(-1)
    c = torch.stack([r[(ids == ids[i]) & (torch.arange(2 * n) != i)].var() for i in range(2 * n)]) * n / (n - 1)
    for loss, extra in ((losses.agro_on_policy_lr_token, ()), (losses.agro_on_policy_lr_kl, (torch.ones_like(ref),))):
        grads = [
            torch.autograd.grad(
                loss(logps, ref, *extra, rewards, ids, mask, beta=beta, lr_baseline=baseline).mean(), logps
            )[0]
            for baseline in ("none", "unbiased")
        ]
        expected = (c / (2 * beta))[:, None].where(mask, 0.0) / (2 * n)
        torch.testing.assert_close(grads[0] - grads[1], expected, rtol=1e-10, atol=1e-14)


def test_the_unbiased_baseline_needs_three_scored_rows() -> None:
    """With one of three unscored there is no variance of the others left, and nothing is taken away."""
    logps, ref, rewards, ids, mask = rows(3)
    rewards[1] = torch.nan
    grads = [
        torch.autograd.grad(
            losses.agro_on_policy_lr_token(logps, ref, rewards, ids, mask, beta=0.4, lr_baseline=b).mean(), logps
        )[0]
        for b in ("none", "unbiased")
    ]
    assert torch.equal(grads[0], grads[1])
    assert grads[0].abs().sum() > 0.01


def test_causal_term_by_hand() -> None:
    """S before each token: [0, .5], [0, (-.75)], [0, -.5]; A = .5625, -.1875, -.375; the second token alone changes."""
    _, gradient, _ = golden(losses.agro_on_policy_lr_causal)
    past = [(0.5 - (-0.75 - 0.5) / 2) ** 2, 0.0, (-0.5 - (0.5 - 0.75) / 2) ** 2]
    squares = [0.5625**2, 0.1875**2, 0.375**2]
    expected = [[a / 6, (a - BETA**2 * p) / 6] for a, p in zip(squares, past, strict=True)]
    expected[1][1] = 0.0  # masked
    torch.testing.assert_close(gradient - table(OFF), table(expected), rtol=1e-13, atol=1e-15)


def test_token_kl_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="call agro_on_policy_lr_token instead"):
        losses.agro_on_policy_lr_kl(LOGPS, REF, TOKEN_KL, REWARDS, IDS, MASK, beta=0.5, square="h2", linear="g2")
    with pytest.raises(ValueError, match="at least 3 rows"):
        losses.agro_on_policy_lr_token(
            *(x[:2] for x in (LOGPS, REF, REWARDS, IDS, MASK)), beta=0.5, lr_baseline="unbiased"
        )


# -- off-policy -------------------------------------------------------------------------------------------------------


def expectations(s: Setting, answers: Tensor, mu_logits: Tensor) -> dict[str, Tensor]:
    """d and q: the first two moments of the next log-ratio under the behaviour policy, and its log-probs."""
    log_ratio = s.world.log_ratio_table(s.logits, s.ref)
    return {
        "behaviour_log_ratio": s.world.token_expectation(log_ratio, mu_logits)[answers],
        "behaviour_log_ratio_sq": s.world.token_expectation(log_ratio.square(), mu_logits)[answers],
        "old_logps": s.world.token_logps(mu_logits)[answers].detach(),
    }


REDUCED = [losses.agro_off_policy_rb, losses.agro_off_policy_rb2, losses.agro_off_policy_cv]


@pytest.mark.parametrize("loss", REDUCED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("make", "n"), [(early_eos, 2), (early_eos, 3), (small, 4)])
def test_reduced_estimators_are_unbiased_whoever_sampled(loss, make, n: int) -> None:
    s = make()
    for mu_logits in (s.behaviour_logits, s.ref, s.logits.detach()):
        mu = s.world.answer_logps(mu_logits).exp()
        found = s.gradient(
            expected_loss(s.world, n, mu, lambda i, g, m=mu_logits: s.call(loss, i, g, **expectations(s, i, m)))
        )
        torch.testing.assert_close(s.beta * found, s.loss_gradient(mu), **EXACT)
    assert not loss.on_policy_only


def test_reduced_estimators_become_the_on_policy_ones() -> None:
    """For mu = pi the control variate is the causal estimator with a whole-sequence baseline, tuple by tuple."""
    s = early_eos()
    answers, ids = torch.tensor([0, 5, 9, 3]), torch.tensor([0, 0, 1, 1])
    extra = expectations(s, answers, s.logits.detach())
    causal = s.gradient(s.call(losses.agro_on_policy_causal, answers, ids, baseline="sequence").mean())
    cv = s.gradient(s.call(losses.agro_off_policy_cv, answers, ids, **extra).mean())
    torch.testing.assert_close(cv, causal, **TIGHT)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_reduced_estimators_have_the_value_of_agro(beta: float) -> None:
    s = early_eos(beta=beta)
    answers, ids = torch.tensor([0, 5, 9, 3]), torch.tensor([0, 0, 1, 1])
    plain = s.call(losses.agro_off_policy, answers, ids)
    for loss in REDUCED:
        found = s.call(loss, answers, ids, **expectations(s, answers, s.behaviour_logits))
        torch.testing.assert_close(found.loss, plain.loss, **TIGHT)
        assert torch.equal(found.metrics["agro/variance"], plain.metrics["agro/variance"])
        if beta == 0:
            torch.testing.assert_close(s.gradient(found.mean()), s.gradient(plain.mean()), **TIGHT)
            plain = s.call(losses.agro_off_policy, answers, ids)


# -- weights and units ------------------------------------------------------------------------------------------------


def weighted(s: Setting, weights: Tensor, answers: Tensor, ids: Tensor) -> losses.LossOutput:
    return s.call(losses.agro_off_policy_weighted, answers, ids, weights=weights[answers])


@pytest.mark.parametrize("n", [2, 3])
def test_weighted_pairs_are_the_loss_of_the_reweighted_policy(n: int) -> None:
    s = early_eos()
    weights = torch.rand(s.world.num_answers, generator=torch.Generator().manual_seed(0), dtype=F64)
    mu, mass = s.behaviour, (s.behaviour * weights).sum()
    value = expected_loss(s.world, n, mu, lambda i, g: weighted(s, weights, i, g))
    target = mass**2 * s.world.variance_loss(s.logits, s.ref, s.rewards, s.beta, mu * weights / mass)
    torch.testing.assert_close(s.beta * value, target, **EXACT)
    torch.testing.assert_close(s.beta * s.gradient(value), s.gradient(target), **EXACT)


def test_weighted_pairs_by_hand_and_with_weights_of_one() -> None:
    logps, ref, rewards, ids, mask = rows(3, groups=2)
    plain = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=0.4)
    found = losses.agro_off_policy_weighted(logps, ref, torch.ones(6, dtype=F64), rewards, ids, mask, beta=0.4)
    torch.testing.assert_close(found.mean(), plain.mean(), **TIGHT)
    a, b = (torch.autograd.grad(x.mean(), logps)[0] for x in (found, plain))
    torch.testing.assert_close(a, b, **TIGHT)
    w = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=F64)
    r = rewards - 0.4 * (logps - ref).where(mask, 0.0).sum(-1)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and ids[i] == ids[j]]
    expected = sum(w[i] * w[j] * (r[i] - r[j]) ** 2 for i, j in pairs) / (4 * 3 * 2) / 2 / 0.4
    found = losses.agro_off_policy_weighted(logps, ref, w, rewards, ids, mask, beta=0.4).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, logps)[0], torch.autograd.grad(expected, logps)[0], rtol=1e-11, atol=1e-15
    )
    with pytest.raises(ValueError, match="weights must be >= 0, got -1"):
        losses.agro_off_policy_weighted(logps, ref, w - 2, rewards, ids, mask, beta=0.4)


def test_truncated_weights_leave_the_optimum() -> None:
    s = early_eos()
    s.logits = s.world.optimal_logits(s.ref, s.rewards, s.beta).requires_grad_()
    weights = (s.policy.detach() / s.behaviour).clamp(max=1)
    value = expected_loss(s.world, 2, s.behaviour, lambda i, g: weighted(s, weights, i, g))
    assert s.gradient(value).abs().max() < 1e-13


def test_per_token_is_autograd_of_its_variance() -> None:
    logps, ref, rewards, ids, mask = rows(4, groups=2)
    beta = 2.0
    output = losses.agro_off_policy_per_token(logps, ref, rewards, ids, mask, beta=beta)
    r = rewards - beta * (logps - ref).where(mask, 0.0).sum(-1) / mask.sum(-1)
    variance = torch.stack([r[ids == g].var() for g in (0, 1)]).mean()
    torch.testing.assert_close(output.mean(), variance / (2 * beta), rtol=1e-12, atol=0)
    (a,) = torch.autograd.grad(output.mean(), logps, retain_graph=True)
    (b,) = torch.autograd.grad(variance / (2 * beta), logps)
    torch.testing.assert_close(a, b, **TIGHT)


def test_per_token_at_one_length_is_beta_over_length() -> None:
    g = torch.Generator().manual_seed(0)
    logps, ref = (-torch.rand(4, 5, generator=g, dtype=F64) for _ in range(2))
    logps.requires_grad_()
    rewards, ids, mask = torch.randn(4, generator=g, dtype=F64), torch.zeros(4).long(), torch.ones(4, 5).bool()
    a = losses.agro_off_policy_per_token(logps, ref, rewards, ids, mask, beta=2.0)
    b = losses.agro_off_policy(logps, ref, rewards, ids, mask, beta=2.0 / 5)
    torch.testing.assert_close(a.loss, b.loss / 5, **TIGHT)  # each is divided by its own beta
    ga, gb = (torch.autograd.grad(x.mean(), logps)[0] for x in (a, b))
    torch.testing.assert_close(ga, gb / 5, **TIGHT)


def test_per_token_at_different_lengths_has_another_optimum() -> None:
    """pi ~ ref exp(T (r - c) / beta): there the loss rests, and not at pi*."""
    s = early_eos(beta=2.0)
    length = s.world.mask.sum(-1)
    ref = s.world.answer_logps(s.ref)
    low, high = torch.tensor(-50.0, dtype=F64), torch.tensor(50.0, dtype=F64)
    for _ in range(200):  # bisection on the normaliser c
        c = (low + high) / 2
        mass = (ref + length * (s.rewards - c) / s.beta).logsumexp(0)
        low, high = (c, high) if mass > 0 else (low, c)
    tilted = length * (s.rewards - c)
    other = s.world.optimal_logits(s.ref, tilted, s.beta)
    for logits, zero in ((other, True), (s.world.optimal_logits(s.ref, s.rewards, s.beta), False)):
        s.logits = logits.clone().requires_grad_()
        found = s.expected(losses.agro_off_policy_per_token, 2, behaviour=s.behaviour)
        assert (found.abs().max() < 1e-12) == zero


@pytest.mark.parametrize(
    "name", ["agro_on_policy", "agro_on_policy_lr_token", "agro_on_policy_lr_kl", "agro_on_policy_lr_moments"]
)
def test_the_unbiased_baseline_needs_three_scored_answers(name: str) -> None:
    """A group of three with two scores has no unbiased baseline: the term is that of "none", or nothing."""
    case = next(case for case in CASES if case.name == name)
    tensors = {n: t[:3].clone() for n, t in case.inputs().items()}
    tensors["group_ids"], tensors["mask"] = torch.zeros(3).long(), torch.ones(3, 4).bool()
    tensors["rewards"] = torch.tensor([1.0, -2.0, torch.nan], dtype=torch.float64)

    def gradient(**hyper) -> torch.Tensor:
        leaves = {n: t.clone().requires_grad_(n == "logps") for n, t in tensors.items()}
        case.fn(*leaves.values(), beta=0.3, **hyper).mean().backward()
        return leaves["logps"].grad

    unbiased = gradient(lr_coef=1.0, lr_baseline="unbiased")
    other = {"lr_coef": 0.0} if name == "agro_on_policy" else {"lr_coef": 1.0, "lr_baseline": "none"}
    torch.testing.assert_close(unbiased, gradient(**other), rtol=1e-13, atol=1e-15)
    assert (gradient(lr_coef=0.0) - gradient(lr_coef=1.0)).abs().max() > 0.1


def test_one_negative_weight_is_enough_to_refuse() -> None:
    weights = torch.tensor([0.5, 0.0, -0.25], dtype=F64)
    with pytest.raises(ValueError, match=r"weights must be >= 0, got -0\.25"):
        losses.agro_off_policy_weighted(LOGPS, REF, weights, REWARDS, IDS, MASK, beta=BETA)
    losses.agro_off_policy_weighted(LOGPS, REF, weights.abs(), REWARDS, IDS, MASK, beta=BETA)


def test_an_unscored_row_may_be_far_from_the_policy_that_sampled() -> None:
    old, rewards = LOGPS.detach().clone(), REWARDS.clone()
    old[0], rewards[0] = -1e4, torch.nan
    output = losses.agro_off_policy_cv(LOGPS, old, REF, rewards, IDS, MASK, beta=BETA)
    assert output.loss.isfinite().all()
    with pytest.raises(ValueError, match="overflows"):
        losses.agro_off_policy_cv(LOGPS, old, REF, REWARDS, IDS, MASK, beta=BETA)
