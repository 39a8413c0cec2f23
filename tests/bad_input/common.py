"""What the tests of bad input share: small runs through the doors a user has, and what a message must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rlft import Trainer, cli
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
ANSWERS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(8)]
RANKED = [{"prompt": f"{i}=", "completions": ["a", "bc", "d"], "scores": [1.0, 0.5, 0.0]} for i in range(8)]
PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(8)]

#: A model of a few thousand weights, for runs from the command line.
MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def varied(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that nearly always differs within a group."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def trainer(folder: Path, objective: str, rows: Any, *, model: Any = None, reward: Any = None, **extra: Any) -> Trainer:
    """A run that would work, but for what the test changes: ``extra`` holds settings and arguments of the Trainer.

    A sampler by name is a setting, any other an argument.
    """
    names = ("peft_config", "ref_model", "processing_class", "eval_dataset", "optimizers", "callbacks", "sampler")
    arguments = {n: extra.pop(n) for n in names if n in extra and (n != "sampler" or not isinstance(extra[n], str))}
    arguments.setdefault("processing_class", char_tokenizer())
    given = extra.pop("objective_given", None)
    online = {"num_generations": 4, "per_device_train_batch_size": 8} if reward is not None else {}
    args = {
        "objective": objective, "output_dir": str(folder / "run"), "max_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "max_prompt_length": 8, "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
        **online, **extra,
    }  # fmt: skip
    return Trainer(
        tiny_llama() if model is None else model, args, objective=given, train_dataset=rows, reward_funcs=reward, **arguments
    )  # fmt: skip


def refused(build: Callable[[], Any], *words: str, kind: type[Exception] = ValueError) -> str:
    """``build`` raises ``kind``, and the message holds every one of ``words``: field, value, remedy."""
    with pytest.raises(kind) as caught:
        build()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


def refused_by_command(
    capsys: pytest.CaptureFixture[str], folder: Path, *words: str, rows: Any = None, code: int = 2, **settings: Any
) -> str:
    """``rlft train config`` says why not in one line, exits with ``code`` and leaves no step behind."""
    returned, said = command(capsys, folder, rows=rows, **settings)
    assert returned == code, said
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in: {said}"
    assert "Traceback" not in said
    assert not list((folder / "run").glob("checkpoint-*"))
    assert not (folder / "run" / "metrics.jsonl").exists()
    return said


def command(capsys: pytest.CaptureFixture[str], folder: Path, *, rows: Any = None, **settings: Any) -> tuple[int, str]:
    """``rlft train`` on a file of settings; its exit code, and what it printed."""
    data = folder / "train.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in (ANSWERS if rows is None else rows)))
    base = {
        "objective": "sft", "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(data), "max_steps": 2,
        "per_device_train_batch_size": 4, "output_dir": str(folder / "run"), "report_to": [], "disable_tqdm": True,
        "max_prompt_length": 8, "max_completion_length": 6,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps({**base, **settings}))  # JSON is YAML; NaN and Infinity are written as their words
    capsys.readouterr()
    returned = cli.main(["train", str(path)])
    captured = capsys.readouterr()
    return returned, captured.out + captured.err


def state(t: Trainer) -> dict[str, Tensor]:
    """Weights and optimizer moments, by name."""
    found = {name: p.detach().clone() for name, p in t.policy.named_parameters()}
    for index, values in enumerate(t.optimizer.state.values()):
        found |= {f"moment {index} {k}": v.detach().clone() for k, v in values.items() if isinstance(v, Tensor)}
    return found


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return before.keys() == after.keys() and all(
        before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before
    )


def stops(t: Trainer, *words: str, kind: type[Exception], at: int = 0) -> str:
    """The run stops with ``kind`` after ``at`` steps, with the weights and moments of step ``at`` and its checkpoint."""
    states = {0: state(t)}
    t.callbacks.append(lambda event, run, values: states.update({run.step: state(run)}) if event == "step" else None)
    message = refused(t.train, *words, kind=kind)
    assert t.step == at
    assert same(states[at], state(t))
    assert all(p.grad is None for p in t.policy.parameters())
    assert max((int(path.name.split("-")[1]) for path in t.run_dir.glob("checkpoint-*")), default=0) == at
    return message


def once(records: list[Any], *words: str) -> None:
    """Exactly one log record holds all of ``words``."""
    found = [r.getMessage() for r in records if all(word in r.getMessage() for word in words)]
    assert len(found) == 1, [r.getMessage() for r in records]
