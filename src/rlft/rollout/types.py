"""What a sampler is asked for and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlft import _check

__all__ = ["Rollout", "Sampler", "SamplingParams"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn.

    The filters apply in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: the longest completion, tokens, EOS included.
        temperature: logits are divided by it; > 0. For the most likely token set ``greedy``.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 = off.
        top_k: keep the k most likely tokens; 0 = off.
        min_p: drop tokens less likely than ``min_p`` times the most likely one; 0 = off.
        repetition_penalty: logits of tokens already in the prompt or completion are divided (if positive) or
            multiplied (if negative) by it; 1 = off.
        stop_token_ids: tokens that end a completion, besides the sampler's own (the tokenizer's EOS).
        stop_strings: text that ends a completion, with the token that completes it, wherever tokens are cut; special
            tokens count by their text, the prompt does not count. vLLM samples on and is cut afterwards.
        greedy: take the most likely token; temperature, top-p, top-k and min-p must then be at their defaults.

    Raises:
        ValueError: for a value out of range, or a filter that greedy decoding would ignore.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}; change {name}")
        _check.number("temperature", self.temperature)
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature!r}: log-probs are divided by it; "
                f"for the most likely token set greedy=True"
            )
        _check.number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check.number("min_p", self.min_p, low=0.0, high=1.0)
        _check.number("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True)
        stops = tuple(self.stop_token_ids)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stops):
            raise ValueError(f"stop_token_ids must be token ids (integers >= 0), got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", stops)
        strings = self.stop_strings
        if isinstance(strings, str) or not all(isinstance(text, str) and text for text in strings):
            raise ValueError(f"stop_strings must be a list of texts, none empty, got {strings!r}; write ['...']")
        object.__setattr__(self, "stop_strings", tuple(strings))
        if self.greedy:
            neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            ignored = [name for name, value in neutral.items() if getattr(self, name) != value]
            if ignored:
                raise ValueError(
                    f"greedy=True ignores {', '.join(ignored)}; leave {'it' if len(ignored) == 1 else 'them'} out"
                )


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions of P prompts, n each, prompt-major: prompt p owns the rows ``p * n .. (p + 1) * n - 1``.

    Attributes:
        completion_ids: the sampled ids, with the EOS, stop token or stop string that ended the row and nothing after it.
        logps: one number per id: the log-prob under the distribution it was drawn from, after every filter. Under
            greedy decoding, where nothing is drawn, under the untempered distribution.
        finished: whether the row ended by EOS, a stop token or a stop string (False: cut at ``max_new_tokens``).
        weight_version: which weights sampled, as the caller counts them.
    """

    completion_ids: list[list[int]]
    logps: list[list[float]]
    finished: list[bool]
    weight_version: int = 0

    def __post_init__(self) -> None:
        if not len(self.completion_ids) == len(self.logps) == len(self.finished):
            raise ValueError(
                f"a Rollout needs as many rows in each field, got {len(self.completion_ids)} completions, "
                f"{len(self.logps)} logps and {len(self.finished)} finished"
            )
        for row, (ids, logps) in enumerate(zip(self.completion_ids, self.logps, strict=True)):
            if len(ids) != len(logps):
                raise ValueError(f"row {row} has {len(ids)} ids and {len(logps)} logps; there must be one per id")

    def __len__(self) -> int:
        return len(self.completion_ids)


@runtime_checkable
class Sampler(Protocol):
    """A generation back end."""

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        seed: int,
        weight_version: int = 0,
        poll: Callable[[], None] | None = None,
    ) -> Rollout:
        """Draw ``n`` completions for each prompt.

        Args:
            prompt_ids: P prompts as token ids, none empty.
            n: completions per prompt.
            params: how to draw: the same for all prompts, or one for each.
            seed: the draw is a function of (weights, prompts, params, seed); global random state is not touched.
            weight_version: recorded in the result; a back end with its own copy of the weights refreshes it when the
                version differs from the last one it saw.
            poll: called about once per generated token; what it raises ends the sampling and comes through.

        Returns:
            ``P * n`` rows, prompt-major. Each is what it would be if all prompts had its settings.

        Raises:
            ValueError: for prompts without tokens, params of another number than the prompts, or a row that may grow
                beyond the model's positions.
            TypeError: for params that are no ``SamplingParams``.
        """
        ...


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seed: int) -> list[list[int]]:
    """The prompts as lists of ints, after checking what every back end needs."""
    prompts = [[int(token) for token in ids] for ids in prompt_ids]
    if not prompts:
        raise ValueError("sample needs at least one prompt, got none")
    for index, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {index} is empty; give every prompt at least one token (BOS)")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n, the completions per prompt, must be an integer >= 1, got {n!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}; make one with fold_seed(seed, rank=..., step=...)")
    return prompts


def each_params(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """The params of each of so many prompts."""
    if isinstance(params, SamplingParams):
        return [params] * prompts
    found = params if isinstance(params, Sequence) and not isinstance(params, str) else [params]
    for each in found:
        if not isinstance(each, SamplingParams):
            raise TypeError(
                f"params must be SamplingParams, or a list of one for each prompt, got {type(each).__name__}; "
                f"write SamplingParams(max_new_tokens, ...)"
            )
    if len(params) != prompts:
        raise ValueError(
            f"params has {len(params)} entries for {prompts} prompts; pass one SamplingParams per prompt, or one for all"
        )
    return list(params)
