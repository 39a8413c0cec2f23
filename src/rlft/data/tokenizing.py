"""Checked rows to examples: :class:`Tokenizer`, and the same for many rows with the help of worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlft._workers import AHEAD, Workers
from rlft.data.encoding import Encoded, Encoder
from rlft.data.example import Completion, Example
from rlft.data.formats import Format
from rlft.data.parsing import EQUAL_PAIR, BadRow, ParsedRow, parse_row

__all__ = ["Notes", "Tokenizer", "tokenized"]


@dataclass(frozen=True, slots=True)
class Notes:
    """What had to be done to a row, see :class:`rlft.data.DataReport`."""

    prompt_truncated: bool
    boundary_split: bool
    eos_added: int
    special_in_text: bool


class Tokenizer:
    """Raw rows to examples, chunk by chunk; what :func:`tokenize` and the stream share.

    Args:
        encoder: turns checked rows into ids.
        format: of the rows.
    """

    def __init__(self, encoder: Encoder, format: Format) -> None:
        self.encoder = encoder
        self.format: Format = format
        self._ints: dict[int, int] = {}
        self._all_true: dict[int, tuple[bool, ...]] = {}

    def __call__(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], places: Sequence[str]) -> list[Any]:
        """For each row ``(Example, Notes)``, or the :class:`BadRow` that says why not.

        Raises:
            ValueError: the data as a whole does not fit; the message begins with the row's place.
        """
        parsed: list[ParsedRow | BadRow] = []
        for row, place in zip(rows, places, strict=True):
            try:
                parsed.append(parse_row(row, self.format))
            except BadRow as bad:
                parsed.append(bad)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        usable = [i for i, row in enumerate(parsed) if isinstance(row, ParsedRow)]
        try:
            encoded = self.encoder.encode([parsed[i] for i in usable])  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            place = places[usable[error.row]] + ": " if hasattr(error, "row") else ""  # pyright: ignore
            raise ValueError(f"{place}{error}") from error
        results: list[Any] = list(parsed)
        for i, tokens in zip(usable, encoded, strict=True):
            results[i] = self._example(rows[i], parsed[i], tokens, indices[i])  # pyright: ignore[reportArgumentType]
        return results

    def _example(self, row: Mapping[str, Any], parsed: ParsedRow, tokens: Encoded | BadRow, index: int) -> Any:
        if isinstance(tokens, BadRow):
            return tokens
        if self.format == "preference" and tokens.answers[0].ids == tokens.answers[1].ids:
            return BadRow(f"{EQUAL_PAIR} after truncation")
        completions = tuple(
            Completion(
                self._ids(answer.ids),
                self._mask(answer.mask),
                reward=None if parsed.rewards is None else parsed.rewards[i],
                label=parsed.label,
                truncated=answer.truncated,
            )
            for i, answer in enumerate(tokens.answers)
        )
        prompt = self._ids(tokens.prompt_ids)
        notes = Notes(tokens.prompt_truncated, tokens.boundary_split, tokens.eos_added, tokens.special_in_text)
        return Example(prompt, completions, row, parsed.prompt, parsed.margin, index), notes

    def _ids(self, ids: Iterable[int]) -> tuple[int, ...]:
        # Equal ids share one object: 8 bytes a token instead of 40.
        intern = self._ints.setdefault
        return tuple([intern(i, i) for i in ids])

    def _mask(self, mask: Sequence[bool]) -> tuple[bool, ...]:
        if all(mask):
            return self._all_true.setdefault(len(mask), tuple(mask))
        return tuple(mask)

    def shared(self, example: Example, row: Mapping[str, Any]) -> Example:
        """A worker's example as it would have been made here: with this row, and equal ids as one object."""
        completions = tuple(replace(c, ids=self._ids(c.ids), mask=self._mask(c.mask)) for c in example.completions)
        prompt = row["prompt"] if row.get("prompt") == example.prompt else example.prompt
        return replace(
            example, prompt_ids=self._ids(example.prompt_ids), completions=completions, columns=row, prompt=prompt
        )


#: Rows, their numbers, and their places in words.
Chunk = tuple[Sequence[Mapping[str, Any]], Sequence[int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """What a worker needs to tokenise the chunks that it is sent.

    Attributes:
        encoder, format: as of :class:`Tokenizer`.
    """

    encoder: Encoder
    format: Format

    def open(self, alive: Callable[[], None]) -> Callable[[Chunk], list[Any]]:
        """In a worker: what tokenises a chunk. The rows themselves need not go back."""
        work = Tokenizer(self.encoder, self.format)

        def answer(chunk: Chunk) -> list[Any]:
            return [r if isinstance(r, BadRow) else (replace(r[0], columns={}), r[1]) for r in work(*chunk)]

        return answer


def tokenized(chunks: Iterable[Chunk], work: Tokenizer, workers: int) -> Iterator[tuple[Chunk, list[Any]]]:
    """Every chunk with what :class:`Tokenizer` makes of it, in order; the first error ends it.

    Args:
        chunks: of rows.
        work: tokenises them.
        workers: processes that help. This one does a chunk itself whenever it would wait, at the start for example.

    Raises:
        ValueError: as :class:`Tokenizer`.
        DataError: a worker died.
    """
    if workers == 0:
        yield from ((chunk, work(*chunk)) for chunk in chunks)
        return
    left = iter(chunks)
    # in order: given to a worker, or done here; an error of a row waits for the rows before it
    taken: deque[tuple[Chunk, int, list[Any] | Exception | None]] = deque()
    pool = Workers(workers, ChunkJob(work.encoder, work.format), [()] * workers)

    def give(number: int) -> None:
        chunk = next(left, None)
        if chunk is not None:
            pool.send(number, (*chunk[:2], list(chunk[2])))
            taken.append((chunk, number, None))

    try:
        for number in [*range(workers)] * AHEAD:
            give(number)
        while taken:
            chunk, number, done = taken[0]
            if done is None and not pool.ready(number) and (more := next(left, None)) is not None:
                taken.append((more, -1, _tried(work, more)))
                continue
            taken.popleft()
            if isinstance(done, Exception):
                raise done
            if done is None:
                results = pool.receive(number)
                give(number)
                done = [
                    result if isinstance(result, BadRow) else (work.shared(result[0], row), result[1])
                    for result, row in zip(results, chunk[0], strict=True)
                ]
            yield chunk, done
    finally:
        pool.close()


def _tried(work: Tokenizer, chunk: Chunk) -> list[Any] | Exception:
    try:
        return work(*chunk)
    except Exception as error:
        return error
