"""What a person sees while a run goes: a table of what it optimises, a bar with the few numbers that matter."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlft._redact import redact
from rlft._words import byte_size, short_number
from rlft.config import Config
from rlft.rules.correction import correction_settings
from rlft.run.checks.before import peak_memory
from rlft.run.keep.ref_logps import ref_logps_dir
from rlft.run.progress import Progress
from rlft.run.step.kl_control import KLControl
from rlft.run.step.parts import Parts
from rlft.run.step.sampling import Sampling
from rlft.run.step.trust_region import TrustRegion

__all__ = ["end", "facts", "meter_line", "progress", "start", "table"]

#: Shown beside the bar, the first few that exist.
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "pair acc",
    "accuracy": "acc",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "|grad|",
    "judge/win_rate": "win rate",
    "eval_reward": "eval reward",
    "eval_judge/win_rate": "eval win rate",
    "eval_rewards/accuracies": "eval acc",
    "eval_loss": "eval loss",
}
#: Of the meter, under the bar: what is multiplied by what, and how it is written.
_METER = {
    "meter/trained_tokens_per_second": (1.0, "{} tok/s trained"),
    "meter/sampled_tokens_per_second": (1.0, "{} sampled"),
    "padding_efficiency": (1.0, "padding efficiency {:.2f}"),
    "prompt_sharing": (1.0, "prompt sharing {:.2f}x"),
    "meter/peak_memory_gib": (2.0**30, "{}"),
    "meter/mfu": (100.0, "MFU {:.0f}%"),
    "meter/fraction_of_floor": (100.0, "{:.0f}% of the floor"),
}


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def facts(
    parts: Parts, *, kl_control: KLControl | None, sampling: Sampling | None, trust_region: TrustRegion | None
) -> dict[str, str]:
    """What this run optimises, on what, with what: the rows of the table shown before it starts."""
    c, p, policy, data, world = parts.config, parts.sizes, parts.policy, parts.train_data, parts.processes.world_size
    trainable = sum(t.numel() for t in policy.parameters() if t.requires_grad)
    total = sum(t.numel() for t in policy.parameters())
    rows = dict(parts.objective.describe())
    if kl_control is not None:
        rows["KL controller"] = kl_control.describe()
    if (options := correction_settings(c)) is not None:
        rows["sampler correction"] = ", ".join(f"{name} {value}" for name, value in options.items())
    rows["reference"] = getattr(policy, "reference_kind", "none").replace("_", " ")
    if c.precompute_ref_log_probs:
        rows["reference"] += f", log-probs kept in {ref_logps_dir(c)}"
    rows["trains"] = f"{short_number(trainable)} of {short_number(total)} weights ({trainable / max(1, total):.1%})"
    size = "a stream of" if c.streaming else f"{len(data.examples)}"
    held_out = f", {len(parts.eval_data.examples)} held out" if parts.eval_data is not None else ""
    rows["data"] = f"{size} {data.format} rows{held_out}"
    looked_at = data.examples[:200]
    prompt = sum(len(e.prompt_ids) for e in looked_at) / len(looked_at)
    answers = sum(len(a.ids) for e in looked_at for a in e.completions) / len(looked_at)
    if sampling is not None:
        answers = c.num_generations * c.max_completion_length
        rows["samples"] = (
            f"{c.num_generations} per prompt, {p.groups_per_step * c.num_generations * world} per step; "
            f"temperature {c.temperature:g}, at most {c.max_completion_length} tokens"
        )
        if (rewards := sampling.rewards) is not None:
            weighed = zip(rewards.names, rewards.weights, strict=True)
            rows["rewards"] = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in weighed)
        if sampling.comparisons is not None:
            rows |= sampling.comparisons.describe()
    else:
        rows["per step"] = f"{p.groups_per_step * world} examples"
    rows["tokens per step"] = f"about {short_number(int(p.groups_per_step * world * (prompt + answers)))}"
    rows["micro-batches"] = (
        f"at most {p.micro_batch_rows} answers"
        if c.max_tokens_per_micro_batch is None
        else f"at most {c.max_tokens_per_micro_batch} tokens (rows x longest row)"
        + (", groups whole" if parts.objective.needs_groups else "")
    )
    adam = f"AdamW, lr {c.learning_rate:g} {c.lr_scheduler_type}"
    if trust_region is not None:
        adam = f"AdamW for the critic, lr {c.learning_rate:g}" if trust_region.of_critic else "no optimizer"
    epochs = f" ({p.total_steps / p.steps_per_epoch:.2f} epochs)" if p.steps_per_epoch else ""
    rows["steps"] = f"{p.total_steps}{epochs}, {adam}"
    precision = f", {c.mixed_precision}" if c.mixed_precision != "no" else ""
    rows["processes"] = f"{world} on {parts.processes.device}{precision}"
    estimate = peak_memory(parts)
    listed = ", ".join(f"{name} {byte_size(size)}" for name, size in estimate.items() if size)
    rows["memory"] = f"about {byte_size(sum(estimate.values()))} at the longest rows ({listed})"
    rows["output"] = str(parts.run_dir)
    return rows


def table(title: str, rows: Mapping[str, str]) -> Any:
    """A two-column table."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, show_header=False, box=box.ROUNDED, title_justify="left", title_style="bold")
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def start(parts: Parts, rows: Mapping[str, str], *, resumed: bool) -> None:
    """The table of what this run optimises, the data report, and one row as it is trained on."""
    step = parts.processes.progress.step
    title = redact(parts.config.run_name or parts.objective.name) + (f", resumed at step {step}" if resumed else "")
    _console().print(table(f"rlft: {title}", redact(dict(rows))))
    report = parts.train_data.report
    if report.skipped or report.kept != report.rows:
        print(redact(str(report)))
    if parts.config.checks_itself("sample"):
        _sample(parts.train_data.examples[0], parts.tokenizer)


def _sample(example: Any, tokenizer: Any) -> None:
    """A row, decoded with its special tokens; trained tokens in colour, or in brackets where there is none."""
    from rich.text import Text

    from rlft.data import preview

    console = _console()
    colour = console.is_terminal and not console.no_color
    told = "one prompt as the policy sees it"
    if example.completions:
        told = f"one row as it is trained on ({'trained tokens highlighted' if colour else 'trained tokens in [| |]'})"
    console.print(Text(told, style="bold"))
    text = redact(preview(example, tokenizer, colour=colour))
    console.print(Text.from_ansi(text) if colour else Text(text), soft_wrap=True)


@contextlib.contextmanager
def progress(config: Config, name: str, state: Progress) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A progress bar on a terminal, a line now and then elsewhere."""
    total = state.max_steps
    if config.disable_tqdm or not state.is_world_process_zero:
        yield lambda values: None
        return
    if not sys.stderr.isatty():
        every = max(1, total // 10)

        def line(values: Mapping[str, float]) -> None:
            if state.step % every == 0 or state.step == total:
                print(f"step {state.step}/{total}  {_numbers(values)}", flush=True)
                if told := meter_line(values):
                    print(f"  {told}", flush=True)

        yield line
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    console = _console(stderr=True)
    bar, below = Progress(*columns, console=console), Text(style="dim")
    task = bar.add_task(redact(config.run_name or name), total=total, completed=state.step, numbers="")

    def show(values: Mapping[str, float]) -> None:
        bar.update(task, completed=state.step, numbers=_numbers(values))
        below.plain = meter_line(values) or below.plain

    with Live(Group(bar, below), console=console, refresh_per_second=4):
        yield show


def end(config: Config, state: Progress, values: Mapping[str, float], shares: Mapping[str, float]) -> None:
    """The last numbers, and where the time went."""
    if config.disable_tqdm or not state.is_world_process_zero:
        return
    early = f" of {state.max_steps}, ended by a callback" if state.step < state.max_steps else ""
    print(f"done: {state.step} steps{early}, saved in {config.output_dir}  {_numbers(values)}", flush=True)
    if shares:
        print(f"time: {_shares(shares)}", flush=True)


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values)


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' and ')} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def meter_line(values: Mapping[str, float]) -> str:
    """Where the time goes and how well it is used, from the metrics of one line; empty where they hold nothing of it."""
    prefix = "meter/share/"
    shares = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    parts = [_shares(dict(sorted(shares.items(), key=lambda item: -item[1])))] if shares else []
    for name, (factor, form) in _METER.items():
        if name not in values or (name == "prompt_sharing" and values[name] <= 1.0):
            continue
        value = values[name] * factor
        shown = (
            byte_size(int(value)) if name.endswith("gib") else short_number(value) if form.startswith("{} ") else value
        )
        parts.append(form.format(shown))
    return " | ".join(parts)
