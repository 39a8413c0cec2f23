"""KTO and reward-model losses against TRL's trainers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from rlft import losses
from tests.peers import standin
from tests.peers.compare import Rollouts, assert_agree

pytestmark = pytest.mark.peers

LABELS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1]).bool()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("shift", [0.7, -0.7], ids=["baseline above zero", "baseline clamped to zero"])
@pytest.mark.parametrize(
    "labels", [LABELS, torch.ones(12).bool(), torch.zeros(12).bool()], ids=["mixed", "all", "none"]
)
def test_kto(labels: torch.Tensor, shift: float, weights: tuple[float, float]) -> None:
    r = Rollouts.make(1)
    mismatched, ref_mismatched = r.old_logps.sum(-1) + shift, r.old_logps.sum(-1)
    baseline = torch.full_like(mismatched, max(0.0, shift))
    hyper = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    ours = losses.kto(r.logps, r.ref_logps, labels, baseline, r.mask, **hyper).mean()
    theirs = standin.kto(r.logps, r.ref_logps, labels, mismatched, ref_mismatched, r.mask, **hyper)
    assert_agree(ours, theirs, r.logps)


def test_apo_zero_unpaired_is_kto_with_a_baseline_of_zero() -> None:
    r = Rollouts.make(1)
    zeros = torch.zeros(len(LABELS), dtype=torch.float64)
    ours = losses.kto(r.logps, r.ref_logps, LABELS, zeros, r.mask, beta=0.3).mean()
    theirs = standin.kto(r.logps, r.ref_logps, LABELS, zeros, zeros, r.mask, beta=0.3, loss_type="apo_zero_unpaired")
    assert_agree(ours, theirs, r.logps)


@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry(centering: float | None, with_margin: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    chosen.requires_grad_(), rejected.requires_grad_()
    theirs = standin.reward_model(chosen, rejected, margins=margins if with_margin else None, centering=centering)
    if with_margin:
        ours = losses.bradley_terry_margin(chosen, rejected, margins, centering=centering or 0.0)
    else:
        ours = losses.bradley_terry(chosen, rejected, centering=centering or 0.0)
    assert_agree(ours.mean(), theirs, chosen, rejected)
