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
