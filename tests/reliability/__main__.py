"""The campaign: ``python -m tests.reliability`` runs every section and writes the figures into docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.reliability import faults, forker, kills, workers
from tests.reliability.bench import Bench, Figures

ROOT = Path(__file__).parents[2]
PAGE, STORE = ROOT / "docs" / "reliability.md", Path(__file__).with_name("figures.json")
BEGIN, END = "<!-- figures: written by make kill-tests -->", "<!-- end of figures -->"
BOTH, MORE = ["dpo", "grpo"], ["agro", "ppo", "dapo", "stream"]

Share = Callable[[int], int]
REFILLS = "SIGKILL of one process of two that draw again differently often (DAPO's dynamic sampling)"
FEW = ("from the start", "restart after a kill in a save", "stopped by a signal on a saved step")

#: section -> (long, for a share of the cases; quick)
SECTIONS: dict[str, tuple[Callable[[Bench, Share], Figures], Callable[[Bench], Figures]]] = {
    "random": (
        lambda b, n: kills.random_kills(b, dict.fromkeys(BOTH, n(200)) | dict.fromkeys(MORE, n(20))),
        lambda b: kills.random_kills(b, {"dpo": 1, "grpo": 2}),
    ),
    "named": (
        lambda b, n: kills.named_kills(b, BOTH, n),
        lambda b: kills.named_kills(b, ["grpo"], situations=FEW, only=1),
    ),
    "resume": (
        lambda b, n: kills.resume_kills(b, [*BOTH, "agro"], n(50)),
        lambda b: kills.resume_kills(b, ["dpo"], 1),
    ),
    "signals": (lambda b, n: kills.signals(b, [*BOTH, "agro"], n(50)), lambda b: kills.signals(b, ["grpo"], 2)),
    "ranks": (lambda b, n: kills.rank_kills(b, "grpo", n(20)), lambda b: kills.rank_kills(b, "grpo", 1)),
    "rank-refills": (
        lambda b, n: kills.rank_kills(b, "refills", n(8), title=REFILLS, alike=False),
        lambda b: kills.rank_kills(b, "refills", 2, title=REFILLS, alike=False),
    ),
    "workers": (
        lambda b, n: workers.worker_kills(b, {"map_workers": n(20), "stream_workers": n(20)}),
        lambda b: workers.worker_kills(b, {"stream_workers": 3}),
    ),
    "budgets": (lambda b, n: faults.disk_budgets(b, BOTH, n(40)), lambda b: faults.disk_budgets(b, ["dpo"], 2)),
    "disk": (lambda b, n: faults.disk_errors(b, BOTH, n(100)), lambda b: faults.disk_errors(b, ["dpo"], 1)),
    "read-only": (lambda b, n: faults.read_only(b, BOTH), lambda b: faults.read_only(b, ["dpo"])),
    "damage": (lambda b, n: faults.corruptions(b, "grpo", 300, n(30)), lambda b: faults.corruptions(b, "grpo", 30, 1)),
    "rewards": (lambda b, n: faults.rewards(b, ["grpo", "agro"], n(100)), lambda b: faults.rewards(b, ["grpo"], 2)),
    "soak": (lambda b, n: faults.soak(b, ["soak_dpo", "soak_grpo"], 2000), lambda b: faults.soak(b, ["soak_dpo"], 200)),
}
QUICK = [name for name in SECTIONS if name not in ("ranks", "rank-refills", "soak", "read-only", "workers")]


def main() -> int:
    """Exit code 0 when every case held."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few cases of each, and no page")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each section")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--json", type=Path, help="write the figures here, and no page")
    parser.add_argument("--page", action="store_true", help="only write the stored figures into the page")
    args = parser.parse_args()
    if args.page:
        _store({})
        return 0
    began = time.monotonic()
    forker.warm()
    print(f"imports: {time.monotonic() - began:.1f} s", flush=True)
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="rlft-", dir=memory if os.access(memory, os.W_OK) else None))
    bench, found = Bench(root, args.seed), {}
    os.chmod(root, 0o755)
    try:
        for name in args.sections or (QUICK if args.quick else SECTIONS):
            started = time.monotonic()
            long, quick = SECTIONS[name]
            figures = quick(bench) if args.quick else long(bench, lambda count: max(1, round(count * args.share)))
            seconds = time.monotonic() - started
            found[name] = {**asdict(figures), "seconds": round(seconds), "seed": args.seed}
            said = f"{figures.cases} of {figures.wanted} cases, {len(figures.failures)} failures, {seconds:.0f} s"
            print(f"{name}: {said}; {figures.notes}", flush=True)
            if args.json is None and not args.quick:
                _store(found)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found))
    return int(any(section["failures"] or section["cases"] < section["wanted"] for section in found.values()))


def _store(found: dict[str, Any]) -> None:
    """Keep the last figures of each section, and put the table of all into the page."""
    stored = json.loads(STORE.read_text()) if STORE.exists() else {}
    stored |= {name: {**section, "failures": len(section["failures"])} for name, section in found.items()}
    if found:
        stored["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} cores, Linux, Python {platform.python_version()}, "
            f"torch {torch.__version__}, one thread"
        )
    STORE.write_text(json.dumps(stored, indent=1) + "\n")
    if PAGE.exists():
        text = PAGE.read_text()
        inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.S)
        PAGE.write_text(inside.sub(lambda _: f"{BEGIN}\n{table(stored)}\n{END}", text))


def table(stored: dict[str, Any]) -> str:
    """The page's table."""
    lines = ["| What | Cases | Failures | Measured |", "|---|---:|---:|---|"]
    for name in SECTIONS:
        if name in stored:
            section = stored[name]
            notes = "; ".join(f"{key}: {_shown(value)}" for key, value in section["notes"].items())
            cases = f"{section['cases']:,} of {section['wanted']:,}"
            lines.append(f"| {section['title']} | {cases} | {section['failures']} | {notes} |")
    seconds = sum(section["seconds"] for section in stored.values() if isinstance(section, dict))
    return "\n".join([*lines, "", f"On {stored['machine']}; {seconds / 60:.0f} minutes in all."])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(f'`{item}`' for item in value)})"
    return str(value)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # some imported libraries complain at an ordinary exit
