"""Held-out numbers: the objective's own offline, rewards of answers online. Nothing here moves the run's state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rlft import checkpoint, reduce
from rlft._failpoint import instant
from rlft._redact import redact
from rlft.metrics import MetricSums
from rlft.run.processes import processes as meeting
from rlft.run.setup import models as parts
from rlft.run.setup import parts as setup
from rlft.run.step import comparisons as pairwise
from rlft.run.step import micro_batches as micro
from rlft.run.step import passes as constants
from rlft.run.step import sampling as online
from rlft.run.step import update as guard
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["run"]


def run(trainer: Trainer, dataset: Any = None) -> dict[str, float]:
    """Evaluate on the held-out data (or on ``dataset``); keys are prefixed ``eval_``.

    Random numbers, metrics of the training step and the data order are as they were, afterwards: evaluating more often
    changes no training result.
    """
    data = trainer.eval_data
    if dataset is not None:
        settings = replace(trainer.config, eval_dataset_config=None)  # that one is of eval_data
        rows = parts.load(settings, "eval_data", dataset)
        data = parts.tokenized(trainer.config, rows, trainer.tokenizer, online=trainer.online)
    if data is None:
        raise ValueError("there is no evaluation data; pass eval_dataset, or set eval_data")
    kept, rng = trainer.metrics, checkpoint.rng_state()
    trainer.metrics, trainer.evaluating = MetricSums(), True
    try:
        with torch.no_grad(), instant("train.evaluate"):
            (_online if trainer.online else _offline)(trainer, data.examples)
        values = setup.gather_metrics(trainer.accelerator, trainer.metrics)
    finally:
        trainer.metrics, trainer.evaluating = kept, False
        checkpoint.set_rng_state(*rng)
    if "loss" in values and trainer.objective.name == "sft":
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
    return {f"eval_{name}": value for name, value in values.items()}


def _online(trainer: Trainer, examples: list[Any]) -> None:
    """Greedy answers, one per prompt: their rewards, or how often a judge prefers them to the reference's."""
    with guard.together(trainer):
        _greedy(trainer, examples[trainer.rank :: trainer.world_size])


def _greedy(trainer: Trainer, examples: list[Any]) -> None:
    for start in range(0, len(examples), _prompts_at_once(trainer)):
        chunk = examples[start : start + _prompts_at_once(trainer)]
        sampled = trainer.sampler.sample(
            [e.prompt_ids for e in chunk],
            1,
            online.sampling_params(trainer, greedy=True),
            seed=0,
            weight_version=trainer.step,
            poll=trainer.poll,
        )
        if trainer.judge is None:
            rewards, name = online.score_rollout(trainer, chunk, sampled).double(), "reward"
        else:
            rewards, name = pairwise.win_rate_of_greedy(trainer, chunk, sampled), "judge/win_rate"
        everything = torch.ones(len(chunk), dtype=torch.bool)
        trainer.metrics.add(name, rewards, ~torch.isnan(rewards))
        lengths = torch.tensor([float(len(ids)) for ids in sampled.completion_ids], dtype=torch.float64)
        trainer.metrics.add("completions/mean_length", lengths, everything)
        trainer.metrics.add("completions/clipped_ratio", (~torch.tensor(sampled.finished)).double(), everything)
        if start == 0 and trainer.config.log_completions and trainer.is_main:
            _show(trainer, chunk, sampled, rewards)


def _offline(trainer: Trainer, examples: list[Any]) -> None:
    """The objective's metrics and mean loss, and how often the raw likelihood prefers the chosen answer."""
    batches = (_as_one_step if trainer.objective.normalises_step else _batches)(trainer, examples)
    with guard.together(trainer):
        for batch in batches:
            trainer.poll()
            _measure(trainer, batch)


def _measure(trainer: Trainer, batch: Batch) -> None:
    outputs = trainer.forward(batch, trainer._wanted(batch))
    _, results = trainer.objective.compute(outputs, batch, trainer.objective.denominators(batch))
    for term, result in zip(trainer.objective.terms, results, strict=True):
        counted = result.counted
        name = "loss" if len(results) == 1 else f"loss/{term.name}"
        trainer.metrics.add(name, result.loss.detach(), counted)
        trainer.metrics.add_output(result, term.mask(batch))
    if trainer.train_data.format == "preference" and "logps" in outputs:
        _preference(trainer, outputs, batch, implicit=not any("rewards/accuracies" in r.metrics for r in results))


def _chunks(trainer: Trainer, examples: list[Any]) -> list[list[Any]]:
    """The examples of this process, by the batch."""
    mine, size = examples[trainer.rank :: trainer.world_size], trainer.config.per_device_eval_batch_size
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def _batches(trainer: Trainer, examples: list[Any]) -> Iterator[Batch]:
    """The examples of this process, with what the objective needs before its forward pass."""
    for chunk in _chunks(trainer, examples):
        if len(chunk) > 1 or "kl_baseline" not in trainer.objective.needs:
            yield from _within_budget(trainer, [trainer.objective.prepare(_filled(trainer, chunk))])


def _as_one_step(trainer: Trainer, examples: list[Any]) -> Iterator[Batch]:
    """The same where rows are compared with all others, so that the held-out set is one step. Collective.

    Mean and variance are over all of it, whatever the batch size and number of processes. A process without a row of its
    own still has to meet the others.
    """
    with guard.together(trainer):
        rows = [_filled(trainer, chunk).to("cpu") for chunk in _chunks(trainer, examples)]
        whole = Batch.concat(rows) if rows else micro.blank(_filled(trainer, examples[:1]).to("cpu"))
    prepared = trainer.objective.prepare(whole, meeting.everyone(trainer))
    pieces = prepared.split_groups(trainer.config.per_device_eval_batch_size) if rows else []
    return (batch.to(trainer.device) for batch in _within_budget(trainer, pieces))


def _within_budget(trainer: Trainer, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, cut where the run counts tokens; metrics are sums, so the cuts change none of them."""
    budget = trainer.config.max_tokens_per_micro_batch
    # sharded processes pass through the model together, and lengths differ between them
    if budget is None or guard.sharded(trainer):
        yield from batches
        return
    for batch in batches:
        for rows in micro.by_tokens(batch, budget, whole=trainer.objective.needs_groups):
            yield batch.select(rows)


def _filled(trainer: Trainer, examples: list[Any]) -> Batch:
    return constants.fill_constants(trainer, setup.collated(trainer, examples), alone=True)


def _preference(trainer: Trainer, outputs: Mapping[str, torch.Tensor], batch: Batch, *, implicit: bool) -> None:
    """Pair accuracy of any objective that is trained on pairs.

    By raw likelihood (length-biased, and no reference in it), and by the implicit reward beta (log pi - log ref) where
    there is a reference and the objective does not measure that itself.
    """
    logps = reduce.sequence_sum(outputs["logps"].detach(), batch.mask)
    chosen, rejected = logps[0::2], logps[1::2]
    trainer.metrics.add("logps/accuracies", (chosen > rejected).double(), None)
    ref_logps = outputs.get("ref_logps", batch.ref_logps)
    if not implicit or ref_logps is None:
        return
    gain = logps - reduce.sequence_sum(ref_logps, batch.mask)
    rewards = trainer.objective.beta * gain
    trainer.metrics.add("rewards/chosen", rewards[0::2], None)
    trainer.metrics.add("rewards/rejected", rewards[1::2], None)
    trainer.metrics.add("rewards/margins", rewards[0::2] - rewards[1::2], None)
    trainer.metrics.add("rewards/accuracies", (gain[0::2] > gain[1::2]).double(), None)
    trainer.metrics.add("logps/chosen", chosen, None)
    trainer.metrics.add("logps/rejected", rejected, None)


def _prompts_at_once(trainer: Trainer) -> int:
    return max(1, trainer.config.per_device_eval_batch_size)


def _show(trainer: Trainer, examples: list[Any], sampled: Any, rewards: torch.Tensor) -> None:
    for example, ids, reward in list(zip(examples, sampled.completion_ids, rewards.tolist(), strict=True))[
        : trainer.config.log_completions
    ]:
        print(
            redact(
                f"[{reward:+.2f}] {trainer.tokenizer.decode(example.prompt_ids)} -> {trainer.tokenizer.decode(ids)}"
            ),
            flush=True,
        )
