"""What became of streamed rows, over all processes: skipped ones are said while the run goes on, and at its end.

Rows that are held in memory are counted before the first step; those of a stream are met one by one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from rlft.data.report import DataReport
from rlft.run import display
from rlft.run.processes import processes as meeting

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["facts", "metrics", "total"]


def metrics(trainer: Trainer) -> dict[str, float]:
    """``data/rows`` and ``data/skipped_rows`` since the run began; nothing where the rows are not streamed. Collective."""
    report = _own(trainer)
    if report is None:
        return {}
    counts = torch.tensor([report.rows, report.num_skipped], dtype=torch.float64, device=trainer.device)
    rows, skipped = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    return {"data/rows": rows, "data/skipped_rows": skipped}


def total(trainer: Trainer) -> DataReport | None:
    """Rows, kept and skipped ones of all processes, said when there are skipped ones; None without a stream. Collective."""
    own = _own(trainer)
    if own is None:
        return None
    found = DataReport(trainer.train_data.format)
    for said in meeting.texts(trainer.accelerator, json.dumps(own.counts())):
        counts = json.loads(said)
        found.rows, found.kept = found.rows + counts["rows"], found.kept + counts["kept"]
        for reason, number in counts["skipped"].items():
            found.skipped[reason] = found.skipped.get(reason, 0) + number
            found.first.setdefault(reason, counts["first"][reason])
    if found.num_skipped:
        display.note(trainer, f"{found.num_skipped} of {found.rows} streamed rows were skipped: {found.reasons()}")
    return found


def facts(report: Any) -> dict[str, Any]:
    """What a run's summary says of its rows."""
    return {"rows": report.rows, "kept": report.kept, "skipped": report.skipped, "format": report.format}


def _own(trainer: Trainer) -> DataReport | None:
    source: Any = trainer.source
    return source.order.stream.report if trainer.config.streaming else None
