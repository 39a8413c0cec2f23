"""The page and the tables of what was measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

__all__ = ["AIMS", "Aim", "accuracy_table", "layout_table", "page", "table"]

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
- On an AMD processor with AVX-512, rlft multiplies the head's float32 matrices with oneDNN, which is part of torch, where
  torch itself takes MKL and its slower AVX2 code: about half of the head's time there. The rest of a model is multiplied
  as torch does it. On other processors nothing is changed, and the ratios of the head are lower.
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


def _halves(case: dict[str, Any], above: int, below: int) -> list[float]:
    """CPU-seconds of one variant over another's, in the same round."""
    over, under = case["variants"][above]["cpu_s"], case["variants"][below]["cpu_s"]
    return [a / b for a, b in zip(over, under, strict=True)]


def layout_table(cases: list[dict[str, Any]]) -> str:
    """Each prompt once against the prompt repeated, a row for every shape.

    The variants are, in order: shared, padded, and the layout that a Policy picks by itself.
    """
    lines = [
        "| groups x answers | prompt | answer | shared CPU-s | padded CPU-s | speed-up, median (low to high) | bound "
        "| share of bound | auto, against padded | memory ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        shape, (shared, padded, _) = case["shape"], case["variants"]
        ratios, bound = _halves(case, 1, 0), shared["facts"]["bound"]
        median, auto = statistics.median(ratios), statistics.median(_halves(case, 1, 2))

        def span(longest: int, low: float = shape["shortest"]) -> str:
            return f"{longest}" if low == 1 else f"{max(1, round(low * longest))} to {longest}"

        memory = padded["ratio"]["memory"]
        lines.append(
            f"| {shape['prompts']} x {shape['group']} | {span(shape['prompt'])} | {span(shape['answer'])} "
            f"| {statistics.median(shared['cpu_s']):.3f} | {statistics.median(padded['cpu_s']):.3f} "
            f"| **{median:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | {bound:.2f} | {median / bound:.2f} "
            f"| {auto:.2f} | {'' if memory is None else f'{memory:.1f}'} |"
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


PACKING = "packing, rows that share nothing"


@dataclass(frozen=True, slots=True)
class Aim:
    """What was aimed at in one comparison.

    Attributes:
        what: is compared.
        case, against: the case and the variant.
        time: times faster.
        memory: times less memory; None for no aim.
        why: why it stays below, where it does.
        ours: the variant of rlft; empty for the first of the case.
    """

    what: str
    case: str
    against: str
    time: float
    memory: float | None = None
    why: str = ""
    ours: str = ""


AGRO, RAGGED = "AGRO step against RLOO, LoRA", "generation, ragged answers"
LOGPS, WIDE, HALF = "head: log-probs", "head: log-probs, large vocabulary", "head: log-probs, bfloat16"
JOINT, WIDE_JOINT = "head: log-probs and exact KL", "head: log-probs and exact KL, large vocabulary"
TRL_LOGPS, LIGER = "TRL ChunkedLogProbFunction", "Liger chunked selective log-prob"
TRL_JOINT, TORCH_JOINT = "TRL LogProb x 2 + Divergence", "torch, two log_softmax"
NO_HALF = (
    "set on a processor without bfloat16 products. Where there are some, others multiply in bfloat16 and round each logit "
    "to it; the op multiplies in float32, on purpose. Needed: "
    "bfloat16 products that torch hands over in float32 on a CPU"
)

AIMS: tuple[Aim, ...] = (
    Aim("GRPO step", "GRPO step, LoRA", "TRL GRPOTrainer", 4.5, 6.0),
    Aim("GRPO step, exact KL to the reference", "GRPO step, exact KL, LoRA", "TRL GRPOTrainer, k3", 4.5, 6.0),
    Aim("DPO step", "DPO step, LoRA", "TRL DPOTrainer", 2.0),
    Aim("DPO step, all weights", "DPO step, all weights", "TRL DPOTrainer", 2.0),
    Aim("off-policy AGRO step", AGRO, "TRL RLOOTrainer", 4.5),
    Aim("RLOO step", AGRO, "TRL RLOOTrainer", 4.5, ours="rlft rloo"),
    Aim("generation, ragged answers", RAGGED, "transformers generate", 2.8),
    Aim("generation, ragged answers", RAGGED, "transformers continuous batching", 2.3),
    Aim("log-prob", LOGPS, TRL_LOGPS, 3.7),
    Aim("log-prob", LOGPS, LIGER, 2.8, 5.0),
    Aim(
        "log-prob, large vocabulary", WIDE, TRL_LOGPS, 3.7, 90.0,
        "memory only: of what is left, 8 MiB are the derivatives and the gradient, which any way needs; the rest are tiles, and "
        "smaller ones make the matrix products slower",
    ),
    Aim("log-prob, KL and entropy", JOINT, TRL_JOINT, 5.0, 40.0),
    Aim("log-prob, KL and entropy", JOINT, TORCH_JOINT, 1.4, 20.0),
    Aim("log-prob, KL and entropy, large vocabulary", WIDE_JOINT, TRL_JOINT, 5.0, 40.0),
    Aim("log-prob, KL and entropy, large vocabulary", WIDE_JOINT, TORCH_JOINT, 1.4, 80.0),
    Aim("log-prob, bfloat16", HALF, "torch log_softmax + gather", 5.0, why=NO_HALF),
    Aim("log-prob, bfloat16", HALF, TRL_LOGPS, 7.0, why=NO_HALF),
    Aim(
        "packing at a padding efficiency of 0.39 (1.2 / efficiency)", PACKING, "transformers, padded, all logits", 3.07, 4.0,
        "memory goes by tokens, whose ratio is 2.6; what comes on top are the logits of this vocabulary of 8,000",
    ),
    Aim(
        "the same against padded rows of ours", PACKING, "rlft, padded", 3.07, 4.0,
        "the aim was set against logits of every token; ours scores answer tokens alone in either layout, and the ratio of "
        "tokens is 2.6",
    ),
)  # fmt: skip
# Where layouts are to come: of the ratio of token counts, and against padded rows for what `auto` picks.
SHARE_OF_BOUND, AUTO = 0.9, 1.0
KL_ERROR = 300.0
NO_SHARE = (
    "time that does not go by tokens (gathering rows, merging the two parts of attention) weighs in small and ragged batches; "
    "where nothing is shared, `auto` takes padded rows. Elsewhere `auto` is the same layout: its column shows the noise. "
    "Needed: an attention kernel that reads the packed row where it lies and merges both parts itself"
)


def targets_table(cases: list[dict[str, Any]], accuracy: list[dict[str, Any]] | None = None) -> str:
    """What was aimed at beside what was measured, and why where it was missed."""
    by_name = {case["name"]: case for case in cases}
    lines = ["| what | against | aim | measured | |", "|---|---|---:|---:|---|"]
    for aim in AIMS:
        rows = {row["name"]: row for row in by_name.get(aim.case, {}).get("variants", []) if not row["skipped"]}
        if aim.against not in rows or (aim.ours and aim.ours not in rows):
            continue
        time, memory = rows[aim.against]["ratio"]["median"], rows[aim.against]["ratio"]["memory"]
        if aim.ours:  # both are in units of the case's first variant
            time /= rows[aim.ours]["ratio"]["median"]
        wanted, found, met = f"{aim.time:g}x", f"{time:.1f}x", time >= aim.time
        if aim.memory is not None and memory is not None:
            wanted, found = f"{wanted}, memory {aim.memory:g}x", f"{found}, memory {memory:.0f}x"
            met = met and memory >= aim.memory
        verdict = "reached" if met else f"missed: {aim.why or '**no reason is given yet**'}"
        lines.append(f"| {aim.what} | {aim.against} | {wanted} | {found} | {verdict} |")
    lines += _layout_targets([case for case in cases if case["kind"] == "layout"])
    return "\n".join([*lines, *_accuracy_target(accuracy or [])])


def _accuracy_target(rows: list[dict[str, Any]]) -> list[str]:
    """The error of the smallest KL against TRL's."""
    if not rows:
        return []
    small = min(rows, key=lambda row: row["kl"])
    ours, theirs = small["ways"]["rlft linear_logps"], small["ways"].get("TRL LogProb and Divergence")
    if theirs is None:
        return []
    ratio = theirs["kl_error"] / max(ours["kl_error"], 1e-16)
    met = ratio >= KL_ERROR and not any(row["ways"]["rlft linear_logps"]["negative"] for row in rows)
    verdict = "reached" if met else "missed: **no reason is given yet**"
    found = f"{ratio:,.0f}x, {ours['negative']:.0%} negative"
    return [
        f"| error of a KL of {small['kl']:.0e} | TRL LogProb and Divergence | {KL_ERROR:g}x smaller, none negative "
        f"| {found} | {verdict} |"
    ]


def _layout_targets(cases: list[dict[str, Any]]) -> list[str]:
    """The worst of all shapes beside what was aimed at."""
    if not cases:
        return []
    bounds = [case["variants"][0]["facts"]["bound"] for case in cases]
    shares = [statistics.median(_halves(case, 1, 0)) / bound for case, bound in zip(cases, bounds, strict=True)]
    autos = [statistics.median(_halves(case, 1, 2)) for case in cases]

    def row(what: str, aim: str, values: list[float], least: float, unit: str, why: str) -> str:
        below = sum(value < least for value in values)
        verdict = "reached" if not below else f"missed by {below} of {len(values)} shapes: {why}"
        return f"| {what} | prompt repeated, padded | {aim} | {min(values):.2f}{unit} | {verdict} |"

    return [
        row(
            "each prompt once, worst shape",
            f"{SHARE_OF_BOUND:g} of the token ratio",
            shares,
            SHARE_OF_BOUND,
            "",
            NO_SHARE,
        ),
        row("the layout a Policy picks, worst shape", f"never below {AUTO:g}x", autos, AUTO, "x", "see the table"),
    ]


def _flat(shape: dict[str, Any]) -> str:
    parts = []
    for name, value in shape.items():
        parts.append(f"{name} ({_flat(value)})" if isinstance(value, dict) else f"{name} {value}")
    return ", ".join(parts)


def _layout_section(cases: list[dict[str, Any]]) -> str:
    model = cases[0]["shape"]["model"]
    return (
        "### Layouts: each prompt once\n\nLog-probs forward and backward over all weights. The bound is the ratio of "
        "token counts, padding included: what the speed-up would be if time went by tokens. Attention does not (a long "
        "prompt is attended to once instead of once per answer, and without a mask), so more is possible. Lengths from "
        f"a to b are drawn at random.\n\nShape: model ({_flat(model)}).\n\n{layout_table(cases)}\n"
    )


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    versions = "\n".join(f"- {name}: {value}" for name, value in record["versions"].items())
    parts = [HEAD.format(command=record["command"], versions=versions)]
    aims = targets_table(record["cases"], record["accuracy"])
    parts.append(f"### Aims\n\nSet before this was built, on another processor.\n\n{aims}\n")
    layouts = [case for case in record["cases"] if case["kind"] == "layout"]
    for case in record["cases"]:
        if case["kind"] == "layout":
            if case is layouts[0]:
                parts.append(_layout_section(layouts))
            continue
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
