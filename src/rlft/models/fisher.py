"""Fisher-vector products of a policy, and its exact KL to itself a moment ago: what a trust-region step needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlft import _check
from rlft.models.layout import build_rows
from rlft.models.policy import Policy
from rlft.models.scorer import CausalScorer, Head
from rlft.ops import linear_logps, logits_logps
from rlft.ops.dense import transform
from rlft.trust_region import Linearised, softmax_fisher
from rlft.types import Batch

__all__ = ["PolicyFisher", "Remembered", "kl_from", "remember", "why_not"]

#: Logits of one piece of the head: tens of MiB each, and a few of them at a time.
_PIECE = 2**22


class PolicyFisher:
    """``sum_n J_n' (diag(p_n) - p_n p_n') J_n`` over the tokens that count, at the policy's present weights.

    It is the Gauss-Newton form, and the exact Hessian of the summed KL(old || new) at old. The trunk is linearised by
    differentiating twice (padded rows, attention by plain matrix products); the head, where it is one matrix, piece by
    piece, so that the logits of a batch never exist.

    Args:
        policy: whose weights.
        batch: a micro-batch on its device.
        parameters: the weights that move.
        temperature: divides the logits, > 0.
    """

    def __init__(self, policy: Policy, batch: Batch, parameters: Sequence[Tensor], *, temperature: float) -> None:
        policy._settle()
        scorer = policy._scorer
        self.parameters, self.temperature = tuple(parameters), temperature
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            states = scorer.states(build_rows(batch))
            self.head = scorer.matrix_head() if scorer.path == "matrix" else None
            if self.head is None:  # the head is part of what is linearised
                states = _check.upcast(scorer.logits(states)) / temperature
            self.line = Linearised(states, self.parameters)
        self.counted = batch.mask[batch.completion_mask]

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """The product with a vector, both shaped like the parameters."""
        moved = self.line.push(tangents)
        weights = self.counted.to(moved.dtype)
        states = self.line.outputs.detach()
        if self.head is None:
            return self.line.pull(softmax_fisher(states, moved, weights))
        matrices = [t for t in (self.head.weight, self.head.bias) if t is not None]
        places = [next((i for i, p in enumerate(self.parameters) if p is t), None) for t in matrices]
        directions = [torch.zeros_like(t) if i is None else tangents[i] for t, i in zip(matrices, places, strict=True)]
        cotangent, sums = _through_head(self.head, states, moved, matrices, directions, weights, self.temperature)
        result = self.line.pull(cotangent)
        for i, part in zip(places, sums, strict=True):
            if i is not None:
                result[i] = result[i] + part
        return result


def _through_head(
    head: Head,
    states: Tensor,
    moved: Tensor,
    matrices: Sequence[Tensor],
    directions: Sequence[Tensor],
    weights: Tensor,
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """The Fisher matrix of the logits between two passes through a linear head: to the states, to weight and bias."""

    def logits(h: Tensor, *of: Tensor) -> Tensor:
        raw = torch.nn.functional.linear(_check.upcast(h), *(_check.upcast(t) for t in of))
        return transform(raw, logit_scale=head.logit_scale, softcap=head.softcap) / temperature

    matrices = [t.detach() for t in matrices]
    sums = [torch.zeros_like(t) for t in matrices]
    rows = max(1, _PIECE // matrices[0].shape[0])
    pieces = []
    for h, dh, w in zip(states.split(rows), moved.split(rows), weights.split(rows), strict=True):
        inputs = (h, *matrices)
        z, dz = torch.func.jvp(logits, inputs, (dh, *directions))[:2]
        back = torch.func.vjp(logits, *inputs)[1](softmax_fisher(z, dz, w.to(z.dtype)))
        pieces.append(back[0])
        for total, part in zip(sums, back[1:], strict=True):
            total += part
    return torch.cat(pieces) if pieces else torch.zeros_like(states), sums


# -- KL -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Remembered:
    """The policy's next-token distributions on a batch, as they were: final states and head, or logits.

    Attributes:
        states: ``[N, D]`` of the scored tokens (``[N, V]`` logits where the head is no plain matrix).
        weight, bias: the head of that time; None where ``states`` are logits (``bias``: or where it has none).
    """

    states: Tensor
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def remember(policy: Policy, batches: Sequence[Batch]) -> list[Remembered]:
    """What :func:`kl_from` compares with, for each batch; a frozen head is not copied, a trained one once."""
    found, weight, bias = [], None, None
    for batch in batches:
        states, head = _states(policy, batch)
        if head is not None and weight is None:
            weight, bias = (t.detach().clone() if t is not None and t.requires_grad else t for t in head[:2])
        found.append(Remembered(states, weight, bias))
    return found


@torch.no_grad()
def kl_from(old: Remembered, policy: Policy, batch: Batch, *, temperature: float) -> Float[Tensor, "B T"]:
    """Exact KL(old || policy) of the next token at every position.

    Args:
        old: from :func:`remember`, of this batch.
        policy: with the weights of now.
        batch: the batch.
        temperature: divides both logits, > 0.

    Returns:
        ``[B, T]`` nats, zero outside ``completion_mask``.
    """
    rows = build_rows(batch)
    states, head = _states(policy, batch)
    want = frozenset({"kl"})
    if head is None or old.weight is None:
        size = max(1, _PIECE // max(1, states.shape[-1]))
        parts = [
            logits_logps(o, t, ref_logits=n, temperature=temperature, want=want).kl
            for o, n, t in zip(old.states.split(size), states.split(size), rows.targets.split(size), strict=True)
        ]
        return rows.scatter(torch.cat([p for p in parts if p is not None]))
    same = head.weight is old.weight and head.bias is old.bias
    outputs = linear_logps(
        old.states,
        old.weight,
        rows.targets,
        ref_hidden=states,
        ref_weight=None if same else head.weight,
        bias=old.bias,
        ref_bias=None if same else head.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        want=want,
        chunk=policy.chunk_size,
    )
    assert outputs.kl is not None
    return rows.scatter(outputs.kl)


def _states(policy: Policy, batch: Batch) -> tuple[Tensor, Head | None]:
    """Final states and the matrix behind them, or logits and None."""
    policy._settle()
    scorer: CausalScorer = policy._scorer
    states = scorer.states(build_rows(batch), policy._shared(batch))
    head = scorer.matrix_head() if scorer.path == "matrix" else None
    return (states, head) if head is not None else (scorer.logits(states), None)


def why_not(policy: Policy) -> str | None:
    """Why a policy cannot be differentiated twice; None where it can."""
    config: Any = getattr(policy._scorer.base, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if name not in (None, "sdpa", "eager"):
        return f"its attention {name!r} has no second derivative; use attn_implementation: sdpa"
    return None
