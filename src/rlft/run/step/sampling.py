"""From prompts to a scored batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlft._failpoint import instant
from rlft.rollout import Rollout
from rlft.run.step import calls
from rlft.run.step.collate import with_columns
from rlft.run.step.comparisons import Comparisons
from rlft.run.step.generation_counts import GenerationCounts
from rlft.run.step.parts import Parts
from rlft.run.step.sampler_trust import SamplerTrust
from rlft.run.step.step_errors import StepErrors
from rlft.types import Batch

__all__ = ["Sampling"]


class Sampling:
    """Owns the sampler, the rewards and the replay buffer of an online run.

    Args:
        parts: of the run.
        comparisons: pairs, win rates and kept answers, or None where a batch is trained on as it was sampled.
        errors: what goes wrong, in words.
        trust: looks at what the sampler gave.
        counts: of each generation.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        comparisons: Comparisons | None,
        errors: StepErrors,
        trust: SamplerTrust,
        counts: GenerationCounts,
    ) -> None:
        self.config, self.objective, self.tokenizer = parts.config, parts.objective, parts.tokenizer
        self.sampler, self.rewards, self.replay = parts.sampler, parts.rewards, parts.replay
        self.comparisons, config = comparisons, parts.config
        self.processes, self.journal, self.errors = parts.processes, parts.journal, errors
        self.trust, self.counts, self.stages = trust, counts, parts.stages
        self.params = calls.sampling_params(config)
        self.greedy_params = calls.sampling_params(config, greedy=True)
        self._training = True
        self._precision = torch.float64 if next(parts.policy.parameters()).dtype == torch.float64 else torch.float32
        # both answers of a pair come from the mixture where there is one; one that meets an opponent, from the policy
        self._mixture = comparisons.opponent if comparisons is not None and comparisons.pairs else None

    def draw(self, examples: Sequence[Any], *, seed: int) -> Batch:
        """Sample, score, and collate; metrics of the samples go to the journal.

        Args:
            examples: prompts with their columns.
            seed: decides the samples together with weights and prompts.
        """
        n, mixture = self.config.num_generations, self._mixture
        with self.errors.explained("sample"), self.journal.meter.phase("sample"), instant("train.sample"):
            sampled = (self.sampler if mixture is None else mixture).sample(
                [e.prompt_ids for e in examples],
                n,
                self.params,
                seed=seed,
                weight_version=self.processes.progress.step,
                poll=self.processes.poll,
            )
        self.journal.meter.sampled([len(ids) for ids in sampled.completion_ids])
        if mixture is None:
            self.trust.look(examples, sampled, self.params)
        if self.rewards is not None:
            rewards = self.rewards_of([e for e in examples for _ in range(n)], sampled)
            self.counts.scored(rewards)
        else:
            rewards = torch.full((len(sampled),), torch.nan)
        if self.replay is not None:
            sampled, rewards = self.replay.mix(examples, sampled, rewards, seed=seed)
        equal, usable = self._record_rewards(rewards) if self.rewards is not None else (None, None)
        self._record_lengths(sampled)
        batch = self.batch_of(examples, sampled, rewards)
        self.counts.drawn(batch.mask, equal, usable)
        if self.comparisons is None:
            return batch
        return self.comparisons.complete(examples, sampled, batch, seed=seed, counts=self.counts)

    def rewards_of(self, examples: Sequence[Any], sampled: Rollout, *, training: bool = True) -> Tensor:
        """Rewards ``[B]`` of sampled answers, NaN where unscored; each function's mean and spread go to the journal.

        Args:
            examples: the example of each answer.
            sampled: the answers.
            training: False for held-out prompts.
        """
        self.processes.poll()
        completions = calls.decoded(self.tokenizer, self.config.stop_token_ids, examples, sampled)
        self._training = training
        try:
            with self.journal.meter.phase("reward"), instant("train.reward"):
                output = self.stages.score(examples, completions, sampled.completion_ids)
        finally:
            self._training = True
        each = output.each.double()
        for column, name in enumerate(output.names):
            values = each[:, column]
            seen = ~torch.isnan(values)
            self.journal.metrics.add(f"rewards/{name}/mean", values, seen)
            if int(seen.sum()) > 1:
                self.journal.metrics.add(f"rewards/{name}/std", values[seen].std(), None)
        unscored = output.rewards.isnan().double()
        self.journal.metrics.add("rewards/unscored_fraction", unscored.mean() if len(unscored) else 0.0)
        return output.rewards

    def score(self, examples: Sequence[Any], completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> Any:
        """Call the reward functions with TRL's keywords, see :meth:`rlft.Trainer.score`."""
        assert self.rewards is not None
        call = calls.reward_call(examples, completions, ids, self.processes.progress, training=self._training)
        return self.rewards(**call, poll=self.processes.poll)

    def batch_of(self, examples: Sequence[Any], sampled: Rollout, rewards: Tensor) -> Batch:
        """Right-padded tensors on the device; row order is prompt-major."""
        n = len(sampled.completion_ids) // len(examples)
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in sampled.completion_ids], batch_first=True)
        lengths = torch.tensor([len(row) for row in sampled.completion_ids])
        exists = torch.arange(ids.shape[1])[None] < lengths[:, None]
        mask = exists
        if self.config.mask_truncated_completions:
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
        if "sampler_logps" in self.objective.needs or self.trust.usable:
            noted = [torch.tensor(row, dtype=self._precision) for row in sampled.logps]
            batch = batch.replace(extras={"sampler_logps": pad_sequence(noted, batch_first=True)})
        batch = with_columns(batch, examples, self.objective) if self.objective.columns else batch
        return batch.to(self.processes.device)

    def greedy(self, examples: Sequence[Any]) -> Rollout:
        """One greedy answer for each prompt."""
        return self.sampler.sample(
            [e.prompt_ids for e in examples],
            1,
            self.greedy_params,
            seed=0,
            weight_version=self.processes.progress.step,
            poll=self.processes.poll,
        )

    def _record_lengths(self, sampled: Rollout) -> None:
        lengths = torch.tensor([float(len(ids)) for ids in sampled.completion_ids], dtype=torch.float64)
        finished = torch.tensor(sampled.finished)
        everything = torch.ones_like(finished)
        metrics = self.journal.metrics
        metrics.add("completions/mean_length", lengths, everything)
        metrics.add_min("completions/min_length", lengths)
        metrics.add_max("completions/max_length", lengths)
        metrics.add("completions/mean_terminated_length", lengths, finished)
        metrics.add("completions/clipped_ratio", (~finished).double(), everything)

    def _record_rewards(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Which groups earned equal rewards, and which can be compared; ``[P]`` both."""
        groups = rewards.double().reshape(-1, self.config.num_generations)
        scored = ~torch.isnan(groups)
        metrics = self.journal.metrics
        metrics.add("reward", groups, scored)
        sizes = scored.sum(-1)
        centred = (groups - torch.nanmean(groups, dim=-1, keepdim=True)).where(scored, 0.0)
        spread = (centred.square().sum(-1) / (sizes - 1).clamp(min=1)).sqrt()
        usable = sizes > 1
        metrics.add("reward_std", spread, usable)
        metrics.add("frac_reward_zero_std", (spread == 0).double(), usable)
        return spread == 0, usable
