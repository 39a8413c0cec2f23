"""The plain way, from full logits: the oracle of the tests, and the path for heads that are no single matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft import _check
from rlft.ops.outputs import HeadOutputs, finish

__all__ = ["logits_logps", "transform"]

# Beyond this log-ratio, p * expm1(x) is q - p with p < 1e-13 q: taken as q, so that 0 * inf cannot occur.
_FAR = 30.0


def transform(logits: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """What a model does to its raw head output: ``cap * tanh(logit_scale * x / cap)``, without cap the scale alone."""
    if softcap is None:
        return logits if logit_scale == 1.0 else logits * logit_scale
    return softcap * torch.tanh(logits * (logit_scale / softcap))


def logits_logps(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    *,
    ref_logits: Float[Tensor, "N V"] | None = None,
    temperature: float = 1.0,
    want: frozenset[str] = frozenset({"logps"}),
    grad: frozenset[str] = frozenset({"logps"}),
) -> HeadOutputs:
    """Log-probs, entropy and exact KL of final logits, by plain autograd in float32 (float64 stays).

    Args:
        logits: ``[N, V]`` as the model returns them (caps and scales applied); -inf forbids an id.
        targets: ``[N]`` token ids.
        ref_logits: ``[N, V]`` of the reference; a constant.
        temperature: divides both logits.
        want: which of ``logps``, ``ref_logps``, ``entropy``, ``kl`` to compute.
        grad: which of them carry a gradient; a gradient that reaches another one is an error.

    Returns:
        :class:`HeadOutputs`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logp = torch.log_softmax(_check.upcast(logits) / temperature, -1)
        values: dict[str, Tensor] = {}
        if "logps" in want:
            values["logps"] = logp.gather(-1, targets[:, None]).squeeze(-1)
        p = logp.exp()
        if "entropy" in want:
            values["entropy"] = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)  # 0 log 0 is 0
        if want & {"ref_logps", "kl"}:
            assert ref_logits is not None
            ref_logp = torch.log_softmax(_check.upcast(ref_logits.detach()) / temperature, -1)
            if "ref_logps" in want:
                values["ref_logps"] = ref_logp.gather(-1, targets[:, None]).squeeze(-1)
            if "kl" in want:
                # sum p (e^x - 1 - x) with x = log q/p: every term is >= 0, so nothing cancels at small KL.
                x = torch.where(p > 0, ref_logp - logp, 0.0)
                mass = torch.where((x > _FAR) | (p == 0), ref_logp.exp(), p * torch.expm1(x.clamp(max=_FAR)))
                values["kl"] = (mass - p * x).sum(-1)
        for name in values.keys() - grad:
            values[name] = values[name].detach()
        return finish(values, grad, (logits,))
