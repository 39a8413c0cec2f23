"""``python -m benchmarks.gpu``: measure on the CUDA device, print it, write docs/benchmarks-gpu.md and .json.

Each part runs in a process of its own with a time of its own, and writes what it knows after every variant: a part that
fails or hangs costs its own figures. ``--quick`` runs everything with tiny shapes, on a CPU too, and writes no page.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import accuracy, head, page, phases, steps
from benchmarks.gpu.measure import Recorder

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "liger-kernel")
#: What is measured -> how, repeats, seconds a variant may take, and seconds the part may take.
PARTS: dict[str, tuple[Callable[[Recorder], None], int, float, float]] = {
    "head": (head.run, 20, 4.0, 170.0),
    "accuracy": (accuracy.run, 1, 1.0, 40.0),
    "sharing": (phases.sharing, 20, 6.0, 110.0),
    "generation": (phases.generation, 20, 8.0, 130.0),
    "steps": (steps.run, 6, 60.0, 150.0),
}


def facts(device: torch.device) -> dict[str, str]:
    """What was compared, and on what kind of device (never which machine)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found["device"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["device"] = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    return found


def measure(part: str, device: torch.device, path: Path, *, quick: bool) -> None:
    """Run one part in this process."""
    run, repeats, seconds, _ = PARTS[part]
    recorder = Recorder(device, path, repeats=repeats, seconds=seconds, quick=quick)
    with recorder.section(part):
        run(recorder)


def apart(part: str, path: Path, *, quick: bool, seconds: float) -> str:
    """Run one part in a process of its own; gives what went wrong, or nothing."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--part",
        part,
        "--json",
        str(path),
        *(["--quick"] if quick else []),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"{part}: stopped after {seconds:.0f} s"
    return f"{part}: its process ended with {done.returncode}" if done.returncode else ""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write.

    Args:
        arguments: of the command line; default: the process's own.

    Returns:
        What was written as JSON.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run? (figures mean nothing)")
    parser.add_argument("--only", metavar="PART", choices=sorted(PARTS), help="one part alone; writes no page")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together (default: 8)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where page and JSON go (default: docs)")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be > 0, got {options.minutes:g}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if options.part:
        measure(options.part, device, options.json, quick=options.quick)
        return {}
    if not gpu and not options.quick:
        parser.error("there is no CUDA device here; --quick runs everything with tiny shapes on a CPU")

    # a part, or figures that mean nothing, must not replace the page of a whole run by accident
    whole = gpu and not (options.quick or options.only)
    target: Path | None = options.output or (ROOT / "docs" if whole else None)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag, on in (("--quick", options.quick), (f"--only {options.only}", options.only)) if on]
    record: dict[str, Any] = {
        "versions": facts(device),
        "command": " ".join(["python -m benchmarks.gpu", *flags]),
        "cases": [],
        "failed": [],
    }
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        for part in [options.only] if options.only else PARTS:
            print(f"{part}:", flush=True)
            seconds = min(PARTS[part][3], end - time.monotonic())
            if seconds < 10:
                record["failed"].append(f"{part}: no time was left")
                continue
            path = Path(folder) / f"{part}.json"
            failed = apart(part, path, quick=options.quick, seconds=max(seconds, 120.0) if options.quick else seconds)
            found = json.loads(path.read_text()) if path.is_file() else {"cases": [], "failed": []}
            record["cases"] += found["cases"]
            record["failed"] += [*found["failed"], *([failed] if failed else [])]
            if target is not None:
                (target / "benchmarks-gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(page.tables(record), flush=True)
    if target is not None and gpu:
        (target / "benchmarks-gpu.md").write_text(page.page(record), encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
