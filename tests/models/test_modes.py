"""Gradient checkpointing, generation in the middle of training, and what each leaves behind."""

from __future__ import annotations

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.layout import build_rows
from tests.models.oracle import batch, close
from tests.tiny import FAMILIES, tiny_gpt2, tiny_llama

WANT = frozenset({"logps", "token_kl", "ref_logps", "values"})


def policies(checkpointing: bool, *, lora: bool, family: str = "llama") -> Policy:
    model = FAMILIES[family](dtype=torch.float64)
    policy = Policy(add_lora(model, LoraSettings(r=2)) if lora else model, critic="shared")
    if checkpointing:
        policy.enable_gradient_checkpointing()
    return policy


class Recomputed:
    """Counts how often a module's forward runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.calls += 1


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_recomputes_and_changes_nothing(family, lora, mode) -> None:
    data = batch()
    results = []
    for checkpointing in (False, True):
        policy = policies(checkpointing, lora=lora, family=family)
        getattr(policy, mode)()
        with torch.no_grad():
            policy.value_head.weight.fill_(0.1)
        layer = policy._scorer.base.base_model
        layer = layer.layers[0].mlp if family == "llama" else layer.h[0].mlp
        policy(data, want=frozenset({"logps"}))  # the self-check of first use
        counter = Recomputed(layer)
        out = policy(data, want=WANT)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        in_forward = counter.calls
        grads = torch.autograd.grad(sum(out[n].sum() for n in ("logps", "token_kl", "values")), parameters)
        assert counter.calls - in_forward == int(checkpointing)
        results.append((out, grads))
    (plain, plain_grads), (out, grads) = results
    for name in out:
        close(out[name], plain[name], 1e-12)
    for a, b in zip(grads, plain_grads, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_generate_between_forward_and_backward(build, lora) -> None:
    """transformers 36051: with checkpointing on, ``generate`` lost its cache and gave other ids."""
    model = build()
    ids = torch.randint(4, 99, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.eval().generate(ids, attention_mask=torch.ones_like(ids), **settings)
    policy = Policy(add_lora(model, LoraSettings(r=2)) if lora else model)
    policy.enable_gradient_checkpointing()
    policy.train()
    data = batch()
    out = policy(data, want=frozenset({"logps"}))["logps"]
    with policy.generating() as generator, torch.no_grad():
        assert not any(m.training for m in generator.modules())
        got = generator.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(got, expected)
    out.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    counter = Recomputed(policy._scorer.base.base_model.get_submodule("layers.0" if build is tiny_llama else "h.0"))
    policy(data, want=frozenset({"logps"}))["logps"].sum().backward()
    assert counter.calls == 1  # `__call__` once; the recompute runs inside the checkpoint
    assert any(m.training for m in policy.model.modules())  # checkpointing is on again


def test_a_caller_who_sets_modes_changes_nothing() -> None:
    """``model.train()`` or ``model.eval()`` by a generator: the next forward puts everything back."""
    policy, data = Policy(tiny_gpt2(resid_pdrop=0.5, attn_pdrop=0.5)), batch()
    expected = policy(data, want=frozenset({"logps"}))["logps"]
    policy.hf_model.train()
    assert torch.equal(policy(data, want=frozenset({"logps"}))["logps"], expected)
    policy.enable_gradient_checkpointing()
    policy.hf_model.eval()
    policy(data, want=frozenset({"logps"}))
    assert policy.hf_model.transformer.h[0].training
    assert not policy.hf_model.transformer.h[0].mlp.dropout.training


def test_layers_with_dropout_of_their_own_are_refused_under_checkpointing() -> None:
    model = tiny_llama()
    model.model.layers[0].residual_dropout = 0.1
    with pytest.raises(ValueError, match=r"applies residual_dropout=0\.1 itself"):
        Policy(model).enable_gradient_checkpointing()


def test_lora_dropout_that_would_do_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match="the adapter asks for dropout 0.25"):
        Policy(add_lora(tiny_llama(), LoraSettings(r=2, dropout=0.25)))
    policy = Policy(add_lora(tiny_llama(), LoraSettings(r=2, dropout=0.25)), dropout=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.3)
    data = batch()
    rows = build_rows(data)
    with torch.no_grad():
        quiet = policy(data, want=frozenset({"logps"}))["logps"]
    assert not torch.equal(policy(data, want=frozenset({"logps"}))["logps"], quiet)
    assert rows.targets.numel()
