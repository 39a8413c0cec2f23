"""The least time that a GPU could take: operations counted from the model's shape, over what the device can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlft.models.scorer import unwrap

__all__ = ["Device", "ModelCost", "device_named", "model_cost"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do at most, dense (no sparsity).

    Attributes:
        half: bfloat16 or float16 matrix operations per second.
        single: float32 operations per second.
        bandwidth: bytes per second from its memory.
    """

    half: float
    single: float
    bandwidth: float


#: Part of ``torch.cuda.get_device_name()`` -> peak figures of the makers' data sheets. The first that fits is taken.
DEVICES: dict[str, Device] = {
    "B200": Device(2.25e15, 75e12, 8.0e12),
    "H200": Device(989e12, 67e12, 4.8e12),
    "H100 PCIe": Device(756e12, 51e12, 2.0e12),
    "H100": Device(989e12, 67e12, 3.35e12),
    "A100-SXM4-80GB": Device(312e12, 19.5e12, 2.039e12),
    "A100": Device(312e12, 19.5e12, 1.555e12),
    "L40S": Device(362e12, 91.6e12, 0.864e12),
    "L4": Device(121e12, 30.3e12, 0.3e12),
    "A10": Device(125e12, 31.2e12, 0.6e12),
    "V100": Device(125e12, 15.7e12, 0.9e12),
    "T4": Device(65e12, 8.1e12, 0.32e12),
}


def device_named(name: str) -> Device | None:
    """Peak figures of a device; None where they are not known."""
    words = name.replace("-", " ").split()
    for known, device in DEVICES.items():
        parts = known.replace("-", " ").split()
        if all(part in words for part in parts):
            return device
    return None


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Operations of one model; a multiply and an add are two.

    Attributes:
        trunk: of one token through all matrices but the head.
        pair: of attention, for one query against one key, all layers.
        head: of one scored token.
        bytes: of all weights.
        backward: operations of the trunk's backward pass over those of its forward: 2 where matrices train, 1 where
            adapters on frozen ones do.
        head_backward: the same of the head.
        half: whether matrices are multiplied in 16 bits.
    """

    trunk: float
    pair: float
    head: float
    bytes: float
    backward: float
    head_backward: float
    half: bool

    def forward(self, tokens: float, scored: float, length: float) -> float:
        """Operations of a forward pass over ``tokens`` in rows of about ``length``, of which ``scored`` get logits."""
        return tokens * (self.trunk + self.pair * length / 2) + scored * self.head

    def update(self, tokens: float, scored: float, length: float) -> float:
        """Operations of a forward and a backward pass. Attention costs twice its forward in the backward."""
        trunk = tokens * (self.trunk * (1 + self.backward) + self.pair * length / 2 * 3)
        return trunk + scored * self.head * (1 + self.head_backward)

    def peak(self, device: Device) -> float:
        """Operations per second that the device can do in this model's precision."""
        return device.half if self.half else device.single

    def decoding(self, device: Device, *, steps: float, tokens: float, length: float) -> float:
        """Least seconds to sample ``tokens`` in ``steps`` steps: all weights are read once a step, or it is arithmetic."""
        return max(steps * self.bytes / device.bandwidth, self.forward(tokens, tokens, length) / self.peak(device))


def model_cost(policy: Any, *, mixed_precision: str) -> ModelCost | None:
    """The cost of a policy from its config and matrices; None where the two do not say it (experts, quantised weights)."""
    base = unwrap(policy.hf_model)
    config = base.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    skipped = embeddings | ({id(head.weight)} if isinstance(head, nn.Linear) else set())
    matrices = [p for p in base.parameters() if p.ndim == 2 and id(p) not in skipped]
    if not matrices or not all(p.is_floating_point() for p in matrices):
        return None
    heads = int(getattr(config, "num_attention_heads", 0))
    width = int(getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    total = sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    head_weight = head.weight if isinstance(head, nn.Linear) else None
    dtypes = {p.dtype for p in matrices}
    return ModelCost(
        trunk=2.0 * total,
        pair=4.0 * heads * width * config.num_hidden_layers,
        head=2.0 * head_weight.numel() if head_weight is not None else 0.0,
        bytes=float(sum(p.numel() * p.element_size() for p in base.parameters())),
        backward=1.0 + trained / total,
        head_backward=2.0 if head_weight is not None and head_weight.requires_grad else 1.0,
        half=mixed_precision != "no" or bool(dtypes & {torch.bfloat16, torch.float16}),
    )
