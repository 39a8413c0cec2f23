"""Losses of reward models."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["bradley_terry", "bradley_terry_margin"]


@_base.loss_function(reduction="mean")
def bradley_terry(
    chosen_rewards: Float[Tensor, " P"],
    rejected_rewards: Float[Tensor, " P"],
    *,
    margin: float = 0.0,
    centering: float = 0.0,
) -> LossOutput:
    """``-logsigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2``.

    Args:
        chosen_rewards: ``[P]`` the model's reward of the chosen answer, differentiable.
        rejected_rewards: ``[P]`` its reward of the rejected answer, differentiable.
        margin: how much better a chosen answer must be, the same for every pair, >= 0.
        centering: pull of the rewards' sum to zero, >= 0; 0.01 in the paper.

    Returns:
        loss ``[P]``, averaged over pairs; metrics accuracy, margin, mean_reward, min_reward and max_reward.

    Raises:
        ValueError: for wrong shapes or dtypes, rewards that are not finite, or hyper-parameters out of range.

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 1; Eisenstein et al. 2023, arXiv 2312.09244 (centering).
    """
    _check.number("margin", margin, low=0.0)
    chosen, rejected = _rewards(chosen_rewards, rejected_rewards)
    return _bradley_terry(chosen, rejected, margin, centering)


@_base.loss_function(reduction="mean")
def bradley_terry_margin(
    chosen_rewards: Float[Tensor, " P"],
    rejected_rewards: Float[Tensor, " P"],
    margins: Float[Tensor, " P"],
    *,
    centering: float = 0.0,
) -> LossOutput:
    """:func:`bradley_terry` with a margin per pair, from the raters' degree of preference.

    Args:
        chosen_rewards: ``[P]`` the model's reward of the chosen answer, differentiable.
        rejected_rewards: ``[P]`` its reward of the rejected answer, differentiable.
        margins: ``[P]`` how much better each chosen answer must be.
        centering: pull of the rewards' sum to zero, >= 0.

    Returns:
        loss ``[P]``, averaged over pairs; metrics accuracy, margin, mean_reward, min_reward and max_reward.

    Raises:
        ValueError: for wrong shapes or dtypes, entries that are not finite, or ``centering`` out of range.

    References:
        Touvron et al. 2023 (Llama 2), arXiv 2307.09288, equation 2.
    """
    chosen, rejected = _rewards(chosen_rewards, rejected_rewards)
    _check.vector(chosen_rewards=chosen_rewards, margins=margins)
    _check.finite(margins=margins)
    (margins,) = _check.detach(margins)
    return _bradley_terry(chosen, rejected, margins, centering)


def _rewards(chosen_rewards: Tensor, rejected_rewards: Tensor) -> tuple[Tensor, Tensor]:
    _check.vector(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    _check.finite(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return _check.upcast(chosen_rewards), _check.upcast(rejected_rewards)


def _bradley_terry(chosen: Tensor, rejected: Tensor, margin: float | Tensor, centering: float) -> LossOutput:
    _check.number("centering", centering, low=0.0)
    loss = -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()
    high, low = chosen.detach(), rejected.detach()
    metrics = {
        "accuracy": (high > low).to(loss.dtype),
        "margin": high - low,
        "mean_reward": (high + low) / 2,
        "min_reward": high.minimum(low),
        "max_reward": high.maximum(low),
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")
