"""The decoding loop behind :class:`rlft.rollout.FastSampler`: slots that fill, step together and empty."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlft.rollout.prompt_rows import fitted
from rlft.rollout.randomness import row_keys
from rlft.rollout.row_settings import Chooser, RowSettings
from rlft.rollout.stop_strings import StopStrings
from rlft.rollout.types import Rollout, SamplingParams

if TYPE_CHECKING:
    from rlft.rollout.llama_step import LlamaStep
    from rlft.rollout.step_graphs import Capture, StepGraphs

__all__ = ["DecodeLoop"]

_REFILL = 4  # new rows are let in when a slots' quarter is free, so that each prefill serves several
_SHARED = 4  # answers to a prompt from which it pays to read its keys once for all of them
_RESERVE = 256  # columns allocated beyond the prompts at once


@dataclass(slots=True)
class _Prefilled:
    """Prompts that went through the model and whose rows have not all found a slot."""

    prompts: list[int]
    cache: Any
    logits: Float[Tensor, "P V"]
    taken: int = 0  # rows handed out, counted over prompts x n


class DecodeLoop:
    """The state of one call: rows that wait, rows that live, what came out.

    Use: :meth:`run`.

    Args:
        model: a transformers causal language model, in evaluation mode and without gradient.
        prompts: token ids, none empty.
        n: completions per prompt.
        params: how to draw, for each prompt.
        seed: see :func:`rlft.rollout.randomness.row_keys`.
        slots: the most rows that live at once.
        max_prefill_tokens: prompt tokens, padding included, in one prefill (at least one prompt always goes).
        end_ids: tokens that end every row, besides those of its ``params``.
        pad_id: any id; it fills prompts on the left and is masked.
        strings: has the tables of stop strings.
        decode: scores the next token of live rows; default: the model's forward does.
        capture: records steps of ``decode`` as graphs (:class:`rlft.rollout.step_graphs.CudaCapture`); default: none are.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: Sequence[SamplingParams],
        *,
        seed: int,
        slots: int,
        max_prefill_tokens: int,
        end_ids: Sequence[int],
        pad_id: int,
        strings: StopStrings,
        decode: LlamaStep | None = None,
        capture: Capture | None = None,
    ) -> None:
        from rlft.rollout.row_cache import RowCache
        from rlft.rollout.shared_rows import SharedRows, can_share
        from rlft.rollout.step_graphs import StepGraphs

        self.model, self.prompts, self.n, self.pad_id = model, prompts, n, pad_id
        self.max_prefill_tokens, self.decode = max_prefill_tokens, decode
        self.device = device = model.device
        total = len(prompts) * n
        self.slots = min(slots, total)
        self.vocab = model.config.get_text_config(decoder=True).vocab_size
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.shared: SharedRows | None = None
        greedy = any(one.greedy for one in params)
        if decode is not None and n >= _SHARED and can_share(device, model.dtype, greedy=greedy):
            self.shared = SharedRows(layers, self.slots, len(prompts))
        self.own = RowCache(layers, self.slots) if self.shared is None else self.shared.own
        self.cache = self.shared or self.own
        self.graphs: StepGraphs | None = None
        if capture is not None and decode is not None and self.shared is None:
            self.graphs = StepGraphs(decode, self.own, capture, device=device)
        self.accepts = set(inspect.signature(model.forward).parameters)
        self.settings = RowSettings(params, n, end_ids=end_ids, vocab=self.vocab, device=device, strings=strings)
        self.chooser: Chooser | None = None  # of the live rows, while they stay where they are
        self.keys = row_keys(seed, len(prompts), n).to(device)
        # Longest prompts first: equal lengths meet in a prefill, and rows rarely have to move right for a later one.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda p: (-len(prompts[p]), p)))
        self.prefilled: deque[_Prefilled] = deque()
        # Per slot; the first ``live`` entries count.
        self.live = 0
        self.row = torch.zeros(self.slots, dtype=torch.long, device=device)
        self.start = torch.zeros_like(self.row)
        self.before = torch.zeros_like(self.row)  # tokens of the row that are not in its own columns
        self.count = torch.zeros_like(self.row)
        self.token = torch.zeros_like(self.row)
        self.seen: Tensor | None = None
        if self.settings.penalises:
            self.seen = torch.zeros(self.slots, self.vocab, dtype=torch.bool, device=device)
        # Per row of the result; columns are added as rows grow.
        self.ids = torch.zeros(total, min(self.settings.longest, 64), dtype=torch.long, device=device)
        self.logps = torch.zeros_like(self.ids, dtype=torch.float32)
        self.length = torch.zeros(total, dtype=torch.long, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)
        self.longest = 0  # no live row has more tokens

    @property
    def busy(self) -> bool:
        """Whether any row waits or lives."""
        return bool(self.live or self.waiting or self.prefilled)

    def run(self, weight_version: int, poll: Callable[[], None] | None) -> Rollout:
        """Draw everything.

        Args:
            weight_version: for the result.
            poll: called before every step; what it raises comes through.
        """
        while self.busy:
            if poll is not None:
                poll()
            self.admit()
            self.step()
        return self.result(weight_version)

    def result(self, weight_version: int) -> Rollout:
        """Everything that came out, prompt-major."""
        lengths = self.length.tolist()
        ids = [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]
        logps = [row[:length] for row, length in zip(self.logps.tolist(), lengths, strict=True)]
        return Rollout(ids, logps, self.finished.tolist(), weight_version)

    # -- filling slots --------------------------------------------------------------------------------------------
    def _left(self) -> int:
        begun = sum(len(group.prompts) * self.n - group.taken for group in self.prefilled)
        return len(self.waiting) * self.n + begun

    def admit(self) -> None:
        """Let waiting rows into free slots, if enough are free to be worth a prefill."""
        free, left = self.slots - self.live, self._left()
        if self.live and free < min(left, max(1, self.slots // _REFILL)):
            return
        while left and self.live < self.slots:
            if not self.prefilled:
                self._prefill(-(-(self.slots - self.live) // self.n))
            self._place(self.prefilled[0], self.slots - self.live)
            left = self._left()

    def _prefill(self, wanted: int) -> None:
        """Run the next prompts through the model, each once."""
        from transformers import DynamicCache

        width = len(self.prompts[self.waiting[0]])  # the longest that waits
        wanted = max(1, min(wanted, self.max_prefill_tokens // width, len(self.waiting)))
        chosen = [self.waiting.popleft() for _ in range(wanted)]
        if self.decode is not None:
            prompts, logits = self.decode.prefill([self.prompts[p] for p in chosen])
            self.prefilled.append(_Prefilled(chosen, prompts, logits.float()))
            return
        padding = [width - len(self.prompts[p]) for p in chosen]
        ids = [[self.pad_id] * gap + list(self.prompts[p]) for p, gap in zip(chosen, padding, strict=True)]
        first = torch.tensor(padding, device=self.device)
        columns = torch.arange(width, device=self.device)
        cache = DynamicCache()
        logits = self._forward(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=(columns >= first[:, None]).long(),
            position_ids=(columns - first[:, None]).clamp(min=0),
            past_key_values=cache,
        )
        self.prefilled.append(_Prefilled(chosen, cache, logits))

    def _place(self, group: _Prefilled, free: int) -> None:
        """Give up to ``free`` rows of a prefilled group their slots, and draw their first tokens."""
        until = min(group.taken + free, len(group.prompts) * self.n)
        members = range(group.taken, until)
        source = torch.tensor([member // self.n for member in members], device=self.device)
        rows = [group.prompts[member // self.n] * self.n + member % self.n for member in members]
        lengths = torch.tensor([len(self.prompts[row // self.n]) for row in rows], device=self.device)
        group.taken = until
        if until == len(group.prompts) * self.n:
            self.prefilled.popleft()

        held = lengths if self.shared is None else torch.zeros_like(lengths)
        columns = self._fit(int(held.max()))
        reserve = min(self.settings.longest, _RESERVE)
        if self.shared is not None:
            names = [row // self.n for row in rows]
            self.shared.admit(
                group.cache, source, columns=columns, reserve=reserve, names=names, lengths=lengths.tolist()
            )
        else:
            self.own.admit(group.cache, source, columns=columns, reserve=reserve)
        new = slice(self.live, self.live + len(rows))
        self.row[new] = torch.tensor(rows, device=self.device)
        self.start[new], self.before[new] = columns - held, lengths - held
        self.count[new] = 0
        if self.seen is not None:
            for slot, row in zip(range(new.start, new.stop), rows, strict=True):
                self.seen[slot] = False
                self.seen[slot, torch.tensor(self.prompts[row // self.n], device=self.device)] = True
        self.live, self.chooser = new.stop, None
        self._choose(new.start, group.logits[source])

    def _fit(self, incoming: int) -> int:
        """The column where rows shall end: moved right for a longer prompt, left when much has become empty."""
        columns = self.cache.columns if self.live else 0
        longest = columns - int(self.start[: self.live].min()) if self.live else 0
        needed = max(longest, incoming)
        chosen = fitted(columns, needed)
        self.start[: self.live] += chosen - columns
        return chosen

    # -- one token for every live row -----------------------------------------------------------------------------
    def step(self) -> None:
        """Run the model on the last token of every live row and draw the next."""
        if not self.live:
            return
        if self.decode is not None:
            start = self.start[: self.live]
            positions = self.before[: self.live] + self.cache.columns - start
            if self.graphs is not None:
                self._choose(0, self.graphs(self.token[: self.live], positions, start).float())
                return
            self.cache.open(start)
            self._choose(0, self.decode(self.token[: self.live], positions, self.cache).float())
            return
        columns, start = self.cache.columns, self.start[: self.live, None]
        logits = self._forward(
            input_ids=self.token[: self.live, None],
            attention_mask=(torch.arange(columns + 1, device=self.device) >= start).long(),
            position_ids=columns - start,
            past_key_values=self.cache,
        )
        self._choose(0, logits)

    def _forward(self, **inputs: Any) -> Float[Tensor, "R V"]:
        known = {name: value for name, value in inputs.items() if name in self.accepts}
        if "logits_to_keep" in self.accepts:  # the head on the last position only
            known["logits_to_keep"] = 1
        return self.model(**known, use_cache=True, return_dict=True).logits[:, -1].float()

    def _choose(self, first: int, logits: Float[Tensor, "R V"]) -> None:
        """Draw a token for the slots from ``first`` to the last live one, record it, and free slots of rows that end."""
        here = slice(first, self.live)
        seen = self.seen[here] if self.seen is not None else None
        rows, count = self.row[here], self.count[here]
        chooser = self.chooser
        if chooser is None:
            chooser = self.settings.chooser(rows)
            self.chooser = None if first else chooser
        tokens, logps = chooser(logits, seen, self.keys[rows], count)
        self._widen()
        self.ids[rows, count] = tokens
        self.logps[rows, count] = logps.float()
        count += 1
        self.length[rows] = count
        self.token[here] = tokens
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        self.finished[rows], ends = self.settings.ended(rows, tokens, count)
        ended = ends.nonzero()[:, 0].tolist()
        if ended:
            self._drop([first + slot for slot in ended])

    def _widen(self) -> None:
        """Room for one more token in the results."""
        self.longest = min(self.longest + 1, self.settings.longest)
        width = self.ids.shape[1]
        if self.longest > width:
            more = min(2 * width, self.settings.longest) - width
            self.ids = torch.nn.functional.pad(self.ids, (0, more))
            self.logps = torch.nn.functional.pad(self.logps, (0, more))

    def _drop(self, ended: list[int]) -> None:
        """Fill the slots of ended rows with the last live ones."""
        gone, rows = set(ended), self.live - len(ended)
        target = torch.tensor([slot for slot in ended if slot < rows], dtype=torch.long, device=self.device)
        movers = [slot for slot in range(rows, self.live) if slot not in gone]
        source = torch.tensor(movers, dtype=torch.long, device=self.device)
        self.cache.move(source, target, rows)
        for state in (self.row, self.start, self.before, self.count, self.token, self.seen):
            if state is not None:
                state[target] = state[source]
        self.live, self.chooser = rows, None
        if rows and not self._left():
            columns = self._fit(0)
            if columns != self.cache.columns:
                self.cache.relayout(columns, reserve=_RESERVE)
