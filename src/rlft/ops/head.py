"""The public op: hidden states and a head in, log-probs, entropy and exact KL out."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft import _check
from rlft.ops import compiled
from rlft.ops.dense import logits_logps, transform
from rlft.ops.flash import AttentionPlan
from rlft.ops.flash import check_problem as check_attention
from rlft.ops.kernel_check import require, usable
from rlft.ops.outputs import HeadOutputs, finish
from rlft.ops.plans import RecomputePlan, TilePlan
from rlft.ops.tiles import Fused, Problem

__all__ = ["DEFAULT_CHUNK", "PLANS", "QUANTITIES", "default_chunk", "linear_logps"]

Plan = Literal["auto", "dense", "tile", "recompute", "attention", "compiled", "triton"]
PLANS: tuple[str, ...] = get_args(Plan)
# Hidden states, head and bias: of the policy, and of the reference.
Own = tuple[Tensor, Tensor, Tensor | None]
Ref = tuple[Tensor | None, Tensor | None, Tensor | None]
QUANTITIES: tuple[str, ...] = ("logps", "ref_logps", "entropy", "kl")
DIFFERENTIABLE: tuple[str, ...] = ("logps", "entropy", "kl")

# Rows x vocabulary entries of one tile. 2 MB in float32: fits a processor's cache, and is long enough for a GEMM (larger
# tiles are no faster and hold more memory, of which the joint op has five tiles).
DEFAULT_CHUNK: tuple[int, int] = (256, 2048)
# What -inf becomes as a bias: no probability is left, and products with it are numbers.
_FORBIDDEN = -1e9
# On CUDA a tile must outlast the launch of its kernels, and fill every multiprocessor: 268 MB in float32.
CUDA_CHUNK: tuple[int, int] = (4096, 16384)


def default_chunk(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of one tile where nothing else is said: :data:`DEFAULT_CHUNK`, more on CUDA."""
    return CUDA_CHUNK if device.type == "cuda" else DEFAULT_CHUNK


def linear_logps(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    ref_hidden: Float[Tensor, "N Dr"] | None = None,
    ref_weight: Float[Tensor, "V Dr"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    want: frozenset[str] = frozenset({"logps"}),
    grad: frozenset[str] = frozenset({"logps"}),
    plan: Plan = "auto",
    chunk: tuple[int, int] | None = None,
) -> HeadOutputs:
    """Per-token log-probs, entropy and exact KL of a linear head, never holding more than a tile of logits.

    The logits are ``softcap * tanh(logit_scale * (h W' + bias) / softcap) / temperature`` (no cap:
    ``logit_scale * (h W' + bias) / temperature``), for the policy and for the reference alike. Sums are float32
    whatever the inputs (float64 for float64), and logits are never rounded to half precision.

    Args:
        hidden: ``[N, D]`` final hidden states at the positions that predict ``targets``.
        weight: ``[V, D]`` the head.
        targets: ``[N]`` token ids, ``0 <= id < V``.
        ref_hidden: ``[N, Dr]`` the reference's hidden states; needed for ``ref_logps`` and ``kl``. A constant.
        ref_weight: ``[V, Dr]`` the reference's head; None means the policy's own (and its bias). A constant.
        bias: ``[V]`` the head's bias; -inf forbids an id (log-prob -inf, and no share in entropy and KL).
        ref_bias: ``[V]`` bias of ``ref_weight``.
        temperature: divides the logits, > 0.
        logit_scale: factor of the raw logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``).
        softcap: soft cap of the logits (Gemma 2), None for none.
        want: which of ``logps``, ``ref_logps``, ``entropy``, ``kl`` to compute.
        grad: which of them carry a gradient (to ``hidden``, and to ``weight`` and ``bias`` under ``recompute``). A
            gradient that reaches a wanted but undeclared output is an error.
        plan: ``tile`` stores one ``[N, D]`` row of derivatives per declared output (frozen head; backward costs
            O(N D)); ``recompute`` walks the tiles again in the backward (trainable head); ``dense`` materialises the
            logits (the oracle); ``auto`` takes ``recompute`` when the head requires grad, else ``tile``; ``triton`` is
            the same with one Triton kernel between the matrix products, and what ``auto`` takes on CUDA once the
            kernels have agreed with torch's operators on a small problem; ``compiled`` is the same with kernels that
            torch.compile makes on first use, for any device (tens of seconds once; then the fastest on a processor);
            ``attention`` is one call of flash attention over the head (CPU; log-probs and entropy of small problems).
        chunk: rows and vocabulary entries of one tile; None: 256 and 2048, on CUDA 4096 and 16384. Changes speed and
            memory (at most five tiles are held, six with a soft cap), results only by rounding.

    Returns:
        :class:`HeadOutputs`, ``[N]`` each, float32 or float64; None where not wanted.

    Raises:
        ValueError: on shapes, dtypes or names that do not fit, or target ids outside the vocabulary.

    References:
        Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
    """
    want, grad = frozenset(want), frozenset(grad)
    _check_names(want, grad, plan, ref_hidden)
    own, ref = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    _check_heads(own, ref, targets)
    chunk = default_chunk(hidden.device) if chunk is None else chunk
    _check_numbers(temperature, logit_scale, softcap, chunk)
    _check_targets(targets, weight.shape[0])
    head_trains = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    plan, fused = _choose(plan, hidden, head_trains)
    if plan == "dense":
        return _dense(own, ref, targets, temperature, logit_scale, softcap, want, grad)
    problem = _problem(own, ref, targets, temperature, logit_scale, softcap, chunk, fused)
    names = tuple(name for name in QUANTITIES if name in want)
    declared = tuple(name for name in names if name in grad)
    if plan == "attention":
        check_attention(problem, want, grad, head_trains)
        computed = AttentionPlan.apply(hidden, problem, names, declared)
    elif plan == "tile":
        computed = TilePlan.apply(hidden, problem, names, declared)
    else:
        computed = RecomputePlan.apply(hidden, weight, bias, problem, names, declared)
    values = dict(zip(names, computed, strict=True))
    if softcap is None:  # a capped logit is never -inf
        _forbid(values, targets, logps=bias, ref_logps=bias if ref_weight is None else ref_bias)
    return finish(values, grad, own)


def _choose(plan: Plan, hidden: Tensor, head_trains: bool) -> tuple[Plan, Fused]:
    """What ``auto``, ``triton`` and ``compiled`` mean for this head: a plan, and the kernels between its products."""
    if plan == "triton":
        require(hidden.device)
    if plan == "compiled":
        compiled.require()
    fused = "compiled" if plan == "compiled" else ""
    if plan == "triton" or (plan == "auto" and usable(hidden.device, hidden.dtype)):
        fused = "triton"
    if plan in ("auto", "compiled", "triton"):
        plan = "recompute" if head_trains else "tile"
    if plan == "tile" and head_trains:
        raise ValueError(
            "plan 'tile' cannot give the head a gradient, and weight or bias requires one; "
            "use plan='recompute' (or 'auto')"
        )
    return plan, fused


def _forbid(values: dict[str, Tensor], targets: Tensor, **biases: Tensor | None) -> None:
    """Log-prob -inf, in place of a very small one, for targets that a bias of -inf forbids; by name of the log-prob."""
    for name, bias in biases.items():
        if name in values and bias is not None:
            forbidden = bias.detach()[targets].isneginf()
            if bool(forbidden.any()):
                values[name] = values[name].masked_fill(forbidden, -math.inf)


def _problem(
    own: Own,
    ref: Ref,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk: tuple[int, int],
    fused: Fused,
) -> Problem:
    """The inputs of the plans that go tile by tile: constants, with finite biases."""
    hidden, weight, bias = own
    ref_hidden, ref_weight, ref_bias = ref
    return Problem(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=_finite(bias, hidden),
        targets=targets,
        ref_hidden=None if ref_hidden is None else ref_hidden.detach(),
        ref_weight=None if ref_weight is None else ref_weight.detach(),
        ref_bias=_finite(ref_bias, hidden),
        pre=logit_scale / (temperature if softcap is None else softcap),
        post=None if softcap is None else softcap / temperature,
        chunk=(chunk[0], chunk[1]),
        fused=fused,
    )


def _finite(bias: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A forbidden id's bias as a finite number that leaves it no probability: 0 * inf must not arise."""
    if bias is None:
        return None
    return bias.detach().to(torch.promote_types(hidden.dtype, torch.float32)).clamp(min=_FORBIDDEN)


def _check_names(want: frozenset[str], grad: frozenset[str], plan: str, ref_hidden: Tensor | None) -> None:
    for name in sorted(want - set(QUANTITIES)):
        raise ValueError(f"want holds {name!r}, which is no quantity of the head{_check.suggestion(name, QUANTITIES)}")
    if not want:
        raise ValueError(f"want is empty; name at least one of {', '.join(QUANTITIES)}")
    for name in sorted(grad - set(DIFFERENTIABLE)):
        raise ValueError(f"grad holds {name!r}; only {', '.join(DIFFERENTIABLE)} have a gradient")
    if grad - want and grad != frozenset({"logps"}):  # the default is harmless where no log-prob is wanted
        raise ValueError(f"grad names {sorted(grad - want)}, which want does not; add them to want")
    if plan not in PLANS:
        raise ValueError(f"plan {plan!r} is unknown{_check.suggestion(plan, PLANS)}")
    if want & {"ref_logps", "kl"} and ref_hidden is None:
        raise ValueError(f"{sorted(want & {'ref_logps', 'kl'})} need ref_hidden, the reference's hidden states [N, D]")


def _check_heads(own: Own, ref: Ref, targets: Tensor) -> None:
    hidden, weight, bias = own
    ref_hidden, ref_weight, ref_bias = ref
    _check_tensors(hidden, weight, targets, bias, "")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias needs ref_weight: without one the reference uses the policy's head and bias")
    if ref_hidden is None:
        return
    _check_tensors(ref_hidden, weight if ref_weight is None else ref_weight, targets, ref_bias, "ref_")
    if ref_weight is not None and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight must score the same vocabulary: weight has {weight.shape[0]} rows, "
            f"ref_weight {ref_weight.shape[0]}"
        )


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, prefix: str) -> None:
    _check.floating(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight})
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}hidden must be [N, D] and {prefix}weight [V, D] with V > 0, got {list(hidden.shape)} and "
            f"{list(weight.shape)}; gather the scored tokens into rows first"
        )
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"{prefix}hidden is {hidden.dtype} and {prefix}weight {weight.dtype}; float64 needs both")
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be int64 with one id per row of {prefix}hidden, [{hidden.shape[0]}], "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias must be [{weight.shape[0]}], one entry per vocabulary row, got {list(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {prefix}hidden on {hidden.device}; move them to one device"
            )


def _check_numbers(temperature: float, logit_scale: float, softcap: float | None, chunk: tuple[int, int]) -> None:
    _check.number("temperature", temperature, low=0.0, open_low=True)
    _check.number("logit_scale", logit_scale)
    if softcap is not None:
        _check.number("softcap", softcap, low=0.0, open_low=True)
    if len(chunk) != 2 or min(chunk) < 1:
        raise ValueError(f"chunk must be two positive sizes (rows, vocabulary entries), got {chunk!r}")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0:
        return
    low, high = torch.stack([targets.min(), targets.max()]).tolist()
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(
            f"targets hold id {bad}, outside the vocabulary of {vocabulary}; gather the scored tokens instead of "
            f"marking the others with -100, and check that tokenizer and model belong together"
        )


def _dense(
    own: Own,
    ref: Ref,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want: frozenset[str],
    grad: frozenset[str],
) -> HeadOutputs:
    """All logits at once, by torch's operators."""
    hidden, weight, bias = own
    ref_hidden, ref_weight, ref_bias = ref
    with torch.autocast(hidden.device.type, enabled=False):

        def full(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            b = None if b is None else _check.upcast(b)
            raw = torch.nn.functional.linear(_check.upcast(h), _check.upcast(w), b)
            return transform(raw, logit_scale=logit_scale, softcap=softcap)

        ref_logits = None
        if ref_hidden is not None and want & {"ref_logps", "kl"}:
            with torch.no_grad():
                head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
                ref_logits = full(ref_hidden, *head)
        return logits_logps(
            full(hidden, weight, bias), targets, ref_logits=ref_logits, temperature=temperature, want=want, grad=grad
        )
