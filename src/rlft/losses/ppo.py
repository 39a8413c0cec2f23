"""PPO: the clipped surrogate and the value loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["ppo_clip", "value_loss"]


@_base.loss_function(reduction="token_mean", advantage_weighted=True)
def ppo_clip(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """``-min(rho A, clip(rho, 1 - clip_eps, 1 + clip_eps_high) A)``, rho = exp(logp - old_logp) per token.

    It is a minimum exactly: for A < 0 and rho > 1 + eps the gradient stays. With ``dual_clip = c``, tokens with A < 0
    take ``max(min(...), c A)``, which bounds the loss where rho is huge.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps: lower clip range, in (0, 1].
        clip_eps_high: upper clip range, > 0; None takes ``clip_eps``. DAPO uses 0.28.
        dual_clip: c > 1, or None for no dual clip.

    Returns:
        loss ``[B, T]``, averaged over tokens; per-token 0/1 metrics clip_ratio/low, high and region, and
        policy/approxkl.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equation 7; Ye et al. 2020, arXiv 1912.09729 (dual clip).
    """
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    loss, metrics = clipped(logps, old_logps, advantages, clip_eps, clip_eps_high, dual_clip)
    return LossOutput(loss=loss, metrics=metrics, reduction="token_mean", mask=mask)


@_base.loss_function(reduction="token_mean")
def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps: float | None = None,
) -> LossOutput:
    """``(V - R)^2 / 2``; with ``clip_eps``, the larger of it and ``(clip(V, V_old - eps, V_old + eps) - R)^2 / 2``.

    Args:
        values: ``[B, T]`` the critic's values, differentiable.
        old_values: ``[B, T]`` its values when the batch was sampled.
        returns: ``[B, T]`` regression targets, from :func:`rlft.advantages.gae`.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps: how far a value may move from ``old_values``, in units of reward, > 0; None = no clipping.

    Returns:
        loss ``[B, T]``, averaged over tokens; metrics val/clipfrac (0/1) and val/error.

    Raises:
        ValueError: for wrong shapes or dtypes, unmasked entries that are not finite, or ``clip_eps`` out of range.

    References:
        Schulman et al. 2017, arXiv 1707.06347; the clipping is that of the released code.
    """
    values, old_values, returns = _base.token_values(
        mask, learned=1, values=values, old_values=old_values, returns=returns
    )
    squared = (values - returns).square()
    metrics = {"val/error": (values - returns).detach()}
    if clip_eps is not None:
        _check.number("clip_eps", clip_eps, low=0.0, open_low=True)
        near = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        clipped_squared = (near - returns).square()
        metrics["val/clipfrac"] = (clipped_squared > squared).to(values.dtype)
        squared = torch.maximum(squared, clipped_squared)
    return LossOutput(loss=0.5 * squared, metrics=metrics, reduction="token_mean", mask=mask)


def clipped(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    clip_eps: float,
    clip_eps_high: float | None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of checked, masked tensors, and its metrics. Zero where the advantage is."""
    low, high = clip_range(clip_eps, clip_eps_high)
    log_ratio = logps - old_logps
    ratio = safe_ratio(log_ratio)
    gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        _check.number("dual_clip", dual_clip, low=1.0, open_low=True)
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    metrics = {
        "clip_ratio/low": below.to(logps.dtype),
        "clip_ratio/high": above.to(logps.dtype),
        "clip_ratio/region": (below | above).to(logps.dtype),
        "policy/approxkl": 0.5 * log_ratio.detach().square(),
    }
    return -gain, metrics


def clip_range(clip_eps: float, clip_eps_high: float | None) -> tuple[float, float]:
    """The interval ``[1 - clip_eps, 1 + clip_eps_high]`` of checked hyper-parameters."""
    _check.number("clip_eps", clip_eps, low=0.0, high=1.0, open_low=True)
    if clip_eps_high is None:
        return 1 - clip_eps, 1 + clip_eps
    _check.number("clip_eps_high", clip_eps_high, low=0.0, open_low=True)
    return 1 - clip_eps, 1 + clip_eps_high


def safe_ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, refused where it would overflow."""
    _check.exponent(
        "logps - old_logps",
        log_ratio,
        remedy="the policy is too far from the one that sampled: take fewer updates per rollout, or check that "
        "old_logps belong to these tokens and this temperature",
    )
    return log_ratio.exp()
