"""The page and the tables of what was measured on a GPU."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["page", "tables"]

HEAD = """\
# Benchmarks on a GPU

Every figure below was measured by one command,

```
{command}
```

on one GPU, in one go. This page is written by that command; edit `benchmarks/gpu/`, not the page. The same on a CPU:
[Benchmarks](benchmarks.md).

## How to read it

- Times are those between two CUDA events around one unit of work (forward and backward pass; whole steps: wall time between
  steps), after warm-up: the median of the repeats, and in brackets the tenth and ninetieth percentile.
- **Ratio** is a variant's median over that of the first row: above 1 the first row is faster.
- **Memory** is the most that was allocated above what was there before the first repeat (inputs and weights are).
- Where variants must compute the same thing, that is checked (sums of outputs, norms of gradients); a row that differs says so.
- Models are random, so answers have the full length, unless the case says that they end at random.

## Versions

{versions}

## Results
"""

#: What was aimed at: what, case, over which row, at least how often the first row's speed (below 1: at most so much longer
#: than a bare part of the work).
AIMS: tuple[tuple[str, str, str, float], ...] = (
    ("joint op against its own matrix products", "joint, 2048 wide", "bare matrix products of the op (4)", 1 / 1.25),
    ("joint op against its own matrix products", "joint, 4096 wide", "bare matrix products of the op (4)", 1 / 1.25),
    ("joint op against its own matrix products", "joint, 1024 wide", "bare matrix products of the op (4)", 1 / 1.5),
    ("joint op against TRL's three calls", "joint, 2048 wide", "TRL LogProb x 2 + Divergence", 2.2),
    ("joint op against materialised logits", "joint, 2048 wide", "torch, two log_softmax", 1.0),
    ("exact KL against a sampled one", "joint, 2048 wide", "TRL LogProb x 2 (sampled KL alone)", 1 / 1.05),
    ("log-prob against TRL", "log-probs, 2048 wide", "TRL ChunkedLogProbFunction", 1.4),
    ("sampling against generate", "sampling, ragged", "transformers generate", 3.0),
    ("GRPO step against TRL with generate", "GRPO step, LoRA", "TRL GRPOTrainer", 3.0),
)


def _cost(case: dict[str, Any], row: dict[str, Any]) -> float:
    """Median time, for one unit of what the case counts."""
    return statistics.median(row["ms"]) / (row["facts"].get(case["per"], 1.0) if case["per"] else 1.0)


def _ratio(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    first = case["rows"][0]
    return None if first["skipped"] or not first["ms"] else _cost(case, row) / _cost(case, first)


def _spread(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def table(case: dict[str, Any]) -> str:
    """A case as a Markdown table."""
    if not any(row["ms"] for row in case["rows"]) and any(row["facts"] for row in case["rows"]):
        return _facts(case)
    lines = ["| variant | median ms (10 % to 90 %) | ratio | memory MiB | repeats | |", "|---|---:|---:|---:|---:|---|"]
    for row in case["rows"]:
        if row["skipped"]:
            lines.append(f"| {row['name']} | | | | | {row['skipped']} |")
            continue
        low, high = _spread(row["ms"])
        ratio = _ratio(case, row)
        lines.append(
            f"| {row['name']} | {statistics.median(row['ms']):.2f} ({low:.2f} to {high:.2f}) "
            f"| {'' if ratio is None else f'{ratio:.2f}'} | {row['peak_mib']:.0f} | {len(row['ms'])} "
            f"| {'differs: ' + row['differs'] if row['differs'] else ''} |"
        )
    return "\n".join(lines)


def _facts(case: dict[str, Any]) -> str:
    """Facts side by side, where nothing was timed."""
    names = list(dict.fromkeys(name for row in case["rows"] for name in row["facts"]))
    lines = [f"| way | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row in case["rows"]:
        cells = [f"{row['facts'][name]:.1e}" if name in row["facts"] else row["skipped"] for name in names]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aims(cases: list[dict[str, Any]]) -> str:
    """What was aimed at beside what was measured."""
    by_name = {case["name"]: case for case in cases}
    lines = ["| what | case | aim | measured | |", "|---|---|---:|---:|---|"]
    for what, name, against, least in AIMS:
        case = by_name.get(name, {"rows": []})
        row = next((row for row in case["rows"] if row["name"] == against and row["ms"]), None)
        ratio = None if row is None else _ratio(case, row)
        if ratio is not None:
            aim = f"{least:g}x" if least >= 1 else f"at most {1 / least:.2f}x its time"
            found = f"{ratio:.2f}x" if least >= 1 else f"{1 / ratio:.2f}x"
            lines.append(f"| {what} | {name} | {aim} | {found} | {'reached' if ratio >= least else 'missed'} |")
    for case in cases:
        bound = case["shape"].get("bound")
        padded = next((row for row in case["rows"] if row["name"] == "rlft, layout padded" and row["ms"]), None)
        ratio = None if bound is None or padded is None else _ratio(case, padded)
        if ratio is not None:
            verdict = "reached" if ratio >= 0.85 * bound else "missed"
            lines.append(f"| shared prompts | {case['name']} | {0.85 * bound:.2f}x | {ratio:.2f}x | {verdict} |")
    return "\n".join(lines)


def tables(record: dict[str, Any]) -> str:
    """All cases, and what failed."""
    parts = []
    for case in record["cases"]:
        shape = ", ".join(f"{name} {value}" for name, value in case["shape"].items())
        note = f" {case['note']}" if case["note"] else ""
        what = case["what"][:1].upper() + case["what"][1:]
        parts.append(f"### {case['name']}\n\n{what}.{note}\n\nShape: {shape}.\n\n{table(case)}\n")
    if record["failed"]:
        parts.append("### Not measured\n\n" + "\n".join(f"- {line}" for line in record["failed"]) + "\n")
    return "\n".join(parts)


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    versions = "\n".join(f"- {name}: {value}" for name, value in record["versions"].items())
    head = HEAD.format(command=record["command"], versions=versions)
    return f"{head}\n### Aims\n\nSet before this was measured.\n\n{aims(record['cases'])}\n\n{tables(record)}"
