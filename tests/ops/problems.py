"""Random head problems in float64, and the plain way to solve them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALL = frozenset({"logps", "ref_logps", "entropy", "kl"})
GRADS = frozenset({"logps", "entropy", "kl"})


def problem(
    n: int = 7,
    d: int = 5,
    v: int = 13,
    *,
    seed: int = 0,
    apart: float = 0.5,
    own_head: bool = True,
    bias: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of ``linear_logps``; ``apart`` is how far the reference is from the policy."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    hidden, weight, b = draw(n, d), draw(v, d) * scale, draw(v)
    made: dict[str, Any] = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": torch.randint(v, (n,), generator=g),
        "ref_hidden": (hidden + apart * draw(n, d)).to(dtype),
    }
    if bias:
        made["bias"] = b.to(dtype)
    if not own_head:
        made["ref_weight"] = (weight + apart * draw(v, d)).to(dtype)
        if bias:
            made["ref_bias"] = (b + apart * draw(v)).to(dtype)
    return made


def truth(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    bias: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """The definitions, in float64 and with full logits; written without the library."""

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        x = h.double() @ w.double().T
        x = (x if b is None else x + b.double()) * logit_scale
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return x / temperature

    own = ref_weight is None
    logp = torch.log_softmax(logits(hidden, weight, bias), -1)
    ref = torch.log_softmax(logits(ref_hidden, weight if own else ref_weight, bias if own else ref_bias), -1).detach()
    rows = torch.arange(len(targets))
    return {
        "logps": logp[rows, targets],
        "ref_logps": ref[rows, targets],
        "entropy": -(logp.exp() * logp).sum(-1),
        "kl": _kl(logp, ref),
    }


def _kl(logp: Tensor, ref: Tensor) -> Tensor:
    """``sum q - p (1 + log q - log p)``: no term is negative, so a KL of 1e-24 is not lost in rounding of 1e-16."""
    u = ref - logp
    small = u < 30.0
    term = torch.where(small, logp.exp() * (torch.expm1(u.where(small, 0.0)) - u), ref.exp() - logp.exp() * (1 + u))
    return term.sum(-1)


def leaves(made: dict[str, Any], *names: str) -> list[Tensor]:
    """Turn the named inputs into leaves that require grad, in place; returns them."""
    for name in names:
        made[name] = made[name].detach().clone().requires_grad_()
    return [made[name] for name in names]
