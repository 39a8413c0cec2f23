"""Two ways to compute a model, held against each other in float32 even where its weights are in half precision.

In bfloat16 two right ways differ by a few percent after a dozen layers, and a wrong one may differ by no more. In float32
right ways agree to six digits, so a fault cannot hide in rounding. :func:`in_float32` widens the operands of each operation
when it is called: activations stay float32 throughout, and of the weights no more than one tensor is held twice at a time.
:func:`difference` compares there first, and then as the model is used, where a way may be as far from float32 as the model
itself is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["can_widen", "difference", "in_float32"]

HALF = (torch.bfloat16, torch.float16)

# A layer that sees a wrong token, and a head or norm with a wrong factor, change a hundredth and more. Rounding grows through
# the layers, to 2e-6 in float32 after twelve; norms compute in float32 in float64 models too.
_EXACT_BOUND = 4096 * torch.finfo(torch.float32).eps
# CUDA's attention may round float32 to TF32, 13 bits fewer, whatever is set for products.
_TF32_BOUND = 4e-3
# One product after the same states, in the same order of summation or another.
_ENTRY_BOUND = 32 * torch.finfo(torch.float32).eps
# Where float32 cannot be had: twice what twelve layers of bfloat16 do to a right way.
_HALF_BOUND = 0.1
_TINY = 1e-30

# Bytes of a product's weight that are widened at a time.
_PIECE = 64 << 20
# Read without looking at entries, so there is nothing to widen.
_READ = {"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "get_device", "__len__"}


def difference(
    model: nn.Module,
    compute: Callable[[], tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    layers: int,
    entrywise: bool = False,
) -> float | None:
    """How far a second way to compute a model is from the model's own; None where it is rounding.

    Args:
        model: both ways compute it.
        compute: ``[..., D]`` by the model, and ``[..., D]`` by the second way; called up to twice, and must give the same.
        device: of the model.
        layers: through which rounding grows.
        entrywise: both ways start from the same states, so each entry must agree, and to the last digits.

    Returns:
        The largest error of a vector, as a share of its length; ``entrywise`` of an entry, as a share of the largest.

    Raises:
        Exception: whatever ``compute`` raises as the model is used.
    """
    half = _half_dtype(model, device)
    used = exact = None
    if half is None:
        with _precisely(device):
            exact = compute()
    else:
        used = compute()
        if can_widen(model):
            with contextlib.suppress(Exception), in_float32(device):  # an operation of its own may want half precision
                exact = compute()
    if any(pair is not None and pair[0].shape != pair[1].shape for pair in (used, exact)):
        return math.inf
    # A half dtype here was rounded by a wrapper that says nothing of it.
    if exact is None or exact[0].dtype in HALF or exact[1].dtype in HALF:
        pair = used or exact
        assert pair is not None
        worst, eps = _worst(*pair), torch.finfo(half or pair[1].dtype).eps
        return None if worst <= min(_HALF_BOUND, 6 * eps * math.sqrt(layers)) else worst
    worst = _worst_entry(*exact) if entrywise else _worst(*exact)
    bound = _ENTRY_BOUND if entrywise else _EXACT_BOUND if device.type == "cpu" else _TF32_BOUND
    if not worst <= bound:
        return worst
    if used is None or half is None:
        return None
    truth = exact[0].double()
    own, error = (float((x.double() - truth).norm() / truth.norm().clamp(min=_TINY)) for x in used)
    return None if error <= 3.0 * own + torch.finfo(half).eps else error


def _half_dtype(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """The half precision that a model computes in; None where it does not."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next((p.dtype for p in model.parameters() if p.dtype in HALF), None)


def _worst(truth: Tensor, mine: Tensor) -> float:
    """The largest error of a vector, as a share of its length."""
    truth, mine = truth.double(), mine.double()
    return float(((mine - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=_TINY)).max())


def _worst_entry(truth: Tensor, mine: Tensor) -> float:
    """The largest error of an entry, as a share of the largest entry (of 1, where all are smaller)."""
    return float((mine.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1.0))


def can_widen(model: nn.Module) -> bool:
    """Whether every weight is a plain tensor of this process: neither sharded nor quantised.

    The answer is the same on every process, so that all of them take the same passes.
    """
    fsdp = getattr(getattr(torch.distributed, "fsdp", None), "FullyShardedDataParallel", ())
    if any(isinstance(module, fsdp) for module in model.modules()):
        return False
    return all(type(p) in (nn.Parameter, Tensor) and not hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Operations with half-precision tensors are computed in float32, and so are their results.

    Autocast is off inside, and float32 products keep all their bits. Writing into a half-precision tensor stays as it is.
    """
    with _precisely(device), _Widen():
        yield


@contextlib.contextmanager
def _precisely(device: torch.device) -> Iterator[None]:
    precision = None
    with contextlib.suppress(RuntimeError):  # it was set by torch's other interface, which this one may not mix with
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.float() if x.dtype in HALF else x
    return torch.float32 if isinstance(x, torch.dtype) and x in HALF else x


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with half-precision operands and dtypes widened."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property: its owner is not copied, and its dtype is what it will be computed in
            found = func(*args, **kwargs)
            return found if isinstance(found, Tensor) else _wide(found)
        changes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if changes or name in _READ or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if name in ("bfloat16", "half"):
            return args[0].float()
        if func is torch.nn.functional.embedding:  # a table may be the largest weight: pick rows first
            return _wide(func(*args, **kwargs))
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        args, kwargs = pytree.tree_map(_wide, (args, kwargs))
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In pieces of the weight: the head's is large."""
    x = _wide(input)
    rows = max(1, _PIECE // (4 * max(1, weight.shape[-1])))
    if weight.dtype not in HALF or weight.ndim != 2 or len(weight) <= rows:
        return torch.nn.functional.linear(x, _wide(weight), _wide(bias))
    pieces = [
        torch.nn.functional.linear(x, part.float(), None if bias is None else bias[i * rows : (i + 1) * rows].float())
        for i, part in enumerate(weight.split(rows))
    ]
    return torch.cat(pieces, -1)
