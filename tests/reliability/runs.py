"""Tiny runs, started as a user starts them (YAML and ``rlft train``), and what two runs must have in common."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from rlft import checkpoint
from rlft._json import canonical
from rlft._metrics_log import comparable, read_metrics
from rlft.models.vocabulary import train_tokenizer

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
#: Names the fault of the next reward calls, ``kind:call``: raise, hang, nan or slow, at that call of this process.
FAULT = "RLFT_TEST_REWARD"
SAVE_STEPS = 2
TIMEOUT = 2.0  # seconds a reward may take

_COMMON = {
    "model": MODEL, "tokenizer": {"kind": "char"}, "learning_rate": 1e-2, "max_prompt_length": 8, "max_completion_length": 4,
    "save_steps": SAVE_STEPS, "self_checks": False, "disable_tqdm": True, "report_to": [], "lr_scheduler_type": "cosine", "warmup_steps": 2,
}  # fmt: skip
_LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
_ONLINE = {"num_generations": 4, "per_device_train_batch_size": 8, "rewards": ["tests.reliability.runs:digits"], "reward_timeout": TIMEOUT,
           "per_device_eval_batch_size": 3}  # fmt: skip

#: name -> settings. Between them: epoch boundaries, the short last batch of an epoch, accumulation, dropout (so that the
#: random state matters), saves in the middle of a generation that is reused, replay, a critic, refills, evaluation that does
#: not fall on the last step, all weights and adapters.
RUNS: dict[str, dict[str, Any]] = {
    # 14 pairs in batches of 4: an epoch is three full batches and one of two; two epoch boundaries in nine steps
    "dpo": {"objective": "dpo", "beta": 0.1, "precompute_ref_log_probs": True, **_LORA, "lora_dropout": 0.1, "disable_dropout": False, "max_steps": 9,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_steps": 4, "eval_on_start": True, "logging_steps": 2},
    # one generation feeds two steps, twice: saves fall inside it
    "grpo": {"objective": "grpo", "beta": 0.04, "epsilon": 0.2, **_LORA, **_ONLINE, "max_steps": 7, "steps_per_generation": 2,
             "num_iterations": 2, "eval_steps": 3},
    "agro": {"objective": "agro_off_policy", "beta": 0.05, **_LORA, **_ONLINE, "max_steps": 6, "replay_probability": 0.5,
             "sync_ref_model": True, "ref_model_sync_steps": 3, "eval_steps": 4, "self_checks": True},
    "ppo": {"objective": "ppo", **_ONLINE, "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "steps_per_generation": 4, "logging_steps": 3},
    "dapo": {"objective": "dapo", **_LORA, **_ONLINE, "max_steps": 5, "dynamic_sampling": True, "max_refills": 2},
    # two answers that often earn the same: on several processes each draws again as often as it must
    "refills": {"objective": "dapo", **_LORA, **_ONLINE, "rewards": ["tests.reliability.runs:parity"], "num_generations": 2,
                "per_device_train_batch_size": 4, "max_steps": 6, "dynamic_sampling": True, "max_refills": 4},
    # rows read from the file while training goes on, past its end, drawn from a buffer
    "stream": {"objective": "dpo", "beta": 0.1, **_LORA, "streaming": True, "shuffle_buffer": 5, "max_steps": 9,
               "per_device_train_batch_size": 4, "eval_steps": 4},
    # workers that tokenise before the first step: two epoch boundaries, the last step of each a short one
    "map_workers": {"objective": "dpo", "beta": 0.1, **_LORA, "max_steps": 9, "per_device_train_batch_size": 4, "eval_steps": 4,
                    "dataloader_num_workers": 2},
    # workers that read ahead, past the end of the file, with rows drawn from a buffer
    "stream_workers": {"objective": "dpo", "beta": 0.1, **_LORA, "streaming": True, "shuffle_buffer": 5, "max_steps": 9,
                       "per_device_train_batch_size": 4, "eval_steps": 4, "dataloader_num_workers": 2},
}  # fmt: skip
_LONG = {"eval_steps": None, "eval_on_start": False, "save_steps": 500, "logging_steps": 50}


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Share of digits; the environment may ask for a failure at one call."""
    kind, _, call = os.environ.get(FAULT, "").partition(":")
    digits.calls += 1  # type: ignore[attr-defined]
    if kind and digits.calls == int(call):  # type: ignore[attr-defined]
        if kind == "raise":
            raise KeyError("no such problem")
        if kind == "hang":
            time.sleep(600)
        if kind == "nan":
            return [0.0, float("nan"), *[0.0] * (len(completions) - 2)]
    if kind == "slow":
        time.sleep(0.15)
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


digits.calls = 0  # type: ignore[attr-defined]


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Whether the sum of the ids is odd."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def write_configs(root: Path) -> dict[str, Path]:
    """Data and one YAML file per run under ``root``; also ``soak_dpo`` and ``soak_grpo`` of 2,000 steps."""
    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(14)]
    held = [{"prompt": f"{i}+{i + 1}=", "chosen": str(2 * i + 1), "rejected": str(i)} for i in range(5)]
    for name, listed in (("train", rows), ("eval", held)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    train_tokenizer(rows, kind="char").save_pretrained(root / "tokenizer")
    listed = {name: dict(run) for name, run in RUNS.items()}
    listed |= {f"soak_{name}": {**RUNS[name], **_LONG, "max_steps": 2000} for name in ("dpo", "grpo")}
    paths = {}
    for name, run in listed.items():
        settings = {**_COMMON, **run, "train_data": str(root / "train.jsonl")}
        if run.get("streaming"):  # a tokenizer made from the data needs all of it
            settings["tokenizer"] = str(root / "tokenizer")
        if run.get("eval_steps") or run.get("eval_on_start"):
            settings["eval_data"] = str(root / "eval.jsonl")
        paths[name] = root / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(settings))
    return paths


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 when there is none."""
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    steps += [
        int(path.name.split("-")[1]) for path in folder.glob(".old-[0-9]*")
    ]  # set aside: put back at the next start
    return max(steps, default=0)


def unloadable(folder: Path) -> list[str]:
    """Every checkpoint that does not verify and load, with the reason."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            checkpoint.load(path)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def leftovers(folder: Path) -> list[str]:
    """Hidden names beside the lock: what a stopped run should have cleared."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock")


#: Of a run's counters: bytes of the log depend on how many digits a time has, and where a run began from is no result.
_NO_RESULT = ("log_offset", "resumed_from")


def digest(folder: Path, step: int | None = None) -> dict[str, str]:
    """SHA-256 of each part of a run's end: tensors by file, records, the log without the clock, the exported model.

    Args:
        folder: of the run.
        step: of the checkpoint to read; default the newest.
    """
    path = folder / f"checkpoint-{newest(folder) if step is None else step}"
    found = checkpoint.load(path)
    parts = {f"tensors/{stem}": checkpoint.fingerprint(named) for stem, named in found.tensors.items()}
    for rank in range(1, found.manifest.world_size):  # what that process alone knows
        own = checkpoint.load(path, rank=rank)
        parts |= {f"tensors/{s}/{rank}": checkpoint.fingerprint(t) for s, t in own.tensors.items() if s in own.own}
        values = {stem: record for stem, record in own.records.items() if stem in own.own}
        values["counters"] = {k: v for k, v in values.get("counters", {}).items() if k not in _NO_RESULT}
        parts |= {f"records/{s}/{rank}": hashlib.sha256(canonical(record)).hexdigest() for s, record in values.items()}
    for stem, record in found.records.items():
        if stem == "trainer":
            record = {key: value for key, value in record.items() if key not in _NO_RESULT}
        if stem == "config":
            record = {
                key: value
                for key, value in record.items()
                if key
                not in ("output_dir", "resume", "ref_cache_dir", "dataloader_num_workers", "report", "self_checks")
            }
        parts[f"records/{stem}"] = hashlib.sha256(canonical(record)).hexdigest()
    if step is None:
        rows = comparable(read_metrics(folder))
        parts["metrics"] = hashlib.sha256(canonical(rows)).hexdigest()
        for path in sorted((folder / "model").rglob("*")):
            if path.is_file():
                parts[f"model/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return parts
