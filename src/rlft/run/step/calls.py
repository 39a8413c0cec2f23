"""How a sampler is asked for answers, and how reward functions and judges are called with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

from rlft.config import Config
from rlft.rollout import Rollout, SamplingParams
from rlft.run.progress import Progress

__all__ = ["decoded", "reward_call", "sampling_params"]

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


def reward_call(
    examples: Sequence[Any],
    completions: Sequence[Any],
    ids: Sequence[Sequence[int]],
    progress: Progress,
    *,
    training: bool,
) -> dict[str, Any]:
    """What reward functions and judges are called with, under TRL's names.

    Args:
        examples: the example of each answer; its other columns are handed on.
        completions: see :func:`decoded`.
        ids: the sampled ids.
        progress: of the run, for ``trainer_state``.
        training: False for held-out prompts.
    """
    names = {name for e in examples for name in e.columns} - _RESERVED
    return {
        "prompts": [e.prompt for e in examples],
        "completions": list(completions),
        "completion_ids": [list(row) for row in ids],
        "columns": {name: [e.columns.get(name) for e in examples] for name in sorted(names)},
        "trainer_state": SimpleNamespace(global_step=progress.step, max_steps=progress.max_steps, is_training=training),
    }
