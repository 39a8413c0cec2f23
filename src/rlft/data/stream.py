"""Rows that do not fit in memory: :class:`TokenStream` tokenises them as they come."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlft import _check
from rlft._workers import Trouble
from rlft.data.cells import row_hash
from rlft.data.dataset import count, refuse_bad
from rlft.data.encoding import Encoder, Limits, TruncationMode
from rlft.data.example import Example
from rlft.data.formats import Format, check_format, detect_format
from rlft.data.parsing import BadRow
from rlft.data.report import DataReport
from rlft.data.sampler import fold
from rlft.data.tokenizing import Notes, Tokenizer

__all__ = ["Outcome", "Row", "Rows", "Share", "TokenStream"]

Row = Mapping[str, Any]
Rows = Callable[[], Iterable[Row]] | Iterable[Row]

#: What a state must hold; one of an older version holds no more.
_PLACE = {"epoch", "consumed", "seed", "shuffle_buffer"}
_ENOUGH = 200  # rows after which a share of unusable ones means something


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row, or that an epoch is over.

    Attributes:
        consumed: rows of the epoch that are given out by then, to all processes.
        where: the row, in words.
        result: the example, why there is none, what went wrong on the way to it; None at the end of an epoch.
        digest: of the row, see :func:`rlft.data.cells.row_hash`.
    """

    consumed: int
    where: str = ""
    result: tuple[Example, Notes] | BadRow | Trouble | None = None
    digest: bytes = b""


def chained(chain: bytes, digest: bytes) -> bytes:
    """A hash of the rows of a process so far, in their order, from that of those before and the newest one's."""
    return hashlib.blake2b(chain + digest, digest_size=16).digest()


class Share(Iterator["tuple[int, Row] | None"]):
    """The rows of one process, with their numbers in the data: epoch after epoch, with None between two.

    Args:
        rows, shuffle_buffer, seed, rank, world_size: as of :class:`TokenStream`.

    Attributes:
        epoch: the present one.
        consumed: rows of it that are given out, to all processes.
    """

    def __init__(self, rows: Rows, *, shuffle_buffer: int, seed: int, rank: int, world_size: int) -> None:
        self._rows, self._buffer, self._seed = rows, shuffle_buffer, seed
        self._rank, self._world_size = rank, world_size
        self.epoch = self.consumed = 0
        self._ordered = self._order()

    def __next__(self) -> tuple[int, Row] | None:
        for found in self._ordered:
            self.consumed += 1
            if (self.consumed - 1) % self._world_size == self._rank:
                return found
        return None

    def begin_epoch(self) -> None:
        """Go on with the next epoch, after None."""
        self.epoch += 1
        self.consumed = 0
        self._ordered = self._order()

    def skip_to(
        self, epoch: int, consumed: int, alive: Callable[[], None] = lambda: None, *, rows_hash: str = ""
    ) -> None:
        """Go on after so many rows of an epoch; they are read again.

        Args:
            epoch: to go on in.
            consumed: rows of it that were given out, to all processes.
            alive: called now and then.
            rows_hash: what :func:`chained` made of this process's part of them, hexadecimal; empty: not compared.

        Raises:
            ValueError: there are fewer, or they are other ones.
        """
        chain = b""
        self.epoch, self.consumed = epoch, consumed
        self._ordered = self._order()
        for number in range(consumed):
            alive()
            found = next(self._ordered, None)
            if found is None:
                raise ValueError(
                    f"the state is after {consumed} rows, the stream now ends after {number}; give the same rows"
                )
            if rows_hash and number % self._world_size == self._rank:
                chain = chained(chain, row_hash(found[1]))
        if rows_hash and chain.hex() != rows_hash:
            raise ValueError(
                f"the training data changed: the first {consumed} rows of epoch {epoch + 1} are not those that were trained "
                f"on, or come in another order; restore them, or use another output_dir; to go on all the same, set "
                f"accept_changed: [data]"
            )

    def _order(self) -> Iterator[tuple[int, Row]]:
        """The rows of an epoch with their numbers, drawn at random from a buffer that is kept full."""
        source = enumerate(self._rows() if callable(self._rows) else self._rows)
        if self._buffer < 2:
            yield from source
            return
        draw = random.Random(fold(self._seed, self.epoch))
        buffer: list[tuple[int, Row]] = []
        for item in source:
            if len(buffer) < self._buffer:
                buffer.append(item)
                continue
            place = draw.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = item
        while buffer:
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()


class TokenStream(Iterator[Example]):
    """Endless examples from rows that are read again for every epoch.

    The order is a function of the rows, ``seed`` and ``shuffle_buffer`` alone, so its place is two numbers: the epoch,
    and the rows of it that have been given out. Resuming reads the rows again up to there, without tokenising them, and
    compares a hash of them with the one in the state: rows that changed before that place are noticed, later ones are not.

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
        rows: Rows,
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
        self._met = 0  # rows of this epoch and process
        self._chain: bytes | None = b""  # a hash of them; None where some are not known
        self._rows = rows
        self._share = Share(rows, shuffle_buffer=shuffle_buffer, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Example:
        """The next example of this rank."""
        while True:
            outcome = self._read()
            self.consumed, result = outcome.consumed, outcome.result
            if isinstance(result, Trouble):
                raise result.error()
            if result is None:
                self._end_of_epoch()
                continue
            self._met += 1
            self._chain = None if self._chain is None else chained(self._chain, outcome.digest)
            count(self.report, result, outcome.where)
            if isinstance(result, BadRow):
                if self.report.rows >= _ENOUGH:
                    refuse_bad(self.report, self.max_bad_fraction)
                continue
            return result[0]

    def _read(self) -> Outcome:
        """What becomes of the next row."""
        if self._share.epoch != self.epoch:
            self._share.begin_epoch()
        try:
            found = next(self._share)
        finally:
            self.consumed = self._share.consumed  # errors say how far it came
        if found is None:
            return Outcome(self.consumed)
        index, row = found
        where = f"row {index}"
        return Outcome(self.consumed, where, self._tokenizer(row)([row], [index], [where])[0], row_hash(row))

    def _end_of_epoch(self) -> None:
        if self.consumed == 0:
            raise ValueError("the stream holds no rows; give at least one per process")
        if not self._resumed:  # the part of an epoch after a resume is too little to judge by
            if self._met == 0:
                raise ValueError(
                    f"an epoch of {self.consumed} rows gave process {self.rank} of {self.world_size} none; give at "
                    f"least one row per process"
                )
            refuse_bad(self.report, self.max_bad_fraction)
        self.epoch += 1
        self.consumed, self._met, self._chain = 0, 0, b""
        self._resumed = False

    def _tokenizer(self, row: Row) -> Tokenizer:
        if self._work is None:
            columns = list(row)
            chosen = detect_format(columns) if self.format == "auto" else self.format
            check_format(chosen, columns)
            self.settle(chosen)  # pyright: ignore[reportArgumentType]
        assert self._work is not None
        return self._work

    def settle(self, format: Format) -> None:
        """Read every row as this format, known from rows that were met before."""
        self._work = Tokenizer(self._encoder, format)
        self.format = self.report.format = format

    def start(self) -> None:
        """Begin to read ahead, where something does."""

    def close(self) -> None:
        """End what reads ahead."""

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where the stream of this rank is, as plain JSON values."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "share": [self.rank, self.world_size],
            "met": self._met,
            "rows_hash": self._rows_hash,
            "counts": self.report.counts(),
        }

    @property
    def _rows_hash(self) -> str:
        return "" if self._chain is None else self._chain.hex()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the rows before it are read again, and not tokenised.

        The state of another number of processes gives the place alone: counts begin anew, and rows are not compared, as
        they are not where ``rows_hash`` is empty.

        Raises:
            ValueError: the state is of another stream, or the rows of this epoch before it are fewer or other ones.
        """
        mine = self.state_dict()
        if not _PLACE <= state.keys() <= mine.keys():
            raise ValueError(
                f"a stream's state has the keys {sorted(mine)}, got {sorted(state)}; it is of another version"
            )
        different = [key for key in ("seed", "shuffle_buffer") if state[key] != mine[key]]
        if different:
            shown = ", ".join(f"{key} {state[key]!r} -> {mine[key]!r}" for key in different)
            raise ValueError(f"the stream's state is of another run ({shown}); resume with the same settings")
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])
        self._met, self._resumed = 0, True
        self._chain = None if self.consumed else b""
        if list(state.get("share", ())) == mine["share"]:
            self._met, self._resumed = int(state["met"]), False
            self._chain = bytes.fromhex(state["rows_hash"]) if state["rows_hash"] or not self._met else None
            self.report.load_counts(state["counts"])
        self._reposition()

    def _reposition(self) -> None:
        """Read on from the present epoch and row."""
        self._share.skip_to(self.epoch, self.consumed, rows_hash=self._rows_hash)
