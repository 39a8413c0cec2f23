"""Run by test_signals_of_two.py on two processes: a signal to one of them, at every place where both are busy."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlft import Trainer, checkpoint
from rlft.errors import Interrupted
from tests.tiny import char_tokenizer, tiny_llama

torch.set_num_threads(1)

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(16)]
PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(16)]
#: Seconds that the work would last, and the most that leaving it may take on a busy machine.
LONG, SOON = 24.0, 10.0
AT = 1  # finished steps when the signal comes
#: What is slow on both processes -> settings of the run.
PLACES: dict[str, dict[str, Any]] = {
    "reward": {"online": True},
    "sampling": {"online": True},
    "evaluation": {"online": True, "held_out": PROMPTS[:4], "eval_steps": 1},
    "the other's reward": {"online": True},
    "offline evaluation": {"online": False, "held_out": PAIRS[:8], "eval_steps": 1, "per_device_eval_batch_size": 1},
    "micro-batches": {"online": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}


def digits(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def make(folder: Path, settings: dict[str, Any], reward: Any = digits) -> Trainer:
    extra = dict(settings)
    online, held_out = extra.pop("online"), extra.pop("held_out", None)
    args = {
        "objective": "grpo" if online else "dpo", "beta": 0.1, "output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "max_prompt_length": 8, "max_completion_length": 4, "disable_tqdm": True, "report_to": [],
        "self_checks": False, **({"num_generations": 4} if online else {}), **extra,
    }  # fmt: skip
    model = tiny_llama(hidden_size=16, num_hidden_layers=1)
    data = {
        "train_dataset": PROMPTS if online else PAIRS,
        "eval_dataset": held_out,
        "processing_class": char_tokenizer(),
    }
    return Trainer(model, args, reward_funcs=reward if online else None, **data)


def slow(t: Trainer, place: str, begin: Callable[[], None]) -> None:
    """Let one stage last ``LONG`` seconds from step ``AT`` on; ``begin`` is called as it begins."""

    def wait() -> None:
        begin()
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            t.poll()
            time.sleep(0.05)

    sample, forward, compute = t.sampler.sample if t.sampler else None, t.forward, t.compute_loss
    evaluate, evaluations = t.evaluate, list[int]()

    def noted_evaluation(*args: Any) -> Any:
        evaluations.append(t.step)
        try:
            return evaluate(*args)
        finally:
            evaluations.pop()

    def slow_sample(*args: Any, **options: Any) -> Any:
        if t.step == AT and bool(evaluations) is (place == "evaluation"):
            wait()
        assert sample is not None
        return sample(*args, **options)

    def slow_forward(*args: Any) -> Any:
        if t.step == AT and evaluations:
            begin()
            time.sleep(LONG / 12)
        return forward(*args)

    def slow_loss(*args: Any) -> Any:
        if t.step == AT:
            begin()
            time.sleep(LONG / 12)
        return compute(*args)

    t.evaluate = noted_evaluation  # pyright: ignore[reportAttributeAccessIssue]
    if place in ("sampling", "evaluation"):
        t.sampler.sample = slow_sample
    elif place == "offline evaluation":
        t.forward = slow_forward  # pyright: ignore[reportAttributeAccessIssue]
    elif place == "micro-batches":
        t.compute_loss = slow_loss  # pyright: ignore[reportAttributeAccessIssue]


def bits(t: Trainer) -> str:
    names = [n for n, p in t.policy.named_parameters() if p.requires_grad]
    moments, _ = checkpoint.optimizer_to_tensors(t.optimizer, names)
    return checkpoint.fingerprint({**{n: p.detach() for n, p in t.policy.named_parameters()}, **moments})


def cut(folder: Path, place: str) -> dict[str, Any]:
    """A run that is stopped at ``place`` by a signal to process 1, and its continuation."""
    begun: list[float] = []
    rank = int(os.environ["RANK"])

    def begin() -> None:
        if not begun:
            begun.append(time.monotonic())
            if rank == 1:  # once both are at it
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def reward(completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> list[float]:
        if trainer_state.global_step == AT and trainer_state.is_training and place.endswith("reward"):
            begin()
            if (
                place == "reward" or rank == 0
            ):  # else process 1 is through, and waits for the other when the signal comes
                time.sleep(LONG)
        return digits(completion_ids)

    reward.__name__ = digits.__name__  # a run does not go on with another reward
    t = make(folder, PLACES[place], reward)
    slow(t, place, begin)
    said = ""
    try:
        t.train()
    except Interrupted as error:
        said = f"Interrupted: {error}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begun[0]
    newest = checkpoint.find_latest(folder)
    again = make(folder, PLACES[place])
    again.train()
    return {"said": said, "step": t.step, "took": took, "saved": newest and newest.name, "bits": bits(again)}


def main(folder: Path) -> None:
    """Every place, and the same run without a signal."""
    found, whole = {}, dict[str, str]()
    for place, settings in PLACES.items():
        key = json.dumps(settings, sort_keys=True)
        if key not in whole:
            t = make(folder / place / "whole", settings)
            t.train()
            whole[key] = bits(t)
        found[place] = {"whole": whole[key], **cut(folder / place / "cut", place)}
        print(place, found[place], flush=True)
    (folder / f"found{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
