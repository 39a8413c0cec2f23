"""Every objective that has a name is reached from a YAML file and trained for two steps by the one trainer."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer, losses, recipes
from rlft.config import load_config
from rlft.types import Batch
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [
    {
        "prompt": f"{i}+{i}=",
        "chosen": str(2 * i),
        "rejected": str(2 * i + 1),
        "margin": 0.5 + i,
        "win_rates": [0.8, 0.2],
    }
    for i in range(8)
]
ANSWERS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "scores": i / 8} for i in range(8)]
THUMBS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i + i % 2), "label": i % 2 == 0} for i in range(8)]
RANKED = [
    {
        "prompt": f"{i}=",
        "completions": ["a", "bc", "d"],
        "scores": [1.0, 0.5, 0.0],
        "weights": [1.0, 0.5, 0.5],
        "win_rates": [0.9, 0.5, 0.1],
    }
    for i in range(8)
]
PROMPTS = [{"prompt": f"{i}="} for i in range(8)]
#: Hyper-parameters without a default.
HYPER: dict[str, Any] = {
    "beta": 0.1,
    "clip_eps": 0.2,
    "length": 6,
    "divergence": "js",
    "f": "logistic",
    "label_smoothing": 0.1,
    "clip_eps_high": 0.3,
}
#: Tensors [B, T] that no dataset column can hold: a subclass makes them in ``prepare``.
TENSORS = {"behaviour_log_ratio", "behaviour_log_ratio_sq", "token_log_ratio_sq", "teacher_kl", "step_labels"}


class WithTensors(Trainer):
    """What a user of such an objective writes."""

    def prepare(self, batch: Batch) -> Batch:
        made = {name: torch.full(batch.mask.shape, 0.1) for name in TENSORS & self.objective.columns}
        return super().prepare(batch.replace(extras={**batch.extras, **made}))


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def rows_for(objective: Any) -> list[dict[str, Any]]:
    needs = objective.needs
    if objective.needs_pairs or objective.name == "ld_dpo":
        return PAIRS
    if "labels" in needs:
        return THUMBS
    if {"rewards", "advantages", "returns", "weights", "win_rates", "group_ids"} & needs:
        return PROMPTS if objective.advantage == "gae" or objective.kl == "reward" else RANKED
    return ANSWERS


@pytest.mark.parametrize("name", recipes.names())
def test_trains_from_yaml(tmp_path: Path, name: str) -> None:
    function = recipes.RECIPES.get(name) or getattr(losses, name)
    needed = {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    }
    hyper = {key: HYPER.get(key, 0.5) for key in sorted(needed)}
    objective = recipes.build(name, **hyper)
    rows = rows_for(objective)
    # losses with advantages but no way to them yet: the axis is a setting like any other
    if objective.advantage == "given":
        hyper["advantage"] = "leave_one_out"
    if "returns" in objective.needs and objective.advantage != "gae":
        pytest.skip("value_loss alone has no returns: it is a term of ppo")
    settings = {
        "objective": name, "objective_args": hyper, "output_dir": str(tmp_path / "run"), "max_steps": 2, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    if rows is PROMPTS:
        settings |= {"num_generations": 4, "per_device_train_batch_size": 8}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    scorer = "scores" in objective.needs
    t = WithTensors(
        tiny_llama(**({"head": "classifier", "num_labels": 1} if scorer else {})),
        load_config(path),
        train_dataset=rows,
        processing_class=char_tokenizer(),
        reward_funcs=digits if rows is PROMPTS else None,
    )
    before = {n: p.detach().clone() for n, p in t.policy.named_parameters() if p.requires_grad}
    values = t.train()
    assert math.isfinite(values["loss"])
    assert values["grad_norm"] > 0
    assert any(not torch.equal(before[n], p) for n, p in t.policy.named_parameters() if n in before)
