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
        half: bfloat16 or float16 matrix operations per second, summed in float32.
        single: float32 operations per second.
        bandwidth: bytes per second from its memory.
        tf32: matrix operations per second of float32 rounded to TF32; 0 where there are none.
    """

    half: float
    single: float
    bandwidth: float
    tf32: float


def _device(half: float, single: float, bandwidth: float, *, tf32: bool = True) -> Device:
    """From the units of data sheets: TFLOP/s and GB/s. TF32 has half the rate of bfloat16 on all of them."""
    return Device(half * 1e12, single * 1e12, bandwidth * 1e9, half * 0.5e12 if tf32 else 0.0)


#: Words of ``torch.cuda.get_device_name()`` -> peak figures of the makers' data sheets. The first whose words are all there
#: is taken, so a part comes before the family. A product that is missing is unknown: its figures are not guessed.
DEVICES: dict[str, Device] = {
    "B200": _device(2250, 75, 8000),
    "H200 NVL": _device(835, 60, 4800),
    "H200": _device(989, 67, 4800),
    "GH200 144G": _device(990, 67, 4900),
    "GH200 480GB": _device(990, 67, 4000),
    "H100 PCIe": _device(756, 51, 2000),
    "H100 NVL": _device(835, 60, 3900),
    "H100 80GB HBM3": _device(989, 67, 3350),
    "H800": _device(989, 67, 3350),
    "H20": _device(148, 44, 4000),
    "A100 80GB PCIe": _device(312, 19.5, 1935),
    "A100 SXM4 80GB": _device(312, 19.5, 2039),
    "A100 SXM4 40GB": _device(312, 19.5, 1555),
    "A100 PCIE 40GB": _device(312, 19.5, 1555),
    "A40": _device(149.7, 37.4, 696),
    "A30": _device(165, 10.3, 933),
    "A10": _device(125, 31.2, 600),
    "L40S": _device(362, 91.6, 864),
    "L40": _device(181, 90.5, 864),
    "L4": _device(121, 30.3, 300),
    "RTX 6000 Ada": _device(364, 91.1, 960),
    "RTX A6000": _device(154.8, 38.7, 768),
    "RTX 5090": _device(209.5, 104.8, 1792),
    "RTX 4090": _device(165.2, 82.6, 1008),
    "RTX 3090": _device(71, 35.6, 936),
    "V100S PCIE": _device(130, 16.4, 1134, tf32=False),
    "V100 PCIE": _device(112, 14, 900, tf32=False),
    "V100 SXM2": _device(125, 15.7, 900, tf32=False),
    "T4": _device(65, 8.1, 320, tf32=False),
}
# Words of a smaller or faster product than the one whose name it bears, or of a slice of it.
_OTHERS = {"MIG", "Laptop", "Max", "D", "Ti", "SUPER", "vGPU", "GRID"}


def device_named(name: str) -> Device | None:
    """Peak figures of a device; None where they are not known."""
    words = set(name.replace("-", " ").split())
    if words & _OTHERS:
        return None
    return next((device for known, device in DEVICES.items() if set(known.split()) <= words), None)


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
        tf32: whether float32 matrices may be rounded to TF32.
    """

    trunk: float
    pair: float
    head: float
    bytes: float
    backward: float
    head_backward: float
    half: bool
    tf32: bool = False

    def forward(self, tokens: float, scored: float, length: float) -> float:
        """Operations of a forward pass over ``tokens`` in rows of about ``length``, of which ``scored`` get logits."""
        return tokens * (self.trunk + self.pair * length / 2) + scored * self.head

    def update(self, tokens: float, scored: float, length: float) -> float:
        """Operations of a forward and a backward pass. Attention costs twice its forward in the backward."""
        trunk = tokens * (self.trunk * (1 + self.backward) + self.pair * length / 2 * 3)
        return trunk + scored * self.head * (1 + self.head_backward)

    def peak(self, device: Device) -> float:
        """Operations per second that the device can do in this model's precision."""
        if self.half:
            return device.half
        return max(device.tf32, device.single) if self.tf32 else device.single

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
        tf32=torch.get_float32_matmul_precision() != "highest",
    )
