"""Which sampled answers are trained on: pairs of a better and a worse one, or the few that are kept.

Everything works on a table ``[P, n]``, one line per prompt. An answer that is not ``usable`` (unscored, or without a token
to train on) is chosen by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check

__all__ = ["Pairs", "keep_best", "keep_by_rejection", "keep_from", "select_pairs"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """K pairs for each of P prompts.

    Attributes:
        chosen: ``[P, K]`` the better answer, an index below n.
        rejected: ``[P, K]`` the worse one, another index.
        gap: ``[P, K]`` by how much it is better, >= 0; NaN where one of the two is not usable.
        alive: ``[P, K]`` True where the pair may be trained on: both usable, and a gap above the smallest one.
    """

    chosen: Int[Tensor, "P K"]
    rejected: Int[Tensor, "P K"]
    gap: Float[Tensor, "P K"]
    alive: Bool[Tensor, "P K"]


def select_pairs(
    scores: Float[Tensor, "P n"],
    gaps: Float[Tensor, "P n n"],
    usable: Bool[Tensor, "P n"],
    *,
    selection: str,
    min_gap: float = 0.0,
) -> Pairs:
    """Pairs of sampled answers.

    Args:
        scores: how good each answer is: its reward, or its mean win rate against the others.
        gaps: ``gaps[p, i, j]``, by how much answer i beats answer j; antisymmetric. ``scores[i] - scores[j]`` for rewards.
        usable: which answers may be in a pair.
        selection: ``"best_worst"``, the highest score against the lowest, one pair per prompt; or ``"all"``, the
            n (n - 1) / 2 pairs, each ordered by its own gap.
        min_gap: pairs whose gap is not above it are not alive; 0 leaves out ties.

    Returns:
        As many pairs for every prompt, so that a batch keeps its shape; ties and pairs with an unusable answer are
        there and not alive.

    Raises:
        ValueError: for fewer than two answers, an unknown selection or a negative gap.

    References:
        Dong et al. 2024, arXiv 2405.07863 (best against worst); Khaki et al. 2024, arXiv 2402.10038 (all pairs by
        reward gap).
    """
    _check.number("pair_min_gap", min_gap, low=0.0)
    n = scores.shape[1]
    if n < 2:
        raise ValueError(f"a pair needs two answers per prompt, got {n}; set num_generations >= 2")
    if selection == "best_worst":
        chosen = scores.where(usable, -torch.inf).argmax(-1, keepdim=True)
        # the last of the lowest: on a tie of all, the two are still different answers
        rejected = n - 1 - scores.where(usable, torch.inf).flip(-1).argmin(-1, keepdim=True)
        rejected = rejected.where(rejected != chosen, (chosen + 1) % n)
        gap = scores.gather(-1, chosen) - scores.gather(-1, rejected)
    elif selection == "all":
        first, second = torch.triu_indices(n, n, 1, device=scores.device)
        gap = gaps[:, first, second]
        swap = gap < 0
        chosen, rejected = second.where(swap, first), first.where(swap, second)
        gap = gap.abs()
    else:
        raise ValueError(f"pair_selection must be 'best_worst' or 'all', got {selection!r}")
    both = usable.gather(-1, chosen) & usable.gather(-1, rejected)
    gap = gap.where(both, torch.nan)
    return Pairs(chosen, rejected, gap, both & (gap > min_gap))


def keep_best(scores: Float[Tensor, "P n"], usable: Bool[Tensor, "P n"]) -> Bool[Tensor, "P n"]:
    """Best of n: the highest score of each prompt, the first of equal ones."""
    best = scores.where(usable, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(usable).scatter(-1, best, True) & usable


def keep_from(scores: Float[Tensor, "P n"], usable: Bool[Tensor, "P n"], threshold: float) -> Bool[Tensor, "P n"]:
    """ReST's filter: every answer whose score is at least ``threshold`` (Gulcehre et al. 2023, arXiv 2308.08998)."""
    return usable & (scores >= threshold)


def keep_by_rejection(
    scores: Float[Tensor, "P n"], usable: Bool[Tensor, "P n"], u: Float[Tensor, "P n"], *, beta: float
) -> Bool[Tensor, "P n"]:
    """Rejection sampling: an answer is kept with probability ``exp((score - highest of its prompt) / beta)``.

    With the true maximum in place of the highest of n, what is kept is drawn from ``policy exp(score / beta) / Z``.

    Args:
        scores: rewards.
        usable: which answers take part.
        u: uniform numbers in [0, 1).
        beta: temperature, > 0; towards 0 the best alone is kept.

    References:
        Liu et al. 2023 (RSO), arXiv 2309.06657, algorithm 1.
    """
    _check.number("keep_beta", beta, low=0.0, open_low=True)
    highest = scores.where(usable, -torch.inf).amax(-1, keepdim=True)
    return usable & (u < ((scores - highest) / beta).where(usable, -torch.inf).exp())
