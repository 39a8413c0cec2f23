"""The exact expected gradient of any objective of rlft in a tabular world, as a function of the policy.

The objective is built and run the way the trainer does (advantages, KL in the reward, pairs, averaging), on every group of
answers that can be drawn, each weighted by its probability. Groups are drawn afresh from the policy, or from a policy
that stays fixed; the latter's log-probs are then ``old_logps``. Everything is float64 and deterministic.

What a run takes over a whole step is taken over a step without end: a mean over tokens divides by the expected number of tokens,
which scales the gradient and moves nothing, and advantages are normalised by their exact mean and deviation.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.worlds.problem import F64, Problem
from benchmarks.worlds.rows import Row
from rlft.types import Batch
from rlft.worlds import World

__all__ = ["F64", "Field", "Problem"]

#: Advantages that are normalised over a step, and what they are before that.
_RAW: dict[str, dict[str, object]] = {
    "reward_to_go": {"whiten": False},
    "batch_norm": {"advantage": "reward"},
    "group_mean_batch_norm": {"advantage": "group_mean"},
}


def _groups(world: World, n: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Groups of n answers ``[M, n]`` and in how many orders each can be drawn."""
    if ordered:
        tuples = world.tuples(n)
        return tuples, torch.ones(len(tuples), dtype=F64)
    found = list(itertools.combinations_with_replacement(range(world.num_answers), n))
    orders = [math.factorial(n) / math.prod(math.factorial(c) for c in Counter(group).values()) for group in found]
    return torch.tensor(found), torch.tensor(orders, dtype=F64)


class Field:
    """The expected gradient of an objective's loss, at many policies at a time.

    A state ``x [D]`` is the policy's table, and the values of a critic behind it where the objective learns one: for
    every prefix, or one for all.

    Args:
        problem: the world.
        row: the objective.
        behaviour: logits of the policy that draws the answers; None = the policy itself. It may be set anew.
    """

    def __init__(self, problem: Problem, row: Row, behaviour: Tensor | None) -> None:
        self.problem, self.row, self.behaviour = problem, row, behaviour
        self.objective = row.build(problem.beta)
        self.raw = self.objective
        if self.objective.normalises_step:
            before = _RAW[str(self.objective.advantage)]
            self.raw = replace(row, hyper={**row.hyper, **before}).build(problem.beta)
        self.groups, self.orders = _groups(problem.world, row.n, ordered=row.pairs)
        needs = self.objective.needs | {name for term in self.objective.terms for name in term.sources}
        self.needs = needs | {"values"} if "start_values" in needs else needs
        self.cells = problem.world.num_states * problem.world.vocab
        one = row.one_value or row.objective == "dro"
        self.num_values = 0 if "values" not in self.needs else 1 if one else problem.world.num_states
        self._blank: dict[int, Batch] = {}

    # -- states -------------------------------------------------------------------------------------------------------
    def start(self, logits: Tensor) -> Tensor:
        """The state at a policy: its table, and the values at which a critic would rest if the policy stayed."""
        x = torch.cat([logits.flatten(), torch.zeros(self.num_values, dtype=F64)])
        if self.num_values:  # their gradient is affine in them
            slope, matrix = self.linearise(x)
            own = slice(self.cells, None)
            x[own] -= torch.linalg.solve(matrix[own, own], slope[own])
        return x

    def table(self, x: Tensor) -> Tensor:
        """``[..., S, V]`` logits of a state ``[..., D]``."""
        world = self.problem.world
        return x[..., : self.cells].reshape(*x.shape[:-1], world.num_states, world.vocab)

    # -- the loss -----------------------------------------------------------------------------------------------------
    def _rows(self, per_answer: Tensor) -> Tensor:
        """``[K, N, ...]`` -> one row for each member of each group."""
        return per_answer[:, self.groups].flatten(0, 2)

    def _along(self, table: Tensor) -> Tensor:
        """``[K, S]`` per prefix -> rows of tokens."""
        world = self.problem.world
        return self._rows(table[:, world.states].where(world.mask, 0.0))

    def _picked(self, table: Tensor, shift: Tensor | None = None) -> Tensor:
        """``[K, S, V]`` per cell -> rows of tokens, with something added to those of each answer."""
        world = self.problem.world
        tokens = table[:, world.states, world.tokens]
        return self._rows((tokens if shift is None else tokens + shift).where(world.mask, 0.0))

    def _fixed(self, copies: int) -> Batch:
        """What every batch of that many policies has in common."""
        if copies not in self._blank:
            world, count = self.problem.world, copies * len(self.groups)
            mask = self._rows(world.mask.expand(copies, -1, -1))
            self._blank[copies] = Batch(
                prompt_ids=torch.zeros(count, 1, dtype=torch.long),
                prompt_mask=torch.ones(count, 1, dtype=torch.bool),
                completion_ids=self._rows(world.tokens.expand(copies, -1, -1)),
                completion_mask=mask,
                mask=mask,
                group_ids=torch.arange(count).repeat_interleave(self.row.n),
                rewards=self._rows(self.problem.rewards.expand(copies, -1)),
                ref_logps=self._picked(self.problem.ref.log_softmax(-1).expand(copies, -1, -1)),
            )
        return self._blank[copies]

    def _extras(self, logp: Tensor, mu: Tensor) -> dict[str, Tensor]:
        """Per-row numbers beyond the usual: importance weights cut at 1, or chances to win."""
        problem, row, extras = self.problem, self.row, {}
        world = problem.world

        def answers(table: Tensor) -> Tensor:
            return table[:, world.states, world.tokens].where(world.mask, 0.0).sum(-1)

        if "weights" in self.needs:
            extras["weights"] = self._rows((answers(logp) - answers(mu)).exp().clamp(max=1.0))
        if row.objective == "ipo_md":  # both answers are rows: the first against the second
            won = problem.wins[self.groups[:, 0], self.groups[:, 1]]
            extras["win_rates"] = won.repeat_interleave(2).repeat(len(logp))
        elif "win_rates" in self.needs:
            extras["win_rates"] = self._rows(problem.rival(answers(logp), row.mixture) @ problem.wins.T)
        return extras

    def losses(self, x: Tensor, weights: Tensor, shift: Tensor | None = None) -> Tensor:
        """Loss of every group ``[K, M]`` under each of K states ``[K, D]``.

        Args:
            x: the states.
            weights: ``[K, M]`` probability of each group; a step is normalised with them.
            shift: ``[K, N, T]`` added to the sampler's log-probs, to put a ratio on one side of its clip.
        """
        world, copies = self.problem.world, x.shape[0]
        logp, ref = self.table(x).log_softmax(-1), self.problem.ref.log_softmax(-1)
        mu = logp.detach() if self.behaviour is None else self.behaviour.log_softmax(-1).expand_as(logp)
        ratio = logp - ref
        outputs = {"logps": self._picked(logp)}
        for name, chances, power in (
            ("token_kl", logp, 1),
            ("token_log_ratio_sq", logp, 2),
            ("behaviour_log_ratio", mu, 1),
            ("behaviour_log_ratio_sq", mu, 2),
        ):
            if name in self.needs:
                outputs[name] = self._along((chances.exp() * ratio**power).sum(-1))
        given = {"old_logps": self._picked(mu, shift), "extras": self._extras(logp.detach(), mu)}
        if self.num_values:
            outputs["values"] = self._along(x[:, self.cells :].expand(copies, world.num_states))
            if self.objective.advantage == "gae":
                given["values"] = outputs["values"].detach()
        batch = self._prepare(self._fixed(copies).replace(**given), weights)
        total = torch.zeros(copies, len(self.groups), dtype=F64)
        found = self.objective.compute(outputs, batch, self.objective.denominators(batch))[1]
        for term, output in zip(self.objective.terms, found, strict=True):
            loss = output.loss.where(output.counted, 0.0)
            if loss.ndim == 2:
                loss = loss.sum(-1) / (batch.mask.sum(-1) if term.reduction == "sequence_mean" else 1)
            total = total + term.weight * loss.reshape(copies, len(self.groups), -1).mean(-1)
        return total

    def _prepare(self, batch: Batch, weights: Tensor) -> Batch:
        """Advantages, as the trainer computes them; those of a whole step with the moments of all groups there are."""
        if self.raw is self.objective:
            return self.objective.prepare(batch)
        batch = self.raw.prepare(batch)
        assert batch.advantages is not None
        copies, values = weights.shape[0], batch.advantages
        counted = batch.mask if values.ndim == 2 else batch.mask.any(-1)
        share = weights.detach().flatten().repeat_interleave(self.row.n)
        share = (share[:, None] if values.ndim == 2 else share).expand_as(values).where(counted, 0.0)

        def mean(of: Tensor) -> Tensor:
            every = (share * of).reshape(copies, -1).sum(-1) / share.reshape(copies, -1).sum(-1)
            return every.repeat_interleave(len(values) // copies).reshape(-1, *[1] * (values.ndim - 1))

        scaled = values - mean(values)
        if len(self.objective.terms) > 1:  # alone, a positive factor changes the pace of descent, and not its way
            scaled = scaled / (mean(scaled.square()) + self.objective.advantage_args.get("eps", 1e-8)).sqrt()
        return batch.replace(advantages=scaled.where(counted, 0.0))

    def weights(self, x: Tensor) -> Tensor:
        """``[K, M]`` probability of each group under what samples it; a constant. K is 1 for a fixed sampler."""
        world = self.problem.world
        logits = self.table(x).detach() if self.behaviour is None else self.behaviour[None]
        logp = logits.log_softmax(-1)[:, world.states, world.tokens].where(world.mask, 0.0).sum(-1)
        weights = logp[:, self.groups].sum(-1).exp() * self.orders
        if self.row.pairs:  # two draws, and the label puts the winner first
            weights = weights * 2 * self.problem.wins[self.groups[:, 0], self.groups[:, 1]]
        return weights.expand(x.shape[0], -1)

    # -- its gradient -------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``[K, D]`` states -> the expected gradient at each; ``shift`` as in :meth:`losses`."""
        if self.row.objective == "p3o":  # compares every row of a batch with every other: many small ones are quicker
            size = max(1, 256 // self.groups.numel())
            shifts = [None] * -(-len(x) // size) if shift is None else shift.split(size)
            return torch.cat([self._gradient(*one) for one in zip(x.split(size), shifts, strict=True)])
        return self._gradient(x, shift)

    def _gradient(self, x: Tensor, shift: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        weights = self.weights(x)
        return torch.autograd.grad((weights * self.losses(x, weights, shift)).sum(), x)[0]

    def per_group(self, logits: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradient of every group ``[M, S V]`` at one policy (and critic), and the groups' probabilities ``[M]``."""
        one = self.start(logits)
        if values is not None:
            one[self.cells :] = values
        x = one.repeat(len(self.groups), 1).requires_grad_()
        weights = self.weights(x)
        # one copy of the policy for each group, so that gradients do not mix
        gradients = torch.autograd.grad(self.losses(x, weights).diagonal().sum(), x)[0]
        return gradients[:, : self.cells], weights[0]

    def directions(self) -> Tensor:
        """``[E, D]`` the ways a state can move. All logits of a prefix but the last, as moving all alike changes nothing."""
        every = torch.eye(self.cells + self.num_values, dtype=F64)
        last = torch.arange(self.cells + self.num_values)
        return every[(last % self.problem.world.vocab != self.problem.world.vocab - 1) | (last >= self.cells)]

    def linearise(self, x: Tensor, step: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The field at x ``[D]`` and its derivative ``[D, D]`` by forward differences, all in one call."""
        moves = self.directions()
        found = self(torch.cat([x[None], x + step * moves]))
        return found[0], self.whole((found[1:] - found[0]).T / step)

    def whole(self, columns: Tensor) -> Tensor:
        """Derivatives along :meth:`directions` ``[R, E]`` -> along every entry of a state ``[R, D]``."""
        world = self.problem.world
        table = columns[:, : world.num_states * (world.vocab - 1)].reshape(-1, world.num_states, world.vocab - 1)
        table = torch.cat([table, -table.sum(-1, keepdim=True)], -1).flatten(1)
        return torch.cat([table, columns[:, world.num_states * (world.vocab - 1) :]], -1)

    def free(self) -> Tensor:
        """What makes the derivative of the field regular: adding a number to all logits of a prefix changes nothing."""
        world = self.problem.world
        block = torch.full((world.vocab, world.vocab), 1.0 / world.vocab, dtype=F64)
        values = torch.zeros(self.num_values, self.num_values, dtype=F64)
        return torch.block_diag(*[block] * world.num_states, values)
