"""What a mutated input may do: work, or fail with an error of the library's own, soon and in little memory."""

from __future__ import annotations

import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlft.checkpoint import CheckpointError
from rlft.config import ConfigError
from rlft.errors import TrainingError
from rlft.runlock import RunLockError

SOURCE = str(Path(__file__).resolve().parents[2] / "src" / "rlft")
#: Work that a case may take, in units of :func:`unit_of_work`, and bytes by which a whole series may raise the memory of the
#: process. How long a unit takes is measured beside a case that seems slow: neither the machine nor its load decides.
UNITS, BYTES = 25.0, 200 * 2**20


def unit_of_work() -> float:
    """Processor seconds that a fixed sum takes here and now, some hundredths."""
    times = []
    for _ in range(3):
        start = time.process_time()
        sum(i * i for i in range(1_000_000))
        times.append(time.process_time() - start)
    return min(times)


def own(error: BaseException) -> bool:
    """An error type of the library, or a ValueError that the library itself raised."""
    if isinstance(error, (ConfigError, CheckpointError, TrainingError, RunLockError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return type(error) is ValueError and bool(frames) and frames[-1].filename.startswith(SOURCE)


def memory() -> int:
    """Largest memory the process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """How a series of mutated inputs ended."""

    name: str
    cases: int = 0
    accepted: int = 0
    slowest: float = 0.0
    grown: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def run(self, what: str, attempt: Callable[[], Any], allowed: Callable[[BaseException], bool] = own) -> bool:
        """One case; True when it was accepted. A failure is kept, so that a series names all of them."""
        self.cases += 1
        high, start = memory(), time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
            self.accepted += 1
            worked = True
        except Exception as error:
            worked = False
            self.refused[type(error).__name__] += 1
            if not allowed(error):
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                self.failures.append(f"{what}: {type(error).__name__} at {where}: {str(error)[:200]}")
        spent = time.process_time() - start
        self.slowest = max(self.slowest, spent)
        self.grown = max(self.grown, memory() - high)
        if spent > 0.3 and self.cases > 1 and (units := spent / unit_of_work()) > UNITS:  # the first one imports
            self.failures.append(f"{what}: took the time of {units:.0f} sums, {spent:.1f} s")
        if memory() - high > BYTES:
            self.failures.append(f"{what}: took {(memory() - high) / 2**20:.0f} MiB")
        return worked

    def check(self) -> None:
        """Fail with the first few cases that were not as they must be."""
        assert not self.failures, f"{self.name}: {len(self.failures)} of {self.cases}\n" + "\n".join(self.failures[:20])
