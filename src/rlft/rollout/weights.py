"""A model's weights as another engine wants them: plain names, adapters merged in, the model itself untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlft.rollout.modes import generating_model

__all__ = ["merged_weights"]


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


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
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
    if layer.merged_adapters:  # the caller merged already: the weights are what they should be
        yield from _walk(base, prefix)
        return
    original = {name: parameter.data for name, parameter in base.named_parameters()}
    for name, tensor in original.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"parameter {prefix + name!r} is quantised ({tensor.dtype}); sample from a quantised model with the "
                f"'builtin' or 'transformers' sampler"
            )
    try:
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.data = original[name].clone()
            layer.merge()
            found = {name: parameter.data for name, parameter in base.named_parameters()}
    finally:
        for name, parameter in base.named_parameters():
            parameter.data = original[name]
        layer.merged_adapters.clear()
    for name, tensor in found.items():
        yield prefix + name, tensor
