"""Moments of the log-ratio to the reference over a position's whole next-token distribution, from full logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlft import _check

__all__ = ["MOMENTS", "log_ratio_moments"]

MOMENTS: tuple[str, ...] = ("behaviour_log_ratio", "behaviour_log_ratio_sq", "token_log_ratio_sq")


def log_ratio_moments(
    logits: Float[Tensor, "N V"],
    ref_logits: Float[Tensor, "N V"],
    behaviour_logits: Float[Tensor, "N V"] | None = None,
    *,
    temperature: float = 1.0,
    want: frozenset[str],
) -> dict[str, Float[Tensor, " N"]]:
    """``sum_a mu(a) x(a)``, ``sum_a mu(a) x(a)^2`` and ``sum_a pi(a) x(a)^2``, with ``x = log pi - log pi_ref``.

    Args:
        logits: ``[N, V]`` of the policy pi; the gradient goes to them, through ``x`` and through ``pi(a)``.
        ref_logits: ``[N, V]`` of the reference, a constant.
        behaviour_logits: ``[N, V]`` of the policy mu that sampled, a constant; needed for the first two.
        temperature: divides all logits, > 0.
        want: which of :data:`MOMENTS` to compute, in that order: ``behaviour_log_ratio``, ``behaviour_log_ratio_sq``,
            ``token_log_ratio_sq``.

    Returns:
        ``[N]`` each by name, nats and nats squared, float32 (float64 for float64 logits).

    Raises:
        ValueError: for an unknown name, shapes that differ, or missing ``behaviour_logits``.
    """
    for name in sorted(want - set(MOMENTS)):
        raise ValueError(f"want holds {name!r}, which is no moment{_check.suggestion(name, MOMENTS)}")
    _check.number("temperature", temperature, low=0.0, open_low=True)
    under_mu = want & {"behaviour_log_ratio", "behaviour_log_ratio_sq"}
    if under_mu and behaviour_logits is None:
        raise ValueError(f"{sorted(under_mu)} need behaviour_logits, those of the policy that sampled")
    shapes = {"ref_logits": ref_logits} | ({} if behaviour_logits is None else {"behaviour_logits": behaviour_logits})
    _check.same_shape(logits=logits, **shapes)
    with torch.autocast(logits.device.type, enabled=False):

        def log_probs(raw: Tensor) -> Tensor:
            return torch.log_softmax(_check.upcast(raw) / temperature, -1)

        logp = log_probs(logits)
        ref = log_probs(ref_logits.detach())
        x = torch.where(logp.isneginf() & ref.isneginf(), 0.0, logp - ref)  # ids that both forbid
        found: dict[str, Tensor] = {}
        if under_mu and behaviour_logits is not None:
            mu = log_probs(behaviour_logits.detach()).exp()
            if "behaviour_log_ratio" in want:
                found["behaviour_log_ratio"] = (mu * x).sum(-1)
            if "behaviour_log_ratio_sq" in want:
                found["behaviour_log_ratio_sq"] = (mu * x.square()).sum(-1)
        if "token_log_ratio_sq" in want:
            found["token_log_ratio_sq"] = (logp.exp() * x.square()).sum(-1)
        return found
