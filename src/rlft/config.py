"""One flat configuration: YAML or keyword arguments in, checked values out.

Names are those of TRL and transformers where they have one, so that a script moves over by changing an import. Keys are
strict: an unknown one is refused with the closest known one, a wrong type with the type expected, and a setting that
would do nothing is refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from rlft import _check, recipes
from rlft._redact import secret_keys

__all__ = ["SELF_CHECKS", "Config", "ConfigError", "load_config", "parse_overrides"]

#: What ``self_checks`` can switch off one by one: before the first step, and at it (the last three).
SELF_CHECKS = (
    "reference", "padding", "sample", "trainable", "memory", "dry_checkpoint", "first_step", "gradients", "on_policy",
)  # fmt: skip
#: Beyond these a step overflows float32, or divides rounding errors by next to nothing.
_LARGEST, _COLDEST = 1e30, 1e-3


class ConfigError(ValueError):
    """A setting that cannot work: names the field, the value and the remedy."""


def _doc(text: str, default: Any = dataclasses.MISSING, *, group: str, free: bool = False, **kwargs: Any) -> Any:
    """A field with its documentation; ``free`` marks settings that a resumed run may change."""
    if isinstance(default, (list, dict)):
        return field(
            default_factory=lambda: type(default)(default), metadata={"doc": text, "group": group, "free": free}
        )
    return field(default=default, metadata={"doc": text, "group": group, "free": free}, **kwargs)


@dataclass
class Config:
    """Everything a run needs. See ``rlft train --help`` or the documentation for the table of fields."""

    # -- what is optimised
    objective: str = _doc(
        "Name of an objective (`rlft objectives`), or `module:function` of your own.", "", group="objective"
    )
    beta: float | None = _doc(
        "Strength of the pull to the reference; the objective's default where None.", None, group="objective"
    )
    epsilon: float | None = _doc("Clip range below 1 (`clip_eps`).", None, group="objective")
    epsilon_high: float | None = _doc(
        "Clip range above 1 (`clip_eps_high`); equal to epsilon where None.", None, group="objective"
    )
    objective_args: dict[str, Any] = _doc("Further hyper-parameters and axes of the objective.", {}, group="objective")
    kl_controller: dict[str, Any] | None = _doc(
        "Moves beta towards a KL: `{type: proportional, target: 6.0, horizon: 10000}`, `{type: halve_double, target: 0.01}` "
        "or `{type: fixed}`.",
        None,
        group="objective",
    )

    # -- models
    model: str | dict[str, Any] | None = _doc(
        "Policy: hub id, local folder, or a config to start from scratch.", None, group="model"
    )
    tokenizer: str | dict[str, Any] | None = _doc(
        "Tokenizer, where it is not beside the model; a mapping trains a small one (`kind`, `vocab_size`).",
        None,
        group="model",
    )
    model_revision: str | None = _doc("Git revision of a hub model.", None, group="model")
    trust_remote_code: bool = _doc("Run code from the policy's repository. Off by default.", False, group="model")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _doc(
        "Type of frozen weights; trainable ones are float32.", "float32", group="model"
    )
    attn_implementation: str | None = _doc(
        "Attention of transformers: sdpa, flash_attention_2, ...", None, group="model"
    )
    load_in_4bit: bool = _doc("Quantise the frozen policy to 4 bits (extra `quant`).", False, group="model")
    load_in_8bit: bool = _doc("Quantise the frozen policy to 8 bits (extra `quant`).", False, group="model")
    disable_dropout: bool = _doc("No dropout in training: ratios of fresh samples are exactly 1.", True, group="model")
    gradient_checkpointing: bool = _doc("Recompute activations in the backward pass.", False, group="model")
    use_peft: bool = _doc("Train LoRA adapters instead of all weights.", False, group="model")
    lora_r: int = _doc("Rank of the adapters.", 16, group="model")
    lora_alpha: float = _doc("Scale of the adapters (alpha / r).", 32.0, group="model")
    lora_dropout: float = _doc("Dropout inside the adapters.", 0.0, group="model")
    lora_target_modules: str | list[str] = _doc("`all-linear`, or names of modules.", "all-linear", group="model")
    ref_model: str | None = _doc("Reference model; None: the policy as it was passed.", None, group="model")
    sync_ref_model: bool = _doc("Move the reference towards the policy as training goes.", False, group="model")
    ref_model_mixup_alpha: float = _doc(
        "Share of the policy in each move; 1 replaces the reference.", 0.6, group="model"
    )
    ref_model_sync_steps: int = _doc("Optimizer steps between moves.", 512, group="model")
    precompute_ref_log_probs: bool = _doc(
        "Offline: score the data under the reference once, before the first step, and keep the result on disk.",
        False,
        group="model",
    )
    ref_cache_dir: str | None = _doc(
        "Where precomputed log-probs are kept; None: `ref-log-probs` beside output_dir.", None, group="model", free=True
    )
    critic: Literal["shared"] | str | None = _doc(
        "`shared`: value head on the policy; else a model of its own.", None, group="model"
    )

    # -- data
    train_data: str | list[str] | None = _doc(
        "JSONL, JSON, CSV, parquet, a folder, or a hub name; `${NAME}` is read from the environment.",
        None,
        group="data",
    )
    train_slice: list[float] | None = _doc("Train on this part of the rows, e.g. [0, 0.25].", None, group="data")
    dataset_config: str | None = _doc(
        "Configuration of the hub dataset that train_data names, such as `main`.", None, group="data"
    )
    eval_data: str | list[str] | None = _doc("Held-out rows, given as train_data is.", None, group="data")
    eval_dataset_config: str | None = _doc("Configuration of the hub dataset that eval_data names.", None, group="data")
    columns: dict[str, str] = _doc("Renames: expected column -> column in the file.", {}, group="data")
    data_format: str = _doc(
        "prompt, prompt_completion, preference, unpaired, ranked, text; `auto` reads the columns.", "auto", group="data"
    )
    separator: str = _doc(
        "Text between prompt and answer of plain-text rows, part of the prompt; e.g. a line break.", "", group="data"
    )
    max_prompt_length: int | None = _doc("Tokens of prompt that are kept (its end).", 512, group="data")
    max_length: int | None = _doc("Tokens of prompt and answer together.", None, group="data")
    truncation_mode: Literal["keep_end", "keep_start", "skip"] = _doc(
        "Which end of a long prompt is kept.", "keep_end", group="data"
    )
    end_token_ids: list[int] = _doc(
        "Further tokens that end an answer, such as a chat model's end of turn.", [], group="data"
    )
    max_completion_length: int = _doc("Tokens of answer that are kept, or generated.", 256, group="data")
    max_bad_fraction: float = _doc("Share of unusable rows above which the run is refused.", 0.01, group="data")
    pair_rewards: list[float] | None = _doc(
        "Rewards of (chosen, rejected), to train a reward objective on pairs.", None, group="data"
    )
    streaming: bool = _doc(
        "Read the training rows while training goes on, instead of all before it; needs max_steps.", False, group="data"
    )
    shuffle_buffer: int | None = _doc(
        "Streaming: rows that are held to draw from at random; None: the rows' own order.", None, group="data"
    )
    dataloader_num_workers: int = _doc(
        "Processes beside each one of the run that read and tokenise the training rows: ahead of need when streaming, "
        "else before the first step.",
        0,
        group="data",
        free=True,
    )
    eval_fraction: float | None = _doc(
        "Hold out this share of train_data, the same rows for every seed.", None, group="data"
    )

    # -- sampling
    num_generations: int = _doc("Answers sampled per prompt.", 8, group="sampling")
    temperature: float = _doc("Divides the logits when sampling and when scoring.", 1.0, group="sampling")
    top_p: float = _doc("Nucleus; below 1 the sampler differs from the policy.", 1.0, group="sampling")
    top_k: int = _doc("Keep the k likeliest tokens; 0: all.", 0, group="sampling")
    min_p: float = _doc("Keep tokens above this share of the likeliest.", 0.0, group="sampling")
    repetition_penalty: float = _doc("Above 1 discourages repeats.", 1.0, group="sampling")
    stop_token_ids: list[int] = _doc("Further tokens that end an answer.", [], group="sampling")
    sampler: Literal["auto", "builtin", "transformers", "vllm"] = _doc("Generation back end.", "auto", group="sampling")
    steps_per_generation: int | None = _doc(
        "Micro-steps fed by one generation; default gradient_accumulation_steps.", None, group="sampling"
    )
    num_iterations: int = _doc("Times each generation is trained on.", 1, group="sampling")
    replay_probability: float = _doc(
        "Replace a fresh answer by one from the buffer of the same prompt.", 0.0, group="sampling"
    )
    replay_capacity: int = _doc("Answers kept per prompt.", 16, group="sampling")
    dynamic_sampling: bool = _doc(
        "Drop prompts whose answers all earn the same, and draw others in their place (DAPO).", False, group="sampling"
    )
    max_refills: int = _doc("Further generations that dynamic sampling may take for one batch.", 4, group="sampling")
    mask_truncated_completions: bool = _doc("Leave answers without an end out of the loss.", False, group="sampling")
    sampler_correction: dict[str, Any] | None = _doc(
        "Weigh answers by policy / sampler: `{level: token | sequence, mode: truncate | mask, cap: 2.0, floor: 0.0}`.",
        None,
        group="sampling",
    )
    sampler_check_steps: int = _doc(
        "Generations between checks of the sampler's log-probs against the policy's; 0: never.",
        10,
        group="sampling",
        free=True,
    )
    sampler_check_bound: float | None = _doc(
        "Mean |difference| per token at which that check stops the run, nats; None: 1e-3 where both are exact, else 0.1.",
        None,
        group="sampling",
        free=True,
    )
    drop_zero_advantages: bool = _doc(
        "Leave answers without loss and gradient (advantage 0, no KL term) out of the forward pass.",
        True,
        group="sampling",
    )

    # -- comparisons
    judge: str | None = _doc(
        "`module:function` that says how likely each answer beats another one; in place of rewards.",
        None,
        group="comparisons",
    )
    pair_selection: Literal["best_worst", "all"] = _doc(
        "Pairs of sampled answers: the best against the worst of a prompt, or all of them.",
        "best_worst",
        group="comparisons",
    )
    pair_min_gap: float = _doc(
        "Pairs whose rewards (win rates of a judge) are not further apart are left out; 0: ties.",
        0.0,
        group="comparisons",
    )
    mixture_coef: float | None = _doc(
        "Share of the reference in the mixture that opponents (nash_md_pg), or both answers of a pair, are sampled from.",
        None,
        group="comparisons",
    )
    opponent_ema_decay: float | None = _doc(
        "Opponents come from a moving average of the policy with this decay per step (Nash-EMA).",
        None,
        group="comparisons",
    )
    keep: Literal["all", "best", "threshold", "rejection"] = _doc(
        "Which sampled answers a supervised objective imitates; `rejection` and `threshold` also thin out pairs.",
        "all",
        group="comparisons",
    )
    keep_threshold: float | None = _doc("`keep: threshold`: the lowest reward that is kept.", None, group="comparisons")
    keep_beta: float | None = _doc(
        "`keep: rejection`: answers are kept with probability exp((r - highest of the prompt) / keep_beta).",
        None,
        group="comparisons",
    )

    # -- rewards
    rewards: list[str | dict[str, Any]] = _doc(
        "Built-in names (or `{name: ..., options}`), `module:function`, or folders of reward models.",
        [],
        group="rewards",
    )
    reward_weights: list[float] | None = _doc("One per reward; default 1.", None, group="rewards")
    reward_timeout: float | None = _doc(
        "Seconds after which a hanging reward function stops the run.", 600.0, group="rewards"
    )
    max_unscored_steps: int = _doc(
        "Steps in a row without a scored answer after which the run stops.", 5, group="rewards", free=True
    )

    # -- steps
    per_device_train_batch_size: int = _doc("Examples (online: completions) per micro-batch.", 8, group="steps")
    per_device_eval_batch_size: int = _doc("The same in evaluation.", 8, group="steps", free=True)
    gradient_accumulation_steps: int = _doc("Micro-batches per optimizer step.", 1, group="steps")
    max_tokens_per_micro_batch: int | None = _doc(
        "Cut a step into micro-batches of at most so many tokens (rows x longest row), groups whole.",
        None,
        group="steps",
    )
    max_steps: int | None = _doc("Optimizer steps; overrides epochs.", None, group="steps")
    num_train_epochs: float = _doc("Passes over the data.", 1.0, group="steps")
    learning_rate: float = _doc(
        "Peak learning rate. LoRA wants about ten times that of all weights.", 1e-5, group="steps"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _doc(
        "Shape after the warm-up.", "constant", group="steps"
    )
    warmup_steps: int = _doc("Linear warm-up.", 0, group="steps")
    weight_decay: float = _doc("Decoupled weight decay on matrices.", 0.0, group="steps")
    adam_beta1: float = _doc("AdamW.", 0.9, group="steps")
    adam_beta2: float = _doc("AdamW.", 0.99, group="steps")
    adam_epsilon: float = _doc("AdamW.", 1e-8, group="steps")
    max_grad_norm: float | None = _doc("Clip the gradient's norm; None: only measure it.", 1.0, group="steps")
    mixed_precision: Literal["no", "bf16", "fp16"] = _doc("Autocast of the forward pass.", "no", group="steps")
    max_nonfinite_steps: int = _doc(
        "Steps with NaN or infinity in loss, gradient or update that a run may skip, in all; 0: stop at the first.",
        0,
        group="steps",
        free=True,
    )
    seed: int = _doc("Decides initialisation, order and samples.", 0, group="steps")

    # -- watching and saving
    output_dir: str = _doc("Folder of the run.", "runs/run", group="output", free=True)
    logging_steps: int = _doc("Steps between lines of metrics.jsonl.", 1, group="output", free=True)
    eval_steps: int | None = _doc("Steps between evaluations; None: at the end only.", None, group="output")
    eval_on_start: bool = _doc("Evaluate before the first step.", False, group="output")
    eval_rows: int | None = _doc("Evaluate on the first rows only.", None, group="output")
    save_steps: int | None = _doc("Steps between checkpoints; None: at the end only.", None, group="output", free=True)
    save_total_limit: int | None = _doc("Checkpoints kept.", 2, group="output", free=True)
    resume: Literal["auto", "never"] | str = _doc(
        "`auto`: continue the run in output_dir; `never`; or a checkpoint.", "auto", group="output", free=True
    )
    report_to: list[str] = _doc("Trackers of accelerate.", ["tensorboard"], group="output", free=True)
    run_name: str | None = _doc("Shown in trackers and reports.", None, group="output", free=True)
    log_completions: int = _doc("Answers printed at each evaluation.", 0, group="output", free=True)
    self_checks: bool | dict[str, bool] = _doc(
        "Checks before the first step and at it; `{padding: false}` leaves one out.", True, group="output", free=True
    )
    disable_tqdm: bool = _doc("No progress bar.", False, group="output", free=True)
    report: bool = _doc("Write report.html at the end (extra `report`).", False, group="output", free=True)

    # -- checks -----------------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
        self.check()

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: naming the field, its value and what to set.
        """
        positive = [
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_iterations",
            "num_generations", "max_completion_length", "logging_steps", "lora_r", "replay_capacity", "max_unscored_steps",
            "ref_model_sync_steps", "max_refills",
        ]  # fmt: skip
        for name in positive:
            self._at_least(name, 1)
        for name in (
            "max_steps",
            "max_prompt_length",
            "steps_per_generation",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "eval_rows",
            "max_tokens_per_micro_batch",
            "shuffle_buffer",
        ):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        for name in ("warmup_steps", "top_k", "seed", "log_completions", "sampler_check_steps", "max_nonfinite_steps"):
            self._at_least(name, 0)
        self._number("dataloader_num_workers", 0, 256)
        for name in (
            "learning_rate",
            "num_train_epochs",
            "lora_alpha",
            "repetition_penalty",
            "temperature",
            "adam_epsilon",
        ):
            self._number(name, 0.0, math.inf, open_low=True)
        self._number("weight_decay", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_low=True)
        for name in (
            "min_p",
            "lora_dropout",
            "replay_probability",
            "max_bad_fraction",
            "ref_model_mixup_alpha",
            "adam_beta1",
            "adam_beta2",
        ):
            self._number(name, 0.0, 1.0)
        self._check_sizes()
        self._check_texts()
        self._check_self_checks()
        self._check_streaming()
        if secrets := secret_keys({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}):
            raise ConfigError(
                f"{secrets[0]} looks like a secret, and settings are written to the run's folder; take it from the "
                f"environment (HF_TOKEN, WANDB_API_KEY, ...) and drop {secrets[0]}"
            )
        for name in (
            "beta",
            "epsilon",
            "epsilon_high",
            "max_grad_norm",
            "reward_timeout",
            "eval_fraction",
            "sampler_check_bound",
        ):
            if getattr(self, name) is not None:
                self._number(name, 0.0, math.inf, open_low=name not in ("beta",))
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; lower warmup_steps"
            )
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction={self.eval_fraction} must lie between 0 and 1; e.g. 0.1 holds out a tenth"
            )
        if self.epsilon is not None and self.epsilon_high is not None and self.epsilon > self.epsilon_high:
            raise ConfigError(
                f"epsilon={self.epsilon} is above epsilon_high={self.epsilon_high}; swap or raise epsilon_high"
            )
        self._number("pair_min_gap", 0.0, math.inf)
        if self.mixture_coef is not None:
            self._number("mixture_coef", 0.0, 1.0)
        if self.keep_beta is not None:
            self._number("keep_beta", 0.0, math.inf, open_low=True)
        if self.keep_threshold is not None:
            self._number("keep_threshold", -math.inf, math.inf)
        if self.opponent_ema_decay is not None and not 0 <= self.opponent_ema_decay < 1:
            raise ConfigError(
                f"opponent_ema_decay={self.opponent_ema_decay} must be at least 0 and below 1, e.g. 0.99; at 1 it never moves"
            )
        if self.train_slice is not None and not (
            len(self.train_slice) == 2 and 0 <= self.train_slice[0] < self.train_slice[1] <= 1
        ):
            raise ConfigError(
                f"train_slice={self.train_slice} must be [from, to] with 0 <= from < to <= 1, e.g. [0, 0.25]"
            )
        if self.eval_data is not None and self.eval_fraction is not None:
            raise ConfigError("eval_data and eval_fraction both name an evaluation set; keep one")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other; keep one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ConfigError("a quantised model cannot be trained itself; set use_peft: true to train adapters on it")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"reward_weights has {len(self.reward_weights)} entries for {len(self.rewards)} rewards; give one each"
            )
        if self.pair_rewards is not None and (
            len(self.pair_rewards) != 2 or self.pair_rewards[0] <= self.pair_rewards[1]
        ):
            raise ConfigError(
                f"pair_rewards={self.pair_rewards} must be [chosen, rejected] with chosen above rejected, e.g. [0.5, -0.5]"
            )
        if self.steps_per_generation is not None and self.steps_per_generation % self.gradient_accumulation_steps:
            raise ConfigError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: a generation feeds whole optimizer steps"
            )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """A setting that would do nothing is refused."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        idle = {
            "use_peft": ["lora_r", "lora_alpha", "lora_dropout"],
            "sync_ref_model": ["ref_model_mixup_alpha", "ref_model_sync_steps"],
            "dynamic_sampling": ["max_refills"],
        }
        for switch, names in idle.items():
            for name in names:
                if not getattr(self, switch) and getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} does nothing while {switch} is off; set {switch}: true or drop {name}"
                    )
        if self.lora_dropout and self.disable_dropout:
            raise ConfigError(
                "lora_dropout does nothing while disable_dropout is on; set disable_dropout: false or drop it"
            )
        if self.ref_cache_dir is not None and not self.precompute_ref_log_probs:
            raise ConfigError(
                "ref_cache_dir does nothing while precompute_ref_log_probs is off; set precompute_ref_log_probs: true or "
                "drop ref_cache_dir"
            )
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise ConfigError(
                "precompute_ref_log_probs keeps the log-probs of one reference, and sync_ref_model moves it; drop one"
            )
        if not self.use_peft and self.lora_target_modules != "all-linear":
            raise ConfigError("lora_target_modules does nothing while use_peft is off; set use_peft: true or drop it")
        if self.sampler_check_steps == 0 and self.sampler_check_bound is not None:
            raise ConfigError(
                "sampler_check_bound does nothing while sampler_check_steps is 0; set sampler_check_steps or drop it"
            )
        if self.replay_probability == 0 and self.replay_capacity != defaults["replay_capacity"]:
            raise ConfigError(
                "replay_capacity does nothing while replay_probability is 0; set replay_probability or drop it"
            )

    def _check_sizes(self) -> None:
        """Numbers that only later, and in other words, would turn out to be too large or too small."""
        largest = {"seed": 2**63 - 1, "learning_rate": _LARGEST, "weight_decay": _LARGEST}
        for name, high in largest.items():
            if getattr(self, name) > high:
                raise ConfigError(f"{name}={getattr(self, name):g} must be at most {high:g}; lower {name}")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name):g} must be below 1: at 1 it never moves; lower {name}")
        if self.temperature < _COLDEST:
            raise ConfigError(
                f"temperature={self.temperature:g} must be at least {_COLDEST:g}: below, log-probs are rounding errors "
                f"that were divided by it; raise temperature"
            )
        for name in ("stop_token_ids", "end_token_ids"):
            if any(token < 0 for token in getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)} must be token ids, 0 and up; change {name}")
        for name in ("pair_rewards", "reward_weights"):
            if any(not abs(value) <= _LARGEST for value in getattr(self, name) or ()):
                raise ConfigError(f"{name}={getattr(self, name)} must be finite, up to {_LARGEST:g}; change {name}")

    def _check_texts(self) -> None:
        """An empty path would stand for the working directory."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            parts = value if isinstance(value, list) else [value]
            if f.name not in ("objective", "separator", "run_name") and any(
                isinstance(part, str) and not part.strip() for part in parts
            ):
                raise ConfigError(f"{f.name}={value!r} is empty; give a value, or drop {f.name}")

    def _check_streaming(self) -> None:
        if not self.streaming:
            if self.shuffle_buffer is not None:
                raise ConfigError("shuffle_buffer does nothing without streaming: all rows are shuffled; drop it")
            return
        if self.max_steps is None or self.num_train_epochs != 1.0:
            raise ConfigError(
                "streaming does not know how many rows there are: set max_steps, and drop num_train_epochs"
            )
        for name in ("eval_fraction", "train_slice"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} needs all training rows, and streaming does not hold them; give eval_data, or files"
                )
        if self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs needs all training rows, and streaming does not hold them; drop one"
            )

    def _check_self_checks(self) -> None:
        if isinstance(self.self_checks, dict):
            for name in self.self_checks:
                if name not in SELF_CHECKS:
                    raise ConfigError(f"self_checks has no {name!r}{_check.suggestion(name, SELF_CHECKS)}")

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value < low:
            raise ConfigError(f"{name}={value} must be at least {low}; change {name}")

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        try:
            _check.number(name, getattr(self, name), low=low, high=high, open_low=open_low)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    # -- views --------------------------------------------------------------------------------------------------------
    def checks_itself(self, name: str) -> bool:
        """Whether one of :data:`SELF_CHECKS` is on: all are, but for those that ``self_checks`` switches off."""
        return self.self_checks.get(name, True) if isinstance(self.self_checks, dict) else self.self_checks

    @property
    def unused_weights(self) -> bool:
        """Whether trained tensors without a gradient are said to be right, by switching off that check by name."""
        return isinstance(self.self_checks, dict) and self.self_checks.get("gradients") is False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: a resumed run must agree on them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("free")}

    def digest(self) -> str:
        """A hash of :meth:`identity`."""
        return digest_of(self.identity())

    def objective_hyper(self) -> dict[str, Any]:
        """Hyper-parameters under the names of the loss functions."""
        aliases = {"beta": self.beta, "clip_eps": self.epsilon, "clip_eps_high": self.epsilon_high}
        hyper = {name: value for name, value in aliases.items() if value is not None}
        both = set(hyper) & set(self.objective_args)
        if both:
            raise ConfigError(f"{', '.join(sorted(both))} given twice, as a field and in objective_args; keep one")
        return {**hyper, **self.objective_args}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from a mapping; unknown keys are refused with the closest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                objective = values.get("objective")
                if isinstance(objective, str) and key in recipes.parameters(objective):
                    raise ConfigError(
                        f"{key!r} is a setting of objective {objective!r}; write objective_args: {{{key}: {values[key]!r}}} "
                        f"(on the command line objective_args.{key}={values[key]})"
                    )
                raise ConfigError(f"unknown setting {key!r}{_check.suggestion(str(key), known)}")
        return cls(**values)

    @classmethod
    def groups(cls) -> dict[str, list[dataclasses.Field[Any]]]:
        """Fields by topic, for help and documentation."""
        table: dict[str, list[dataclasses.Field[Any]]] = {}
        for f in dataclasses.fields(cls):
            table.setdefault(f.metadata["group"], []).append(f)
        return table


def digest_of(settings: Mapping[str, Any]) -> str:
    """A hash of settings, by name and value."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` if it has the declared type (an int passes as a float), else an error that names the type."""
    if (bad := _no_text(value)) is not None:
        raise ConfigError(
            f"{name} holds the text {ascii(bad)[:80]}, which has half a character (a surrogate) or a NUL; retype it"
        )
    if _fits(value, hint):
        if not _wants_float(hint) or isinstance(value, bool) or not isinstance(value, int):
            return value
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name} is a whole number of {len(str(value))} digits, too large to use") from None
    remedy = ""
    if isinstance(value, str):
        try:
            remedy = f"; write it as the number {float(value):g}, e.g. 1.0e-5 in YAML (1e-5 is a string there)"
        except ValueError:
            remedy = ""
    choices = list(_literals(hint))
    expected = " or ".join(map(repr, choices)) if choices and isinstance(value, str) else _type_name(hint)
    hint_word = _check.suggestion(value, [str(c) for c in choices]) if choices and isinstance(value, str) else ""
    raise ConfigError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}{remedy}{hint_word}")


def _no_text(value: Any) -> str | None:
    """A string in a value that no file name, tokenizer or log could take; None when there is none."""
    if isinstance(value, str):
        return value if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value) else None
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    parts = value if isinstance(value, (list, tuple)) else ()
    return next((bad for part in parts if (bad := _no_text(part)) is not None), None)


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType) and str not in get_args(hint):
        return [a for part in get_args(hint) for a in _literals(part)]
    return []


def _wants_float(hint: Any) -> bool:
    return hint is float or (get_origin(hint) in (Union, types.UnionType) and float in get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin is dict:
        inner = get_args(hint)[1] if get_args(hint) else Any
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, inner) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(
        hint, str(hint).replace("typing.", "")
    )


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check.

    Args:
        path: a YAML file (safe subset: no aliases, no duplicate keys), or None for overrides alone.
        overrides: ``key=value``; ``objective_args.beta=0.1`` reaches into mappings; values are YAML.

    Raises:
        ConfigError: for a broken file, an unknown key or a value that cannot work.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from None
        values = _yaml(text, str(path)) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    for key, value in parse_overrides(overrides).items():
        head, _, tail = key.partition(".")
        if tail:
            inner = values.setdefault(head, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {head} is not a mapping, so {tail!r} cannot be set inside it")
            inner[tail] = value
        else:
            values[head] = value
    return Config.from_dict(values)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["beta=0.1", "rewards=[math]"]`` -> ``{"beta": 0.1, "rewards": ["math"]}``."""
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is not key=value; e.g. beta=0.1")
        parsed[key.strip().lstrip("-")] = _yaml(value, text)
    return parsed


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        """SafeLoader that refuses duplicate keys and aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ConfigError(f"{where}: YAML aliases are not supported; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                try:
                    repeated = key in seen
                except TypeError:
                    raise ConfigError(f"{where}: a key must be text, got {key!r}") from None
                if repeated:
                    raise ConfigError(
                        f"{where}: key {key!r} appears twice (line {key_node.start_mark.line + 1}); keep one"
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        return Strict(text).get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # `!!int` and its like on text that is none ends in whatever the parser stumbled over
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
