"""How wrong the numbers are: float32 results on bfloat16 inputs against the same inputs in float64.

The policy's hidden states are the reference's plus a small step, as in training: KL to the reference is far below one nat,
which is where a difference of large numbers loses its digits.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["compare", "rows"]

Outputs = tuple[Tensor, Tensor]  # log-probs and KL


def _inputs(step: float, *, tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(tokens, hidden, generator=generator)
    policy = reference + step * torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    half = torch.bfloat16
    # A step too small for bfloat16 would vanish in the hidden states: the weights are bfloat16, the states float32.
    return policy, reference, weight.to(half).float(), targets


def _truth(policy: Tensor, reference: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    logp, ref = ((h.double() @ weight.double().t()).log_softmax(-1) for h in (policy, reference))
    return logp.gather(-1, targets[:, None]).squeeze(-1), (logp.exp() * (logp - ref)).sum(-1)


def _ours(policy: Tensor, reference: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    from rlft.ops import linear_logps

    out = linear_logps(policy, weight, targets, ref_hidden=reference, want=frozenset({"logps", "kl"}), grad=frozenset())
    assert out.logps is not None
    assert out.kl is not None
    return out.logps, out.kl


def _naive(policy: Tensor, reference: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    logp, ref = ((h @ weight.t()).log_softmax(-1) for h in (policy, reference))
    return logp.gather(-1, targets[:, None]).squeeze(-1), (logp.exp() * (logp - ref)).sum(-1)


def _trl(policy: Tensor, reference: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logps = ChunkedLogProbFunction.apply(policy, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
    kl = ChunkedDivergenceFunction.apply(policy, weight, None, reference, weight, None, 1.0)[0]
    return logps, kl


WAYS: dict[str, tuple[Callable[..., Outputs], str | None]] = {
    "rlft linear_logps": (_ours, None),
    "torch, two log_softmax": (_naive, None),
    "TRL LogProb and Divergence": (_trl, "trl"),
}


def compare(step: float, *, tokens: int = 512, hidden: int = 256, vocab: int = 16000) -> dict[str, Any]:
    """Errors of every way at one size of step.

    Args:
        step: standard deviation of the difference between the hidden states.
        tokens: how many rows.
        hidden: their width.
        vocab: rows of the head.

    Returns:
        the median KL, and for each way the median relative error of the KL, the share of negative KLs and the largest
        error of a log-prob.
    """
    inputs = _inputs(step, tokens=tokens, hidden=hidden, vocab=vocab)
    true_logps, true_kl = _truth(*inputs)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, (way, needs) in WAYS.items():
            if needs and find_spec(needs) is None:
                continue
            logps, kl = way(*inputs)
            relative = (kl.double() - true_kl).abs() / true_kl
            found[name] = {
                "kl_error": relative.median().item(),
                "negative": (kl < 0).double().mean().item(),
                "logp_error": (logps.double() - true_logps).abs().max().item(),
            }
    return {"step": step, "kl": true_kl.median().item(), "ways": found}


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """The comparison at several sizes of step."""
    steps = (1e-3,) if quick else (1e-3, 1e-2, 1e-1)
    shape = {"tokens": 64, "hidden": 64, "vocab": 2000} if quick else {}
    return [compare(step, **shape) for step in steps]
