"""Randomness that depends on names, not on order: a seed per (rank, step), a uniform per (row, token).

Every random number of a rollout is a hash of what it is for. So the completion of a row does not change when rows are
batched, split over chunks, dropped when finished or refilled in another order, and nothing draws from (or restores)
the global generators.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["fold_seed", "row_keys", "uniforms"]


def fold_seed(seed: int, *, rank: int = 0, step: int = 0, stream: str = "rollout") -> int:
    """A 63-bit seed that differs for every (seed, rank, step, stream), the same on every machine and version.

    Args:
        seed: the run's seed.
        rank: the process; ranks that share a seed would sample duplicates.
        step: the training step, or any counter of draws.
        stream: what the numbers are for, so that two uses at one step do not share them.
    """
    for name, value in (("seed", seed), ("rank", rank), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    digest = hashlib.sha256(f"rlft/{stream}/{seed}/{rank}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def row_keys(seed: int, prompts: int, n: int) -> Int[Tensor, " B"]:
    """One 64-bit key per (prompt, sample), prompt-major; a prompt's keys do not depend on ``n`` or on other prompts."""
    keys = [
        int.from_bytes(hashlib.sha256(f"rlft/row/{seed}/{prompt}/{sample}".encode()).digest()[:8], "big", signed=True)
        for prompt in range(prompts)
        for sample in range(n)
    ]
    return torch.tensor(keys, dtype=torch.int64)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, by: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniforms(keys: Int[Tensor, " B"], positions: Int[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Uniform numbers in [0, 1), float64: the ``positions``-th output of each row's generator.

    Args:
        keys: ``[B]`` from :func:`row_keys`.
        positions: ``[B]`` or ``[B, K]`` counters (which token of the completion), >= 0.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), splitmix64: output t of the
        stream that starts at ``key`` is a mix of ``key + (t + 1) * gamma``, so any t is reached in one step.
    """
    x = keys.view(-1, *(1,) * (positions.ndim - 1)) + (positions + 1) * _GAMMA  # int64 wraps, as intended
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53
