"""Exact tabular worlds: every answer of a small policy enumerated, so that expectations are sums and proofs are exact.

A world is a tree of tokens. The policy is a table of logits, one row per prefix; a bandit is a tree of depth one. From
it come the exact log-probs of every answer, the optimum pi*, the regularised objective J and every KL, all
differentiable in the logits. Tests check gradients against them, and examples show what converges where.

Example:
    >>> world = World.autoregressive(vocab=3, length=3, eos=0)
    >>> world.num_answers, world.num_states
    (15, 7)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.types import LossOutput

__all__ = ["World", "expected_loss"]


@dataclass(frozen=True, slots=True)
class World:
    """A finite set of answers and the prefixes they pass through.

    Attributes:
        tokens: ``[N, T]`` every answer, right-padded with 0.
        mask: ``[N, T]`` True where a token exists, EOS included.
        states: ``[N, T]`` the prefix before each token, as a row of the logit table; 0 where masked.
        num_states: rows of the logit table.
        vocab: columns of the logit table.
    """

    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    states: Int[Tensor, "N T"]
    num_states: int
    vocab: int

    @staticmethod
    def bandit(arms: int) -> World:
        """One prompt, ``arms`` answers of one token."""
        return World.autoregressive(vocab=arms, length=1)

    @staticmethod
    def autoregressive(*, vocab: int, length: int, eos: int | None = None) -> World:
        """All answers over ``vocab`` tokens that end at ``eos`` or after ``length`` tokens."""
        if vocab < 2 or length < 1 or (eos is not None and not 0 <= eos < vocab):
            raise ValueError(f"need vocab >= 2, length >= 1 and eos below vocab, got {vocab}, {length} and {eos}")
        answers: list[tuple[int, ...]] = []
        prefixes: dict[tuple[int, ...], int] = {(): 0}
        open_prefixes: list[tuple[int, ...]] = [()]
        for depth in range(length):
            longer = []
            for prefix, token in itertools.product(open_prefixes, range(vocab)):
                answer = (*prefix, token)
                if token == eos or depth == length - 1:
                    answers.append(answer)
                else:
                    prefixes[answer] = len(prefixes)
                    longer.append(answer)
            open_prefixes = longer
        shape = (len(answers), length)
        tokens, states = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for i, answer in enumerate(answers):
            for t, token in enumerate(answer):
                tokens[i, t], states[i, t], mask[i, t] = token, prefixes[answer[:t]], True
        return World(tokens=tokens, mask=mask, states=states, num_states=len(prefixes), vocab=vocab)

    @property
    def num_answers(self) -> int:
        return self.tokens.shape[0]

    # -- policies -------------------------------------------------------------------------------------------------
    def random_logits(self, *, seed: int, scale: float = 1.0) -> Float[Tensor, "S V"]:
        """A random policy: a float64 table of normal logits."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.num_states, self.vocab, generator=generator, dtype=torch.float64)

    def random_rewards(self, *, seed: int) -> Float[Tensor, " N"]:
        """A standard normal reward for every answer, float64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.num_answers, generator=generator, dtype=torch.float64)

    def token_logps(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """Log-prob of every token of every answer; zero where masked."""
        return logits.log_softmax(-1)[self.states, self.tokens].where(self.mask, 0.0)

    def answer_logps(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, " N"]:
        """Log-prob of every answer; their exponentials sum to one."""
        return self.token_logps(logits).sum(-1)

    def token_expectation(self, table: Float[Tensor, "S V"], logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """``sum_a pi(a | prefix) table[prefix, a]`` at every position of every answer; zero where masked."""
        return (logits.softmax(-1) * table).sum(-1)[self.states].where(self.mask, 0.0)

    def log_ratio_table(self, logits: Float[Tensor, "S V"], ref_logits: Float[Tensor, "S V"]) -> Float[Tensor, "S V"]:
        """``log pi(a | prefix) - log ref(a | prefix)`` for every prefix and token."""
        return logits.log_softmax(-1) - ref_logits.log_softmax(-1)

    def token_kl(self, logits: Float[Tensor, "S V"], ref_logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """Exact KL(pi || ref) of the next token at every position; zero where masked."""
        return self.token_expectation(self.log_ratio_table(logits, ref_logits), logits)

    # -- what is optimised ----------------------------------------------------------------------------------------
    def kl(self, logits: Float[Tensor, "S V"], ref_logits: Float[Tensor, "S V"]) -> Float[Tensor, ""]:
        """Exact KL(pi || ref) over whole answers, nats."""
        logps = self.answer_logps(logits)
        return (logps.exp() * (logps - self.answer_logps(ref_logits))).sum()

    def expected(self, values: Float[Tensor, " N"], logits: Float[Tensor, "S V"]) -> Float[Tensor, ""]:
        """Mean of a number per answer under the policy."""
        return (self.answer_logps(logits).exp() * values).sum()

    def objective(
        self, logits: Float[Tensor, "S V"], ref_logits: Float[Tensor, "S V"], rewards: Float[Tensor, " N"], beta: float
    ) -> Float[Tensor, ""]:
        """J = E[r] - beta KL(pi || ref), to be maximised."""
        return self.expected(rewards, logits) - beta * self.kl(logits, ref_logits)

    def optimal_logits(
        self, ref_logits: Float[Tensor, "S V"], rewards: Float[Tensor, " N"], beta: float
    ) -> Float[Tensor, "S V"]:
        """The table of pi* = ref exp(r / beta) / Z."""
        joint = self.answer_logps(ref_logits) + rewards / beta
        joint = (joint - joint.logsumexp(0)).exp()
        mass = joint.new_zeros(self.num_states * self.vocab)
        cells = (self.states * self.vocab + self.tokens)[self.mask]
        mass = mass.index_add(0, cells, joint.unsqueeze(-1).expand_as(self.mask)[self.mask])
        return mass.reshape(self.num_states, self.vocab).log()

    def optimal_value(
        self, ref_logits: Float[Tensor, "S V"], rewards: Float[Tensor, " N"], beta: float
    ) -> Float[Tensor, ""]:
        """V* = beta log Z, the largest J."""
        return beta * (self.answer_logps(ref_logits) + rewards / beta).logsumexp(0)

    def variance_loss(
        self,
        logits: Float[Tensor, "S V"],
        ref_logits: Float[Tensor, "S V"],
        rewards: Float[Tensor, " N"],
        beta: float,
        behaviour: Float[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        """AGRO's loss: half the variance of ``r - beta log(pi/ref)`` when answers come with probability ``behaviour``.

        Pass ``answer_logps(logits).exp()`` for the on-policy loss, detached or not for another gradient.
        """
        regularised = rewards - beta * (self.answer_logps(logits) - self.answer_logps(ref_logits))
        return 0.5 * (behaviour * (regularised - (behaviour * regularised).sum()).square()).sum()

    # -- samples --------------------------------------------------------------------------------------------------
    def tuples(self, n: int) -> Int[Tensor, "K n"]:
        """Every way to draw ``n`` answers in order."""
        return torch.cartesian_prod(*[torch.arange(self.num_answers)] * n).reshape(-1, n)

    def sample(
        self, logits: Float[Tensor, "S V"], n: int, *, generator: torch.Generator | None = None
    ) -> Int[Tensor, " n"]:
        """Draw ``n`` answers from the policy."""
        return torch.multinomial(self.answer_logps(logits).exp(), n, replacement=True, generator=generator)


def expected_loss(
    world: World,
    n: int,
    behaviour: Float[Tensor, " N"],
    loss: Callable[[Int[Tensor, " B"], Int[Tensor, " B"]], LossOutput],
) -> Float[Tensor, ""]:
    """Exact expectation of a loss over every group of ``n`` answers, each drawn with probability ``behaviour``.

    Its gradient is the expected gradient of the estimator: the probabilities are held constant.

    Args:
        world: the world that is enumerated.
        n: answers per group.
        behaviour: ``[N]`` probability of each answer.
        loss: called once with the answers of all groups ``[B]`` and their group ids ``[B]``; returns a
            :class:`rlft.types.LossOutput` with one entry per row (or per row and token).

    Returns:
        scalar: the mean over a group's rows of the row's loss, averaged over groups by their probability.
    """
    tuples = world.tuples(n)
    group_ids = torch.arange(tuples.shape[0]).repeat_interleave(n)
    weights = behaviour.detach()[tuples].prod(-1).repeat_interleave(n) / n
    output = loss(tuples.flatten(), group_ids)
    per_row = output.loss.sum(-1) if output.loss.ndim > 1 else output.loss
    return (weights * per_row).sum()
