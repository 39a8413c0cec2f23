"""Pairs and filters against loops written out, and the edge cases: ties, answers that cannot be used, nothing left."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlft.rollout.select import keep_best, keep_by_rejection, keep_from, select_pairs

F64 = torch.float64


def table(prompts: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards with many ties, and which answers are usable."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (prompts, n), generator=g).double()
    usable = torch.rand(prompts, n, generator=g) > 0.25
    return scores, usable


def of_rewards(scores: torch.Tensor) -> torch.Tensor:
    return scores[:, :, None] - scores[:, None, :]


@pytest.mark.parametrize("min_gap", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_pairs_are_those_of_a_loop(n: int, min_gap: float) -> None:
    scores, usable = table(40, n, n)
    best = select_pairs(scores, of_rewards(scores), usable, selection="best_worst", min_gap=min_gap)
    every = select_pairs(scores, of_rewards(scores), usable, selection="all", min_gap=min_gap)
    assert best.chosen.shape == (40, 1)
    assert every.chosen.shape == (40, n * (n - 1) // 2)
    live = 0
    for p in range(40):
        known = [i for i in range(n) if usable[p, i]]
        spread = max(scores[p, known]) - min(scores[p, known]) if known else 0.0
        assert bool(best.alive[p, 0]) == bool(len(known) > 1 and spread > min_gap)
        if len(known) > 1:
            assert best.gap[p, 0] == spread
            assert scores[p, best.chosen[p, 0]] == max(scores[p, known])
            assert scores[p, best.rejected[p, 0]] == min(scores[p, known])
        assert best.chosen[p, 0] != best.rejected[p, 0]
        expected = {(i, j) for i, j in itertools.permutations(known, 2) if scores[p, i] - scores[p, j] > min_gap}
        found = {
            (int(i), int(j))
            for i, j, alive in zip(every.chosen[p], every.rejected[p], every.alive[p], strict=True)
            if alive
        }
        assert found == expected
        live += len(expected)
    assert int(every.alive.sum()) == live
    assert 0 < live < every.alive.numel()
    assert torch.equal(every.gap.isnan(), ~(usable.gather(1, every.chosen) & usable.gather(1, every.rejected)))


def test_all_pairs_of_a_judge_follow_each_comparison_and_not_the_mean() -> None:
    """Rock, paper, scissors: every mean win rate is the same, and every pair has a winner."""
    wins = torch.tensor([[[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]], dtype=F64)
    scores, usable = wins.mean(-1), torch.ones(1, 3, dtype=torch.bool)
    gaps = wins - wins.transpose(1, 2)
    every = select_pairs(scores, gaps, usable, selection="all")
    assert set(zip(every.chosen[0].tolist(), every.rejected[0].tolist(), strict=True)) == {(0, 1), (1, 2), (2, 0)}
    torch.testing.assert_close(every.gap, torch.full((1, 3), 0.8, dtype=F64))
    assert every.alive.all()
    assert not select_pairs(scores.round(decimals=6), gaps, usable, selection="best_worst").alive.any()


def test_what_cannot_be_paired_is_refused() -> None:
    scores, usable = table(2, 3, 0)
    with pytest.raises(ValueError, match="a pair needs two answers per prompt, got 1"):
        select_pairs(scores[:, :1], of_rewards(scores[:, :1]), usable[:, :1], selection="all")
    with pytest.raises(ValueError, match="must be 'best_worst' or 'all', got 'some'"):
        select_pairs(scores, of_rewards(scores), usable, selection="some")
    with pytest.raises(ValueError, match="pair_min_gap must be >= 0"):
        select_pairs(scores, of_rewards(scores), usable, selection="all", min_gap=-1.0)


def test_filters_by_a_loop() -> None:
    scores, usable = table(40, 4, 9)
    best, over = keep_best(scores, usable), keep_from(scores, usable, 2.0)
    for p in range(40):
        known = [i for i in range(4) if usable[p, i]]
        assert best[p].nonzero()[:, 0].tolist() == ([max(known, key=lambda i: scores[p, i])] if known else [])
        assert over[p].nonzero()[:, 0].tolist() == [i for i in known if scores[p, i] >= 2.0]


def test_rejection_keeps_with_the_probability_of_its_formula() -> None:
    scores = torch.tensor([[1.0, 0.2, math.nan, -3.0]], dtype=F64)
    usable = ~scores.isnan()
    edge = torch.tensor([[1.0, math.exp(-0.8 / 0.5), 1.0, math.exp(-4.0 / 0.5)]], dtype=F64)
    below, above = edge * (1 - 1e-12), edge * (1 + 1e-12)
    assert keep_by_rejection(scores, usable, below, beta=0.5).tolist() == [[True, True, False, True]]
    assert keep_by_rejection(scores, usable, above, beta=0.5).tolist() == [[False, False, False, False]]
    with pytest.raises(ValueError, match="keep_beta must be > 0"):
        keep_by_rejection(scores, usable, below, beta=0.0)


def test_rejection_with_the_true_maximum_draws_from_the_tilted_policy() -> None:
    """RSO's claim, exactly: policy x acceptance, normalised, is policy exp(r / beta) / Z."""
    g = torch.Generator().manual_seed(2)
    logits, rewards, beta = torch.randn(6, generator=g, dtype=F64), torch.randn(6, generator=g, dtype=F64), 0.7
    # acceptance of arm i = measure of the u that keep it, read off a fine grid of u with the true maximum among the answers
    grid = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    rows = rewards.expand(len(grid), 6)
    kept = keep_by_rejection(rows, torch.ones_like(rows, dtype=torch.bool), grid[:, None].expand_as(rows), beta=beta)
    drawn = logits.softmax(0) * kept.double().mean(0)
    expected = (logits + rewards / beta).softmax(0)
    torch.testing.assert_close(drawn / drawn.sum(), expected, rtol=1e-4, atol=1e-6)
