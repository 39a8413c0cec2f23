"""TRPO's surrogate; its constraint is a step rule, see :mod:`rlft.trust_region`."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rlft.losses import _base
from rlft.losses.ppo import safe_ratio
from rlft.types import LossOutput

__all__ = ["trpo"]


# A row whose advantage is 0 still counts in the KL, so this loss is not marked as weighted by advantages.
@_base.loss_function(reduction="token_mean", on_policy_only=True)
def trpo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
) -> LossOutput:
    """``-rho A``, rho = exp(logp - old_logp) per token: the surrogate that TRPO minimises under a limit on the KL.

    By itself nothing holds the ratio; the objective ``trpo`` steps within ``mean KL(old || new) <= max_kl``.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        loss ``[B, T]``, averaged over tokens.

    Raises:
        ValueError: for wrong shapes or dtypes, or a ratio that overflows.

    References:
        Schulman et al. 2015, arXiv 1502.05477, equation 14.
    """
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    return LossOutput(loss=-safe_ratio(logps - old_logps) * advantages, metrics={}, reduction="token_mean", mask=mask)
