"""What each row of a decoding loop was asked for: settings of many requests as tensors, so that rows share every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.rollout.draw import draw, filter_logits, greedy, keep_min_p, keep_top_k, keep_top_p, penalise
from rlft.rollout.randomness import uniforms
from rlft.rollout.stop_strings import STOPPED, StopStrings
from rlft.rollout.types import SamplingParams

__all__ = ["Chooser", "RowSettings"]

_KIND = 1 << 32  # a row's kind of settings and its token are looked up as kind * _KIND + token


class Chooser(Protocol):
    """Draws the next token of certain rows."""

    def __call__(
        self,
        logits: Float[Tensor, "R V"],
        seen: Bool[Tensor, "R V"] | None,
        keys: Int[Tensor, " R"],
        count: Int[Tensor, " R"],
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
        """Token and log-prob of each row.

        Args:
            logits: float32; may be changed in place.
            seen: which tokens occur in a row's prompt or completion; needed where a row has a repetition penalty.
            keys: the rows' random numbers, see :func:`rlft.rollout.randomness.uniforms`.
            count: tokens that each row has so far.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Alike:
    """Rows of one request's settings."""

    params: SamplingParams

    def __call__(
        self, logits: Tensor, seen: Tensor | None, keys: Tensor, count: Tensor
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
        scores = filter_logits(logits, self.params, seen)
        return greedy(scores) if self.params.greedy else draw(scores, uniforms(keys, count))


@dataclass(frozen=True, slots=True)
class _Some:
    """Rows that a filter concerns (None: all), and its value for each of them, ``[M, 1]``."""

    rows: Int[Tensor, " M"] | None
    values: Tensor

    def __call__(
        self, change: Callable[..., Tensor], logits: Float[Tensor, "R V"], *more: Tensor
    ) -> Float[Tensor, "R V"]:
        if self.rows is None:
            return change(logits, self.values, *more)
        logits[self.rows] = change(logits[self.rows], self.values, *(each[self.rows] for each in more))
        return logits


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Rows of several requests. Every number is the one that :class:`_Alike` gives the same row: the functions are the
    same, given one value per row, and rows that do not use a filter do not pay for it.

    Attributes:
        penalty, temperature, top_k, rest, min_p: the filters; None where no row uses one. ``rest`` is 1 - top-p.
        largest_k: of the rows that keep their top k.
        greedy, drawn: rows that take the most likely token, and the others; None where there are none.
    """

    penalty: _Some | None
    temperature: _Some | None
    top_k: _Some | None
    rest: _Some | None
    min_p: _Some | None
    largest_k: int
    greedy: Int[Tensor, " G"] | None
    drawn: Int[Tensor, " D"] | None

    def __call__(
        self, logits: Tensor, seen: Tensor | None, keys: Tensor, count: Tensor
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
        if self.penalty is not None:
            assert seen is not None, "the loop keeps what was seen where a request has a penalty"
            logits = self.penalty(penalise, logits, seen)
        if self.temperature is not None:
            logits = self.temperature(torch.div, logits)
        if self.top_k is not None:
            logits = self.top_k(lambda rows, k: keep_top_k(rows, self.largest_k, k), logits)
        if self.rest is not None:
            logits = self.rest(keep_top_p, logits)
        if self.min_p is not None:
            logits = self.min_p(keep_min_p, logits)
        if self.greedy is None:
            return draw(logits, uniforms(keys, count))
        if self.drawn is None:
            return greedy(logits)
        tokens, logps = torch.empty_like(count), torch.empty_like(count, dtype=torch.float64)
        found, values = greedy(logits[self.greedy])
        tokens[self.greedy], logps[self.greedy] = found, values.double()
        tokens[self.drawn], logps[self.drawn] = draw(logits[self.drawn], uniforms(keys[self.drawn], count[self.drawn]))
        return tokens, logps


class RowSettings:
    """Settings of ``P * n`` rows, prompt-major.

    Args:
        params: of each prompt.
        n: rows of each.
        end_ids: tokens that end every row, besides those of its params.
        vocab: how many tokens the model knows.
        strings: has the tables of stop strings.
        device: of the tensors that come in and go out.

    Attributes:
        longest: the largest ``max_new_tokens``.
        penalises: whether any row needs to know the tokens that it has seen.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        n: int,
        *,
        end_ids: Sequence[int],
        vocab: int,
        device: torch.device,
        strings: StopStrings,
    ) -> None:
        kinds = list(dict.fromkeys(params))
        self.longest = max(kind.max_new_tokens for kind in kinds)
        self.penalises = any(kind.repetition_penalty != 1.0 for kind in kinds)
        number = {kind: index for index, kind in enumerate(kinds)}
        self._kind = torch.tensor([number[p] for p in params], device=device).repeat_interleave(n)
        self._limit = torch.tensor([p.max_new_tokens for p in params], device=device).repeat_interleave(n)
        stops = {
            index * _KIND + token for index, kind in enumerate(kinds) for token in (*end_ids, *kind.stop_token_ids)
        }
        # The first is smaller than any: a search never comes out before it, and the list is never empty.
        self._stops = torch.tensor([-1, *sorted(stops)], device=device)
        self._states: Tensor | None = None  # how much of a stop string stands at the end of each row
        if any(kind.stop_strings for kind in kinds):
            table, begins = strings.joint([kind.stop_strings for kind in kinds])
            self._table = table.to(device)
            self._states = torch.tensor(begins, device=device)[self._kind]
        self._alike = _Alike(kinds[0]) if len(kinds) == 1 else None
        # Filters of the kinds stay on the CPU: what a chooser needs of them is few numbers, found without a wait each.
        self._penalty = torch.tensor([kind.repetition_penalty for kind in kinds], dtype=torch.float64)
        self._temperature = torch.tensor([kind.temperature for kind in kinds], dtype=torch.float64)
        self._top_k = torch.tensor([kind.top_k if kind.top_k < vocab else 0 for kind in kinds])
        self._rest = torch.tensor([1.0 - kind.top_p for kind in kinds], dtype=torch.float64)
        self._min_p = torch.tensor([kind.min_p for kind in kinds], dtype=torch.float64)
        self._greedy = torch.tensor([kind.greedy for kind in kinds])

    def chooser(self, rows: Int[Tensor, " R"]) -> Chooser:
        """What draws for certain rows, good for as long as the same rows stand in the same order."""
        if self._alike is not None:
            return self._alike
        kind = self._kind[rows].cpu()
        best = self._greedy[kind]
        return _Mixed(
            self._some(self._penalty[kind], 1.0),
            self._some(self._temperature[kind], 1.0),
            self._some(self._top_k[kind], 0),
            self._some(self._rest[kind], 0.0),
            self._some(self._min_p[kind], 0.0),
            int(self._top_k[kind].max()),
            self._where(best) if best.any() else None,
            None if best.all() else self._where(~best),
        )

    def _some(self, values: Tensor, off: float) -> _Some | None:
        used = values != off
        if not used.any():
            return None
        dtype = torch.float32 if values.is_floating_point() else values.dtype
        return _Some(None if used.all() else self._where(used), values[used].to(self._kind.device, dtype)[:, None])

    def _where(self, chosen: Bool[Tensor, " R"]) -> Int[Tensor, " M"]:
        return chosen.nonzero()[:, 0].to(self._kind.device)

    def ended(
        self, rows: Int[Tensor, " R"], tokens: Int[Tensor, " R"], count: Int[Tensor, " R"]
    ) -> tuple[Bool[Tensor, " R"], Bool[Tensor, " R"]]:
        """Whether a row's last token stopped it, and whether it ends: for that, or because it is as long as it may be.

        Every token of a row must come here once, in order: stop strings are followed from token to token.

        Args:
            rows: which.
            tokens: their last ones.
            count: how many tokens each has, that one included.
        """
        names = tokens if self._alike is not None else self._kind[rows] * _KIND + tokens
        stopped = self._stops[torch.searchsorted(self._stops, names).clamp_(max=len(self._stops) - 1)] == names
        if self._states is not None:
            state = self._table[self._states[rows], tokens].long()
            self._states[rows] = state
            stopped |= state == STOPPED
        return stopped, stopped | (count >= self._limit[rows])
