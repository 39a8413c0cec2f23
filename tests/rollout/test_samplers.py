"""Both back ends: against plain ``generate``, against each other, against a full forward pass; and what they leave behind."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

from rlft.rollout import FastSampler, SamplingParams, TransformersSampler
from tests import tiny

PROMPTS = [
    [random.Random(100 * i + j).randrange(4, 100) for j in range(length)] for i, length in enumerate([5, 1, 12, 5, 8])
]
STOPS = (11, 23, 37, 41, 59, 77)  # of 100 tokens: rows end at many lengths
SAMPLERS = {
    "transformers": (TransformersSampler, {}),
    "transformers, 3 rows at once": (TransformersSampler, {"max_batch": 3}),
    "builtin": (FastSampler, {}),
    "builtin, 4 slots": (FastSampler, {"max_batch": 4}),
    "builtin, 1 slot": (FastSampler, {"max_batch": 1}),
    "builtin, nothing merged": (FastSampler, {"merge_limit_mb": 0}),
    "builtin, 7 slots, one prompt per prefill": (FastSampler, {"max_batch": 7, "max_prefill_tokens": 1}),
}
MIXED = SamplingParams(
    20, temperature=1.3, top_k=60, top_p=0.95, min_p=0.001, repetition_penalty=1.2, stop_token_ids=STOPS
)


def make(kind, model, tokenizer=None):
    cls, options = SAMPLERS[kind]
    return cls(model, tokenizer or tiny.char_tokenizer(), **options)


def generate_alone(model, prompt, **settings):
    """transformers' greedy search on one prompt without padding."""
    config = GenerationConfig(do_sample=False, eos_token_id=[tiny.EOS_ID, *STOPS], pad_token_id=0, **settings)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, len(prompt) :
        ].tolist()


@pytest.mark.parametrize("kind", ["transformers", "builtin", "builtin, 4 slots"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_greedy_is_generate_token_for_token(family, kind):
    model = tiny.FAMILIES[family](dtype=torch.float64)
    out = make(kind, model).sample(PROMPTS, 2, SamplingParams(24, greedy=True, stop_token_ids=STOPS), seed=0)
    for row, ids in enumerate(out.completion_ids):
        assert ids == generate_alone(model, PROMPTS[row // 2], max_new_tokens=24)
        assert out.finished[row] == (ids[-1] in (*STOPS, tiny.EOS_ID))
        assert out.finished[row] or len(ids) == 24
    assert len(out) == 10
    if family == "llama":  # the others repeat themselves for ever
        assert len({len(ids) for ids in out.completion_ids}) > 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_back_ends_draw_the_same_rows_in_any_batching(family):
    # Gemma 2's eager attention gives NaN for padded float64 rows: its float64 mask overflows in a float32 softmax
    model = tiny.FAMILIES[family](dtype=torch.float32 if family == "gemma2" else torch.float64)
    expected = make("transformers", model).sample(PROMPTS, 3, MIXED, seed=5)
    assert any(expected.finished)
    assert len({tuple(ids) for ids in expected.completion_ids}) > 12
    for kind in list(SAMPLERS)[1:] if family == "llama" else ["builtin, 4 slots"]:
        found = make(kind, model).sample(PROMPTS, 3, MIXED, seed=5)
        assert found.completion_ids == expected.completion_ids, kind
        assert found.finished == expected.finished
        assert flat(found.logps) == pytest.approx(flat(expected.logps), rel=0, abs=2e-6)


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("kind", ["transformers", "builtin", "builtin, 4 slots"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_logps_are_those_of_the_distribution_sampled_from(family, kind):
    """Recomputed by one unpadded forward per row, transformers' filters applied to each position."""
    model = tiny.FAMILIES[family](dtype=torch.float64)
    out = make(kind, model).sample(PROMPTS, 2, MIXED, seed=1)
    filters = [
        hf.RepetitionPenaltyLogitsProcessor(1.2),
        hf.TemperatureLogitsWarper(1.3),
        hf.TopKLogitsWarper(60),
        hf.TopPLogitsWarper(0.95),
        hf.MinPLogitsWarper(0.001),
    ]
    for row, ids in enumerate(out.completion_ids):
        full = torch.tensor([PROMPTS[row // 2] + ids])
        with torch.no_grad():
            logits = model(full).logits[0].float()
        start = len(PROMPTS[row // 2])
        for t, token in enumerate(ids):
            scores = logits[start + t - 1][None]
            for each in filters:
                scores = each(full[:, : start + t], scores)
            assert out.logps[row][t] == pytest.approx(scores.log_softmax(-1)[0, token].item(), abs=3e-6)


@pytest.mark.parametrize("kind", ["transformers", "builtin, 4 slots"])
def test_samples_follow_the_distribution(kind):
    """The second token given the first, over 3,000 rows: chi-square against the model's own probabilities."""
    model = tiny.tiny_llama()
    out = make(kind, model).sample([[7, 8, 9]], 3000 if kind == "transformers" else 1500, SamplingParams(1), seed=3)
    with torch.no_grad():
        probs = model(torch.tensor([[7, 8, 9]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor(flat(out.completion_ids)), minlength=tiny.VOCAB).double()
    expected = probs * counts.sum()
    common = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum().item()
    rest = expected[~common].sum().item()
    chi2 += (counts[~common].sum().item() - rest) ** 2 / rest
    freedom = int(common.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    assert freedom > 10


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_the_seed_decides_and_nothing_else(kind):
    model = tiny.tiny_llama()
    sampler = make(kind, model)
    params = SamplingParams(10)
    torch.manual_seed(1)
    first = sampler.sample(PROMPTS, 2, params, seed=1, weight_version=9)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert sampler.sample(PROMPTS, 2, params, seed=1, weight_version=9) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert first.weight_version == 9
    other = sampler.sample(PROMPTS, 2, params, seed=2)
    assert sum(a == b for a, b in zip(first.completion_ids, other.completion_ids, strict=True)) <= 1
    # a prompt's first samples stay when more prompts or samples are asked for
    more = sampler.sample([*PROMPTS, [50]], 3, params, seed=1)
    assert [more.completion_ids[3 * p + k] for p in range(5) for k in range(2)] == first.completion_ids


@pytest.mark.parametrize("kind", ["transformers", "builtin, 4 slots"])
def test_the_end_token_is_kept_and_nothing_follows(kind):
    model = tiny.tiny_llama()
    everything = tuple(range(tiny.VOCAB))
    out = make(kind, model).sample(PROMPTS, 2, SamplingParams(9, stop_token_ids=everything), seed=0)
    assert [len(ids) for ids in out.completion_ids] == [1] * 10
    assert all(out.finished)
    out = make(kind, model).sample(PROMPTS, 2, SamplingParams(1), seed=0)
    assert [len(ids) for ids in out.completion_ids] == [1] * 10
    assert out.finished == [ids[-1] == tiny.EOS_ID for ids in out.completion_ids]
    out = make(kind, model).sample(PROMPTS, 4, SamplingParams(60, stop_token_ids=STOPS), seed=0)
    for ids, logps, finished in zip(out.completion_ids, out.logps, out.finished, strict=True):
        ends = [t for t, token in enumerate(ids) if token in (*STOPS, tiny.EOS_ID)]
        assert ends == ([len(ids) - 1] if finished else [])
        assert finished or len(ids) == 60
        assert len(ids) == len(logps)
        assert all(-60 < value <= 1e-6 for value in logps)


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_a_pad_that_is_the_eos_and_no_pad_at_all(kind):
    model = tiny.tiny_gpt2(dtype=torch.float64)
    params = SamplingParams(15, stop_token_ids=STOPS)
    expected = make(kind, model).sample(PROMPTS, 2, params, seed=0)
    same = tiny.char_tokenizer()
    same.pad_token = same.eos_token
    for tokenizer in (same, tiny.char_tokenizer(pad=False)):
        found = make(kind, model, tokenizer).sample(PROMPTS, 2, params, seed=0)
        assert found.completion_ids == expected.completion_ids
        assert flat(found.logps) == pytest.approx(flat(expected.logps), abs=1e-9)


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_a_penalty_does_not_punish_padding(kind):
    """The padding id occurs in no prompt: the row must be what it is alone."""
    model = tiny.tiny_llama(dtype=torch.float64)
    params = SamplingParams(6, repetition_penalty=3.0)
    together = make(kind, model).sample([[5, 6], [7] * 9], 1, params, seed=4)
    alone = make(kind, model).sample([[5, 6]], 1, params, seed=4)
    assert together.completion_ids[0] == alone.completion_ids[0]
    assert together.logps[0] == pytest.approx(alone.logps[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_the_models_own_generation_defaults_do_not_leak_in(kind):
    plain, odd = tiny.tiny_llama(), tiny.tiny_llama()
    odd.generation_config.update(
        top_k=1, repetition_penalty=9.0, min_new_tokens=5, do_sample=True, suppress_tokens=[50]
    )
    before = odd.generation_config.to_dict()
    params = SamplingParams(10, stop_token_ids=STOPS)
    assert make(kind, odd).sample(PROMPTS, 2, params, seed=0) == make(kind, plain).sample(PROMPTS, 2, params, seed=0)
    assert odd.generation_config.to_dict() == before


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_every_eos_of_the_model_ends_a_row(kind):
    model = tiny.tiny_llama()
    model.generation_config.eos_token_id = [tiny.EOS_ID, *STOPS]
    out = make(kind, model).sample(PROMPTS, 4, SamplingParams(60), seed=0)
    assert {ids[-1] for ids in out.completion_ids} & set(STOPS)


# -- what sampling leaves behind --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_within_a_training_step(kind):
    """Dropout on, gradient checkpointing on, some modules frozen in evaluation mode: all as before afterwards."""
    quiet, model = tiny.tiny_gpt2(), tiny.tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    loss = model(torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss
    params = SamplingParams(8)
    out = make(kind, model).sample(PROMPTS, 2, params, seed=0)
    assert out.completion_ids == make(kind, quiet).sample(PROMPTS, 2, params, seed=0).completion_ids
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert torch.is_grad_enabled()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["transformers", "builtin, 4 slots"])
def test_poll_can_interrupt_and_everything_is_restored(kind):
    class Signal(Exception):
        pass

    model = tiny.tiny_llama().train()
    config = model.generation_config
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 7:
            raise Signal

    with pytest.raises(Signal):
        make(kind, model).sample(PROMPTS, 2, SamplingParams(50), seed=0, poll=poll)
    assert len(calls) == 7
    assert all(module.training for module in model.modules())
    assert model.generation_config is config
    assert torch.is_grad_enabled()


def lora(model, **settings):
    from rlft.models import LoraSettings, add_lora

    peft_model = add_lora(model, LoraSettings(r=4, **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return peft_model


@pytest.mark.parametrize("kind", ["transformers", "builtin", "builtin, nothing merged"])
def test_a_peft_model_samples_with_its_adapter_and_live_weights(kind):
    params = SamplingParams(12, stop_token_ids=STOPS)
    base = make(kind, tiny.tiny_llama()).sample(PROMPTS, 2, params, seed=0)
    model = lora(tiny.tiny_llama(), dropout=0.5).train()
    sampler = make(kind, model)
    before = {
        name: (parameter, parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()
    }
    adapted = sampler.sample(PROMPTS, 2, params, seed=0)
    for name, parameter in model.named_parameters():
        old, address, value = before[name]
        assert parameter is old
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())
    with model.disable_adapter():
        assert sampler.sample(PROMPTS, 2, params, seed=0).completion_ids == base.completion_ids
    merged = make(kind, lora(tiny.tiny_llama()).merge_and_unload()).sample(PROMPTS, 2, params, seed=0)
    assert adapted.completion_ids == merged.completion_ids != base.completion_ids
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert sampler.sample(PROMPTS, 2, params, seed=0).completion_ids == base.completion_ids


# -- requests that are refused ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["transformers", "builtin"])
@pytest.mark.parametrize(
    ("prompts", "n", "length", "match"),
    [
        ([], 1, 5, "at least one prompt"),
        ([[5], []], 1, 5, "prompt 1 is empty"),
        ([[5]], 0, 5, "n, the completions per prompt, must be an integer >= 1"),
        ([[5], [5] * 250], 1, 7, r"prompt 1 has 250 tokens.*may reach 257, and the model has 256 positions"),
        ([[5, 100]], 1, 5, r"prompt 0 holds token 100, and the model knows 0 to 99"),
        ([[-100, 5]], 1, 5, "prompt 0 holds token -100"),
    ],
)
def test_bad_requests(kind, prompts, n, length, match):
    with pytest.raises(ValueError, match=match):
        make(kind, tiny.tiny_gpt2()).sample(prompts, n, SamplingParams(length), seed=0)


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_a_broken_model_is_named(kind):
    model = tiny.tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="have no finite maximum"):
        make(kind, model).sample(PROMPTS, 1, SamplingParams(5), seed=0)


@pytest.mark.parametrize("kind", ["transformers", "builtin"])
def test_sharded_weights_are_refused(kind):
    """Each process would run another number of forward passes, and sharded ones wait for each other: a hang."""
    model = tiny.tiny_llama()
    model.model.norm.weight = torch.nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves of a parameter
    with pytest.raises(ValueError, match=r"'model.norm.weight' is sharded over processes"):
        make(kind, model).sample(PROMPTS, 1, SamplingParams(5), seed=0)
