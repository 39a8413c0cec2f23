"""From prompts to a scored batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlft._failpoint import instant
from rlft.rollout import Rollout, SamplingParams
from rlft.run.setup import comparison_settings as pairwise_rules
from rlft.run.setup import parts as setup
from rlft.run.step import comparisons as pairwise
from rlft.run.step import generation_counts as tally
from rlft.run.step import old_logps as _old_logps
from rlft.run.step import sampler_trust as watchdog
from rlft.run.step import update as guard
from rlft.run.step.source import OnlineSource
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = [
    "columns",
    "decoded",
    "move_reference",
    "rollout",
    "score",
    "to_batch",
    "trainer_state",
    "watch_flips",
]

#: Share of answers with A > 2 beta above which the likelihood-ratio term is said to push the wrong way.
FLIP_SHARE = 0.1
#: Columns that are handed to reward functions under names of their own, or are no data of theirs.
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state"}


def sampling_params(trainer: Trainer, *, greedy: bool = False) -> SamplingParams:
    """The run's sampling settings; ``greedy`` for evaluation."""
    c = trainer.config
    if greedy:
        return SamplingParams(c.max_completion_length, stop_token_ids=tuple(c.stop_token_ids), greedy=True)
    return SamplingParams(
        c.max_completion_length,
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
        min_p=c.min_p,
        repetition_penalty=c.repetition_penalty,
        stop_token_ids=tuple(c.stop_token_ids),
    )


def rollout(trainer: Trainer, examples: Sequence[Any], *, seed: int) -> Batch:
    """Sample, score, and collate; metrics of the samples go to the trainer.

    Args:
        trainer: gives sampler, rewards, tokenizer and settings.
        examples: prompts with their columns.
        seed: decides the samples together with weights and prompts.
    """
    n, params = trainer.config.num_generations, sampling_params(trainer)
    # both answers of a pair come from the mixture where there is one; an answer that meets an opponent, from the policy
    mixture = trainer.opponent if pairwise_rules.wants_pairs(trainer.objective) else None
    sampler = trainer.sampler if mixture is None else mixture
    with guard.explained(trainer, "sample"), trainer.meter.phase("sample"), instant("train.sample"):
        sampled = sampler.sample(
            [e.prompt_ids for e in examples],
            n,
            params,
            seed=seed,
            weight_version=trainer.step,
            poll=trainer.poll,
        )
    trainer.meter.sampled([len(ids) for ids in sampled.completion_ids])
    if mixture is None:
        watchdog.watch(trainer, examples, sampled, params)
    repeated = [e for e in examples for _ in range(n)]
    if trainer.judge is None:
        rewards = score_rollout(trainer, repeated, sampled)
    else:
        rewards = torch.full((len(repeated),), torch.nan)
    if trainer.replay is not None:
        sampled, rewards = trainer.replay.mix(examples, sampled, rewards, seed=seed)
    _record_samples(trainer, sampled, rewards, n)
    batch = to_batch(trainer, examples, sampled, rewards)
    tally.masks(trainer, batch.mask)
    return pairwise.complete(trainer, examples, sampled, batch, seed=seed)


def decoded(trainer: Trainer, repeated: Sequence[Any], sampled: Rollout) -> list[Any]:
    """Sampled answers as reward functions see them: text, or one assistant message for conversational prompts."""
    texts = trainer.tokenizer.batch_decode(
        [_without_end(trainer, ids) for ids in sampled.completion_ids], skip_special_tokens=True
    )
    return [
        [{"role": "assistant", "content": text}] if isinstance(example.prompt, list) else text
        for example, text in zip(repeated, texts, strict=True)
    ]


def columns(examples: Sequence[Any]) -> dict[str, list[Any]]:
    """The dataset's other columns, one entry per example."""
    names = {name for e in examples for name in e.columns} - _RESERVED
    return {name: [e.columns.get(name) for e in examples] for name in sorted(names)}


def score_rollout(trainer: Trainer, repeated: Sequence[Any], sampled: Rollout, *, prefix: str = "") -> Tensor:
    """Rewards ``[B]`` of sampled answers, NaN where unscored; each function's mean and spread go to the metrics."""
    trainer.poll()
    completions = decoded(trainer, repeated, sampled)
    with trainer.meter.phase("reward"), instant("train.reward"):
        output = trainer.score(repeated, completions, sampled.completion_ids)
    each = output.each.double()
    for column, name in enumerate(output.names):
        values = each[:, column]
        seen = ~torch.isnan(values)
        trainer.metrics.add(f"{prefix}rewards/{name}/mean", values, seen)
        if int(seen.sum()) > 1:
            trainer.metrics.add(f"{prefix}rewards/{name}/std", values[seen].std(), None)
    tally.scores(trainer, output.rewards)
    unscored = output.rewards.isnan().double()
    trainer.metrics.add("rewards/unscored_fraction", unscored.mean() if len(unscored) else 0.0)
    return output.rewards


def score(
    trainer: Trainer, examples: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
) -> Any:
    """Call the reward functions with TRL's keywords."""
    assert trainer.rewards is not None
    return trainer.rewards(
        prompts=[e.prompt for e in examples],
        completions=list(completions),
        completion_ids=[list(ids) for ids in completion_ids],
        columns=columns(examples),
        trainer_state=trainer_state(trainer),
        poll=trainer.poll,
    )


def trainer_state(trainer: Trainer) -> SimpleNamespace:
    """What a reward function or judge may ask for as ``trainer_state``."""
    return SimpleNamespace(
        global_step=trainer.step, max_steps=trainer.plan.total_steps, is_training=not trainer.evaluating
    )


def to_batch(trainer: Trainer, examples: Sequence[Any], sampled: Rollout, rewards: Tensor) -> Batch:
    """Right-padded tensors; row order is prompt-major."""
    n = len(sampled.completion_ids) // len(examples)
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in sampled.completion_ids], batch_first=True)
    lengths = torch.tensor([len(row) for row in sampled.completion_ids])
    exists = torch.arange(ids.shape[1])[None] < lengths[:, None]
    mask = exists
    if trainer.config.mask_truncated_completions:
        mask = exists & torch.tensor(sampled.finished)[:, None]
    prompts = pad_sequence([torch.tensor(e.prompt_ids, dtype=torch.long) for e in examples], batch_first=True)
    prompt_lengths = torch.tensor([len(e.prompt_ids) for e in examples])
    batch = Batch(
        prompt_ids=prompts,
        prompt_mask=torch.arange(prompts.shape[1])[None] < prompt_lengths[:, None],
        completion_ids=ids,
        completion_mask=exists,
        mask=mask,
        group_ids=torch.arange(len(examples)).repeat_interleave(n),
        rewards=rewards.float(),
    )
    if "sampler_logps" in trainer.objective.needs or _old_logps.of_sampler(trainer):
        batch = batch.replace(extras={"sampler_logps": _padded(trainer, sampled.logps)})
    return setup.with_columns(batch, examples, trainer.objective).to(trainer.device)


def _padded(trainer: Trainer, logps: Sequence[Sequence[float]]) -> Tensor:
    """``[B, T]`` in the precision of the policy's own log-probs."""
    double = next(trainer.policy.parameters()).dtype == torch.float64
    rows = [torch.tensor(row, dtype=torch.float64 if double else torch.float32) for row in logps]
    return pad_sequence(rows, batch_first=True)


def move_reference(trainer: Trainer) -> None:
    """After a step: mix the policy into the reference, where ``sync_ref_model`` says so and it is due."""
    c = trainer.config
    if not c.sync_ref_model or trainer.step % c.ref_model_sync_steps:
        return
    trainer.policy.update_reference(c.ref_model_mixup_alpha)
    source = trainer.source
    if isinstance(source, OnlineSource):  # what is left of a generation is compared with the reference as it is now
        source.queue = [batch.replace(ref_logps=None, ref_states=None) for batch in source.queue]


def _record_samples(trainer: Trainer, sampled: Rollout, rewards: Tensor, n: int) -> None:
    if trainer.judge is None:
        _record_rewards(trainer, rewards, n)
    lengths = torch.tensor([float(len(ids)) for ids in sampled.completion_ids], dtype=torch.float64)
    finished = torch.tensor(sampled.finished)
    everything = torch.ones_like(finished)
    trainer.metrics.add("completions/mean_length", lengths, everything)
    trainer.metrics.add_min("completions/min_length", lengths)
    trainer.metrics.add_max("completions/max_length", lengths)
    trainer.metrics.add("completions/mean_terminated_length", lengths, finished)
    trainer.metrics.add("completions/clipped_ratio", (~finished).double(), everything)


def _record_rewards(trainer: Trainer, rewards: Tensor, n: int) -> None:
    groups = rewards.double().reshape(-1, n)
    scored = ~torch.isnan(groups)
    trainer.metrics.add("reward", groups, scored)
    counts = scored.sum(-1)
    centred = (groups - torch.nanmean(groups, dim=-1, keepdim=True)).where(scored, 0.0)
    spread = (centred.square().sum(-1) / (counts - 1).clamp(min=1)).sqrt()
    usable = counts > 1
    trainer.metrics.add("reward_std", spread, usable)
    trainer.metrics.add("frac_reward_zero_std", (spread == 0).double(), usable)
    tally.spreads(trainer, spread == 0, usable)


def watch_flips(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Say once when the likelihood-ratio term lowers the probability of many good answers; ``values`` are logged ones."""
    share = values.get("agro/flip_fraction", 0.0)
    if share > FLIP_SHARE and any(term.lr_coef for term in trainer.objective.terms):
        guard.told(
            trainer,
            "flips",
            f"step {trainer.step}: {share:.0%} of the answers have A > 2 beta (agro/flip_fraction, more than {FLIP_SHARE:.0%}); "
            f"there the likelihood-ratio term of {trainer.objective.name!r} outweighs the rest and lowers the probability of "
            f"good answers. Set lr_coef: 0 (or agro_off_policy), or raise beta (now {trainer.objective.beta:g})",
        )


def _without_end(trainer: Trainer, ids: Sequence[int]) -> list[int]:
    ends = {trainer.tokenizer.eos_token_id, *trainer.config.stop_token_ids}
    return [i for i in ids if i not in ends]
