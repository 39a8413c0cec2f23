"""Which runs learn from comparisons of sampled answers, or imitate the answers that are kept."""

from __future__ import annotations

import math

from rlft.config import Config
from rlft.objective import Objective

__all__ = ["groups_per_prompt", "imitates", "learns_from_samples", "plays", "wants_pairs"]


def wants_pairs(objective: Objective) -> bool:
    """Whether rows come in pairs, better first: losses per pair, and losses on groups of two that ask for no rewards."""
    if objective.needs_pairs:
        return True
    return "group_ids" in objective.needs and not ({"rewards", "advantages"} & objective.needs or objective.columns)


def plays(objective: Objective) -> bool:
    """Whether every answer is compared with one of an opponent (Nash-MD, Nash-EMA)."""
    return "win_rates" in objective.needs and not wants_pairs(objective)


def groups_per_prompt(config: Config, objective: Objective) -> int:
    """Groups of the batch that come from one prompt: its pairs, or the one group of its answers."""
    if not wants_pairs(objective) or config.pair_selection == "best_worst":
        return 1
    return math.comb(config.num_generations, 2)


def learns_from_samples(config: Config, objective: Objective) -> bool:
    """Whether an objective that asks for no rewards learns online all the same."""
    if wants_pairs(objective):
        return "scores" not in objective.needs
    return plays(objective) or (config.keep != "all" and imitates(objective))


def imitates(objective: Objective) -> bool:
    """Whether all that a loss needs of an answer is the answer."""
    made = {"rewards", "advantages", "labels", "scores", "values", "returns", "group_ids", "win_rates", "kl_baseline"}
    return not (made & objective.needs or objective.columns)
