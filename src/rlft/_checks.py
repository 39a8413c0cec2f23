"""Refuses settings and data that cannot work together, before anything heavy is loaded."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from rlft.config import Config, ConfigError
from rlft.objective import Objective

if TYPE_CHECKING:
    pass


logger = logging.getLogger("rlft")

__all__ = ["check_data", "check_settings"]

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "num_generations",
    "num_iterations", "steps_per_generation", "sampler", "replay_probability", "mask_truncated_completions",
    "dynamic_sampling",
)  # fmt: skip


def check_settings(config: Config, objective: Objective, *, online: bool) -> None:
    defaults = Config()
    if not online:
        idle = [name for name in _SAMPLING if getattr(config, name) != getattr(defaults, name)]
        if idle or config.reward_weights is not None:
            name = idle[0] if idle else "reward_weights"
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does nothing without rewards; give `rewards` to train online, or drop it"
            )
    if online and not ({"rewards", "advantages"} & objective.needs):
        raise ConfigError(
            f"objective {objective.name!r} uses no rewards; drop `rewards`, or use e.g. rloo, grpo, agro_off_policy"
        )
    if objective.needs_reference is False and config.ref_model is not None:
        raise ConfigError(
            f"ref_model does nothing: objective {objective.name!r} has no reference (or beta is 0); drop ref_model"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if objective.couples_rows and (config.gradient_accumulation_steps > 1 or processes > 1):
        raise ConfigError(
            f"objective {objective.name!r} compares rows of the whole step with each other, so a step must be one micro-batch on "
            f"one process; got gradient_accumulation_steps={config.gradient_accumulation_steps} on {processes} processes: "
            f"raise per_device_train_batch_size instead"
        )
    if config.sync_ref_model and (not objective.needs_reference or config.ref_model is not None):
        why = "is a model of its own" if config.ref_model is not None else "is not there"
        raise ConfigError(f"sync_ref_model does nothing: the reference of objective {objective.name!r} {why}; drop it")
    if not objective.needs_critic and config.critic is not None:
        raise ConfigError(
            f"critic={config.critic!r} does nothing: objective {objective.name!r} has no values; drop critic"
        )
    if online:
        n, micro = config.num_generations, config.per_device_train_batch_size
        rows = micro * config.gradient_accumulation_steps
        if n < objective.min_group:
            raise ConfigError(
                f"objective {objective.name!r} compares answers of one prompt; "
                f"set num_generations >= {objective.min_group}, got {n}"
            )
        if rows % n:
            raise ConfigError(
                f"per_device_train_batch_size x gradient_accumulation_steps = {micro} x {config.gradient_accumulation_steps} = "
                f"{rows} completions cannot form groups of num_generations={n}; make the product a multiple of {n}"
            )
        if objective.needs_groups and micro % n:
            raise ConfigError(
                f"objective {objective.name!r} needs whole groups in a micro-batch: per_device_train_batch_size={micro} must be "
                f"a multiple of num_generations={n}; raise it, or lower num_generations"
            )
        check_on_policy(config, objective)
    elif objective.kl == "reward" or objective.advantage == "gae":
        raise ConfigError(
            f"objective {objective.name!r} needs samples of the policy itself; give `rewards` to train online"
        )


def check_on_policy(config: Config, objective: Objective) -> None:
    """Estimators that are biased for samples of another distribution are refused, naming the unbiased one."""
    steps = (config.steps_per_generation or config.gradient_accumulation_steps) // config.gradient_accumulation_steps
    foreign = {
        "num_iterations": config.num_iterations > 1,
        "steps_per_generation": steps > 1,
        "top_p": config.top_p < 1,
        "top_k": config.top_k > 0,
        "min_p": config.min_p > 0,
        "repetition_penalty": config.repetition_penalty != 1,
        "replay_probability": config.replay_probability > 0,
    }
    for name, on in foreign.items():
        if on and objective.on_policy_only:
            raise ConfigError(
                f"objective {objective.name!r} is biased for samples that the current policy did not draw, and "
                f"{name}={getattr(config, name)!r} gives such samples; use agro_off_policy, or drop {name}"
            )
    if config.replay_probability > 0 and {"old_logps", "values"} & objective.needs:
        raise ConfigError(
            f"objective {objective.name!r} needs log-probs of the policy that sampled, which replayed answers lack; "
            f"use agro_off_policy with replay_probability, or set it to 0"
        )


def check_data(config: Config, objective: Objective, data: Any, *, online: bool) -> None:
    if data.format in ("preference", "unpaired") and all(t.name == "sft" for t in objective.terms):
        bad = {"preference": "rejected", "unpaired": "undesired"}[data.format]
        remedy = {
            "preference": "set data_format: prompt_completion and columns: {completion: chosen}",
            "unpaired": "give rows with desired answers alone",
        }[data.format]
        raise ConfigError(
            f"objective {objective.name!r} on {data.format!r} rows would imitate the {bad} answers too; {remedy}"
        )
    kinds = {"preference": objective.needs_pairs, "unpaired": "labels" in objective.needs}
    wanted = [kind for kind, needed in kinds.items() if needed]
    if wanted and data.format not in wanted:
        raise ConfigError(
            f"objective {objective.name!r} trains on {wanted[0]} data, got {data.format!r} rows{_lacks(data, wanted[0])}; "
            f"see docs/data"
        )
    if (
        objective.needs_rewards
        and not online
        and data.format != "ranked"
        and not (data.format == "preference" and config.pair_rewards)
    ):
        raise ConfigError(
            f"objective {objective.name!r} needs rewards: give `rewards` to train online, rows with several scored completions, "
            f"or preference rows with pair_rewards: [0.5, -0.5]; got {data.format!r} rows"
        )
    if objective.needs_rewards and not online and data.format == "ranked" and objective.min_group > 1:
        small = [e.index for e in data.examples if len(e.completions) < objective.min_group]
        if small:
            raise ConfigError(
                f"objective {objective.name!r} compares answers of one prompt: completions must hold at least "
                f"{objective.min_group}, got 1 in {len(small)} of {len(data.examples)} rows (first: row {small[0]}); leave "
                f"those rows out, or use an objective without a baseline, e.g. dro"
            )
    if config.pair_rewards is not None and (data.format != "preference" or not objective.needs_rewards):
        raise ConfigError(
            f"pair_rewards does nothing for objective {objective.name!r} on {data.format!r} rows; drop it"
        )
    if not online and not data.examples[0].completions:
        raise ConfigError(
            f"the rows hold prompts only{_lacks(data, 'prompt_completion')}; give `rewards` to sample answers online, or "
            f"rows with completions"
        )


def _lacks(data: Any, form: str) -> str:
    """What keeps rows from being of another format, near misses of column names included."""
    from rlft.data.formats import check_format

    try:
        check_format(form, data.examples[0].columns)
    except ValueError as error:
        return f" ({error})"
    return ""
