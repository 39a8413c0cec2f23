"""A stream whose rows are read and tokenised by worker processes, ahead of need: :class:`WorkedStream`.

Nothing that a worker decides reaches the run. Every worker of a stream goes through the same rows in the same order, as
every process of a run does, and tokenises the blocks that are its own; the run puts the blocks side by side again, and
counts, refuses and remembers its place row by row, as it does without workers. So their number changes no example, no
order and no state, and a checkpoint holds the place of what was trained on, whatever was read beyond it.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlft._workers import AHEAD, Trouble, Workers
from rlft.data.cells import row_hash
from rlft.data.encoding import Encoder
from rlft.data.formats import Format
from rlft.data.sampler import fold
from rlft.data.stream import Outcome, Row, Rows, Share, TokenStream
from rlft.data.tokenizing import Tokenizer

__all__ = ["WorkedStream"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker begins, and which part is its own.

    Attributes:
        rank, world_size: of the process of the run.
        epoch, consumed: where that process is.
        number, count: of the worker.
        block: rows of the process that one worker tokenises before it is the next one's turn.
        rows_hash: of the rows before the place, as of :meth:`rlft.data.stream.Share.skip_to`.
    """

    rank: int
    world_size: int
    epoch: int
    consumed: int
    number: int
    count: int
    block: int
    rows_hash: str


@dataclass(frozen=True, slots=True)
class StreamJob:
    """What a worker needs to know of a stream.

    Attributes:
        rows, shuffle_buffer, seed: as of :class:`TokenStream`.
        encoder, format: as of :class:`Tokenizer`.
    """

    rows: Rows
    shuffle_buffer: int
    seed: int
    encoder: Encoder
    format: Format

    def open(self, alive: Callable[[], None], place: Place) -> Callable[[None], list[Outcome]]:
        """In a worker: what gives its next block."""
        share = Share(
            self.rows,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
        )
        _seed(self.seed, place.epoch)
        share.skip_to(place.epoch, place.consumed, alive, rows_hash=place.rows_hash)
        blocks = _blocks(share, Tokenizer(self.encoder, self.format), place, alive, self.seed)
        return lambda task: next(blocks, [])


def _seed(seed: int, epoch: int) -> None:
    """Rows made with random numbers are the same in every worker, and again after a resume."""
    number = fold(seed, epoch)
    random.seed(number)
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def _blocks(
    share: Share, work: Tokenizer, place: Place, alive: Callable[[], None], seed: int
) -> Iterator[list[Outcome]]:
    """The blocks of one worker: every ``count``-th, from its own number on. Ends after what ends the run."""
    start, met, barren = place.number * place.block, 0, False
    while True:
        rows: list[tuple[int, int, Row]] = []
        ends: list[tuple[int, int]] = []  # rows of the block before the end of an epoch, rows of that epoch
        trouble: Trouble | None = None
        while met < start + place.block:
            mine = met >= start  # what lies between two blocks belongs to the second
            alive()
            try:
                found = next(share)
            except Exception as error:
                trouble = Trouble.of(error)
                break
            if found is not None:
                met, barren = met + 1, False
                if mine:
                    rows.append((share.consumed, *found))
                continue
            if mine:
                ends.append((len(rows), share.consumed))
            if barren:  # an epoch without a row, which the run refuses
                break
            barren = True
            share.begin_epoch()
            _seed(seed, share.epoch)
        outcomes = _outcomes(work, rows)
        for before, consumed in reversed(ends):
            outcomes.insert(before, Outcome(consumed))
        if trouble is not None:
            outcomes.append(Outcome(share.consumed, result=trouble))
        yield outcomes
        if trouble is not None or met < start + place.block:
            return
        start += place.count * place.block


def _outcomes(work: Tokenizer, rows: Sequence[tuple[int, int, Row]]) -> list[Outcome]:
    """Tokenise rows in one call; where the data as a whole is refused, up to the row that shows why."""
    indices, cells = [index for _, index, _ in rows], [row for _, _, row in rows]
    wheres = [f"row {index}" for index in indices]
    try:
        results = work(cells, indices, wheres)
    except Exception as error:
        if len(rows) == 1:
            return [Outcome(rows[0][0], wheres[0], Trouble.of(error))]
        outcomes: list[Outcome] = []
        for row in rows:
            outcomes += _outcomes(work, [row])
            if isinstance(outcomes[-1].result, Trouble):
                break
        return outcomes
    return [
        Outcome(consumed, where, result, row_hash(row))
        for (consumed, _, row), where, result in zip(rows, wheres, results, strict=True)
    ]


class WorkedStream(TokenStream):
    """A :class:`TokenStream` whose rows are read and tokenised by worker processes, ahead of need.

    They start with the first example asked for, or by :meth:`start`, and end by :meth:`close`, or with this process.

    Args:
        rows, tokenizer, settings: as of :class:`TokenStream`.
        workers: how many.
        block: rows that one of them tokenises at a time; each has :data:`rlft._workers.AHEAD` blocks to do.
        waiting: called while the run waits for a block; may raise.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        *,
        workers: int,
        block: int,
        waiting: Callable[[], None] | None,
        **settings: Any,
    ) -> None:
        super().__init__(rows, tokenizer, **settings)
        self.workers: Workers | None = None
        self._count, self._block, self._waiting = workers, block, waiting
        self._turn = 0
        self._outcomes: deque[Outcome] = deque()

    def start(self) -> None:
        """Start the workers where this stream stands, if they are not there yet."""
        if self.workers is not None:
            return
        at = Place(self.rank, self.world_size, self.epoch, self.consumed, 0, self._count, self._block, self._rows_hash)
        places = [(replace(at, number=number),) for number in range(self._count)]
        assert self._work is not None  # settled: workers must not each choose the format by a row of their own
        job = StreamJob(self._rows, self.shuffle_buffer, self.seed, self._encoder, self._work.format)
        self.workers = Workers(self._count, job, places)
        for number in range(self._count):
            for _ in range(AHEAD):
                self.workers.send(number, None)

    def close(self) -> None:
        """End the workers; what they have read ahead is forgotten, and read again by the next ones."""
        if self.workers is not None:
            self.workers.close()
        self.workers, self._turn = None, 0
        self._outcomes.clear()

    def _read(self) -> Outcome:
        self.start()
        assert self.workers is not None
        if not self._outcomes:
            number = self._turn % self._count
            self._outcomes.extend(self.workers.receive(number, self._waiting))
            self.workers.send(number, None)
            self._turn += 1
        if not self._outcomes:
            raise ValueError("nothing is read after an error; open the stream anew")
        return self._outcomes.popleft()

    def _reposition(self) -> None:
        self.close()
