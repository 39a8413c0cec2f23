"""Builds what a run needs from its settings, and refuses what cannot work before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlft import display, recipes
from rlft._checks import check_data, check_settings
from rlft._parts import (
    accelerator_for,
    adamw,
    critic_for,
    load_data,
    lora_settings,
    policy_model,
    reference_for,
    rewards_for,
    tokenized,
    tokenizer_for,
)
from rlft._plan import Plan, plan
from rlft.config import Config, ConfigError
from rlft.errors import TrainingError
from rlft.metrics import MetricSums
from rlft.objective import Objective
from rlft.source import OfflineSource, OnlineSource, Refill, Source
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Parts", "build", "gather_metrics", "objective", "self_check", "source", "with_columns"]

logger = logging.getLogger("rlft")


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
    check_settings(config, objective, online=bool(specs))
    accelerator = accelerator_for(config)
    source = model if model is not None else config.model
    if source is None:
        raise ConfigError("model is missing; give a hub id, a local folder, a config mapping or a module")
    train_rows, eval_rows, texts = load_data(config, train_dataset, eval_dataset)
    tokenizer = tokenizer_for(config, tokenizer, source, texts)
    train = tokenized(config, train_rows, tokenizer, online=bool(specs))
    held_out = tokenized(config, eval_rows, tokenizer, online=bool(specs)) if eval_rows is not None else None
    check_data(config, objective, train, online=bool(specs))
    if held_out is not None:
        check_overlap(train.examples, held_out.examples)
    rewards = rewards_for(config, specs, accelerator.device, tokenizer) if specs else None

    with display.quiet_transformers() if config.disable_tqdm else contextlib.nullcontext():
        loaded = policy_model(config, source, tokenizer, objective)
    check_embedding(tokenizer, loaded)
    base = (
        models.add_lora(loaded, lora_settings(config, peft_config))
        if peft_config is not None or config.use_peft
        else loaded
    )
    if "scores" in objective.needs:
        policy = models.RewardScorer(base)
    else:
        policy = models.Policy(
            base,
            reference=reference_for(config, ref_model, objective),
            critic=critic_for(config, objective),
            dropout=not config.disable_dropout,
        )
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    models.check_trainable(policy)
    wrapped, adam = accelerator.prepare(policy, optimizer or adamw(config, policy))
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
