"""Readers of data files: JSON lines, JSON, CSV, parquet, Arrow. No pickle, no cache, no network.

A reader returns the rows and the place each one came from. Text that is not valid UTF-8 is kept with lone surrogates
in the place of its bad bytes, so that the row reaches the checks, is counted there, and never trains anything.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["STREAMED", "SUFFIXES", "iterate_file", "read_file"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")

#: Read row by row, without holding the file.
STREAMED = (".jsonl", ".ndjson", ".parquet")

# An answer may consist of digits: these columns of a CSV file stay text whatever they look like.
_TEXT_COLUMNS = frozenset({"prompt", "completion", "chosen", "rejected", "text"})
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_FLOAT = re.compile(r"-?(0|[1-9]\d*)\.\d+([eE][+-]?\d{1,3})?")

Row = dict[str, Any]


def read_file(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of one file.

    Args:
        path: a file whose suffix is one of :data:`SUFFIXES`.

    Returns:
        The rows, and for each the ``file:line`` (or ``file[index]``) it came from.

    Raises:
        ValueError: the kind of file is unknown, or a line cannot be read; the message names file and line.
    """
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no data file that can be read; expected one of {', '.join(SUFFIXES)}")
    return reader(path)


def iterate_file(path: Path) -> Iterator[Row]:
    """The rows of one file, one at a time; suffixes as in :data:`STREAMED`, errors as in :func:`read_file`."""
    if path.suffix.lower() not in STREAMED:
        raise ValueError(
            f"{path} cannot be read row by row; a stream reads {', '.join(STREAMED)}: convert the file, or read it whole"
        )
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else (row for row, _ in _json_rows(path))


# -- JSON --------------------------------------------------------------------------------------------------------------
def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} appears twice in one object; keep one")
    return row


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: broken JSON, {error.msg} at column {error.colno}: {_excerpt(text, error.pos)}; repair the line"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply; flatten the row") from None
    except ValueError as error:  # a key twice, or a number with thousands of digits
        raise ValueError(f"{where}: {error}") from None


def _excerpt(text: str, position: int) -> str:
    start = max(0, position - 20)
    return ascii(text[start : position + 20])


def _decode(raw: bytes, path: Path) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object {{column: value}}, got {type(value).__name__}")
    return value


def _json_lines(path: Path) -> tuple[list[Row], list[str]]:
    found = list(_json_rows(path))
    return [row for row, _ in found], [where for _, where in found]


def _json_rows(path: Path) -> Iterator[tuple[Row, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(raw, path) if number == 1 else raw.decode("utf-8", "surrogateescape")
            if text.strip():
                yield _object(_loads(text, where), where), where


def _json(path: Path) -> tuple[list[Row], list[str]]:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        return [], []
    try:
        value = _loads(text, str(path))
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under the name .json
            return _json_lines(path)
        raise
    if isinstance(value, dict) and "\n" not in text.strip():  # a single JSON line
        value = [value]
    if not isinstance(value, list):
        raise ValueError(
            f"{path}: expected a list of objects or one object per line, got {type(value).__name__}; "
            f"write the rows as [{{...}}, {{...}}]"
        )
    places = [f"{path}[{index}]" for index in range(len(value))]
    return [_object(item, where) for item, where in zip(value, places, strict=True)], places


# -- CSV ---------------------------------------------------------------------------------------------------------------
def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    # The module's limit of 128 KiB per cell is global: widen it only while reading.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open("rb") as head:
            _decode(head.read(3), path)
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for record in reader:
                yield line, record
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV, {error}; repair the line") from None
    finally:
        csv.field_size_limit(limit)


def _csv(path: Path) -> tuple[list[Row], list[str]]:
    records = list(_csv_records(path))
    if not records:
        return [], []
    header = records[0][1]
    twice = [name for name in header if header.count(name) > 1]
    if twice or "" in header:
        problem = f"column {twice[0]!r} appears twice" if twice else "a column has no name"
        raise ValueError(f"{path}:1: {problem} in the header {header}; give every column one name")
    rows, places = [], []
    for line, record in records[1:]:
        if not record:
            continue
        if len(record) != len(header):
            raise ValueError(
                f"{path}:{line}: expected {len(header)} cells ({', '.join(header)}), got {len(record)}; "
                f'quote cells that hold commas or newlines: "a, b"'
            )
        rows.append(dict(zip(header, record, strict=True)))
        places.append(f"{path}:{line}")
    for name in header:
        if name not in _TEXT_COLUMNS:
            _convert(rows, name)
    return rows, places


def _convert(rows: list[Row], name: str) -> None:
    """Turn one column into bools, integers or floats when every cell of it is one; an empty cell becomes None."""
    filled = [row[name] for row in rows if row[name] != ""]
    convert: Any = str
    if filled and all(cell.lower() in ("true", "false") for cell in filled):
        convert = lambda cell: cell.lower() == "true"  # noqa: E731
    elif filled and all(_INTEGER.fullmatch(cell) for cell in filled):
        convert = int
    elif filled and all(_INTEGER.fullmatch(cell) or _FLOAT.fullmatch(cell) for cell in filled):
        convert = float
    for row in rows:
        row[name] = convert(row[name]) if row[name] != "" else None


# -- Arrow -------------------------------------------------------------------------------------------------------------
def _table_rows(table: Any, path: Path) -> list[Row]:
    import pyarrow

    columns: dict[str, list[Any]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in columns:
            raise ValueError(f"{path}: column {name!r} appears twice; rename one")
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                raise ValueError(f"{path}: column {name!r} holds text that is not UTF-8; write it again") from None
            raw = column.cast(pyarrow.large_binary()).to_pylist()
            columns[name] = [None if cell is None else cell.decode("utf-8", "surrogateescape") for cell in raw]
    names = list(columns)
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _parquet(path: Path) -> tuple[list[Row], list[str]]:
    rows = list(_parquet_rows(path))
    return rows, [f"{path}[{index}]" for index in range(len(rows))]


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from _table_rows(pyarrow.Table.from_batches([batch]), path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        raise ValueError(f"{path} is no readable parquet file: {error}") from None


def _arrow(path: Path) -> tuple[list[Row], list[str]]:
    import pyarrow

    rows: list[Row] = []
    try:
        with pyarrow.OSFile(str(path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                _validate(batch, path)
                rows += _table_rows(pyarrow.Table.from_batches([batch]), path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable Arrow stream: {error}") from None
    return rows, [f"{path}[{index}]" for index in range(len(rows))]


def _validate(batch: Any, path: Path) -> None:
    """Refuse offsets and indices that point outside their buffers: reading such a column can end the process."""
    import pyarrow

    # Text that is not UTF-8 is dealt with row by row, so plain text columns are looked at as bytes.
    bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate()  # a view of buffers that are too short is not safe either
            (column.view(bytes_of[column.type]) if column.type in bytes_of else column).validate(full=True)
        except pyarrow.ArrowException as error:
            if "UTF8" in str(error):
                raise ValueError(f"{path}: column {name!r} holds text that is not UTF-8; write it again") from None
            raise
