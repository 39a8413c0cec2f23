"""Connects the parts of a run. A new feature is a file of its own, and a line here."""

from __future__ import annotations

from typing import Any

from rlft.rules.comparisons import groups_per_prompt, wants_pairs
from rlft.rules.correction import correction_settings
from rlft.run.callbacks import CallbackHandler
from rlft.run.checks.before import SelfChecks
from rlft.run.evaluate import Evaluation
from rlft.run.keep.checkpoints import Checkpoints
from rlft.run.keep.export import Export
from rlft.run.keep.record import RunFiles
from rlft.run.keep.ref_logps import RefLogpCache
from rlft.run.measure.streamed_rows import StreamedRows
from rlft.run.step.collate import Collator
from rlft.run.step.comparisons import Comparisons, alive, compares
from rlft.run.step.correction import SamplerCorrection
from rlft.run.step.generation_counts import FlipWatch, GenerationCounts
from rlft.run.step.kl_control import KLControl
from rlft.run.step.micro_batches import MicroBatches
from rlft.run.step.moving_weights import AverageFollows, ReferenceFollows
from rlft.run.step.parts import Parts
from rlft.run.step.passes import Passes
from rlft.run.step.sampler_trust import SamplerTrust
from rlft.run.step.sampling import Sampling
from rlft.run.step.source import OfflineSource, OnlineSource, Refill
from rlft.run.step.step_errors import StepErrors
from rlft.run.step.trust_region import TrustRegion
from rlft.run.step.update import Update
from rlft.run.step.watchers import Watcher, Watchers
from rlft.types import Batch

__all__ = ["Connected"]


class Connected:
    """What a trainer is connected to: what its run is made of, and the owners of all that moves in it.

    Args:
        parts: what the run is made of.
        callbacks: functions and ``TrainerCallback`` objects.

    Attributes:
        state: how far the run is, a :class:`~rlft.run.progress.Progress`.
        control: what callbacks ask of the loop, a :class:`~rlft.run.callbacks.Control`.
        watchers: who watches every step; one for the first joins them where its checks are on.
        streamed_rows: counts the rows of a stream; None for data in memory.
        ref_logps: reads or computes what the reference says of the data; None where that is not asked for.
    """

    def __init__(self, parts: Parts, callbacks: list[Any]) -> None:
        self.parts, self.config, self.objective, self.plan = parts, parts.config, parts.objective, parts.sizes
        self.tokenizer, self.policy, self.model = parts.tokenizer, parts.policy, parts.model
        self.train_data, self.eval_data, self.optimizer = parts.train_data, parts.eval_data, parts.optimizer
        self.rewards, self.judge, self.sampler = parts.rewards, parts.judge, parts.sampler
        self.run_dir, self.online, self.scoring_temperature = parts.run_dir, parts.online, parts.temperature
        self.processes = processes = parts.processes
        self.accelerator, self.device, self.rank = processes.accelerator, processes.device, processes.rank
        self.world_size, self.is_main = processes.world_size, processes.is_main
        self.state, self.journal, self.callbacks = processes.progress, parts.journal, callbacks
        self.callback_handler = CallbackHandler(self, parts)
        self.control = self.callback_handler.control
        self._connect_step(parts)
        self._connect_files(parts)

    def _connect_step(self, parts: Parts) -> None:
        self.errors, self.micro_batches = StepErrors(parts), MicroBatches(parts)
        self.collate, self.counts = Collator(parts), GenerationCounts(parts)
        self.source = self._source(parts)
        self.kl_control = KLControl(parts, self.source) if parts.config.kl_controller is not None else None
        trust = self.sampling = None
        if parts.online:
            trust = SamplerTrust(parts, self.micro_batches)
            self.sampling = Sampling(
                parts,
                comparisons=Comparisons(parts) if compares(parts) else None,
                errors=self.errors,
                trust=trust,
                counts=self.counts,
            )
        self.passes = Passes(parts, self.micro_batches, trust=trust, kl_control=self.kl_control)
        self.trust_region = TrustRegion(parts) if parts.objective.trust_region is not None else None
        self.update = Update(parts, self.errors, self.trust_region)
        self.watchers = Watchers(self._watchers(parts, trust))

    def _connect_files(self, parts: Parts) -> None:
        self.evaluation = Evaluation(parts, self.passes, self.collate, self.sampling)
        self.export, self.files = Export(parts), RunFiles(parts)
        trust = self.sampling.trust if self.sampling is not None else None
        owners = (self.state, self.counts, self.update, trust, self.kl_control)
        self.checkpoints = Checkpoints(
            parts,
            source=self.source,
            counters=[owner for owner in owners if owner is not None],
            callbacks=self.callback_handler,
            export=self.export,
            saved=self.callback_handler.saved,
        )
        self.self_checks = SelfChecks(parts, self.passes, self.errors, self.checkpoints.rehearse)
        streams, precomputes = parts.config.streaming, parts.config.precompute_ref_log_probs
        self.streamed_rows = StreamedRows(self.source.order.stream, parts.journal) if streams else None
        self.ref_logps = RefLogpCache(parts) if precomputes else None

    def _watchers(self, parts: Parts, trust: SamplerTrust | None) -> list[Watcher]:
        """Who watches every step of this run, in order; what its settings leave out is not among them."""
        config = parts.config
        found: list[Watcher] = []
        if trust is not None and config.sampler_check_steps:
            found.append(trust)
        if self.kl_control is not None:
            found.append(self.kl_control)
        if (options := correction_settings(config)) is not None:
            found.append(SamplerCorrection(options, parts.journal))
        if any(term.lr_coef for term in parts.objective.terms):
            found.append(FlipWatch(parts))
        if config.sync_ref_model:
            found.append(ReferenceFollows(parts, self.source))
        if parts.players.average is not None:
            found.append(AverageFollows(parts.players.average))
        return found

    def _source(self, parts: Parts) -> OfflineSource | OnlineSource:
        """Where the micro-batches come from: a dataset, or answers sampled for its prompts."""
        from rlft.data import EpochSampler, StreamOrder

        c, sizes, processes, data, online = parts.config, parts.sizes, parts.processes, parts.train_data, parts.online
        order: Any
        if c.streaming:
            # two blocks for each worker are the examples of two steps
            block = -(-sizes.draws // max(1, c.dataloader_num_workers))
            rows = data.open(processes.rank, processes.world_size, block=block, waiting=processes.poll)
            order = StreamOrder(rows, sizes.draws, compare="data" not in c.accept_changed)
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
            return OfflineSource(order, self.collate.drawn, parts.stages, self.micro_batches.split, processes.together)
        each = groups_per_prompt(c, parts.objective)
        thinned = wants_pairs(parts.objective) or c.keep != "all"

        def cut(batch: Batch) -> list[Batch]:
            pieces = batch.split_groups(sizes.groups_per_step * each)
            return [alive(piece) for piece in pieces] if thinned else pieces

        refill = Refill(sizes.draws * each, c.max_refills) if c.dynamic_sampling else None
        return OnlineSource(
            order, parts.stages, cut, self.micro_batches.split, c.num_iterations, refill, self.counts.generation
        )
