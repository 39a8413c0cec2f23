"""Filters against transformers' own; the draw against a float64 cumulative sum."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as hf

from rlft.rollout.draw import draw, filter_logits, greedy
from rlft.rollout.types import SamplingParams


def logits(rows, vocab, *, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def theirs(scores, params, ids):
    if params.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.greedy:
        return scores
    if params.temperature != 1.0:
        scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.7, "greedy": True},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_filters_are_transformers_own(kwargs):
    params = SamplingParams(5, **kwargs)
    scores = logits(40, 301)
    ids = torch.randint(0, 301, (40, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(40, 301, dtype=torch.bool).scatter(1, ids, True)
    expected = theirs(scores.clone(), params, ids)
    assert torch.equal(filter_logits(scores.clone(), params, seen), expected)


def test_a_penalty_needs_to_know_what_was_seen():
    with pytest.raises(ValueError, match="needs the tokens seen so far"):
        filter_logits(logits(1, 5), SamplingParams(1, repetition_penalty=2.0), None)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 5000])
def test_draw_is_the_inverse_of_the_cumulative_sum(vocab):
    scores = logits(1, vocab)
    probs = scores.double().softmax(-1)[0]
    edges = probs.cumsum(0)
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    tokens, logps = draw(scores.expand(2000, -1), u)
    expected = torch.searchsorted(edges, u, right=True).clamp(max=vocab - 1)
    near = (edges[:, None] - u).abs().min(0).values < 1e-6  # rounding may decide at an edge
    assert torch.equal(tokens[~near], expected[~near])
    assert ((tokens[near] - expected[near]).abs() <= 1).all()
    torch.testing.assert_close(logps, probs.log()[tokens], rtol=0, atol=2e-6)


def test_what_was_filtered_out_is_never_drawn():
    scores = logits(1, 1000, scale=0.5).expand(5000, -1).clone()
    kept = torch.zeros(1000, dtype=torch.bool)
    kept[[0, 255, 256, 300, 511, 999]] = True
    scores[:, ~kept] = -torch.inf
    u = torch.cat(
        [torch.linspace(0, 1, 4998, dtype=torch.float64), torch.tensor([1 - 2.0**-53] * 2, dtype=torch.float64)]
    )
    tokens, logps = draw(scores, u.clamp(max=1 - 2.0**-53))
    assert kept[tokens].all()
    assert set(tokens.tolist()) == set(kept.nonzero()[:, 0].tolist())
    assert torch.isfinite(logps).all()
    only = torch.full((1, 700), -torch.inf)
    only[0, 600] = -50.0
    for u in (0.0, 0.5, 1 - 2.0**-53):
        assert [t.item() for t in draw(only, torch.tensor([u], dtype=torch.float64))] == [600, 0.0]


def test_extreme_logits():
    scores = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [88.0, 89.0, -200.0]])
    tokens, logps = draw(scores, torch.tensor([0.99, 0.99, 0.99]).double())
    assert tokens.tolist() == [0, 2, 1]
    expected = [0.0, -torch.tensor(3.0).log().item(), -torch.tensor(-1.0).exp().log1p().item()]
    torch.testing.assert_close(logps, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused(bad):
    scores = logits(3, 10)
    scores[1, 4] = bad
    with pytest.raises(ValueError, match="the logits of row 1 have no finite maximum"):
        draw(scores, torch.zeros(3).double())
    with pytest.raises(ValueError, match="row 0 have no finite maximum"):
        draw(torch.full((1, 4), -torch.inf), torch.zeros(1).double())
    with pytest.raises(ValueError, match="the logits of row 1 have no finite maximum"):
        greedy(scores)


def test_greedy():
    scores = logits(20, 50)
    tokens, logps = greedy(scores)
    assert torch.equal(tokens, scores.argmax(-1))
    torch.testing.assert_close(logps, scores.log_softmax(-1).max(-1).values, rtol=0, atol=1e-6)
