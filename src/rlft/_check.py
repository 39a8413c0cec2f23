"""The wording of errors, in one place: what was expected, what came, what to do.

Every check raises ``ValueError``. Shape and dtype checks read no tensor values; value checks are
fused into one device synchronisation per call (see :func:`log_probs`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bool_mask",
    "detach",
    "exponent",
    "finite",
    "floating",
    "group_ids",
    "log_probs",
    "matrix",
    "number",
    "one_of",
    "rows",
    "same_shape",
    "suggestion",
    "tokens_or_rows",
    "upcast",
    "vector",
]

_SHOWN = 120  # known words in a message: more than there are settings, fewer than there are model families
_LARGEST = torch.finfo(torch.float64).max  # an int beyond it cannot be asked whether it is finite

# A float32 log-softmax is z - lse with both near 20, so one ulp of slack is 2e-6 and a sum of a
# thousand of them 2e-3. A positive value beyond this is not rounding but a wrong tensor.
_POSITIVE_SLACK = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def floating(**tensors: Tensor) -> None:
    """Refuse anything but floating-point tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} must be a floating-point tensor, got {type(tensor).__name__}; "
                f"wrap it with torch.as_tensor(..., dtype=torch.float32)"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; call {name}.float() first")


def bool_mask(mask: Tensor, like: Tensor, *, name: str = "mask", like_name: str = "logps") -> None:
    """Refuse a mask that is not bool, or whose shape is not exactly that of ``like``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} must be a bool tensor (True = a token that is trained on), got {came}; "
            f"pass {name}.bool() if its values are 0 and 1"
        )
    same_shape(**{like_name: like, name: mask})


def same_shape(**tensors: Tensor) -> None:
    """Refuse tensors whose shapes differ, broadcastable or not, or that sit on different devices."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {_shape(first)}, got {_shape(tensor)}; "
                f"shapes are never broadcast: expand or reshape {name} yourself"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}; move them to one device"
            )


def matrix(**tensors: Tensor) -> None:
    """Refuse anything but floating-point ``[B, T]`` tensors of one shape."""
    floating(**tensors)
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be one number per token, shape [B, T], got {_shape(tensor)}")
    same_shape(**tensors)


def vector(**tensors: Tensor) -> None:
    """Refuse anything but floating-point ``[P]`` tensors of one shape."""
    floating(**tensors)
    for name, tensor in tensors.items():
        if tensor.ndim != 1:
            raise ValueError(
                f"{name} must be one number per pair or sequence, shape [P], got {_shape(tensor)}; "
                f"sum log-probs over a sequence's tokens first (rlft.reduce.sequence_sum)"
            )
    same_shape(**tensors)


def rows(count_of: Tensor, *, count_name: str = "logps", **tensors: Tensor) -> None:
    """Refuse tensors that are not one-dimensional with one entry per row of ``count_of``."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 1 or tensor.shape[0] != count_of.shape[0]:
            came = _shape(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name} must have one entry per row of {count_name}, shape [{count_of.shape[0]}], got {came}; "
                f"shapes are never broadcast: reshape {name} yourself"
            )
        if tensor.device != count_of.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {count_name} on {count_of.device}; move them to one device"
            )


def tokens_or_rows(logps: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors that are neither ``[B]`` nor ``[B, T]`` for ``logps [B, T]``."""
    for name, tensor in tensors.items():
        if tensor.shape != logps.shape and tensor.shape != logps.shape[:1]:
            raise ValueError(
                f"{name} must be [{logps.shape[0]}] (one per sequence) or {_shape(logps)} (one per token), "
                f"got {_shape(tensor)}"
            )


def group_ids(ids: Tensor, count_of: Tensor, *, count_name: str = "logps") -> None:
    """Refuse group ids that are not one integer per row."""
    rows(count_of, count_name=count_name, group_ids=ids)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"group_ids must be integers (which prompt a row answers), got {ids.dtype}")


def number(name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """Refuse a hyper-parameter that is not a finite number in ``[low, high]`` (``(low, high]`` if open)."""
    bound = f"{'>' if open_low else '>='} {low:g}" if low > -math.inf else "finite"
    if high < math.inf:
        bound += f" and <= {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number ({bound}), got {value!r} of type {type(value).__name__}")
    if abs(value) > _LARGEST or not math.isfinite(value) or value < low or value > high or (open_low and value <= low):
        raise ValueError(f"{name} must be {bound}, got {value!r}; change {name}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a hyper-parameter that is not one of the known words."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{_did_you_mean(value, known)}")


def log_probs(mask: Tensor | None = None, **logps: Tensor) -> None:
    """Refuse unmasked log-probs that are NaN, -inf or positive beyond rounding. One device sync."""
    flags = []
    for values in logps.values():
        seen = values.detach() if mask is None else values.detach().where(mask, -1.0)
        slack = _POSITIVE_SLACK.get(values.dtype, 1e-4) * (1 if values.ndim > 1 else 100)
        flags += [~torch.isfinite(seen).all(), (seen > slack).any()]
    if not flags:
        return
    hits = torch.stack(flags).tolist()
    for index, name in enumerate(logps):
        values = logps[name].detach() if mask is None else logps[name].detach().where(mask, -1.0)
        if hits[2 * index]:
            where = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(
                f"{name} holds {values[tuple(where)].item()} at {where}, an unmasked position; log-probs must be "
                f"finite there: check the model's output for NaN and that no sampled token has probability zero"
            )
        if hits[2 * index + 1]:
            where = (values == values.max()).nonzero()[0].tolist()
            raise ValueError(
                f"{name} holds {values.max().item():.6g} at {where}; a log-probability cannot be positive: "
                f"pass log-softmax outputs, not logits or negative log-likelihoods"
            )


def finite(mask: Tensor | None = None, **tensors: Tensor) -> None:
    """Refuse unmasked entries that are NaN or infinite. One device sync."""
    seen = {name: t.detach() if mask is None else t.detach().where(mask, 0.0) for name, t in tensors.items()}
    if not seen or bool(torch.stack([torch.isfinite(t).all() for t in seen.values()]).all()):
        return
    for name, values in seen.items():
        bad = (~torch.isfinite(values)).nonzero().tolist()
        if bad:
            raise ValueError(
                f"{name} must be finite where it counts, got {values[tuple(bad[0])].item()} at {bad[0]}; "
                f"mask that entry or find out where it comes from"
            )


def exponent(name: str, values: Tensor, *, remedy: str) -> None:
    """Refuse exponents whose ``exp``, or its square, would overflow the dtype. One device sync.

    The square counts because optimizers square gradients: 44 nats for float32, 354 for float64.
    """
    limit = math.log(torch.finfo(values.dtype).max) / 2
    largest = values.detach().max().item() if values.numel() else -math.inf
    if largest > limit:
        where = (values.detach() == largest).nonzero()[0].tolist()
        raise ValueError(
            f"{name} is {largest:.6g} nats at {where}, and exp of it overflows {values.dtype} "
            f"(limit {limit:.0f}); {remedy}"
        )


def detach(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detach at the door, and upcast half precision to float32: a caller cannot leak gradient by forgetting."""
    return tuple(upcast(tensor.detach()) for tensor in tensors)


def upcast(tensor: Tensor) -> Tensor:
    """float32 for half-precision tensors; float32 and float64 as they are (gradients flow through)."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _did_you_mean(value: object, known: tuple[str, ...]) -> str:
    hint = suggestion(value, known) if isinstance(value, str) else ""
    return hint if "did you mean" in hint else f"; set it to {known[0]!r} for example"


def suggestion(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``; did you mean 'x'?`` when a known word is close, else the list of known words, cut where it gets long."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = sorted(known)[:_SHOWN]
    more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
    return f"; known: {', '.join(shown)}{more}"
