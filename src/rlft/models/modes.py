"""Which modules are in training mode, and why: dropout off while scoring, checkpointing on while a graph is built."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["enable_checkpointing", "lora_dropout", "scoring"]


def scoring(model: nn.Module, *, dropout: bool, tracking: bool) -> None:
    """Eval mode, except that layers which checkpoint are told they train (transformers checkpoints only then).

    Args:
        model: the model to set.
        dropout: leave dropout on.
        tracking: whether a graph is built; without one checkpointing is pointless.
    """
    model.train(dropout)
    if tracking and not dropout:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # The flag of this module alone, not of its children: their dropout stays off.
                module.training = True


def enable_checkpointing(model: Any) -> None:
    """Switch gradient checkpointing on (without re-entrance), and make the inputs of frozen layers require grad."""
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing; switch it off")
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.enable_input_require_grads()
    for name, module in model.named_modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float) and value > 0.0:
                raise ValueError(
                    f"{name or type(module).__name__} applies {attribute}={value:g} itself, and a layer that "
                    f"checkpoints counts as training; set {attribute} to 0 in the model's config to use gradient checkpointing"
                )


def lora_dropout(model: nn.Module) -> float:
    """The largest dropout rate that a LoRA layer of the model asks for."""
    rates = [0.0]
    for module in model.modules():
        for layer in (getattr(module, "lora_dropout", None) or {}).values() if hasattr(module, "lora_dropout") else ():
            rates.append(float(getattr(layer, "p", 0.0)))
    return max(rates)
