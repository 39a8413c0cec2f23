"""What became of streamed rows, over all processes: skipped ones are said while the run goes on, and at its end.

Rows that are held in memory are counted before the first step; those of a stream are met one by one.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from rlft.data.report import DataReport
from rlft.run.measure.journal import Journal

__all__ = ["StreamedRows"]


class StreamedRows:
    """Counts the rows that all processes read of a stream.

    Args:
        stream: of this process; its ``report`` counts as it reads.
        journal: of the run, where skipped rows are said.
    """

    def __init__(self, stream: Any, journal: Journal) -> None:
        self.stream, self.processes, self.journal = stream, journal.processes, journal

    def metrics(self) -> dict[str, float]:
        """``data/rows`` and ``data/skipped_rows`` since the run began. Collective."""
        report = self.stream.report
        rows, skipped = self.processes.sum(
            torch.tensor([report.rows, report.num_skipped], dtype=torch.float64)
        ).tolist()
        return {"data/rows": rows, "data/skipped_rows": skipped}

    def total(self) -> DataReport:
        """Rows, kept and skipped ones of all processes, said when there are skipped ones. Collective."""
        own = self.stream.report
        found = DataReport(own.format)
        for said in self.processes.texts(json.dumps(own.counts())):
            counts = json.loads(said)
            found.rows, found.kept = found.rows + counts["rows"], found.kept + counts["kept"]
            for reason, number in counts["skipped"].items():
                found.skipped[reason] = found.skipped.get(reason, 0) + number
                found.first.setdefault(reason, counts["first"][reason])
        if found.num_skipped:
            self.journal.note(f"{found.num_skipped} of {found.rows} streamed rows were skipped: {found.reasons()}")
        return found
