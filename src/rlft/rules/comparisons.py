"""Which objectives learn from comparisons of sampled answers, or imitate those that are kept, and with which settings."""

from __future__ import annotations

import math

from rlft.config import Config, ConfigError
from rlft.objective import Objective

__all__ = ["check_comparisons", "groups_per_prompt", "imitates", "learns_from_samples", "plays", "wants_pairs"]


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


# -- settings --------------------------------------------------------------------------------------------------------------
def check_comparisons(config: Config, objective: Objective, *, online: bool, rewarded: bool, judged: bool) -> None:
    """Refuse settings of comparisons that cannot work, or that would do nothing.

    Args:
        config: the settings.
        objective: of the run.
        online: whether answers are sampled.
        rewarded: whether there are reward functions.
        judged: whether there is a judge.

    Raises:
        ConfigError: naming the setting, its value and what to do.
    """
    name = objective.name
    pairs, played = online and wants_pairs(objective), online and plays(objective)
    if judged and rewarded:
        raise ConfigError("judge and rewards both say which of two answers is better; keep one of them")
    if judged and not (pairs or played):
        raise ConfigError(
            f"judge does nothing: objective {name!r} learns from no comparison of answers; use rewards, or e.g. dpo, ipo, "
            f"ipo_md, nash_md_pg"
        )
    if judged and config.replay_probability:
        raise ConfigError(
            f"replay_probability={config.replay_probability} does not go with a judge: stored answers have a reward, and a "
            f"judge gives none; set it to 0"
        )
    _check_idle(config, name, pairs=pairs, played=played)
    if pairs and config.num_generations < 2:
        raise ConfigError(f"objective {name!r} compares answers of one prompt; set num_generations >= 2, got 1")
    _check_opponent(config, objective, pairs=pairs, played=played)
    _check_keep(config, objective, online=online, pairs=pairs, judged=judged)


def _check_idle(config: Config, name: str, *, pairs: bool, played: bool) -> None:
    defaults = Config()
    wanted = {
        "pair_selection": pairs,
        "pair_min_gap": pairs,
        "mixture_coef": pairs or played,
        "opponent_ema_decay": played,
    }
    for setting, used in wanted.items():
        value = getattr(config, setting)
        if value != getattr(defaults, setting) and not used:
            what = "pairs of sampled answers" if setting.startswith("pair") else "an opponent"
            raise ConfigError(
                f"{setting}={value!r} does nothing: objective {name!r} trains on no {what.removeprefix('an ')} here; drop it"
            )


def _check_opponent(config: Config, objective: Objective, *, pairs: bool, played: bool) -> None:
    a, decay, name = config.mixture_coef, config.opponent_ema_decay, objective.name
    if a is not None and decay is not None:
        raise ConfigError("mixture_coef and opponent_ema_decay are two opponents; keep one of them")
    if played and a is None and decay is None:
        raise ConfigError(
            f"objective {name!r} needs an opponent; set mixture_coef (0: the policy itself, 1: the reference, between: "
            f"Nash-MD) or opponent_ema_decay (Nash-EMA)"
        )
    if a and not objective.needs_reference:
        raise ConfigError(
            f"mixture_coef={a} mixes in the reference, and objective {name!r} has none (or beta is 0); set it to 0"
        )
    if played and config.dynamic_sampling:
        raise ConfigError(
            f"dynamic_sampling looks for prompts whose answers earn differently, and objective {name!r} compares each answer "
            f"with an opponent's; drop it"
        )


def _check_keep(config: Config, objective: Objective, *, online: bool, pairs: bool, judged: bool) -> None:
    keep, name = config.keep, objective.name
    for setting, of in (("keep_threshold", "threshold"), ("keep_beta", "rejection")):
        value = getattr(config, setting)
        if keep == of and value is None:
            raise ConfigError(f"keep: {of} needs {setting}; give a number")
        if keep != of and value is not None:
            raise ConfigError(f"{setting}={value} does nothing unless keep is {of!r}; drop it")
    if keep == "all":
        return
    if not online or judged:
        raise ConfigError(f"keep={keep!r} does nothing without rewards; give `rewards` to train online, or drop it")
    if pairs and keep == "best":
        raise ConfigError(
            "keep='best' leaves one answer per prompt, and a pair needs two; use pair_selection: best_worst"
        )
    if not pairs and not imitates(objective):
        raise ConfigError(
            f"keep={keep!r} would leave objective {name!r} answers that were picked by their reward, which biases its baseline; "
            f"use it with sft or a pair objective, or drop it"
        )
