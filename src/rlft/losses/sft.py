"""Supervised fine-tuning."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["sft"]


@_base.loss_function(reduction="token_mean")
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
