"""Held-out numbers: the objective's own offline, rewards of answers online. Nothing here moves the run's state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import checkpoint, reduce
from rlft._failpoint import instant
from rlft._redact import redact
from rlft.objective import Objective
from rlft.run.setup.data import load_setting, tokenized
from rlft.run.step.collate import Collator
from rlft.run.step.micro_batches import blank, by_tokens
from rlft.run.step.parts import Parts
from rlft.run.step.passes import Passes
from rlft.run.step.sampling import Sampling
from rlft.types import Batch

__all__ = ["Evaluation"]


class Evaluation:
    """Measures held-out data. It holds nothing of its own.

    Args:
        parts: of the run; each process takes its share of the examples.
        passes: what an objective needs before its forward pass.
        collate: examples -> batch.
        sampling: of an online run, else None.
    """

    def __init__(self, parts: Parts, passes: Passes, collate: Collator, sampling: Sampling | None) -> None:
        self.config, self.tokenizer, self.data = parts.config, parts.tokenizer, parts.eval_data
        self.processes, self.journal, self.train_format = parts.processes, parts.journal, parts.train_data.format
        self.passes, self.collate, self.sampling, self.stages = passes, collate, sampling, parts.stages

    def run(self, objective: Objective, dataset: Any = None) -> dict[str, float]:
        """Evaluate on the held-out data (or on ``dataset``); keys are prefixed ``eval_``.

        Random numbers, metrics of the training step and the data order are as they were, afterwards: evaluating more often
        changes no training result.
        """
        data, sampling, control = self.data, self.sampling, self.passes.kl_control
        if dataset is not None:
            settings = replace(self.config, eval_dataset_config=None)  # that one is of eval_data
            rows = load_setting(settings, "eval_data", dataset)
            data = tokenized(self.config, rows, self.tokenizer, online=sampling is not None)
        if data is None:
            raise ValueError("there is no evaluation data; pass eval_dataset, or set eval_data")
        rng = checkpoint.rng_state()
        try:
            with self.journal.apart() as sums, control.apart() if control is not None else contextlib.nullcontext():
                with torch.no_grad(), instant("train.evaluate"):
                    if sampling is None:
                        self._offline(objective, data.examples)
                    else:
                        with self.processes.together():
                            self._greedy(sampling, data.examples[self.processes.rank :: self.processes.world_size])
                values = self.journal.means(sums)
        finally:
            checkpoint.set_rng_state(*rng)
        if "loss" in values and objective.name == "sft":
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
        return {f"eval_{name}": value for name, value in values.items()}

    def _greedy(self, sampling: Sampling, examples: list[Any]) -> None:
        """Greedy answers, one per prompt: their rewards, or how often a judge prefers them to the reference's."""
        size = max(1, self.config.per_device_eval_batch_size)
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            sampled = sampling.greedy(chunk)
            if sampling.rewards is not None:
                rewards, name = sampling.rewards_of(chunk, sampled, training=False).double(), "reward"
            else:
                assert sampling.comparisons is not None
                rewards, name = sampling.comparisons.win_rate_of_greedy(chunk, sampled), "judge/win_rate"
            everything = torch.ones(len(chunk), dtype=torch.bool)
            self.journal.metrics.add(name, rewards, ~torch.isnan(rewards))
            lengths = torch.tensor([float(len(ids)) for ids in sampled.completion_ids], dtype=torch.float64)
            self.journal.metrics.add("completions/mean_length", lengths, everything)
            self.journal.metrics.add(
                "completions/clipped_ratio", (~torch.tensor(sampled.finished)).double(), everything
            )
            if start == 0 and self.config.log_completions and self.processes.is_main:
                self._show(chunk, sampled, rewards)

    def _show(self, examples: list[Any], sampled: Any, rewards: Tensor) -> None:
        rows = list(zip(examples, sampled.completion_ids, rewards.tolist(), strict=True))
        for example, ids, reward in rows[: self.config.log_completions]:
            prompt, answer = self.tokenizer.decode(example.prompt_ids), self.tokenizer.decode(ids)
            print(redact(f"[{reward:+.2f}] {prompt} -> {answer}"), flush=True)

    def _offline(self, objective: Objective, examples: list[Any]) -> None:
        """The objective's metrics and mean loss, and how often the raw likelihood prefers the chosen answer."""
        batches = (self._as_one_step if objective.normalises_step else self._batches)(objective, examples)
        with self.processes.together():
            for batch in batches:
                self.processes.poll()
                self._measure(objective, batch)

    def _measure(self, objective: Objective, batch: Batch) -> None:
        outputs = self.stages.forward(batch, self.passes.wanted(batch, objective))
        _, results = objective.compute(outputs, batch, objective.denominators(batch))
        for term, result in zip(objective.terms, results, strict=True):
            name = "loss" if len(results) == 1 else f"loss/{term.name}"
            self.journal.metrics.add(name, result.loss.detach(), result.counted)
            self.journal.metrics.add_output(result, term.mask(batch))
        if self.train_format == "preference" and "logps" in outputs:
            measured = any("rewards/accuracies" in r.metrics for r in results)
            self._preference(outputs, batch, beta=None if measured else objective.beta)

    def _chunks(self, examples: list[Any]) -> list[list[Any]]:
        """The examples of this process, by the batch."""
        mine, size = examples[self.processes.rank :: self.processes.world_size], self.config.per_device_eval_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _batches(self, objective: Objective, examples: list[Any]) -> Iterator[Batch]:
        """The examples of this process, with what the objective needs before its forward pass."""
        for chunk in self._chunks(examples):
            if len(chunk) > 1 or "kl_baseline" not in objective.needs:
                yield from self._within_budget(objective, [objective.prepare(self._filled(objective, chunk))])

    def _as_one_step(self, objective: Objective, examples: list[Any]) -> Iterator[Batch]:
        """The same where rows are compared with all others, so that the held-out set is one step. Collective.

        Mean and variance are over all of it, whatever the batch size and number of processes. A process without a row of its
        own still has to meet the others.
        """
        with self.processes.together():
            rows = [self._filled(objective, chunk).to("cpu") for chunk in self._chunks(examples)]
            whole = Batch.concat(rows) if rows else blank(self._filled(objective, examples[:1]).to("cpu"))
        prepared = objective.prepare(whole, self.processes.everyone())
        pieces = prepared.split_groups(self.config.per_device_eval_batch_size) if rows else []
        return (batch.to(self.processes.device) for batch in self._within_budget(objective, pieces))

    def _within_budget(self, objective: Objective, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, cut where the run counts tokens; metrics are sums, so the cuts change none of them."""
        budget = self.config.max_tokens_per_micro_batch
        # sharded processes pass through the model together, and lengths differ between them
        if budget is None or self.processes.sharded:
            yield from batches
            return
        for batch in batches:
            for rows in by_tokens(batch, budget, whole=objective.needs_groups):
                yield batch.select(rows)

    def _filled(self, objective: Objective, examples: list[Any]) -> Batch:
        return self.passes.filled(self.collate(examples), objective, alone=True)

    def _preference(self, outputs: Mapping[str, Tensor], batch: Batch, *, beta: float | None) -> None:
        """Pair accuracy of any objective that is trained on pairs.

        By raw likelihood (length-biased, and no reference in it), and by the implicit reward beta (log pi - log ref) where
        there is a reference and the objective does not measure that itself (``beta`` None).
        """
        add = self.journal.metrics.add
        logps = reduce.sequence_sum(outputs["logps"].detach(), batch.mask)
        chosen, rejected = logps[0::2], logps[1::2]
        add("logps/accuracies", (chosen > rejected).double(), None)
        ref_logps = outputs.get("ref_logps", batch.ref_logps)
        if beta is None or ref_logps is None:
            return
        gain = logps - reduce.sequence_sum(ref_logps, batch.mask)
        rewards = beta * gain
        add("rewards/chosen", rewards[0::2], None)
        add("rewards/rejected", rewards[1::2], None)
        add("rewards/margins", rewards[0::2] - rewards[1::2], None)
        add("rewards/accuracies", (gain[0::2] > gain[1::2]).double(), None)
        add("logps/chosen", chosen, None)
        add("logps/rejected", rejected, None)
