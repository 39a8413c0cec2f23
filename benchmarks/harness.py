"""Turns between variants, each in a fresh process with one thread; the order is reversed every round.

Per unit of work: CPU-seconds of the process, wall seconds, and how far its resident memory rose above what it was
before the first unit. The first unit of every variant is a warm-up: its memory counts, its time does not.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Case", "CaseResult", "Variant", "VariantResult", "measure"]

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_DISABLED": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Variant:
    """One way to do the work: ``target`` is ``module:function``; ``needs`` are modules without which it is skipped."""

    name: str
    target: str
    parameters: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """The same work done by several variants; the first is ours, and ratios are others / ours.

    ``same`` names facts that all variants must report alike (within ``tolerance``), or the measurement is refused.
    ``per`` names a fact by which times are divided before they are compared: work that varies by chance.
    ``kind`` says how the page shows it: ``variants``, a table of its own; ``layout``, one row of the table of layouts.
    """

    name: str
    what: str
    shape: dict[str, Any]
    variants: list[Variant]
    rounds: int = 5
    same: tuple[str, ...] = ()
    tolerance: float = 1e-3
    note: str = ""
    per: str | None = None
    kind: Literal["variants", "layout"] = "variants"


@dataclass
class VariantResult:
    """What was measured of a variant, round by round."""

    name: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: float = 0.0
    work: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def costs(self) -> list[float]:
        """CPU-seconds per unit of work, round by round."""
        return [seconds / work for seconds, work in zip(self.cpu, self.work, strict=True)]

    def ratios(self, ours: VariantResult) -> list[float]:
        """Cost over ours, in the same round."""
        return [a / b for a, b in zip(self.costs, ours.costs, strict=True)]


@dataclass
class CaseResult:
    """A case and its variants, ours first."""

    case: Case
    variants: list[VariantResult]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the JSON beside the page."""
        ours = self.variants[0]
        rows = []
        for v in self.variants:
            row: dict[str, Any] = {"name": v.name, "skipped": v.skipped}
            if not v.skipped:
                ratios = v.ratios(ours)
                row |= {
                    "cpu_s": [round(x, 4) for x in v.cpu],
                    "wall_s": [round(x, 4) for x in v.wall],
                    "peak_mib": round(v.peak, 1),
                    "ratio": {
                        "of_minima": round(min(v.costs) / min(ours.costs), 3),
                        "median": round(statistics.median(ratios), 3),
                        "low": round(min(ratios), 3),
                        "high": round(max(ratios), 3),
                        "memory": round(v.peak / ours.peak, 2) if ours.peak > 1 else None,
                    },
                    "facts": v.facts,
                }
            rows.append(row)
        case = self.case
        return {
            "name": case.name,
            "kind": case.kind,
            "what": case.what,
            "shape": case.shape,
            "rounds": len(ours.cpu),
            "note": case.note,
            "variants": rows,
        }


class _Worker:
    """A variant's process, seen from here."""

    def __init__(self, variant: Variant, result: VariantResult) -> None:
        self.variant, self.result = variant, result
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", variant.target, json.dumps(variant.parameters)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"variant {self.variant.name!r} stopped:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def _missing(variant: Variant) -> str:
    from importlib.util import find_spec

    lacking = [name for name in variant.needs if find_spec(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def measure(case: Case, *, rounds: int | None = None, say: Callable[[str], None] = print) -> CaseResult:
    """Run all variants of a case in turns.

    Args:
        case: what to compare.
        rounds: timed rounds; default: the case's own.
        say: called with a line of progress.

    Returns:
        Round by round what was measured; variants whose modules are missing are marked as skipped.

    Raises:
        RuntimeError: when a variant fails, or when variants that must compute the same thing do not.
    """
    rounds = rounds or case.rounds
    results = [VariantResult(v.name, skipped=_missing(v)) for v in case.variants]
    workers: list[_Worker] = []
    try:
        for variant, result in zip(case.variants, results, strict=True):
            if not result.skipped:
                workers.append(_Worker(variant, result))
        for worker in workers:
            worker.receive()
        for index in range(rounds + 1):
            for worker in workers if index % 2 == 0 else workers[::-1]:
                report = worker.turn()
                worker.result.peak = max(worker.result.peak, report["peak"])
                worker.result.facts = report["facts"]
                if index > 0:
                    worker.result.cpu.append(report["cpu"])
                    worker.result.wall.append(report["wall"])
                    worker.result.work.append(report["facts"][case.per] if case.per else 1.0)
            if index > 0:
                line = ", ".join(f"{w.result.name} {w.result.cpu[-1]:.2f}" for w in workers)
                say(f"  {case.name} round {index}/{rounds} CPU-s: {line}")
    finally:
        for worker in workers:
            worker.close()
    _agree(case, [w.result for w in workers])
    return CaseResult(case, results)


def _agree(case: Case, results: list[VariantResult]) -> None:
    for name in case.same:
        ours = results[0].facts[name]
        for other in results[1:]:
            theirs = other.facts[name]
            if not math.isclose(ours, theirs, rel_tol=case.tolerance):
                raise RuntimeError(
                    f"{case.name}: {name} is {ours:.8g} in {results[0].name!r} and {theirs:.8g} in {other.name!r}; "
                    f"they do not compute the same thing, so their times cannot be compared"
                )
