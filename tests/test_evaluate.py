"""Held-out numbers: pair accuracies of every objective on pairs, and rows that are the caller's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer
from rlft.config import ConfigError
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "0", "rejected": str(i)} for i in range(1, 6)]
KEYS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "logps/accuracies")  # fmt: skip


def trainer(folder: Path, objective: str, rows: Any = PAIRS, held_out: Any = HELD_OUT, **extra: Any) -> Trainer:
    settings = {
        "objective": objective, "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_prompt_length": 8, "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
        "per_device_eval_batch_size": 2, **extra,
    }  # fmt: skip
    model = extra.get("model") or tiny_llama()
    tokenizer = char_tokenizer() if "tokenizer" not in extra else None
    return Trainer(model, settings, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)


def by_hand(t: Trainer, beta: float) -> dict[str, float]:
    """Log-probs from a plain forward pass, row by row, against the reference's untouched weights."""
    reference = tiny_llama()
    found: dict[str, list[float]] = {}
    for row in HELD_OUT:
        sums = {}
        for side in ("chosen", "rejected"):
            prompt = t.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answer = t.tokenizer(row[side], add_special_tokens=False)["input_ids"] + [t.tokenizer.eos_token_id]
            for name, model in (("policy", t.policy.hf_model.eval()), ("ref", reference)):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None])
                sums[side, name] = float(picked.sum())
        rewards = {side: beta * (sums[side, "policy"] - sums[side, "ref"]) for side in ("chosen", "rejected")}
        values = {
            "rewards/chosen": rewards["chosen"], "rewards/rejected": rewards["rejected"],
            "rewards/margins": rewards["chosen"] - rewards["rejected"],
            "rewards/accuracies": float(rewards["chosen"] > rewards["rejected"]),
            "logps/chosen": sums["chosen", "policy"], "logps/rejected": sums["rejected", "policy"],
            "logps/accuracies": float(sums["chosen", "policy"] > sums["rejected", "policy"]),
        }  # fmt: skip
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


@pytest.mark.parametrize(("objective", "extra"), [("dpo", {}), ("agro_off_policy", {"pair_rewards": [0.5, -0.5]})])
def test_pairs_are_judged_by_implicit_reward_and_by_raw_likelihood(
    tmp_path: Path, objective: str, extra: dict[str, Any]
) -> None:
    t = trainer(tmp_path, objective, beta=0.3, **extra)
    values = t.train()
    for key, expected in by_hand(t, 0.3).items():
        assert values[f"eval_{key}"] == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    assert 0 < values["eval_rewards/accuracies"] <= 1


def test_an_objective_without_a_reference_has_raw_accuracy_alone(tmp_path: Path) -> None:
    values = trainer(tmp_path, "agro_off_policy", beta=0.0, pair_rewards=[0.5, -0.5]).train()
    assert "eval_logps/accuracies" in values
    assert "eval_rewards/accuracies" not in values


def test_given_rows_are_evaluated_whole(tmp_path: Path) -> None:
    """``train_slice`` and ``eval_fraction`` say what to train on; they cut nothing from rows that are passed."""
    seen = []

    class Spy(Trainer):
        def forward(self, batch: Any, want: Any) -> Any:
            seen.append(batch.num_rows)
            return super().forward(batch, want)

    args = {
        "objective": "dpo", "beta": 0.1, "output_dir": str(tmp_path), "max_steps": 1, "eval_fraction": 0.25,
        "train_slice": [0, 0.6], "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    t = Spy(tiny_llama(), args, train_dataset=PAIRS, processing_class=char_tokenizer())
    assert len(t.train_data.examples) == 5
    assert len(t.eval_data.examples) == 3
    t.evaluate(HELD_OUT)
    assert sum(seen) == 2 * len(HELD_OUT)


def test_a_tokenizer_is_made_of_the_whole_file_but_the_held_out_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"word{i} ", "completion": f"answer{i}"} for i in range(10)]
    model = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1}  # fmt: skip
    t = trainer(tmp_path, "sft", rows, None, model=model, tokenizer={"kind": "word", "vocab_size": 100}, train_slice=[0, 0.5],
                eval_fraction=0.2, per_device_train_batch_size=2)  # fmt: skip
    assert len(t.train_data.examples) == 4
    known = {word for word in t.tokenizer.get_vocab() if word.startswith("word")}
    held = {e.prompt.strip() for e in t.eval_data.examples}
    assert len(known) == 8
    assert not known & held


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PAIRS, "would imitate the rejected answers too; set data_format: prompt_completion"),
        ([{"prompt": "a", "completion": str(i), "label": i % 2 == 0} for i in range(8)], "would imitate the undesired"),
    ],
)
def test_imitating_bad_answers_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, "sft", rows, None)


def test_separator_belongs_to_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"1+{i}=", "completion": str(1 + i)} for i in range(4)]
    t = trainer(tmp_path, "sft", rows, None, separator="#")
    example = t.train_data.examples[0]
    assert t.tokenizer.decode(example.prompt_ids) == "1+0=#"
    assert t.tokenizer.decode(example.completions[0].ids[:-1]) == "1"
