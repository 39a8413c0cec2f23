"""Reward functions: verifiers, shaping rewards, and :class:`RewardSet`, which calls, checks and adds them up.

A reward function has TRL's signature: called by keyword with ``prompts``, ``completions``, ``completion_ids``,
``trainer_state`` and every dataset column, it returns one number or None per completion.
"""

from __future__ import annotations

from rlft.rewards.answers import parse_answer
from rlft.rewards.load import BUILTIN_REWARDS, load_reward
from rlft.rewards.math_library import MathVerifyReward
from rlft.rewards.reward_set import RewardError, RewardFunction, RewardOutput, RewardSet
from rlft.rewards.shaping import LengthReward, RegexReward, RepetitionPenalty, SoftOverlong, TagFormat
from rlft.rewards.symbolic import SymbolicChecker
from rlft.rewards.text import completion_text
from rlft.rewards.verifiers import EquationVerifier, ExactMatch, MathVerifier

__all__ = [
    "BUILTIN_REWARDS",
    "EquationVerifier",
    "ExactMatch",
    "LengthReward",
    "MathVerifier",
    "MathVerifyReward",
    "RegexReward",
    "RepetitionPenalty",
    "RewardError",
    "RewardFunction",
    "RewardOutput",
    "RewardSet",
    "SoftOverlong",
    "SymbolicChecker",
    "TagFormat",
    "completion_text",
    "load_reward",
    "math_reward",
    "parse_answer",
]

math_reward = MathVerifier()
"""The default :class:`MathVerifier`, ready to pass as a reward function."""
