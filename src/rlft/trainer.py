"""The one loop. It knows no algorithm: the objective says what it needs, the sources bring it.

One optimizer step::

    source.next -> micro-batches (online: sample, score; then reference, old log-probs, advantages)
    -> denominators counted over all micro-batches and processes
    -> for each micro-batch: forward, objective, backward
    -> clip, guard, step; metrics under the same denominators
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft._failpoint import instant
from rlft.config import Config
from rlft.errors import Interrupted, TrainingError
from rlft.metrics import MetricsLog, MetricSums
from rlft.objective import Objective
from rlft.rollout import fold_seed
from rlft.run import display, evaluate
from rlft.run.checks import before as selfcheck
from rlft.run.checks import first_step
from rlft.run.keep import checkpoints as _state
from rlft.run.keep import record as provenance
from rlft.run.keep import ref_logps as ref_cache
from rlft.run.measure import streamed_rows as rows_read
from rlft.run.measure.meter import Meter
from rlft.run.processes import processes as meeting
from rlft.run.processes import signals
from rlft.run.setup import arguments
from rlft.run.setup import parts as setup
from rlft.run.step import apply_update as _update
from rlft.run.step import correction
from rlft.run.step import generation_counts as tally
from rlft.run.step import kl_control as controllers
from rlft.run.step import micro_batches as micro
from rlft.run.step import passes as constants
from rlft.run.step import sampler_trust as watchdog
from rlft.run.step import sampling as online
from rlft.run.step import update as guard
from rlft.schedule import learning_rate
from rlft.types import Batch

__all__ = ["Trainer"]

Callback = Callable[[str, "Trainer", Mapping[str, Any]], None]


class Trainer:
    """Trains a policy (or a reward model) on any objective, offline or online.

    Args:
        model: hub id, local folder, config mapping, or a module in memory (plain or PEFT). Default: ``args.model``.
        args: a :class:`~rlft.config.Config`, or a mapping of its fields.
        objective: an :class:`~rlft.objective.Objective` or a loss function; default: ``args.objective`` by name.
        train_dataset: rows in memory or a path; default ``args.train_data``.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; default: the one beside the model.
        reward_funcs: functions with TRL's signature, names, or folders. Giving some makes the run online.
        judge: a reward function that also takes ``opponents``, one other answer for each completion, and returns the
            probabilities that the completions beat them; default ``args.judge``. Makes the run online.
        peft_config: LoRA settings (``peft.LoraConfig``, ``LoraSettings`` or a mapping); adapters are added to the model.
        ref_model: reference; default: the policy as it was passed.
        sampler: a :class:`~rlft.rollout.Sampler`; default by ``args.sampler``.
        optimizers: (optimizer or None, None); the learning rate follows ``args`` unless an optimizer is given.
        callbacks: called as ``callback(event, trainer, values)`` for ``step``, ``evaluate``, ``save`` and ``end``.

    Raises:
        ConfigError: for settings that cannot work, before anything is loaded where possible.
        ValueError: for data or models that do not fit.

    Override ``rollout``, ``score``, ``prepare``, ``compute_loss``, ``optimizer_step`` or ``evaluate`` to change a stage.
    """

    def __init__(
        self,
        model: Any = None,
        args: Config | Mapping[str, Any] | None = None,
        *,
        objective: Objective | Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_funcs: Any = None,
        judge: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        sampler: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, None] = (None, None),
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.config = arguments.settings(args)
        arguments.check_kinds(
            model=model,
            objective=objective,
            processing_class=processing_class,
            reward_funcs=reward_funcs,
            judge=judge,
            peft_config=peft_config,
            sampler=sampler,
            optimizers=optimizers,
        )
        self.callbacks = arguments.callbacks(callbacks)
        self.objective = setup.objective(self.config, objective)
        parts = setup.build(
            self.config,
            self.objective,
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=processing_class,
            reward_funcs=reward_funcs,
            judge=judge,
            peft_config=peft_config,
            ref_model=ref_model,
            sampler=sampler,
            optimizer=optimizers[0],
        )
        self.accelerator, self.tokenizer, self.policy = parts.accelerator, parts.tokenizer, parts.policy
        self.model, self.optimizer = parts.model, parts.optimizer
        self.train_data, self.eval_data = parts.train_data, parts.eval_data
        self.rewards, self.sampler, self.replay = parts.rewards, parts.sampler, parts.replay
        self.judge, self.opponent = parts.judge, parts.players.opponent
        self.average, self.baseline = parts.players.average, parts.players.baseline
        self.plan, self.own_schedule = parts.plan, optimizers[0] is None
        self.made_of = provenance.of(self, parts.hashes)
        self.kl_control = controllers.make(self)
        self.objective = correction.apply(self)
        self.source = setup.source(self)
        self.trust_step = setup.trust_step(self)
        self.step = 0
        self.tokens_seen = 0
        self.unscored_steps = 0
        self.nonfinite_steps = 0
        self.sampler_fault: str | None = None
        self.sampler_agrees: bool | None = None  # its log-probs with the policy's; None: not yet compared
        self.meter = Meter(self.device)
        self.ref_logps = ref_cache.RefLogps()
        self.first_step: first_step.FirstStep | None = None
        self.equal_steps = 0
        self.tally = tally.Tally()
        self.all_masked = False
        self.told: set[str] = set()
        self.failures = meeting.Failures()
        self.rollouts = 0
        self.evaluated_at = -1
        self.evaluating = False
        self.finished = False
        self.checked = False  # the first step has passed its checks, or they are off
        self.resumed_from: dict[str, str] | None = None  # the checkpoint that was asked for by name
        self.run_dir = Path(self.config.output_dir)
        self.metrics: MetricSums = MetricSums()
        self.metrics_log = MetricsLog(self.run_dir / "metrics.jsonl", enabled=False)
        self.signals = signals.Signals()
        self._boundary: _state.Light | None = None  # None: the present state is one

    # -- where this process stands ----------------------------------------------------------------------------------
    @property
    def online(self) -> bool:
        """Whether answers are sampled during training."""
        return self.rewards is not None or self.judge is not None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def scoring_temperature(self) -> float:
        """Log-probs are those of the distribution that sampled: its temperature divides the logits."""
        return self.config.temperature if self.online else 1.0

    # -- the loop ------------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Run to the last step; continue a stopped run in the same folder.

        Args:
            resume_from_checkpoint: a checkpoint folder, True for the newest of the run, False for none; default:
                ``args.resume``.

        Returns:
            The last logged metrics, evaluation included.

        Raises:
            TrainingError: when the run cannot go on; the newest checkpoint is intact.
            Interrupted: after SIGTERM or SIGUSR1; the run was saved.
        """
        with (
            _state.locked(self, resume_from_checkpoint),
            self.signals.heeded(self.world_size),
            contextlib.closing(self.source),
        ):
            offset = _state.resume(self, resume_from_checkpoint)
            if self.is_main:
                display.start(self, resumed=offset is not None)
            if self.finished:
                _state.export(self, again=False)  # the run may have been killed between its last checkpoint and this
                display.say(self, f"this run is complete ({self.step} steps); nothing to do")
                return {}
            self.metrics_log = _state.open_log(self, offset)
            if offset is None:
                _state.seed(self)
            self._boundary = None
            self.source.start()
            if self.step == 0:
                selfcheck.before(self)
            if not self.checked:
                self.first_step = first_step.watch(self)
            self.meter.start(self)
            try:
                last = self._loop()
            except Exception as error:
                guard.lost_peer(self, error)
                if guard.saves(self, error):
                    _state.save_boundary(self, stopping=True)
                raise
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self._call("end", last)
            display.end(self, last)
        return last

    def _loop(self) -> dict[str, float]:
        last: dict[str, float] = {}
        with guard.explained(self, "ref_cache"):
            self.ref_logps = ref_cache.prepare(self)
        if self._evaluation_due():
            last |= self._evaluate_and_log()
        with display.progress(self) as bar:
            while self.step < self.plan.total_steps:
                last |= self._one_step()
                bar(last)
        if self.eval_data is not None and self.evaluated_at != self.step:
            last |= self._evaluate_and_log()
        if (rows := rows_read.total(self)) is not None and self.is_main:
            _state.write_summary(self, rows)
        self.finished = True
        _state.save(self)
        _state.export(self)
        return last

    def _evaluation_due(self) -> bool:
        """Whether this step's evaluation is still to be done: one that a signal cut short is done after the resume."""
        if self.eval_data is None or self.evaluated_at == self.step:
            return False
        if self.step == 0:
            return self.config.eval_on_start
        return bool(self.config.eval_steps) and self.step % (self.config.eval_steps or 1) == 0

    def _one_step(self) -> dict[str, float]:
        self._boundary = _state.light(self)
        started = time.perf_counter()
        controllers.before_step(self)
        values = self.train_step()
        self.step += 1
        values |= controllers.after_step(self)
        online.move_reference(self)
        if self.average is not None:
            self.average.update()
        values |= {"step_time": time.perf_counter() - started, "num_tokens": float(self.tokens_seen)}
        if self.step % self.config.logging_steps == 0 or self.step == self.plan.total_steps:
            values = self._flush_metrics() | values
            self.log(values)
            online.watch_flips(self, values)
        self._boundary = None  # the weights have moved: from here to the next step the present state is the boundary
        self._call("step", values)
        if self._evaluation_due():
            values |= self._evaluate_and_log()
        if self.config.save_steps and self.step % self.config.save_steps == 0 and self.step < self.plan.total_steps:
            _state.save(self)
        self.poll(boundary=True)
        return values

    def train_step(self) -> dict[str, float]:
        """One optimizer step: batches, backward passes, update. Returns what is known of it at once."""
        with guard.explained(self):
            with instant("train.batch"):
                micro_batches = self.source.next(self.step)
            watchdog.verdict(self)
            denominators = self.count(micro_batches)
            if self.first_step is not None:
                self.first_step.counted(micro_batches, denominators)
            micro_batches = self._equal_counts(micro.without_idle_rows(self, micro_batches))
            update = self._anything_to_learn(denominators)
            started = time.perf_counter()
            if self.trust_step is not None and update:
                micro_batches = self.trust_step.begin(micro_batches)
            loss = torch.zeros((), dtype=torch.float64, device=self.device)
            for index, batch in enumerate(micro_batches):
                if index:
                    self.poll(boundary=meeting.on_cpu())
                last = index == len(micro_batches) - 1
                with (
                    contextlib.nullcontext() if last else self.accelerator.no_sync(self.model),
                    instant("train.backward"),
                    self.meter.phase("forward_backward"),
                ):
                    part = guard.with_gradient(self, self.compute_loss(batch, denominators))
                    micro.note_layout(self, batch)
                    # DistributedDataParallel averages gradients over processes; the denominators are global already
                    self.accelerator.backward(part * self.world_size)
                loss += part.detach().double()
            loss = self.accelerator.reduce(loss, reduction="sum")
        if self.first_step is not None:
            self.first_step.before_update()
        norm = self.optimizer_step(float(loss), update=update)
        moved = update and norm > 0 and _finite(norm) and self.optimizer.param_groups[0]["lr"] > 0
        if self.first_step is not None and self.first_step.after_update(moved=moved):
            self.first_step = None
        values = {"loss": float(loss), "grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.trust_step is not None and not self.trust_step.of_critic:
            del values["learning_rate"]
        if self.config.max_nonfinite_steps:
            values["nonfinite_steps"] = float(self.nonfinite_steps)
        return values | {"update_time": time.perf_counter() - started}

    def count(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Denominators of every loss term over all micro-batches and processes, before the first backward pass."""
        none = torch.zeros(len(self.objective.terms), dtype=torch.float64, device=self.device)
        local = sum((self.objective.denominators(b) for b in micro_batches), none)
        assert isinstance(local, Tensor)
        tokens = torch.tensor([float(sum(b.num_tokens for b in micro_batches))], dtype=torch.float64)
        both = torch.cat([local.double().cpu(), tokens]).to(self.device)
        both = self.accelerator.reduce(both, reduction="sum")
        self.tokens_seen += int(both[-1])
        return both[:-1].cpu()

    def compute_loss(self, batch: Batch, denominators: Tensor) -> Tensor:
        """Forward pass and objective of one micro-batch.

        Args:
            batch: a prepared micro-batch on this device.
            denominators: one count per loss term, over the whole step.

        Returns:
            A scalar; its sum over micro-batches and processes is the step's loss.
        """
        outputs = self.forward(batch, self._wanted(batch))
        if self.first_step is not None:
            self.first_step.saw(batch, outputs)
        if (loss := guard.poisoned(self, outputs, batch)) is not None:
            return loss
        with guard.raw_outputs(self, outputs, batch):
            loss, results = self.objective.compute(outputs, batch, denominators)
        for term, result in zip(self.objective.terms, results, strict=True):
            self.metrics.add_output(result, term.mask(batch))
        controllers.observe(self, batch, outputs, results)
        correction.record(self, batch, outputs)
        if "entropy" in outputs:
            self.metrics.add("entropy", outputs["entropy"].detach(), batch.mask)
        return loss

    def forward(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        """The model's outputs on a batch, through the module that accelerate wrapped.

        Args:
            batch: a micro-batch on this device.
            want: which outputs, see :class:`rlft.models.Policy`.

        Returns:
            ``[B, T]`` tensors by name (``scores [B]`` from a reward model).
        """
        model = self.model
        if not torch.is_grad_enabled() and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            # The wrapper would wait for the other processes to broadcast buffers that are equal anyway; in an evaluation
            # they may have fewer batches, and never come.
            model = model.module
        if "scores" in self.objective.needs:
            return model(batch, want=want | {"scores"})
        return model(batch, want=want, temperature=self.scoring_temperature)

    def _wanted(self, batch: Batch) -> frozenset[str]:
        wanted = set(self.objective.forward_needs)
        if batch.ref_logps is not None:
            wanted -= {"ref_logps"}
        if self.online:
            wanted |= {"entropy"}
        # a value is also read at the answer's start, which may be masked
        return frozenset(
            wanted | (set() if {"values", "scores"} & self.objective.needs else constants.mask_only(batch))
        )

    def optimizer_step(self, loss: float, *, update: bool = True) -> float:
        """Measure, guard, clip and apply the gradient.

        Args:
            loss: the step's loss, checked to be finite.
            update: False when nothing was scored: the weights and the optimizer's moments stay as they are.

        Returns:
            The gradient norm before clipping.

        Raises:
            TrainingError: when loss, gradient or an updated weight is not finite, more often than
                ``max_nonfinite_steps``; nothing was applied.
        """
        return _update.step(self, loss, update=update)

    def _rate(self, step: int) -> float:
        c = self.config
        return learning_rate(
            step,
            peak=c.learning_rate,
            schedule=c.lr_scheduler_type,
            warmup_steps=c.warmup_steps,
            total_steps=self.plan.total_steps,
        )

    # -- stages made to be overridden ------------------------------------------------------------------------------
    def rollout(self, indices: Sequence[Any], step: int) -> Batch:
        """Sample ``num_generations`` answers for each prompt and score them.

        Args:
            indices: examples of the training data (of a stream, the examples themselves).
            step: optimizer steps taken. The seed comes from the number of generations so far and the rank.
        """
        seed = fold_seed(self.config.seed, rank=self.rank, step=self.rollouts)
        self.rollouts += 1
        return online.rollout(self, self.train_data.pick(indices), seed=seed)

    def score(
        self, examples: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> Any:
        """Rewards of sampled answers.

        Args:
            examples: the example that each answer belongs to.
            completions: text, or one assistant message in a list for conversational prompts.
            completion_ids: the sampled ids.

        Returns:
            A :class:`rlft.rewards.RewardOutput`, one row per completion.
        """
        return online.score(self, examples, completions, completion_ids)

    def prepare(self, batch: Batch) -> Batch:
        """Fill in what must be known before the first forward pass: old and reference log-probs, values, advantages."""
        with guard.explained(self, "constants"):
            return constants.prepared(self, batch)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Metrics on held-out data, prefixed ``eval_``. Offline: the objective's; online: rewards of greedy answers."""
        return evaluate.run(self, eval_dataset)

    def log(self, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and to the trackers.

        Args:
            values: metric name -> number.
            log: the run's metrics.jsonl.
        """
        if self.is_main:
            self.metrics_log.write(self.step, values)
        self.accelerator.log(values, step=self.step)

    def save_model(self, folder: str | Path) -> None:
        """The trained adapters, or the whole model, with the tokenizer: loads in transformers and peft.

        The main process writes. Under FSDP all processes must call this.
        """
        _state.save_model(self, folder)

    def poll(self, *, boundary: bool = False) -> None:
        """Stop where a signal asked for it, to this process or another: all of them leave at the same step.

        Called between steps and micro-batches, and inside sampling, rewards and evaluation.

        Args:
            boundary: every process calls this at the same place, so that they decide it there. Collective.

        Raises:
            Interrupted: after a signal.
        """
        if self.signals.asked(self, everywhere=boundary):
            raise Interrupted(self.step)

    # -- inner ---------------------------------------------------------------------------------------------------------
    def _anything_to_learn(self, denominators: Tensor) -> bool:
        """Whether the step has anything to train on; a generation whose answers are all masked stops the run."""
        if bool((denominators > 0).any()):
            return True
        if self.all_masked:
            raise TrainingError(
                f"step {self.step + 1}: no token of the whole batch is trained on: every answer was masked, as those "
                f"without an end are with mask_truncated_completions. Raise max_completion_length (now "
                f"{self.config.max_completion_length}), or set mask_truncated_completions: false"
            )
        guard.told(self, "empty", f"step {self.step + 1}: nothing could be trained on, so the weights stay as they are")
        return False

    def _equal_counts(self, micro_batches: list[Batch]) -> list[Batch]:
        """As many micro-batches on every process: sharded forward passes wait for each other. Empty ones are masked."""
        batches = [b.to(self.device) for b in micro_batches]
        if self.world_size == 1:
            return batches
        counts = self.accelerator.gather(torch.tensor([len(batches)], device=self.device))
        if not batches:
            raise TrainingError(
                f"step {self.step + 1}: process {self.rank} has no examples; use a larger dataset or fewer processes"
            )
        return batches + [micro.blank(batches[0])] * (int(counts.max()) - len(batches))

    def _flush_metrics(self) -> dict[str, float]:
        values = setup.gather_metrics(self.accelerator, self.metrics)
        self.metrics = MetricSums()
        return values | rows_read.metrics(self) | self.meter.flush(self)

    def _evaluate_and_log(self) -> dict[str, float]:
        with guard.explained(self, "evaluate"), self.meter.phase("evaluate"):
            values = self.evaluate()
        self.log(values)
        self.evaluated_at = self.step
        self._call("evaluate", values)
        return values

    def _call(self, event: str, values: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            callback(event, self, values)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
