"""The one loop. It knows no algorithm: the objective says what it needs, the sources bring it.

One optimizer step::

    source.next -> micro-batches (online: sample, score; then reference, old log-probs, advantages)
    -> denominators counted over all micro-batches and processes
    -> for each micro-batch: forward, objective, backward
    -> clip, guard, step; metrics under the same denominators
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft._failpoint import instant
from rlft.config import Config
from rlft.metrics import MetricSums
from rlft.objective import Objective
from rlft.rollout import fold_seed
from rlft.run import display
from rlft.run.checks.first_step import FirstStep
from rlft.run.setup import arguments
from rlft.run.setup.build import Given, build, objective_for
from rlft.run.wiring import Connected
from rlft.types import Batch

__all__ = ["Trainer"]

Callback = Callable[[str, "Trainer", Mapping[str, Any]], None]


class Trainer(Connected):
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
        callbacks: functions, called as ``callback(event, trainer, values)`` for ``step``, ``evaluate``, ``save`` and
            ``end``, and ``transformers.TrainerCallback`` objects.

    Attributes:
        state: how far the run is, a :class:`~rlft.run.progress.Progress`: ``global_step``, ``max_steps``, ``epoch``,
            ``log_history``, ``best_metric``.

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
        callbacks: Iterable[Any] = (),
    ) -> None:
        config = arguments.settings(args)
        given = Given(
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=processing_class,
            reward_funcs=reward_funcs,
            judge=judge,
            peft_config=peft_config,
            ref_model=ref_model,
            sampler=sampler,
            optimizer=arguments.optimizer(optimizers),
        )
        arguments.check_kinds(given, objective)
        listed, goal = arguments.callbacks(callbacks), objective_for(config, objective)
        super().__init__(build(config, goal, given, self), listed)
        self.callback_handler.call("init", {})

    # -- where this process stands ----------------------------------------------------------------------------------
    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, over all processes."""
        return self.state.tokens_seen

    @property
    def metrics(self) -> MetricSums:
        """What the next logged row is made of; add to it from an override."""
        return self.journal.metrics

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
            self.checkpoints.locked(resume_from_checkpoint),
            self.processes.signals.heeded(self.world_size),
            contextlib.closing(self.source),
        ):
            offset = self.checkpoints.resume(resume_from_checkpoint)
            if self.kl_control is not None:
                self.objective = self.kl_control.steered(self.objective)
            self.show(resumed=offset is not None)
            if self.state.finished:
                self.export.finish(again=False)  # the run may have been killed between its last checkpoint and this
                self.journal.say(f"this run is complete ({self.step} steps); nothing to do")
                return {}
            self.files.begin(self.train_data.report, offset)
            if offset is None:
                self.checkpoints.seed()
            self.checkpoints.step_ended()
            self.source.start()
            self._begin_watching()
            try:
                last = self._loop()
            except Exception as error:
                self.processes.explain_lost_peer(error, self.run_dir)
                if self.processes.saves(error):
                    self.checkpoints.save_boundary(stopping=True)
                raise
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.callback_handler.call("end", last)
            display.end(self.config, self.state, last, self.journal.meter.shares())
        return last

    def _begin_watching(self) -> None:
        """Self-checks before the first step, and those that see it; the meter and the callbacks begin."""
        if self.step == 0:
            self.self_checks.run()
        if not self.state.checked and FirstStep.wanted(self.config):
            # first in the list: it compares frozen weights before a watcher moves a reference
            self.watchers.add(FirstStep(self.parts), first=True)
        if self.callback_handler.sees_updates:
            self.watchers.add(self.callback_handler)
        self.journal.start(self.policy, mixed_precision=self.config.mixed_precision)
        self.callback_handler.call("begin", {})

    def _loop(self) -> dict[str, float]:
        last: dict[str, float] = {}
        if self.ref_logps is not None:
            with self.errors.explained("ref_logps"):
                self.collate.ref_logps = self.ref_logps.of({"training": self.train_data, "held-out": self.eval_data})
        if self._evaluation_due():
            last |= self._evaluate_and_log()
        stop = self.callback_handler.asked().should_training_stop
        with display.progress(self.config, self.objective.name, self.state) as bar:
            while self.step < self.state.max_steps and not stop:
                values, stop = self._one_step()
                last |= values
                bar(last)
        if self.eval_data is not None and self.state.evaluated_at != self.step:
            last |= self._evaluate_and_log()
        if self.streamed_rows is not None:
            rows = self.streamed_rows.total()
            if self.is_main:
                self.files.write_summary(rows)
        self.state.finished = True
        self.checkpoints.save()
        self.export.finish()
        return last

    def _evaluation_due(self) -> bool:
        """Whether this step's evaluation is still to be done: one that a signal cut short is done after the resume."""
        if self.eval_data is None or self.state.evaluated_at == self.step:
            return False
        if self.step == 0:
            return self.config.eval_on_start
        return bool(self.config.eval_steps) and self.step % (self.config.eval_steps or 1) == 0

    def _one_step(self) -> tuple[dict[str, float], bool]:
        """A step with what comes after it; its metrics, and whether a callback ends the run."""
        c, callbacks = self.config, self.callback_handler
        self.checkpoints.step_begins()
        callbacks.step_begins()
        started = time.perf_counter()
        values = self.train_step()
        self.state.step += 1
        values |= {"step_time": time.perf_counter() - started, "num_tokens": float(self.tokens_seen)}
        due = self.step % c.logging_steps == 0 or self.step == self.state.max_steps
        if due:
            values = self._log_step(values)
        self.checkpoints.step_ended()
        callbacks.step_ended(values)
        asked = callbacks.asked()
        if asked.should_log and not due:
            values = self._log_step(values)
        if self._evaluation_due() or (asked.should_evaluate and self.eval_data is not None):
            values |= self._evaluate_and_log()
            asked = callbacks.asked()
        if asked.should_save or (c.save_steps and self.step % c.save_steps == 0 and self.step < self.state.max_steps):
            self.checkpoints.save()
            asked = callbacks.asked()
        self.poll(boundary=True)
        return values, asked.should_training_stop

    def _log_step(self, values: dict[str, float]) -> dict[str, float]:
        measured = self.journal.flush()
        if self.streamed_rows is not None:
            measured |= self.streamed_rows.metrics()
        values = measured | values
        self.log(values)
        for logged in self.watchers.logged:
            logged(values)
        return values

    def train_step(self) -> dict[str, float]:
        """One optimizer step: batches, backward passes, update. Returns what is known of it at once."""
        if self.kl_control is not None:
            self.kl_control.forget()  # what an evaluation or a callback measured is no step's
        with self.errors.explained():
            with instant("train.batch"):
                micro_batches = self.source.next(self.step)
            denominators = self.count(micro_batches)
            for begins in self.watchers.begins:
                begins(micro_batches, denominators)
            micro_batches = self.micro_batches.for_training(micro_batches)
            learns = bool((denominators > 0).any())
            if not learns:
                self.counts.nothing_to_learn()
            started = time.perf_counter()
            if self.trust_region is not None and learns:
                micro_batches = self.trust_region.begin(micro_batches, self.objective)
            loss = self._gradient(micro_batches, denominators)
            for before_update in self.watchers.before_update:
                before_update(loss)
        norm = self.optimizer_step(loss, update=learns)
        values = {"loss": loss, "grad_norm": norm, **self.update.facts()}
        moves = math.isfinite(norm) and norm > 0 and self.optimizer.param_groups[0]["lr"] > 0
        for after_update in self.watchers.after_update:
            values |= after_update(moved=learns and moves and not self.update.taken_back)
        if self.watchers.after_update:
            self.watchers.leave()
        if self.kl_control is not None:
            self.objective = self.kl_control.steered(self.objective)
        return values | {"update_time": time.perf_counter() - started}

    def count(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Denominators of every loss term over all micro-batches and processes, before the first backward pass."""
        none = torch.zeros(len(self.objective.terms), dtype=torch.float64, device=self.device)
        local = sum((self.objective.denominators(b) for b in micro_batches), none)
        assert isinstance(local, Tensor)
        tokens = torch.tensor([float(sum(b.num_tokens for b in micro_batches))], dtype=torch.float64)
        both = self.processes.sum(torch.cat([local.double().cpu(), tokens]))
        self.state.tokens_seen += int(both[-1])
        return both[:-1].cpu()

    def _gradient(self, micro_batches: list[Batch], denominators: Tensor) -> float:
        """Backward passes; the step's loss over all processes."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.micro_batches.one_by_one(micro_batches):
            with instant("train.backward"), self.journal.meter.phase("forward_backward"):
                loss = self.compute_loss(batch, denominators)
                if not loss.requires_grad:
                    raise self.errors.without_gradient(self.objective.name)
                # DistributedDataParallel averages gradients over processes; the denominators are global already
                self.accelerator.backward(loss * self.world_size)
            total += loss.detach().double()
        return float(self.processes.sum(total))

    def compute_loss(self, batch: Batch, denominators: Tensor) -> Tensor:
        """Forward pass and objective of one micro-batch.

        Args:
            batch: a prepared micro-batch on this device.
            denominators: one count per loss term, over the whole step.

        Returns:
            A scalar; its sum over micro-batches and processes is the step's loss.
        """
        outputs = self.forward(batch, self.passes.wanted(batch, self.objective))
        if self.update.tolerated and (loss := self.update.poisoned(outputs, batch)) is not None:
            return loss
        try:
            loss, results = self.objective.compute(outputs, batch, denominators)
        except ValueError:
            self.update.note_refused(outputs, batch)
            raise
        for term, result in zip(self.objective.terms, results, strict=True):
            self.journal.metrics.add_output(result, term.mask(batch))
        for saw in self.watchers.saw:
            saw(batch, outputs, results)
        if "entropy" in outputs:
            self.journal.metrics.add("entropy", outputs["entropy"].detach(), batch.mask)
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
        return self.update.apply(loss, update=update)

    # -- stages made to be overridden ------------------------------------------------------------------------------
    def rollout(self, indices: Sequence[Any], step: int) -> Batch:
        """Sample ``num_generations`` answers for each prompt and score them.

        Args:
            indices: examples of the training data (of a stream, the examples themselves).
            step: optimizer steps taken. The seed comes from the number of generations so far and the rank.
        """
        assert self.sampling is not None
        seed = fold_seed(self.config.seed, rank=self.rank, step=self.state.generations)
        self.state.generations += 1
        return self.sampling.draw(self.train_data.pick(indices), seed=seed)

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
        assert self.sampling is not None
        return self.sampling.score(examples, completions, completion_ids)

    def prepare(self, batch: Batch) -> Batch:
        """Fill in what must be known before the first forward pass: old and reference log-probs, values, advantages."""
        with self.errors.explained("prepare"):
            return self.passes.prepared(batch, self.objective)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Metrics on held-out data, prefixed ``eval_``. Offline: the objective's; online: rewards of greedy answers."""
        return self.evaluation.run(self.objective, eval_dataset)

    def log(self, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and to the trackers.

        Args:
            values: metric name -> number.
        """
        self.journal.write(values)
        self.callback_handler.call("log", values)

    def show(self, *, resumed: bool = False) -> None:
        """Print what this run optimises, on what and with what, and one row as it is trained on; not where it is quiet."""
        if self.is_main and not self.config.disable_tqdm:
            about = {"kl_control": self.kl_control, "sampling": self.sampling, "trust_region": self.trust_region}
            display.start(self.parts, display.facts(self.parts, **about), resumed=resumed)

    def save_model(self, folder: str | Path) -> None:
        """The trained adapters, or the whole model, with the tokenizer: loads in transformers and peft.

        The main process writes. Under FSDP all processes must call this.
        """
        self.export.save_model(Path(folder))

    def add_callback(self, callback: Any) -> None:
        """Add a callback to those that the Trainer was made with.

        Args:
            callback: a function ``(event, trainer, values)``, or a ``transformers.TrainerCallback`` object or class.
        """
        self.callbacks += arguments.callbacks([callback])

    def poll(self, *, boundary: bool = False) -> None:
        """Stop where a signal asked for it, to this process or another: all of them leave at the same step.

        Args:
            boundary: every process calls this at the same place, so that they decide it there. Collective.

        Raises:
            Interrupted: after a signal.
        """
        self.processes.poll(boundary=boundary)

    def _evaluate_and_log(self) -> dict[str, float]:
        with self.errors.explained("evaluate"), self.journal.meter.phase("evaluate"):
            values = self.evaluate()
        self.log(values)
        self.state.evaluated_at = self.step
        if self.callback_handler.evaluated(values):
            self.checkpoints.save()
        return values
