"""Pair losses: values by hand, limits, and how they relate to one another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import losses
from tests.losses.enumeration import Setting, early_eos

F64 = torch.float64
CHOSEN, REJECTED = torch.tensor([-3.0, -5.0, -2.0], dtype=F64), torch.tensor([-4.0, -4.0, -9.0], dtype=F64)
REF_CHOSEN, REF_REJECTED = torch.tensor([-3.5, -4.0, -3.0], dtype=F64), torch.tensor([-3.0, -6.0, -3.0], dtype=F64)
H = torch.tensor([1.5, -3.0, 7.0], dtype=F64)  # (chosen - ref) - (rejected - ref)
FOUR = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def margin_gradient(loss, *tensors: Tensor, **hyper) -> Tensor:
    """d loss / d chosen, one per pair; minus that must be d loss / d rejected for a function of the margin."""
    chosen, rejected = tensors[0].clone().requires_grad_(), tensors[1].clone().requires_grad_()
    loss(chosen, rejected, *tensors[2:], **hyper).loss.sum().backward()
    torch.testing.assert_close(chosen.grad, -rejected.grad, **TIGHT)
    return chosen.grad


def test_metrics_are_implicit_rewards() -> None:
    metrics = losses.dpo(*FOUR, beta=0.1).metrics
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (CHOSEN - REF_CHOSEN), **TIGHT)
    torch.testing.assert_close(metrics["rewards/rejected"], 0.1 * (REJECTED - REF_REJECTED), **TIGHT)
    torch.testing.assert_close(metrics["rewards/margins"], 0.1 * H, **TIGHT)
    assert metrics["rewards/accuracies"].tolist() == [1, 0, 1]
    assert metrics["logps/chosen"].tolist() == CHOSEN.tolist()
    assert metrics["logps/rejected"].tolist() == REJECTED.tolist()
    tied = losses.dpo(CHOSEN, CHOSEN, REF_CHOSEN, REF_CHOSEN, beta=0.1).metrics
    assert tied["rewards/accuracies"].tolist() == [0, 0, 0]  # a tie is not a win


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_by_hand(smoothing: float) -> None:
    found = losses.dpo(*FOUR, beta=0.5, label_smoothing=smoothing)
    expected = [
        -(1 - smoothing) * math.log(sigmoid(0.5 * h)) - smoothing * math.log(sigmoid(-0.5 * h)) for h in H.tolist()
    ]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-13)
    slope = margin_gradient(losses.dpo, *FOUR, beta=0.5, label_smoothing=smoothing)
    gradient = [-0.5 * (sigmoid(-0.5 * h) - smoothing) for h in H.tolist()]
    assert slope.tolist() == pytest.approx(gradient, rel=1e-12)


def test_at_the_reference_dpo_is_log_two_and_its_slope_half_beta() -> None:
    same = (CHOSEN, REJECTED, CHOSEN, REJECTED)
    assert losses.dpo(*same, beta=0.1).loss.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-15)
    assert margin_gradient(losses.dpo, *same, beta=0.1).tolist() == pytest.approx([-0.05] * 3, rel=1e-14)


def test_swapping_the_pair_negates_the_margin() -> None:
    swapped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    a, b = losses.dpo(*FOUR, beta=0.3), losses.dpo(*swapped, beta=0.3)
    torch.testing.assert_close(b.metrics["rewards/margins"], -a.metrics["rewards/margins"], **TIGHT)
    torch.testing.assert_close(b.loss - a.loss, a.metrics["rewards/margins"], **TIGHT)


def test_reference_free_is_a_uniform_reference() -> None:
    zero = torch.zeros_like(CHOSEN)
    a = losses.dpo_reference_free(CHOSEN, REJECTED, beta=0.3, label_smoothing=0.1)
    b = losses.dpo(CHOSEN, REJECTED, zero, zero, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(a.loss, b.loss, **TIGHT)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name], **TIGHT)


def test_dpo_far_margins_are_exact() -> None:
    far = torch.tensor([-1e4], dtype=torch.float32), torch.tensor([-1.0])
    found = losses.dpo_reference_free(*far, beta=1.0).loss
    assert found.tolist() == [9999.0]
    assert losses.dpo_reference_free(far[1], far[0], beta=1.0).loss.tolist() == [0.0]


def test_label_smoothing_of_one_half_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be < 0\.5"):
        losses.dpo(*FOUR, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta must be > 0"):
        losses.dpo(*FOUR, beta=0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_is_still_at_the_optimum_whoever_drew_the_pairs(seed: int) -> None:
    """Preferences from a Bradley-Terry model of r: the expected gradient vanishes at pi*, for any pair distribution."""
    s = early_eos(seed)
    for logits, zero in ((s.world.optimal_logits(s.ref, s.rewards, s.beta), True), (s.logits.detach(), False)):
        s.logits = logits.clone().requires_grad_()
        assert (pairwise_gradient(s, torch.sigmoid, losses.dpo).abs().max() < 1e-13) == zero


def pairwise_gradient(s: Setting, preference, loss) -> Tensor:
    """Expected gradient over pairs drawn from the behaviour policy and labelled by ``preference(r_i - r_j)``."""
    i, j = s.world.tuples(2).unbind(-1)
    weights = s.behaviour[i] * s.behaviour[j] * preference(s.rewards[i] - s.rewards[j])
    logps, ref = s.world.answer_logps(s.logits), s.world.answer_logps(s.ref)
    return s.gradient((weights * loss(logps[i], logps[j], ref[i], ref[j], beta=s.beta).loss).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_ipo_optimum_is_that_of_the_win_rate(seed: int) -> None:
    """IPO(tau) on pairs from mu, labelled by any preference, is minimised by pi* of reward p(y beats mu), beta = tau."""
    s = early_eos(seed)

    def preference(difference: Tensor) -> Tensor:
        return torch.sigmoid(3 * difference)

    wins = preference(s.rewards[:, None] - s.rewards[None, :]) @ s.behaviour
    for reward, zero in ((wins, True), (s.rewards, False)):
        s.logits = s.world.optimal_logits(s.ref, reward, s.beta).requires_grad_()
        assert (pairwise_gradient(s, preference, losses.ipo).abs().max() < 1e-13) == zero


def test_ipo_by_hand() -> None:
    assert losses.ipo(*FOUR, beta=0.25).loss.tolist() == [(h - 2) ** 2 for h in H.tolist()]
    assert margin_gradient(losses.ipo, *FOUR, beta=0.25).tolist() == [2 * (h - 2) for h in H.tolist()]


def test_ipo_mean_divides_each_side_by_its_length() -> None:
    n_chosen, n_rejected = torch.tensor([2, 4, 8]), torch.tensor([4, 2, 1])
    found = losses.ipo_mean(*FOUR, n_chosen, n_rejected, beta=0.25)
    h = (CHOSEN - REF_CHOSEN) / n_chosen - (REJECTED - REF_REJECTED) / n_rejected
    torch.testing.assert_close(found.loss, (h - 2) ** 2, **TIGHT)
    ones = torch.ones(3, dtype=torch.long)
    assert torch.equal(losses.ipo_mean(*FOUR, ones, ones, beta=0.25).loss, losses.ipo(*FOUR, beta=0.25).loss)
    as_float = losses.ipo_mean(*FOUR, n_chosen.float(), n_rejected.double(), beta=0.25)
    assert torch.equal(as_float.loss, found.loss)
    with pytest.raises(ValueError, match=r"rejected_lengths must be at least 1 token everywhere, got 0"):
        losses.ipo_mean(*FOUR, n_chosen, n_rejected - 1, beta=0.25)


def test_slic_is_a_hinge() -> None:
    assert losses.slic(*FOUR, beta=0.5).loss.tolist() == [0.25, 2.5, 0.0]
    assert losses.slic(*FOUR, beta=0.5, delta=4.0).loss.tolist() == [3.25, 5.5, 0.5]
    assert margin_gradient(losses.slic, *FOUR, beta=0.5).tolist() == [-0.5, -0.5, 0.0]
    found = losses.slic_hf(CHOSEN, REJECTED, delta=2.0, nll_weight=0.1)
    assert found.loss.tolist() == pytest.approx([1 + 0.3, 3 + 0.5, 0 + 0.2], rel=1e-14)
    assert found.metrics["nll_loss"].tolist() == [3, 5, 2]


# -- unpaired ---------------------------------------------------------------------------------------------------------


def kto(rows: Tensor, ref: Tensor, labels: list[bool], z0: float, **hyper) -> losses.LossOutput:
    baseline = torch.full((len(labels),), z0, dtype=F64)
    return losses.kto(rows, ref, torch.tensor(labels), baseline, torch.ones_like(rows).bool(), **hyper)


def test_kto_by_hand() -> None:
    rows, ref = (
        torch.tensor([[-1.0, -2.0], [-1.0, -1.0]], dtype=F64),
        torch.tensor([[-2.0, -2.5], [-1.0, -0.5]], dtype=F64),
    )
    found = kto(rows, ref, [True, False], 0.5, beta=0.4, desirable_weight=2.0, undesirable_weight=3.0)
    expected = [2 * (1 - sigmoid(0.4 * (1.5 - 0.5))), 3 * (1 - sigmoid(0.4 * (0.5 + 0.5)))]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-14)
    assert found.metrics["rewards/chosen"][0].item() == pytest.approx(0.6, rel=1e-14)
    assert found.metrics["rewards/rejected"][1].item() == pytest.approx(-0.2, rel=1e-14)
    assert found.metrics["rewards/chosen"].isnan().tolist() == [False, True]
    assert found.metrics["rewards/rejected"].isnan().tolist() == [True, False]
    assert found.metrics["logps/chosen"][0] == -3
    assert found.metrics["kl"].tolist() == [0.5, 0.5]


def test_kto_slopes_raise_the_desirable_and_lower_the_other() -> None:
    rows = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]], dtype=F64).requires_grad_()
    kto(rows, rows.detach(), [True, False], 0.0, beta=0.4).loss.sum().backward()
    assert rows.grad.tolist() == [[-0.1, -0.1], [0.1, 0.1]]  # beta / 4 at S = z0


def test_kto_a_single_row_and_one_kind_of_label_are_finite() -> None:
    rows = torch.tensor([[-1.0, -2.0]], dtype=F64).requires_grad_()
    output = kto(rows, rows.detach(), [True], 0.0, beta=0.1)
    assert output.mean().item() == pytest.approx(0.5, rel=1e-15)


def test_kto_refuses_a_negative_baseline() -> None:
    rows = -torch.ones(1, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"kl_baseline must be >= 0, got -0\.1; clamp"):
        kto(rows, rows, [True], -0.1, beta=0.1)


# -- reward models ----------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    found = losses.bradley_terry(chosen, rejected)
    assert found.loss.tolist() == pytest.approx([-math.log(sigmoid(1)), -math.log(sigmoid(-0.5))], rel=1e-14)
    assert found.metrics["accuracy"].tolist() == [1, 0]
    assert found.metrics["margin"].tolist() == [1, -0.5]
    assert found.metrics["mean_reward"].tolist() == [1.5, 0.25]
    assert found.metrics["min_reward"].tolist() == [1, 0]
    assert found.metrics["max_reward"].tolist() == [2, 0.5]
    found = losses.bradley_terry(chosen, rejected, margin=0.25, centering=0.1)
    expected = [-math.log(sigmoid(0.75)) + 0.9, -math.log(sigmoid(-0.75)) + 0.025]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-14)
    per_pair = losses.bradley_terry_margin(chosen, rejected, torch.full((2,), 0.25, dtype=F64), centering=0.1)
    assert torch.equal(per_pair.loss, found.loss)


def test_bradley_terry_is_reference_free_dpo_on_rewards() -> None:
    torch.testing.assert_close(
        losses.bradley_terry(0.3 * CHOSEN, 0.3 * REJECTED).loss,
        losses.dpo_reference_free(CHOSEN, REJECTED, beta=0.3).loss,
        **TIGHT,
    )
