"""SLiC: the hinge loss on preference margins."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["slic", "slic_hf"]


@_base.loss_function(reduction="mean")
def slic(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    delta: float = 1.0,
) -> LossOutput:
    """``max(0, delta - beta h)``: SLiC's hinge on the log-ratio margin (TRL's "hinge" at delta 1).

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: scale of the margin, > 0.
        delta: the margin asked for, > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Liu et al. 2023 (RSO), arXiv 2309.06657, equation 10.
    """
    _check.number("delta", delta, low=0.0, open_low=True)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return LossOutput(loss=(delta - (chosen - rejected)).relu(), metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def slic_hf(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    *,
    delta: float = 1.0,
    nll_weight: float,
) -> LossOutput:
    """``max(0, delta - l_w + l_l) - nll_weight l_w``: SLiC-HF as published, no reference model.

    The likelihood term is taken on the chosen answer, summed over its tokens.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        delta: the margin asked for in nats, > 0.
        nll_weight: weight of the likelihood term (the paper's lambda), >= 0.

    Returns:
        loss ``[P]``, averaged over pairs; log-probs as implicit rewards, and ``nll_loss``.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Zhao et al. 2023, arXiv 2305.10425, equation 1.
    """
    _check.number("delta", delta, low=0.0, open_low=True)
    _check.number("nll_weight", nll_weight, low=0.0)
    chosen, rejected = _base.pair_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return LossOutput(
        loss=(delta - chosen + rejected).relu() - nll_weight * chosen,
        metrics={**_base.pair_metrics(1.0, chosen, rejected), "nll_loss": -chosen.detach()},
        reduction="mean",
    )
