"""From final hidden states to log-probs, entropy and exact KL, through the heads of the policy and of its reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlft.models.reference import Reference
from rlft.models.scorer import CausalScorer
from rlft.ops import DEFAULT_CHUNK, HeadOutputs, linear_logps, logits_logps

__all__ = ["logit_rows", "reference_logps", "score_states"]

#: Rows and vocabulary entries of a tile; None: what suits the device.
Chunk = tuple[int, int] | None


def logit_rows(chunk: Chunk) -> int:
    """Tokens whose full logits exist at a time, where the head is no single matrix."""
    return (chunk or DEFAULT_CHUNK)[0]


def score_states(
    scorer: CausalScorer,
    reference: Reference,
    states: Tensor,
    ref_states: Tensor | None,
    targets: Tensor,
    *,
    want: frozenset[str],
    grad: frozenset[str],
    temperature: float,
    chunk: Chunk,
) -> HeadOutputs:
    """The heads over scored tokens: one fused op where both are matrices, else chunk by chunk.

    Args:
        scorer: of the policy.
        reference: what it is compared with.
        states: ``[N, D]`` hidden states of the policy, differentiable.
        ref_states: ``[N, Dr]`` of the reference; read for ``ref_logps`` and ``kl``.
        targets: ``[N]`` the scored tokens.
        want: quantities of the head, as of :func:`rlft.ops.linear_logps`.
        grad: which of them carry a gradient.
        temperature: divides all logits.
        chunk: rows and vocabulary entries of a tile; so many rows of logits where a head is no matrix.
    """
    ref = ref_head = None
    if want & {"ref_logps", "kl"}:
        ref = reference.scorer(scorer)
    else:
        ref_states = None
    head = scorer.matrix_head() if scorer.path == "matrix" else None
    if ref is not None and ref is not scorer:
        ref_head = ref.matrix_head() if ref.path == "matrix" else None
        if head is None or ref_head is None or ref_head.softcap != head.softcap:
            head = None
    size = logit_rows(chunk)
    if head is None:
        return _by_module(scorer, reference, states, ref_states, targets, want, grad, temperature, size)
    if ref_head is not None and ref_states is not None and ref_head.logit_scale != head.logit_scale:
        if ref_head.bias is not None:
            return _by_module(scorer, reference, states, ref_states, targets, want, grad, temperature, size)
        ref_states = ref_states * (ref_head.logit_scale / head.logit_scale)
    return linear_logps(
        states,
        head.weight,
        targets,
        ref_hidden=ref_states,
        ref_weight=None if ref_head is None else ref_head.weight,
        bias=head.bias,
        ref_bias=None if ref_head is None else ref_head.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        want=want,
        grad=grad,
        chunk=chunk,
    )


def _by_module(
    scorer: CausalScorer,
    reference: Reference,
    states: Tensor,
    ref_states: Tensor | None,
    targets: Tensor,
    want: frozenset[str],
    grad: frozenset[str],
    temperature: float,
    size: int,
) -> HeadOutputs:
    """Heads that are no plain matrix: logits of ``size`` tokens at a time, recomputed in the backward."""

    def score(piece: Tensor, ref_piece: Tensor | None, ids: Tensor) -> tuple[Tensor, ...]:
        ref_logits = None
        if ref_piece is not None:
            with reference.active():
                ref_logits = reference.scorer(scorer).logits(ref_piece)
        outputs = logits_logps(
            scorer.logits(piece), ids, ref_logits=ref_logits, temperature=temperature, want=want, grad=grad
        )
        return tuple(t for t in outputs if t is not None)

    pieces = []
    for i in range(0, max(states.shape[0], 1), size):
        ref_piece = None if ref_states is None else ref_states[i : i + size]
        arguments = (states[i : i + size], ref_piece, targets[i : i + size])
        again = torch.is_grad_enabled() and scorer.path == "module"
        pieces.append(checkpoint(score, *arguments, use_reentrant=False) if again else score(*arguments))
    names = [name for name in HeadOutputs._fields if name in want]
    return HeadOutputs(**{n: torch.cat(parts) for n, parts in zip(names, zip(*pieces, strict=True), strict=True)})


def reference_logps(
    scorer: CausalScorer, states: Tensor, targets: Tensor, *, temperature: float, chunk: Chunk
) -> Tensor:
    """``[N]`` log-probs where nothing of the policy is wanted; inside ``Reference.active``.

    Args:
        scorer: of the reference.
        states: ``[N, Dr]`` its hidden states.
        targets: ``[N]`` the scored tokens.
        temperature: divides the logits.
        chunk: rows and vocabulary entries of a tile; so many rows of logits where a head is no matrix.
    """
    want = frozenset({"logps"})
    head = scorer.matrix_head() if scorer.path == "matrix" else None
    if head is not None:
        outputs = linear_logps(
            states,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            want=want,
            chunk=chunk,
        )
        assert outputs.logps is not None
        return outputs.logps
    size = logit_rows(chunk)
    parts = []
    for i in range(0, max(states.shape[0], 1), size):
        logits = scorer.logits(states[i : i + size])
        parts.append(logits_logps(logits, targets[i : i + size], temperature=temperature, want=want).logps)
    return torch.cat([part for part in parts if part is not None])
