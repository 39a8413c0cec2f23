"""Small runs from a YAML file, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer, checkpoint
from rlft.config import load_config
from rlft.errors import Interrupted
from rlft.run import display
from tests.tiny import char_tokenizer, tiny_llama

PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(12)]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that nearly always differs within a group."""
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def run(folder: Path, objective: str, *, kind: type[Trainer] = Trainer, **extra: Any) -> Trainer:
    """A run whose settings went through a YAML file; online unless ``rows`` are pairs."""
    arguments = {name: extra.pop(name) for name in ("sampler", "ref_model", "callbacks") if name in extra}
    model, rows = extra.pop("model", None), extra.pop("rows", PROMPTS)
    online = extra.pop("online", rows is not PAIRS)
    extra |= {"ref_model": extra.pop("ref_folder")} if "ref_folder" in extra else {}
    settings = {
        "objective": objective, "output_dir": str(folder / "run"), "max_steps": 4, "learning_rate": 1e-2,
        "per_device_train_batch_size": 8 if online else 4, "max_prompt_length": 8, "max_completion_length": 4,
        "disable_tqdm": True, "report_to": [], **({"num_generations": 4} if online else {}), **extra,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return kind(
        tiny_llama() if model is None else model,
        load_config(path),
        train_dataset=rows,
        processing_class=char_tokenizer(),
        reward_funcs=varied if online else None,
        **arguments,
    )


def facts(t: Trainer) -> dict[str, str]:
    """The rows of the table that is shown before a run."""
    return display.facts(t.parts, kl_control=t.kl_control, sampling=t.sampling, trust_region=t.trust_region)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the clock."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (k.endswith("_time") or k.startswith("meter/"))} for row in rows]


def bits(t: Trainer) -> str:
    """A fingerprint of every weight (the reference's too) and of the optimizer's moments."""
    moments, _ = checkpoint.optimizer_to_tensors(
        t.optimizer, [n for n, p in t.policy.named_parameters() if p.requires_grad]
    )
    own = {name: p.detach() for name, p in t.policy.named_parameters()}
    ref = {f"ref.{name}": p for name, p in t.policy.reference_state().items()}
    return checkpoint.fingerprint({**own, **ref, **moments})


def resumed_equals_whole(folder: Path, objective: str, stop: int, **extra: Any) -> Trainer:
    """Stop a run after step ``stop``, continue it in a fresh one, and compare bits and log with a run never stopped."""
    whole = run(folder / "whole", objective, **extra)
    whole.train()

    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = run(folder / "cut", objective, callbacks=[interrupt], **extra)
    with pytest.raises(Interrupted, match=f"after step {stop}"):
        cut.train()
    torch.manual_seed(123)  # whatever the new process drew before
    resumed = run(folder / "cut", objective, **extra)
    resumed.train()
    assert bits(resumed) == bits(whole)
    assert log_of(folder / "cut") == log_of(folder / "whole")
    return resumed
