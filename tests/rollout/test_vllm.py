"""The vLLM adapter against a stand-in for the vllm module that checks every call and really runs the weights it got."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from rlft.rollout import SamplingParams, make_sampler
from rlft.rollout.vllm_worker import WeightLoader
from rlft.rollout.weights import merged_weights
from tests import tiny
from tests.rollout.test_samplers import PROMPTS, STOPS, lora


class FakeParams:
    ALLOWED = frozenset(
        (
            "n temperature top_p top_k min_p repetition_penalty max_tokens stop_token_ids seed logprobs detokenize"
        ).split()
    )

    def __init__(self, **kwargs):
        assert set(kwargs) == self.ALLOWED
        self.__dict__.update(kwargs)
        assert self.temperature > 0 or self.n == 1  # vLLM refuses n > 1 greedy
        assert self.logprobs == 0
        assert 0 <= self.seed < 2**31


class FakeWorker(WeightLoader):
    """vLLM mixes the extension into its worker: ``self.model_runner.model`` is the engine's model."""

    def __init__(self, model):
        self.model_runner = types.SimpleNamespace(model=self)
        self.model, self.loads = model, 0

    def load_weights(self, weights):
        found = dict(weights)
        missing = self.model.load_state_dict(found, strict=False)
        assert not missing.unexpected_keys
        assert set(missing.missing_keys) <= {"lm_head.weight"}
        self.loads += 1


class FakeLLM:
    def __init__(self, **kwargs):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.kwargs = kwargs
        assert sorted(p.name for p in Path(kwargs["model"]).iterdir()) == ["config.json"]
        config = AutoConfig.from_pretrained(kwargs["model"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            self.worker = FakeWorker(AutoModelForCausalLM.from_config(config).eval())
        self.requests, self.prefix_resets, self.files = [], 0, []

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert isinstance(method, str)  # a callable would have to be pickled
        self.files.append(args[0])
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        self.prefix_resets += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        assert use_tqdm is False
        assert len(prompts) == len(sampling_params)
        self.requests.append((prompts, sampling_params))
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt, params):
        rows = []
        for index in range(params.n):
            generator = torch.Generator().manual_seed(params.seed + index)
            ids, logprobs, reason = [], [], "length"
            while len(ids) < params.max_tokens:
                with torch.no_grad():
                    logits = self.worker.model(torch.tensor([prompt + ids])).logits[0, -1]
                logps = (logits / (params.temperature or 1.0)).log_softmax(-1)
                token = (
                    int(torch.multinomial(logps.exp(), 1, generator=generator))
                    if params.temperature
                    else int(logps.argmax())
                )
                ids.append(token)
                logprobs.append({token: types.SimpleNamespace(logprob=logps[token].item())})
                if token in params.stop_token_ids:
                    reason = "stop"
                    break
            row = {"index": index, "token_ids": tuple(ids), "logprobs": logprobs, "finish_reason": reason}
            rows.append(types.SimpleNamespace(**row))
        return types.SimpleNamespace(outputs=rows[::-1])  # in any order: index tells


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__version__, module.LLM, module.SamplingParams = "0.15.1", FakeLLM, FakeParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_the_engine_is_built_without_weights_tokenizer_or_foreign_code(vllm):
    sampler = make_sampler(
        "vllm", tiny.tiny_llama(), tiny.char_tokenizer(), gpu_memory_utilization=0.4, enforce_eager=True
    )
    kwargs = sampler.engine.kwargs
    folder = kwargs.pop("model")
    assert not Path(folder).exists()
    assert kwargs == {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "rlft.rollout.vllm_worker.WeightLoader",
        "dtype": "float32",
        "gpu_memory_utilization": 0.4,
        "tensor_parallel_size": 1,
        "enforce_eager": True,
    }


def test_greedy_rows_are_those_of_the_live_weights(vllm):
    """The engine starts with other weights: rows only agree if they were loaded, all of them, under the right names."""
    model = lora(tiny.tiny_qwen2())
    tokenizer = tiny.char_tokenizer()
    params = SamplingParams(12, greedy=True, stop_token_ids=STOPS)
    sampler = make_sampler("vllm", model, tokenizer)
    reference = make_sampler("builtin", model, tokenizer)
    for version in (0, 1):
        found = sampler.sample(PROMPTS, 2, params, seed=0, weight_version=version)
        expected = reference.sample(PROMPTS, 2, params, seed=0, weight_version=version)
        assert found.completion_ids == expected.completion_ids
        assert found.finished == expected.finished
        assert found.weight_version == version
        for left, right in zip(found.logps, expected.logps, strict=True):
            assert left == pytest.approx(right, abs=1e-4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-0.5)
    assert sampler.engine.worker.loads == 2
    assert sampler.engine.prefix_resets == 2
    assert not any(Path(file).exists() for file in sampler.engine.files)


def test_weights_are_loaded_once_per_version(vllm):
    sampler = make_sampler("vllm", tiny.tiny_llama(), tiny.char_tokenizer())
    params = SamplingParams(2)
    for version in (0, 0, 5, 5, 6):
        sampler.sample([[5]], 1, params, seed=0, weight_version=version)
    assert sampler.engine.worker.loads == 3


def test_sampling_requests(vllm):
    sampler = make_sampler("vllm", tiny.tiny_llama(), tiny.char_tokenizer())
    params = SamplingParams(
        9, temperature=0.7, top_p=0.9, top_k=11, min_p=0.02, repetition_penalty=1.1, stop_token_ids=STOPS
    )
    out = sampler.sample(PROMPTS, 3, params, seed=4)
    prompts, requests = sampler.engine.requests[0]
    assert [p["prompt_token_ids"] for p in prompts] == PROMPTS
    for request in requests:
        assert (request.n, request.max_tokens, request.temperature) == (3, 9, 0.7)
        assert (request.top_p, request.top_k, request.min_p, request.repetition_penalty) == (0.9, 11, 0.02, 1.1)
        assert request.stop_token_ids == sorted({tiny.EOS_ID, *STOPS})
        assert request.detokenize is False
    assert len({request.seed for request in requests}) == len(PROMPTS)
    assert len(out) == 15
    assert sampler.sample(PROMPTS, 3, params, seed=4) == out
    assert sampler.sample(PROMPTS, 3, params, seed=5) != out
    assert (
        sampler.sample(PROMPTS, 1, params, seed=4).completion_ids == out.completion_ids[::3]
    )  # rows in order of index
    for ids, finished in zip(out.completion_ids, out.finished, strict=True):
        assert finished == (ids[-1] in (*STOPS, tiny.EOS_ID))


def test_settings_of_each_request(vllm):
    """Each request goes out, and its rows come back, with its own settings; a greedy one is drawn once and repeated."""
    sampler = make_sampler("vllm", tiny.tiny_llama(), tiny.char_tokenizer())
    params = [
        SamplingParams(9, temperature=0.7, top_p=0.9, stop_token_ids=STOPS),
        SamplingParams(4, greedy=True),
        SamplingParams(12, top_k=5, min_p=0.1, repetition_penalty=1.1, stop_token_ids=(50,)),
        SamplingParams(4, greedy=True),
        SamplingParams(2),
    ]
    out = sampler.sample(PROMPTS, 3, params, seed=4)
    _, requests = sampler.engine.requests[0]
    assert [r.n for r in requests] == [3, 1, 3, 1, 3]
    assert [r.max_tokens for r in requests] == [9, 4, 12, 4, 2]
    assert [r.temperature for r in requests] == [0.7, 0.0, 1.0, 0.0, 1.0]
    assert [(r.top_p, r.top_k, r.min_p, r.repetition_penalty) for r in requests[:3:2]] == [
        (0.9, 0, 0.0, 1.0),
        (1.0, 5, 0.1, 1.1),
    ]
    assert [r.stop_token_ids for r in requests[:3]] == [sorted({tiny.EOS_ID, *STOPS}), [tiny.EOS_ID], [tiny.EOS_ID, 50]]
    assert len(out) == 15
    assert out.completion_ids[3] == out.completion_ids[4] == out.completion_ids[5]
    for row, (ids, finished) in enumerate(zip(out.completion_ids, out.finished, strict=True)):
        own = params[row // 3]
        assert finished == (ids[-1] in (*own.stop_token_ids, tiny.EOS_ID))
        assert len(ids) <= own.max_new_tokens
    alone = [sampler.sample(PROMPTS, 3, each, seed=4).completion_ids for each in params]
    assert out.completion_ids == [alone[row // 3][row] for row in range(15)]


def test_poll_comes_through(vllm):
    class Signal(Exception):
        pass

    def poll():
        raise Signal

    with pytest.raises(Signal):
        make_sampler("vllm", tiny.tiny_llama(), tiny.char_tokenizer()).sample(
            [[5]], 1, SamplingParams(2), seed=0, poll=poll
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"finish_reason": "abort"}, "ended a row by 'abort'"),
        ({"finish_reason": "stop"}, "by 'stop' at token 50, which is none of"),
        ({"token_ids": ()}, "after 0 tokens"),
    ],
)
def test_rows_that_did_not_end_properly_are_refused(vllm, change, match):
    sampler = make_sampler("vllm", tiny.tiny_llama(), tiny.char_tokenizer())
    row = {
        "index": 0,
        "token_ids": (50,),
        "logprobs": [{50: types.SimpleNamespace(logprob=-1.0)}],
        "finish_reason": "length",
    }
    answer = types.SimpleNamespace(outputs=[types.SimpleNamespace(**{**row, **change})])
    sampler.engine.generate = lambda *_, **__: [answer]
    with pytest.raises(RuntimeError, match=match):
        sampler.sample([[5]], 1, SamplingParams(1), seed=0)
    sampler.engine.collective_rpc = lambda *_, **__: [3]
    with pytest.raises(RuntimeError, match=r"loaded \[3\] tensors of .*stale"):
        sampler.sync()


def test_what_is_refused_before_an_engine_is_built(vllm, monkeypatch):
    model, tokenizer = tiny.tiny_llama(), tiny.char_tokenizer()
    with pytest.raises(ValueError, match="logprobs_mode is set by VLLMSampler"):
        make_sampler("vllm", model, tokenizer, logprobs_mode="raw_logprobs")
    vllm.__version__ = "0.13.0"
    with pytest.raises(ValueError, match=r"vLLM 0\.13\.0 is too old: at least 0\.14"):
        make_sampler("vllm", model, tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'rlft\[vllm\]'.*use sampler='builtin'"):
        make_sampler("vllm", model, tokenizer)


# -- merged weights ---------------------------------------------------------------------------------------------------
def test_merged_weights_are_the_merged_model_and_leave_the_model_alone():
    model = lora(tiny.tiny_llama(dtype=torch.float64), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = dict(merged_weights(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())
    out = model(torch.tensor([PROMPTS[0]])).logits
    merged = lora(tiny.tiny_llama(dtype=torch.float64), modules_to_save=["lm_head"])
    with torch.no_grad():
        merged.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2.0)
    expected = dict(merged.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    plain = tiny.tiny_llama(seed=5, dtype=torch.float64)
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(torch.tensor([PROMPTS[0]])).logits, out, rtol=1e-9, atol=1e-9)


def test_tied_weights_are_given_once():
    names = [name for name, _ in merged_weights(tiny.tiny_qwen2())]
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))
    assert dict(tiny.tiny_qwen2().named_parameters()).keys() == set(names)


def test_quantised_weights_are_refused():
    model = tiny.tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.weight' is quantised \(torch.uint8\)"):
        dict(merged_weights(model))
