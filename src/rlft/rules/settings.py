"""Settings that cannot work together, or would do nothing: refused before anything heavy is loaded."""

from __future__ import annotations

import os

from rlft import losses
from rlft._terms import BEHAVIOUR
from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.rules.comparisons import check_comparisons, learns_from_samples, wants_pairs
from rlft.rules.correction import check_correction
from rlft.rules.kl_weight import check_kl_controller

__all__ = ["check_on_policy", "check_settings"]

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "num_generations",
    "num_iterations", "steps_per_generation", "sampler", "replay_probability", "mask_truncated_completions",
    "dynamic_sampling", "sampler_check_steps", "sampler_check_bound", "kl_controller", "sampler_correction",
)  # fmt: skip


def check_settings(
    config: Config, objective: Objective, *, online: bool, rewarded: bool | None = None, judged: bool | None = None
) -> None:
    """Refuse settings that cannot work, or that would do nothing.

    Args:
        config: the settings.
        objective: what is optimised.
        online: whether answers are sampled.
        rewarded: whether there are reward functions; default: as ``config.rewards`` says.
        judged: whether there is a judge; default: as ``config.judge`` says.

    Raises:
        ConfigError: naming the setting, its value and what to do.
    """
    defaults = Config()
    rewarded = bool(config.rewards) if rewarded is None else rewarded
    judged = config.judge is not None if judged is None else judged
    check_comparisons(config, objective, online=online, rewarded=rewarded, judged=judged)
    if not online:
        idle = [name for name in _SAMPLING if getattr(config, name) != getattr(defaults, name)]
        if idle or config.reward_weights is not None:
            name = idle[0] if idle else "reward_weights"
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does nothing without rewards; give `rewards` to train online, or drop it"
            )
    if config.max_tokens_per_reward_batch is not None and not rewarded:
        raise ConfigError(
            f"max_tokens_per_reward_batch={config.max_tokens_per_reward_batch} does nothing without rewards; drop it"
        )
    if online and not ({"rewards", "advantages"} & objective.needs or learns_from_samples(config, objective)):
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
    if config.precompute_ref_log_probs:
        _check_precompute(objective, online=online)
    if online and config.max_length is not None:
        raise ConfigError(
            f"max_length={config.max_length} does nothing where answers are sampled: set max_prompt_length and "
            f"max_completion_length, and drop max_length"
        )
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if "kl_baseline" in objective.needs and step < 2:
        raise ConfigError(
            f"objective {objective.name!r} compares answers with other prompts: per_device_train_batch_size=1 x "
            f"gradient_accumulation_steps=1 gives a step one example; raise one of them"
        )
    if objective.couples_rows and config.max_tokens_per_micro_batch is not None:
        raise ConfigError(
            f"objective {objective.name!r} compares rows of the whole step with each other, so a step must be one micro-batch; "
            f"drop max_tokens_per_micro_batch"
        )
    if not config.drop_zero_advantages and not objective.advantage_weighted:
        raise ConfigError(
            f"drop_zero_advantages=False does nothing: objective {objective.name!r} has a gradient at advantage 0 (or uses "
            f"no advantages), so no answer is dropped; drop the setting"
        )
    if not objective.needs_critic and config.critic is not None:
        raise ConfigError(
            f"critic={config.critic!r} does nothing: objective {objective.name!r} has no values; drop critic"
        )
    if objective.trust_region is not None:
        _check_trust_region(config, objective, online=online)
    (_check_samples if online else _check_data_alone)(config, objective)


def _check_samples(config: Config, objective: Objective) -> None:
    """What the settings make of sampled answers: groups, their policy, controllers and corrections."""
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
    if objective.needs_groups and micro % n and not wants_pairs(objective):
        raise ConfigError(
            f"objective {objective.name!r} needs whole groups in a micro-batch: per_device_train_batch_size={micro} must be "
            f"a multiple of num_generations={n}; raise it, or lower num_generations"
        )
    check_on_policy(config, objective)
    check_kl_controller(config, objective)
    check_correction(config, objective)


def _check_data_alone(config: Config, objective: Objective) -> None:
    """What an objective cannot learn from answers that are given."""
    if objective.kl == "reward" or objective.advantage == "gae":
        raise ConfigError(
            f"objective {objective.name!r} needs samples of the policy itself; give `rewards` to train online"
        )
    if objective.on_policy_only or BEHAVIOUR & objective.needs:
        why = "is biased for" if objective.on_policy_only else "needs the next-token probabilities of the policy behind"
        raise ConfigError(
            f"objective {objective.name!r} {why} answers that the current policy did not draw, and data hold such answers; use "
            f"agro_off_policy, or give `rewards` to train online"
        )


def _check_precompute(objective: Objective, *, online: bool) -> None:
    why = None
    if online:
        why = "answers are sampled anew, so there is nothing to score before (it is scored once per generation)"
    elif not objective.needs_reference:
        why = f"objective {objective.name!r} has no reference (or beta is 0)"
    elif "ref_logps" not in objective.needs:
        why = f"objective {objective.name!r} needs the reference's whole distribution, not log-probs alone"
    if why is not None:
        raise ConfigError(f"precompute_ref_log_probs does nothing: {why}; drop precompute_ref_log_probs")


#: Settings of the optimizer, which a trust-region step does without.
_OPTIMIZER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm",
)  # fmt: skip


def _check_trust_region(config: Config, objective: Objective, *, online: bool) -> None:
    """A step within a KL needs samples of the policy, second derivatives, and no optimizer."""
    name, defaults = objective.name, Config()
    if not online:
        raise ConfigError(f"objective {name!r} needs samples of the policy itself; give `rewards` to train online")
    if objective.needs_critic and config.critic in (None, "shared"):
        raise ConfigError(
            f"objective {name!r} steps on the policy's weights alone, which a shared critic would be part of; set critic "
            f"to a model of its own, or use advantage: leave_one_out"
        )
    if not objective.needs_critic:
        for setting in _OPTIMIZER:
            if getattr(config, setting) != getattr(defaults, setting):
                raise ConfigError(
                    f"{setting}={getattr(config, setting)!r} does nothing: the step of objective {name!r} has the size that "
                    f"max_kl allows, and no optimizer; drop it, and set objective_args.max_kl"
                )
    refused = {
        "mixed_precision": config.mixed_precision != "no",
        "disable_dropout": not config.disable_dropout,
        "gradient_checkpointing": config.gradient_checkpointing,
        "load_in_4bit": config.load_in_4bit,
        "load_in_8bit": config.load_in_8bit,
    }
    for setting, on in refused.items():
        if on:
            raise ConfigError(
                f"{setting}={getattr(config, setting)!r} does not go with objective {name!r}: its Fisher-vector products "
                f"need exact second derivatives of the policy; drop {setting}"
            )


def check_on_policy(config: Config, objective: Objective) -> None:
    """Estimators that are biased for samples of another distribution are refused, naming the unbiased one."""
    foreign = {
        "num_iterations": config.num_iterations > 1,
        "steps_per_generation": config.updates_per_pass > 1,
        "top_p": config.top_p < 1,
        "top_k": config.top_k > 0,
        "min_p": config.min_p > 0,
        "repetition_penalty": config.repetition_penalty != 1,
        "replay_probability": config.replay_probability > 0,
    }
    # with inner steps the trainer keeps the policy that sampled; what a filter or a buffer did it cannot know
    cv = losses.agro_off_policy_cv.__name__
    takes_policy = bool(BEHAVIOUR & objective.needs) or any(term.name == cv for term in objective.terms)
    for name, on in foreign.items():
        if on and takes_policy and name not in ("num_iterations", "steps_per_generation"):
            raise ConfigError(
                f"objective {objective.name!r} takes the policy of the generation for the one that sampled, and "
                f"{name}={getattr(config, name)!r} gives samples of another; use agro_off_policy, or drop {name}"
            )
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
