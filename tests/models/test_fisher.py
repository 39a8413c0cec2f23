"""Fisher-vector products and KL of real models against full logits differentiated twice, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlft.models import LoraSettings, Policy, add_lora, fisher
from rlft.trust_region import flatten, unflatten
from tests.models.oracle import alone, batch, close, perturb, trained_lora
from tests.tiny import FAMILIES, tiny_gpt2, tiny_llama, tiny_phi, tiny_qwen2

# Gemma 2's eager attention takes its softmax in float32 whatever the weights.
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "all weights": (lambda: tiny_llama(dtype=torch.float64), "matrix"),
    "tied head": (lambda: tiny_qwen2(dtype=torch.float64), "matrix"),
    "head with a bias": (lambda: tiny_phi(dtype=torch.float64), "matrix"),
    "soft cap": (lambda: FAMILIES["gemma2"](dtype=torch.float64), "matrix"),
    "scaled logits": (lambda: FAMILIES["cohere"](dtype=torch.float64), "matrix"),
    "absolute positions": (lambda: tiny_gpt2(dtype=torch.float64), "matrix"),
    "lora": (trained_lora, "matrix"),
    "lora on the head": (lambda: trained_lora(target_modules=["q_proj", "lm_head"]), "module"),
}


def trainable(policy: Policy) -> list[Tensor]:
    return [p for p in policy.parameters() if p.requires_grad]


def direction(weights: Sequence[Tensor], seed: int = 5) -> Tensor:
    size = sum(p.numel() for p in weights)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def move(weights: list[Tensor], by: Tensor) -> None:
    with torch.no_grad():
        for p, d in zip(weights, unflatten(by, weights), strict=True):
            p += d


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_product_is_the_hessian_of_the_exact_kl(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, path = CASES[name]
    monkeypatch.setattr(fisher, "_PIECE", 300)  # the head in pieces of a few rows
    policy, some = Policy(build()), batch()
    weights = trainable(policy)
    product = fisher.PolicyFisher(policy, some, weights, temperature=temperature)
    assert policy._scorer.path == path
    with sdpa_kernel(SDPBackend.MATH):
        logp = alone(policy.hf_model, some, temperature=temperature)
    old = logp.detach()
    kl = ((old.exp() * (old - logp)).sum(-1) * some.mask).sum()
    slope = torch.autograd.grad(kl, weights, create_graph=True, allow_unused=True)
    for seed in (5, 6):  # the graph lasts for any number of products
        v = unflatten(direction(weights, seed), weights)
        along = sum((g * d).sum() for g, d in zip(slope, v, strict=True) if g is not None)
        assert isinstance(along, Tensor)
        second = torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True)
        truth = flatten([torch.zeros_like(p) if h is None else h for p, h in zip(weights, second, strict=True)])
        with torch.no_grad():
            mine = flatten(product(v))
        assert float((mine - truth).norm() / truth.norm()) < (1e-7 if name == "soft cap" else 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_kl_to_a_moment_ago_is_exact(name: str) -> None:
    build, _ = CASES[name]
    policy, some = Policy(build()), batch()
    weights = trainable(policy)
    old = alone(policy.hf_model, some, temperature=0.7).detach()
    (then,) = fisher.remember(policy, [some])
    assert float(fisher.kl_from(then, policy, some, temperature=0.7).abs().max()) < 1e-12
    perturb(policy, size=0.05)
    new = alone(policy.hf_model, some, temperature=0.7).detach()
    truth = (old.exp() * (old - new)).sum(-1).where(some.completion_mask, 0.0)
    assert float(truth.max()) > 1e-3
    close(fisher.kl_from(then, policy, some, temperature=0.7), truth, 1e-9)
    assert all(p.grad is None for p in weights)


def test_half_of_the_curvature_is_the_kl_of_a_small_move() -> None:
    policy, some = Policy(trained_lora()), batch()
    weights = trainable(policy)
    v = direction(weights)
    with torch.no_grad():
        curvature = float(
            v @ flatten(fisher.PolicyFisher(policy, some, weights, temperature=1.0)(unflatten(v, weights)))
        )
    (then,) = fisher.remember(policy, [some])
    move(weights, 1e-7 * v)
    measured = float(fisher.kl_from(then, policy, some, temperature=1.0).where(some.mask, 0.0).sum())
    assert measured == pytest.approx(0.5e-14 * curvature, rel=1e-3)


def test_a_fresh_adapter_has_curvature_in_its_zero_factor_alone() -> None:
    policy, some = Policy(add_lora(tiny_llama(dtype=torch.float64), LoraSettings(r=2))), batch()
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    with torch.no_grad():
        parts = fisher.PolicyFisher(policy, some, weights, temperature=1.0)(unflatten(direction(weights), weights))
    for (name, _), part in zip(named, parts, strict=True):
        assert ("lora_B" in name) == bool(part.abs().max() > 0), name


def test_attention_without_a_second_derivative_is_named() -> None:
    policy = Policy(tiny_llama())
    assert fisher.why_not(policy) is None
    policy.hf_model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(fisher.why_not(policy))
