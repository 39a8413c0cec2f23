"""The memory estimate: exact where it can be, in the right order of size where it cannot."""

from __future__ import annotations

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora, memory_estimate
from tests.models.oracle import batch
from tests.tiny import VOCAB, tiny_gpt2, tiny_llama


def test_weights_gradients_and_states_are_counted_exactly() -> None:
    model = tiny_llama()
    n = sum(p.numel() for p in model.parameters())
    made = memory_estimate(model, tokens=100)
    assert (made["weights"], made["gradients"], made["optimizer"], made["reference"]) == (4 * n, 4 * n, 8 * n, 0)
    assert memory_estimate(model, tokens=100, optimizer="sgd")["optimizer"] == 0
    policy = Policy(model)
    assert memory_estimate(policy, tokens=1)["reference"] == memory_estimate(policy, tokens=1)["weights"] == 4 * n
    lora = add_lora(tiny_llama(dtype=torch.bfloat16), LoraSettings(r=2))
    adapter = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    made = memory_estimate(Policy(lora), tokens=100)
    assert (made["weights"], made["gradients"], made["optimizer"]) == (2 * n + 4 * adapter, 4 * adapter, 8 * adapter)
    assert made["reference"] == 0


def test_activations_are_within_a_factor_of_two() -> None:
    """Against the bytes autograd really keeps for a batch, weights left out."""
    for model in (tiny_llama(), tiny_gpt2()):
        data = batch(groups=8, prompt_lengths=(30, 30), lengths=(10, 10))
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t: torch.Tensor, kept=kept, weights=weights) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        policy = Policy(model, reference="none")
        policy(data, want=frozenset({"logps"}))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = policy(data, want=frozenset({"logps"}))
        made = memory_estimate(policy, tokens=16 * 40, completion_tokens=160)
        real = sum(kept.values())
        assert 0.5 < (made["activations"] + made["head"] - 4 * 160 * VOCAB * 4) / real < 2.0
        assert out["logps"].requires_grad


def test_checkpointing_and_tokens_scale_as_they_should() -> None:
    model = tiny_llama(num_hidden_layers=8)
    plain = memory_estimate(model, tokens=1000)["activations"]
    assert memory_estimate(model, tokens=2000)["activations"] == 2 * plain
    assert memory_estimate(model, tokens=1000, gradient_checkpointing=True)["activations"] < plain / 4
    with pytest.raises(ValueError, match="optimizer 'adam' is unknown; known: adamw"):
        memory_estimate(model, tokens=1, optimizer="adam")
    with pytest.raises(ValueError, match="tokens must be >= 0"):
        memory_estimate(model, tokens=-1)
