"""Metrics worked by hand: what a run's curves show is part of what a loss promises."""

from __future__ import annotations

import pytest
import torch

from rlft import losses
from tests.losses.cases import CASES, Case

F64 = torch.float64
#: Metrics of a row or a token that are zero where it is masked; the others are NaN where they do not apply.
ZERO_WHERE_MASKED = {
    "kl",
    "objective/kl",
    "objective/rlhf_reward",
    "agro/variance",
    "agro/flip_fraction",
    "clip_ratio/low",
    "clip_ratio/high",
    "clip_ratio/region",
    "policy/approxkl",
    "val/error",
    "win_rate",
}


@pytest.mark.parametrize("case", [case for case in CASES if not case.per_pair], ids=lambda case: case.id)
def test_masked_entries_of_metrics_are_zero_or_do_not_apply(case: Case) -> None:
    tensors = case.inputs()
    for name, metric in case(tensors).metrics.items():
        masked = metric[~tensors["mask"] if metric.ndim == 2 else ~tensors["mask"].any(-1)]
        assert masked.nan_to_num(0).eq(0).all(), name
        if name in ZERO_WHERE_MASKED and case.name != "kto":
            assert masked.eq(0).all(), name


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.startswith("agro_off_policy")])
def test_flip_fraction_is_the_share_of_advantages_above_two_beta(name: str) -> None:
    """At the reference with rewards 1 and 0 the advantages are 1 and -1."""
    case = next(case for case in CASES if case.name == name)
    tensors = {n: t[:2].clone() for n, t in case.inputs().items()}
    tensors |= {"group_ids": torch.zeros(2).long(), "mask": torch.ones(2, 4).bool()}
    tensors |= {"rewards": torch.tensor([1.0, 0.0], dtype=F64), "ref_logps": tensors["logps"]}
    for beta, flips in ((0.4, 1), (0.5, 0), (0.6, 0)):
        metrics = case.fn(*tensors.values(), beta=beta).metrics
        assert metrics["agro/flip_fraction"].tolist() == [flips, 0]
        assert metrics["agro/variance"].tolist() == pytest.approx([0.5, 0.5], rel=1e-14)  # its mean is that of 1 and 0
        assert metrics["objective/rlhf_reward"].tolist() == [1, 0]
        assert metrics["kl"].eq(0).all()


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.startswith("agro_")])
def test_agro_metrics_by_hand(name: str) -> None:
    """Log-ratios 0.5, -0.1 | 0.2: sums 0.4 and 0.2; R = 2 - 0.3 * 0.4 and 1 - 0.3 * 0.2."""
    case = next(case for case in CASES if case.name == name)
    tensors = {n: t[:2, :2].clone() if t.ndim == 2 else t[:2].clone() for n, t in case.inputs().items()}
    tensors["logps"] = torch.tensor([[-1.0, -1.0], [-1.0, -7.0]], dtype=F64)
    tensors["ref_logps"] = torch.tensor([[-1.5, -0.9], [-1.2, -3.0]], dtype=F64)
    tensors["mask"] = torch.tensor([[1, 1], [1, 0]]).bool()
    tensors["rewards"] = torch.tensor([2.0, 1.0], dtype=F64)
    tensors["group_ids"] = torch.zeros(2).long()
    metrics = case.fn(*tensors.values(), beta=0.3).metrics
    assert set(metrics) == {"kl", "objective/kl", "objective/rlhf_reward", "agro/variance", "agro/flip_fraction"}
    regularised = (
        [2 - 0.3 * 0.4, 1 - 0.3 * 0.2] if name != "agro_off_policy_per_token" else [2 - 0.3 * 0.2, 1 - 0.3 * 0.2]
    )
    assert metrics["objective/rlhf_reward"].tolist() == pytest.approx(regularised, rel=1e-13)
    half = (regularised[0] - regularised[1]) ** 2 / 2
    assert metrics["agro/variance"].tolist() == pytest.approx([half, half], rel=1e-12)
    kl = torch.tensor([[0.5, -0.1], [0.2, 0.0]], dtype=F64)
    if "token_kl" in tensors:  # the exact one takes the place of the sampled one
        kl = tensors["token_kl"].where(tensors["mask"], 0.0)
    torch.testing.assert_close(metrics["kl"], kl, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(metrics["objective/kl"], kl.sum(-1), rtol=1e-13, atol=1e-15)
