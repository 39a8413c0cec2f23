"""Decode steps as CUDA graphs, on a GPU: recorded and replayed, equal to plain steps, by the weights of the moment."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from rlft.rollout import FastSampler, SamplingParams
from rlft.rollout.step_graphs import CudaCapture
from tests import tiny
from tests.gpu.common import CUDA, apart, pytestmark  # noqa: F401
from tests.rollout.test_llama_step import build
from tests.rollout.test_samplers import PROMPTS, STOPS
from tests.rollout.test_step_graphs import plain, started, tokens_of

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03}


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_replays_are_the_plain_steps_and_read_weights_in_place(name: str, dtype: torch.dtype) -> None:
    model = build(name, torch.float32).to(CUDA, dtype)
    graphs, step, twin, start, lengths = started(model, capture=CudaCapture(CUDA), device=CUDA)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs.*")
        for t in range(14):
            if t == 8:
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            tokens = tokens_of(5, t).to(CUDA)
            found = graphs(tokens, lengths + t, start).clone()
            assert apart(found, plain(step, twin, tokens, lengths + t, start)) < BOUNDS[dtype]
    assert (graphs.recorded, graphs.replayed, graphs.failed) == (1, 12, None)


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("slots", [3, 128])
def test_the_sampler_draws_the_same_rows(n: int, slots: int) -> None:
    """In float64, so that rounding decides no token; rows leave, slots are filled again, settings differ by request."""
    model = build("qwen2", torch.float64).to(CUDA)
    params = [SamplingParams(20 + p, temperature=1.0 + p / 10, stop_token_ids=STOPS[:p]) for p in range(len(PROMPTS))]
    found: dict[Any, Any] = {}
    for graphs in (True, False):
        sampler = FastSampler(model, tiny.char_tokenizer(), max_batch=slots, cuda_graphs=graphs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*without CUDA graphs.*")
            found[graphs] = sampler.sample(PROMPTS, n, params, seed=0)
        assert sampler.not_own_step is None
        assert sampler.not_graphed == (None if graphs else "cuda_graphs=False")
    assert found[True].completion_ids == found[False].completion_ids


def test_a_recording_that_waits_for_the_device_leaves_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real failed recording: the streams and the allocator must serve on."""
    from rlft.rollout.step_graphs import StepGraphs

    own = StepGraphs._fixed

    def waits(self: StepGraphs, bucket: tuple[int, int]) -> torch.Tensor:
        logits = own(self, bucket)
        return logits * float(logits.sum().isfinite())

    model = build("llama", torch.float64).to(CUDA)
    expected = FastSampler(model, tiny.char_tokenizer(), cuda_graphs=False).sample(
        PROMPTS, 2, SamplingParams(12), seed=0
    )
    monkeypatch.setattr(StepGraphs, "_fixed", waits)
    sampler = FastSampler(model, tiny.char_tokenizer())
    with pytest.warns(UserWarning, match="without CUDA graphs.*recording stopped"):
        found = sampler.sample(PROMPTS, 2, SamplingParams(12), seed=0)
    assert found.completion_ids == expected.completion_ids
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
