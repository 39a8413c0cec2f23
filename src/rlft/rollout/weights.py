"""A model's weights as another engine wants them: plain names, adapters merged in, the model itself untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlft.rollout.sampling_mode import generating_model

__all__ = ["merged_adapters", "merged_weights"]


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter, by the base model's names, active LoRA adapters merged.

    One layer is merged at a time, on a copy of its weight, and the original tensor is put back: the model is bit for
    bit what it was, and at most one layer is held twice. A tied weight is given once.

    Args:
        model: a transformers model, or a PeftModel over one. Not while gradients are being computed.

    Raises:
        ValueError: for quantised weights, which cannot be merged or handed over as they are.
    """
    given: set[int] = set()
    for name, tensor in _walk(generating_model(model), ""):
        if not tensor.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is quantised ({tensor.dtype}); sample from a quantised model with the 'builtin' or "
                f"'transformers' sampler"
            )
        if tensor.data_ptr() in given:
            continue
        given.add(tensor.data_ptr())
        yield name, tensor.detach()


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    # Only a model that was given adapters has these classes, so peft is not imported for the others.
    if hasattr(module, "get_base_layer") and hasattr(module, "merged_adapters"):
        yield from _merged(module, prefix)
        return
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
        active = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", None)]
        chosen = next((module.modules_to_save[name] for name in active if name in module.modules_to_save), None)
        yield from _walk(module.original_module if chosen is None else chosen, prefix)
        return
    for name, parameter in module.named_parameters(prefix="", recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _merged(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    base = layer.get_base_layer()
    if layer.merged_adapters or layer.disable_adapters:  # the weights are already what the model computes with
        yield from _walk(base, prefix)
        return
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {prefix + name!r} is quantised ({parameter.dtype}); sample from a quantised model with the "
                f"'builtin' or 'transformers' sampler"
            )
    restore = _merge(layer)
    try:
        found = {name: parameter.data for name, parameter in base.named_parameters()}
    finally:
        restore()
    for name, tensor in found.items():
        yield prefix + name, tensor


@torch.no_grad()
def _merge(layer: Any) -> Callable[[], None]:
    """Merge a LoRA layer's adapters into a copy of its weight; what is returned puts the original back, bit for bit."""
    parameters = list(layer.get_base_layer().parameters())
    originals = [parameter.data for parameter in parameters]

    def restore() -> None:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
        layer.merged_adapters.clear()

    try:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original.clone()
        layer.merge()
    except BaseException:
        restore()
        raise
    return restore


@contextlib.contextmanager
def merged_adapters(model: Any, *, max_bytes: int) -> Iterator[bool]:
    """Inside, LoRA layers compute with one merged weight each; after, every weight is bit for bit what it was.

    Nothing is merged, and False is given, when the adapted weights exceed ``max_bytes`` (they are held twice), are in
    half precision (a small adapter would be rounded away) or are quantised.
    """
    layers = [m for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merged_adapters")]
    layers = [m for m in layers if not m.merged_adapters and not m.disable_adapters]
    weights = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in weights)
    if not layers or not exact or sum(parameter.nbytes for parameter in weights) > max_bytes:
        yield False
        return
    undo: list[Callable[[], None]] = []
    try:
        for layer in layers:
            undo.append(_merge(layer))
        yield True
    finally:
        for restore in undo:
            restore()
