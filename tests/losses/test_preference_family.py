"""The wider preference family: each by hand, one identity, one limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import losses
from rlft.losses import _base
from tests.losses.enumeration import early_eos
from tests.losses.test_preference import CHOSEN, FOUR, REF_CHOSEN, REF_REJECTED, REJECTED, H, sigmoid

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-14}
X_W, X_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED  # .5, -1, 1 and -1, 2, -6
LENGTHS = torch.tensor([2, 4, 8]), torch.tensor([4, 2, 1])


def by_hand(function) -> Tensor:
    """A formula of (log-ratio chosen, log-ratio rejected), entry by entry in plain Python."""
    return torch.tensor([function(w, lose) for w, lose in zip(X_W.tolist(), X_L.tolist(), strict=True)], dtype=F64)


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


FORMULAS = [
    (losses.apo_zero, {}, lambda w, x: 1 - sigmoid(0.5 * w) + sigmoid(0.5 * x)),
    (losses.apo_down, {}, lambda w, x: sigmoid(0.5 * w) + 1 - sigmoid(0.5 * (w - x))),
    (losses.anchored_dpo, {"delta": 0.2}, lambda w, x: -logsigmoid(0.5 * (w - x)) - logsigmoid(0.5 * w - 0.2)),
    (losses.nca_pair, {}, lambda w, x: -logsigmoid(0.5 * w) - 0.5 * (logsigmoid(-0.5 * w) + logsigmoid(-0.5 * x))),
    (losses.bco_pair, {"delta": 0.2}, lambda w, x: -logsigmoid(0.5 * w - 0.2) - logsigmoid(-(0.5 * x - 0.2))),
    (losses.sppo_hard, {}, lambda w, x: (w - 1) ** 2 + (x + 1) ** 2),
    (
        losses.exo_pair,
        {"label_smoothing": 0.1},
        lambda w, x: (
            sigmoid(0.5 * (w - x)) * math.log(sigmoid(0.5 * (w - x)) / 0.9)
            + sigmoid(0.5 * (x - w)) * math.log(sigmoid(0.5 * (x - w)) / 0.1)
        ),
    ),
    (
        losses.robust_dpo,
        {"label_smoothing": 0.1},
        lambda w, x: (-0.9 * logsigmoid(0.5 * (w - x)) + 0.1 * logsigmoid(-0.5 * (w - x))) / 0.8,
    ),
    (
        losses.discopop,
        {},
        lambda w, x: (
            (1 - sigmoid(0.5 * (w - x) / 0.05)) * -logsigmoid(0.5 * (w - x))
            + sigmoid(0.5 * (w - x) / 0.05) * math.exp(-0.5 * (w - x))
        ),
    ),
    (losses.generalised_po, {"f": "exp"}, lambda w, x: math.exp(-0.5 * (w - x))),
    (losses.f_dpo, {"divergence": "forward_kl"}, lambda w, x: -logsigmoid(0.5 * (math.exp(-x) - math.exp(-w)))),
    (
        losses.f_dpo,
        {"divergence": "js"},
        lambda w, x: (
            -logsigmoid(
                0.5 * (math.log(2 * math.exp(w) / (1 + math.exp(w))) - math.log(2 * math.exp(x) / (1 + math.exp(x))))
            )
        ),
    ),
    (
        losses.f_dpo,
        {"divergence": "alpha", "alpha": 0.3},
        lambda w, x: -logsigmoid(0.5 * (math.exp(-0.3 * x) - math.exp(-0.3 * w)) / 0.3),
    ),
]


@pytest.mark.parametrize(
    ("loss", "hyper", "formula"), FORMULAS, ids=lambda v: getattr(v, "__name__", None) if callable(v) else str(v)
)
def test_formulas_by_hand(loss, hyper: dict, formula) -> None:
    found = loss(*FOUR, beta=0.5, **hyper)
    torch.testing.assert_close(found.loss, by_hand(formula), **TIGHT)
    if loss is not losses.f_dpo:
        torch.testing.assert_close(found.metrics["rewards/chosen"], 0.5 * X_W, **TIGHT)
        torch.testing.assert_close(found.metrics["rewards/margins"], 0.5 * H, **TIGHT)


# -- identities -------------------------------------------------------------------------------------------------------


def test_the_umbrella_holds_its_members() -> None:
    for f, loss in (("logistic", losses.dpo), ("hinge", losses.slic)):
        torch.testing.assert_close(
            losses.generalised_po(*FOUR, beta=0.4, f=f).loss, loss(*FOUR, beta=0.4).loss, **TIGHT
        )
    square = losses.generalised_po(*FOUR, beta=0.4, f="square").loss
    torch.testing.assert_close(square, 0.4**2 * losses.ipo(*FOUR, beta=0.2).loss, **TIGHT)


def test_every_convex_function_has_slope_minus_one_at_zero_up_to_scale() -> None:
    """At the reference all of them push the margin up: DPO by beta/2, the others by beta, the square by 2 beta."""
    for f, slope in (("logistic", -0.5), ("square", -2.0), ("hinge", -1.0), ("exp", -1.0)):
        leaf = CHOSEN.clone().requires_grad_()
        losses.generalised_po(leaf, REJECTED, CHOSEN, REJECTED, beta=0.3, f=f).loss.sum().backward()
        torch.testing.assert_close(leaf.grad, torch.full((3,), 0.3 * slope, dtype=F64), **TIGHT)


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """Averaged over labels flipped with probability e it is DPO's loss on the clean ones."""
    e, flipped = 0.2, (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    mean = (1 - e) * losses.robust_dpo(*FOUR, beta=0.4, label_smoothing=e).loss
    mean = mean + e * losses.robust_dpo(*flipped, beta=0.4, label_smoothing=e).loss
    torch.testing.assert_close(mean, losses.dpo(*FOUR, beta=0.4).loss, **TIGHT)
    zero = losses.robust_dpo(*FOUR, beta=0.4, label_smoothing=0.0).loss
    assert torch.equal(zero, losses.dpo(*FOUR, beta=0.4).loss)


def test_exo_vanishes_at_its_target_only() -> None:
    e, beta = 0.1, 0.5
    margin = torch.tensor([math.log((1 - e) / e)], dtype=F64) / beta
    zero = torch.zeros(1, dtype=F64)
    leaf = (-1 + 0 * margin).requires_grad_()
    at = losses.exo_pair(leaf, leaf.detach() - margin, zero - 1, zero - 1, beta=beta, label_smoothing=e)
    at.loss.sum().backward()
    assert abs(at.loss.item()) < 1e-15
    assert abs(leaf.grad.item()) < 1e-15
    assert (losses.exo_pair(*FOUR, beta=beta, label_smoothing=e).loss > 1e-3).all()
    with pytest.raises(ValueError, match="label_smoothing must be > 0"):
        losses.exo_pair(*FOUR, beta=beta, label_smoothing=0.0)


@pytest.mark.parametrize(
    ("divergence", "alpha"), [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3), ("alpha", 1.0)]
)
def test_f_dpo_rests_where_its_divergence_says(divergence: str, alpha: float) -> None:
    """Labels from a Bradley-Terry model of r = beta f'(pi/ref): the expected gradient at pi vanishes for that f alone."""
    s = early_eos()
    x = (s.world.answer_logps(s.logits) - s.world.answer_logps(s.ref)).detach()
    links = {
        ("reverse_kl", 0.5): x,
        ("forward_kl", 0.5): -torch.exp(-x),
        ("js", 0.5): torch.log(2 * torch.exp(x) / (1 + torch.exp(x))),
        ("alpha", 0.3): (1 - torch.exp(-0.3 * x)) / 0.3,
        ("alpha", 1.0): 1 - torch.exp(-x),
    }
    i, j = s.world.tuples(2).unbind(-1)
    for (name, power), link in links.items():
        weights = s.behaviour[i] * s.behaviour[j] * torch.sigmoid(s.beta * (link[i] - link[j]))
        logps, ref = s.world.answer_logps(s.logits), s.world.answer_logps(s.ref)
        hyper = {"beta": s.beta, "divergence": divergence, "alpha": alpha}
        found = s.gradient((weights * losses.f_dpo(logps[i], logps[j], ref[i], ref[j], **hyper).loss).sum())
        alike = {("alpha", 1.0): ("forward_kl", 0.5)}  # up to a constant
        same = alike.get((name, power), (name, power)) == alike.get((divergence, alpha), (divergence, alpha))
        assert (found.abs().max() < 1e-12) == same, (name, power)


def test_f_dpo_limits() -> None:
    dpo = losses.dpo(*FOUR, beta=0.4).loss
    assert torch.equal(losses.f_dpo(*FOUR, beta=0.4, divergence="reverse_kl").loss, dpo)
    near = losses.f_dpo(*FOUR, beta=0.4, divergence="alpha", alpha=1e-7).loss
    torch.testing.assert_close(near, dpo, rtol=1e-5, atol=1e-6)
    one = losses.f_dpo(*FOUR, beta=0.4, divergence="alpha", alpha=1.0).loss
    torch.testing.assert_close(one, losses.f_dpo(*FOUR, beta=0.4, divergence="forward_kl").loss, **TIGHT)


def test_discopop_is_logistic_far_below_and_exponential_far_above() -> None:
    def pair(h: float) -> tuple[Tensor, ...]:
        chosen = torch.tensor([-2.0 + min(h, 0.0)], dtype=F64)
        return chosen, chosen - h, torch.tensor([-2.0], dtype=F64), torch.tensor([-2.0], dtype=F64)

    low = losses.discopop(*pair(-20.0), beta=1.0).loss.item()
    assert low == pytest.approx(losses.dpo(*pair(-20.0), beta=1.0).loss.item(), rel=1e-12)
    high = losses.discopop(*pair(20.0), beta=1.0).loss.item()
    assert high == pytest.approx(math.exp(-20), rel=1e-6)


@pytest.mark.parametrize("distance", ["square", "backward_kl", "forward_kl"])
def test_reward_aware_rpo_rests_where_the_margins_agree(distance: str) -> None:
    leaf = CHOSEN.clone().requires_grad_()
    hyper = {"beta": 0.4, "eta": 0.8, "distance": distance}
    output = losses.reward_aware_rpo(leaf, *FOUR[1:], 0.5 * H, **hyper)  # eta margin = beta h
    output.loss.sum().backward()
    assert output.loss.abs().max() < 1e-15
    assert leaf.grad.abs().max() < 1e-15
    assert (losses.reward_aware_rpo(*FOUR, 0.5 * H + 1, **hyper).loss > 1e-3).all()


def test_reward_aware_rpo_by_hand_and_its_limit_dpo() -> None:
    margins = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    a, b = (0.4 * H).tolist(), (0.8 * margins).tolist()

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    hyper = {"beta": 0.4, "eta": 0.8}
    square = losses.reward_aware_rpo(*FOUR, margins, distance="square", **hyper).loss
    assert square.tolist() == pytest.approx([0.5 * (x - y) ** 2 for x, y in zip(a, b, strict=True)], rel=1e-12)
    backward = losses.reward_aware_rpo(*FOUR, margins, **hyper).loss
    assert backward.tolist() == pytest.approx(
        [kl(sigmoid(y), sigmoid(x)) for x, y in zip(a, b, strict=True)], rel=1e-11
    )
    forward = losses.reward_aware_rpo(*FOUR, margins, distance="forward_kl", **hyper).loss
    assert forward.tolist() == pytest.approx([kl(sigmoid(x), sigmoid(y)) for x, y in zip(a, b, strict=True)], rel=1e-11)
    certain = losses.reward_aware_rpo(*FOUR, torch.full((3,), 1e3, dtype=F64), **hyper).loss
    torch.testing.assert_close(certain, losses.dpo(*FOUR, beta=0.4).loss, **TIGHT)


def test_directions_of_the_anchored_losses() -> None:
    """apo_zero raises the chosen answer and lowers the rejected; apo_down, at the reference, leaves the chosen be."""
    for loss, slopes in ((losses.apo_zero, (-0.125, 0.125)), (losses.apo_down, (0.0, 0.125))):
        chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
        loss(chosen, rejected, CHOSEN, REJECTED, beta=0.5).loss.sum().backward()
        torch.testing.assert_close(chosen.grad, torch.full((3,), slopes[0], dtype=F64), **TIGHT)
        torch.testing.assert_close(rejected.grad, torch.full((3,), slopes[1], dtype=F64), **TIGHT)


def test_sppo_and_anchored_limits() -> None:
    half = losses.sppo_hard(CHOSEN, REJECTED, CHOSEN - 1, REJECTED + 1, beta=0.5)
    assert half.loss.eq(0).all()  # log-ratios exactly +-1/(2 beta)
    low = losses.anchored_dpo(*FOUR, beta=0.5, delta=-800.0).loss
    torch.testing.assert_close(low, losses.dpo(*FOUR, beta=0.5).loss, **TIGHT)


def test_ipo_md_with_certain_wins_is_ipo_and_swapping_is_symmetric() -> None:
    one = torch.ones(3, dtype=F64)
    torch.testing.assert_close(losses.ipo_md(*FOUR, one, beta=0.25).loss, losses.ipo(*FOUR, beta=0.25).loss, **TIGHT)
    soft = torch.tensor([0.9, 0.3, 0.5], dtype=F64)
    a = losses.ipo_md(*FOUR, soft, beta=0.25).loss
    b = losses.ipo_md(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, 1 - soft, beta=0.25).loss
    torch.testing.assert_close(a, b, **TIGHT)
    assert a[2].item() == pytest.approx(49.0, rel=1e-12)  # an even match: h^2
    with pytest.raises(ValueError, match=r"chosen_win_rates must lie in \[0, 1\], got 1\.5"):
        losses.ipo_md(*FOUR, one + 0.5, beta=0.25)


# -- with lengths -----------------------------------------------------------------------------------------------------


def test_simpo_by_hand_and_against_reference_free_dpo() -> None:
    means = (CHOSEN / LENGTHS[0]).tolist(), (REJECTED / LENGTHS[1]).tolist()
    found = losses.simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.0, gamma=0.5)
    expected = [-logsigmoid(2 * (w - x) - 0.5) for w, x in zip(*means, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-13)
    assert found.metrics["rewards/chosen"].tolist() == pytest.approx([2 * m for m in means[0]], rel=1e-14)
    assert found.metrics["logps/chosen"].tolist() == CHOSEN.tolist()
    assert found.metrics["logps/chosen_per_token"].tolist() == means[0]
    ones = torch.ones(3, dtype=torch.long)
    plain = losses.simpo(CHOSEN, REJECTED, ones, ones, beta=0.3, gamma=0.0, label_smoothing=0.1)
    free = losses.dpo_reference_free(CHOSEN, REJECTED, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(plain.loss, free.loss, **TIGHT)


def test_orpo_by_hand() -> None:
    p_w = [math.exp(m) for m in (CHOSEN / LENGTHS[0]).tolist()]
    p_l = [math.exp(m) for m in (REJECTED / LENGTHS[1]).tolist()]
    ratios = [math.log(w / (1 - w)) - math.log(x / (1 - x)) for w, x in zip(p_w, p_l, strict=True)]
    found = losses.orpo(CHOSEN, REJECTED, *LENGTHS, beta=0.3, eps=0.0)
    expected = [-math.log(w) - 0.3 * logsigmoid(r) for w, r in zip(p_w, ratios, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.metrics["log_odds_chosen"].tolist() == pytest.approx(ratios, rel=1e-12)
    assert found.metrics["log_odds_ratio"].tolist() == pytest.approx([logsigmoid(r) for r in ratios], rel=1e-12)
    assert found.metrics["nll_loss"].tolist() == pytest.approx([-math.log(w) for w in p_w], rel=1e-12)


def test_orpo_is_accurate_at_both_ends_and_finite_or_refused_at_certainty() -> None:
    one, even = torch.ones(1, dtype=torch.long), torch.tensor([-0.7])
    for mean in (-1e-6, -1e-3, -40.0):
        wide = losses.orpo(torch.tensor([mean]).double(), even.double(), one, one, beta=1.0, eps=0.0)
        narrow = losses.orpo(torch.tensor([mean]), even, one, one, beta=1.0, eps=0.0)
        a, b = narrow.metrics["log_odds_chosen"].double(), wide.metrics["log_odds_chosen"]
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert narrow.loss.isfinite().all()
    with pytest.raises(ValueError, match=r"chosen_logps is 0 at \[0\]: the odds .* overflow torch.float32; set eps"):
        losses.orpo(torch.zeros(1), even, one, one, beta=1.0, eps=0.0)
    for pair in ((0.0, -0.7), (-0.7, 0.0), (0.0, 0.0)):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in pair)
        output = losses.orpo(chosen, rejected, one, one, beta=1.0)
        output.mean().backward()
        assert output.loss.isfinite().all()
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()
    odds = losses.orpo(torch.zeros(1).double(), -torch.tensor([2.0]).log().double(), one, one, beta=1.0, eps=1e-3)
    expected = math.log(0.999 / 0.001) - math.log(0.4995 / 0.5005)
    assert odds.metrics["log_odds_chosen"].item() == pytest.approx(expected, rel=1e-6)


def test_log1mexp_and_its_gradient() -> None:
    # exp(-1e-17) rounds to 1
    x = torch.tensor(
        [-1e-300, -1e-17, -1e-12, -1e-6, -0.3, -math.log(2), -1.0, -30.0, -700.0], dtype=F64, requires_grad=True
    )
    found = _base.log1mexp(x)
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-14, abs=0)  # far down the result is tiny itself
    found.sum().backward()
    assert x.grad.tolist() == pytest.approx([math.exp(v) / math.expm1(v) for v in x.tolist()], rel=1e-12)


def test_cpo_and_rpo_are_a_margin_and_a_likelihood() -> None:
    nll = -CHOSEN / LENGTHS[0]
    found = losses.cpo(CHOSEN, REJECTED, *LENGTHS, beta=0.3, nll_weight=0.7)
    free = losses.dpo_reference_free(CHOSEN, REJECTED, beta=0.3).loss
    torch.testing.assert_close(found.loss, free + 0.7 * nll, **TIGHT)
    torch.testing.assert_close(found.metrics["nll_loss"], nll, **TIGHT)
    found = losses.rpo(*FOUR, LENGTHS[0], beta=0.3, alpha=0.7)
    torch.testing.assert_close(found.loss, losses.dpo(*FOUR, beta=0.3).loss + 0.7 * nll, **TIGHT)
    alone = losses.rpo(*FOUR, LENGTHS[0], beta=0.3, alpha=0.0).loss
    torch.testing.assert_close(alone, losses.dpo(*FOUR, beta=0.3).loss, **TIGHT)


def test_wpo_weighs_dpo_by_detached_probabilities() -> None:
    weights = (CHOSEN / LENGTHS[0] + REJECTED / LENGTHS[1]).exp()
    leaf = CHOSEN.clone().requires_grad_()
    found = losses.wpo(leaf, *FOUR[1:], *LENGTHS, beta=0.3)
    dpo_leaf = CHOSEN.clone().requires_grad_()
    dpo = losses.dpo(dpo_leaf, *FOUR[1:], beta=0.3)
    torch.testing.assert_close(found.loss, weights * dpo.loss, **TIGHT)
    torch.testing.assert_close(found.metrics["weights"], weights, **TIGHT)
    found.loss.sum().backward()
    dpo.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, weights * dpo_leaf.grad, **TIGHT)


# -- optimal transport ------------------------------------------------------------------------------------------------


def test_aot_sorts() -> None:
    margins, ref_margins = (CHOSEN - REJECTED), (REF_CHOSEN - REF_REJECTED)  # 1, -1, 7 and -.5, 2, 0
    found = losses.aot(*FOUR, beta=0.5, label_smoothing=0.1)
    expected = [
        -0.9 * logsigmoid(0.5 * (m - r)) - 0.1 * logsigmoid(0.5 * (r - m)) for m, r in ((1, 0), (-1, -0.5), (7, 2))
    ]
    assert margins.tolist() == [1, -1, 7]
    assert ref_margins.tolist() == [-0.5, 2, 0]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-13)
    found = losses.aot_unpaired(*FOUR, beta=0.5)  # .5, -1, 1 against -1, 2, -6
    expected = [-logsigmoid(0.5 * (w - x)) for w, x in ((0.5, -1), (-1, -6), (1, 2))]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-13)


def test_aot_of_one_pair_is_dpo_and_unpaired_ignores_the_pairing() -> None:
    one = tuple(x[:1] for x in FOUR)
    dpo = losses.dpo(*one, beta=0.3).loss
    torch.testing.assert_close(losses.aot(*one, beta=0.3).loss, dpo, **TIGHT)
    torch.testing.assert_close(losses.aot_unpaired(*one, beta=0.3).loss, dpo, **TIGHT)
    roll = torch.tensor([1, 2, 0])
    mixed = (CHOSEN, REJECTED[roll], REF_CHOSEN, REF_REJECTED[roll])
    torch.testing.assert_close(
        losses.aot_unpaired(*mixed, beta=0.3).loss, losses.aot_unpaired(*FOUR, beta=0.3).loss, **TIGHT
    )
    assert losses.aot.couples_rows
    assert losses.aot_unpaired.couples_rows
    assert not losses.dpo.couples_rows


# -- by rows ----------------------------------------------------------------------------------------------------------


def pair_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logps, ref = (-torch.rand(4, 5, generator=g, dtype=F64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    return logps.requires_grad_(), ref, torch.tensor([1, 1, 0, 0]), mask


def test_ld_dpo_at_one_is_dpo_and_at_zero_sees_the_shared_length_alone() -> None:
    logps, ref, ids, mask = pair_rows()

    def dpo(kept: Tensor) -> losses.LossOutput:
        sums = [x.where(kept, 0.0).sum(-1) for x in (logps, ref)]
        return losses.dpo(sums[0][0::2], sums[0][1::2], sums[1][0::2], sums[1][1::2], beta=0.4, label_smoothing=0.1)

    shared = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    for alpha, kept in ((1.0, mask), (0.0, shared)):
        found = losses.ld_dpo(logps, ref, ids, mask, beta=0.4, ld_alpha=alpha, label_smoothing=0.1)
        plain = dpo(kept)
        torch.testing.assert_close(found.loss, plain.loss.repeat_interleave(2), **TIGHT)
        torch.testing.assert_close(found.mean(), plain.mean(), **TIGHT)
        a, b = (torch.autograd.grad(x.mean(), logps)[0] for x in (found, plain))
        torch.testing.assert_close(a, b, **TIGHT)
        torch.testing.assert_close(found.metrics["rewards/chosen"][0::2], plain.metrics["rewards/chosen"], **TIGHT)
        assert found.metrics["rewards/chosen"][1::2].isnan().all()


def test_ld_dpo_weighs_the_excess() -> None:
    logps, ref, ids, mask = pair_rows()
    weights = torch.tensor([[1, 1, 0.3, 0.3, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0.3, 0.3]], dtype=F64)
    rewards = 0.4 * (weights * (logps - ref)).sum(-1)
    found = losses.ld_dpo(logps, ref, ids, mask, beta=0.4, ld_alpha=0.3)
    expected = [-logsigmoid((rewards[i] - rewards[i + 1]).item()) for i in (0, 2)]
    assert found.loss[0::2].tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="group 1 has 3 rows: give each pair its own id"):
        losses.ld_dpo(logps, ref, torch.tensor([1, 1, 1, 2]), mask, beta=0.4, ld_alpha=0.3)


def test_rrhf_by_hand() -> None:
    logps = torch.tensor([[-1.0, -3.0], [-1.0, -9.0], [-4.0, -2.0]], dtype=F64).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    rewards, ids = torch.tensor([3.0, 1.0, 2.0], dtype=F64), torch.zeros(3, dtype=torch.long)
    # means -2, -1, -3; row 1 loses to 0 and 2: max(0, 1) + max(0, 2); row 2 loses to 0: max(0, -1); best is row 0, l = -4
    output = losses.rrhf(logps, rewards, ids, mask, nll_weight=0.5)
    assert output.mean().item() == pytest.approx(1 + 2 + 0 + 0.5 * 4, rel=1e-14)
    assert output.loss.tolist() == [6, 9, 0]
    output.mean().backward()
    torch.testing.assert_close(
        logps.grad, torch.tensor([[-0.5 - 0.5, -0.5 - 0.5], [2.0, 0], [-0.5, -0.5]], dtype=F64), **TIGHT
    )
    assert output.metrics["nll_loss"][0] == 4
    assert output.metrics["nll_loss"][1:].isnan().all()


def test_rrhf_ties_share_the_likelihood_and_are_no_pair() -> None:
    logps, mask = -torch.tensor([[1.0], [2.0]], dtype=F64), torch.ones(2, 1).bool()
    output = losses.rrhf(logps, torch.ones(2, dtype=F64), torch.zeros(2, dtype=torch.long), mask)
    assert output.mean().item() == pytest.approx(1.5, rel=1e-14)  # the mean of 1 and 2


def test_unlikelihood_by_hand() -> None:
    p = torch.tensor([[0.25, 0.5], [0.25, 0.5]], dtype=F64)
    output = losses.unlikelihood(p.log(), torch.tensor([True, False]), torch.ones(2, 2).bool(), weight=2.0, eps=1e-12)
    expected = [[-math.log(0.25), -math.log(0.5)], [-2 * math.log(0.75), -2 * math.log(0.5)]]
    torch.testing.assert_close(output.loss, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=0)
    assert output.metrics["nll_loss"].isnan().tolist() == [[False, False], [True, True]]


def test_unlikelihood_is_bounded_at_certainty() -> None:
    leaf = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    output = losses.unlikelihood(leaf, torch.tensor([False]), torch.ones(1, 1).bool(), eps=1e-3)
    output.mean().backward()
    assert output.loss.item() == pytest.approx(-math.log(1e-3), rel=1e-12)
    assert 0 < leaf.grad.item() <= 1e3
    with pytest.raises(ValueError, match="eps must be < 1"):
        losses.unlikelihood(leaf, torch.tensor([False]), torch.ones(1, 1).bool(), eps=1.0)


def test_orpo_at_certainty_names_the_tensor_and_forgives_rounding() -> None:
    one, even = torch.ones(2).long(), torch.tensor([-0.7, -0.7], dtype=F64)
    certain = torch.tensor([-0.7, 0.0], dtype=F64)  # the second of two
    for pair, name in (((certain, even), "chosen_logps"), ((even, certain), "rejected_logps")):
        with pytest.raises(ValueError, match=rf"^{name} is 0 at \[1\]"):
            losses.orpo(*pair, one, one, beta=1.0, eps=0.0)
    above = torch.tensor([-0.7, 5e-5], dtype=F64)  # a sum of rounded log-probs
    found, at = (
        losses.orpo(chosen, even, one, one, beta=1.0).metrics["log_odds_chosen"] for chosen in (above, certain)
    )
    torch.testing.assert_close(found, at, **TIGHT)


# -- many rows: what holds for a few by accident ----------------------------------------------------------------------


def test_pairs_are_told_apart_in_a_large_batch() -> None:
    """All chosen rows first, then all rejected ones: the first row of a pair is the chosen one, however ids are sorted."""
    ids, mask = torch.arange(64).repeat(2), torch.ones(128, 1).bool()
    logps = -torch.linspace(1, 2, 128, dtype=F64)[:, None]
    metrics = losses.ld_dpo(logps, logps - 0.5, ids, mask, beta=0.4, ld_alpha=0.5).metrics
    assert metrics["rewards/chosen"].isnan().tolist() == [False] * 64 + [True] * 64
    assert metrics["rewards/rejected"].isnan().tolist() == [True] * 64 + [False] * 64


def test_equal_margins_are_matched_in_the_order_of_rows() -> None:
    n = 64
    same, rising = torch.full((n,), -3.0, dtype=F64), -torch.linspace(9, 2, n, dtype=F64)
    found = losses.aot_unpaired(same, rising, same, same, beta=1.0).loss  # tied chosen take rejected ones as they rise
    assert found.tolist() == pytest.approx([-logsigmoid(-3.0 - x) for x in rising.tolist()], rel=1e-12)
    leaf = same.clone().requires_grad_()  # tied rejected are given out in their order
    losses.aot_unpaired(rising, leaf, same, same, beta=1.0).loss.sum().backward()
    assert (leaf.grad.diff() < 0).all()


def test_unlikelihood_forgives_rounding_above_zero() -> None:
    bad, mask = torch.tensor([False]), torch.ones(1, 1).bool()
    above, at = (losses.unlikelihood(torch.full((1, 1), x, dtype=F64), bad, mask, eps=1e-7).loss for x in (9e-7, 0.0))
    assert above.item() == at.item() == pytest.approx(-math.log(1e-7), rel=1e-9)
