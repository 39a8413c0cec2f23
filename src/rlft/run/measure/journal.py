"""What a run counts and says: metrics of the present line, rows of metrics.jsonl, words on the screen and in the log."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlft._redact import redact
from rlft.metrics import MetricsLog, MetricSums
from rlft.run.measure.meter import Meter
from rlft.run.processes.processes import Processes
from rlft.run.progress import Progress

__all__ = ["Journal", "quiet_transformers"]

logger = logging.getLogger("rlft")


class Journal:
    """Owns the sums that the next logged line is made of; whoever measures something adds it here.

    Args:
        processes: sums are taken over all of them, and the main one writes.
        progress: the step of a row; rows are added to its ``log_history``.
        run_dir: where metrics.jsonl is.
        quiet: nothing on the screen.

    Attributes:
        metrics: sums since the last line.
        log: the file; it is opened when the run begins.
        meter: seconds of each phase, tokens per second, memory.
    """

    def __init__(self, processes: Processes, progress: Progress, run_dir: Path, *, quiet: bool) -> None:
        self.processes, self.progress, self.quiet = processes, progress, quiet
        self.metrics = MetricSums()
        self.log = MetricsLog(run_dir / "metrics.jsonl", enabled=False)
        self.meter = Meter(processes.device)
        self._said: set[str] = set()

    def start(self, policy: Any, *, mixed_precision: str) -> None:
        """Begin to count the time of steps; see :meth:`Meter.start`."""
        unknown = self.meter.start(policy, tokens_seen=self.progress.tokens_seen, mixed_precision=mixed_precision)
        if unknown is not None:
            self.note(f"meter/mfu and meter/fraction_of_floor are left out: {unknown}")

    @contextlib.contextmanager
    def apart(self) -> Iterator[MetricSums]:
        """Sums of their own, as an evaluation has; those of the next line go on afterwards."""
        kept, self.metrics = self.metrics, MetricSums()
        try:
            yield self.metrics
        finally:
            self.metrics = kept

    def means(self, sums: MetricSums) -> dict[str, float]:
        """Means over all processes: sums and counts are added up before dividing. Collective."""
        if self.processes.world_size > 1:
            sums = sums.reduce(self.processes.accelerator.gather, device=self.processes.device)
        return sums.means()

    def flush(self) -> dict[str, float]:
        """The metrics since the last call, of all processes. Collective."""
        values, self.metrics = self.means(self.metrics), MetricSums()
        return values | self.meter.flush(self.processes, tokens_seen=self.progress.tokens_seen)

    def write(self, values: Mapping[str, float], *, ahead: int = 0) -> None:
        """A row in metrics.jsonl and the trackers.

        Args:
            values: metric name -> number.
            ahead: 1 for the step that is being made, which may never be finished.
        """
        step = self.progress.step + ahead
        if self.processes.is_main:
            self.log.write(step, values)
        self.processes.accelerator.log(dict(values), step=step)
        self.progress.log_history.append({**values, "epoch": self.progress.epoch, "step": step})

    def warn_once(self, key: str, text: str) -> None:
        """One line in the log of ``rlft``, from the main process, once per run and key."""
        if self.processes.is_main and key not in self._said:
            self._said.add(key)
            logger.warning(text)

    def say(self, text: str) -> None:
        """One line on the screen, from the main process."""
        if self.processes.is_main:
            print(redact(text), flush=True)

    def note(self, text: str) -> None:
        """One line in the log of ``rlft``, and on the screen of a run that is not quiet; from the main process."""
        if self.processes.is_main:
            logger.info(text)
            if not self.quiet:
                self.say(text)

    def warn(self, text: str) -> None:
        """A warning from the main process."""
        if self.processes.is_main:
            warnings.warn(redact(text), stacklevel=3)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars of transformers' own: a save is over in a moment, and its bar would cut through ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
