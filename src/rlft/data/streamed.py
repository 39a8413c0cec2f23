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
from rlft.data.dataset import TokenDataset, refuse_bad
from rlft.data.example import Example
from rlft.data.files import STREAMED, iterate_file
from rlft.data.report import DataReport
from rlft.data.stream import TokenStream
from rlft.errors import TrainingError

__all__ = ["StreamOrder", "StreamedDataset", "stream_rows", "tokenize_stream"]

Row = Mapping[str, Any]
#: Rows that are looked at before the first step.
HEAD = 256


def stream_rows(source: Any, *, columns: Mapping[str, str] | None = None) -> Callable[[], Iterator[Row]]:
    """A function that reads the rows from their beginning, one at a time.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, a glob, a list of those; a ``datasets.IterableDataset`` or any other
            iterable that can be gone through more than once; or a function that returns an iterable.
        columns: renames, expected name -> name in the data.

    Raises:
        ValueError: nothing is there, or it cannot be read row by row.
    """
    read = _reader(source)
    if not columns:
        return read
    renames = {name: expected for expected, name in columns.items()}

    def renamed() -> Iterator[Row]:
        for row in read():
            missing = [name for name in renames if name not in row]
            if missing:
                raise ValueError(
                    f"columns={dict(columns)} names a column that is not there{_check.suggestion(missing[0], list(row))}"
                )
            yield {
                renames.get(name, name): value for name, value in row.items() if name in renames or name not in columns
            }

    return renamed


def _reader(source: Any) -> Callable[[], Iterator[Row]]:
    if isinstance(source, (str, Path)):
        source = [source]
    if isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        files = [path for item in source for path in _files(item)]
        return lambda: (row for path in files for row in iterate_file(path))
    if isinstance(source, Iterator):
        raise ValueError(
            "streamed rows can be gone through once only, so neither a second epoch nor resuming is possible; give the "
            "function that makes the generator instead of the generator"
        )
    if isinstance(source, Iterable):
        return lambda: iter(source)
    if callable(source):
        make: Any = source
        return lambda: iter(make())
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
            f"{str(item)!r} is no file to stream from; give {', '.join(STREAMED)} files or a glob of them (of the hub: pass "
            f"datasets.load_dataset(name, streaming=True)['train'] as train_dataset)"
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
        open: rank, number of processes -> the stream from its beginning.
    """

    examples: list[Example]
    format: str
    report: DataReport
    open: Callable[[int, int], TokenStream] = field(repr=False)

    def pick(self, drawn: Iterable[Example]) -> list[Example]:
        """What the order gave out: the examples themselves."""
        return list(drawn)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the first rows: a stream cannot be known to its end."""
        return "stream-" + TokenDataset(self.examples, self.format, self.report).fingerprint


class _AllRead(Exception):
    """The rows came to their end."""


def tokenize_stream(rows: Callable[[], Iterable[Row]], tokenizer: Any, **settings: Any) -> StreamedDataset:
    """Read the first rows of a stream.

    Args:
        rows: as from :func:`stream_rows`.
        tokenizer: a transformers tokenizer.
        settings: of :class:`TokenStream`.

    Raises:
        ValueError: as :class:`TokenStream`, for the first rows.
    """

    def opened(rank: int, world: int) -> TokenStream:
        return TokenStream(rows, tokenizer, rank=rank, world_size=world, **settings)

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
    """

    def __init__(self, stream: TokenStream, draws: int) -> None:
        self.stream, self.draws = stream, draws

    def __next__(self) -> list[Example]:
        try:
            return [next(self.stream) for _ in range(self.draws)]
        except (ValueError, OSError) as error:
            raise TrainingError(
                f"the training data cannot be read on, {self.stream.consumed} rows into epoch {self.stream.epoch + 1}: {error}. "
                f"Repair it and give the same command again"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
