"""DRO: AGRO with one sample per prompt and a learned value in place of the siblings' mean."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["dro"]


@_base.loss_function(reduction="mean")
def dro(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    values: Float[Tensor, " B"],
    rewards: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> LossOutput:
    """``(r - V - beta S)^2 / 2``, S the log-ratio summed over tokens; gradient to the policy and to the value.

    At the optimum V is beta log Z of the prompt. Not scaled by 1/beta, unlike the AGRO losses.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        values: ``[B]`` the learned value of each row's prompt, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.

    Returns:
        loss ``[B]``, averaged over scored rows; metrics kl, objective/kl and val/error.

    Raises:
        ValueError: for wrong shapes or dtypes, entries that are not finite, or ``beta`` out of range.

    References:
        Richemond et al. 2024, arXiv 2405.19107, equation 5.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    logps, ref_logps = _base.token_logps(mask, logps=logps, ref_logps=ref_logps)
    _check.floating(values=values, rewards=rewards)
    _check.rows(logps, values=values, rewards=rewards)
    (rewards,) = _check.detach(rewards)
    member = mask.any(-1) & ~rewards.isnan()
    _check.finite(member, values=values, rewards=rewards)
    log_ratio = (logps - ref_logps).where(member.unsqueeze(-1), 0.0)
    error = rewards.where(member, 0.0) - _check.upcast(values).where(member, 0.0) - beta * log_ratio.sum(-1)
    metrics = {
        "kl": log_ratio.detach(),
        "objective/kl": log_ratio.detach().sum(-1),
        "val/error": error.detach(),
    }
    return LossOutput(loss=0.5 * error.square(), metrics=metrics, reduction="mean", mask=member)
