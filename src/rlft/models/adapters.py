"""PEFT adapters seen from a policy: which are trained, switching them without touching what requires grad, copies."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["REFERENCE", "Switch", "active_adapter", "adapter_is_identity", "copy_adapter", "is_peft"]

# The name of the frozen copy inside a PeftModel.
REFERENCE = "rlft_reference"
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a PeftModel (adapters whose names and switching peft manages)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def active_adapter(model: Any) -> str:
    """The one adapter that is switched on.

    Raises:
        ValueError: when none or several are.
    """
    given: Any = model.active_adapters
    found: Any = given() if callable(given) else given
    names: list[str] = list(found)
    if len(names) != 1:
        raise ValueError(
            f"a policy needs exactly one active adapter, got {names or 'none'}; call model.set_adapter(name) first"
        )
    return names[0]


class Switch:
    """Turns a model's adapters off, or to another name, for the length of a ``with`` block.

    peft's own ``disable_adapter`` and ``set_adapter`` also rewrite ``requires_grad``, in the middle of a forward whose
    graph is being built and under wrappers that recorded it; this changes nothing but which adapter is used.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.layers: list[Any] = [
            m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]

    def refuse_merged(self) -> None:
        """A merged adapter is part of the base weights: it gets no gradient, and no switch takes it out.

        Raises:
            ValueError: when one is merged.
        """
        for layer in self.layers:
            if getattr(layer, "merged_adapters", None):
                raise ValueError(
                    f"adapter {layer.merged_adapters} is merged into the base weights: it would get no gradient, and "
                    f"the reference could not be told from it; call model.unmerge_adapter() after generating"
                )

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Use ``adapter`` (None: no adapter, the base model alone)."""
        self.refuse_merged()
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        try:
            for layer in self.layers:
                layer._disable_adapters = adapter is None
                if adapter is not None:
                    layer._active_adapter = [adapter]
            yield
        finally:
            for layer, disabled, active in before:
                layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters that belong to an adapter, by name: its name is one component of theirs."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if adapter in name.split(".")}


def adapter_is_identity(model: nn.Module, adapter: str) -> bool:
    """Whether the model with the adapter is exactly the model without it (a LoRA whose B is still zero)."""
    for name, parameter in adapter_parameters(model, adapter).items():
        parts = name.split(".")
        if "modules_to_save" in parts:
            original = name[: name.index("modules_to_save")] + "original_module." + parts[-1]
            twin = dict(model.named_parameters(remove_duplicate=False)).get(original)
            if twin is None or twin.shape != parameter.shape or not torch.equal(twin.to(parameter.dtype), parameter):
                return False
        elif not any(kind in parts for kind in _LORA):
            return False
        elif any(kind in parts for kind in ("lora_B", "lora_embedding_B")) and bool(parameter.detach().any()):
            return False
    return True


def copy_adapter(model: Any, adapter: str) -> dict[str, str]:
    """Add a frozen copy of ``adapter`` named :data:`REFERENCE`; the active adapter and what trains stay as they are.

    Returns:
        Name of each trained parameter -> name of its frozen copy.
    """
    if REFERENCE in model.peft_config:
        raise ValueError(f"the model already holds an adapter named {REFERENCE!r}; delete it, or pass reference='none'")
    flags = {p: p.requires_grad for p in model.parameters()}
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like would rewrite the base weights once more
    with torch.random.fork_rng(devices=_cuda_devices(model)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model.add_adapter(REFERENCE, config)
    own = adapter_parameters(model, adapter)
    theirs = adapter_parameters(model, REFERENCE)
    names = {}
    for name, parameter in own.items():
        mirrored = ".".join(REFERENCE if part == adapter else part for part in name.split("."))
        twin = theirs.get(mirrored)
        if twin is None or twin.shape != parameter.shape:
            raise ValueError(f"adapter parameter {name} could not be copied; pass an explicit reference model instead")
        if twin is parameter:
            continue
        twin.data = parameter.detach().clone()  # not copy_: peft chose the copy's dtype by its own rule
        names[name] = mirrored
    for parameter in theirs.values():
        parameter.requires_grad_(False)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return names


def _cuda_devices(model: nn.Module) -> Sequence[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def mix(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    """``reference <- (1 - weight) * reference + weight * policy`` for each pair (policy, reference)."""
    with torch.no_grad():
        for policy, reference in pairs:
            if weight == 1.0:
                reference.copy_(policy)
            else:
                reference.lerp_(policy.to(reference.dtype), weight)
