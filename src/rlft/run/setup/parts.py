"""Builds what a run needs from its settings, and refuses what cannot work before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlft import recipes
from rlft.config import Config, ConfigError
from rlft.metrics import MetricSums
from rlft.objective import Objective
from rlft.run import display
from rlft.run.keep import record as provenance
from rlft.run.processes import agreement as identity
from rlft.run.processes import launch as launched
from rlft.run.processes import processes as meeting
from rlft.run.setup import arguments
from rlft.run.setup import comparison_settings as pairwise_rules
from rlft.run.setup.models import (
    accelerator_for,
    adamw,
    check_trust,
    critic_for,
    freeze_unused_head,
    judge_for,
    load_data,
    lora_settings,
    policy_model,
    reference_for,
    rewards_for,
    tokenized,
    tokenizer_for,
)
from rlft.run.setup.settings import check_data, check_held_out, check_settings, check_tokens, note_positions
from rlft.run.step import comparisons as pairwise
from rlft.run.step import generation_counts as tally
from rlft.run.step import micro_batches as micro
from rlft.run.step import update as guard
from rlft.run.step.batch_sizes import Plan, plan
from rlft.run.step.source import OfflineSource, OnlineSource, Refill, Source
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Parts", "build", "collated", "gather_metrics", "objective", "source", "trust_step", "with_columns"]

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
    judge: Any
    players: pairwise.Players
    sampler: Any
    replay: Any
    plan: Plan
    hashes: dict[str, Any]


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
    judge: Any,
    peft_config: Any,
    ref_model: Any,
    sampler: Any,
    optimizer: torch.optim.Optimizer | None,
) -> Parts:
    """Everything of a run, in the order that fails cheapest first: settings, rewards, data, then models."""
    from rlft import rollout
    from rlft.data import check_overlap
    from rlft.models.tokenizer import check_embedding

    specs = reward_funcs if reward_funcs is not None else config.rewards
    specs = [specs] if callable(specs) or isinstance(specs, (str, Mapping)) else list(specs)
    judge = judge if judge is not None else config.judge
    online = bool(specs) or judge is not None
    launched.check_online(online=online and sampler is None)
    check_settings(config, objective, online=online, rewarded=bool(specs), judged=judge is not None)
    if objective.trust_region is not None and optimizer is not None and not objective.needs_critic:
        raise ConfigError(f"optimizers does nothing: objective {objective.name!r} steps without one; drop it")
    if ref_model is not None and not objective.needs_reference:
        raise ConfigError(
            f"ref_model does nothing: objective {objective.name!r} has no reference (or beta is 0); leave it out"
        )
    if sampler is not None and not online:
        raise ConfigError("sampler does nothing without rewards; give reward_funcs to train online, or leave it out")
    if peft_config is not None and config.use_peft:
        raise ConfigError(
            "peft_config and use_peft both ask for adapters; keep one (lora_r and its like belong to use_peft)"
        )
    accelerator = accelerator_for(config)
    source = model if model is not None else config.model
    with meeting.together(accelerator, ValueError):
        if source is None:
            raise ConfigError("model is missing; give a hub id, a local folder, a config mapping or a module")
        check_trust(
            config,
            objective,
            source=source,
            tokenizer=tokenizer if tokenizer is not None else config.tokenizer,
            reference=ref_model if ref_model is not None else config.ref_model,
            specs=specs,
        )
        train_rows, eval_rows, texts = load_data(config, train_dataset, eval_dataset)
        tokenizer = tokenizer_for(config, tokenizer, source, texts)
        check_tokens(config, tokenizer)
        train = tokenized(config, train_rows, tokenizer, online=online)
        held_out = tokenized(config, eval_rows, tokenizer, online=online) if eval_rows is not None else None
        check_data(config, objective, train, online=online)
        if held_out is not None:
            check_held_out(config, objective, train, held_out, online=online)
            check_overlap(train.examples, held_out.examples)
        rewards = rewards_for(config, specs, accelerator.device, tokenizer) if specs else None
        judge = judge_for(config, judge) if judge is not None else None
        steps = plan(
            config,
            objective,
            None if config.streaming else len(train.examples),
            _rows_per_example(train),
            accelerator.num_processes,
            online=online,
        )
        with display.quiet_transformers() if config.disable_tqdm else contextlib.nullcontext():
            loaded = policy_model(config, source, tokenizer, objective)
        arguments.check_module(loaded, objective)
        check_embedding(tokenizer, loaded)
        if accelerator.is_main_process:
            note_positions(config, loaded, train, online=online)
        policy = _policy(config, objective, loaded, peft_config, ref_model)
        optimizer = optimizer or adamw(config, policy)
        # weights are whole still, and may be sharded later; one process compares them, and all are given those of the first
        hashes = {
            "columns": provenance.columns(train, objective, rewards, judge),
            "weights": provenance.weights(policy, rewards) if accelerator.is_main_process else {},
        }
    identity.check(accelerator, config, objective, train, held_out, policy, hashes["columns"])
    wrapped, adam = accelerator.prepare(policy, optimizer)
    with meeting.together(accelerator, ValueError):
        if online and sampler is None:
            sampler = rollout.make_sampler(config.sampler, policy.hf_model, tokenizer)
        replay = None
        if config.replay_probability:
            replay = rollout.ReplayBuffer(config.replay_capacity, probability=config.replay_probability)
        judged = judge is not None and held_out is not None
        players = pairwise.players(config, objective, policy, tokenizer, judged=judged)
    return Parts(
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        model=wrapped,
        optimizer=getattr(adam, "optimizer", adam),
        train_data=train,
        eval_data=held_out,
        rewards=rewards,
        judge=judge,
        players=players,
        sampler=sampler,
        replay=replay,
        plan=steps,
        hashes=hashes,
    )


def _policy(config: Config, objective: Objective, loaded: Any, peft_config: Any, ref_model: Any) -> Any:
    """The module that is trained: adapters, reference and critic as the settings say."""
    from rlft import models

    base = loaded
    if peft_config is not None or config.use_peft:
        base = models.add_lora(loaded, lora_settings(config, peft_config))
    if "scores" in objective.needs:
        policy: Any = models.RewardScorer(base)
    else:
        policy = models.Policy(
            base,
            reference=reference_for(config, ref_model, objective),
            critic=critic_for(config, objective),
            dropout=not config.disable_dropout,
        )
        freeze_unused_head(base, objective)
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    models.check_trainable(policy)
    return policy


def source(trainer: Trainer) -> Source:
    """Where the trainer's micro-batches come from."""
    from rlft.data import EpochSampler, StreamOrder

    c, p, data = trainer.config, trainer.plan, trainer.train_data
    order: Any
    if c.streaming:
        # two blocks for each worker are the examples of two steps
        block = -(-p.draws // max(1, c.dataloader_num_workers))
        order = StreamOrder(
            data.open(trainer.rank, trainer.world_size, block=block, waiting=trainer.poll),
            p.draws,
            compare="data" not in c.accept_changed,
        )
    else:
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
        return micro.split(trainer, batch)

    each = pairwise_rules.groups_per_prompt(c, trainer.objective) if trainer.online else 1
    thinned = trainer.online and (pairwise_rules.wants_pairs(trainer.objective) or c.keep != "all")

    def cut(batch: Batch) -> list[Batch]:
        pieces = batch.split_groups(p.groups_per_step * each)
        return [pairwise.alive(piece) for piece in pieces] if thinned else pieces

    if trainer.online:
        return OnlineSource(
            order,
            lambda indices, step: trainer.rollout(indices, step),
            lambda batch: trainer.prepare(batch),
            cut,
            split,
            c.num_iterations,
            refill=Refill(p.draws * each, c.max_refills) if c.dynamic_sampling else None,
            together=lambda: _generation(trainer),
        )
    return OfflineSource(
        order,
        lambda indices: collated(trainer, data.pick(indices)),
        lambda batch: trainer.prepare(batch),
        split,
        lambda: guard.together(trainer),
    )


@contextlib.contextmanager
def _generation(trainer: Trainer) -> Iterator[None]:
    """Around the sampling and scoring of a generation."""
    trainer.tally = tally.Tally()
    with guard.together(trainer):
        yield
    tally.settle(trainer)


def collated(trainer: Trainer, examples: Sequence[Any]) -> Batch:
    """Examples with answers as a batch on the device, with precomputed reference log-probs where there are some."""
    from rlft.data import collate

    c = trainer.config
    pair_rewards = tuple(c.pair_rewards) if c.pair_rewards else None
    batch = collate(examples, pad_id=trainer.tokenizer.pad_token_id, pair_rewards=pair_rewards)
    return trainer.ref_logps.fill(with_columns(batch, examples, trainer.objective).to(trainer.device), examples)


def trust_step(trainer: Trainer) -> Any:
    """What moves the policy in place of the optimizer, where the objective has a trust region; else None."""
    if trainer.objective.trust_region is None:
        return None
    from rlft.run.step.trust_region import TrustStep

    return TrustStep(trainer)


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
