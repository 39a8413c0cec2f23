"""Preference losses against TRL's DPO, CPO and ORPO trainers: values and gradients to the token log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from rlft import losses
from rlft.types import LossOutput
from tests.peers import standin
from tests.peers.compare import Pairs, assert_agree

pytestmark = pytest.mark.peers

Ours = Callable[[Pairs], LossOutput]


def _plain(name: str, **hyper: Any) -> Ours:
    """A loss of four sums."""
    return lambda p: getattr(losses, name)(*p.sums, **hyper)


def _with_lengths(name: str, **hyper: Any) -> Ours:
    """A loss of four sums and two lengths."""
    return lambda p: getattr(losses, name)(*p.sums, *p.lengths, **hyper)


# TRL's name of a DPO loss -> ours, and what TRL is given.
DPO: list[tuple[str, Ours, dict[str, Any]]] = [
    ("sigmoid", _plain("dpo", beta=0.3), {"beta": 0.3}),
    ("hinge", _plain("slic", beta=0.3), {"beta": 0.3}),
    ("ipo", _with_lengths("ipo_mean", beta=0.3), {"beta": 0.3}),
    ("exo_pair", _plain("exo_pair", beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    ("nca_pair", _plain("nca_pair", beta=0.3), {"beta": 0.3}),
    ("robust", _plain("robust_dpo", beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    ("bco_pair", _plain("bco_pair", beta=0.3), {"beta": 0.3}),
    ("sppo_hard", _plain("sppo_hard", beta=0.3), {"beta": 0.3}),
    ("aot", _plain("aot", beta=0.3), {"beta": 0.3}),
    ("aot", _plain("aot", beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    ("aot_unpaired", _plain("aot_unpaired", beta=0.3), {"beta": 0.3}),
    ("aot_unpaired", _plain("aot_unpaired", beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    ("apo_zero", _plain("apo_zero", beta=0.3), {"beta": 0.3}),
    ("apo_down", _plain("apo_down", beta=0.3), {"beta": 0.3}),
    ("discopop", _plain("discopop", beta=0.3), {"beta": 0.3}),
    ("discopop", _plain("discopop", beta=0.3, temperature=0.5), {"beta": 0.3, "discopop_tau": 0.5}),
    ("sigmoid_norm", lambda p: losses.dpo(*p.mean_sums, beta=0.3), {"beta": 0.3}),
    ("sigmoid", _plain("f_dpo", beta=0.3, divergence="forward_kl"), {"beta": 0.3, "f_divergence": "forward_kl"}),
    ("sigmoid", _plain("f_dpo", beta=0.3, divergence="js"), {"beta": 0.3, "f_divergence": "js_divergence"}),
    ("sigmoid", _plain("f_dpo", beta=0.3, divergence="reverse_kl"), {"beta": 0.3, "f_divergence": "reverse_kl"}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "ours", "theirs"), DPO, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(DPO)])
def test_dpo_losses(name: str, ours: Ours, theirs: dict[str, Any], seed: int) -> None:
    pairs = Pairs.make(seed)
    output = ours(pairs)
    assert_agree(
        output.mean(), standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type=name, **theirs), pairs.logps
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_reference_free_dpo_is_cpo_sigmoid(label_smoothing: float) -> None:
    pairs = Pairs.make()
    chosen, rejected = pairs.sums[:2]
    hyper = {"beta": 0.3, "label_smoothing": label_smoothing}
    theirs = standin.cpo(chosen, rejected, loss_type="sigmoid", **hyper).mean()
    assert_agree(losses.dpo_reference_free(chosen, rejected, **hyper).mean(), theirs, pairs.logps)


@pytest.mark.parametrize("ours_alpha", [0.25, 1.0])
def test_alpha_divergence(ours_alpha: float) -> None:
    """TRL's coefficient is 1 - alpha; it computes this divergence in float32."""
    pairs = Pairs.make()
    theirs = standin.dpo(
        pairs.logps.float(),
        pairs.ref_logps.float(),
        pairs.mask,
        loss_type="sigmoid",
        beta=0.3,
        f_divergence="alpha_divergence",
        f_alpha=1 - ours_alpha,
    )
    ours = losses.f_dpo(*pairs.sums, beta=0.3, divergence="alpha", alpha=ours_alpha).mean()
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-6, atol=0)
    mine, peers = (torch.autograd.grad(loss, pairs.logps, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, peers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitised_dpo(ld_alpha: float) -> None:
    pairs = Pairs.make()
    count = len(pairs.mask) // 2
    order = torch.arange(2 * count).view(2, count).t().flatten()  # chosen, rejected, chosen, rejected, ...
    group_ids = torch.arange(count).repeat_interleave(2)
    rows = (pairs.logps[order], pairs.ref_logps[order], group_ids, pairs.mask[order])
    ours = losses.ld_dpo(*rows, beta=0.3, ld_alpha=ld_alpha).mean()
    theirs = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type="sigmoid", beta=0.3, ld_alpha=ld_alpha)
    assert_agree(ours, theirs, pairs.logps)


def test_wpo_without_alignment() -> None:
    """TRL subtracts the log of the sum of squared probabilities from each token; given zeros there, it is ours."""
    pairs = Pairs.make()
    ours = losses.wpo(*pairs.sums, *pairs.lengths, beta=0.3).mean()
    zeros = torch.zeros_like(pairs.ref_logps)
    theirs = standin.dpo(
        pairs.logps, pairs.ref_logps, pairs.mask, loss_type="sigmoid", beta=0.3, log_sum_sq_probs=zeros
    )
    assert_agree(ours, theirs, pairs.logps)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo(label_smoothing: float) -> None:
    pairs = Pairs.make()
    ours = losses.simpo(*pairs.sums[:2], *pairs.lengths, beta=2.0, gamma=0.7, label_smoothing=label_smoothing).mean()
    theirs = standin.cpo(*pairs.means, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=label_smoothing)
    assert_agree(ours, theirs.mean(), pairs.logps)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_preference_term(label_smoothing: float) -> None:
    pairs = Pairs.make()
    hyper = {"beta": 0.3, "label_smoothing": label_smoothing}
    ours = losses.cpo(*pairs.sums[:2], *pairs.lengths, nll_weight=0.0, **hyper).mean()
    assert_agree(ours, standin.cpo(*pairs.sums[:2], loss_type="sigmoid", **hyper).mean(), pairs.logps)


def test_orpo_odds_ratio_term() -> None:
    pairs = Pairs.make()
    likelihood = -pairs.means[0].mean()
    ours = losses.orpo(*pairs.sums[:2], *pairs.lengths, beta=0.3, eps=0.0).mean() - likelihood
    assert_agree(ours, -standin.orpo(*pairs.means, beta=0.3).mean(), pairs.logps)


@pytest.mark.parametrize(("name", "hyper"), [("cpo", {}), ("orpo", {"eps": 0.0})])
def test_whole_cpo_and_orpo_step_on_answers_of_one_length(name: str, hyper: dict[str, float]) -> None:
    """With answers of one length the mean over tokens is the mean over answers: the whole losses agree."""
    pairs = Pairs.make()
    mask = torch.ones_like(pairs.mask)
    even = Pairs(pairs.logps, pairs.ref_logps, mask)
    ours = getattr(losses, name)(*even.sums[:2], *even.lengths, beta=0.3, **hyper).mean()
    assert_agree(ours, standin.whole_step(name, pairs.logps, mask, beta=0.3), pairs.logps)


def test_weighted_sum_of_losses() -> None:
    """TRL's MPO: loss_type a list with loss_weights is a weighted sum of objectives."""
    pairs = Pairs.make()
    ours = 0.8 * losses.dpo(*pairs.sums, beta=0.3).mean() + 0.2 * losses.slic(*pairs.sums, beta=0.3).mean()
    theirs = standin.dpo(
        pairs.logps, pairs.ref_logps, pairs.mask, loss_type=["sigmoid", "hinge"], weights=[0.8, 0.2], beta=0.3
    )
    assert_agree(ours, theirs, pairs.logps)


def test_sft_term_is_the_mean_over_the_chosen_tokens() -> None:
    pairs = Pairs.make()
    chosen, _ = pairs.logps.chunk(2)
    chosen_mask, _ = pairs.mask.chunk(2)
    theirs = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type="sft", beta=0.3)
    assert_agree(losses.sft(chosen, chosen_mask).mean(), theirs, pairs.logps)


def test_implicit_rewards_and_margins_have_the_same_names_and_numbers() -> None:
    pairs = Pairs.make()
    me: dict[str, Any] = {}
    standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type="sigmoid", beta=0.3, metrics=me)
    ours = losses.dpo(*pairs.sums, beta=0.3).metrics
    assert set(ours) <= set(me)
    for name, values in ours.items():
        torch.testing.assert_close(values.mean().item(), me[name][0], rtol=1e-6, atol=1e-9)
