"""What the head op returns, and the guard on gradients that were not asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["HeadOutputs", "finish"]


class HeadOutputs(NamedTuple):
    """Per-token quantities, ``[N]`` each, float32 (float64 for float64 inputs); None where not wanted.

    Attributes:
        logps: ``log pi(target)``.
        ref_logps: ``log pi_ref(target)``, a constant.
        entropy: ``-sum_v pi(v) log pi(v)``, between 0 and ``log V``.
        kl: ``sum_v pi(v) log(pi(v) / pi_ref(v))``, exact over the vocabulary, never negative.
    """

    logps: Tensor | None = None
    ref_logps: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


class _Undeclared(torch.autograd.Function):
    """Identity whose backward is an error: a gradient that silently is zero trains something else."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.name = name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError(
            f"a gradient reached {ctx.name!r}, which was computed without one; add {ctx.name!r} to grad=... "
            f"(for a Policy: 'entropy_grad' to want=... for the entropy), or detach it before it enters the loss"
        )


def finish(values: dict[str, Tensor], grad: frozenset[str], anchors: tuple[Tensor | None, ...]) -> HeadOutputs:
    """Pack computed tensors; those without a declared gradient raise if one reaches them."""
    anchor = next((a for a in anchors if a is not None and a.requires_grad), None)
    guarded = dict(values)
    if anchor is not None and torch.is_grad_enabled():
        for name in ("logps", "entropy", "kl"):
            if name in values and name not in grad:
                guarded[name] = _Undeclared.apply(values[name].detach(), anchor, name)
    return HeadOutputs(**guarded)
