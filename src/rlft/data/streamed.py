"""Rows that are read while training goes on: :func:`stream_rows` opens them, :class:`StreamedDataset` is what a run holds.

A run wants to know its data before the first step: the format, how long rows are, one row to show. It learns that from the
first rows, which are read once more when their turn comes.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlft import _check
from rlft._workers import check_sendable
from rlft.data.ahead import WorkedStream
from rlft.data.dataset import TokenDataset, refuse_bad
from rlft.data.example import Example
from rlft.data.files import STREAMED, iterate_file
from rlft.data.hub import HubRows, is_hub_name
from rlft.data.report import DataReport
from rlft.data.stream import TokenStream
from rlft.errors import DataError

__all__ = ["StreamOrder", "StreamedDataset", "stream_rows", "tokenize_stream"]

Row = Mapping[str, Any]
#: Rows that are looked at before the first step.
HEAD = 256


def stream_rows(
    source: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> Callable[[], Iterator[Row]]:
    """A function that reads the rows from their beginning, one at a time.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, a glob, the name of a dataset on the hub, a list of those; a
            ``datasets.IterableDataset`` or any other iterable that can be gone through more than once; or a function that
            returns an iterable.
        split: which part of a hub dataset.
        columns: renames, expected name -> name in the data.
        name: configuration of a hub dataset.
        revision: revision of a hub dataset.

    Raises:
        ValueError: nothing is there, or it cannot be read row by row; a hub dataset is asked for when its first row is.
    """
    read = _reader(source, split, name, revision)
    return _Renamed(read, dict(columns)) if columns else read


# Classes, not closures: a reader is sent to worker processes.
@dataclass(frozen=True)
class _Files:
    paths: list[Path]

    def __call__(self) -> Iterator[Row]:
        for path in self.paths:
            yield from iterate_file(path)


@dataclass(frozen=True)
class _Chain:
    readers: list[Callable[[], Iterator[Row]]]

    def __call__(self) -> Iterator[Row]:
        for reader in self.readers:
            yield from reader()


@dataclass(frozen=True)
class _Again:
    source: Any

    def __call__(self) -> Iterator[Row]:
        # an iterable that can be called as well is taken as what it iterates over
        return iter(self.source if isinstance(self.source, Iterable) else self.source())


@dataclass(frozen=True)
class _Renamed:
    read: Callable[[], Iterator[Row]]
    columns: dict[str, str]

    def __call__(self) -> Iterator[Row]:
        renames = {name: expected for expected, name in self.columns.items()}
        for row in self.read():
            missing = [name for name in renames if name not in row]
            if missing:
                raise ValueError(
                    f"columns={self.columns} names a column that is not there{_check.suggestion(missing[0], list(row))}"
                )
            yield {
                renames.get(name, name): value
                for name, value in row.items()
                if name in renames or name not in self.columns
            }


def _reader(source: Any, split: str, name: str | None, revision: str | None) -> Callable[[], Iterator[Row]]:
    if isinstance(source, (str, Path)):
        source = [source]
    if isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        readers = [
            HubRows(str(item), split, name, revision) if is_hub_name(item) else _Files(_files(item)) for item in source
        ]
        return readers[0] if len(readers) == 1 else _Chain(readers)
    if isinstance(source, Iterator):
        raise ValueError(
            "streamed rows can be gone through once only, so neither a second epoch nor resuming is possible; give the "
            "function that makes the generator instead of the generator"
        )
    if isinstance(source, Iterable) or callable(source):
        return _Again(source)
    raise ValueError(
        f"cannot stream rows from a {type(source).__name__}; give a path, an iterable, or a function of none"
    )


def _files(item: str | Path) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_file():
        found = [path]
    elif glob.has_magic(str(item)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    else:
        found = []
    if not found:
        raise ValueError(
            f"{str(item)!r} is no file to stream from; give {', '.join(STREAMED)} files, a glob of them, or the name of a "
            f"dataset on the hub"
        )
    for file in found:
        iterate_file(file)  # its suffix
    return found


@dataclass
class StreamedDataset:
    """What a run holds of a stream.

    Attributes:
        examples: the first ones, for checks and tables.
        format: one of :data:`rlft.data.FORMATS`.
        report: what became of the rows looked at.
        open: rank, number of processes -> the stream from its beginning; with worker processes that read ahead where
            the data has some; ``block`` and ``waiting`` are those of :class:`rlft.data.ahead.WorkedStream`.
    """

    examples: list[Example]
    format: str
    report: DataReport
    open: Callable[..., TokenStream] = field(repr=False)

    def pick(self, drawn: Iterable[Example]) -> list[Example]:
        """What the order gave out: the examples themselves."""
        return list(drawn)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the first rows: a stream cannot be known to its end."""
        return "stream-" + TokenDataset(self.examples, self.format, self.report).fingerprint

    def column_fingerprint(self, name: str) -> str:
        """As of :class:`TokenDataset`, of the first rows."""
        return TokenDataset(self.examples, self.format, self.report).column_fingerprint(name)


class _AllRead(Exception):
    """The rows came to their end."""


def tokenize_stream(
    rows: Callable[[], Iterable[Row]], tokenizer: Any, *, workers: int = 0, **settings: Any
) -> StreamedDataset:
    """Read the first rows of a stream.

    Args:
        rows: as from :func:`stream_rows`.
        tokenizer: a transformers tokenizer.
        workers: processes that will read ahead, in each process of the run.
        settings: of :class:`TokenStream`.

    Raises:
        ValueError: as :class:`TokenStream`, for the first rows; and where workers could not be sent what they need.
    """
    if workers:
        check_sendable({"the tokenizer": tokenizer, "what the rows are read from": rows})

    def opened(rank: int, world: int, *, block: int = 1, waiting: Callable[[], None] | None = None) -> TokenStream:
        options = {**settings, "rank": rank, "world_size": world}
        stream = (
            WorkedStream(rows, tokenizer, workers=workers, block=block, waiting=waiting, **options)
            if workers
            else TokenStream(rows, tokenizer, **options)
        )
        # the format of the first rows: wherever a process, a worker or a resumed run begins, it reads alike
        stream.settle(head.format)  # pyright: ignore[reportArgumentType]
        return stream

    def once() -> Iterator[Row]:
        yield from rows()
        raise _AllRead

    head = TokenStream(once, tokenizer, **{**settings, "shuffle_buffer": 0})
    examples: list[Example] = []
    with contextlib.suppress(_AllRead):
        while len(examples) < HEAD:
            examples.append(next(head))
    refuse_bad(head.report, settings.get("max_bad_fraction", 0.01))
    if not examples:
        raise ValueError("the stream holds no rows; give at least one per process")
    return StreamedDataset(examples, head.format, head.report, opened)


class StreamOrder:
    """Draws the examples of one step of this process.

    Args:
        stream: of this process.
        draws: examples at once.
        compare: whether rows that were given out before a resume must be the ones that are read again.
    """

    def __init__(self, stream: TokenStream, draws: int, *, compare: bool = True) -> None:
        self.stream, self.draws, self.compare = stream, draws, compare

    def __next__(self) -> list[Example]:
        """The examples of the next step.

        Raises:
            DataError: a file, a row or a worker process failed.
        """
        try:
            return [next(self.stream) for _ in range(self.draws)]
        except (ValueError, OSError, DataError) as error:
            remedy = "Give" if isinstance(error, DataError) else "Repair it and give"
            raise DataError(
                f"the training data cannot be read on, {self.stream.consumed} rows into epoch {self.stream.epoch + 1}: {error}. "
                f"{remedy} the same command again: the run goes on where it stopped"
            ) from error

    def start(self) -> None:
        """Start worker processes, where the stream has some, before the first step needs them."""
        self.stream.start()

    def close(self) -> None:
        """End them."""
        self.stream.close()

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state if self.compare else {**state, "rows_hash": ""})
