"""Builds what a run is made of from its settings, and refuses what cannot work before anything heavy is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlft import recipes
from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.rules import check_settings
from rlft.run.keep import record
from rlft.run.measure.journal import Journal, quiet_transformers
from rlft.run.processes.agreement import refuse_other_runs
from rlft.run.processes.launch import accelerator_for, refuse_online_launcher
from rlft.run.processes.processes import Processes
from rlft.run.progress import Progress
from rlft.run.setup.arguments import check_module
from rlft.run.setup.data import (
    check_data,
    check_held_out,
    check_tokens,
    load_data,
    note_positions,
    tokenized,
    tokenizer_for,
)
from rlft.run.setup.models import adamw, check_trust, judge_for, policy_for, policy_model, rewards_for
from rlft.run.step.batch_sizes import batch_sizes
from rlft.run.step.correction import corrected_for
from rlft.run.step.parts import Parts, Stages
from rlft.run.step.players import players

__all__ = ["Given", "build", "objective_for"]


@dataclass(frozen=True)
class Given:
    """What was passed to the Trainer in memory; None where the settings say it."""

    model: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    tokenizer: Any = None
    reward_funcs: Any = None
    judge: Any = None
    peft_config: Any = None
    ref_model: Any = None
    sampler: Any = None
    optimizer: torch.optim.Optimizer | None = None


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


def build(config: Config, objective: Objective, given: Given, stages: Stages) -> Parts:
    """Everything of a run, in the order that fails cheapest first: settings, rewards, data, then models. Collective.

    Raises:
        ConfigError: for settings that cannot work.
        ValueError: for data or models that do not fit, on all processes.
    """
    from rlft import rollout
    from rlft.models.tokenizer import check_embedding

    specs = given.reward_funcs if given.reward_funcs is not None else config.rewards
    specs = [specs] if callable(specs) or isinstance(specs, (str, Mapping)) else list(specs)
    judge = given.judge if given.judge is not None else config.judge
    online = bool(specs) or judge is not None
    refuse_online_launcher(online=online and given.sampler is None)
    check_settings(config, objective, online=online, rewarded=bool(specs), judged=judge is not None)
    _refuse_idle(config, objective, given, online=online)
    progress = Progress(0)
    processes = Processes(accelerator_for(config), progress)
    source = given.model if given.model is not None else config.model
    with processes.together(ValueError, at=""):
        tokenizer, train, held_out = _data(config, objective, given, source, specs, online=online)
        rewards = rewards_for(config, specs, processes.device, tokenizer) if specs else None
        judge = judge_for(config, judge) if judge is not None else None
        sizes = batch_sizes(
            config,
            objective,
            None if config.streaming else len(train.examples),
            max((len(e.completions) for e in train.examples), default=1) or 1,
            processes.world_size,
            online=online,
        )
        progress.max_steps, progress.steps_per_epoch = sizes.total_steps, sizes.steps_per_epoch
        with quiet_transformers() if config.disable_tqdm else contextlib.nullcontext():
            loaded = policy_model(config, source, tokenizer, objective)
        check_module(loaded, objective)
        check_embedding(tokenizer, loaded)
        if processes.is_main:
            note_positions(config, loaded, train, online=online)
        policy = policy_for(config, objective, loaded, given.peft_config, given.ref_model)
        optimizer = given.optimizer or adamw(config, policy)
        # weights are whole still, and may be sharded later; one process compares them, and all are given those of the first
        hashes = {
            "columns": record.columns(train, objective, rewards, judge),
            "weights": record.weights(policy, rewards) if processes.is_main else {},
        }
    refuse_other_runs(processes, config, objective, train, held_out, policy, hashes["columns"])
    wrapped, adam = processes.accelerator.prepare(policy, optimizer)
    with processes.together(ValueError, at=""):
        sampler, replay = given.sampler, None
        if online and sampler is None:
            sampler = rollout.make_sampler(config.sampler, policy.hf_model, tokenizer)
        if config.replay_probability:
            replay = rollout.ReplayBuffer(config.replay_capacity, probability=config.replay_probability)
        judged = judge is not None and held_out is not None
        others = players(config, objective, policy, tokenizer, judged=judged)
    made_of = record.made_of(policy, tokenizer, objective, rewards, judge, device=processes.device, hashes=hashes)
    run_dir = Path(config.output_dir)
    return Parts(
        config=config,
        objective=corrected_for(sampler, config, objective, warns=processes.is_main) if online else objective,
        stages=stages,
        processes=processes,
        journal=Journal(processes, progress, run_dir, quiet=config.disable_tqdm),
        sizes=sizes,
        tokenizer=tokenizer,
        policy=policy,
        model=wrapped,
        optimizer=getattr(adam, "optimizer", adam),
        own_schedule=given.optimizer is None,
        train_data=train,
        eval_data=held_out,
        rewards=rewards,
        judge=judge,
        players=others,
        sampler=sampler,
        replay=replay,
        made_of=made_of,
        run_dir=run_dir,
    )


def _refuse_idle(config: Config, objective: Objective, given: Given, *, online: bool) -> None:
    """Refuse what was passed in memory and would do nothing.

    Raises:
        ConfigError: naming the argument.
    """
    if objective.trust_region is not None and given.optimizer is not None and not objective.needs_critic:
        raise ConfigError(f"optimizers does nothing: objective {objective.name!r} steps without one; drop it")
    if given.ref_model is not None and not objective.needs_reference:
        raise ConfigError(
            f"ref_model does nothing: objective {objective.name!r} has no reference (or beta is 0); leave it out"
        )
    if given.sampler is not None and not online:
        raise ConfigError("sampler does nothing without rewards; give reward_funcs to train online, or leave it out")
    if given.peft_config is not None and config.use_peft:
        raise ConfigError(
            "peft_config and use_peft both ask for adapters; keep one (lora_r and its like belong to use_peft)"
        )


def _data(
    config: Config, objective: Objective, given: Given, source: Any, specs: list[Any], *, online: bool
) -> tuple[Any, Any, Any]:
    """Tokenizer, training data and held-out data (or None), all checked."""
    from rlft.data import check_overlap

    if source is None:
        raise ConfigError("model is missing; give a hub id, a local folder, a config mapping or a module")
    check_trust(
        config,
        objective,
        source=source,
        tokenizer=given.tokenizer if given.tokenizer is not None else config.tokenizer,
        reference=given.ref_model if given.ref_model is not None else config.ref_model,
        specs=specs,
    )
    train_rows, eval_rows, texts = load_data(config, given.train_dataset, given.eval_dataset)
    tokenizer = tokenizer_for(config, given.tokenizer, source, texts)
    check_tokens(config, tokenizer)
    train = tokenized(config, train_rows, tokenizer, online=online)
    held_out = tokenized(config, eval_rows, tokenizer, online=online) if eval_rows is not None else None
    check_data(config, objective, train, online=online)
    if held_out is not None:
        check_held_out(config, objective, train, held_out, online=online)
        check_overlap(train.examples, held_out.examples)
    return tokenizer, train, held_out
