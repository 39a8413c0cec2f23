"""Every shipped configuration: it loads, its objective builds, and its settings are no contradiction."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from rlft import rules
from rlft.config import Config, load_config
from rlft.rewards import load_reward
from rlft.run.setup.build import objective_for
from rlft.trainer import Trainer
from tests.results.runs import CONFIGS, DATA, SMALL, needs_data

RUNS = sorted(p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "accelerate")
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def test_nothing_is_left_out() -> None:
    assert {str(p) for p in RUNS} >= {str(p) for p in SMALL}
    assert {p.stem for p in LAUNCHERS} == {"cpu", "ddp", "fsdp"}
    outputs = [load_config(CONFIGS / p).output_dir for p in RUNS]
    assert len(set(outputs)) == len(outputs), "two configurations share a folder"


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_configuration_builds(path: Path) -> None:
    config = load_config(CONFIGS / path)
    objective = objective_for(config, None)
    rules.check_settings(config, objective, online=bool(config.rewards))
    for reward in config.rewards:
        if not (isinstance(reward, str) and reward.startswith("runs/")):
            assert callable(load_reward(reward))
    assert config.output_dir == f"runs/{path.with_suffix('')}"


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_a_later_stage_starts_where_an_earlier_one_ends(path: Path) -> None:
    outputs = {load_config(CONFIGS / p).output_dir for p in RUNS}
    config = load_config(CONFIGS / path)
    for name in [config.model, *config.rewards]:
        if isinstance(name, str) and name.startswith("runs/"):
            assert name.removesuffix("/model") in outputs - {config.output_dir}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_launcher_is_understood_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes > 1
    assert loaded.mixed_precision == "no"


# -- the real formats, two steps each -------------------------------------------------------------------------------
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
ROWS = 64


def first_rows(path: str) -> list[dict[str, Any]]:
    with (DATA / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(ROWS), strict=False)]


def short(path: Path, folder: Path) -> dict[str, float]:
    """Two steps of a configuration on the head of its file, with a smaller model and smaller batches."""
    values = load_config(CONFIGS / path).to_dict()
    source = {name: str(values[name]).replace("${RLFT_DATA}/", "") for name in ("train_data", "eval_data")}
    online = bool(values["rewards"])
    values |= {
        "output_dir": str(folder / path.with_suffix("")), "max_steps": 2, "warmup_steps": 0, "train_slice": None, "report_to": [],
        "eval_steps": None, "disable_tqdm": True, "per_device_eval_batch_size": 8, "train_data": None, "eval_data": None,
        "eval_rows": None, "per_device_train_batch_size": 32 if online else 4, "max_bad_fraction": 0.5,
    }  # fmt: skip
    if isinstance(values["model"], dict):
        values |= {"model": {**values["model"], **TINY}, "tokenizer": {**values["tokenizer"], "vocab_size": 400}}
    else:
        values["model"] = values["model"].replace("runs/", f"{folder}/")
    values["rewards"] = [r.replace("runs/", f"{folder}/") if isinstance(r, str) else r for r in values["rewards"]]
    rows = first_rows(source["train_data"])
    held = first_rows(source["eval_data"])[:8] if source["eval_data"] != "None" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # what the data report says of 64 rows
        trainer = Trainer(args=Config.from_dict(values), train_dataset=rows, eval_dataset=held)
        return trainer.train()


CHAINS = {
    "polite_pairs": ["sft", "reward_model", "dpo", "ipo", "agro", "online_dpo", "bpo", "nash_md", "ipo_md"],
    "word_problems": ["sft", "agro", "rloo", "grpo", "expert_iteration"],
    "thumbs": ["kto"],
    "gsm8k": ["sft", "agro"],
}
PAIR_METRIC = "eval_rewards/accuracies"
EXPECTED = {
    "polite_pairs/sft": "eval_loss", "polite_pairs/reward_model": "eval_accuracy", "polite_pairs/dpo": PAIR_METRIC,
    "polite_pairs/ipo": PAIR_METRIC, "polite_pairs/agro": PAIR_METRIC, "word_problems/sft": "eval_loss",
    "word_problems/agro": "eval_reward", "word_problems/rloo": "eval_reward", "word_problems/grpo": "eval_reward",
    "polite_pairs/online_dpo": "eval_reward", "polite_pairs/bpo": "eval_reward", "polite_pairs/nash_md": "eval_reward",
    "polite_pairs/ipo_md": "eval_reward", "word_problems/expert_iteration": "eval_reward",
    "thumbs/kto": "eval_rewards/chosen", "gsm8k/sft": "eval_loss", "gsm8k/agro": "eval_reward",
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", CHAINS)
def test_two_steps_of_each_real_format(tmp_path: Path, name: str) -> None:
    for stage in CHAINS[name]:
        values = short(Path(name, f"{stage}.yaml"), tmp_path)
        assert EXPECTED[f"{name}/{stage}"] in values, (stage, sorted(values))
        if stage in ("dpo", "ipo", "agro") and name == "polite_pairs":
            assert "eval_logps/accuracies" in values
