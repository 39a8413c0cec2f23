"""GRPO: the clipped surrogate averaged per sequence, with a KL term in the loss."""

from __future__ import annotations

from typing import get_args

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check, kl
from rlft.losses import _base
from rlft.losses.ppo import clipped
from rlft.types import LossOutput

__all__ = ["grpo"]


@_base.loss_function(reduction="sequence_mean", advantage_weighted=True)
def grpo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B ..."],
    mask: Bool[Tensor, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    beta: float,
    kl_gradient: kl.KLGradient = "k3",
) -> LossOutput:
    """``-min(rho A, clip(rho) A) + beta k3``, mean over a sequence's tokens, then over sequences.

    Without the KL term GRPO, Dr. GRPO and DAPO are :func:`rlft.losses.ppo_clip` under another averaging
    (``sequence_mean``, ``fixed_length``, ``token_mean``), and no reference is needed.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        ref_logps: ``[B, T]`` log-probs under the reference.
        advantages: ``[B]`` from :func:`rlft.advantages.group_norm`, or ``[B, T]``.
        mask: ``[B, T]`` True = a token that counts.
        clip_eps: lower clip range, in (0, 1].
        clip_eps_high: upper clip range, > 0; None takes ``clip_eps``.
        beta: weight of the KL term, >= 0; DeepSeekMath uses 0.04.
        kl_gradient: whose gradient the k3 term carries. "k3", the paper's, descends the forward KL; "k2" and "ratio_k3"
            the reverse KL (see :mod:`rlft.kl`).

    Returns:
        loss ``[B, T]``; per-token metrics kl, clip_ratio/low, high and region, and policy/approxkl.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or a ratio that overflows.

    References:
        Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 3.
    """
    _check.number("beta", beta, low=0.0)
    _check.one_of("kl_gradient", kl_gradient, get_args(kl.KLGradient))
    logps, old_logps, ref_logps = _base.token_logps(mask, logps=logps, old_logps=old_logps, ref_logps=ref_logps)
    advantages = _base.advantage_tokens(advantages, logps, mask)
    surrogate, metrics = clipped(logps, old_logps, advantages, clip_eps, clip_eps_high)
    token_kl = kl.penalty(logps, ref_logps, mask, value="k3", gradient=kl_gradient)
    return LossOutput(
        loss=surrogate + beta * token_kl,
        metrics={"kl": token_kl.detach(), **metrics},
        reduction="sequence_mean",
        mask=mask,
    )
