"""Equality of two scalar losses and of their gradients, and the random tensors they are tried on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft import reduce

RTOL, ATOL = 1e-10, 1e-13


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The gradient of a scalar to each leaf, zeros where it does not reach."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_agree(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Same value and same gradients, to 1e-10; refuses a comparison in which no gradient flows."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=RTOL, atol=ATOL)
    mine, peers = gradients(ours, *leaves), gradients(theirs, *leaves)
    assert any(g.abs().max() > 1e-6 for g in peers), "nothing is compared: the peer's gradient is zero"
    for ours_grad, theirs_grad in zip(mine, peers, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=RTOL, atol=ATOL)


def differ(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> bool:
    """True when value or gradient is further apart than a tenth of a percent."""
    pairs = [(ours.detach(), theirs.detach()), *zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True)]
    return any(not torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)


@dataclass(frozen=True)
class Pairs:
    """Token log-probs of preference pairs: ``[2P, T]``, chosen rows first, ragged and right-padded."""

    logps: Tensor
    ref_logps: Tensor
    mask: Tensor

    @staticmethod
    def make(seed: int = 0, *, pairs: int = 5, tokens: int = 6) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, tokens + 1, (2 * pairs,), generator=generator)
        lengths[0] = tokens
        mask = torch.arange(tokens)[None] < lengths[:, None]
        logps, ref_logps = (
            -3 * torch.rand(2 * pairs, tokens, generator=generator, dtype=torch.float64) - 0.05 for _ in range(2)
        )
        return Pairs(logps.requires_grad_(), ref_logps, mask)

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """chosen, rejected, reference of chosen, reference of rejected: sums over tokens, ``[P]``."""
        logps, ref = reduce.sequence_sum(self.logps, self.mask), reduce.sequence_sum(self.ref_logps, self.mask)
        return (*logps.chunk(2), *ref.chunk(2))

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of the chosen and of the rejected answers."""
        chosen, rejected = self.mask.sum(-1).chunk(2)
        return chosen, rejected

    @property
    def mean_sums(self) -> tuple[Tensor, ...]:
        """:attr:`sums`, each divided by its answer's length."""
        return tuple(total / count for total, count in zip(self.sums, self.lengths * 2, strict=True))

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log-probs of the chosen and of the rejected answers."""
        chosen, rejected, *_ = self.mean_sums
        return chosen, rejected


@dataclass(frozen=True)
class Rollouts:
    """Token log-probs ``[B, T]`` of groups in order, and what an update of them needs."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    rewards: Tensor
    group_ids: Tensor
    mask: Tensor

    @staticmethod
    def make(seed: int = 0, *, groups: int = 3, group_size: int = 4, tokens: int = 5, drift: float = 0.5) -> Rollouts:
        """``drift`` is how far the policy has moved from the one that sampled, in nats."""
        generator = torch.Generator().manual_seed(seed)
        rows = groups * group_size

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
        lengths[0] = tokens
        old_logps = -1 - 2 * uniform(rows, tokens)
        return Rollouts(
            logps=(old_logps + drift * (2 * uniform(rows, tokens) - 1)).requires_grad_(),
            old_logps=old_logps,
            ref_logps=-0.5 - 2 * uniform(rows, tokens),
            advantages=4 * uniform(rows) - 2,
            rewards=uniform(rows),
            group_ids=torch.arange(groups).repeat_interleave(group_size),
            mask=torch.arange(tokens)[None] < lengths[:, None],
        )
