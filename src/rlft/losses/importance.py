"""Importance weights for samples whose policy is not exactly the one that is trained on: explicit, never built in.

A sampler in another engine, at another precision or some updates behind draws from a slightly different policy. The ratio
between the trainer's and the sampler's log-probs of the same tokens corrects for it. Weights are constants; they multiply a
loss: ``reweight(losses.grpo(...), importance_weights(old_logps, sampler_logps, mask, level="token", mode="truncate"))``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check, reduce
from rlft.losses import _base
from rlft.types import LossOutput

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]

__all__ = ["importance_weights", "reweight"]


def importance_weights(
    old_logps: Float[Tensor, "B T"],
    sampler_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: Level,
    mode: Mode,
    cap: float,
    floor: float = 0.0,
) -> Float[Tensor, "B T"]:
    """``exp(old_logps - sampler_logps)``, bounded: per token, or one weight per sequence (their product).

    Args:
        old_logps: ``[B, T]`` log-probs of the sampled tokens as the trainer computes them.
        sampler_logps: ``[B, T]`` log-probs of the same tokens as the sampler reported them.
        mask: ``[B, T]`` True = a token that counts.
        level: token or sequence. The sequence weight is unbiased and noisy; token weights are neither.
        mode: truncate sets weights above ``cap`` to it (and below ``floor`` to that); mask sets weights outside to zero.
        cap: largest weight, > 0; 2 is customary.
        floor: smallest weight, >= 0.

    Returns:
        ``[B, T]`` constants, zero where masked.

    Raises:
        ValueError: for wrong shapes or dtypes, log-probs that are not finite, or hyper-parameters out of range.

    References:
        Espeholt et al. 2018 (truncation), arXiv 1802.01561.
    """
    _check.one_of("level", level, get_args(Level))
    _check.one_of("mode", mode, get_args(Mode))
    _check.number("cap", cap, low=0.0, open_low=True)
    _check.number("floor", floor, low=0.0, high=cap)
    old_logps, sampler_logps = _base.token_logps(mask, old_logps=old_logps.detach(), sampler_logps=sampler_logps)
    log_weights = old_logps - sampler_logps
    if level == "sequence":
        log_weights = reduce.sequence_sum(log_weights, mask).unsqueeze(-1)
    # Bounding the exponent first: exp of what is cut off anyway must not overflow.
    weights = log_weights.clamp(max=math.log(cap)).exp()
    if mode == "truncate":
        weights = weights.clamp(min=floor)
    else:
        weights = weights.where((log_weights <= math.log(cap)) & (weights >= floor), 0.0)
    return weights.where(mask, 0.0)


def reweight(output: LossOutput, weights: Float[Tensor, "B T"]) -> LossOutput:
    """A loss per token with every entry multiplied by its weight; the denominators stay.

    Args:
        output: of a loss that is per token.
        weights: ``[B, T]`` from :func:`importance_weights`.

    Returns:
        the output with ``loss * weights``, and the weights as metric sampling/importance_sampling_ratio.

    Raises:
        ValueError: when the shapes differ.
    """
    _check.same_shape(loss=output.loss, weights=weights)
    (weights,) = _check.detach(weights)
    metrics = {**output.metrics, "sampling/importance_sampling_ratio": weights}
    return replace(output, loss=output.loss * weights, metrics=metrics)
