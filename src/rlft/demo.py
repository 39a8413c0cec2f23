"""A whole run on a laptop's CPU: warm up by SFT, improve by RL against a verifier, compare, draw.

The task: sort eight digits, ``83712045>`` -> ``01234578``. A two-layer transformer built from a config learns it halfway
by supervised training; then LoRA adapters are trained online, with an exact-match verifier alone, by off-policy AGRO, RLOO
and GRPO, several seeds each. Everything is generated here; nothing is downloaded.

On fresh samples AGRO's gradient is RLOO's, tuple by tuple: the two curves coincide, and that is a check, not a mistake.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["ALGORITHMS", "digit_rows", "main", "run_seed"]

DIGITS = 8
HELD_OUT = 400
SFT_STEPS = 60
RL_STEPS = 80
ACCURACY = "eval_rewards/exact_match/mean"
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "agro_off_policy": {"objective": "agro_off_policy", "beta": 0.01},
    "rloo": {"objective": "rloo", "beta": 0.01},
    "grpo": {"objective": "grpo", "beta": 0.01, "epsilon": 0.2},
}


def digit_rows(count: int, *, seed: int, digits: int = DIGITS) -> list[dict[str, str]]:
    """Generated problems with their answers; a seed gives the same rows everywhere."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        text = "".join(source.choice("0123456789") for _ in range(digits))
        rows.append({"prompt": text + ">", "completion": "".join(sorted(text)), "answer": "".join(sorted(text))})
    return rows


def warm_up(seed: int, folder: str) -> None:
    """SFT from scratch; leaves the model in ``folder/sft-<seed>/model``."""
    trainer = _trainer(
        MODEL,
        seed,
        {
            "objective": "sft",
            "per_device_train_batch_size": 128,
            "max_steps": SFT_STEPS,
            "learning_rate": 2e-3,
            "tokenizer": {"kind": "char"},
            "output_dir": f"{folder}/sft-{seed}",
        },
        [{name: row[name] for name in ("prompt", "completion")} for row in digit_rows(128 * SFT_STEPS, seed=seed)],
    )
    trainer.train()


def run_seed(seed: int, algorithm: str, folder: str, steps: int) -> dict[str, Any]:
    """One RL run from the seed's SFT model; returns its held-out accuracies."""
    started = time.perf_counter()
    run = f"{folder}/{algorithm}-{seed}"
    trainer = _trainer(
        f"{folder}/sft-{seed}/model",
        seed,
        {
            "use_peft": True,
            "num_generations": 8,
            "per_device_train_batch_size": 512,
            "per_device_eval_batch_size": HELD_OUT,
            "max_steps": steps,
            "learning_rate": 3e-3,
            "eval_steps": max(1, steps // 6),
            "eval_on_start": True,
            "output_dir": run,
            "run_name": f"{algorithm}-{seed}",
            "rewards": ["exact_match"],
            **ALGORITHMS[algorithm],
        },
        digit_rows(64 * steps, seed=1_000 + seed),
        digit_rows(HELD_OUT, seed=10_000),
    )
    last = trainer.train()
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    before = next(row[ACCURACY] for row in rows if ACCURACY in row)
    after = last[ACCURACY]
    return {
        "algorithm": algorithm,
        "seed": seed,
        "before": before,
        "after": after,
        "seconds": time.perf_counter() - started,
    }


def _trainer(
    model: Any,
    seed: int,
    settings: dict[str, Any],
    train: list[Any],
    held_out: list[Any] | None = None,
) -> Any:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("rlft").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # equal prompts among random ones, groups that earn the same: expected here
    from rlft.trainer import Trainer

    common = {
        "max_prompt_length": DIGITS + 2,
        "max_completion_length": DIGITS + 1,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": [],
    }
    return Trainer(model, {**common, **settings}, train_dataset=train, eval_dataset=held_out)


def main(output: str | Path, *, seeds: int = 3, steps: int | None = None, workers: int | None = None) -> int:
    """Run the demo and leave ``report.html``, ``demo.png`` and ``summary.json`` in ``output``.

    Args:
        output: folder; an earlier demo in it is replaced.
        seeds: runs per algorithm.
        steps: RL steps per run.
        workers: runs at a time.

    Raises:
        ValueError: when the folder cannot be made.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; choose another --output") from error
    steps = steps or RL_STEPS
    count = workers or max(1, min(6, os.cpu_count() or 1))
    started = time.perf_counter()
    jobs = [(seed, algorithm) for seed in range(seeds) for algorithm in ALGORITHMS]
    print(
        f"sorting {DIGITS} digits: SFT for {SFT_STEPS} steps, then RL for {steps}; {len(jobs)} runs, {count} at a time\n"
    )
    results = _run_all(jobs, folder, steps, count)
    (folder / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    _conclude(results, folder, time.perf_counter() - started)
    return 0


def _run_all(jobs: Sequence[tuple[int, str]], folder: Path, steps: int, workers: int) -> list[dict[str, Any]]:
    """Every run in a process of its own: first each seed's SFT, then RL from it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in [pool.submit(warm_up, seed, str(folder)) for seed in sorted({seed for seed, _ in jobs})]:
            future.result()
        print("  SFT finished")
        futures = {job: pool.submit(run_seed, job[0], job[1], str(folder), steps) for job in jobs}
        return _watch(futures, folder, steps, len(jobs))


def _watch(
    futures: Mapping[tuple[int, str], Future[dict[str, Any]]], folder: Path, steps: int, total: int
) -> list[dict[str, Any]]:
    """A line per finished run and a bar over all steps, read from the runs' own logs."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False)
    waiting, results = dict(futures), []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("training", total=total * steps, numbers="")
        while waiting:
            time.sleep(0.5)
            finished = [job for job, future in waiting.items() if future.done()]
            for job in finished:
                result = waiting.pop(job).result()
                results.append(result)
                console.print(
                    f"  {result['algorithm']:<16} seed {result['seed']}: held-out accuracy {result['before']:.3f} -> "
                    f"{result['after']:.3f}  ({result['seconds']:.0f} s)"
                )
            lines = {job: _last_line(folder / f"{job[1]}-{job[0]}" / "metrics.jsonl") for job in waiting}
            moving = sum(int(line.get("step", 0)) for line in lines.values())
            rewards = [line["reward"] for line in lines.values() if "reward" in line]
            text = f"reward {sum(rewards) / len(rewards):.2f}" if rewards else ""
            bar.update(task, completed=len(results) * steps + moving, numbers=text)
    return results


def _last_line(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text().splitlines()
        return json.loads(lines[-1]) if lines else {}
    except (OSError, json.JSONDecodeError):
        return {}


def _conclude(results: Sequence[Mapping[str, Any]], folder: Path, seconds: float) -> None:
    from statistics import mean

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from rlft.report import demo_report

    table = Table(title="held-out accuracy (greedy, exact match)", title_justify="left", box=box.ROUNDED)
    for head in ("algorithm", "seeds", "SFT start", "after RL", "gain in points"):
        table.add_column(head, justify="left" if head == "algorithm" else "right")
    for algorithm in dict.fromkeys(r["algorithm"] for r in results):
        rows = [r for r in results if r["algorithm"] == algorithm]
        before, after = [r["before"] for r in rows], [r["after"] for r in rows]
        gains = [100 * (a - b) for a, b in zip(after, before, strict=True)]
        spread = lambda values, form: f"{mean(values):{form}}  ({min(values):{form}} to {max(values):{form}})"  # noqa: E731
        table.add_row(algorithm, str(len(rows)), spread(before, ".3f"), spread(after, ".3f"), spread(gains, "+.1f"))
    console = Console(highlight=False)
    console.print()
    console.print(table)
    page = demo_report(folder, results)
    console.print(
        "AGRO and RLOO coincide because their gradients are one on fresh samples (docs/agro.md); GRPO's is another."
    )
    console.print(f"curves and report: {page}   ({seconds:.0f} s in all)")


def _clear(folder: Path) -> None:
    """Remove an earlier demo's own files, and nothing else."""
    import shutil

    for name in ("summary.json", "report.html", *(p.name for p in folder.glob("report-*.png")), "demo.png"):
        (folder / name).unlink(missing_ok=True)
    for old in [*folder.glob("sft-*"), *(p for a in ALGORITHMS for p in folder.glob(f"{a}-*"))]:
        if old.is_dir():
            shutil.rmtree(old)
