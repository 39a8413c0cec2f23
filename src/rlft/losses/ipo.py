"""Identity preference optimisation: regress the log-ratio margin onto a target, in sums or in length means."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["ipo", "ipo_mean"]


@_base.loss_function(reduction="mean")
def ipo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``(h - 1/(2 beta))^2`` with h in sums over tokens: the paper's loss, ``beta`` its tau.

    The target is 1/(2 beta) nats over the whole answer: 50 nats at beta = 0.01. With two samples and rewards +-1/4,
    AGRO is beta^2/4 times this loss.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference (tau), > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or ``beta`` out of range.

    References:
        Azar et al. 2023, arXiv 2310.12036, equation 17.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    chosen, rejected, ref_chosen, ref_rejected = _base.pair_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return LossOutput(
        loss=(margin - 1 / (2 * beta)).square(),
        metrics=_base.pair_metrics(beta, chosen, rejected, ref_chosen, ref_rejected),
        reduction="mean",
    )


@_base.loss_function(reduction="mean")
def ipo_mean(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    rejected_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """:func:`ipo` with each log-ratio divided by its answer's length: what TRL's ``loss_type="ipo"`` computes.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens (the division happens here).
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        rejected_lengths: ``[P]`` tokens of the rejected answer, at least 1.
        beta: strength of the pull to the reference (tau), > 0; the target is 1/(2 beta) nats per token.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards per token as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, or ``beta`` out of range.

    References:
        Azar et al. 2023, arXiv 2310.12036, with TRL's length normalisation.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    chosen, rejected, ref_chosen, ref_rejected = _base.pair_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    n_chosen, n_rejected = _base.lengths(chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    chosen, ref_chosen = chosen / n_chosen, ref_chosen / n_chosen
    rejected, ref_rejected = rejected / n_rejected, ref_rejected / n_rejected
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return LossOutput(
        loss=(margin - 1 / (2 * beta)).square(),
        metrics=_base.pair_metrics(beta, chosen, rejected, ref_chosen, ref_rejected),
        reduction="mean",
    )
