"""The page and the tables of what was measured."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["accuracy_table", "page", "table"]

HEAD = """\
# Benchmarks

rlft side by side with what one would use instead. Every figure below was measured by one command,

```
{command}
```

on one machine, in one go. This page is written by that command; edit `benchmarks/`, not the page.

## How to read it

- **Ratio** is the other's CPU-seconds divided by rlft's in the same round: above 1 rlft is faster. The median over rounds,
  and in brackets the smallest and the largest. Where the brackets include 1, there is no difference to speak of.
- Each variant runs in a fresh process with one thread. Variants take turns within a round, in alternating order; the
  first round of each is a warm-up, whose memory counts and whose time does not.
- **Memory** is how far the process's resident memory rose above what it was before the first unit of work (weights,
  libraries and data are loaded by then), and its ratio to rlft's.
- CPU-seconds are those of the process, kernel time included. Wall times are in `benchmarks.json`; where other programs
  share the machine, they are the noisier number.
- Where variants must compute the same thing, that is checked (sums of outputs and gradient norms, losses after the same
  number of steps, tokens sampled), and a run in which they differ is refused.
- These are small models on a CPU. The savings in work (each prompt prefilled once for all its answers, only answer tokens
  scored, the reference scored in the same pass over the head, no recomputation in the backward pass) and in memory belong
  to any device. What does not carry over: page faults of large temporary tensors cost much on a CPU, and TRL's fused head
  is written for Triton, so that its torch fallback is what is measured here; on a CPU that fallback also scores prompts.
- Answers of random models have the full length, which favours samplers that wait for the slowest row; the case with
  ragged answers is closer to practice.

## Versions

{versions}

## Results
"""


def table(case: dict[str, Any]) -> str:
    """A case as a Markdown table."""
    lines = [
        "| variant | CPU-s (min) | CPU-s (median) | ratio, median (low to high) | memory MiB | memory ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in case["variants"]:
        if row["skipped"]:
            lines.append(f"| {row['name']} | skipped: {row['skipped']} | | | | |")
            continue
        ratio = row["ratio"]
        spread = (
            "1"
            if row is case["variants"][0]
            else f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        memory = "" if ratio["memory"] is None else f"{ratio['memory']:.1f}"
        lines.append(
            f"| {row['name']} | {min(row['cpu_s']):.3f} | {statistics.median(row['cpu_s']):.3f} | {spread} "
            f"| {row['peak_mib']:.0f} | {memory} |"
        )
    return "\n".join(lines)


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Errors against float64 as a Markdown table."""
    lines = [
        "| median KL | way | KL, median relative error | KL below 0 | log-prob, largest error |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        for name, way in row["ways"].items():
            lines.append(
                f"| {row['kl']:.1e} | {name} | {way['kl_error']:.1e} | {way['negative']:.1%} | {way['logp_error']:.1e} |"
            )
    return "\n".join(lines)


#: What was aimed at: what, case, variant, times faster, times less memory, and why it stays below where it does.
TARGETS: tuple[tuple[str, str, str, float, float | None, str], ...] = (
    ("GRPO step", "GRPO step, LoRA", "TRL GRPOTrainer", 4.5, 6.0, ""),
    ("DPO step", "DPO step, LoRA", "TRL DPOTrainer", 2.0, None, ""),
    ("DPO step, all weights", "DPO step, all weights", "TRL DPOTrainer", 2.0, None, ""),
    ("AGRO step against RLOO", "AGRO step against RLOO, LoRA", "TRL RLOOTrainer", 4.5, None, ""),
    (
        "generation, ragged answers", "generation, ragged answers", "transformers generate", 2.8, None,
        "three quarters of the sampler's time are the model's own matrix products and attention; a loop of its own per "
        "architecture, with fused projections, would take some of the rest",
    ),
    ("log-prob", "head: log-probs", "TRL ChunkedLogProbFunction", 3.7, None, ""),
    (
        "log-prob", "head: log-probs", "Liger chunked selective log-prob", 2.8, None,
        "the op does two matrix products, Liger's three to four, and on this processor the rest costs little",
    ),
    (
        "log-prob, large vocabulary", "head: log-probs, large vocabulary", "TRL ChunkedLogProbFunction", 3.7, 90.0,
        "at 1,024 tokens (the aim was set at 2,048) the buffers of a tile weigh more; time as in the rows below",
    ),
    (
        "log-prob, KL and entropy", "head: log-probs and exact KL", "TRL LogProb x 2 + Divergence", 5.0, 40.0,
        "87 % of the op's time are its four matrix products, which cannot be fewer; TRL's functions do ten",
    ),
    (
        "log-prob, KL and entropy", "head: log-probs and exact KL", "torch, two log_softmax", 1.4, None,
        "four matrix products here and six there bound the ratio at 1.5",
    ),
    (
        "log-prob, KL and entropy, large vocabulary", "head: log-probs and exact KL, large vocabulary",
        "TRL LogProb x 2 + Divergence", 5.0, 40.0,
        "87 % of the op's time are its four matrix products, which cannot be fewer; TRL's functions do ten",
    ),
)  # fmt: skip


def targets_table(cases: list[dict[str, Any]]) -> str:
    """What was aimed at beside what was measured, and why where it was missed."""
    by_name = {case["name"]: case for case in cases}
    lines = ["| what | against | aim | measured | |", "|---|---|---:|---:|---|"]
    for what, name, against, time, memory, why in TARGETS:
        rows = [
            row for row in by_name.get(name, {}).get("variants", []) if row["name"] == against and not row["skipped"]
        ]
        if not rows:
            continue
        ratio = rows[0]["ratio"]
        aim, found, met = f"{time:g}x", f"{ratio['median']:.1f}x", ratio["median"] >= time
        if memory is not None and ratio["memory"] is not None:
            aim, found = f"{aim}, memory {memory:g}x", f"{found}, memory {ratio['memory']:.0f}x"
            met = met and ratio["memory"] >= memory
        lines.append(f"| {what} | {against} | {aim} | {found} | {'reached' if met else 'missed: ' + why} |")
    return "\n".join(lines)


def _flat(shape: dict[str, Any]) -> str:
    parts = []
    for name, value in shape.items():
        parts.append(f"{name} ({_flat(value)})" if isinstance(value, dict) else f"{name} {value}")
    return ", ".join(parts)


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    versions = "\n".join(f"- {name}: {value}" for name, value in record["versions"].items())
    parts = [HEAD.format(command=record["command"], versions=versions)]
    aims = targets_table(record["cases"])
    parts.append(f"### Aims\n\nSet before this was built, on another processor.\n\n{aims}\n")
    for case in record["cases"]:
        note = f" {case['note']}" if case.get("note") else ""
        parts.append(
            f"### {case['name']}\n\n{case['what'].capitalize()}. {case['rounds']} rounds.{note}\n\n"
            f"Shape: {_flat(case['shape'])}.\n\n{table(case)}\n"
        )
    parts.append(
        "### Accuracy\n\nExact KL to the reference and log-probs in float32, against the same inputs in float64. Early in "
        "training, and under a strong pull to the reference, KL per token is this small.\n\n"
        f"{accuracy_table(record['accuracy'])}\n"
    )
    return "\n".join(parts)
