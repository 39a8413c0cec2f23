"""Unpaired preferences: KTO."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check, reduce
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["kto"]


@_base.loss_function(reduction="mean")
def kto(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    labels: Bool[Tensor, " B"],
    kl_baseline: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Desirable rows ``w_D (1 - sigmoid(beta (S - z0)))``, undesirable rows ``w_U (1 - sigmoid(beta (z0 - S)))``.

    S is the row's log-ratio summed over its tokens. z0 is a constant the caller estimates over the whole global batch:
    ``max(0, mean log-ratio of mismatched prompts and answers)``, repeated for every row.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        labels: ``[B]`` bool, True = desirable.
        kl_baseline: ``[B]`` z0 in nats, >= 0, the same number in every row.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.
        desirable_weight: w_D >= 0.
        undesirable_weight: w_U >= 0.

    Returns:
        loss ``[B]``, averaged over rows; implicit rewards as metrics, NaN where the label does not apply.

    Raises:
        ValueError: for wrong shapes or dtypes, a negative baseline, or hyper-parameters out of range.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equation 7.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("desirable_weight", desirable_weight, low=0.0)
    _check.number("undesirable_weight", undesirable_weight, low=0.0)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    _check.rows(logps, labels=labels, kl_baseline=kl_baseline)
    _check.floating(kl_baseline=kl_baseline)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool (True = desirable), got {labels.dtype}; pass labels.bool()")
    member = mask.any(-1)
    (kl_baseline,) = _check.detach(kl_baseline)
    kl_baseline = kl_baseline.where(member, 0.0)
    _check.finite(member, kl_baseline=kl_baseline)
    if bool((kl_baseline < 0).any()):
        worst = kl_baseline.min().item()
        raise ValueError(f"kl_baseline must be >= 0, got {worst:.6g}; clamp the estimate at zero before passing it")
    log_ratio = reduce.sequence_sum(logps - ref_logps, mask)
    gain = beta * (log_ratio - kl_baseline)
    loss = torch.where(labels, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)).where(
        member, 0.0
    )
    reward = beta * log_ratio.detach()
    nan = torch.full_like(reward, torch.nan)
    row_logps = reduce.sequence_sum(logps.detach(), mask)
    metrics = {
        "rewards/chosen": reward.where(labels & member, nan),
        "rewards/rejected": reward.where(~labels & member, nan),
        "logps/chosen": row_logps.where(labels & member, nan),
        "logps/rejected": row_logps.where(~labels & member, nan),
        "kl": kl_baseline.where(member, nan),
    }
    return LossOutput(loss=loss, metrics=metrics, reduction="mean", mask=member)
