"""The objective of a run: as passed, by name, or from a file of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlft import recipes
from rlft.config import Config, ConfigError
from rlft.objective import Objective

__all__ = ["objective_for"]


def objective_for(config: Config, given: Objective | Callable[..., Any] | None) -> Objective:
    """The objective of a run: as passed, by name, or ``module:function``."""
    hyper = config.objective_hyper()
    if isinstance(given, Objective):
        if hyper or config.objective:
            raise ConfigError(
                "an Objective was passed, so `objective`, `beta`, `epsilon` and `objective_args` do nothing; drop them"
            )
        return given
    if callable(given):
        return Objective(given, **hyper)
    if not config.objective:
        raise ConfigError(f"objective is missing; name one of: {', '.join(recipes.names())}")
    try:
        if ":" in config.objective:
            from rlft.rewards import load_reward

            built = Objective(load_reward(config.objective), **hyper)
        else:
            built = recipes.build(config.objective, **hyper)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_in_words_of(config, str(error))) from error
    for term in built.terms:
        low, high = term.hyper.get("clip_eps"), term.hyper.get("clip_eps_high")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"objective {built.name!r}: epsilon={low} (clip_eps) is above epsilon_high={high} (clip_eps_high); "
                f"lower epsilon or raise epsilon_high"
            )
    return built


def _in_words_of(config: Config, message: str) -> str:
    """An objective's complaint about an option, under the name that the configuration has for it."""
    for alias, name in (("clip_eps_high", "epsilon_high"), ("clip_eps", "epsilon"), ("beta", "beta")):
        if f"does not use {alias}=" in message and getattr(config, name) is not None:
            return message.replace(f"does not use {alias}=", f"does not use {name}=") + f"; drop {name}"
    return message
