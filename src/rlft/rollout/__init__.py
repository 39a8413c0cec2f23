"""Generation: several back ends behind one protocol, seeds, and the replay buffer.

The back ends import transformers (or vLLM) only when they are first used.
"""

from __future__ import annotations

from rlft.rollout.fast_sampler import FastSampler
from rlft.rollout.randomness import fold_seed
from rlft.rollout.transformers_sampler import TransformersSampler
from rlft.rollout.types import Rollout, Sampler, SamplingParams

__all__ = ["FastSampler", "Rollout", "Sampler", "SamplingParams", "TransformersSampler", "fold_seed"]
