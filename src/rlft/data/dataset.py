"""Rows -> token ids, once: :func:`tokenize` gives a :class:`TokenDataset`."""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rlft import _check
from rlft._workers import check_sendable
from rlft.data.cells import cells_hash
from rlft.data.encoding import Encoder, Limits, TruncationMode
from rlft.data.example import DataWarning, Example
from rlft.data.formats import check_format, detect_format
from rlft.data.parsing import BadRow
from rlft.data.report import DataReport, quantiles
from rlft.data.rows import Rows, load_rows
from rlft.data.tokenizing import Chunk, Tokenizer, tokenized

__all__ = ["Overlap", "TokenDataset", "check_overlap", "tokenize"]

_CHUNK = 512  # rows per call of the tokenizer
_WORTH = 4096  # rows from which on worker processes, which take seconds to start, are worth it


@dataclass(frozen=True)
class TokenDataset(Sequence[Example]):
    """Examples as token ids, in the order of the rows.

    Attributes:
        examples: one per usable row.
        format: one of :data:`rlft.data.FORMATS`.
        report: what became of every row.
    """

    examples: list[Example]
    format: str
    report: DataReport

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def pick(self, drawn: Iterable[int]) -> list[Example]:
        """The examples with these numbers."""
        return [self.examples[i] for i in drawn]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every id, mask, reward and label: equal for equal training data, in the same order."""
        digest = hashlib.blake2b(self.format.encode(), digest_size=16)
        for example in self.examples:
            digest.update(repr((len(example.prompt_ids), len(example.completions), example.margin)).encode())
            digest.update(array("q", example.prompt_ids).tobytes())
            for completion in example.completions:
                digest.update(repr((len(completion.ids), completion.reward, completion.label)).encode())
                digest.update(array("q", completion.ids).tobytes())
                digest.update(bytes(completion.mask))
        return digest.hexdigest()

    def column_fingerprint(self, name: str) -> str:
        """A hash of one column as it was read, in the order of the examples.

        Args:
            name: of the column; ``prompt`` is the whole prompt, also where its tokens were cut. A row without the column
                counts as one that holds None.
        """
        return cells_hash(e.prompt if name == "prompt" else e.columns.get(name) for e in self.examples)


def tokenize(
    rows: Any,
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    format: str = "auto",
    truncation_mode: TruncationMode = "keep_end",
    max_bad_fraction: float = 0.01,
    add_eos: bool = True,
    end_token_ids: Sequence[int] = (),
    boundary: Literal["split", "refuse"] = "split",
    separator: str = "",
    workers: int = 0,
) -> TokenDataset:
    """Tokenise every row, once.

    Args:
        rows: :class:`Rows`, or whatever :func:`load_rows` takes.
        tokenizer: a transformers tokenizer.
        max_prompt_length: tokens a prompt may have (BOS included); what is over is cut as ``truncation_mode`` says.
        max_completion_length: tokens an answer may have (EOS included); what is over is cut from its end.
        max_length: tokens prompt and answer may have together; the answer gives way, and a prompt that leaves it no
            room makes the row unusable.
        format: one of :data:`rlft.data.FORMATS`; ``auto`` reads the columns.
        truncation_mode: ``keep_end`` keeps the end of a long prompt (and its BOS), ``keep_start`` its start, ``skip``
            leaves the row out.
        max_bad_fraction: share of unusable rows above which the data is refused.
        add_eos: end every answer with the end-of-sequence token.
        end_token_ids: further tokens that end an answer, such as a chat model's end of turn.
        boundary: where the tokenizer merges across the end of the prompt, ``split`` tokenises the answer on its own and
            ``refuse`` raises.
        separator: text put between prompt and answer of rows that are text, as part of the prompt.
        workers: processes that help with 4096 rows or more; what comes out is the same.

    Returns:
        The examples, and a report of what became of every row.

    Raises:
        ValueError: the data is empty, lacks a column, holds an unknown role, does not fit the tokenizer, or has more
            unusable rows than allowed; the message names the row and what to do. Also a tokenizer that cannot be sent to
            a worker.
        DataError: a worker died.
    """
    _check.number("max_bad_fraction", max_bad_fraction, low=0.0, high=1.0)
    limits = Limits(max_prompt_length, max_completion_length, max_length, truncation_mode)
    options = {"add_eos": add_eos, "end_token_ids": end_token_ids, "boundary": boundary, "separator": separator}
    encoder = Encoder(tokenizer, limits=limits, **options)
    rows = load_rows(rows)
    chosen = detect_format(rows.column_names) if format == "auto" else format
    check_format(chosen, rows.column_names)
    work = Tokenizer(encoder, chosen)  # pyright: ignore[reportArgumentType]
    report = DataReport(chosen)
    examples: list[Example] = []
    seen: set[int] = set()
    workers = min(workers, len(rows) // _CHUNK) if len(rows) >= _WORTH else 0
    if workers:
        check_sendable({"the tokenizer": tokenizer})
    for (chunk, indices, _), results in tokenized(_chunks(rows), work, workers):
        for row, index, result in zip(chunk, indices, results, strict=True):
            count(report, result, rows.where(index))
            if isinstance(result, BadRow):
                continue
            key = _key(row)
            report.duplicates += key in seen
            seen.add(key)
            examples.append(result[0])
    report.prompt_lengths = quantiles([len(example.prompt_ids) for example in examples])
    report.completion_lengths = quantiles([len(c.ids) for example in examples for c in example.completions])
    refuse_bad(report, max_bad_fraction)
    _warn(report, limits)
    return TokenDataset(examples, chosen, report)


def _key(row: Mapping[str, Any]) -> int:
    """Equal for equal rows; two different rows share one with a chance of 2^-64."""
    try:
        return hash(json.dumps(row, sort_keys=True, default=str))
    except TypeError:  # keys that are not text, inside a cell
        return hash(repr(row))


class _Places(Sequence[str]):
    """Where the rows of a chunk come from, looked up when asked."""

    def __init__(self, rows: Rows, start: int, length: int) -> None:
        self._rows, self._start, self._length = rows, start, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if index >= self._length:
            raise IndexError(index)
        return self._rows.where(self._start + index)


def _chunks(rows: Rows) -> Iterator[Chunk]:
    chunk: list[dict[str, Any]] = []
    start = 0
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK or start + len(chunk) == len(rows):
            yield chunk, range(start, start + len(chunk)), _Places(rows, start, len(chunk))
            start, chunk = start + len(chunk), []


def count(report: DataReport, result: Any, where: str) -> None:
    """Add one row's outcome to the report."""
    report.rows += 1
    if isinstance(result, BadRow):
        report.skip(result.reason, where)
        return
    example, notes = result
    report.kept += 1
    report.truncated_prompts += notes.prompt_truncated
    report.boundary_splits += notes.boundary_split
    report.eos_added += notes.eos_added
    if notes.special_in_text:
        report.special_in_text += 1
        report.first.setdefault("special token in text", where)
    for completion in example.completions:
        report.completions += 1
        report.truncated_completions += completion.truncated
        report.trained_tokens += sum(completion.mask)


def refuse_bad(report: DataReport, max_bad_fraction: float) -> None:
    """Refuse data of which nothing, or too little, can be used."""
    if report.kept == 0:
        raise ValueError(f"none of the {report.rows} rows can be used: {report.reasons()}; repair the data")
    if report.num_skipped > max_bad_fraction * report.rows:
        raise ValueError(
            f"{report.num_skipped} of {report.rows} rows ({report.num_skipped / report.rows:.1%}) cannot be used, more "
            f"than max_bad_fraction={max_bad_fraction:g} allows: {report.reasons()}; repair the rows or raise "
            f"max_bad_fraction"
        )


def _warn(report: DataReport, limits: Limits) -> None:
    messages = []
    if report.num_skipped:
        messages.append(f"{report.num_skipped} of {report.rows} rows were skipped: {report.reasons()}")
    if report.truncated_prompts:
        messages.append(
            f"{report.truncated_prompts} of {report.kept} prompts were cut to "
            f"max_prompt_length={limits.max_prompt_length} ({limits.truncation_mode})"
        )
    if report.truncated_completions:
        messages.append(
            f"{report.truncated_completions} of {report.completions} answers were cut to "
            f"max_completion_length={limits.max_completion_length}, max_length={limits.max_length}; they hold no "
            f"end-of-sequence token, and most of them teach nothing about stopping"
        )
    if report.boundary_splits:
        messages.append(
            f"in {report.boundary_splits} of {report.kept} rows the tokenizer merges across the end of the prompt; "
            f"their answers were tokenised on their own, as generation would continue (separator='\\n' avoids it)"
        )
    if report.special_in_text:
        messages.append(
            f"{report.special_in_text} of {report.kept} rows write a special token in their own text (first: "
            f"{report.first['special token in text']}), and the tokenizer makes that token of it, an end in the middle "
            f"of an answer for example; change the text if that is not meant"
        )
    if report.duplicates:
        messages.append(f"{report.duplicates} of {report.rows} rows repeat an earlier one; they count twice")
    for message in messages:
        warnings.warn(message, DataWarning, stacklevel=3)


# -- two data sets -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Overlap:
    """What an evaluation set shares with the training set.

    Attributes:
        prompts: evaluation examples whose prompt is trained on.
        examples: evaluation examples that are trained on as a whole.
        of: evaluation examples in all.
        first: index of the first shared one in the evaluation set, or None.
    """

    prompts: int
    examples: int
    of: int
    first: int | None


def check_overlap(train: Iterable[Example], evaluation: Iterable[Example]) -> Overlap:
    """Count evaluation examples that the training set holds, and warn once when there are any.

    Args:
        train: training examples.
        evaluation: evaluation examples.

    Returns:
        The counts; equality is that of token ids.
    """
    prompts: set[tuple[int, ...]] = set()
    answered: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for example in train:
        prompts.add(example.prompt_ids)
        answered.update((example.prompt_ids, completion.ids) for completion in example.completions)
    total = shared = whole = 0
    first = None
    for index, example in enumerate(evaluation):
        total += 1
        if example.prompt_ids not in prompts:
            continue
        known = bool(example.completions) and all((example.prompt_ids, c.ids) in answered for c in example.completions)
        if example.prompt == "" and not known:
            continue  # a text on its own: its prompt is the BOS, or the first token, that others have too
        first = index if first is None else first
        shared += 1
        whole += known
    if shared:
        warnings.warn(
            f"{shared} of {total} evaluation examples (first: {first}) have a prompt that is trained on, {whole} of "
            f"them with the same answers; their scores say nothing about unseen prompts",
            DataWarning,
            stacklevel=2,
        )
    return Overlap(shared, whole, total, first)
