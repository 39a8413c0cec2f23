"""Samplers beside the policy's own: an opponent, and the reference that an evaluation with a judge compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.rollout import Sampler

if TYPE_CHECKING:
    from rlft.models import MovingAverage

__all__ = ["Players", "players"]


@dataclass(frozen=True)
class Players:
    """Samplers beside the policy's own.

    Attributes:
        opponent: draws the answers that those of the policy meet; for pairs from a mixture, both answers.
        average: the moving average of the policy's weights that the opponent has, or None.
        baseline: the reference, which evaluation with a judge compares with, or None.
    """

    opponent: Sampler | None = None
    average: MovingAverage | None = None
    baseline: Sampler | None = None


def players(config: Config, objective: Objective, policy: Any, tokenizer: Any, *, judged: bool) -> Players:
    """The samplers that the settings ask for.

    Args:
        config: settings, checked.
        objective: of the run.
        policy: on its device.
        tokenizer: of the policy.
        judged: whether a judge evaluates.

    Raises:
        ConfigError: for a model that cannot be mixed with its reference, or an evaluation without one.
    """
    from rlft.models import MovingAverage
    from rlft.rollout import AverageSampler, MixtureSampler, make_sampler

    opponent = average = baseline = None
    try:
        if config.mixture_coef is not None:
            opponent = MixtureSampler(policy, tokenizer, config.mixture_coef)
        elif config.opponent_ema_decay is not None:
            average = MovingAverage(policy.model, config.opponent_ema_decay)
            opponent = AverageSampler(make_sampler("auto", policy.hf_model, tokenizer), average)
        if judged:
            if policy.reference_kind == "none":
                raise ConfigError(
                    f"a judge evaluates answers against the reference's, and objective {objective.name!r} has none; drop the "
                    f"evaluation data, or use an objective with a reference"
                )
            baseline = MixtureSampler(policy, tokenizer, 1.0)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Players(opponent, average, baseline)
