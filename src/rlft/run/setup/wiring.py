"""Connects the parts of a run. A new feature is a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlft.config import Config
from rlft.objective import Objective
from rlft.run.callbacks import CallbackHandler
from rlft.run.checks.before import SelfChecks
from rlft.run.checks.first_step import FirstStep
from rlft.run.evaluate import Evaluation
from rlft.run.keep.checkpoints import Checkpoints
from rlft.run.keep.export import Export
from rlft.run.keep.record import RunFiles
from rlft.run.keep.ref_logps import RefLogpCache
from rlft.run.measure.journal import Journal
from rlft.run.measure.streamed_rows import StreamedRows
from rlft.run.setup.parts import Parts
from rlft.run.step import pairing
from rlft.run.step.collate import Collator
from rlft.run.step.comparisons import Comparisons, alive, compares
from rlft.run.step.correction import SamplerCorrection, corrected_for, correction_settings
from rlft.run.step.generation_counts import FlipWatch, GenerationCounts
from rlft.run.step.kl_control import KLControl
from rlft.run.step.micro_batches import MicroBatches
from rlft.run.step.moving_weights import AverageFollows, ReferenceFollows
from rlft.run.step.passes import Passes
from rlft.run.step.sampler_trust import SamplerTrust
from rlft.run.step.sampling import Sampling
from rlft.run.step.source import OfflineSource, OnlineSource, Refill, Source
from rlft.run.step.step_errors import StepErrors
from rlft.run.step.trust_region import TrustRegion
from rlft.run.step.update import Update
from rlft.run.step.watchers import Watcher
from rlft.types import Batch

__all__ = ["Connected", "Stages", "connect"]


@dataclass(frozen=True)
class Stages:
    """Methods of the trainer that a subclass may override; each is looked up when it is called."""

    rollout: Callable[[Sequence[Any], int], Batch]
    score: Callable[..., Any]
    prepare: Callable[[Batch], Batch]
    forward: Callable[[Batch, frozenset[str]], dict[str, Tensor]]
    save_model: Callable[[Path], None]


@dataclass(frozen=True)
class Connected:
    """The objects of a run, each the owner of its own state.

    Attributes:
        objective: corrected for its sampler, where the settings say so.
        first_step: makes the watcher of the first step; None where its checks are off.
        self_checks: what is proved before that.
        watchers: who watches every step.
        streamed_rows: counts the rows of a stream; None for data in memory.
        ref_logps: reads or computes what the reference says of the data; None where that is not asked for.
    """

    objective: Objective
    source: Source
    micro_batches: MicroBatches
    collate: Collator
    counts: GenerationCounts
    errors: StepErrors
    kl_control: KLControl | None
    sampling: Sampling | None
    passes: Passes
    trust_region: TrustRegion | None
    update: Update
    watchers: list[Watcher]
    first_step: Callable[[], FirstStep] | None
    self_checks: SelfChecks
    evaluation: Evaluation
    streamed_rows: StreamedRows | None
    ref_logps: RefLogpCache | None
    files: RunFiles
    export: Export
    checkpoints: Checkpoints


def connect(
    config: Config,
    objective: Objective,
    parts: Parts,
    stages: Stages,
    *,
    journal: Journal,
    callbacks: CallbackHandler,
    temperature: float,
    own_schedule: bool,
) -> Connected:
    """Everything that makes a step, measures it and keeps it.

    Args:
        config: the run's settings.
        objective: as it was given.
        parts: what the run is made of.
        stages: of the trainer.
        journal: of the run.
        callbacks: of the run.
        temperature: divides the logits.
        own_schedule: whether the learning rate follows the settings.
    """
    processes, sizes, online = parts.processes, parts.sizes, parts.online
    if online:
        objective = corrected_for(parts.sampler, config, objective, warns=processes.is_main)
    about: dict[str, Any] = {"processes": processes, "journal": journal}
    errors = StepErrors(config, sizes, parts.progress, parts.optimizer, parts.sampler, processes.device)
    micro_batches = MicroBatches(config, sizes, objective, processes, journal, online=online)
    collate = Collator(config, objective, parts.tokenizer.pad_token_id, processes.device)
    counts = GenerationCounts(config, objective, processes, journal, judged=parts.judge is not None)
    source = _source(config, objective, parts, stages, micro_batches, collate, counts)
    kl_control = trust = sampling = trust_region = None
    if config.kl_controller is not None:
        kl_control = KLControl(config, objective, sizes, source, processes, journal)
    if online:
        trust = SamplerTrust(
            config,
            parts.sampler,
            parts.policy,
            parts.tokenizer.pad_token_id,
            micro_batches,
            processes,
            journal,
            draws_others=parts.replay is not None or parts.players.opponent is not None,
        )
        sampling = _sampling(config, objective, parts, stages, journal, errors=errors, trust=trust, counts=counts)
    passes = Passes(
        config,
        sizes,
        parts.policy,
        micro_batches=micro_batches,
        forward=stages.forward,
        trust=trust,
        kl_control=kl_control,
        **about,
    )
    scoring: dict[str, Any] = {"forward": stages.forward, "temperature": temperature, **about}
    if objective.trust_region is not None:
        trust_region = TrustRegion(objective, parts.policy, max_grad_norm=config.max_grad_norm, **scoring)
    update = Update(
        config,
        parts.model,
        parts.optimizer,
        errors=errors,
        trust_region=trust_region,
        own_schedule=own_schedule,
        **about,
    )
    export = Export(
        config, parts.run_dir, parts.policy, parts.tokenizer, processes=processes, save_model=stages.save_model
    )
    owners = [parts.progress, counts, update, trust, kl_control]
    checkpoints = Checkpoints(
        config,
        parts.run_dir,
        policy=parts.policy,
        optimizer=parts.optimizer,
        data=parts.train_data,
        made_of=parts.made_of,
        source=source,
        replay=parts.replay,
        average=parts.players.average,
        counters=[owner for owner in owners if owner is not None],
        callbacks=callbacks,
        export=export,
        saved=callbacks.saved,
        **about,
    )
    watching: dict[str, Any] = {"online": online, "temperature": temperature, **about}
    self_checks = SelfChecks(
        config,
        objective,
        sizes,
        policy=parts.policy,
        optimizer=parts.optimizer,
        tokenizer=parts.tokenizer,
        data=parts.train_data,
        passes=passes,
        errors=errors,
        rehearse=checkpoints.rehearse,
        **watching,
    )
    evaluation = Evaluation(
        config,
        parts.tokenizer,
        train_format=parts.train_data.format,
        data=parts.eval_data,
        passes=passes,
        collate=collate,
        sampling=sampling,
        forward=stages.forward,
        **about,
    )
    ref_logps = None
    if config.precompute_ref_log_probs:
        ref_logps = RefLogpCache(config, sizes, parts.policy, parts.tokenizer.pad_token_id, **scoring)
    return Connected(
        objective=objective,
        source=source,
        micro_batches=micro_batches,
        collate=collate,
        counts=counts,
        errors=errors,
        kl_control=kl_control,
        sampling=sampling,
        passes=passes,
        trust_region=trust_region,
        update=update,
        watchers=_watchers(config, objective, parts, source, journal, trust=trust, kl_control=kl_control),
        first_step=(lambda: FirstStep(config, objective, parts.policy, parts.optimizer, **watching))
        if FirstStep.wanted(config)
        else None,
        self_checks=self_checks,
        evaluation=evaluation,
        streamed_rows=StreamedRows(source.order.stream, processes, journal) if config.streaming else None,
        ref_logps=ref_logps,
        files=RunFiles(config, parts.run_dir, processes, parts.made_of),
        export=export,
        checkpoints=checkpoints,
    )


def _watchers(
    config: Config,
    objective: Objective,
    parts: Parts,
    source: Source,
    journal: Journal,
    *,
    trust: SamplerTrust | None,
    kl_control: KLControl | None,
) -> list[Watcher]:
    """Who watches every step of this run, in order; what its settings leave out is not among them."""
    found: list[Watcher] = []
    if trust is not None and config.sampler_check_steps:
        found.append(trust)
    if kl_control is not None:
        found.append(kl_control)
    if (options := correction_settings(config)) is not None:
        found.append(SamplerCorrection(options, journal))
    if any(term.lr_coef for term in objective.terms):
        found.append(FlipWatch(objective, journal))
    if config.sync_ref_model:
        found.append(ReferenceFollows(config, parts.policy, source, parts.progress))
    if parts.players.average is not None:
        found.append(AverageFollows(parts.players.average))
    return found


def _source(
    config: Config,
    objective: Objective,
    parts: Parts,
    stages: Stages,
    micro_batches: MicroBatches,
    collate: Collator,
    counts: GenerationCounts,
) -> OfflineSource | OnlineSource:
    """Where the micro-batches come from: a dataset, or answers sampled for its prompts."""
    from rlft.data import EpochSampler, StreamOrder

    c, sizes, processes, data, online = config, parts.sizes, parts.processes, parts.train_data, parts.online
    order: Any
    if c.streaming:
        # two blocks for each worker are the examples of two steps
        block = -(-sizes.draws // max(1, c.dataloader_num_workers))
        order = StreamOrder(
            data.open(processes.rank, processes.world_size, block=block, waiting=processes.poll),
            sizes.draws,
            compare="data" not in c.accept_changed,
        )
    else:
        order = EpochSampler(
            len(data.examples),
            batch_size=sizes.draws,
            seed=c.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            # a short last generation would give processes different numbers of steps
            last="drop" if online else "keep",
        )
    if not online:
        made = lambda drawn: collate(data.pick(drawn))  # noqa: E731
        return OfflineSource(order, made, stages.prepare, micro_batches.split, processes.together)
    each = pairing.groups_per_prompt(c, objective)
    thinned = pairing.wants_pairs(objective) or c.keep != "all"

    def cut(batch: Batch) -> list[Batch]:
        pieces = batch.split_groups(sizes.groups_per_step * each)
        return [alive(piece) for piece in pieces] if thinned else pieces

    return OnlineSource(
        order,
        stages.rollout,
        stages.prepare,
        cut,
        micro_batches.split,
        c.num_iterations,
        refill=Refill(sizes.draws * each, c.max_refills) if c.dynamic_sampling else None,
        together=counts.generation,
    )


def _sampling(
    config: Config,
    objective: Objective,
    parts: Parts,
    stages: Stages,
    journal: Journal,
    *,
    errors: StepErrors,
    trust: SamplerTrust,
    counts: GenerationCounts,
) -> Sampling:
    """Who samples and scores in an online run."""
    about: dict[str, Any] = {"processes": parts.processes, "journal": journal, "score": stages.score}
    comparisons = None
    if compares(config, objective, judged=parts.judge is not None):
        comparisons = Comparisons(config, objective, parts.tokenizer, judge=parts.judge, players=parts.players, **about)
    return Sampling(
        config,
        objective,
        parts.policy,
        parts.tokenizer,
        sampler=parts.sampler,
        rewards=parts.rewards,
        replay=parts.replay,
        comparisons=comparisons,
        errors=errors,
        trust=trust,
        counts=counts,
        **about,
    )
