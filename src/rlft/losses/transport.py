"""Alignment by optimal transport: preferences between distributions, by sorting over the batch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["aot", "aot_unpaired"]


@_base.loss_function(reduction="mean", couples_rows=True)
def aot(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """DPO on sorted margins: the k-th smallest policy margin against the k-th smallest reference margin.

    The loss couples all pairs of a call: whoever splits a batch changes it. An entry is that of the pair whose policy
    margin has the rank.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, section 4, paired.
    """
    _base.smoothing(label_smoothing)
    _, _, metrics = _base.implicit_rewards(beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    policy_margin = beta * (_check.upcast(chosen_logps) - _check.upcast(rejected_logps))
    ref_margin = beta * (_base.detached(ref_chosen_logps) - _base.detached(ref_rejected_logps))
    loss = _base.smoothed_logistic(policy_margin - _matched(ref_margin, policy_margin), label_smoothing)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean", couples_rows=True)
def aot_unpaired(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """DPO on sorted implicit rewards: the k-th smallest chosen one against the k-th smallest rejected one.

    The loss couples all answers of a call: whoever splits a batch changes it. Chosen and rejected answers need not
    belong together. An entry is that of the chosen answer with the rank.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, section 4, unpaired.
    """
    _base.smoothing(label_smoothing)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = _base.smoothed_logistic(chosen - _matched(rejected, chosen), label_smoothing)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


def _matched(values: Tensor, to: Tensor) -> Tensor:
    """``values`` reordered so that each stands where ``to`` has the entry of the same rank."""
    ranks = to.argsort(stable=True).argsort()
    return values[values.argsort(stable=True)][ranks]
