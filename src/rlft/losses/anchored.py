"""Preference losses that also pin the absolute level of the implicit rewards."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["anchored_dpo", "apo_down", "apo_zero", "bco_pair", "exo_pair", "nca_pair", "sppo_hard"]


@_base.loss_function(reduction="mean")
def apo_zero(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``1 - sigmoid(r_w) + sigmoid(r_l)``, r the implicit reward: chosen up, rejected down. For chosen better than the model.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or ``beta`` out of range.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266.
    """
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return LossOutput(loss=(-chosen).sigmoid() + rejected.sigmoid(), metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def apo_down(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``sigmoid(r_w) + 1 - sigmoid(r_w - r_l)``: both down, rejected more. For a model better than the chosen answers.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or ``beta`` out of range.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266.
    """
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return LossOutput(loss=chosen.sigmoid() + (rejected - chosen).sigmoid(), metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def anchored_dpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    delta: float = 0.0,
) -> LossOutput:
    """``-logsigmoid(r_w - r_l) - logsigmoid(r_w - delta)``: DPO with the chosen reward anchored above delta.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        delta: the anchor, in units of implicit reward; the paper uses 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Wang et al. 2024 (mDPO), arXiv 2406.11839, equation 7, its text terms.
    """
    _check.number("delta", delta)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = -logsigmoid(chosen - rejected) - logsigmoid(chosen - delta)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def exo_pair(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> LossOutput:
    """``KL(Bernoulli(sigmoid(beta h)) || Bernoulli(1 - e))``: DPO's Kullback-Leibler the other way round.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: e, the target probability of the rejected answer, in (0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Ji et al. 2024, arXiv 2402.00856, equation 16.
    """
    _base.smoothing(label_smoothing)
    _check.number("label_smoothing", label_smoothing, low=0.0, open_low=True)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = chosen - rejected
    win = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-label_smoothing))
    lose = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(label_smoothing))
    return LossOutput(loss=win + lose, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def nca_pair(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``-logsigmoid(r_w) - logsigmoid(-r_w)/2 - logsigmoid(-r_l)/2``: noise-contrastive alignment of a pair.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or ``beta`` out of range.

    References:
        Chen et al. 2024, arXiv 2402.05369, equation 11.
    """
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def bco_pair(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    delta: float = 0.0,
) -> LossOutput:
    """``-logsigmoid(r_w - delta) - logsigmoid(delta - r_l)``: a binary classifier that tells chosen from rejected.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        delta: the classifier's threshold: the running mean of all implicit rewards, which the caller keeps.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Jung et al. 2024, arXiv 2404.04656, equation 8.
    """
    _check.number("delta", delta)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def sppo_hard(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
) -> LossOutput:
    """``(x_w - 1/(2 beta))^2 + (x_l + 1/(2 beta))^2``, x the log-ratios: each pushed half the way, win rates taken as 1 and 0.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or ``beta`` out of range.

    References:
        Wu et al. 2024, arXiv 2405.00675, equation 4.8 with hard win rates.
    """
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = ((chosen - 0.5) / beta).square() + ((rejected + 0.5) / beta).square()
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")
