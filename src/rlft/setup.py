"""Builds what a run needs from its settings, and refuses what cannot work before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlft import _meeting, display, recipes
from rlft.config import Config, ConfigError
from rlft.errors import TrainingError
from rlft.metrics import MetricSums
from rlft.objective import Objective
from rlft.source import OfflineSource, OnlineSource, Refill, Source
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Parts", "Plan", "build", "objective", "source"]

logger = logging.getLogger("rlft")

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "num_generations",
    "num_iterations", "steps_per_generation", "sampler", "replay_probability", "mask_truncated_completions",
    "dynamic_sampling",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run, per process unless it says otherwise.

    Attributes:
        total_steps: optimizer steps.
        draws: examples (offline) or prompts (online) drawn at once.
        micro_batch_rows: completions per micro-batch.
        micro_batch_groups: groups per micro-batch, where groups stay whole.
        groups_per_step: groups per optimizer step.
        updates_per_generation: optimizer steps fed by one generation, all iterations counted; 1 offline.
        steps_per_epoch: optimizer steps that one pass over the data takes.
    """

    total_steps: int
    draws: int
    micro_batch_rows: int
    micro_batch_groups: int
    groups_per_step: int
    updates_per_generation: int
    steps_per_epoch: int


@dataclass
class Parts:
    """What :func:`build` returns."""

    accelerator: Any
    tokenizer: Any
    policy: Any
    model: Any
    optimizer: torch.optim.Optimizer
    train_data: Any
    eval_data: Any
    rewards: Any
    sampler: Any
    replay: Any
    plan: Plan


def objective(config: Config, given: Objective | Callable[..., Any] | None) -> Objective:
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


def build(
    config: Config,
    objective: Objective,
    *,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: Any,
    reward_funcs: Any,
    peft_config: Any,
    ref_model: Any,
    sampler: Any,
    optimizer: torch.optim.Optimizer | None,
) -> Parts:
    """Everything of a run, in the order that fails cheapest first: settings, rewards, data, then models."""
    from rlft import models, rollout
    from rlft.data import check_overlap
    from rlft.models.tokenizer import check_embedding

    specs = reward_funcs if reward_funcs is not None else config.rewards
    specs = [specs] if callable(specs) or isinstance(specs, (str, Mapping)) else list(specs)
    _check_settings(config, objective, online=bool(specs))
    accelerator = _accelerator(config)
    source = model if model is not None else config.model
    if source is None:
        raise ConfigError("model is missing; give a hub id, a local folder, a config mapping or a module")
    train_rows, eval_rows, texts = _rows(config, train_dataset, eval_dataset)
    tokenizer = _tokenizer(config, tokenizer, source, texts)
    train = _tokenize(config, train_rows, tokenizer, online=bool(specs))
    held_out = _tokenize(config, eval_rows, tokenizer, online=bool(specs)) if eval_rows is not None else None
    _check_data(config, objective, train, online=bool(specs))
    if held_out is not None:
        check_overlap(train.examples, held_out.examples)
    rewards = _rewards(config, specs, accelerator.device, tokenizer) if specs else None

    with display.quiet_transformers() if config.disable_tqdm else contextlib.nullcontext():
        loaded = _load_policy(config, source, tokenizer, objective)
    check_embedding(tokenizer, loaded)
    base = (
        models.add_lora(loaded, _lora_settings(config, peft_config))
        if peft_config is not None or config.use_peft
        else loaded
    )
    if "scores" in objective.needs:
        policy = models.RewardScorer(base)
    else:
        policy = models.Policy(
            base,
            reference=_reference(config, ref_model, objective),
            critic=_critic(config, objective),
            dropout=not config.disable_dropout,
        )
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    models.check_trainable(policy)
    wrapped, adam = accelerator.prepare(policy, optimizer or _adamw(config, policy))
    if specs and sampler is None:
        sampler = rollout.make_sampler(config.sampler, policy.hf_model, tokenizer)
    replay = None
    if config.replay_probability:
        replay = rollout.ReplayBuffer(config.replay_capacity, probability=config.replay_probability)
    return Parts(
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        model=wrapped,
        optimizer=getattr(adam, "optimizer", adam),
        train_data=train,
        eval_data=held_out,
        rewards=rewards,
        sampler=sampler,
        replay=replay,
        plan=plan(
            config,
            objective,
            len(train.examples),
            _rows_per_example(train),
            accelerator.num_processes,
            online=bool(specs),
        ),
    )


# -- checks -------------------------------------------------------------------------------------------------------------
def _check_settings(config: Config, objective: Objective, *, online: bool) -> None:
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
        _check_on_policy(config, objective)
    elif objective.kl == "reward" or objective.advantage == "gae":
        raise ConfigError(
            f"objective {objective.name!r} needs samples of the policy itself; give `rewards` to train online"
        )


def _check_on_policy(config: Config, objective: Objective) -> None:
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


def _check_data(config: Config, objective: Objective, data: Any, *, online: bool) -> None:
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


# -- arithmetic -----------------------------------------------------------------------------------------------------------
def plan(
    config: Config, objective: Objective, examples: int, rows_per_example: int, world: int, *, online: bool
) -> Plan:
    """Batch sizes and step counts. Online, per_device_train_batch_size counts completions, as in TRL."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if online:
        n = config.num_generations
        micro_steps = config.steps_per_generation or accumulation
        draws = micro * micro_steps // n
        updates = micro_steps // accumulation * config.num_iterations
        groups, rows, micro_groups = micro * accumulation // n, micro, max(1, micro // n)
    else:
        draws = groups = micro * accumulation
        updates, rows, micro_groups = 1, micro * rows_per_example, micro
    if examples < draws * world:
        raise ConfigError(
            f"{examples} training examples are fewer than one step takes ({draws} on each of {world} processes); lower "
            f"per_device_train_batch_size or gradient_accumulation_steps, or add data"
        )
    left = examples % (draws * world)
    if left:
        what = "are drawn in a later epoch" if online else "make a smaller last step, averaged over its own rows"
        logger.warning(
            f"{examples} training examples do not divide into steps of {draws * world}: the last {left} of an epoch {what}"
        )
    draws_per_epoch = examples // (draws * world) if online else math.ceil(examples / (draws * world))
    per_epoch = draws_per_epoch * updates
    total = config.max_steps if config.max_steps is not None else max(1, math.ceil(per_epoch * config.num_train_epochs))
    if config.warmup_steps > total:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} is more than the {total} steps of this run; lower warmup_steps"
        )
    return Plan(total, draws, rows, micro_groups, groups, updates, per_epoch)


def source(trainer: Trainer) -> Source:
    """Where the trainer's micro-batches come from."""
    from rlft.data import EpochSampler, collate

    c, p, data = trainer.config, trainer.plan, trainer.train_data
    pad_id = trainer.tokenizer.pad_token_id
    order = EpochSampler(
        len(data.examples),
        batch_size=p.draws,
        seed=c.seed,
        rank=trainer.rank,
        world_size=trainer.world_size,
        # a short last generation would give processes different numbers of steps
        last="drop" if trainer.online else "keep",
    )

    def split(batch: Batch) -> list[Batch]:
        if trainer.online and not trainer.objective.needs_groups:
            return batch.split(p.micro_batch_rows, keep_groups=False)
        return batch.split_groups(p.micro_batch_groups)

    if trainer.online:
        return OnlineSource(
            order,
            lambda indices, step: trainer.rollout(indices, step),
            lambda batch: trainer.prepare(batch),
            lambda batch: batch.split_groups(p.groups_per_step),
            split,
            c.num_iterations,
            refill=Refill(p.draws, c.max_refills) if c.dynamic_sampling else None,
        )
    pair_rewards = tuple(c.pair_rewards) if c.pair_rewards else None

    def make_batch(indices: Sequence[int]) -> Batch:
        examples = [data.examples[i] for i in indices]
        batch = with_columns(collate(examples, pad_id=pad_id, pair_rewards=pair_rewards), examples, trainer.objective)
        return batch.to(trainer.device)

    return OfflineSource(order, make_batch, lambda batch: trainer.prepare(batch), split)


def with_columns(batch: Batch, examples: Sequence[Any], objective: Objective) -> Batch:
    """Numeric dataset columns that the objective names, as extras: one number per prompt, or a list with one per answer."""
    extras = dict(batch.extras)
    sizes = torch.bincount(batch.group_ids, minlength=batch.num_groups).tolist()
    for name in sorted(objective.columns):
        if not all(name in e.columns for e in examples):
            continue
        values: list[float] = []
        for example, size in zip(examples, sizes, strict=True):
            cell = example.columns[name]
            cells = list(cell) if isinstance(cell, (list, tuple)) else [cell] * size
            if len(cells) != size or any(isinstance(c, bool) or not isinstance(c, (int, float)) for c in cells):
                raise ValueError(
                    f"column {name!r}, which objective {objective.name!r} names, must hold one number per prompt or per answer "
                    f"({size} here); row {example.index} holds {cell!r}"
                )
            values += [float(c) for c in cells]
        extras[name] = torch.tensor(values)
    return batch.replace(extras=extras)


def _rows_per_example(data: Any) -> int:
    return max((len(e.completions) for e in data.examples), default=1) or 1


# -- parts ------------------------------------------------------------------------------------------------------------------
def _accelerator(config: Config) -> Any:
    from accelerate import Accelerator

    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision='fp16' needs a CUDA device; use 'no' or 'bf16'")
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"mixed_precision='bf16' is not supported by {torch.cuda.get_device_name()}; use 'fp16' or 'no'"
        )
    _meeting.meet()
    trackers: list[Any] = [t for t in config.report_to if t != "tensorboard" or importlib.util.find_spec("tensorboard")]
    return Accelerator(mixed_precision=config.mixed_precision, log_with=trackers or None, project_dir=config.output_dir)


def load(config: Config, name: str, given: Any) -> Any:
    """The rows of a setting (``train_data`` or ``eval_data``), or those given in memory, renamed; None without either."""
    from rlft.data import load_rows

    source = _expanded(name, given if given is not None else getattr(config, name))
    return load_rows(source, columns=config.columns or None) if source is not None else None


def _rows(config: Config, train: Any, held_out: Any) -> tuple[Any, Any, Any]:
    """Rows to train on, rows held out, and the rows that a tokenizer may be made of: the whole file but the held-out."""
    rows, held = load(config, "train_data", train), load(config, "eval_data", held_out)
    if rows is None:
        raise ConfigError("train_data is missing; give a path, a hub name or rows in memory")
    if config.eval_fraction is not None:
        rows, held = rows.split(config.eval_fraction, seed=0)
    texts = rows
    if config.train_slice is not None:
        start, stop = (round(part * len(rows)) for part in config.train_slice)
        if start == stop:
            raise ConfigError(f"train_slice={config.train_slice} of {len(rows)} rows holds none; widen it, or add data")
        rows = rows.select(range(start, stop))
    if held is None:
        for name in ("eval_steps", "eval_rows"):
            if getattr(config, name) is not None:
                raise ConfigError(f"{name} does nothing without evaluation data; give eval_data or eval_fraction")
        if config.eval_on_start:
            raise ConfigError("eval_on_start does nothing without evaluation data; give eval_data or eval_fraction")
    elif config.eval_rows is not None:
        held = held.select(range(min(config.eval_rows, len(held))))
    return rows, held, texts


def _expanded(name: str, paths: Any) -> Any:
    """Paths with ``${NAME}`` read from the environment."""
    if isinstance(paths, list):
        return [_expanded(name, path) for path in paths]
    if isinstance(paths, str) and "$" in (path := os.path.expandvars(paths)):
        raise ConfigError(
            f"{name}={paths!r} names an environment variable that is not set (it became {path!r}); set it"
        )
    return os.path.expandvars(paths) if isinstance(paths, str) else paths


def _tokenizer(config: Config, given: Any, source: Any, rows: Any) -> Any:
    from rlft import models
    from rlft.models.vocabulary import train_tokenizer

    if given is not None and not isinstance(given, (str, Path)):
        models.check_tokenizer(given)
        return given
    name = given if given is not None else config.tokenizer
    if isinstance(name, Mapping):
        return train_tokenizer(rows, **name)
    if name is None and isinstance(source, (str, Path)):
        name = source
    if name is None:
        path = getattr(getattr(source, "config", None), "_name_or_path", "")
        if not path:
            raise ConfigError("the tokenizer is missing; pass processing_class, or set tokenizer")
        name = path
    return models.load_tokenizer(name, revision=config.model_revision, trust_remote_code=config.trust_remote_code)


def _tokenize(config: Config, rows: Any, tokenizer: Any, *, online: bool) -> Any:
    from rlft.data import tokenize

    form = "prompt" if online and config.data_format == "auto" else config.data_format
    return tokenize(
        rows,
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        end_token_ids=config.end_token_ids,
        format=form,
        max_bad_fraction=config.max_bad_fraction,
        separator=config.separator,
    )


def _rewards(config: Config, specs: list[Any], device: torch.device, tokenizer: Any) -> Any:
    from rlft import models
    from rlft.rewards import RewardSet, load_reward

    functions = []
    for spec in specs:
        if isinstance(spec, (str, Path)) and Path(spec).is_dir():
            scorer = models.ModelReward(spec)
            scorer.scorer.to(device)
            functions.append(scorer)
        else:
            functions.append(load_reward(str(spec) if isinstance(spec, Path) else spec))
        if isinstance(functions[-1], models.ModelReward) and _other_tokens(functions[-1].tokenizer, tokenizer):
            warnings.warn(
                f"reward model {functions[-1].__name__!r} has another tokenizer than the policy: answers are decoded, and "
                f"their text is encoded again for it, so both read the same text but not the same tokens",
                stacklevel=5,
            )
    return RewardSet(functions, weights=config.reward_weights, timeout=config.reward_timeout)


def _other_tokens(one: Any, other: Any) -> bool:
    return one is not other and one.get_vocab() != other.get_vocab()


def _load_policy(config: Config, source: Any, tokenizer: Any, objective: Objective) -> Any:
    from rlft import models

    if isinstance(source, Mapping):
        source = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
                  "bos_token_id": tokenizer.bos_token_id, **source}  # fmt: skip
    load = models.load_sequence_classifier if "scores" in objective.needs else models.load_causal_lm
    return load(
        source,
        dtype=config.dtype,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        seed=config.seed,
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
    )


def _lora_settings(config: Config, given: Any) -> Any:
    from rlft.models import LoraSettings

    if given is not None:
        return LoraSettings(**given) if isinstance(given, Mapping) else given
    return LoraSettings(
        r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=config.lora_target_modules
    )


def _reference(config: Config, given: Any, objective: Objective) -> Any:
    if not objective.needs_reference:
        return "none"
    target = given if given is not None else config.ref_model
    if target is None:
        return "copy" if config.sync_ref_model else "auto"
    from rlft.models import load_causal_lm

    return (
        load_causal_lm(target, dtype=config.dtype).requires_grad_(False) if isinstance(target, (str, Path)) else target
    )


def _critic(config: Config, objective: Objective) -> Any:
    if not objective.needs_critic:
        return "none"
    if config.critic in (None, "shared"):
        return "shared"
    from rlft.models import load_causal_lm

    return load_causal_lm(config.critic, dtype=config.dtype)


def _adamw(config: Config, policy: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable weights; vectors (norms, biases) are not decayed."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def gather_metrics(accelerator: Any, sums: MetricSums) -> dict[str, float]:
    """Means over all processes: sums and counts are added up before dividing."""
    if accelerator.num_processes > 1:
        sums = sums.reduce(accelerator.gather, device=accelerator.device)
    return sums.means()


def self_check(trainer: Trainer) -> None:
    """Before the first step: where the reference is the policy as it was passed, both give the same log-probs."""
    from rlft import online

    if getattr(trainer.policy, "reference_kind", "none") not in ("adapter_off", "adapter_copy", "snapshot"):
        return
    examples = trainer.train_data.examples[:2]
    batch = _probe_batch(trainer, examples)
    outputs = online.no_grad_outputs(trainer, batch, frozenset({"logps", "ref_logps"}))
    gap = float((outputs["logps"] - outputs["ref_logps"]).abs().max())
    if not gap <= 1e-4:
        raise TrainingError(
            f"self-check: policy and reference should be one model before the first step, but their log-probs differ by up "
            f"to {gap:.3g}; likely causes: dropout, a trained adapter under a bare reference, or mixed precision. "
            f"Set self_checks: false to go on regardless"
        )


def _probe_batch(trainer: Trainer, examples: list[Any]) -> Batch:
    """A few real tokens: the answers where there are some, else the prompts scored as answers."""
    rows = [(e.prompt_ids, c.ids) for e in examples for c in e.completions] or [
        (e.prompt_ids[:1], e.prompt_ids[1:] or e.prompt_ids) for e in examples
    ]
    pieces = []
    for prompt, answer in rows:
        ids, exists = torch.tensor([answer]), torch.ones(1, len(answer), dtype=torch.bool)
        prompts = torch.tensor([prompt])
        pieces.append(
            Batch(
                prompts,
                torch.ones_like(prompts, dtype=torch.bool),
                ids,
                exists,
                exists,
                torch.zeros(1, dtype=torch.long),
            )
        )
    return Batch.concat(pieces).to(trainer.device)
