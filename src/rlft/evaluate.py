"""Held-out numbers: the objective's own offline, rewards of answers online. Nothing here moves the run's state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from rlft import checkpoint, online, setup
from rlft.metrics import MetricSums
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["run"]


def run(trainer: Trainer, dataset: Any = None) -> dict[str, float]:
    """Evaluate on the held-out data (or on ``dataset``); keys are prefixed ``eval_``.

    Random numbers, metrics of the training step and the data order are as they were, afterwards: evaluating more often
    changes no training result.
    """
    data = (
        trainer.eval_data
        if dataset is None
        else setup._tokenize(
            trainer.config, setup._rows(trainer.config, dataset, None)[0], trainer.tokenizer, online=trainer.online
        )
    )
    if data is None:
        raise ValueError("there is no evaluation data; pass eval_dataset, or set eval_data")
    kept, rng = trainer.metrics, checkpoint.rng_state()
    unscored = trainer.unscored_steps
    trainer.metrics = MetricSums()
    try:
        mine = data.examples[trainer.rank :: trainer.world_size]
        with torch.no_grad():
            (_online if trainer.online else _offline)(trainer, mine)
        values = setup.gather_metrics(trainer.accelerator, trainer.metrics)
    finally:
        trainer.metrics, trainer.unscored_steps = kept, unscored
        checkpoint.set_rng_state(*rng)
    if "loss" in values and trainer.objective.name == "sft":
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
    return {f"eval_{name}": value for name, value in values.items()}


def _online(trainer: Trainer, examples: list[Any]) -> None:
    """Greedy answers, one per prompt."""
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
        rewards = online.score_rollout(trainer, chunk, sampled).double()
        everything = torch.ones(len(chunk), dtype=torch.bool)
        trainer.metrics.add("reward", rewards, ~torch.isnan(rewards))
        lengths = torch.tensor([float(len(ids)) for ids in sampled.completion_ids], dtype=torch.float64)
        trainer.metrics.add("completions/mean_length", lengths, everything)
        trainer.metrics.add("completions/clipped_ratio", (~torch.tensor(sampled.finished)).double(), everything)
        if start == 0 and trainer.config.log_completions and trainer.is_main:
            _show(trainer, chunk, sampled, rewards)


def _offline(trainer: Trainer, examples: list[Any]) -> None:
    """The objective's metrics and mean loss, and how often the raw likelihood prefers the chosen answer."""
    from rlft.data import collate

    size = trainer.config.per_device_eval_batch_size
    pair_rewards = tuple(trainer.config.pair_rewards) if trainer.config.pair_rewards else None
    for start in range(0, len(examples), size):
        trainer.poll()
        chunk = examples[start : start + size]
        if "kl_baseline" in trainer.objective.needs and len(chunk) < 2:
            continue
        batch = collate(chunk, pad_id=trainer.tokenizer.pad_token_id, pair_rewards=pair_rewards).to(trainer.device)
        batch = trainer.objective.prepare(online.fill_constants(trainer, batch))
        outputs = trainer.forward(batch, trainer._wanted(batch))
        _, results = trainer.objective.compute(outputs, batch, trainer.objective.denominators(batch))
        for term, result in zip(trainer.objective.terms, results, strict=True):
            counted = result.counted
            name = "loss" if len(results) == 1 else f"loss/{term.name}"
            trainer.metrics.add(name, result.loss.detach(), counted)
            trainer.metrics.add_output(result, batch.mask)
        if trainer.train_data.format == "preference" and "logps" in outputs:
            _raw_preference(trainer, outputs["logps"].detach(), batch)


def _raw_preference(trainer: Trainer, logps: torch.Tensor, batch: Batch) -> None:
    """Pair accuracy by raw likelihood: length-biased, and no reference in it; shown beside the implicit reward's."""
    sums = logps.where(batch.mask, 0.0).sum(-1)
    trainer.metrics.add("logps/accuracies", (sums[0::2] > sums[1::2]).double(), None)


def _prompts_at_once(trainer: Trainer) -> int:
    return max(1, trainer.config.per_device_eval_batch_size)


def _show(trainer: Trainer, examples: list[Any], sampled: Any, rewards: torch.Tensor) -> None:
    for example, ids, reward in list(zip(examples, sampled.completion_ids, rewards.tolist(), strict=True))[
        : trainer.config.log_completions
    ]:
        print(
            f"[{reward:+.2f}] {trainer.tokenizer.decode(example.prompt_ids)} -> {trainer.tokenizer.decode(ids)}",
            flush=True,
        )
