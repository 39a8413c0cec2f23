"""The log of metrics: one JSON row per line, exact over a stop and a resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlft._files import append_bytes, cut_file, disk_trouble, sync_file

__all__ = ["LOG_NAME", "MetricsLog", "comparable", "read_metrics"]

LOG_NAME = "metrics.jsonl"


class MetricsLog:
    """A JSONL file with one row per line, each flushed as it is written.

    A row is ``{"step": n, ...}``; steps never go back. NaN and infinities are the strings ``"nan"``, ``"inf"``,
    ``"-inf"``. A line that a kill cut short is removed when the log is opened again.

    Args:
        path: the file; created when missing.
        enabled: False writes nothing and touches no file: for every process but the first.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True) -> None:
        self.path = Path(path)
        self.enabled = enabled
        self._descriptor = -1
        self._last_step = -1
        if not enabled:
            return
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        whole = _whole_lines(self.path)
        if whole < self.offset:
            with self._explained(whole):
                cut_file("metrics.partial", self.path, whole)
        self._last_step = self._step_before(whole)

    @property
    def offset(self) -> int:
        """Bytes written so far; keep it in the checkpoint for :meth:`truncate_to`."""
        return os.fstat(self._descriptor).st_size if self.enabled else 0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
            step: optimizer steps done, not below that of the row before.
            values: numbers, 0-dim tensors, strings, bools, None, and lists or mappings of them.

        Raises:
            ValueError: when a value cannot be written, or the step goes back.
            OSError: when the disk refuses; the log then ends with the row before.
        """
        if not self.enabled:
            return
        if step < self._last_step:
            raise ValueError(
                f"step {step} comes after step {self._last_step} in {self.path}; "
                f"call truncate_to({step}) first when a run resumes"
            )
        if "step" in values and values["step"] != step:
            raise ValueError(f"values hold step {values['step']!r} but the row is of step {step}; leave 'step' out")
        row = {"step": step, **{key: _writable(value, key) for key, value in values.items() if key != "step"}}
        before, line = self.offset, json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._explained(len(line)):
            try:
                append_bytes("metrics.line", self._descriptor, line)
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
        self._last_step = step

    def sync(self) -> None:
        """Force the log to disk; do so before a checkpoint that stores :attr:`offset`."""
        if self.enabled:
            with self._explained(self.offset):
                sync_file("metrics.sync", self._descriptor)

    def truncate_to(self, step: int, offset: int | None = None) -> None:
        """Forget what was logged after a checkpoint, so that the log after a resume equals an uninterrupted one.

        Args:
            step: the checkpoint's step; later rows go.
            offset: :attr:`offset` when the checkpoint was saved. With it, rows of the same step that were written
                after the checkpoint go too. When the log is shorter (a power cut), a warning says so.

        Raises:
            ValueError: when the offset does not end a row of at most this step, or a line is not a row.
        """
        if not self.enabled:
            return
        size = self.offset
        if offset is not None and offset > size:
            warnings.warn(
                f"{self.path} has {size} bytes, the checkpoint of step {step} knew {offset}: rows were lost",
                stacklevel=2,
            )
            offset = None
        if offset is None:
            offset = _end_of_step(self.path, step)
        elif offset < 0 or _whole_lines(self.path, offset) != offset or self._step_before(offset) > step:
            raise ValueError(
                f"byte {offset} of {self.path} is not the end of a row of step {step} or before; "
                f"is it the log of another run? Call truncate_to({step}) without an offset to cut by step"
            )
        if offset < size:
            with self._explained(offset):
                cut_file("metrics.resume", self.path, offset)
        self._last_step = self._step_before(offset)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self, needed: int) -> Iterator[None]:
        """Name the file, and what the disk lacks, in an error of the system."""
        try:
            yield
        except OSError as error:
            trouble = disk_trouble(error, self.path.parent, needed) or error
            raise OSError(error.errno, f"metrics not written, {trouble}", str(self.path)) from error

    def _step_before(self, end: int) -> int:
        """Step of the last row that ends at or before a byte; -1 when there is none."""
        line, number = b"", 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the last one is used
                end -= len(line)
                if end <= 0:
                    break
        return _row(self.path, number, line)["step"] if line and end == 0 else -1


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log, ``"nan"`` and infinities as floats again. A last line cut short is left out.

    Args:
        path: the log, or the run folder that holds ``metrics.jsonl``.

    Raises:
        FileNotFoundError: when there is no log.
        ValueError: names file and line of what is not a row.
    """
    path = Path(path) / LOG_NAME if Path(path).is_dir() else Path(path)
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                rows.append(_row(path, number, line))
    return rows


def comparable(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the clock or the machine (``*_time``, ``*per_second``, ``meter/*``), to compare runs.

    NaN becomes the string ``"nan"``, so that equal rows compare equal.
    """
    return [
        {
            key: _writable(value, key)
            for key, value in row.items()
            if not (key.endswith(("time", "per_second")) or key.startswith("meter/"))
        }
        for row in rows
    ]


def _writable(value: Any, place: str) -> Any:
    if hasattr(value, "dtype"):  # a tensor or a numpy number
        if getattr(value, "ndim", 0):
            raise ValueError(f"metric {place!r} has shape {list(value.shape)}; reduce it to a number first")
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_writable(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _writable(item, f"{place}.{key}") for key, item in value.items()}
    raise ValueError(f"metric {place!r} is a {type(value).__name__}; expected a number, text, or a list of them")


def _readable(value: Any) -> Any:
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else value
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    return value


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = _readable(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number} is not a row of metrics ({error}); remove the line") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{path}:{number} is not a row of metrics (no whole number under 'step'); remove the line")
    return row


def _whole_lines(path: Path, size: int | None = None) -> int:
    """Bytes up to the end of the last complete line within the first ``size`` bytes."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size if size is None else size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _end_of_step(path: Path, step: int) -> int:
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if _row(path, number, line)["step"] > step:
                break
            end += len(line)
    return end
