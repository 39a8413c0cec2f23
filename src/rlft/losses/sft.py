"""Supervised fine-tuning and distillation."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["distillation", "sft"]


@_base.loss_function(reduction="token_mean", imitates=True)
def sft(logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> LossOutput:
    """Negative log-likelihood of the unmasked tokens: ``-logp``.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        mask: ``[B, T]`` True = a token to learn.

    Returns:
        loss ``[B, T]``, averaged over tokens; metric ``nll_loss``.

    Raises:
        ValueError: for wrong shapes or dtypes, or log-probs that are not finite.
    """
    (logps,) = _base.token_logps(mask, logps=logps)
    return LossOutput(loss=-logps, metrics={"nll_loss": -logps.detach()}, reduction="token_mean", mask=mask)


@_base.loss_function(reduction="token_mean", imitates=True)
def distillation(
    logps: Float[Tensor, "B T"],
    teacher_kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    soft_weight: float,
) -> LossOutput:
    """``soft_weight KL(teacher || pi) - (1 - soft_weight) logp``: knowledge or context distillation.

    The teacher is another model, or the same model with a longer prompt.

    Args:
        logps: ``[B, T]`` log-probs of the answer's tokens under the policy, nats.
        teacher_kl: ``[B, T]`` exact KL of the next token from teacher to policy at each position, differentiable.
        mask: ``[B, T]`` True = a token to learn.
        soft_weight: share of the soft term, in [0, 1].

    Returns:
        loss ``[B, T]``, averaged over tokens; metrics nll_loss and teacher_kl.

    Raises:
        ValueError: for wrong shapes or dtypes, entries that are not finite, or ``soft_weight`` out of range.

    References:
        Hinton et al. 2015, arXiv 1503.02531; Askell et al. 2021, arXiv 2112.00861 (context distillation).
    """
    _check.number("soft_weight", soft_weight, low=0.0, high=1.0)
    (logps,) = _base.token_logps(mask, logps=logps)
    (teacher_kl,) = _base.token_values(mask, learned=1, like=logps, teacher_kl=teacher_kl)
    metrics = {"nll_loss": -logps.detach(), "teacher_kl": teacher_kl.detach()}
    loss = soft_weight * teacher_kl - (1 - soft_weight) * logps
    return LossOutput(loss=loss, metrics=metrics, reduction="token_mean", mask=mask)
