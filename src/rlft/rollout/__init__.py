"""Generation: several back ends behind one protocol, seeds, and the replay buffer.

transformers and vLLM are imported when a back end first uses them.
"""

from __future__ import annotations

from rlft.rollout.factory import SAMPLERS, make_sampler
from rlft.rollout.fast_sampler import FastSampler
from rlft.rollout.opponents import AverageSampler, MixtureSampler
from rlft.rollout.randomness import fold_seed
from rlft.rollout.replay import ReplayBuffer, ReplayItem
from rlft.rollout.transformers_sampler import TransformersSampler
from rlft.rollout.types import Rollout, Sampler, SamplingParams
from rlft.rollout.vllm_sampler import VLLMSampler

__all__ = [
    "SAMPLERS",
    "AverageSampler",
    "FastSampler",
    "MixtureSampler",
    "ReplayBuffer",
    "ReplayItem",
    "Rollout",
    "Sampler",
    "SamplingParams",
    "TransformersSampler",
    "VLLMSampler",
    "fold_seed",
    "make_sampler",
]
