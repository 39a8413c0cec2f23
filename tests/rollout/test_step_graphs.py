"""Decode steps by graphs, with a stand-in that replays recorded operations on the recorded tensors: equal to plain steps."""

from __future__ import annotations

import contextlib
import random
import warnings

import pytest
import torch

from rlft.rollout import FastSampler, SamplingParams, shared_rows, step_graphs
from rlft.rollout.llama_step import LlamaStep
from rlft.rollout.row_cache import RowCache
from rlft.rollout.step_graphs import CudaCapture, StepGraphs
from tests import tiny
from tests.rollout.recorded import Recorder
from tests.rollout.test_llama_step import MODELS, build
from tests.rollout.test_samplers import PROMPTS, STOPS

F64 = torch.float64
CPU = torch.device("cpu")


def started(model, *, slots=8, rows=5, reserve=300, capture=None, device=CPU):
    """Rows of PROMPTS after their prefill: by graphs, and a twin by plain steps over the same weights."""
    step = LlamaStep(model, rows=slots, copy_bytes=0)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    width = max(map(len, prompts))
    start = torch.tensor([width - len(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    with torch.no_grad():
        prefilled, _ = step.prefill(prompts)
    caches = [RowCache(len(step.layers), slots) for _ in range(2)]
    for cache in caches:
        cache.admit(prefilled, torch.arange(rows, device=device), columns=width, reserve=reserve)
    graphs = StepGraphs(step, caches[0], capture or Recorder(), device=device)
    return graphs, step, caches[1], start, lengths


def plain(step, cache, tokens, positions, start):
    cache.open(start)
    return step(tokens, positions, cache)


def tokens_of(rows, seed):
    return torch.randint(4, 100, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama", "llama, biases", "llama, one key for all", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-10), (torch.float32, 1e-5)])
def test_steps_by_graphs_are_the_plain_steps(name, dtype, bound):
    """Twelve steps of different tokens, ten of them replays: a baked number or a stale tensor would differ at once.

    Norms and angles are the same float32 numbers on both sides; the masked columns add zeros alone.
    """
    assert name in MODELS
    graphs, step, twin, start, lengths = started(build(name, dtype))
    with torch.no_grad():
        for t in range(12):
            tokens = tokens_of(5, t)
            found = graphs(tokens, lengths + t, start).clone()
            right = plain(step, twin, tokens, lengths + t, start)
            assert float((found - right).norm() / right.norm()) < bound
    assert (graphs.recorded, graphs.replayed, graphs.failed) == (1, 10, None)
    assert graphs.cache.columns == twin.columns
    for mine, theirs in zip(graphs.cache.memory(), twin.memory(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a[:5, :, : twin.columns], b[:5, :, : twin.columns], rtol=bound, atol=bound)


def test_weights_that_change_in_place_are_read_by_the_next_replay():
    model = build("qwen2", F64)
    graphs, step, twin, start, lengths = started(model)
    with torch.no_grad():
        for t in range(9):
            if t == 6:  # after the comparisons, which would find it
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            tokens = tokens_of(5, t)
            found = graphs(tokens, lengths + t, start).clone()
            if t == 6:
                before = right  # noqa: F821 - of the step before
            right = plain(step, twin, tokens, lengths + t, start)
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    assert graphs.replayed == 7
    assert not torch.allclose(before, right)


def test_rows_that_leave_columns_that_fill_and_memory_that_moves():
    """Rows go as in the loop: each bucket has its own graph, and new memory drops those of the old."""
    graphs, step, twin, start, lengths = started(build("llama", F64), slots=8, rows=8, reserve=6)
    capture = graphs.capture
    rng = random.Random(0)
    live, seen = 8, set()
    with torch.no_grad():
        for t in range(60):
            graphs.cache.reserve(graphs.cache.columns + 1)
            seen.add(graphs.cache.memory()[0][0].shape[2])
            tokens = tokens_of(live, t)
            found = graphs(tokens, lengths + t, start).clone()
            torch.testing.assert_close(found, plain(step, twin, tokens, lengths + t, start), rtol=1e-10, atol=1e-10)
            if t % 12 == 11 and live > 1:
                gone = rng.randrange(live)
                live -= 1
                move = [torch.tensor([x] if gone < live else [], dtype=torch.long) for x in (live, gone)]
                for cache in (graphs.cache, twin):
                    cache.move(*move, live)
                for state in (start, lengths):
                    state[move[1]] = state[move[0]]
                start, lengths = start[:live].clone(), lengths[:live].clone()
    assert len(seen) > 2  # memory grew more than once
    assert graphs.failed is None
    assert capture.captures == graphs.recorded >= len(seen)


def test_columns_beyond_256_take_another_graph():
    graphs, step, twin, start, lengths = started(build("llama", F64), reserve=300)
    with torch.no_grad():
        for t in range(252):
            tokens = tokens_of(5, t)
            found = graphs(tokens, lengths + t, start).clone()
            torch.testing.assert_close(found, plain(step, twin, tokens, lengths + t, start), rtol=1e-9, atol=1e-9)
    assert sorted(graphs._graphs) == [(8, 256), (8, 312)]


def test_graphs_of_memory_that_was_left_are_not_replayed():
    """More columns than a bucket has, before and after: only the addresses tell the graphs apart."""
    graphs, step, twin, start, lengths = started(build("llama", F64), reserve=260)
    with torch.no_grad():
        for t in range(12):
            if t == 6:
                graphs.cache.reserve(400)
            tokens = tokens_of(5, t)
            found = graphs(tokens, lengths + t, start).clone()
            torch.testing.assert_close(found, plain(step, twin, tokens, lengths + t, start), rtol=1e-9, atol=1e-9)
    assert (graphs.recorded, graphs.replayed, graphs.failed) == (2, 8, None)


def test_slots_that_do_not_live_stay_finite():
    """Their columns are masked in the row that comes next, and NaN would survive a weight of zero."""
    graphs, step, twin, start, lengths = started(build("llama", F64), rows=8)
    with torch.no_grad():
        for t in range(4):
            graphs(tokens_of(8, t), lengths + t, start)
            plain(step, twin, tokens_of(8, t), lengths + t, start)
        # The longest prompts' rows leave, and the others move left: the seventh slot's row began further right.
        order = torch.tensor([0, 1, 5, 3, 6])
        for cache in (graphs.cache, twin):
            cache.move(torch.tensor([5, 6]), torch.tensor([2, 4]), 5)
            cache.relayout(cache.columns - 7, reserve=0)
        start, lengths = start[order] - 7, lengths[order] + 4
        assert graphs._start[6] == 11 > graphs.cache.columns
        for t in range(4):
            tokens = tokens_of(5, t)
            found = graphs(tokens, lengths + t, start).clone()
            torch.testing.assert_close(found, plain(step, twin, tokens, lengths + t, start), rtol=1e-9, atol=1e-9)
            assert (graphs._start <= graphs._column).all()  # every row sees a column at least
    assert (graphs.recorded, graphs.replayed) == (1, 6)
    assert all(part.isfinite().all() for pair in graphs.cache.memory() for part in pair)


def test_the_oldest_graph_goes(monkeypatch):
    monkeypatch.setattr(step_graphs, "_MOST", 2)
    graphs, _, _, start, lengths = started(build("llama", F64), rows=8)
    with torch.no_grad():
        t = 0
        for live in (8, 4, 2, 1):
            for _ in range(3):
                graphs.cache.move(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), live)
                graphs(tokens_of(live, t), lengths[:live] + t, start[:live])
                t += 1
    assert [rows for rows, _ in graphs._graphs] == [2, 1]
    assert graphs.recorded == 4


# -- the sampler ------------------------------------------------------------------------------------------------------
@pytest.fixture
def recorded(monkeypatch):
    """FastSampler as on CUDA: prompts are not shared, and steps are recorded by the stand-in."""
    made = []

    def capture(self, device, decode):
        self.not_graphed = self._graphs_failed
        if decode is None or self.not_graphed is not None:
            return None
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(shared_rows, "can_share", lambda *_, **__: False)
    monkeypatch.setattr(FastSampler, "_capture", capture)
    return made


@pytest.mark.parametrize("trial", range(6))
def test_random_schedules_by_graphs_equal_plain_ones(trial, recorded):
    rng = random.Random(trial)
    model = build(rng.choice(["llama", "qwen2", "qwen3"]), F64)
    prompts = [[rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 5, 30]))] for _ in range(rng.randint(2, 7))]
    params = [
        SamplingParams(
            rng.choice([2, 17, 30]), temperature=rng.choice([0.7, 1.5]), stop_token_ids=STOPS[: rng.randint(0, 3)]
        )
        for _ in prompts
    ]
    n, slots = rng.randint(1, 6), rng.randint(2, 12)
    expected = FastSampler(model, tiny.char_tokenizer(), max_batch=slots, own_step=False).sample(
        prompts, n, params, seed=trial
    )
    sampler = FastSampler(model, tiny.char_tokenizer(), max_batch=slots)
    found = sampler.sample(prompts, n, params, seed=trial)
    assert found.completion_ids == expected.completion_ids
    for left, right in zip(found.logps, expected.logps, strict=True):
        assert left == pytest.approx(right, abs=3e-6)
    assert sampler.not_own_step is None
    assert sampler.not_graphed is None
    assert sum(capture.captures for capture in recorded) >= 1


def test_recording_by_cuda_goes_by_the_book(monkeypatch):
    """Warm-up on a side stream that waits and is waited for, then the recording there; one pool for all graphs."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def within(name):
        log.append(f"in {name}")
        yield
        log.append(f"out of {name}")

    main, side = Stream("main"), Stream("side")
    fakes = {
        "Stream": lambda device: side,
        "graph_pool_handle": lambda: "pool",
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: main,
        "stream": lambda stream: contextlib.nullcontext() if stream is main else within(stream.name),
        "CUDAGraph": Graph,
        "graph": lambda graph, *, pool, stream, capture_error_mode: within(f"{pool} on {stream.name}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture, out = CudaCapture(torch.device("cuda")), torch.zeros(1)

    def run():
        log.append("run")
        return out

    for _ in range(2):
        log.clear()
        replay, found = capture(run)
        assert found is out
        replay()
        assert log == [
            "side waits for main", "in side", "run", "run", "out of side", "main waits for side",
            "in pool on side", "run", "out of pool on side", "replay",
        ]  # fmt: skip


# -- failures ---------------------------------------------------------------------------------------------------------
def test_a_recording_that_fails_is_one_warning_and_plain_steps(recorded, monkeypatch):
    def broken(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = build("llama", F64)
    expected = FastSampler(model, tiny.char_tokenizer(), own_step=False).sample(PROMPTS, 2, SamplingParams(12), seed=0)
    monkeypatch.setattr(Recorder, "__call__", broken)
    sampler = FastSampler(model, tiny.char_tokenizer())
    with pytest.warns(
        UserWarning, match=r"without CUDA graphs.*recording stopped with RuntimeError.*cuda_graphs=False"
    ):
        found = sampler.sample(PROMPTS, 2, SamplingParams(12), seed=0)
    assert found.completion_ids == expected.completion_ids
    assert "not permitted" in sampler.not_graphed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler.sample(PROMPTS, 2, SamplingParams(12), seed=0) == found
    assert len(recorded) == 1  # no further attempt


class Baked(Recorder):
    """Replays what it recorded, with a number of the first step in place of one that changes."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def __call__(self, run):
        replay, out = super().__call__(run)
        graphs = self.graphs
        buffer = getattr(graphs, self.what)
        first = buffer.clone()

        def stale():
            now = buffer.clone()
            buffer.copy_(first)
            replay()
            buffer.copy_(now)

        return stale, out


@pytest.mark.parametrize("what", ["_tokens", "_positions", "_start", "_column"])
def test_a_buffer_that_a_replay_does_not_read_is_found(what):
    """The first replay is right, for nothing has changed yet; the second is compared as well."""
    capture = Baked(what)
    model = build("llama", F64)
    graphs, step, twin, start, lengths = started(model, capture=capture, rows=5)
    capture.graphs = graphs
    with torch.no_grad():
        for t in range(8):
            tokens = tokens_of(5, t)
            if t == 3 and what == "_start":  # rows begin elsewhere after others have left
                for cache in (graphs.cache, twin):
                    cache.relayout(cache.columns + 2, reserve=0)
                start = start + 2
            if t == 3:
                with pytest.warns(UserWarning, match="the logits of a replay differ by"):
                    found = graphs(tokens, lengths + t, start).clone()
            else:
                found = graphs(tokens, lengths + t, start).clone()
            torch.testing.assert_close(found, plain(step, twin, tokens, lengths + t, start), rtol=1e-9, atol=1e-9)
    assert graphs.failed is not None
    assert graphs.replayed == 2


def test_the_stand_in_catches_what_a_graph_would():
    inside = torch.zeros(3)

    def waits():
        return inside * (2.0 if inside.sum().item() else 1.0)

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing: _local_scalar_dense"):
        Recorder()(waits)
    count = [0]

    def bakes():
        count[0] += 1
        return inside + count[0]

    replay, out = Recorder()(bakes)
    assert out.isnan().all()
    inside.fill_(5.0)
    for _ in range(2):
        replay()
        assert out.tolist() == [8.0] * 3  # the input is read again, the number is that of the recording


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cuda_graphs": True}, r"cuda_graphs=True would do nothing: the model is on cpu.*leave it at 'auto'"),
        ({"cuda_graphs": "yes"}, r"cuda_graphs must be 'auto', True or False, got 'yes'"),
    ],
)
def test_what_would_do_nothing_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        FastSampler(tiny.tiny_llama(), tiny.char_tokenizer(), **options)


def test_a_processor_says_why_it_has_no_graphs():
    sampler = FastSampler(tiny.tiny_llama(), tiny.char_tokenizer())
    sampler.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert sampler.not_graphed == "the model is on cpu"
    sampler = FastSampler(tiny.tiny_llama(), tiny.char_tokenizer(), cuda_graphs=False)
    sampler.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert sampler.not_graphed == "cuda_graphs=False"
