"""A world with rewards, a reference and a pull to it; the policies that an objective may be meant to find, or finds instead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.worlds.rows import Row, Target
from rlft.worlds import World

__all__ = ["F64", "Problem"]

F64 = torch.float64


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

    # -- what an objective is meant to find ---------------------------------------------------------------------------
    def target(self, kind: Target, behaviour: Tensor | None) -> Tensor:
        """The table of the policy an objective is meant to find; ``behaviour`` None = samples of the policy itself."""
        if kind == "optimum":
            return self.best
        if kind == "per_token":
            return self._per_token()
        if kind == "preference" and behaviour is not None:
            return self.world.optimal_logits(self.ref, self.wins @ self.world.answer_logps(behaviour).exp(), self.beta)
        return self.equilibrium()

    def rival(self, logps: Tensor, mixture: float) -> Tensor:
        """``[..., N]`` the policy's geometric mixture with the reference, over whole answers, as probabilities."""
        return ((1 - mixture) * logps + mixture * self.world.answer_logps(self.ref)).softmax(-1)

    def equilibrium(self, mixture: float = 0.0) -> Tensor:
        """The policy that is the best reply to its own mixture with the reference, by averaged best replies.

        Without a mixture it is the Nash equilibrium of the game regularised by beta KL.
        """
        logits = self.ref
        for _ in range(200):
            now = self.world.answer_logps(logits)
            reward = self.wins @ self.rival(now, mixture)
            reply = self.world.answer_logps(self.world.optimal_logits(self.ref, reward, self.beta))
            logits = self._table(torch.logaddexp(now, reply) - math.log(2))
        return logits

    def _table(self, logps: Tensor) -> Tensor:
        """The table of any distribution over the answers: the optimum at beta 1 for the reward ``log p - log ref``."""
        return self.world.optimal_logits(self.ref, logps - self.world.answer_logps(self.ref), 1.0)

    def _per_token(self) -> Tensor:
        """``ref exp(T (r - c) / beta)`` with c such that it sums to one, by bisection."""
        length, ref = self.world.mask.sum(-1).to(F64), self.world.answer_logps(self.ref)
        low, high = self.rewards.min() - 50, self.rewards.max() + 50
        for _ in range(200):
            c = (low + high) / 2
            too_much = (ref + length * (self.rewards - c) / self.beta).logsumexp(0) > 0
            low, high = (c, high) if too_much else (low, c)
        return self._table(ref + length * (self.rewards - low) / self.beta)

    # -- what it finds instead ----------------------------------------------------------------------------------------
    def landing(self, letter: str, row: Row, behaviour: Tensor | None) -> Tensor:
        """The table of a policy that is not the target, and that theory says an objective ends at.

        Args:
            letter: ``d`` to ``i``, see the legend of the page.
            row: the objective; its ``pull`` multiplies beta.
            behaviour: logits of what draws the answers; None = the policy itself.
        """
        beta = row.pull * self.beta
        if letter == "d":
            return self.myopic(beta)
        if letter == "e":
            return self.myopic(beta, forward=True)
        if letter == "f":
            return self.myopic(beta, forward=True, anchor=behaviour, goes_on=behaviour)
        if letter == "g":
            return self._scaled(row.n)
        if letter == "h":
            return self.equilibrium(row.mixture)
        if letter == "i":
            return self.myopic(beta, goes_on=behaviour)
        raise ValueError(f"no policy has the letter {letter!r}; there are d, e, f, g, h and i")

    def myopic(
        self, beta: float, *, forward: bool = False, anchor: Tensor | None = None, goes_on: Tensor | None = None
    ) -> Tensor:
        """Each prefix maximises the plain reward expected from it on, minus beta times its own KL alone.

        From the last token back: ``Q(s, a)`` is the expected reward after a, and the prefix takes
        ``anchor exp(Q / beta) / Z``, or ``beta anchor / (c - Q)`` where the KL is the forward one.

        Args:
            beta: weight of the KL.
            forward: KL(anchor || policy) in place of KL(policy || anchor).
            anchor: logits that the KL is taken to; None = the reference.
            goes_on: logits of who goes on after a, which the reward is expected under; None = the policy itself.
        """
        world = self.world
        start = (self.ref if anchor is None else anchor).log_softmax(-1)
        gains, worth = torch.zeros_like(start), torch.zeros(world.num_states, dtype=F64)
        logp = start.clone()
        chances = logp if goes_on is None else goes_on.log_softmax(-1)  # filled in below, or given
        for t in reversed(range(world.tokens.shape[1])):
            here = world.mask[:, t]
            ends = world.mask[:, t:].sum(-1)[here] == 1
            states, picked = world.states[here, t], world.tokens[here, t]
            after = world.states[here, min(t + 1, world.tokens.shape[1] - 1)]
            gains[states, picked] = torch.where(ends, self.rewards[here], worth[after])
            rows = states.unique()
            q = gains[rows]
            logp[rows] = _forward_reply(start[rows], q, beta) if forward else (start[rows] + q / beta).log_softmax(-1)
            worth[rows] = (chances[rows].exp() * q).sum(-1)
        return logp

    def _scaled(self, n: int) -> Tensor:
        """:meth:`myopic` for rewards divided by the deviation of ``r - group mean`` under the policy itself.

        The expected advantage of an answer is then ``sqrt((n - 1) / n) (r - E r) / sd(r)``, which is beta times
        ``sd(r) sqrt(n / (n - 1))``; the deviation that agrees with its own policy, by damped iteration.
        """
        logits = self.ref
        for _ in range(200):
            p = self.world.answer_logps(logits).exp()
            deviation = (p * (self.rewards - (p * self.rewards).sum()).square()).sum().sqrt().item()
            reply = self.myopic(self.beta * deviation * math.sqrt(n / (n - 1)))
            logits = (logits.log_softmax(-1) + reply) / 2
        return logits


def _forward_reply(anchor: Tensor, q: Tensor, beta: float) -> Tensor:
    """Rows of ``log(beta anchor / (c - q))`` with c such that each sums to one, by bisection. Log-probs in and out."""
    best = q.amax(-1, keepdim=True)
    low, high = best + 0 * best, best + beta  # the sum is infinite at the first, at most one at the second
    for _ in range(200):
        c = (low + high) / 2
        total = (beta * anchor.exp() / (c - q)).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, c, low), torch.where(total > 1, high, c)
    return (anchor + math.log(beta) - (high - q).log()).log_softmax(-1)
