"""Surrogates that treat the ratio to the sampling policy otherwise than PPO's clipping does."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check, reduce
from rlft.losses import _base
from rlft.losses.ppo import clip_range, clipped, safe_ratio
from rlft.types import LossOutput

__all__ = ["cispo", "gspo", "gspo_token", "ppo_penalty", "sapo"]


@_base.loss_function(reduction="token_mean", advantage_weighted=True)
def ppo_penalty(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """``-rho A + beta KL(old || pi)``: PPO with a penalty on the step instead of a clip.

    The KL is estimated by ``rho - 1 - log rho`` on the tokens the old policy drew: unbiased, in value and gradient. Adapt
    beta with :class:`rlft.kl.HalveDoubleKL` on the mean of policy/approxkl.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.
        beta: weight of the penalty, >= 0.

    Returns:
        loss ``[B, T]``, averaged over tokens; metric policy/approxkl is the KL estimate.

    Raises:
        ValueError: for wrong shapes or dtypes, ``beta`` out of range, or a ratio that overflows.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equation 8.
    """
    _check.number("beta", beta, low=0.0)
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    log_ratio = logps - old_logps
    ratio = safe_ratio(log_ratio)
    step_kl = log_ratio.expm1() - log_ratio
    metrics = {"policy/approxkl": step_kl.detach()}
    return LossOutput(loss=beta * step_kl - ratio * advantages, metrics=metrics, reduction="token_mean", mask=mask)


@_base.loss_function(reduction="sequence_mean", advantage_weighted=True)
def gspo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> LossOutput:
    """``-min(s A, clip(s) A)`` with one ratio per sequence, ``s = exp(mean over tokens of log rho)``.

    Every token of a row carries the row's loss, so that the mean over tokens is it.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps: lower clip range of s, in (0, 1]; 3e-4 in the paper.
        clip_eps_high: upper clip range, > 0; None takes ``clip_eps``; 4e-4 in the paper.

    Returns:
        loss ``[B, T]``, averaged over tokens, then over sequences; clip metrics as :func:`rlft.losses.ppo_clip`.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7.
    """
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    _check.rows(logps, advantages=advantages)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    sequence = _sequence_logps(logps - old_logps, mask)
    loss, metrics = clipped(sequence, torch.zeros_like(sequence), advantages, clip_eps, clip_eps_high)
    return LossOutput(loss=loss, metrics=metrics, reduction="sequence_mean", mask=mask)


@_base.loss_function(reduction="sequence_mean", advantage_weighted=True)
def gspo_token(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> LossOutput:
    """:func:`gspo` with an advantage per token: ratio ``sg[s] pi / sg[pi]``. The same gradient when A is constant in a row.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps: lower clip range of s, in (0, 1].
        clip_eps_high: upper clip range, > 0; None takes ``clip_eps``.

    Returns:
        loss ``[B, T]``, averaged over tokens, then over sequences; clip metrics as :func:`rlft.losses.ppo_clip`.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        Zheng et al. 2025, arXiv 2507.18071, equations 13 to 15.
    """
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    sequence = _sequence_logps((logps - old_logps).detach(), mask)
    carrier = sequence + (logps - logps.detach())
    loss, metrics = clipped(carrier, torch.zeros_like(carrier), advantages, clip_eps, clip_eps_high)
    return LossOutput(loss=loss, metrics=metrics, reduction="sequence_mean", mask=mask)


def _sequence_logps(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean log-ratio of each row, at every unmasked token of it."""
    mean = reduce.sequence_sum(log_ratio, mask) / mask.sum(-1).clamp(min=1)
    return mean.unsqueeze(-1).where(mask, 0.0)


@_base.loss_function(reduction="token_mean", advantage_weighted=True)
def cispo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps_high: float,
    clip_eps: float = 1.0,
) -> LossOutput:
    """``-sg[clip(rho, 1 - clip_eps, 1 + clip_eps_high)] A logp``: the weight is clipped, no token loses its gradient.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps_high: the weight is at most 1 + clip_eps_high, > 0. (TRL's bound is the weight itself: 5.0 there is 4.0
            here.)
        clip_eps: the weight is at least 1 - clip_eps, in (0, 1]; 1 is no lower bound, as in the paper.

    Returns:
        loss ``[B, T]``, averaged over tokens; clip metrics, whatever the sign of A, and policy/approxkl.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        MiniMax 2025, arXiv 2506.13585, equation 4.
    """
    low, high = clip_range(clip_eps, clip_eps_high)
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    log_ratio = (logps - old_logps).detach()
    ratio = safe_ratio(log_ratio)
    below, above = (ratio < low) & mask, (ratio > high) & mask
    metrics = {
        "clip_ratio/low": below.to(logps.dtype),
        "clip_ratio/high": above.to(logps.dtype),
        "clip_ratio/region": (below | above).to(logps.dtype),
        "policy/approxkl": 0.5 * log_ratio.square(),
    }
    loss = -ratio.clamp(low, high) * advantages * logps
    return LossOutput(loss=loss, metrics=metrics, reduction="token_mean", mask=mask)


@_base.loss_function(reduction="sequence_mean", advantage_weighted=True)
def sapo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> LossOutput:
    """``-(4 / tau) sigmoid(tau (rho - 1)) A``: a smooth gate in place of the clip, tau by the sign of A.

    On fresh samples the gradient is that of ``-A logp``; away from rho = 1 it fades.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        advantages: ``[B]`` per sequence or ``[B, T]`` per token.
        mask: ``[B, T]`` True = a token that counts.
        temperature_positive: tau where A > 0, > 0.
        temperature_negative: tau where A <= 0, > 0; larger fades faster.

    Returns:
        loss ``[B, T]``, averaged over tokens, then over sequences; metric policy/approxkl.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        Gao et al. 2025, arXiv 2511.20347.
    """
    _check.number("temperature_positive", temperature_positive, low=0.0, open_low=True)
    _check.number("temperature_negative", temperature_negative, low=0.0, open_low=True)
    logps, old_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    log_ratio = logps - old_logps
    tau = torch.full_like(logps, temperature_positive).where(advantages > 0, temperature_negative)
    gate = (tau * (safe_ratio(log_ratio) - 1)).sigmoid() * 4 / tau
    metrics = {"policy/approxkl": 0.5 * log_ratio.detach().square()}
    return LossOutput(loss=-gate * advantages, metrics=metrics, reduction="sequence_mean", mask=mask)
