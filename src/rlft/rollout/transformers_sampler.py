"""Sampling through ``model.generate``: the slowest back end, and the one that every model works with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check
from rlft.rollout.draw import draw, greedy, penalise
from rlft.rollout.randomness import row_keys, uniforms
from rlft.rollout.sampling_mode import check_context, end_token_ids, generating_model, sampling_mode, vocab_size
from rlft.rollout.stop_strings import STOPPED, StopStrings
from rlft.rollout.types import Rollout, Sampler, SamplingParams, check_request, each_params

__all__ = ["TransformersSampler"]


class TransformersSampler(Sampler):
    """A :class:`Sampler` over transformers' ``generate``.

    transformers runs the model, keeps the cache and applies its own filters; the token is drawn here, by a random
    number that belongs to (seed, prompt, sample, position). So a row does not depend on ``max_batch`` or on its batch
    mates (beyond float rounding in the model), and the global random state is not touched. Requests with other settings
    run in batches of their own.

    Args:
        model: a causal language model or a LoRA PeftModel over one; read at every call, so always the live weights.
        tokenizer: its EOS ends a row, its padding token fills prompts on the left.
        max_batch: rows generated at once.

    Raises:
        ValueError: when neither the tokenizer nor the model's generation config names an EOS, or for a
            prompt-learning adapter.
    """

    reads_live_weights = True  # its log-probs are the model's own, up to rounding

    def __init__(self, model: Any, tokenizer: Any, *, max_batch: int = 64) -> None:
        _check.number("max_batch", max_batch, low=1)
        self.model, self.tokenizer, self.max_batch = model, tokenizer, int(max_batch)
        self.end_ids = end_token_ids(model, tokenizer)
        self.strings = StopStrings(tokenizer, vocab_size(model))
        pad = getattr(tokenizer, "pad_token_id", None)
        # Any id does: padding is masked in prompts, and cut off behind the end of a row.
        self.pad_id = pad if pad is not None else (self.end_ids[0] if self.end_ids else 0)

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
        prompts = check_request(prompt_ids, n, seed)
        requests = each_params(params, len(prompts))
        model = generating_model(self.model)
        check_context(model, prompts, [request.max_new_tokens for request in requests])
        keys = row_keys(seed, len(prompts), n).to(model.device)
        found: list[tuple[list[int], list[float], bool]] = [([], [], False)] * (len(prompts) * n)
        with sampling_mode(self.model), _plain_generation_config(model):
            for settings in dict.fromkeys(requests):
                members = [p * n + k for p, request in enumerate(requests) if request == settings for k in range(n)]
                for start in range(0, len(members), self.max_batch):
                    chunk = members[start : start + self.max_batch]
                    drawn = self._chunk(model, [prompts[row // n] for row in chunk], keys[chunk], settings, poll)
                    for row, result in zip(chunk, drawn, strict=True):
                        found[row] = result
        ids, logps, finished = (list(column) for column in zip(*found, strict=True))
        return Rollout(ids, logps, finished, weight_version)

    def _chunk(
        self,
        model: Any,
        rows: list[list[int]],
        keys: Int[Tensor, " B"],
        params: SamplingParams,
        poll: Callable[[], None] | None,
    ) -> list[tuple[list[int], list[float], bool]]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        stops = sorted({*self.end_ids, *params.stop_token_ids})
        width = max(len(ids) for ids in rows)
        input_ids = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in rows], device=model.device)
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=model.device)
        chooser = _Chooser(params, keys, poll)
        watch = [_StringEnds(self.strings.table(params.stop_strings), len(rows))] if params.stop_strings else []
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # The chooser leaves one finite score per row, so that greedy search takes the token drawn there.
            logits_processor=LogitsProcessorList([*_filters(params, attention_mask.bool()), chooser]),
            stopping_criteria=StoppingCriteriaList(watch),
            generation_config=GenerationConfig(
                max_new_tokens=params.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=stops or None,
                pad_token_id=self.pad_id,
            ),
        )
        logps = torch.stack(chooser.logps, dim=1).tolist()
        result = []
        for row, ids in enumerate(sequences[:, width:].tolist()):
            stop = next((t + 1 for t, token in enumerate(ids) if token in stops), None)
            end = self.strings.cut(ids[:stop], params.stop_strings) or stop
            result.append((ids[:end], logps[row][:end], end is not None))
        return result


class _Chooser:
    """The last logits processor: draws the token, keeps its log-prob ([B] per step, never [B, V]), polls."""

    def __init__(
        self,
        params: SamplingParams,
        keys: Int[Tensor, " B"],
        poll: Callable[[], None] | None,
    ) -> None:
        self.params, self.keys, self.poll = params, keys, poll
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if self.poll is not None:
            self.poll()
        if self.params.greedy:
            tokens, logps = greedy(scores)
        else:
            position = torch.full_like(self.keys, len(self.logps))
            tokens, logps = draw(scores, uniforms(self.keys, position))
        self.logps.append(logps.float())
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


class _StringEnds:
    """A stopping criterion: which rows hold a whole stop string, ``[B]``."""

    def __init__(self, table: Int[Tensor, "S V"], rows: int) -> None:
        self.table, self.state = table, torch.full((rows,), 2)

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        self.state = self.table[self.state, input_ids[:, -1].cpu()].long()
        return (self.state == STOPPED).to(input_ids.device)


class _Penalty:
    """The repetition penalty over tokens that are there: transformers' own also punishes the padding token."""

    def __init__(self, params: SamplingParams, prompt_mask: Bool[Tensor, "B L"]) -> None:
        self.params, self.prompt_mask = params, prompt_mask

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        added = input_ids.shape[1] - self.prompt_mask.shape[1]
        exists = torch.nn.functional.pad(self.prompt_mask, (0, added), value=True)
        seen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, input_ids.where(exists, scores.shape[1]).clamp(max=scores.shape[1]), True)
        return penalise(scores, self.params.repetition_penalty, seen[:, :-1])


def _filters(params: SamplingParams, prompt_mask: Bool[Tensor, "B L"]) -> list[Any]:
    """The filters, transformers' own but for the penalty, in the order in which its ``generate`` would apply them."""
    from transformers.generation import logits_process as hf

    filters: list[Any] = []
    if params.repetition_penalty != 1.0:
        filters.append(_Penalty(params, prompt_mask))
    if params.greedy:
        return filters
    if params.temperature != 1.0:
        filters.append(hf.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        filters.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        filters.append(hf.TopPLogitsWarper(float(params.top_p)))
    if params.min_p > 0.0:
        filters.append(hf.MinPLogitsWarper(float(params.min_p)))
    return filters


@contextlib.contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Without the defaults of the model's own generation config: what :class:`SamplingParams` says is all there is.

    transformers fills every unset field from it (a checkpoint's top-k 50 or repetition penalty, say), silently.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
