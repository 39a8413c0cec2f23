"""The head as one call of flash attention on a processor: a query attends to the rows of the head.

With keys and values both ``W``, attention gives ``E_p[W]`` and its log-sum-exp is that of the logits, which is all that
log-prob, entropy and the derivative of the log-prob need. One call has no cost per tile, so it serves small problems;
torch's kernel has no second operand for a reference, no bias and no soft cap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.ops.tiles import Problem

__all__ = ["AttentionPlan", "check_problem"]


def check_problem(p: Problem, want: frozenset[str], grad: frozenset[str], head_trains: bool) -> None:
    """Raises ValueError where the problem is none of attention."""
    wrong = None
    if p.hidden.device.type != "cpu":
        wrong = f"is for a processor, and the tensors are on {p.hidden.device}"
    elif p.hidden.dtype != p.weight.dtype or p.hidden.dtype not in (torch.float32, torch.float64):
        wrong = f"needs float32 or float64 throughout, got {p.hidden.dtype} hidden states and a {p.weight.dtype} head"
    elif head_trains:
        wrong = "cannot give the head a gradient, and weight or bias requires one"
    elif p.bias is not None or p.post is not None:
        wrong = "knows no bias and no soft cap"
    elif want - {"logps", "entropy"}:
        wrong = f"computes log-probs and entropy only, not {sorted(want - {'logps', 'entropy'})}"
    elif want & grad - {"logps"}:
        wrong = "gives log-probs alone a gradient, and grad names entropy"
    if wrong:
        raise ValueError(f"plan 'attention' {wrong}; use plan='auto'")


class AttentionPlan(torch.autograd.Function):
    """Frozen head. The forward stores the derivative of each log-prob, ``[N, D]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, p: Problem, want: tuple[str, ...], grad: tuple[str, ...]) -> Any:
        if p.hidden.shape[0]:
            keys = p.weight[None, None]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                p.hidden[None, None], keys, keys, 0.0, False, scale=p.pre
            )
            mean, lse = found[0][0, 0], found[1][0, 0]
        else:  # the kernel divides by the number of queries
            mean, lse = torch.zeros_like(p.hidden), p.hidden.new_zeros(0)
        target = p.weight[p.targets]
        values = {
            # Differences of numbers of the logits' size: what is lost there may lead past what can be.
            "logps": (torch.linalg.vecdot(p.hidden, target) * p.pre - lse).clamp(max=0.0),
            "entropy": (lse - torch.linalg.vecdot(p.hidden, mean) * p.pre).clamp(0.0, math.log(p.weight.shape[0])),
        }
        ctx.set_materialize_grads(False)
        ctx.names = want
        if ctx.needs_input_grad[0] and "logps" in grad:
            ctx.save_for_backward((target - mean).mul_(p.pre))
        outputs = tuple(values[name] for name in want)
        ctx.mark_non_differentiable(*(out for name, out in zip(want, outputs, strict=True) if name not in grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        g = dict(zip(ctx.names, upstream, strict=True)).get("logps")
        if g is None or not ctx.saved_tensors:
            return None, None, None, None
        # A zero upstream (a masked token) stays zero even where the derivative is not finite.
        return torch.where(g[:, None] != 0, g[:, None] * ctx.saved_tensors[0], 0.0), None, None, None
