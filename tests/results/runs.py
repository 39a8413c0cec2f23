"""The measured runs: which configurations, in which order, for which seeds; two processes of one thread each.

Every stage is a shipped configuration with three settings replaced: the seed, the folder, and the folder of the model it
starts from. Numbers are kept as JSON in ``runs/results`` and written to ``docs/results.md`` by :mod:`tests.results.page`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DATA = Path(os.environ.get("RLFT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = ROOT / "runs" / "results"
SEEDS = (0, 1, 2)
WORKERS = 2

#: Configurations that run on real data with small models, in their order.
SMALL = (
    "polite_pairs/sft.yaml", "polite_pairs/reward_model.yaml", "polite_pairs/dpo.yaml", "polite_pairs/ipo.yaml",
    "polite_pairs/agro.yaml", "word_problems/sft.yaml", "word_problems/agro.yaml", "word_problems/rloo.yaml",
    "word_problems/grpo.yaml", "thumbs/kto.yaml", "gsm8k/sft.yaml", "gsm8k/agro.yaml",
)  # fmt: skip

needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k" / "train.jsonl").is_file(),
    reason="the real data is not here: set RLFT_DATA to the folder that holds gsm8k, polite_pairs, thumbs, word_problems",
)


def stage(
    name: str,
    folder: Path,
    seed: int,
    *,
    start: str | None = None,
    also: Any = None,
    run: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run ``configs/<name>.yaml`` to its end.

    Args:
        name: of the configuration, without the ending.
        folder: of all runs of one seed; this one goes to ``folder/name``.
        seed: replaces the configuration's.
        start: the run in ``folder`` whose model this one starts from.
        also: further rows to evaluate on, before and after training.
        run: the name of the run's folder, where it is not the configuration's.
        settings: that replace the configuration's.

    Returns:
        ``first`` and ``last``: the evaluations before and after training (``first`` is None where there was none);
        ``also_first`` and ``also_last``: the same on ``also``; ``seconds``: wall and CPU time of the whole stage; ``steps``;
        ``trained`` and ``held_out``: numbers of examples; ``sampled_first`` and ``sampled_last``: mean reward of the answers
        of the first and of the last ten generations.
    """
    from rlft.config import load_config
    from rlft.trainer import Trainer

    os.environ.setdefault("RLFT_DATA", str(DATA))
    values = load_config(CONFIGS / f"{name}.yaml").to_dict()
    target = folder / (run or name)
    values |= settings | {"seed": seed, "output_dir": str(target), "report_to": [], "disable_tqdm": True}
    if start is not None:
        values["model"] = str(folder / start / "model")
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = Trainer(args=values)
    also_first = trainer.evaluate(also) if also else {}
    last = trainer.train()
    also_last = trainer.evaluate(also) if also else {}
    lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if any(key.startswith("eval_") for key in line)]
    first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    sampled = [line["reward"] for line in lines if "reward" in line]
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {
        "first": first, "last": last, "also_first": also_first, "also_last": also_last, "seconds": seconds, "steps": trainer.step,
        "trained": len(trainer.train_data.examples), "held_out": len(trainer.eval_data.examples),
        "sampled_first": fmean(sampled[:10] or [0.0]), "sampled_last": fmean(sampled[-10:] or [0.0]),
    }  # fmt: skip


def each_seed(
    job: Callable[[Path, int], dict[str, Any]], folder: Path, name: str, seeds: Sequence[int] = SEEDS
) -> list[dict[str, Any]]:
    """``job(folder, seed)`` for every seed, two at a time; records in ``runs/results/<name>.json``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(job, folder / f"seed-{seed}", seed) for seed in seeds]
        records = [future.result() for future in futures]
    save(name, records)
    return records


def _one_thread() -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # the data report of every stage: repeated rows and the like


def save(name: str, records: Sequence[dict[str, Any]]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(list(records), indent=2) + "\n", encoding="utf-8")


def rows_of(path: str) -> list[dict[str, Any]]:
    with (DATA / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# -- the jobs -------------------------------------------------------------------------------------------------------
def polite_pairs(folder: Path, seed: int) -> dict[str, Any]:
    """SFT, then a reward model, DPO, IPO and AGRO, each from the SFT model."""
    sft = stage("polite_pairs/sft", folder, seed)
    record: dict[str, Any] = {"seed": seed, "sft": {"loss": sft["last"]["eval_loss"], "seconds": sft["seconds"]}}
    for name in ("reward_model", "dpo", "ipo", "agro"):
        run = stage(f"polite_pairs/{name}", folder, seed, start="polite_pairs/sft")
        last = run["last"]
        record |= {"trained": run["trained"], "held_out": run["held_out"]}
        record[name] = {"seconds": run["seconds"], "steps": run["steps"]}
        if name == "reward_model":
            record[name] |= {"implicit": last["eval_accuracy"]}
            continue
        record[name] |= {
            "implicit": last["eval_rewards/accuracies"],
            "raw": last["eval_logps/accuracies"],
            "chosen": last["eval_logps/chosen"] - run["first"]["eval_logps/chosen"],
            "rejected": last["eval_logps/rejected"] - run["first"]["eval_logps/rejected"],
        }
        record["sft"]["raw"] = run["first"]["eval_logps/accuracies"]
    return record


#: Row of the table -> the configuration, and what differs from it.
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "rloo": ("rloo", {}),
    "agro": ("agro", {}),
    "grpo": ("grpo", {}),
    "grpo_2": ("grpo", {"num_iterations": 2, "max_steps": 320, "eval_steps": 160}),
}


def word_problems(folder: Path, seed: int) -> dict[str, Any]:
    """SFT on a quarter of the training rows, then RLOO, AGRO and GRPO on the rest, each from the SFT model."""
    seen = {row["prompt"] for row in rows_of("word_problems/train.jsonl")}
    unseen = [row for row in rows_of("word_problems/dev.jsonl") if row["prompt"] not in seen]
    sft = stage("word_problems/sft", folder, seed)
    record: dict[str, Any] = {"seed": seed, "sft": {"loss": sft["last"]["eval_loss"], "seconds": sft["seconds"]}}
    record["unseen_rows"] = len(unseen)
    for name, (config, settings) in ONLINE.items():
        start, target = "word_problems/sft", f"word_problems/{name}"
        run = stage(f"word_problems/{config}", folder, seed, start=start, also=unseen, run=target, **settings)
        record["sft"] |= {"all": run["first"]["eval_reward"], "unseen": run["also_first"]["eval_reward"]}
        record[name] = {
            "all": run["last"]["eval_reward"], "unseen": run["also_last"]["eval_reward"],
            "sampled_first": run["sampled_first"], "sampled_last": run["sampled_last"],
            "kl": run["last"]["kl"], "entropy": run["last"]["entropy"], "steps": run["steps"], "seconds": run["seconds"],
        }  # fmt: skip
    return record


def formats(folder: Path, seed: int) -> dict[str, Any]:
    """KTO on conversations, and GSM8K through SFT and one online step: that the real formats go through."""
    kto = stage("thumbs/kto", folder, seed)
    sft = stage("gsm8k/sft", folder, seed)
    agro = stage("gsm8k/agro", folder, seed, start="gsm8k/sft")
    keep = (
        "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_reward", "eval_completions/clipped_ratio", "reward",
    )  # fmt: skip
    return {"seed": seed} | {
        name: {key: run["last"][key] for key in keep if key in run["last"]}
        | {"steps": run["steps"], "seconds": run["seconds"]}
        for name, run in (("kto", kto), ("sft", sft), ("agro", agro))
    }
