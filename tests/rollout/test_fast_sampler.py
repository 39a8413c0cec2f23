"""What makes the built-in loop fast: each prompt once, no finished row computed, slots refilled; and its limits."""

from __future__ import annotations

import random

import pytest
import torch

from rlft.rollout import FastSampler, SamplingParams, TransformersSampler, make_sampler
from rlft.rollout.fast_sampler import unsupported
from rlft.rollout.row_cache import RowCache
from tests import tiny

STOPS = tuple(range(40, 50))
PROMPTS = [[random.Random(100 * i + j).randrange(4, 40) for j in range(4 + 3 * i)] for i in range(6)]


def counted(model):
    """Shapes of input_ids of every forward pass."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_work_is_one_prefill_per_prompt_and_one_row_per_token():
    model = tiny.tiny_llama()
    shapes = counted(model)
    params = SamplingParams(40, stop_token_ids=STOPS)
    out = FastSampler(model, tiny.char_tokenizer(), max_batch=8).sample(PROMPTS, 8, params, seed=0)
    prefills = [shape for shape in shapes if shape[1] > 1]
    steps = [rows for rows, width in shapes if width == 1]
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    # every token but a row's first comes from exactly one row of one step: nothing finished is ever computed
    assert sum(steps) == sum(len(ids) - 1 for ids in out.completion_ids)
    assert max(steps) == 8
    lengths = [len(ids) for ids in out.completion_ids]
    assert len(set(lengths)) > 10
    # slots are refilled: far fewer steps than the longest row of each batch of 8 would need
    assert len(steps) < 0.75 * sum(max(lengths[k : k + 8]) for k in range(0, 48, 8))


def test_groups_larger_than_the_slots_prefill_once():
    model = tiny.tiny_llama()
    shapes = counted(model)
    FastSampler(model, tiny.char_tokenizer(), max_batch=3).sample(PROMPTS[:2], 20, SamplingParams(6), seed=0)
    assert sum(rows for rows, width in shapes if width > 1) == 2


def test_prefills_respect_the_token_limit():
    model = tiny.tiny_llama()
    shapes = counted(model)
    FastSampler(model, tiny.char_tokenizer(), max_prefill_tokens=30).sample(PROMPTS, 2, SamplingParams(2), seed=0)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert all(rows * width <= 30 or rows == 1 for rows, width in prefills)
    assert sum(rows for rows, _ in prefills) == 6


@pytest.mark.parametrize("trial", range(8))
def test_random_schedules_equal_the_other_back_end(trial):
    """Random prompts, lengths, slots: rows come, go, move and are re-laid; the result is that of plain generation."""
    rng = random.Random(trial)
    model = tiny.FAMILIES[rng.choice(["llama", "gpt2", "mistral"])](seed=trial, dtype=torch.float64)
    prompts = [[rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 5, 30]))] for _ in range(rng.randint(1, 7))]
    stops = tuple(rng.sample(range(4, 100), rng.choice([0, 3, 10])))
    params = SamplingParams(rng.choice([1, 2, 17, 40]), stop_token_ids=stops, temperature=rng.choice([0.7, 1.5]))
    n = rng.randint(1, 6)
    fast = FastSampler(
        model, tiny.char_tokenizer(), max_batch=rng.randint(1, 12), max_prefill_tokens=rng.randint(1, 200)
    )
    expected = TransformersSampler(model, tiny.char_tokenizer()).sample(prompts, n, params, seed=trial)
    assert fast.sample(prompts, n, params, seed=trial).completion_ids == expected.completion_ids


def test_the_cache_against_a_list_of_rows():
    """Admissions, steps, moves and re-layouts on random numbers, against plain Python lists of tensors."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    rng = random.Random(0)
    cache, rows = RowCache(1, 5), []
    for _ in range(200):
        action = rng.choice(["admit", "step", "step", "step", "drop"])
        if action == "admit" and len(rows) < 5:
            width = rng.randint(1, 9)
            prefilled = DynamicCache()
            keys = torch.randn(2, 3, width, 4)
            prefilled.update(keys, keys + 1, 0)
            lengths = [rng.randint(1, width) for _ in range(2)]
            source = [rng.randrange(2) for _ in range(rng.randint(1, 5 - len(rows)))]
            needed = max([len(row) for row in rows] + [lengths[s] for s in source])
            columns = max(needed, cache.columns if rows else 0) + rng.choice([0, 0, 2])
            cache.admit(prefilled, torch.tensor(source), columns=columns, reserve=rng.choice([0, 3]))
            rows += [list(keys[s, :, width - lengths[s] :].unbind(1)) for s in source]
        elif action == "step" and rows:
            new = torch.randn(len(rows), 3, 1, 4)
            cache.update(new, new + 1, 0)
            for row, key in zip(rows, new[:, :, 0], strict=True):
                row.append(key)
        elif action == "drop" and rows:
            gone = sorted(rng.sample(range(len(rows)), rng.randint(1, len(rows))))
            left = len(rows) - len(gone)
            target = [slot for slot in gone if slot < left]
            source = [slot for slot in range(left, len(rows)) if slot not in gone]
            cache.move(torch.tensor(source, dtype=torch.long), torch.tensor(target, dtype=torch.long), left)
            for s, t in zip(source, target, strict=True):
                rows[t] = rows[s]
            del rows[left:]
            if rows and rng.random() < 0.5:
                cache.relayout(max(len(row) for row in rows), reserve=0)
        for slot, row in enumerate(rows):
            expected = torch.stack(row, dim=1)
            assert torch.equal(cache.layers[0].keys[slot, :, -len(row) :], expected)
            assert torch.equal(cache.layers[0].values[slot, :, -len(row) :], expected + 1)
        if rows:
            assert cache.get_seq_length() == cache.columns
            assert torch.isfinite(cache.layers[0].keys).all()  # masked columns too: 0 times NaN is NaN


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("MambaConfig", "its state is no key-value cache|layers of type"),
        ("T5Config", "encoder-decoder"),
    ],
)
def test_models_without_rows_of_keys_and_values_are_refused(config, reason):
    import transformers

    if config == "MambaConfig":
        settings = transformers.MambaConfig(vocab_size=50, hidden_size=8, state_size=4, num_hidden_layers=1)
        model = transformers.MambaForCausalLM(settings)
    else:
        settings = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(settings)
    with pytest.raises(ValueError, match=rf"cannot run this model: .*({reason}).*use the 'transformers' sampler"):
        FastSampler(model, tiny.char_tokenizer())
    with pytest.raises(ValueError, match="cannot run this model"):
        make_sampler("builtin", model, tiny.char_tokenizer())
    assert isinstance(make_sampler("auto", model, tiny.char_tokenizer()), TransformersSampler)


def test_rotary_positions_that_depend_on_the_batch_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic rotary positions depend on the batch" in unsupported(tiny.tiny_llama(rope_parameters=rope))
    for build in tiny.FAMILIES.values():
        assert unsupported(build()) is None


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny.tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for name in ("builtin", "transformers"):
        with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter is not supported; use LoRA"):
            make_sampler(name, model, tiny.char_tokenizer())


def test_make_sampler():
    model, tokenizer = tiny.tiny_llama(), tiny.char_tokenizer()
    assert isinstance(make_sampler("auto", model, tokenizer), FastSampler)
    sampler = make_sampler("transformers", model, tokenizer, max_batch=3)
    assert isinstance(sampler, TransformersSampler)
    assert sampler.max_batch == 3
    with pytest.raises(ValueError, match="sampler 'bultin' is unknown; did you mean 'builtin'"):
        make_sampler("bultin", model, tokenizer)
    with pytest.raises(ValueError, match="FastSampler has no option 'max_bach'; did you mean 'max_batch'"):
        make_sampler("builtin", model, tokenizer, max_bach=3)
    with pytest.raises(ValueError, match="max_batch must be >= 1"):
        make_sampler("builtin", model, tokenizer, max_batch=0)


@pytest.mark.parametrize(
    ("dtype", "limit", "merged"), [(torch.float32, 1, True), (torch.float32, 0.001, False), (torch.bfloat16, 1, False)]
)
def test_adapters_are_merged_while_sampling_if_that_is_exact_and_fits(dtype, limit, merged):
    from rlft.models import LoraSettings, add_lora

    model = add_lora(tiny.tiny_llama(dtype=dtype), LoraSettings(r=2))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(layer.merged))
    sampler = FastSampler(model, tiny.char_tokenizer(), merge_limit_mb=limit)

    class Signal(Exception):
        pass

    def poll():
        if len(seen) > 3:
            raise Signal

    with pytest.raises(Signal):
        sampler.sample(PROMPTS, 2, SamplingParams(20), seed=0, poll=poll)
    assert set(seen) == {merged}
    assert not layer.merged  # undone although sampling was interrupted
