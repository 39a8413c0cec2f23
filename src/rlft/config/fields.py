"""The settings of a run: names, types, defaults and documentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Fields"]


def _doc(text: str, default: Any = dataclasses.MISSING, *, group: str, free: bool = False, **kwargs: Any) -> Any:
    """A field with its documentation; ``free`` marks settings that a resumed run may change."""
    if isinstance(default, (list, dict)):
        return field(
            default_factory=lambda: type(default)(default), metadata={"doc": text, "group": group, "free": free}
        )
    return field(default=default, metadata={"doc": text, "group": group, "free": free}, **kwargs)


@dataclass
class Fields:
    """The values alone, unchecked: what :mod:`rlft.config.checks` reads.

    :class:`rlft.config.Config` calls those checks; it is a class of its own so that they need not know their caller.
    """

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
    trust_remote_code: bool | list[str] = _doc(
        "Models whose own Python code may run, e.g. `[policy, reward]` (also `reference`, `critic`); true: the policy's alone.",
        False,
        group="model",
    )
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
    max_tokens_per_reward_batch: int | None = _doc(
        "Tokens (texts x longest text) that a reward model scores at a time; None: max_tokens_per_micro_batch, else 8 texts.",
        None,
        group="rewards",
    )
    max_unscored_steps: int = _doc(
        "Steps in a row without a scored answer after which the run stops.", 5, group="rewards", free=True
    )

    # -- steps
    per_device_train_batch_size: int = _doc("Examples (online: completions) per micro-batch.", 8, group="steps")
    per_device_eval_batch_size: int = _doc("The same in evaluation.", 8, group="steps", free=True)
    gradient_accumulation_steps: int = _doc("Micro-batches per optimizer step.", 1, group="steps")
    max_tokens_per_micro_batch: int | None = _doc(
        "Most tokens (rows x longest row) of any pass, with gradient or without; a group whose rows the loss compares stays "
        "whole.",
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
    metric_for_best_model: str | None = _doc(
        "Metric of an evaluation by which a step is the best so far; its checkpoint is written and kept. "
        "EarlyStoppingCallback reads it.",
        None,
        group="output",
        free=True,
    )
    greater_is_better: bool | None = _doc(
        "Whether more of it is better; default: unless its name ends with loss.", None, group="output", free=True
    )
    save_steps: int | None = _doc("Steps between checkpoints; None: at the end only.", None, group="output", free=True)
    save_total_limit: int | None = _doc("Checkpoints kept.", 2, group="output", free=True)
    resume: Literal["auto", "never"] | str = _doc(
        "`auto`: continue the run in output_dir; `never`; or a checkpoint.", "auto", group="output", free=True
    )
    accept_changed: list[str] = _doc(
        "Resume although these are not what the run was begun with: `data`, `objective`, `rewards`, `adapters`, `weights`.",
        [],
        group="output",
        free=True,
    )
    report_to: list[str] = _doc("Trackers of accelerate.", ["tensorboard"], group="output", free=True)
    run_name: str | None = _doc("Shown in trackers and reports.", None, group="output", free=True)
    log_completions: int = _doc("Answers printed at each evaluation.", 0, group="output", free=True)
    self_checks: bool | dict[str, bool] = _doc(
        "Checks before the first step and at it; `{padding: false}` leaves one out.", True, group="output", free=True
    )
    disable_tqdm: bool = _doc("No progress bar.", False, group="output", free=True)
    report: bool = _doc("Write report.html at the end (extra `report`).", False, group="output", free=True)
