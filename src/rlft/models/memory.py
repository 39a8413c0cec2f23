"""A rough estimate of the memory a run needs, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from rlft.models.scorer import unwrap
from rlft.ops import default_chunk

__all__ = ["memory_estimate"]

# Bytes of optimizer state per trainable element.
_OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "lion": 4, "sgd": 0}


def memory_estimate(
    model: nn.Module,
    *,
    tokens: int,
    completion_tokens: int | None = None,
    optimizer: Literal["adamw", "adamw_8bit", "lion", "sgd"] = "adamw",
    gradient_checkpointing: bool = False,
    differentiable: int = 1,
) -> dict[str, int]:
    """Bytes of one training step, by what they are for. Rough: expect the truth within a factor of two.

    Activations are counted per transformer layer and token as 6 D for norms and residuals, the projections' outputs
    and 3 intermediate vectors of the feed-forward layer, in the dtype of the embedding; attention scores are not stored
    (sdpa, flash). Logits never exist beyond a tile.

    Args:
        model: a :class:`~rlft.models.Policy`, a :class:`~rlft.models.RewardScorer` or a transformers model.
        tokens: tokens of one micro-batch, padding and prompts included.
        completion_tokens: those of them that are scored; None means all.
        optimizer: whose states are held per trainable element.
        gradient_checkpointing: keep one vector per layer and token, and the activations of one layer.
        differentiable: outputs of the head with a gradient (log-probs alone: 1; with exact KL: 2).

    Returns:
        ``weights, reference, gradients, optimizer, activations, head``, in bytes; the need is their sum.

    Raises:
        ValueError: for an unknown optimizer or a negative count.
    """
    if optimizer not in _OPTIMIZER_BYTES:
        raise ValueError(f"optimizer {optimizer!r} is unknown; known: {', '.join(sorted(_OPTIMIZER_BYTES))}")
    if tokens < 0:
        raise ValueError(f"tokens must be >= 0, got {tokens}")
    scored = tokens if completion_tokens is None else completion_tokens
    base = unwrap(getattr(model, "hf_model", model))
    config: Any = base.config.get_text_config()
    separate = getattr(model, "reference_model", None)
    reference = 0 if separate is None else _bytes(separate.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    embedding = base.get_input_embeddings().weight
    width = embedding.element_size()
    rows, columns = getattr(model, "chunk_size", None) or default_chunk(embedding.device)
    size, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(getattr(config, "num_attention_heads", 1))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or size // heads)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * size)
    per_layer = 6 * size + head_dim * (2 * heads + 2 * kv_heads) + 3 * inner
    kept = size * layers + per_layer if gradient_checkpointing else per_layer * layers
    tile = min(rows, max(scored, 1)) * min(columns, int(config.vocab_size)) * 4
    return {
        "weights": _bytes(model.parameters()) - reference,
        "reference": reference,
        "gradients": _bytes(trainable),
        "optimizer": sum(p.numel() for p in trainable) * _OPTIMIZER_BYTES[optimizer],
        "activations": tokens * width * kept,
        "head": 4 * tile + scored * size * 4 * differentiable,
    }


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
