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
from rlft.rules.comparisons import plays, wants_pairs
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
TENSORS = {"teacher_kl", "step_labels"}


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
    if plays(objective):
        return PROMPTS
    if {"rewards", "advantages", "returns", "weights", "group_ids"} & needs:
        of_policy = objective.on_policy_only or "behaviour_log_ratio" in needs
        return PROMPTS if of_policy or objective.advantage == "gae" or objective.kl == "reward" else RANKED
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
    if objective.trust_region is not None:
        del settings["learning_rate"]  # the step has no optimizer
    if rows is PROMPTS:
        settings |= {"num_generations": 4, "per_device_train_batch_size": 8}
        settings |= {"mixture_coef": 0.5} if plays(objective) else {}
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


def of_pairs() -> list[str]:
    """Objectives on pairs of answers, but for those that train a reward model."""
    built = {name: recipes.build(name, **hyper_of(name)) for name in recipes.names()}
    return [name for name, o in built.items() if wants_pairs(o) and "scores" not in o.needs]


def hyper_of(name: str) -> dict[str, Any]:
    function = recipes.RECIPES.get(name) or getattr(losses, name)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: HYPER.get(p.name, 0.5) for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


@pytest.mark.parametrize("name", of_pairs())
def test_pair_objectives_train_online_from_yaml(tmp_path: Path, name: str) -> None:
    """Prompts and a reward in place of pairs, and nothing else: answers are sampled and paired."""
    settings = {
        "objective": name, "objective_args": hyper_of(name), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "learning_rate": 0.01, "num_generations": 4, "per_device_train_batch_size": 8, "pair_selection": "all",
        "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    t = Trainer(
        tiny_llama(), load_config(path), train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=shape
    )
    before = {n: p.detach().clone() for n, p in t.policy.named_parameters() if p.requires_grad}
    values = t.train()
    assert math.isfinite(values["loss"])
    assert values["grad_norm"] > 0
    assert 0 <= values["pairs/tied_fraction"] < 1
    assert any(not torch.equal(before[n], p) for n, p in t.policy.named_parameters() if n in before)


def shape(completions: list[str], **columns: Any) -> list[float]:
    """Two answers seldom earn the same."""
    return [sum(map(ord, text)) / 500 for text in completions]
