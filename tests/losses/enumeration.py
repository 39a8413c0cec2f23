"""Worlds and helpers shared by the proofs by enumeration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlft.types import LossOutput
from rlft.worlds import World, expected_loss


@dataclass
class Setting:
    """A world with a policy (a leaf), a reference, a behaviour policy and rewards, all random."""

    world: World
    seed: int = 0
    beta: float = 0.7

    @cached_property
    def logits(self) -> Tensor:
        return self.world.random_logits(seed=10 * self.seed + 1).requires_grad_()

    @cached_property
    def ref(self) -> Tensor:
        return self.world.random_logits(seed=10 * self.seed + 2)

    @cached_property
    def behaviour_logits(self) -> Tensor:
        return self.world.random_logits(seed=10 * self.seed + 3)

    @cached_property
    def rewards(self) -> Tensor:
        return self.world.random_rewards(seed=10 * self.seed + 4)

    @property
    def logps(self) -> Tensor:
        return self.world.token_logps(self.logits)

    @property
    def ref_logps(self) -> Tensor:
        return self.world.token_logps(self.ref)

    @property
    def policy(self) -> Tensor:
        """[N] probability of each answer under the policy, differentiable."""
        return self.world.answer_logps(self.logits).exp()

    @property
    def behaviour(self) -> Tensor:
        """[N] probability of each answer under a policy that is neither ours nor the reference."""
        return self.world.answer_logps(self.behaviour_logits).exp()

    def rows(self, answers: Tensor) -> dict[str, Tensor]:
        """The tensors of a batch of answers by name, the policy's differentiable in the logits."""
        return {
            "logps": self.logps[answers],
            "ref_logps": self.ref_logps[answers],
            "old_logps": self.world.token_logps(self.behaviour_logits)[answers],
            "token_kl": self.world.token_kl(self.logits, self.ref)[answers],
            "rewards": self.rewards[answers],
            "mask": self.world.mask[answers],
        }

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]

    def expected(self, loss: Callable[..., LossOutput], n: int, *, behaviour: Tensor | None = None, **more) -> Tensor:
        """Expected gradient of a loss with AGRO's signature over all n-tuples; on-policy unless told otherwise."""
        on_policy = self.policy.detach() if behaviour is None else behaviour
        return self.gradient(expected_loss(self.world, n, on_policy, lambda i, g: self.call(loss, i, g, **more)))

    def call(self, loss: Callable[..., LossOutput], answers: Tensor, group_ids: Tensor, **more) -> LossOutput:
        """Give a loss the tensors it names, and beta."""
        known = {**self.rows(answers), "group_ids": group_ids, "beta": self.beta, **more}
        return loss(**{name: known[name] for name in inspect.signature(loss).parameters if name in known})

    def objective_gradient(self) -> Tensor:
        """Gradient of J = E[r] - beta KL."""
        return self.gradient(self.world.objective(self.logits, self.ref, self.rewards, self.beta))

    def loss_gradient(self, behaviour: Tensor) -> Tensor:
        """Gradient of half the variance of R under ``behaviour`` (differentiable or not)."""
        return self.gradient(self.world.variance_loss(self.logits, self.ref, self.rewards, self.beta, behaviour))


def early_eos(seed: int = 0, beta: float = 0.7) -> Setting:
    """V = 3, T <= 3, token 0 ends the answer: 15 answers."""
    return Setting(World.autoregressive(vocab=3, length=3, eos=0), seed, beta)


def small(seed: int = 0, beta: float = 0.7) -> Setting:
    """V = 2, T <= 3 with early EOS: 4 answers, so that groups of four are few."""
    return Setting(World.autoregressive(vocab=2, length=3, eos=0), seed, beta)
