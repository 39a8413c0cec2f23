"""Borrowing a model from training for a moment of sampling, and giving it back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["check_context", "end_token_ids", "generating_model", "sampling_mode", "vocab_size"]


def generating_model(model: Any) -> Any:
    """The transformers model behind a PeftModel (its adapter layers are injected and stay active), else the model.

    Raises:
        ValueError: for a prompt-learning adapter, which works by changing inputs and not layers.
    """
    if not hasattr(model, "peft_config"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"sampling from a {model.active_peft_config.peft_type} adapter is not supported; "
            f"use LoRA or full fine-tuning"
        )
    return model.get_base_model()


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS, and those that the model's generation config names."""
    found: set[int] = set()
    config = getattr(generating_model(model), "generation_config", None)
    for source in (getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    return tuple(sorted(found))


def vocab_size(model: Any) -> int:
    """How many tokens a model knows."""
    return int(generating_model(model).config.get_text_config(decoder=True).vocab_size)


def check_context(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
    """Refuse prompts that the longest completion would push past the model's positions or that are no tokens of it."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    vocab = config.vocab_size
    for index, (ids, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if limit is not None and len(ids) + new > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_new_tokens={new} a row may reach "
                f"{len(ids) + new}, and the model has {limit} positions: lower max_new_tokens or shorten prompts"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(
                f"prompt {index} holds token {max(ids) if max(ids) >= vocab else min(ids)}, and the model knows 0 to "
                f"{vocab - 1}: is the tokenizer the model's?"
            )


@contextlib.contextmanager
def sampling_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradient inside; each module's own training flag is restored after, whatever happens.

    Evaluation mode also keeps gradient checkpointing, which forbids a KV cache, out of the way.

    Raises:
        ValueError: when the weights are sharded over processes. Rows end at different times on each, so forward passes
            that wait for one another would hang.
    """
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or parameter.numel() == 0:
            raise ValueError(
                f"parameter {name!r} is sharded over processes (FSDP or ZeRO-3), and sampling needs whole weights on "
                f"each: gather them first, use DDP, or sampler='vllm'"
            )
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
