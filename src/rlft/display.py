"""What a person sees while a run goes: a table of what it optimises, a bar with the few numbers that matter."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["end", "facts", "progress", "quiet_transformers", "say", "start", "table", "warn"]

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
    "eval_reward": "eval reward",
    "eval_rewards/accuracies": "eval acc",
    "eval_loss": "eval loss",
}


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def facts(trainer: Trainer) -> dict[str, str]:
    """What this run optimises, on what, with what: the rows of the table shown before it starts."""
    c, p = trainer.config, trainer.plan
    trainable = sum(t.numel() for t in trainer.policy.parameters() if t.requires_grad)
    total = sum(t.numel() for t in trainer.policy.parameters())
    rows = dict(trainer.objective.describe())
    rows["reference"] = getattr(trainer.policy, "reference_kind", "none").replace("_", " ")
    rows["trains"] = f"{_count(trainable)} of {_count(total)} weights ({trainable / max(1, total):.1%})"
    data = trainer.train_data
    rows["data"] = f"{len(data.examples)} {data.format} rows" + (
        f", {len(trainer.eval_data.examples)} held out" if trainer.eval_data is not None else ""
    )
    if trainer.online:
        rows["samples"] = (
            f"{c.num_generations} per prompt, {p.groups_per_step * c.num_generations * trainer.world_size} per step; "
            f"temperature {c.temperature:g}, at most {c.max_completion_length} tokens"
        )
        rows["rewards"] = ", ".join(
            name if weight == 1 else f"{weight:g} x {name}"
            for name, weight in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)
        )
    else:
        rows["per step"] = f"{p.groups_per_step * trainer.world_size} examples"
    rows["tokens per step"] = f"about {_count(_tokens_per_step(trainer))}"
    rows["steps"] = (
        f"{p.total_steps} ({p.total_steps / p.steps_per_epoch:.2f} epochs), AdamW, lr {c.learning_rate:g} {c.lr_scheduler_type}"
    )
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


def _memory(trainer: Trainer) -> str:
    from rlft.models import memory_estimate

    examples = trainer.train_data.examples
    prompt = max(len(e.prompt_ids) for e in examples)
    answer = max((len(c.ids) for e in examples for c in e.completions), default=0)
    longest = trainer.plan.micro_batch_rows * (
        prompt + (trainer.config.max_completion_length if trainer.online else answer)
    )
    estimate = memory_estimate(
        trainer.policy, tokens=longest, gradient_checkpointing=trainer.config.gradient_checkpointing
    )
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in estimate.items() if size)
    return f"about {_bytes(sum(estimate.values()))} at the longest rows ({parts})"


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
    """The table of what this run optimises, the data report, and one sample as it is trained on."""
    if trainer.config.disable_tqdm:
        return
    console = _console()
    title = trainer.config.run_name or trainer.objective.name
    console.print(table(f"rlft: {title}" + (f", resumed at step {trainer.step}" if resumed else ""), facts(trainer)))
    report = trainer.train_data.report
    if report.skipped or report.kept != report.rows:
        print(report)
    if trainer.train_data.examples[0].completions and sys.stdout.isatty():
        from rlft.data import preview

        console.print("[bold]one example as it is trained on[/] (prompt dim, trained tokens highlighted)")
        print(preview(trainer.train_data.examples[0], trainer.tokenizer))


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

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=_console(stderr=True)) as bar:
        task = bar.add_task(
            trainer.config.run_name or trainer.objective.name, total=total, completed=trainer.step, numbers=""
        )
        yield lambda values: bar.update(task, completed=trainer.step, numbers=_numbers(values))


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
    """One closing line."""
    if trainer.is_main and not trainer.config.disable_tqdm:
        print(f"done: {trainer.step} steps, saved in {trainer.run_dir}  {_numbers(values)}", flush=True)


def say(trainer: Trainer, text: str) -> None:
    """One line from the main process."""
    if trainer.is_main:
        print(text, flush=True)


def warn(trainer: Trainer, text: str) -> None:
    """A warning from the main process."""
    import warnings

    if trainer.is_main:
        warnings.warn(text, stacklevel=3)


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values)


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
