"""Rows that do not fit in memory: :class:`TokenStream` tokenises them as they come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rlft import _check
from rlft.data.dataset import Tokenizer, count, refuse_bad
from rlft.data.encoding import Encoder, Limits, TruncationMode
from rlft.data.example import Example
from rlft.data.formats import check_format, detect_format
from rlft.data.parsing import BadRow
from rlft.data.report import DataReport
from rlft.data.sampler import fold

__all__ = ["TokenStream"]

_ENOUGH = 200  # rows after which a share of unusable ones means something


class TokenStream(Iterator[Example]):
    """Endless examples from rows that are read again for every epoch.

    The order is a function of the rows, ``seed`` and ``shuffle_buffer`` alone, so its state is two numbers: the epoch,
    and the rows of it that have been given out. Resuming reads the rows again up to there, without tokenising them.

    Args:
        rows: a function that returns an iterable of dicts, or an iterable that can be gone through more than once. It
            must give the same rows each time. Every rank reads all of them and keeps its own share.
        tokenizer: a transformers tokenizer.
        shuffle_buffer: rows to draw from at random; 0 keeps their order.
        seed: of the draws; no global random state is read or changed.
        rank, world_size: this process takes every ``world_size``-th row given out.
        format, max_prompt_length, max_completion_length, max_length, truncation_mode, max_bad_fraction, add_eos,
            end_token_ids, boundary, separator: as in :func:`rlft.data.tokenize`; unusable rows are counted in
            :attr:`report` and refused above the limit once 200 rows, or an epoch, were seen.

    Raises:
        ValueError: as :func:`rlft.data.tokenize`, when the row is met; and when an epoch gives no example.
    """

    def __init__(
        self,
        rows: Callable[[], Iterable[Mapping[str, Any]]] | Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        format: str = "auto",
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        max_length: int | None = None,
        truncation_mode: TruncationMode = "keep_end",
        max_bad_fraction: float = 0.01,
        add_eos: bool = True,
        end_token_ids: Sequence[int] = (),
        boundary: Literal["split", "refuse"] = "split",
        separator: str = "",
    ) -> None:
        if isinstance(rows, Iterator):
            raise ValueError(
                "rows can be gone through once only, so neither a second epoch nor resuming is possible; give the "
                "function that makes the generator instead of the generator"
            )
        if not callable(rows) and not isinstance(rows, Iterable):
            raise ValueError(f"rows must be an iterable or a function that returns one, got {type(rows).__name__}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
        _check.number("shuffle_buffer", shuffle_buffer, low=0)
        _check.number("max_bad_fraction", max_bad_fraction, low=0.0, high=1.0)
        self._rows = rows
        self._encoder = Encoder(
            tokenizer,
            limits=Limits(max_prompt_length, max_completion_length, max_length, truncation_mode),
            add_eos=add_eos,
            end_token_ids=end_token_ids,
            boundary=boundary,
            separator=separator,
        )
        self.shuffle_buffer, self.seed, self.rank, self.world_size = shuffle_buffer, seed, rank, world_size
        self.format = format
        self.max_bad_fraction = max_bad_fraction
        self.epoch = 0
        self.consumed = 0
        self.report = DataReport(format)
        self._work: Tokenizer | None = None
        self._resumed = False
        self._ordered = self._order(0)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Example:
        """The next example of this rank."""
        while True:
            try:
                index, row = next(self._ordered)
            except StopIteration:
                self._end_of_epoch()
                continue
            mine = self.consumed % self.world_size == self.rank
            self.consumed += 1
            if not mine:
                continue
            where = f"row {index}"
            result = self._tokenizer(row)([row], [index], [where])[0]
            count(self.report, result, where)
            if isinstance(result, BadRow):
                if self.report.rows >= _ENOUGH:
                    refuse_bad(self.report, self.max_bad_fraction)
                continue
            return result[0]

    def _end_of_epoch(self) -> None:
        if self.consumed == 0:
            raise ValueError("the stream holds no rows; give at least one per process")
        if not self._resumed:  # the part of an epoch after a resume is too little to judge by
            if self.report.rows == 0:
                raise ValueError(
                    f"an epoch of {self.consumed} rows gave process {self.rank} of {self.world_size} none; give at "
                    f"least one row per process"
                )
            refuse_bad(self.report, self.max_bad_fraction)
        self.epoch += 1
        self.consumed = 0
        self._resumed = False
        self._ordered = self._order(self.epoch)

    def _tokenizer(self, row: Mapping[str, Any]) -> Tokenizer:
        if self._work is None:
            columns = list(row)
            chosen = detect_format(columns) if self.format == "auto" else self.format
            check_format(chosen, columns)
            self._work = Tokenizer(self._encoder, chosen)  # pyright: ignore[reportArgumentType]
            self.format = self.report.format = chosen
        return self._work

    def _order(self, epoch: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows of an epoch with their index, drawn at random from a buffer that is kept full."""
        source = enumerate(self._rows() if callable(self._rows) else self._rows)
        if self.shuffle_buffer < 2:
            yield from source
            return
        draw = random.Random(fold(self.seed, epoch))
        buffer: list[tuple[int, Mapping[str, Any]]] = []
        for item in source:
            if len(buffer) < self.shuffle_buffer:
                buffer.append(item)
                continue
            place = draw.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = item
        while buffer:
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where the stream of this rank is, as plain JSON values."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the rows before it are read again, and not tokenised.

        Raises:
            ValueError: the state is of another stream, or the rows have become fewer.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(
                f"a stream's state has the keys {sorted(mine)}, got {sorted(state)}; it is of another version"
            )
        different = [key for key in ("seed", "shuffle_buffer") if state[key] != mine[key]]
        if different:
            shown = ", ".join(f"{key} {state[key]!r} -> {mine[key]!r}" for key in different)
            raise ValueError(f"the stream's state is of another run ({shown}); resume with the same settings")
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])
        self._resumed = True
        self._ordered = self._order(self.epoch)
        for number in range(self.consumed):
            if next(self._ordered, None) is None:
                raise ValueError(
                    f"the state is after {self.consumed} rows, the stream now ends after {number}; give the same rows"
                )
