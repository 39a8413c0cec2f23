"""Which values of settings cannot work, and which would do nothing; each message names the setting and the remedy."""

from __future__ import annotations

import dataclasses
import math

from rlft import _check
from rlft._redact import secret_keys
from rlft.config.fields import Fields
from rlft.config.values import ConfigError

__all__ = ["SELF_CHECKS", "check_values"]

#: What ``self_checks`` can switch off one by one: before the first step, and at it (the last three).
SELF_CHECKS = (
    "reference", "padding", "sample", "trainable", "memory", "dry_checkpoint", "first_step", "gradients", "on_policy",
)  # fmt: skip
#: Models whose own code ``trust_remote_code`` can let run.
MODELS = ("policy", "reference", "critic", "reward")
#: What ``accept_changed`` can let pass when a run is resumed.
CHANGES = ("data", "objective", "rewards", "adapters", "weights")
#: Beyond these a step overflows float32, or divides rounding errors by next to nothing.
_LARGEST, _COLDEST = 1e30, 1e-3


def check_values(config: Fields) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the field, its value and what to set.
    """
    _check_ranges(config)
    _check_sizes(config)
    _check_texts(config)
    _check_self_checks(config)
    _check_accepted(config)
    _check_trusted(config)
    _check_streaming(config)
    _check_secrets(config)
    _check_limits(config)
    _check_together(config)
    _refuse_idle(config)


def _check_ranges(config: Fields) -> None:
    """Counts, and numbers that are always there."""
    positive = [
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_iterations",
        "num_generations", "max_completion_length", "logging_steps", "lora_r", "replay_capacity", "max_unscored_steps",
        "ref_model_sync_steps", "max_refills",
    ]  # fmt: skip
    for name in positive:
        _at_least(config, name, 1)
    for name in (
        "max_steps",
        "max_prompt_length",
        "steps_per_generation",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "eval_rows",
        "max_tokens_per_micro_batch",
        "max_tokens_per_reward_batch",
        "shuffle_buffer",
    ):
        if getattr(config, name) is not None:
            _at_least(config, name, 1)
    for name in ("warmup_steps", "top_k", "seed", "log_completions", "sampler_check_steps", "max_nonfinite_steps"):
        _at_least(config, name, 0)
    _number(config, "dataloader_num_workers", 0, 256)
    for name in (
        "learning_rate",
        "num_train_epochs",
        "lora_alpha",
        "repetition_penalty",
        "temperature",
        "adam_epsilon",
    ):
        _number(config, name, 0.0, math.inf, open_low=True)
    _number(config, "weight_decay", 0.0, math.inf)
    _number(config, "top_p", 0.0, 1.0, open_low=True)
    for name in (
        "min_p",
        "lora_dropout",
        "replay_probability",
        "max_bad_fraction",
        "ref_model_mixup_alpha",
        "adam_beta1",
        "adam_beta2",
    ):
        _number(config, name, 0.0, 1.0)


def _check_limits(config: Fields) -> None:
    """Numbers that may be left out, and pairs of numbers that have an order."""
    for name in (
        "beta",
        "epsilon",
        "epsilon_high",
        "max_grad_norm",
        "reward_timeout",
        "eval_fraction",
        "sampler_check_bound",
    ):
        if getattr(config, name) is not None:
            _number(config, name, 0.0, math.inf, open_low=name not in ("beta",))
    if config.max_steps is not None and config.warmup_steps > config.max_steps:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} is more than max_steps={config.max_steps}; lower warmup_steps"
        )
    if config.eval_fraction is not None and not 0 < config.eval_fraction < 1:
        raise ConfigError(f"eval_fraction={config.eval_fraction} must lie between 0 and 1; e.g. 0.1 holds out a tenth")
    if config.epsilon is not None and config.epsilon_high is not None and config.epsilon > config.epsilon_high:
        raise ConfigError(
            f"epsilon={config.epsilon} is above epsilon_high={config.epsilon_high}; swap or raise epsilon_high"
        )
    _number(config, "pair_min_gap", 0.0, math.inf)
    if config.mixture_coef is not None:
        _number(config, "mixture_coef", 0.0, 1.0)
    if config.keep_beta is not None:
        _number(config, "keep_beta", 0.0, math.inf, open_low=True)
    if config.keep_threshold is not None:
        _number(config, "keep_threshold", -math.inf, math.inf)
    if config.opponent_ema_decay is not None and not 0 <= config.opponent_ema_decay < 1:
        raise ConfigError(
            f"opponent_ema_decay={config.opponent_ema_decay} must be at least 0 and below 1, e.g. 0.99; at 1 it never moves"
        )
    if config.train_slice is not None and not (
        len(config.train_slice) == 2 and 0 <= config.train_slice[0] < config.train_slice[1] <= 1
    ):
        raise ConfigError(
            f"train_slice={config.train_slice} must be [from, to] with 0 <= from < to <= 1, e.g. [0, 0.25]"
        )


def _check_together(config: Fields) -> None:
    """Settings that exclude each other, or must fit each other."""
    if config.eval_data is not None and config.eval_fraction is not None:
        raise ConfigError("eval_data and eval_fraction both name an evaluation set; keep one")
    if config.load_in_4bit and config.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other; keep one")
    if (config.load_in_4bit or config.load_in_8bit) and not config.use_peft:
        raise ConfigError("a quantised model cannot be trained itself; set use_peft: true to train adapters on it")
    if config.reward_weights is not None and len(config.reward_weights) != len(config.rewards):
        raise ConfigError(
            f"reward_weights has {len(config.reward_weights)} entries for {len(config.rewards)} rewards; give one each"
        )
    if config.pair_rewards is not None and (
        len(config.pair_rewards) != 2 or config.pair_rewards[0] <= config.pair_rewards[1]
    ):
        raise ConfigError(
            f"pair_rewards={config.pair_rewards} must be [chosen, rejected] with chosen above rejected, e.g. [0.5, -0.5]"
        )
    if config.steps_per_generation is not None and config.steps_per_generation % config.gradient_accumulation_steps:
        raise ConfigError(
            f"steps_per_generation={config.steps_per_generation} must be a multiple of "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: a generation feeds whole optimizer steps"
        )


def _refuse_idle(config: Fields) -> None:
    """A setting that would do nothing is refused."""
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    idle = {
        "use_peft": ["lora_r", "lora_alpha", "lora_dropout"],
        "sync_ref_model": ["ref_model_mixup_alpha", "ref_model_sync_steps"],
        "dynamic_sampling": ["max_refills"],
    }
    for switch, names in idle.items():
        for name in names:
            if not getattr(config, switch) and getattr(config, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(config, name)} does nothing while {switch} is off; set {switch}: true or drop {name}"
                )
    if config.lora_dropout and config.disable_dropout:
        raise ConfigError(
            "lora_dropout does nothing while disable_dropout is on; set disable_dropout: false or drop it"
        )
    if config.ref_cache_dir is not None and not config.precompute_ref_log_probs:
        raise ConfigError(
            "ref_cache_dir does nothing while precompute_ref_log_probs is off; set precompute_ref_log_probs: true or "
            "drop ref_cache_dir"
        )
    if config.greater_is_better is not None and config.metric_for_best_model is None:
        raise ConfigError("greater_is_better does nothing without metric_for_best_model; name the metric, or drop it")
    if config.precompute_ref_log_probs and config.sync_ref_model:
        raise ConfigError(
            "precompute_ref_log_probs keeps the log-probs of one reference, and sync_ref_model moves it; drop one"
        )
    if not config.use_peft and config.lora_target_modules != "all-linear":
        raise ConfigError("lora_target_modules does nothing while use_peft is off; set use_peft: true or drop it")
    if config.sampler_check_steps == 0 and config.sampler_check_bound is not None:
        raise ConfigError(
            "sampler_check_bound does nothing while sampler_check_steps is 0; set sampler_check_steps or drop it"
        )
    if config.replay_probability == 0 and config.replay_capacity != defaults["replay_capacity"]:
        raise ConfigError(
            "replay_capacity does nothing while replay_probability is 0; set replay_probability or drop it"
        )


def _check_sizes(config: Fields) -> None:
    """Numbers that only later, and in other words, would turn out to be too large or too small."""
    largest = {"seed": 2**63 - 1, "learning_rate": _LARGEST, "weight_decay": _LARGEST}
    for name, high in largest.items():
        if getattr(config, name) > high:
            raise ConfigError(f"{name}={getattr(config, name):g} must be at most {high:g}; lower {name}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) >= 1:
            raise ConfigError(f"{name}={getattr(config, name):g} must be below 1: at 1 it never moves; lower {name}")
    if config.temperature < _COLDEST:
        raise ConfigError(
            f"temperature={config.temperature:g} must be at least {_COLDEST:g}: below, log-probs are rounding errors "
            f"that were divided by it; raise temperature"
        )
    for name in ("stop_token_ids", "end_token_ids"):
        if any(token < 0 for token in getattr(config, name)):
            raise ConfigError(f"{name}={getattr(config, name)} must be token ids, 0 and up; change {name}")
    for name in ("pair_rewards", "reward_weights"):
        if any(not abs(value) <= _LARGEST for value in getattr(config, name) or ()):
            raise ConfigError(f"{name}={getattr(config, name)} must be finite, up to {_LARGEST:g}; change {name}")


def _check_texts(config: Fields) -> None:
    """An empty path would stand for the working directory."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        parts = value if isinstance(value, list) else [value]
        if f.name not in ("objective", "separator", "run_name") and any(
            isinstance(part, str) and not part.strip() for part in parts
        ):
            raise ConfigError(f"{f.name}={value!r} is empty; give a value, or drop {f.name}")


def _check_streaming(config: Fields) -> None:
    if not config.streaming:
        if config.shuffle_buffer is not None:
            raise ConfigError("shuffle_buffer does nothing without streaming: all rows are shuffled; drop it")
        return
    if config.max_steps is None or config.num_train_epochs != 1.0:
        raise ConfigError("streaming does not know how many rows there are: set max_steps, and drop num_train_epochs")
    for name in ("eval_fraction", "train_slice"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} needs all training rows, and streaming does not hold them; give eval_data, or files"
            )
    if config.precompute_ref_log_probs:
        raise ConfigError(
            "precompute_ref_log_probs needs all training rows, and streaming does not hold them; drop one"
        )


def _check_self_checks(config: Fields) -> None:
    if isinstance(config.self_checks, dict):
        for name in config.self_checks:
            if name not in SELF_CHECKS:
                raise ConfigError(f"self_checks has no {name!r}{_check.suggestion(name, SELF_CHECKS)}")


def _check_accepted(config: Fields) -> None:
    for name in config.accept_changed:
        if name not in CHANGES:
            raise ConfigError(f"accept_changed has no {name!r}{_check.suggestion(name, CHANGES)}")
    if config.accept_changed and config.resume == "never":
        raise ConfigError(
            f"accept_changed={list(config.accept_changed)!r} does nothing with resume: never, which continues no run; drop one"
        )


def _check_trusted(config: Fields) -> None:
    for name in config.trust_remote_code if not isinstance(config.trust_remote_code, bool) else ():
        if name not in MODELS:
            raise ConfigError(f"trust_remote_code has no {name!r}{_check.suggestion(name, MODELS)}")


def _check_secrets(config: Fields) -> None:
    if secrets := secret_keys({f.name: getattr(config, f.name) for f in dataclasses.fields(config)}):
        raise ConfigError(
            f"{secrets[0]} looks like a secret, and settings are written to the run's folder; take it from the "
            f"environment (HF_TOKEN, WANDB_API_KEY, ...) and drop {secrets[0]}"
        )


def _at_least(config: Fields, name: str, low: int) -> None:
    value = getattr(config, name)
    if value < low:
        raise ConfigError(f"{name}={value} must be at least {low}; change {name}")


def _number(config: Fields, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    try:
        _check.number(name, getattr(config, name), low=low, high=high, open_low=open_low)
    except ValueError as error:
        raise ConfigError(str(error)) from None
