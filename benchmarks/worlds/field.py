"""The exact expected gradient of any objective of rlft in a tabular world, and where its descent comes to rest.

The objective is built and run the way the trainer does (advantages, KL in the reward, pairs, averaging), on every group of
answers that can be drawn, each weighted by its probability. Groups are drawn afresh from the policy, or from a policy
that stays fixed; the latter's log-probs are then ``old_logps``. Everything is float64 and deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.worlds.rows import Row, Target
from rlft.objective import Objective
from rlft.types import Batch
from rlft.worlds import World

__all__ = ["F64", "Field", "Problem", "Rest", "rest"]

F64 = torch.float64
#: Logits that differ by more nats than this are on their way to infinity.
LIMIT = 25.0


@dataclass(frozen=True)
class Problem:
    """A world with rewards, a reference that is also the start, and a strength of the pull to it."""

    name: str
    world: World
    ref: Tensor
    rewards: Tensor
    beta: float

    @staticmethod
    def random(name: str, world: World, *, seed: int, beta: float) -> Problem:
        """Standard normal rewards and reference logits."""
        return Problem(name, world, world.random_logits(seed=seed), world.random_rewards(seed=seed + 1000), beta)

    @cached_property
    def best(self) -> Tensor:
        """The table of pi*."""
        return self.world.optimal_logits(self.ref, self.rewards, self.beta)

    @cached_property
    def wins(self) -> Tensor:
        """``[N, N]`` probability that answer i beats answer j, by Bradley and Terry from the rewards."""
        return (self.rewards[:, None] - self.rewards[None, :]).sigmoid()

    def stranger(self, seed: int = 2000) -> Tensor:
        """A policy that is neither the reference nor any other here."""
        return self.world.random_logits(seed=seed)

    def target(self, kind: Target, behaviour: Tensor | None) -> Tensor:
        """The table of the policy an objective is meant to find; ``behaviour`` None = samples of the policy itself."""
        if kind == "optimum":
            return self.best
        if kind == "per_token":
            return self._per_token()
        if kind == "preference" and behaviour is not None:
            return self.world.optimal_logits(self.ref, self.wins @ self.world.answer_logps(behaviour).exp(), self.beta)
        return self._nash()

    def _table(self, logps: Tensor) -> Tensor:
        """The table of any distribution over the answers: the optimum at beta 1 for the reward ``log p - log ref``."""
        return self.world.optimal_logits(self.ref, logps - self.world.answer_logps(self.ref), 1.0)

    def _nash(self) -> Tensor:
        """The policy that is optimal for the reward of beating itself, by averaged best responses."""
        logits = self.ref
        for _ in range(200):
            now = self.world.answer_logps(logits)
            reply = self.world.answer_logps(self.world.optimal_logits(self.ref, self.wins @ now.exp(), self.beta))
            logits = self._table(torch.logaddexp(now, reply) - math.log(2))
        return logits

    def _per_token(self) -> Tensor:
        """``ref exp(T (r - c) / beta)`` with c such that it sums to one, by bisection."""
        length, ref = self.world.mask.sum(-1).to(F64), self.world.answer_logps(self.ref)
        low, high = self.rewards.min() - 50, self.rewards.max() + 50
        for _ in range(200):
            c = (low + high) / 2
            too_much = (ref + length * (self.rewards - c) / self.beta).logsumexp(0) > 0
            low, high = (c, high) if too_much else (low, c)
        return self._table(ref + length * (self.rewards - low) / self.beta)


def _groups(world: World, n: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Groups of n answers ``[M, n]`` and in how many orders each can be drawn."""
    if ordered:
        tuples = world.tuples(n)
        return tuples, torch.ones(len(tuples), dtype=F64)
    found = list(itertools.combinations_with_replacement(range(world.num_answers), n))
    orders = [math.factorial(n) / math.prod(math.factorial(c) for c in Counter(group).values()) for group in found]
    return torch.tensor(found), torch.tensor(orders, dtype=F64)


def _gather(table: Tensor, world: World) -> Tensor:
    """``[K, S]`` per prefix -> ``[K, N, T]`` along every answer."""
    return table[:, world.states].where(world.mask, 0.0)


def _losses(
    problem: Problem, row: Row, objective: Objective, x: Tensor, behaviour: Tensor | None, groups: Tensor
) -> Tensor:
    """Loss of every group ``[K, M]`` under each of K policies; ``x [K, S V + 1]`` is a table and DRO's value."""
    world, copies = problem.world, x.shape[0]
    logits = x[:, :-1].reshape(copies, world.num_states, world.vocab)
    logp, ref = logits.log_softmax(-1), problem.ref.log_softmax(-1)
    mu = logp.detach() if behaviour is None else behaviour.log_softmax(-1).expand_as(logp)
    ratio = logp - ref

    def rows(per_answer: Tensor) -> Tensor:
        """``[K, N, ...]`` -> one row for each member of each group."""
        return per_answer[:, groups].flatten(0, 2)

    def along(table: Tensor) -> Tensor:
        return rows(_gather(table, world))

    def picked(table: Tensor) -> Tensor:
        return rows(table[:, world.states, world.tokens].where(world.mask, 0.0))

    size = copies * groups.numel()
    policy = logp.detach()[:, world.states, world.tokens].where(world.mask, 0.0).sum(-1).exp()
    drift = policy / mu[:, world.states, world.tokens].where(world.mask, 0.0).sum(-1).exp()
    rival = ((1 - row.mixture) * policy.log() + row.mixture * world.answer_logps(problem.ref)).softmax(-1)
    if row.objective == "ipo_md":  # both answers are rows: the first against the second
        wins = problem.wins[groups[:, 0], groups[:, 1]].repeat_interleave(2).repeat(copies)
    else:
        wins = rows(rival @ problem.wins.T)
    mask = rows(world.mask.expand(copies, -1, -1))
    group_ids = torch.arange(copies * len(groups)).repeat_interleave(row.n)
    batch = Batch(
        prompt_ids=torch.zeros(copies * len(groups), 1, dtype=torch.long),
        prompt_mask=torch.ones(copies * len(groups), 1, dtype=torch.bool),
        completion_ids=rows(world.tokens.expand(copies, -1, -1)),
        completion_mask=mask,
        mask=mask,
        group_ids=group_ids,
        rewards=rows(problem.rewards.expand(copies, -1)),
        old_logps=picked(mu),
        ref_logps=picked(ref.expand_as(logp)),
        extras={
            "weights": rows(drift.clamp(max=1.0)),
            "win_rates": wins,
        },
    )
    outputs = {
        "logps": picked(logp),
        "token_kl": along((logp.exp() * ratio).sum(-1)),
        "token_log_ratio_sq": along((logp.exp() * ratio.square()).sum(-1)),
        "behaviour_log_ratio": along((mu.exp() * ratio).sum(-1)),
        "behaviour_log_ratio_sq": along((mu.exp() * ratio.square()).sum(-1)),
        "values": x[:, -1].repeat_interleave(groups.numel()).unsqueeze(-1).expand(size, world.mask.shape[1]),
    }
    batch = objective.prepare(batch)
    total = torch.zeros(copies, len(groups), dtype=F64)
    for term, output in zip(
        objective.terms, objective.compute(outputs, batch, objective.denominators(batch))[1], strict=True
    ):
        loss = output.loss.where(output.counted, 0.0)
        if loss.ndim == 2:
            loss = loss.sum(-1) / (mask.sum(-1) if term.reduction == "sequence_mean" else 1)
        total = total + term.weight * loss.reshape(copies, len(groups), -1).mean(-1)
    return total


def _probabilities(
    problem: Problem, row: Row, x: Tensor, behaviour: Tensor | None, groups: Tensor, orders: Tensor
) -> Tensor:
    """``[K, M]`` probability of each group under what samples it; a constant."""
    world = problem.world
    logits = x[:, :-1].detach().reshape(-1, world.num_states, world.vocab) if behaviour is None else behaviour[None]
    logp = logits.log_softmax(-1)[:, world.states, world.tokens].where(world.mask, 0.0).sum(-1)
    weights = logp[:, groups].sum(-1).exp() * orders
    if row.pairs:  # two draws, and the label puts the winner first
        weights = weights * 2 * problem.wins[groups[:, 0], groups[:, 1]]
    return weights


class Field:
    """The expected gradient of an objective's loss as a function of the policy, many policies at a time.

    Args:
        problem: the world.
        row: the objective.
        behaviour: logits of the policy that draws the answers; None = the policy itself.
    """

    def __init__(self, problem: Problem, row: Row, behaviour: Tensor | None) -> None:
        self.problem, self.row, self.behaviour = problem, row, behaviour
        self.objective = row.build(problem.beta)
        self.groups, self.orders = _groups(problem.world, row.n, ordered=row.pairs)
        self.has_value = row.objective == "dro"

    def start(self, logits: Tensor) -> Tensor:
        """The state at a policy: its table and a value of zero, which DRO learns and others ignore."""
        return torch.cat([logits.flatten(), torch.zeros(1, dtype=F64)])

    def table(self, x: Tensor) -> Tensor:
        return x[:-1].reshape(self.problem.world.num_states, self.problem.world.vocab)

    def __call__(self, x: Tensor) -> Tensor:
        """``[K, S V + 1]`` states -> the expected gradient at each."""
        x = x.detach().requires_grad_()
        losses = _losses(self.problem, self.row, self.objective, x, self.behaviour, self.groups)
        weights = _probabilities(self.problem, self.row, x, self.behaviour, self.groups, self.orders)
        return torch.autograd.grad((weights * losses).sum(), x)[0]

    def per_group(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of every group ``[M, S V]`` at one policy, and the groups' probabilities ``[M]``."""
        x = self.start(logits).repeat(len(self.groups), 1).requires_grad_()
        losses = _losses(self.problem, self.row, self.objective, x, self.behaviour, self.groups)
        weights = _probabilities(self.problem, self.row, x[:1], self.behaviour, self.groups, self.orders)
        # one copy of the policy for each group, so that gradients do not mix
        return torch.autograd.grad(losses.diagonal().sum(), x)[0][:, :-1], weights[0]

    def free(self) -> Tensor:
        """What makes the derivative of the field regular: adding a number to all logits of a prefix changes nothing."""
        world = self.problem.world
        block = torch.full((world.vocab, world.vocab), 1.0 / world.vocab, dtype=F64)
        return torch.block_diag(
            *[block] * world.num_states, torch.full((1, 1), 0.0 if self.has_value else 1.0, dtype=F64)
        )

    def jacobian(self, x: Tensor, at: Tensor) -> Tensor:
        """Derivative of the field at x, where it is ``at``, by forward differences, all in one call."""
        step = 1e-6
        moved = self(x + step * torch.eye(x.numel(), dtype=F64))
        return (moved - at).T / step


@dataclass(frozen=True)
class Rest:
    """Where descent along the expected gradient ends.

    Attributes:
        kl: KL(pi || target) there, relative to the start's.
        residual: largest component of the expected gradient there.
        stable: every direction of the policy contracts there.
        how: ``"rest"``, ``"runs off"`` (a probability goes to zero), ``"kink"`` or ``"unsettled"``.
        logits: the policy.
    """

    kl: float
    residual: float
    stable: bool
    how: str
    logits: Tensor


def rest(problem: Problem, row: Row, behaviour: Tensor | None, *, steps: int = 1000) -> Rest:
    """Follow the expected gradient downhill from the reference until it vanishes.

    Implicit Euler steps whose length grows as fast as the policy settles: gradient flow at first, Newton's method at the
    end, so that slow directions cost nothing and the last digits are reached.
    """
    flow = Field(problem, row, behaviour)
    if row.kinked and behaviour is not None:
        return _small_steps(flow)
    x, dt, how = flow.start(problem.ref), 1.0, "unsettled"
    free = flow.free()
    slope = flow(x[None])[0]
    eye = torch.eye(x.numel(), dtype=F64)
    matrix = eye
    for _ in range(steps):
        if slope.abs().max() < 1e-14:
            how = "rest"
            break
        matrix = flow.jacobian(x, slope)
        move = torch.linalg.solve(eye / dt + matrix + free, -slope)
        while move.abs().max() > 0.5:  # a leap could land in another basin
            dt /= 2
            move = torch.linalg.solve(eye / dt + matrix + free, -slope)
        x, dt = x + move, min(2 * dt, 1e12)
        slope = flow(x[None])[0]
        if _reach(flow.table(x)) > LIMIT:
            break
    if _reach(flow.table(x)) > LIMIT / 2:  # the gradient may vanish sooner than the logits stop
        how = "runs off"
    return _rest_at(flow, x, slope, flow.jacobian(x, slope) + free, how)


def _reach(logits: Tensor) -> float:
    """The largest difference between two logits of a prefix."""
    return (logits.amax(-1) - logits.amin(-1)).max().item()


def _rest_at(flow: Field, x: Tensor, slope: Tensor, matrix: Tensor | None, how: str) -> Rest:
    world, goal = flow.problem.world, flow.problem.target(flow.row.target, flow.behaviour)
    relative = (world.kl(flow.table(x), goal) / world.kl(flow.problem.ref, goal)).abs().item()
    stable = matrix is None or torch.linalg.eigvals(matrix).real.min().item() > -1e-6
    return Rest(relative, slope.abs().max().item(), stable, how, flow.table(x))


def _small_steps(flow: Field, steps: int = 500, longest: float = 0.2) -> Rest:
    """Plain descent with steps that shrink: where the field jumps, the policy slides along the jump."""
    x = flow.start(flow.problem.ref)
    for k in range(steps):
        slope = flow(x[None])[0]
        x = x - longest / (1 + 5 * k / steps) * slope
    return _rest_at(flow, x, slope, None, "kink")
