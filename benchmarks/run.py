"""``python -m benchmarks.run``: measure everything side by side, print it, write docs/benchmarks.md and .json.

Ratios are what to read: absolute seconds belong to the machine. Nothing is downloaded, nothing is reported anywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import accuracy, generation, kernels, layouts, steps
from benchmarks.harness import ROOT, Case, measure
from benchmarks.page import accuracy_table, layout_table, page, table

__all__ = ["cases", "main"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "liger-kernel")


def versions() -> dict[str, str]:
    """What was compared, and on what kind of processor (never which machine)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    import torch

    return {**found, "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread"}


def cases(folder: Path, *, quick: bool = False) -> list[Case]:
    """All cases; what they need on disk goes into ``folder``."""
    return [
        *steps.cases(folder, quick=quick),
        *generation.cases(folder, quick=quick),
        *layouts.cases(quick=quick),
        *kernels.cases(quick=quick),
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write.

    Args:
        arguments: of the command line; default: the process's own.

    Returns:
        What was written as JSON.

    Raises:
        RuntimeError: when a variant fails, or variants that should compute the same thing do not.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, one round: does it run? (figures mean nothing)"
    )
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name contains TEXT; writes no page")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds of every case (default: the case's own)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the page goes (default: docs)")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")

    results = []
    with tempfile.TemporaryDirectory() as folder:
        known = cases(Path(folder), quick=options.quick)
        wanted = (options.only or "").lower()
        chosen = [case for case in known if wanted in case.name.lower()]
        if not chosen:
            parser.error(f"no case is called {options.only!r}; there are: {', '.join(case.name for case in known)}")
        for case in chosen:
            result = measure(case, rounds=options.rounds, say=lambda line: print(line, file=sys.stderr))
            results.append(result.as_dict())
            show = layout_table([results[-1]]) if case.kind == "layout" else table(results[-1])
            print(f"\n{case.name}\n{show}", flush=True)
    flags = [f"--{name}" for name in ("quick",) if getattr(options, name)]
    flags += [f"--{name} {value}" for name in ("only", "rounds") if (value := getattr(options, name))]
    digits = [] if options.only else accuracy.rows(quick=options.quick)
    if digits:
        print(f"\naccuracy\n{accuracy_table(digits)}", flush=True)
    record = {
        "versions": versions(),
        "command": " ".join(["python -m benchmarks.run", *flags]),
        "cases": results,
        "accuracy": digits,
    }
    # A part, or figures that mean nothing, must not replace the page of a whole run by accident.
    target = options.output or (ROOT / "docs" if not (options.quick or options.only) else None)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        (target / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (target / "benchmarks.md").write_text(page(record), encoding="utf-8")
        print(f"\nwritten: benchmarks.md and benchmarks.json in {target.name}")
    return record


if __name__ == "__main__":
    main()
