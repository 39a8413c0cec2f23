"""Which models :class:`rlft.rollout.llama_step.LlamaStep` knows: by their classes, their weights and what is attached to them.

A model is known when each of its modules is of the very class that was read, not of a subclass, a replacement or a
wrapper, and nothing hangs on a module that its forward would run. Everything else keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["plain", "unknown"]

#: Families with one structure: transformers' module name and the prefix of its classes.
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
#: Implementations of softmax attention; anything else registered under a name may be another function.
_ATTENTION = {"sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
#: Hooks that leave the output of a module as it is (while nothing is being recorded, and without gradients).
_HARMLESS = {
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
}


def plain(module: Any) -> Any:
    """The linear layer that a LoRA layer with merged (or switched off) adapters computes; another module as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def unknown(model: Any, *, longest: int) -> str | None:
    """Why a model's decode step cannot be computed by ``LlamaStep``, None where it can.

    Args:
        model: a transformers model.
        longest: tokens of the longest row that may arise, prompt included.
    """
    return next(_reasons(model, longest), None)


def _reasons(model: Any, longest: int) -> Iterator[str]:
    home = type(model).__module__
    family = next((f for f in _FAMILIES if home == f"transformers.models.{f}.modeling_{f}"), None)
    if family is None or type(model).__name__ != f"{_FAMILIES[family]}ForCausalLM":
        yield f"{type(model).__name__} is not among {', '.join(f'{p}ForCausalLM' for p in _FAMILIES.values())}"
        return
    yield from _classes(model, home, _FAMILIES[family])
    yield from _attached(model)
    yield from _weights(model)
    yield from _settings(model.config, longest)
    if torch.is_autocast_enabled(model.device.type):
        yield "autocast is on"


def _classes(model: Any, home: str, prefix: str) -> Iterator[str]:
    trunk = model.model
    expected: list[tuple[str, Any, str]] = [
        ("model", trunk, "Model"),
        ("model.norm", trunk.norm, "RMSNorm"),
        ("model.rotary_emb", trunk.rotary_emb, "RotaryEmbedding"),
    ]
    linears: list[tuple[str, Any]] = [("lm_head", model.lm_head)]
    for index, layer in enumerate(trunk.layers):
        name = f"model.layers.{index}"
        expected.append((name, layer, "DecoderLayer"))
        norms = [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
        norms += [(layer.self_attn, norm) for norm in ("q_norm", "k_norm") if hasattr(layer.self_attn, norm)]
        expected += [(f"{name}.self_attn", layer.self_attn, "Attention"), (f"{name}.mlp", layer.mlp, "MLP")]
        expected += [(f"{name}.{norm}", getattr(parent, norm), "RMSNorm") for parent, norm in norms]
        heads = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears += [(f"{name}.self_attn.{p}", getattr(layer.self_attn, p)) for p in heads]
        linears += [(f"{name}.mlp.{p}", getattr(layer.mlp, p)) for p in ("gate_proj", "up_proj", "down_proj")]
    for name, module, suffix in expected:
        if type(module).__module__ != home or type(module).__name__ != prefix + suffix:
            yield f"{name} is a {type(module).__name__}"
    if type(trunk.embed_tokens) is not torch.nn.Embedding:
        yield f"model.embed_tokens is a {type(trunk.embed_tokens).__name__}"
    for name, module in linears:
        if hasattr(module, "merged_adapters") and bool(module.merged_adapters) == bool(module.disable_adapters):
            yield f"{name} has an adapter that is not merged"
        elif type(plain(module)) is not torch.nn.Linear:
            yield f"{name} is a {type(plain(module)).__name__}"
    if len({module.variance_epsilon for _, module, suffix in expected if suffix == "RMSNorm"}) > 1:
        yield "its norms have several epsilons"
    attentions = [layer.self_attn for layer in trunk.layers]
    shapes = {(a.head_dim, a.scaling, *(len(plain(p).weight) for p in (a.q_proj, a.k_proj))) for a in attentions}
    if len(shapes) > 1:
        yield "its layers have heads of several shapes"
    if len(trunk.layers) != model.config.num_hidden_layers:  # the forward runs so many, however many there are
        yield f"it has {len(trunk.layers)} layers and its config says {model.config.num_hidden_layers}"


def _attached(model: Any) -> Iterator[str]:
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any((getattr(h, "__module__", ""), getattr(h, "__name__", "")) not in _HARMLESS for h in hooks):
            yield f"{name or 'the model'} has a forward hook"
        if "forward" in vars(module):
            yield f"the forward of {name or 'the model'} has been replaced"


def _weights(model: Any) -> Iterator[str]:
    first = model.lm_head.weight
    for name, tensor in model.named_parameters():
        if type(tensor.data) is not torch.Tensor:
            yield f"{name} is a {type(tensor.data).__name__}"
        elif not tensor.is_floating_point():
            yield f"{name} is quantised ({tensor.dtype})"
        elif "lora_" not in name and (tensor.dtype != first.dtype or tensor.device != first.device):
            yield f"{name} is {tensor.dtype} on {tensor.device}, and the head is {first.dtype} on {first.device}"


def _settings(config: Any, longest: int) -> Iterator[str]:
    attention = getattr(config, "_attn_implementation", None)
    if attention not in _ATTENTION:
        yield f"its attention is {attention!r}"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds) and longest > window:
        yield f"rows may reach {longest} tokens, and its attention window holds {window}"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            yield f"its config sets {name}"
