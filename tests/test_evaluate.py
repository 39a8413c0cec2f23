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


def test_rewards_and_judges_are_told_whether_the_policy_trains(tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    where = ["train"]

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        told.append((where[0], trainer_state.is_training))
        return [float(len(text)) for text in completions]

    def judge(completions: list[str], opponents: list[str], trainer_state: Any) -> list[float]:
        told.append((where[0], trainer_state.is_training))
        return [0.5 + 0.1 * (len(a) > len(b)) for a, b in zip(completions, opponents, strict=True)]

    class Spy(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            where[0] = "evaluate"
            values = super().evaluate(eval_dataset)
            where[0] = "train"
            return values

    prompts = [{"prompt": f"{i}="} for i in range(8)]
    settings = {
        "objective": "dpo", "beta": 0.1, "max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 4, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    oracles: dict[str, dict[str, Any]] = {"reward": {"reward_funcs": reward}, "judge": {"judge": judge}}
    for name, oracle in oracles.items():
        told.clear()
        Spy(
            tiny_llama(), {**settings, "output_dir": str(tmp_path / name)}, train_dataset=prompts[2:], eval_dataset=prompts[:2],
            processing_class=char_tokenizer(), **oracle,
        ).train()  # fmt: skip
        assert {state for state, _ in told} == {"train", "evaluate"}, name
        assert all(training == (state == "train") for state, training in told), name


def test_held_out_prompts_without_a_score_are_no_steps(tmp_path: Path) -> None:
    """Many batches of an evaluation may be unscored; ``max_unscored_steps`` counts training steps."""

    def only_in_training(completions: list[str], trainer_state: Any, **columns: Any) -> list[float | None]:
        return [float(len(text) + i) if trainer_state.is_training else None for i, text in enumerate(completions)]

    settings = {
        "objective": "rloo", "beta": 0.1, "max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 4, "per_device_eval_batch_size": 1, "max_unscored_steps": 2, "disable_tqdm": True, "report_to": [],
        "output_dir": str(tmp_path),
    }  # fmt: skip
    prompts = [{"prompt": f"{i}="} for i in range(9)]
    t = Trainer(
        tiny_llama(), settings, train_dataset=prompts[6:], eval_dataset=prompts[:6], processing_class=char_tokenizer(),
        reward_funcs=only_in_training,
    )  # fmt: skip
    values = t.train()
    assert t.step == 2
    assert t.counts.unscored_steps == 0
    assert values["eval_rewards/unscored_fraction"] == 1.0


#: Rows of which every one has another mean reward: normalised over a part of them, advantages come out otherwise.
SCORED = [
    {"prompt": f"{i}=", "completions": ["a" * (1 + k + i % 3) for k in range(3)], "scores": [float(i * k) for k in range(3)]}
    for i in range(7)
]  # fmt: skip
WHOLE_STEP: list[tuple[str, dict[str, Any]]] = [
    ("reinforce", {"advantage": "batch_norm"}),
    ("reinforce", {"advantage": "group_mean_batch_norm"}),
    ("reinforce", {"advantage": "reward_to_go", "gamma": 0.5, "whiten": True}),
]


@pytest.mark.parametrize(("objective", "axes"), WHOLE_STEP, ids=["batch", "group", "to_go"])
def test_advantages_are_normalised_over_all_held_out_rows(tmp_path: Path, objective: str, axes: dict[str, Any]) -> None:
    found = []
    for size in (1, 2, 7):
        args = {
            "objective": objective, "objective_args": axes, "output_dir": str(tmp_path), "max_steps": 1, "dtype": "float64",
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": size, "disable_tqdm": True, "report_to": [],
        }  # fmt: skip
        t = Trainer(tiny_llama(dtype=torch.float64), args, train_dataset=SCORED, processing_class=char_tokenizer())
        found.append(t.evaluate(SCORED))
    batch = t.objective.prepare(t.source.make_batch(range(7)))  # type: ignore[union-attr]
    whole = torch.ones(len(t.objective.terms))
    with torch.no_grad():
        total, (output,) = t.objective.compute(t.forward(batch, frozenset({"logps"})), batch, whole)
    assert found[0]["eval_loss"] == pytest.approx(float(total) / float(output.counted.sum()), rel=1e-11)
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-11, abs=1e-13)
