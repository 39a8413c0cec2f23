"""Samplers for the second player: the geometric mixture of policy and reference, and a moving average of the policy."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft import _check
from rlft.rollout.decode_loop import DecodeLoop
from rlft.rollout.fast_sampler import unsupported
from rlft.rollout.sampling_mode import check_context, end_token_ids, generating_model, sampling_mode, vocab_size
from rlft.rollout.stop_strings import StopStrings
from rlft.rollout.types import Rollout, Sampler, SamplingParams, check_request, each_params

if TYPE_CHECKING:
    from rlft.models import MovingAverage, Policy

__all__ = ["AverageSampler", "MixtureSampler"]


class MixtureSampler(Sampler):
    """A :class:`Sampler` of the geometric mixture ``policy^(1 - a) reference^a``, normalised at every token.

    The logits of both are added with weights ``1 - a`` and ``a``, then filtered and drawn from like those of one model,
    as TRL's ``GeometricMixtureWrapper`` did; log-probs are the mixture's. Each has its own part of one cache, so a token
    costs one step of each; a player of weight 0 is not run. With the same seed, ``a = 0`` draws the rows of
    :class:`FastSampler`.

    Args:
        policy: gives both players; its adapter is switched off, or its reference model run, for the second one.
        tokenizer: its EOS ends a row, its padding token fills prompts on the left.
        coef: a, the share of the reference, in [0, 1].
        max_batch: rows decoded at once.
        max_prefill_tokens: prompt tokens (padding included) that go through the models at once.

    Raises:
        ValueError: for a share out of range, a policy without a reference, or a model that the built-in sampler
            cannot run.

    References:
        Munos et al. 2023, arXiv 2312.00886, section 7 (token-level mixture).
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, coef: float, *, max_batch: int = 128, max_prefill_tokens: int = 8192
    ) -> None:
        _check.number("mixture_coef", coef, low=0.0, high=1.0)
        _check.number("max_batch", max_batch, low=1)
        _check.number("max_prefill_tokens", max_prefill_tokens, low=1)
        if coef > 0 and policy.reference_kind == "none":
            raise ValueError(f"mixture_coef={coef} mixes in a reference, and this policy has none; build it with one")
        self.policy, self.coef = policy, coef
        self.max_batch, self.max_prefill_tokens = int(max_batch), int(max_prefill_tokens)
        for player in self._players():
            reason = unsupported(player.model)
            if reason:
                raise ValueError(
                    f"the mixture is sampled by the built-in sampler, which cannot run this model: {reason}"
                )
        self.end_ids = end_token_ids(policy.hf_model, tokenizer)
        self.strings = StopStrings(tokenizer, vocab_size(policy.hf_model))
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = pad if pad is not None else (self.end_ids[0] if self.end_ids else 0)

    def _players(self) -> list[_Player]:
        both = [
            _Player(self.policy.hf_model, contextlib.nullcontext, 1.0 - self.coef),
            _Player(self.policy.reference_model or self.policy.hf_model, self.policy.reference_active, self.coef),
        ]
        return [player for player in both if player.weight > 0]

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
        lengths = [request.max_new_tokens for request in requests]
        players = self._players()
        with contextlib.ExitStack() as stack:
            for player in players:
                check_context(generating_model(player.model), prompts, lengths)
                stack.enter_context(sampling_mode(player.model))
            loop = DecodeLoop(
                _Mixture(players),
                prompts,
                n,
                requests,
                seed=seed,
                slots=self.max_batch,
                max_prefill_tokens=self.max_prefill_tokens,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                strings=self.strings,
            )
            return loop.run(weight_version, poll)


class AverageSampler(Sampler):
    """A :class:`Sampler` that draws with the weights of a moving average.

    Args:
        sampler: reads the policy's live weights.
        average: of those weights.
    """

    def __init__(self, sampler: Sampler, average: MovingAverage) -> None:
        self.sampler, self.average = sampler, average

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
        with self.average.applied():
            return self.sampler.sample(prompt_ids, n, params, seed=seed, weight_version=weight_version, poll=poll)


@dataclass(frozen=True)
class _Player:
    """One of the two: a model, what must be switched while it runs, and its share of the logits."""

    model: Any
    active: Callable[[], Any]
    weight: float

    @property
    def layers(self) -> int:
        return int(generating_model(self.model).config.get_text_config(decoder=True).num_hidden_layers)


class _Mixture:
    """Looks like one transformers model to the decoding loop: layers of all players, logits of their mixture."""

    def __init__(self, players: list[_Player]) -> None:
        self.players = players
        first = generating_model(players[0].model)
        self.device = first.device
        text = SimpleNamespace(
            vocab_size=first.config.get_text_config(decoder=True).vocab_size,
            num_hidden_layers=sum(player.layers for player in players),
        )
        self.config = SimpleNamespace(get_text_config=lambda decoder=True: text)
        accepted = [set(inspect.signature(generating_model(p.model).forward).parameters) for p in players]
        self.accepted = accepted

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        logits_to_keep: int = 1,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """Weighted sum of the players' logits at the last position, ``[R, 1, V]``."""
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "logits_to_keep": logits_to_keep, "use_cache": use_cache, "return_dict": return_dict,
        }  # fmt: skip
        total: Tensor | None = None
        for player, accepted, cache in self._parts(past_key_values):
            known = {name: value for name, value in inputs.items() if name in accepted}
            with player.active():
                logits = generating_model(player.model)(**known, past_key_values=cache).logits[:, -1:]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            total = logits * player.weight if total is None else total + logits * player.weight
        return SimpleNamespace(logits=total)

    __call__ = forward

    def _parts(self, cache: Any) -> Iterator[tuple[_Player, set[str], Any]]:
        """Each player with its own layers of the cache; those of a prefill are made here and handed back."""
        from transformers.cache_utils import Cache, DynamicCache

        if not cache.layers:
            parts = [DynamicCache() for _ in self.players]
            yield from zip(self.players, self.accepted, parts, strict=True)
            cache.layers = [layer for part in parts for layer in part.layers]
            return
        start = 0
        for player, accepted in zip(self.players, self.accepted, strict=True):
            yield player, accepted, Cache(layers=cache.layers[start : start + player.layers])
            start += player.layers
