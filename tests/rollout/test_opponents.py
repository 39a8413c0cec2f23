"""The mixture of policy and reference against full forward passes of both, its two ends, and the moving average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlft.models import LoraSettings, MovingAverage, Policy, add_lora
from rlft.rollout import AverageSampler, FastSampler, MixtureSampler, SamplingParams
from tests import tiny
from tests.rollout.test_samplers import PROMPTS, STOPS, flat

F64 = torch.float64
PLAIN = SamplingParams(16, stop_token_ids=STOPS)
WARM = SamplingParams(16, temperature=1.4, stop_token_ids=STOPS)


def shaken(model: Any, seed: int, scale: float = 0.3) -> Any:
    """The same model with every trained weight moved: a policy that has left its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def policies(kind: str) -> Policy:
    """A policy that differs from its reference, for every kind of reference."""
    if kind in ("adapter_off", "adapter_copy"):
        model = add_lora(tiny.tiny_llama(dtype=F64), LoraSettings(r=4))
        if kind == "adapter_copy":
            shaken(model, 3)
        policy = Policy(model, reference="auto")
    elif kind == "snapshot":
        policy = Policy(tiny.tiny_llama(dtype=F64))
    else:  # another family with another number of layers
        other = tiny.tiny_gpt2(dtype=F64, seed=5, n_layer=3).requires_grad_(False)
        policy = Policy(tiny.tiny_llama(dtype=F64), reference=other)
    assert policy.reference_kind == kind
    shaken(policy.model, 1)
    return policy


def both_logps(policy: Policy, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token log-probs ``[L, V]`` of policy and reference over one unpadded row."""
    row = torch.tensor([ids])
    with torch.no_grad():
        mine = policy.hf_model(row).logits[0].log_softmax(-1)
        with policy.reference_active():
            theirs = (policy.reference_model or policy.hf_model)(row).logits[0].log_softmax(-1)
    return mine, theirs


@pytest.mark.parametrize("params", [PLAIN, WARM], ids=["plain", "warm"])
@pytest.mark.parametrize("kind", ["adapter_off", "adapter_copy", "snapshot", "model"])
def test_logps_are_those_of_the_normalised_mixture(kind: str, params: SamplingParams) -> None:
    policy, a = policies(kind), 0.3
    out = MixtureSampler(policy, tiny.char_tokenizer(), a, max_batch=4).sample(PROMPTS, 3, params, seed=2)
    assert len({len(ids) for ids in out.completion_ids}) > 2, "rows end at many lengths"
    moved = 0.0
    for row, ids in enumerate(out.completion_ids):
        prompt = PROMPTS[row // 3]
        mine, theirs = both_logps(policy, prompt + ids)
        # pi^(1-a) ref^a of the tempered players, over its own sum: written out, not by adding logits
        weights = (mine / params.temperature).log_softmax(-1).exp() ** (1 - a)
        weights = weights * (theirs / params.temperature).log_softmax(-1).exp() ** a
        expected = (weights / weights.sum(-1, keepdim=True)).log()
        positions = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        exact = expected[positions, torch.tensor(ids)]
        torch.testing.assert_close(torch.tensor(out.logps[row], dtype=F64), exact, rtol=0, atol=3e-6)
        moved = max(moved, float((exact - mine[positions, torch.tensor(ids)]).abs().max()))
    assert moved > 0.1, "the mixture is another distribution than the policy"


def test_the_mixture_is_exact_in_float64() -> None:
    """The logits that the loop draws from, before they are rounded to the sampler's float32."""
    from transformers import DynamicCache

    from rlft.rollout.opponents import _Mixture

    policy, a = policies("snapshot"), 0.7
    mixture = _Mixture(MixtureSampler(policy, tiny.char_tokenizer(), a)._players())
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        cache = DynamicCache()
        columns = torch.arange(ids.shape[1])[None]
        found = mixture(ids, torch.ones_like(ids), columns, cache).logits[0, -1].log_softmax(-1)
    assert len(cache.layers) == 4
    mine, theirs = both_logps(policy, PROMPTS[2])
    expected = ((1 - a) * mine[-1] + a * theirs[-1]).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["adapter_off", "snapshot", "model"])
def test_at_its_ends_the_mixture_is_the_policy_and_the_reference(kind: str) -> None:
    policy, tok = policies(kind), tiny.char_tokenizer()
    found = MixtureSampler(policy, tok, 0.0).sample(PROMPTS, 3, WARM, seed=4)
    expected = FastSampler(policy.hf_model, tok, merge_limit_mb=0).sample(PROMPTS, 3, WARM, seed=4)
    assert found.completion_ids == expected.completion_ids
    assert flat(found.logps) == pytest.approx(flat(expected.logps), abs=1e-6)
    found = MixtureSampler(policy, tok, 1.0).sample(PROMPTS, 3, WARM, seed=4)
    if kind == "adapter_off":
        with policy.reference_active():
            expected = FastSampler(policy.hf_model, tok, merge_limit_mb=0).sample(PROMPTS, 3, WARM, seed=4)
    else:
        expected = FastSampler(policy.reference_model, tok).sample(PROMPTS, 3, WARM, seed=4)
    assert found.completion_ids == expected.completion_ids
    assert found.completion_ids != FastSampler(policy.hf_model, tok).sample(PROMPTS, 3, WARM, seed=4).completion_ids


def test_sampling_leaves_the_policy_as_it_was() -> None:
    policy = policies("adapter_off")
    batch = tiny.random_batch(seed=1)
    want = frozenset({"logps", "ref_logps"})
    before, training = policy(batch, want=want), policy.training
    MixtureSampler(policy, tiny.char_tokenizer(), 0.5).sample(PROMPTS, 2, PLAIN, seed=0)
    after = policy(batch, want=want)
    assert policy.training is training
    assert all(torch.equal(before[name], after[name]) for name in want)
    assert after["logps"].requires_grad


def test_what_cannot_be_mixed_is_refused() -> None:
    tok = tiny.char_tokenizer()
    with pytest.raises(ValueError, match="mixes in a reference, and this policy has none"):
        MixtureSampler(Policy(tiny.tiny_llama(), reference="none"), tok, 0.5)
    with pytest.raises(ValueError, match="mixture_coef must be"):
        MixtureSampler(Policy(tiny.tiny_llama()), tok, 1.5)
    with pytest.raises(ValueError, match="would never move"):
        MovingAverage(tiny.tiny_llama(), 1.0)
    with pytest.raises(ValueError, match="no trainable weights"):
        MovingAverage(tiny.tiny_llama().requires_grad_(False), 0.5)


# -- the moving average ---------------------------------------------------------------------------------------------------
def test_the_average_follows_by_hand_and_gives_the_weights_back() -> None:
    model = tiny.tiny_llama(dtype=F64)
    start = copy.deepcopy(dict(model.named_parameters()))
    average = MovingAverage(model, 0.75)
    expected = {name: p.detach().clone() for name, p in start.items()}
    for seed in (1, 2):
        shaken(model, seed)
        average.update()
        for name, p in model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-14, atol=1e-15)
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())
    other = MovingAverage(model, 0.75)
    other.load_state(average.state())
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in average.state().items())
    with pytest.raises(ValueError, match="the saved moving average does not fit"):
        other.load_state({})


@pytest.mark.parametrize("lora", [False, True])
def test_the_average_samples_like_a_model_with_its_weights(lora: bool) -> None:
    model = tiny.tiny_llama(dtype=F64)
    model = shaken(add_lora(model, LoraSettings(r=4)), 7) if lora else model
    average = MovingAverage(model, 0.5)
    twin = copy.deepcopy(model)
    shaken(model, 1)
    average.update()
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.lerp_(q, 0.5)
    tok = tiny.char_tokenizer()
    found = AverageSampler(FastSampler(model, tok), average).sample(PROMPTS, 2, WARM, seed=4)
    expected = FastSampler(twin, tok).sample(PROMPTS, 2, WARM, seed=4)
    assert found.completion_ids == expected.completion_ids
    assert found.completion_ids != FastSampler(model, tok).sample(PROMPTS, 2, WARM, seed=4).completion_ids
    assert len(average.state()) == sum(p.requires_grad for p in model.parameters())
