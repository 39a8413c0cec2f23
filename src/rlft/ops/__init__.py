"""Hidden states to log-probs, entropy and exact KL, without ever holding a row of logits for the whole batch."""

from __future__ import annotations

from rlft.ops.dense import logits_logps
from rlft.ops.head import DEFAULT_CHUNK, PLANS, QUANTITIES, default_chunk, linear_logps
from rlft.ops.moments import MOMENTS, log_ratio_moments
from rlft.ops.outputs import HeadOutputs

__all__ = [
    "DEFAULT_CHUNK",
    "MOMENTS",
    "PLANS",
    "QUANTITIES",
    "HeadOutputs",
    "default_chunk",
    "linear_logps",
    "log_ratio_moments",
    "logits_logps",
]
