"""Sampled answers: how they are asked for, and how reward functions and judges see them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

from rlft.config import Config
from rlft.rollout import Rollout, SamplingParams
from rlft.run.progress import Progress

__all__ = ["columns", "decoded", "sampling_params", "trainer_state"]

#: Columns that are handed to reward functions under names of their own, or are no data of theirs.
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state"}


def sampling_params(config: Config, *, greedy: bool = False) -> SamplingParams:
    """The run's sampling settings; ``greedy`` for evaluation."""
    c = config
    if greedy:
        return SamplingParams(c.max_completion_length, stop_token_ids=tuple(c.stop_token_ids), greedy=True)
    return SamplingParams(
        c.max_completion_length,
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
        min_p=c.min_p,
        repetition_penalty=c.repetition_penalty,
        stop_token_ids=tuple(c.stop_token_ids),
    )


def decoded(tokenizer: Any, ends: Collection[int], examples: Sequence[Any], sampled: Rollout) -> list[Any]:
    """Sampled answers as reward functions see them: text, or one assistant message for conversational prompts.

    Args:
        tokenizer: of the policy.
        ends: ids that end an answer beside the tokenizer's own; none is part of the text.
        examples: the example of each answer.
        sampled: the answers.
    """
    ends = {tokenizer.eos_token_id, *ends}
    texts = tokenizer.batch_decode(
        [[i for i in ids if i not in ends] for ids in sampled.completion_ids], skip_special_tokens=True
    )
    return [
        [{"role": "assistant", "content": text}] if isinstance(example.prompt, list) else text
        for example, text in zip(examples, texts, strict=True)
    ]


def columns(examples: Sequence[Any]) -> dict[str, list[Any]]:
    """The dataset's other columns, one entry per example."""
    names = {name for e in examples for name in e.columns} - _RESERVED
    return {name: [e.columns.get(name) for e in examples] for name in sorted(names)}


def trainer_state(progress: Progress, *, training: bool) -> SimpleNamespace:
    """What a reward function or judge may ask for as ``trainer_state``."""
    return SimpleNamespace(global_step=progress.step, max_steps=progress.max_steps, is_training=training)
