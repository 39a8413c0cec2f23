"""Policies, references, critics and reward models, and how they are loaded. Needs transformers; LoRA needs peft."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "LoraSettings": "lora",
    "ModelReward": "reward",
    "MovingAverage": "average",
    "Policy": "policy",
    "RewardScorer": "reward",
    "TrainableReport": "lora",
    "add_lora": "lora",
    "check_tokenizer": "tokenizer",
    "check_trainable": "lora",
    "load_adapter": "loading",
    "load_causal_lm": "loading",
    "load_sequence_classifier": "loading",
    "load_tokenizer": "tokenizer",
    "memory_estimate": "memory",
}

__all__ = [
    "LoraSettings",
    "ModelReward",
    "MovingAverage",
    "Policy",
    "RewardScorer",
    "TrainableReport",
    "add_lora",
    "check_tokenizer",
    "check_trainable",
    "load_adapter",
    "load_causal_lm",
    "load_sequence_classifier",
    "load_tokenizer",
    "memory_estimate",
]

if TYPE_CHECKING:
    from rlft.models.average import MovingAverage
    from rlft.models.loading import load_adapter, load_causal_lm, load_sequence_classifier
    from rlft.models.lora import LoraSettings, TrainableReport, add_lora, check_trainable
    from rlft.models.memory import memory_estimate
    from rlft.models.policy import Policy
    from rlft.models.reward import ModelReward, RewardScorer
    from rlft.models.tokenizer import check_tokenizer, load_tokenizer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"rlft.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'rlft.models' has no attribute {name!r}")
