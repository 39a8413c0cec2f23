"""What a person sees while a run goes: a table of what it optimises, a bar with the few numbers that matter."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlft._redact import redact
from rlft.run.step import comparisons as pairwise
from rlft.run.step import correction
from rlft.run.step import kl_control as controllers

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = [
    "byte_size",
    "end",
    "facts",
    "meter_line",
    "note",
    "peak_memory",
    "progress",
    "quiet_transformers",
    "say",
    "start",
    "table",
    "warn",
]

logger = logging.getLogger("rlft")

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


def _title(trainer: Trainer) -> str:
    return redact(trainer.config.run_name or trainer.objective.name)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def facts(trainer: Trainer) -> dict[str, str]:
    """What this run optimises, on what, with what: the rows of the table shown before it starts."""
    c, p = trainer.config, trainer.plan
    trainable = sum(t.numel() for t in trainer.policy.parameters() if t.requires_grad)
    total = sum(t.numel() for t in trainer.policy.parameters())
    rows = dict(trainer.objective.describe())
    if (controller := controllers.describe(trainer)) is not None:
        rows["KL controller"] = controller
    if (options := correction.settings(c)) is not None:
        rows["sampler correction"] = ", ".join(f"{name} {value}" for name, value in options.items())
    rows["reference"] = getattr(trainer.policy, "reference_kind", "none").replace("_", " ")
    if c.precompute_ref_log_probs:
        from rlft.run.keep import ref_logps as ref_cache

        rows["reference"] += f", log-probs kept in {ref_cache.folder(trainer)}"
    rows["trains"] = f"{_count(trainable)} of {_count(total)} weights ({trainable / max(1, total):.1%})"
    data = trainer.train_data
    size = "a stream of" if c.streaming else f"{len(data.examples)}"
    rows["data"] = f"{size} {data.format} rows" + (
        f", {len(trainer.eval_data.examples)} held out" if trainer.eval_data is not None else ""
    )
    if trainer.online:
        rows["samples"] = (
            f"{c.num_generations} per prompt, {p.groups_per_step * c.num_generations * trainer.world_size} per step; "
            f"temperature {c.temperature:g}, at most {c.max_completion_length} tokens"
        )
        if trainer.rewards is not None:
            rows["rewards"] = ", ".join(
                name if weight == 1 else f"{weight:g} x {name}"
                for name, weight in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)
            )
        rows |= pairwise.describe(trainer)
    else:
        rows["per step"] = f"{p.groups_per_step * trainer.world_size} examples"
    rows["tokens per step"] = f"about {_count(_tokens_per_step(trainer))}"
    rows["micro-batches"] = (
        f"at most {p.micro_batch_rows} answers"
        if c.max_tokens_per_micro_batch is None
        else f"at most {c.max_tokens_per_micro_batch} tokens (rows x longest row)"
        + (", groups whole" if trainer.objective.needs_groups else "")
    )
    adam = f"AdamW, lr {c.learning_rate:g} {c.lr_scheduler_type}"
    if trainer.trust_step is not None:
        adam = f"AdamW for the critic, lr {c.learning_rate:g}" if trainer.trust_step.of_critic else "no optimizer"
    epochs = f" ({p.total_steps / p.steps_per_epoch:.2f} epochs)" if p.steps_per_epoch else ""
    rows["steps"] = f"{p.total_steps}{epochs}, {adam}"
    rows["processes"] = f"{trainer.world_size} on {trainer.device}" + (
        f", {c.mixed_precision}" if c.mixed_precision != "no" else ""
    )
    rows["memory"] = _memory(trainer)
    rows["output"] = str(trainer.run_dir)
    return rows


def _tokens_per_step(trainer: Trainer) -> int:
    sample = trainer.train_data.examples[:200]
    prompt = sum(len(e.prompt_ids) for e in sample) / len(sample)
    groups = trainer.plan.groups_per_step * trainer.world_size
    if trainer.online:
        return int(groups * (prompt + trainer.config.num_generations * trainer.config.max_completion_length))
    answers = sum(len(c.ids) for e in sample for c in e.completions) / len(sample)
    return int(groups * (prompt + answers))


def peak_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of a step on the longest rows, by what they are for; see :func:`rlft.models.memory_estimate`."""
    from rlft.models import memory_estimate

    examples = trainer.train_data.examples
    prompt = max(len(e.prompt_ids) for e in examples)
    answer = max((len(c.ids) for e in examples for c in e.completions), default=0)
    row = prompt + (trainer.config.max_completion_length if trainer.online else answer)
    longest = trainer.plan.micro_batch_rows * row
    if (budget := trainer.config.max_tokens_per_micro_batch) is not None:
        group = row * max(1, trainer.plan.micro_batch_rows // trainer.plan.micro_batch_groups)
        least = group if trainer.objective.needs_groups else row  # what is never split
        longest = max(least, min(budget, group * trainer.plan.groups_per_step))
    return memory_estimate(trainer.policy, tokens=longest, gradient_checkpointing=trainer.config.gradient_checkpointing)


def _memory(trainer: Trainer) -> str:
    estimate = peak_memory(trainer)
    parts = ", ".join(f"{name} {byte_size(size)}" for name, size in estimate.items() if size)
    return f"about {byte_size(sum(estimate.values()))} at the longest rows ({parts})"


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


def start(trainer: Trainer, resumed: bool) -> None:
    """The table of what this run optimises, the data report, and one row as it is trained on."""
    if trainer.config.disable_tqdm:
        return
    console = _console()
    resumed_at = f", resumed at step {trainer.step}" if resumed else ""
    console.print(table(f"rlft: {_title(trainer)}{resumed_at}", redact(facts(trainer))))
    report = trainer.train_data.report
    if report.skipped or report.kept != report.rows:
        print(redact(str(report)))
    if trainer.config.checks_itself("sample"):
        _show_sample(trainer, console)


def _show_sample(trainer: Trainer, console: Any) -> None:
    """The first row, decoded with its special tokens; trained tokens in colour, or in brackets where there is none."""
    from rich.text import Text

    from rlft.data import preview

    example = trainer.train_data.examples[0]
    colour = console.is_terminal and not console.no_color
    told = "one prompt as the policy sees it"
    if example.completions:
        told = f"one row as it is trained on ({'trained tokens highlighted' if colour else 'trained tokens in [| |]'})"
    console.print(Text(told, style="bold"))
    text = redact(preview(example, trainer.tokenizer, colour=colour))
    console.print(Text.from_ansi(text) if colour else Text(text), soft_wrap=True)


@contextlib.contextmanager
def progress(trainer: Trainer) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A progress bar on a terminal, a line now and then elsewhere."""
    total = trainer.plan.total_steps
    if trainer.config.disable_tqdm or not trainer.is_main:
        yield lambda values: None
        return
    if not sys.stderr.isatty():
        every = max(1, total // 10)

        def line(values: Mapping[str, float]) -> None:
            if trainer.step % every == 0 or trainer.step == total:
                print(f"step {trainer.step}/{total}  {_numbers(values)}", flush=True)
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
    task = bar.add_task(_title(trainer), total=total, completed=trainer.step, numbers="")

    def show(values: Mapping[str, float]) -> None:
        bar.update(task, completed=trainer.step, numbers=_numbers(values))
        below.plain = meter_line(values) or below.plain

    with Live(Group(bar, below), console=console, refresh_per_second=4):
        yield show


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars of transformers' own: a save is over in a moment, and its bar would cut through ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def end(trainer: Trainer, values: Mapping[str, float]) -> None:
    """The last numbers, and where the time went."""
    if trainer.is_main and not trainer.config.disable_tqdm:
        print(f"done: {trainer.step} steps, saved in {trainer.run_dir}  {_numbers(values)}", flush=True)
        shares = trainer.meter.shares()
        if shares:
            print(f"time: {_shares(shares)}", flush=True)


def say(trainer: Trainer, text: str) -> None:
    """One line from the main process."""
    if trainer.is_main:
        print(redact(text), flush=True)


def note(trainer: Trainer, text: str) -> None:
    """One line in the log of ``rlft``, and on the screen of a run that is not quiet; from the main process."""
    if trainer.is_main:
        logger.info(text)
        if not trainer.config.disable_tqdm:
            print(redact(text), flush=True)


def warn(trainer: Trainer, text: str) -> None:
    """A warning from the main process."""
    import warnings

    if trainer.is_main:
        warnings.warn(redact(text), stacklevel=3)


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
        shown = byte_size(int(value)) if name.endswith("gib") else _count(value) if form.startswith("{} ") else value
        parts.append(form.format(shown))
    return " | ".join(parts)


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def byte_size(number: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
