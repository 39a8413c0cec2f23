"""Direct preference optimisation: the logistic loss on log-ratio margins."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["dpo", "dpo_reference_free", "robust_dpo"]


@_base.loss_function(reduction="mean")
def dpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """``-(1-e) logsigmoid(beta h) - e logsigmoid(-beta h)``, h = chosen log-ratio minus rejected log-ratio.

    With ``e = label_smoothing`` above zero this is conservative DPO (cDPO).

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0; 0.1 is customary.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    _base.smoothing(label_smoothing)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = _base.smoothed_logistic(chosen - rejected, label_smoothing)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def robust_dpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float,
) -> LossOutput:
    """``(-(1-e) logsigmoid(beta h) + e logsigmoid(-beta h)) / (1-2e)``: DPO, unbiased when a share e of labels is flipped.

    Averaged over flips of probability e it is DPO's loss on the clean labels, exactly. Single pairs can be negative.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: the share of flipped labels e, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Chowdhury et al. 2024, arXiv 2403.00409, equation 12.
    """
    _base.smoothing(label_smoothing)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return LossOutput(loss=loss / (1 - 2 * label_smoothing), metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def dpo_reference_free(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """:func:`dpo` with a uniform reference: ``-logsigmoid(beta (l_w - l_l))``.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        beta: scale of the margin, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; beta times the log-probs as implicit rewards.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Rafailov et al. 2023, arXiv 2305.18290.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _base.smoothing(label_smoothing)
    chosen, rejected = _base.pair_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return LossOutput(
        loss=_base.smoothed_logistic(beta * (chosen - rejected), label_smoothing),
        metrics=_base.pair_metrics(beta, chosen, rejected),
        reduction="mean",
    )
