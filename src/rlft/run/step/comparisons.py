"""Online training on comparisons: which answers meet, who judges, and what of it is trained on.

A pair objective (dpo, ipo, ...) gets pairs of a better and a worse sampled answer; Nash objectives get the probability that
each answer beats one of an opponent; ``keep`` leaves the answers that supervised losses imitate. The oracle is a
``judge``, or the reward functions by the Bradley-Terry model: sigmoid(r(y) - r(y')).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft.rewards import RewardError
from rlft.rewards.call import When
from rlft.rollout import Rollout, fold_seed
from rlft.rollout.randomness import row_keys, uniforms
from rlft.rollout.select import Pairs, keep_best, keep_by_rejection, keep_from, select_pairs
from rlft.rules.comparisons import plays, wants_pairs
from rlft.run.step import calls
from rlft.run.step.generation_counts import GenerationCounts
from rlft.run.step.parts import Parts
from rlft.types import Batch

if TYPE_CHECKING:
    pass

__all__ = ["Comparisons", "alive", "compares"]


def alive(batch: Batch) -> Batch:
    """The rows that have a token to train on (a pair where both have); the first group where none has."""
    rows = batch.mask.any(-1)
    if bool(rows.all()):
        return batch
    if not bool(rows.any()):
        rows = batch.group_ids == batch.group_ids[0]
    return batch.select(rows.nonzero()[:, 0])


def compares(parts: Parts) -> bool:
    """Whether a run learns from comparisons, or leaves answers out by their reward."""
    learns = wants_pairs(parts.objective) or plays(parts.objective)
    return learns or parts.judge is not None or parts.config.keep != "all"


class Comparisons:
    """Makes of sampled answers what the objective trains on. It holds nothing of its own.

    Args:
        parts: of the run; the judge is a reward function that also takes ``opponents``, or None: then rewards decide.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.tokenizer, self.judge, self.stages = parts.config, parts.tokenizer, parts.judge, parts.stages
        self.opponent, self.baseline = parts.players.opponent, parts.players.baseline
        self.processes, self.journal = parts.processes, parts.journal
        self.pairs, self.plays = wants_pairs(parts.objective), plays(parts.objective)

    def complete(
        self, examples: Sequence[Any], sampled: Rollout, batch: Batch, *, seed: int, counts: GenerationCounts
    ) -> Batch:
        """The batch as its objective wants it: pairs, win rates, or the answers that are kept.

        Args:
            examples: P prompts with their columns.
            sampled: ``P * n`` answers, prompt-major.
            batch: the same answers as tensors, with rewards unless a judge decides.
            seed: of this generation.
            counts: takes in what a judge did not answer.
        """
        if self.config.keep != "all":
            batch = self._keep(batch, seed=seed)
        if self.pairs:
            return self._paired(examples, sampled, batch, counts)
        return self._played(examples, sampled, batch, counts, seed=seed) if self.plays else batch

    # -- supervised: a filter -----------------------------------------------------------------------------------------------
    def _keep(self, batch: Batch, *, seed: int) -> Batch:
        c, n = self.config, self.config.num_generations
        assert batch.rewards is not None
        scores = batch.rewards.double().reshape(-1, n)
        usable = (batch.mask.any(-1) & ~batch.rewards.isnan()).reshape(-1, n)
        if c.keep == "best":
            kept = keep_best(scores, usable)
        elif c.keep == "threshold":
            assert c.keep_threshold is not None
            kept = keep_from(scores, usable, c.keep_threshold)
        else:
            assert c.keep_beta is not None
            keys = row_keys(fold_seed(seed, stream="keep"), *scores.shape)
            u = uniforms(keys, torch.zeros_like(keys)).reshape(scores.shape).to(scores.device)
            kept = keep_by_rejection(scores, usable, u, beta=c.keep_beta)
        self.journal.metrics.add("keep/fraction", kept.double(), None)
        self.journal.metrics.add("keep/reward", scores, kept)
        return batch.replace(mask=batch.mask & kept.reshape(-1, 1))

    # -- pairs ----------------------------------------------------------------------------------------------------------------
    def _paired(self, examples: Sequence[Any], sampled: Rollout, batch: Batch, counts: GenerationCounts) -> Batch:
        c, n = self.config, self.config.num_generations
        usable = batch.mask.any(-1).reshape(-1, n)
        if self.judge is not None:
            wins = self._round_robin(examples, sampled, usable.cpu(), counts).to(batch.device)
            met = ~wins.isnan()
            scores = wins.where(met, 0.0).sum(-1) / met.sum(-1)  # NaN for an answer that was never judged
            gaps = wins - wins.transpose(1, 2)
        else:
            assert batch.rewards is not None
            scores = batch.rewards.double().reshape(-1, n)
            gaps = scores[:, :, None] - scores[:, None, :]
            wins = torch.sigmoid(gaps)
        usable = usable & ~scores.isnan()
        found = select_pairs(scores, gaps, usable, selection=c.pair_selection, min_gap=c.pair_min_gap)
        won = _looked_up(wins, found)
        found = found if self.judge is None else _judged(found, won)
        self._record_pairs(found, won)
        return _paired(batch, found, won, scores)

    def _record_pairs(self, pairs: Pairs, won: Tensor) -> None:
        comparable = ~pairs.gap.isnan()
        tied = comparable & ~pairs.alive
        self.journal.metrics.add("pairs/tied_fraction", tied.double(), comparable)
        self.journal.metrics.add("pairs/gap", pairs.gap, pairs.alive)
        self.journal.metrics.add("pairs/win_rate", won, pairs.alive)
        if bool(tied.any()):
            gap = self.config.pair_min_gap
            self.journal.warn_once(
                "tied",
                f"step {self.processes.progress.step + 1}: {int(tied.sum())} of {int(comparable.sum())} pairs of answers are "
                f"{f'at most {gap:g} apart' if gap else 'tied'} and are left out (pairs/tied_fraction counts them; more "
                f"num_generations, or dynamic_sampling: true, find others)",
            )

    # -- an opponent ----------------------------------------------------------------------------------------------------------
    def _played(
        self, examples: Sequence[Any], sampled: Rollout, batch: Batch, counts: GenerationCounts, *, seed: int
    ) -> Batch:
        """Every answer meets one of the opponent's; ``win_rates`` is the probability that it wins."""
        n = self.config.num_generations
        repeated = [e for e in examples for _ in range(n)]
        other = fold_seed(seed, stream="opponent")
        assert self.opponent is not None
        with self.journal.meter.phase("sample"):
            theirs = self.opponent.sample(
                [e.prompt_ids for e in examples],
                n,
                calls.sampling_params(self.config),
                seed=other,
                weight_version=self.processes.progress.step,
                poll=self.processes.poll,
            )
        if self.judge is None:
            assert batch.rewards is not None
            texts = self._texts(repeated, theirs)
            with self.journal.meter.phase("reward"):
                against = self.stages.score(repeated, texts, theirs.completion_ids).rewards
            won = torch.sigmoid(batch.rewards.double().cpu() - against.double())
            self.journal.metrics.add("judge/opponent_reward", against.double(), ~against.isnan())
        else:
            won = self.compare(repeated, sampled, theirs, seed=other)
            self._note_unanswered(won, counts)
        lengths = torch.tensor([float(len(ids)) for ids in theirs.completion_ids], dtype=torch.float64)
        self.journal.metrics.add("judge/opponent_length", lengths, None)
        answered = ~won.isnan()
        self.journal.metrics.add("judge/win_rate", won, answered)
        won, answered = won.to(batch.device), answered.to(batch.device)
        return batch.replace(
            mask=batch.mask & answered[:, None], extras={**batch.extras, "win_rates": won.where(answered, 0.5).float()}
        )

    # -- the judge ------------------------------------------------------------------------------------------------------------
    def compare(
        self, examples: Sequence[Any], ours: Rollout, theirs: Rollout, *, seed: int, training: bool = True
    ) -> Tensor:
        """The judge's probability that each answer beats the other of its row, float64 ``[B]``, NaN where it had no answer.

        Which of the two it sees first is drawn at random, so that a judge with a liking for a place is fair on average.
        """
        keys = row_keys(fold_seed(seed, stream="judge"), len(examples), 1)
        swapped = (uniforms(keys, torch.zeros_like(keys)) < 0.5).tolist()
        mine, other = self._texts(examples, ours), self._texts(examples, theirs)
        first = [b if swap else a for a, b, swap in zip(mine, other, swapped, strict=True)]
        second = [a if swap else b for a, b, swap in zip(mine, other, swapped, strict=True)]
        ids = [b if swap else a for a, b, swap in zip(ours.completion_ids, theirs.completion_ids, swapped, strict=True)]
        won = self._ask(examples, first, second, ids, training=training)
        return torch.where(torch.tensor(swapped), 1 - won, won)

    def win_rate_of_greedy(self, examples: Sequence[Any], sampled: Rollout) -> Tensor:
        """For evaluation: how often a greedy answer beats the reference's greedy answer, by the judge; ``[B]``."""
        assert self.baseline is not None
        params = calls.sampling_params(self.config, greedy=True)
        theirs = self.baseline.sample([e.prompt_ids for e in examples], 1, params, seed=0, poll=self.processes.poll)
        return self.compare(examples, sampled, theirs, seed=0, training=False)

    def _round_robin(
        self, examples: Sequence[Any], sampled: Rollout, usable: Tensor, counts: GenerationCounts
    ) -> Tensor:
        """``[P, n, n]``, the probability that answer i beats answer j: every two usable answers meet once; else NaN."""
        n = self.config.num_generations
        texts = self._texts([e for e in examples for _ in range(n)], sampled)
        meetings = [
            (p, i, j)
            for p in range(len(examples))
            for i in range(n)
            for j in range(i + 1, n)
            if bool(usable[p, i]) and bool(usable[p, j])
        ]
        wins = torch.full((len(examples), n, n), math.nan, dtype=torch.float64)
        if meetings:
            won = self._ask(
                [examples[p] for p, _, _ in meetings],
                [texts[p * n + i] for p, i, _ in meetings],
                [texts[p * n + j] for p, _, j in meetings],
                [sampled.completion_ids[p * n + i] for p, i, _ in meetings],
            )
            p, i, j = (torch.tensor(column) for column in zip(*meetings, strict=True))
            wins[p, i, j], wins[p, j, i] = won, 1 - won
            self._note_unanswered(won, counts)
        return wins

    def _note_unanswered(self, won: Tensor, counts: GenerationCounts) -> None:
        self.journal.metrics.add("judge/unanswered", won.isnan().double(), None)
        counts.scored(won)

    def _ask(
        self,
        examples: Sequence[Any],
        first: Sequence[Any],
        second: Sequence[Any],
        ids: Sequence[Sequence[int]],
        *,
        training: bool = True,
    ) -> Tensor:
        """Call the judge: a reward function that also gets ``opponents`` and returns probabilities."""
        self.processes.poll()
        assert self.judge is not None
        call = calls.reward_call(examples, first, ids, self.processes.progress, training=training)
        if "opponents" in call["columns"]:
            raise ValueError("the column name 'opponents' is an argument of every judge; rename the column")
        call["columns"]["opponents"] = list(second)
        with self.journal.meter.phase("reward"):
            output = self.judge(**call, poll=self.processes.poll)
        won = output.each[:, 0].double()
        wrong = ((won < 0) | (won > 1)).nonzero()
        if len(wrong):
            row, when = int(wrong[0, 0]), When.of(call["trainer_state"])
            raise RewardError(
                f"judge {output.names[0]!r} returned {won[row].item():g} for row {row}{when.text}; it must return the "
                f"probability, 0 to 1, that the completion beats its opponent (1 or 0 where it is sure, None where it cannot say)",
                function=output.names[0],
                step=when.step,
                row=row,
            )
        return won

    def _texts(self, examples: Sequence[Any], sampled: Rollout) -> list[Any]:
        return calls.decoded(self.tokenizer, self.config.stop_token_ids, examples, sampled)

    def describe(self) -> dict[str, str]:
        """Rows of the table shown before a run: what is compared, with whom, and what is kept."""
        c = self.config
        rows: dict[str, str] = {}
        mixture = f"policy^{1 - (c.mixture_coef or 0):g} x reference^{c.mixture_coef or 0:g}"
        oracle = "Bradley-Terry on the rewards" if self.judge is None else f"judge {self.judge.names[0]}"
        if self.pairs:
            picked = "best against worst" if c.pair_selection == "best_worst" else "all pairs"
            gap = f", more than {c.pair_min_gap:g} apart" if c.pair_min_gap else ", ties left out"
            source = f"; answers from {mixture}" if self.opponent is not None else ""
            rows["pairs"] = f"{picked}{gap}; by {'rewards' if self.judge is None else oracle}{source}"
        elif self.plays:
            average = f"moving average of the policy, decay {c.opponent_ema_decay}"
            rows["opponent"] = f"{mixture if c.mixture_coef is not None else average}; by {oracle}"
        if c.keep != "all":
            rows["kept"] = {
                "best": f"the best of {c.num_generations}",
                "threshold": f"rewards from {c.keep_threshold}",
                "rejection": f"with probability exp((r - highest) / {c.keep_beta})",
            }[c.keep]
        return rows


def _looked_up(table: Tensor, pairs: Pairs) -> Tensor:
    """``table[p, chosen, rejected]``, ``[P, K]``."""
    return table[torch.arange(table.shape[0], device=table.device)[:, None], pairs.chosen, pairs.rejected]


def _judged(pairs: Pairs, won: Tensor) -> Pairs:
    """Without pairs that the judge had no answer for, which mean win rates cannot see."""
    return Pairs(pairs.chosen, pairs.rejected, pairs.gap, pairs.alive & ~won.isnan())


def _paired(batch: Batch, pairs: Pairs, won: Tensor, scores: Tensor) -> Batch:
    """Groups of two, chosen first, as many for every prompt; what is not alive is masked."""
    prompts, each = pairs.chosen.shape
    n = batch.num_rows // prompts
    first = torch.arange(prompts, device=batch.device)[:, None] * n
    rows = torch.stack([first + pairs.chosen, first + pairs.rejected], dim=-1).flatten()
    of_prompt = torch.arange(prompts, device=batch.device).repeat_interleave(each)
    live = pairs.alive.flatten().repeat_interleave(2)
    half = torch.stack([won, 1 - won], dim=-1).flatten().where(live, 0.5)
    gap = pairs.gap.flatten().repeat_interleave(2).where(live, 0.0)
    picked = {name: value[rows] for name, value in batch._row_tensors().items() if name not in batch.extras}
    return batch.replace(
        **{**picked, "rewards": scores.flatten()[rows].float().where(live, torch.nan)},
        prompt_ids=batch.prompt_ids[of_prompt],
        prompt_mask=batch.prompt_mask[of_prompt],
        group_ids=torch.arange(prompts * each, device=batch.device).repeat_interleave(2),
        completion_ids=batch.completion_ids[rows],
        completion_mask=batch.completion_mask[rows],
        mask=batch.mask[rows] & live[:, None],
        extras={
            **{name: value[rows] for name, value in batch.extras.items()},
            "win_rates": half.float(),
            "margin": gap.float(),
        },
    )
