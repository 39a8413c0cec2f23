"""The clock of a device: repeats between two events, peak memory above what was there before, and honest gaps."""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Case", "Recorder", "Row", "Skipped", "need"]


class Skipped(Exception):
    """A variant that cannot run here; the message says why."""


def need(name: str) -> Any:
    """A module that need not be installed.

    Raises:
        Skipped: where it is not, or does not import.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(f"{name.split('.')[0]} cannot be imported ({error})") from error


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        name: of the variant.
        skipped: why there are no figures; empty where there are.
        ms: milliseconds of each repeat, between two events of the device (of a CPU: wall time).
        peak_mib: memory at most allocated above what was there before the first repeat, MiB.
        facts: what it computed, to compare variants by, and what it counts.
        differs: how far its facts are from those of the first variant, where that is too far.
    """

    name: str
    skipped: str = ""
    ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
    differs: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


@dataclass
class Case:
    """The same work by several variants, ours first.

    ``per`` names a fact that times are divided by before they are compared: work that varies by chance.
    """

    name: str
    what: str
    shape: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    per: str = ""
    note: str = ""


class Recorder:
    """Measures variants and writes all that is known after each of them.

    Args:
        device: to measure on.
        path: of the JSON file.
        repeats: of each variant, at least; fewer where they take longer than ``seconds`` together, but never under 5.
        seconds: that one variant may take, warm-up left out.
        quick: whether shapes are tiny, and figures without meaning.
    """

    def __init__(self, device: torch.device, path: Path, *, repeats: int, seconds: float, quick: bool) -> None:
        self.device, self.path, self.repeats, self.seconds, self.quick = device, path, repeats, seconds, quick
        self.cases: list[Case] = []
        self.failed: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What fails inside is written down, and the next section runs."""
        try:
            yield
        except Exception as error:  # the other sections are worth as much
            self.failed.append(f"{name}: {_said(error)}")
        finally:
            release()
            self.write()

    def case(self, name: str, what: str, shape: dict[str, Any], *, per: str = "", note: str = "") -> Case:
        """Begin a case."""
        self.cases.append(Case(name, what, shape, per=per, note=note))
        return self.cases[-1]

    def variant(
        self,
        case: Case,
        name: str,
        make: Callable[[], Callable[[], dict[str, float] | None]],
        *,
        same: tuple[str, ...] = (),
        tolerance: float = 1e-2,
        warmup: int = 3,
    ) -> Row:
        """Measure one variant.

        Args:
            case: that it belongs to.
            name: of the variant.
            make: prepares, and gives the function to repeat, which may return facts.
            same: facts that must be those of the case's first variant.
            tolerance: relative.
            warmup: repeats that are not measured: kernels are compiled and chosen in them.
        """
        row = Row(name)
        case.rows.append(row)
        try:
            self._measure(row, make, warmup)
        except Skipped as error:
            row.skipped = str(error)
        except torch.OutOfMemoryError:
            row.skipped = "out of memory"
        except Exception as error:  # a peer's failure, or ours, is a line of the table
            row.skipped = f"failed: {_said(error)}"
        self.finish(case, row, same=same, tolerance=tolerance)
        return row

    def finish(self, case: Case, row: Row, *, same: tuple[str, ...] = (), tolerance: float = 1e-2) -> None:
        """Compare a row that is complete with the first of its case, say it, write it."""
        first = case.rows[0]
        if not row.skipped and not first.skipped and row is not first:
            for fact in same:
                ours, theirs = first.facts[fact], row.facts[fact]
                if not abs(ours - theirs) <= tolerance * max(abs(ours), 1e-30):
                    row.differs = f"{fact} {theirs:.6g}, not {ours:.6g}"
        release()
        self.write()
        said = row.skipped or f"{row.median:.3f} ms, {row.peak_mib:.0f} MiB {row.differs}"
        print(f"  {case.name} | {row.name}: {said}", flush=True)

    def _measure(self, row: Row, make: Callable[[], Callable[[], dict[str, float] | None]], warmup: int) -> None:
        unit = make()
        for _ in range(1 if self.quick else warmup):
            row.facts = unit() or {}
        base = self.reset_peak()
        started, marks = time.perf_counter(), []
        for index in range(2 if self.quick else self.repeats):
            begin = self.mark()
            unit()
            marks.append((begin, self.mark()))
            if index >= 4 and time.perf_counter() - started > self.seconds:
                break
        self.wait()
        row.ms = [self.between(*pair) for pair in marks]
        row.peak_mib = (self.peak() - base) / 2**20

    # -- the device -----------------------------------------------------------------------------------------------
    def mark(self) -> Any:
        """An instant of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds from one instant to another."""
        return begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def reset_peak(self) -> int:
        """Forget the peak; gives the bytes that are allocated now."""
        release()
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    # -- files ----------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """Everything so far, as JSON."""
        cases = [asdict(case) for case in self.cases]
        text = json.dumps({"cases": cases, "failed": self.failed}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


def release() -> None:
    """Give back what the last variant held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _said(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
