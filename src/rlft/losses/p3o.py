"""P3O: policy gradient from the reward difference of two answers to one prompt, importance-corrected."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check, reduce
from rlft.losses import _base
from rlft.losses.ppo import clip_range, safe_ratio
from rlft.types import LossOutput

Clipping = Literal["separate", "joint"]

__all__ = ["p3o"]


@_base.loss_function(reduction="mean", min_group=2)
def p3o(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    clip_eps: float,
    clip_eps_high: float | None = None,
    clipping: Clipping = "separate",
) -> LossOutput:
    """Gradient ``-sum over pairs of w (R_1 - R_2)/2 grad(l_1 - l_2)``, R = r - beta S, w a clipped sequence ratio.

    S is the current policy's log-ratio to the reference, ``w_i = exp(l_i - l_i_old)`` the ratio of a whole answer.
    "separate": each answer's term is PPO's, ``-min(w_i D, clip(w_i) D)`` with its own ratio. "joint": the pair's term is
    ``-sg[clip(w_1 w_2)] D (l_1 - l_2)/2``. Unclipped, both are unbiased for the regularised policy gradient, whoever
    sampled. With more than two answers per prompt all pairs are averaged.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: weight of the KL in the reward, >= 0.
        clip_eps: lower clip range of the ratio, in (0, 1].
        clip_eps_high: upper clip range, > 0; None takes ``clip_eps``.
        clipping: separate or joint.

    Returns:
        loss ``[B]``, averaged over rows; metrics objective/kl, objective/rlhf_reward and clip_ratio/region.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, hyper-parameters out of range, or a ratio that
            overflows.

    References:
        Wu et al. 2023, arXiv 2310.00212, with separate and joint clipping.
    """
    _check.number("beta", beta, low=0.0)
    _check.one_of("clipping", clipping, get_args(Clipping))
    low, high = clip_range(clip_eps, clip_eps_high)
    logps, old_logps, ref_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps, ref_logps=ref_logps)
    rewards, groups, mask = _base.scored_rows(rewards, group_ids, mask, min_group=2, wanted_by="p3o")
    answer = reduce.sequence_sum(logps, mask)
    log_ratio = answer - reduce.sequence_sum(old_logps, mask)
    kl = answer.detach() - reduce.sequence_sum(ref_logps, mask)
    regularised = rewards - beta * kl
    if clipping == "separate":
        ratio = safe_ratio(log_ratio)
        pairs = _pairs(groups)
        gain = _difference(regularised) * ratio.unsqueeze(-1)
        bound = _difference(regularised) * ratio.clamp(low, high).unsqueeze(-1)
        per_pair = torch.minimum(gain, bound)
        clipped = (bound < gain).where(pairs, False)
    else:
        pairs = _pairs(groups)
        own = log_ratio.detach()
        together = (own[:, None] + own[None, :]).where(pairs, 0.0)
        weight = safe_ratio(together)
        # A pair is met twice, once from each side; each side moves its own answer and holds the other.
        per_pair = weight.clamp(low, high) * _difference(regularised) * answer.unsqueeze(-1)
        clipped = ((weight < low) | (weight > high)) & pairs
    others = (groups.count - 1).clamp(min=1)
    loss = -per_pair.where(pairs, 0.0).sum(-1) / others
    metrics = {
        "objective/kl": kl,
        "objective/rlhf_reward": regularised,
        "clip_ratio/region": clipped.to(answer.dtype).sum(-1) / others,
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=groups.member)


def _pairs(groups: _base.Groups) -> Tensor:
    """``[B, B]`` True for two different members of one group."""
    return groups.together() & ~torch.ones_like(groups.member).diag()


def _difference(x: Tensor) -> Tensor:
    return x[:, None] - x[None, :]
