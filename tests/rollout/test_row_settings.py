"""Settings per request: a row is what it would be if every request had its settings, to the bit in the filters."""

from __future__ import annotations

import random

import pytest
import torch

from rlft.rollout import AverageSampler, FastSampler, MixtureSampler, SamplingParams, TransformersSampler
from rlft.rollout.draw import draw, filter_logits, greedy
from rlft.rollout.randomness import row_keys, uniforms
from rlft.rollout.row_settings import RowSettings
from rlft.rollout.stop_strings import StopStrings
from tests import tiny
from tests.rollout.test_samplers import PROMPTS, STOPS

#: One for each of PROMPTS: every setting differs somewhere, two are the same, one uses every filter.
MANY = [
    SamplingParams(
        20, temperature=1.3, top_k=60, top_p=0.95, min_p=0.001, repetition_penalty=1.2, stop_token_ids=STOPS
    ),
    SamplingParams(7, greedy=True),
    SamplingParams(31, stop_token_ids=STOPS[:2]),
    SamplingParams(7, greedy=True),
    SamplingParams(12, temperature=0.7, top_k=3, stop_token_ids=(50, 60, 70)),
]
SETTINGS = [
    *MANY,
    SamplingParams(1),
    SamplingParams(5, top_p=0.5),
    SamplingParams(5, top_p=1e-6),
    SamplingParams(5, min_p=0.3, temperature=2.0),
    SamplingParams(5, top_k=10**6),
    SamplingParams(5, greedy=True, repetition_penalty=1.7),
    SamplingParams(5, repetition_penalty=0.6, top_k=1),
]


NO_TEXT = StopStrings(None, 0)  # no request has stop strings: it is not read


def rows_of(out, prompt, n):
    here = slice(prompt * n, (prompt + 1) * n)
    return out.completion_ids[here], out.logps[here], out.finished[here]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("slots", [2, 7])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # by the sampler's own step, and by the model's modules
def test_each_request_is_what_it_is_under_its_settings_alone(family, slots, n):
    """Refilled slots, rows that move, prompts that are shared: none of it mixes one request's settings into another's."""
    model = tiny.FAMILIES[family]().to(torch.float64)
    prefill = 1 if slots == 7 else 8192  # rows of one prompt, or of many, come in at once
    sampler = FastSampler(model, tiny.char_tokenizer(), max_batch=slots, max_prefill_tokens=prefill)
    mixed = sampler.sample(PROMPTS, n, MANY, seed=3)
    assert (sampler.not_own_step is None) == (family == "llama")
    for prompt, params in enumerate(MANY):
        ids, logps, finished = rows_of(mixed, prompt, n)
        expected = rows_of(sampler.sample(PROMPTS, n, params, seed=3), prompt, n)
        assert ids == expected[0]
        assert finished == expected[2]
        for found, right in zip(logps, expected[1], strict=True):
            assert found == pytest.approx(right, abs=2e-6)  # logits reach the filters in float32
    assert {len(ids) for ids in mixed.completion_ids} > {7}


@pytest.mark.parametrize("trial", range(6))
def test_random_requests_equal_the_other_back_end(trial):
    """The other one runs each setting in batches of its own, through transformers' filters."""
    rng = random.Random(trial)
    model = tiny.FAMILIES[rng.choice(["llama", "gpt2", "mistral"])](seed=trial).to(torch.float64)
    prompts = [[rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 5, 30]))] for _ in range(rng.randint(2, 7))]
    params = [rng.choice(SETTINGS) for _ in prompts]
    n = rng.randint(1, 6)
    fast = FastSampler(model, tiny.char_tokenizer(), max_batch=rng.randint(1, 12))
    expected = TransformersSampler(model, tiny.char_tokenizer(), max_batch=5).sample(prompts, n, params, seed=trial)
    found = fast.sample(prompts, n, params, seed=trial)
    assert found.completion_ids == expected.completion_ids
    assert found.finished == expected.finished
    for left, right in zip(found.logps, expected.logps, strict=True):
        assert left == pytest.approx(right, abs=3e-6)


def test_log_probs_are_those_of_each_requests_temperature():
    model = tiny.tiny_llama(dtype=torch.float64)
    params = [SamplingParams(9, temperature=t) for t in (0.5, 1.0, 1.5, 2.0)] + [SamplingParams(9, greedy=True)]
    out = FastSampler(model, tiny.char_tokenizer(), max_batch=3).sample(PROMPTS, 1, params, seed=0)
    for row, (ids, logps) in enumerate(zip(out.completion_ids, out.logps, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[row] + ids])).logits[0, len(PROMPTS[row]) - 1 : -1]
        right = (logits / params[row].temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert logps == pytest.approx(right.tolist(), abs=3e-6)


def test_requests_share_one_loop(monkeypatch):
    """As many steps as the longest row has tokens, not as many as all settings together."""
    model = tiny.tiny_gpt2()
    sampler = FastSampler(model, tiny.char_tokenizer())
    forwards, own = [], model.forward

    def forward(*args, input_ids, **kwargs):
        forwards.append(tuple(input_ids.shape))
        return own(*args, input_ids=input_ids, **kwargs)

    forward.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(model, "forward", forward)
    params = [SamplingParams(length, temperature=1.0 + length / 50) for length in (4, 9, 14, 19, 24)]
    out = sampler.sample(PROMPTS, 1, params, seed=0)
    longest = max(map(len, out.completion_ids))
    assert len(forwards) == longest  # one prefill, and a step for every further token of the longest row
    assert forwards[0] == (5, 12)


def test_filters_and_draws_row_by_row_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 60, 700
    each = [SETTINGS[i % len(SETTINGS)] for i in range(rows)]
    random.Random(0).shuffle(each)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    seen = torch.rand(rows, vocab, generator=generator) < 0.2
    keys = row_keys(0, rows, 1)
    count = torch.randint(0, 50, (rows,), generator=generator)
    settings = RowSettings(each, 1, end_ids=(2,), vocab=vocab, device=torch.device("cpu"), strings=NO_TEXT)
    order = torch.randperm(rows, generator=generator)
    for chosen in (order, order[:1], order[:13], torch.tensor([i for i, p in enumerate(each) if p.greedy])):
        tokens, logps = settings.chooser(chosen)(logits[chosen], seen[chosen], keys[chosen], count[chosen])
        for place, row in enumerate(chosen.tolist()):
            one = slice(row, row + 1)
            scores = filter_logits(logits[one].clone(), each[row], seen[one])
            right = greedy(scores) if each[row].greedy else draw(scores, uniforms(keys[one], count[one]))
            assert tokens[place] == right[0]
            assert logps[place].item() == right[1].item()


def test_ends_row_by_row():
    each = [
        SamplingParams(5, stop_token_ids=(7, 8)),
        SamplingParams(6, stop_token_ids=(8, 9)),
        SamplingParams(5),
        SamplingParams(5, stop_token_ids=tuple(range(100))),
    ]
    settings = RowSettings(each, 2, end_ids=(2,), vocab=100, device=torch.device("cpu"), strings=NO_TEXT)
    for row in range(8):
        own = each[row // 2]
        tokens = torch.arange(100)
        for count in (1, 4, 5, 6):
            stopped, ended = settings.ended(torch.full((100,), row), tokens, torch.full((100,), count))
            expected = [token == 2 or token in own.stop_token_ids for token in range(100)]
            assert stopped.tolist() == expected
            assert ended.tolist() == [stop or count >= own.max_new_tokens for stop in expected]
    alone = RowSettings(each[2:3], 3, end_ids=(), vocab=100, device=torch.device("cpu"), strings=NO_TEXT)
    assert not alone.ended(torch.arange(3), torch.tensor([0, 2, 99]), torch.tensor([1, 1, 1]))[0].any()


def test_opponents_take_settings_per_request():
    from rlft.models import MovingAverage
    from rlft.models.policy import Policy

    model = tiny.tiny_llama(dtype=torch.float64)
    fast = FastSampler(model, tiny.char_tokenizer(), own_step=False)
    expected = fast.sample(PROMPTS, 2, MANY, seed=1)
    mixture = MixtureSampler(Policy(model, reference="none"), tiny.char_tokenizer(), 0.0)
    assert mixture.sample(PROMPTS, 2, MANY, seed=1).completion_ids == expected.completion_ids
    average = AverageSampler(fast, MovingAverage(model, 0.9))
    assert average.sample(PROMPTS, 2, MANY, seed=1).completion_ids == expected.completion_ids


@pytest.mark.parametrize("kind", [FastSampler, TransformersSampler])
def test_params_that_do_not_fit(kind):
    sampler = kind(tiny.tiny_gpt2(), tiny.char_tokenizer())
    one = SamplingParams(3)
    with pytest.raises(ValueError, match=r"params has 2 entries for 3 prompts; pass one SamplingParams per prompt"):
        sampler.sample([[5], [6], [7]], 1, [one, one], seed=0)
    with pytest.raises(TypeError, match=r"params must be SamplingParams, or a list .* got dict"):
        sampler.sample([[5], [6]], 1, [one, {"max_new_tokens": 3}], seed=0)
    with pytest.raises(TypeError, match=r"got int"):
        sampler.sample([[5]], 1, 16, seed=0)
    with pytest.raises(ValueError, match=r"prompt 1 has 250 tokens.*max_new_tokens=7 a row may reach 257"):
        sampler.sample([[5], [5] * 250], 1, [SamplingParams(200), SamplingParams(7)], seed=0)
    assert len(sampler.sample([[5], [5] * 250], 1, [SamplingParams(200), SamplingParams(6)], seed=0)) == 2
