"""The loop: what moves and what does not, counts, exact resume, signals, and errors that come before any work."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Config, Trainer, losses
from rlft.config import ConfigError
from rlft.errors import Interrupted, TrainingError
from rlft.objective import Objective
from rlft.rewards import RewardError
from tests.tiny import char_tokenizer, tiny_gpt2, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
ANSWERS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(12)]
THUMBS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i + i % 2), "label": i % 2 == 0} for i in range(12)]
RANKED = [{"prompt": f"{i}=", "completions": ["a", "bc", "d"], "scores": [1.0, 0.5, 0.0]} for i in range(12)]
PROMPTS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]


def digits_reward(completions: list[str], **columns: Any) -> list[float]:
    """Share of characters that are digits: something a random model can climb."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def settings(folder: Path, objective: str, **extra: Any) -> dict[str, Any]:
    base = {
        "objective": objective, "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "max_prompt_length": 8, "max_completion_length": 6, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    online = {"num_generations": 4, "per_device_train_batch_size": 8} if extra.pop("online", False) else {}
    return {**base, **online, **extra}


def trainer(
    folder: Path, objective: str, rows: list[Any], *, model: Any = None, reward: Any = None, **extra: Any
) -> Trainer:
    lora = extra.pop("lora", False)
    if reward is not None:
        extra["online"] = True
    return Trainer(
        model
        if model is not None
        else tiny_llama(**({"head": "classifier", "num_labels": 1} if objective == "bradley_terry" else {})),
        settings(folder, objective, **({"use_peft": True, "lora_r": 4} if lora else {}), **extra),
        train_dataset=rows,
        processing_class=char_tokenizer(),
        reward_funcs=reward,
    )


OFFLINE = [
    ("sft", ANSWERS, {}),
    ("dpo", PAIRS, {"beta": 0.1}),
    ("ipo", PAIRS, {"beta": 0.1}),
    ("ipo_mean", PAIRS, {"beta": 0.1}),
    ("slic", PAIRS, {"beta": 1.0, "objective_args": {"delta": 1.0}}),
    ("kto", THUMBS, {"beta": 0.1}),
    ("bradley_terry", PAIRS, {}),
    ("agro_off_policy", RANKED, {"beta": 0.1}),
    ("agro_off_policy", PAIRS, {"beta": 0.1, "pair_rewards": [0.5, -0.5]}),
    ("rloo", RANKED, {"beta": 0.1}),
    ("grpo", RANKED, {}),
    ("dro", RANKED, {"beta": 0.1}),
]
ONLINE = [
    ("rloo", {"beta": 0.05}),
    ("reinforce", {}),
    ("grpo", {"epsilon": 0.2, "beta": 0.04}),
    ("dr_grpo", {"objective_args": {"length": 6}}),
    ("dapo", {}),
    ("grpo_plus", {"mask_truncated_completions": True, "stop_token_ids": list(range(40, 90, 3))}),
    ("ppo", {}),
    ("agro_off_policy", {"beta": 0.05}),
    ("agro_on_policy", {"beta": 0.05}),
    ("agro_on_policy_causal", {"beta": 0.05}),
    ("agro_on_policy_exact_kl", {"beta": 0.05}),
    ("kl_policy_gradient", {"beta": 0.05}),
    ("kl_policy_gradient_exact", {"beta": 0.05}),
]


def weights(t: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in t.policy.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("objective", "rows", "extra"), OFFLINE, ids=lambda v: v if isinstance(v, str) else "")
def test_offline_objectives_train(tmp_path: Path, objective: str, rows: list[Any], extra: dict[str, Any]) -> None:
    t = trainer(tmp_path, objective, rows, **extra)
    before = weights(t)
    values = t.train()
    assert math.isfinite(values["loss"])
    assert values["grad_norm"] > 0
    assert not [name for name, value in values.items() if math.isnan(value)]
    assert moved(before, weights(t)) >= {
        n for n, p in t.policy.named_parameters() if p.requires_grad and p.ndim > 1 and "embed" not in n
    }


@pytest.mark.parametrize(("objective", "extra"), ONLINE, ids=[name for name, _ in ONLINE])
def test_online_objectives_train_with_lora(tmp_path: Path, objective: str, extra: dict[str, Any]) -> None:
    t = trainer(tmp_path, objective, PROMPTS, reward=digits_reward, lora=True, **extra)
    before = weights(t)
    values = t.train()
    assert math.isfinite(values["loss"])
    assert {"reward", "reward_std", "entropy", "completions/mean_length", "rewards/digits_reward/mean"} <= set(values)
    trainable = {n for n, p in t.policy.named_parameters() if p.requires_grad}
    assert moved(before, weights(t)) == trainable, "adapters move, and nothing else"


def test_at_step_zero_the_policy_is_its_reference(tmp_path: Path) -> None:
    """REF0, for a model that was changed in memory (TRL 1.16 reloads it by path: loss .6115 instead of ln 2)."""
    model = tiny_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    for extra in ({}, {"lora": True}):
        values = trainer(
            tmp_path / str(len(extra)),
            "dpo",
            PAIRS,
            model=model if not extra else tiny_llama(),
            beta=0.1,
            max_steps=1,
            **extra,
        ).train()
        assert values["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert values["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
        assert values["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_dropout_leaves_the_first_ratio_at_one(tmp_path: Path) -> None:
    model = tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    t = trainer(tmp_path, "dpo", PAIRS, model=model, beta=0.1, max_steps=1)
    assert t.train()["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_one_step_equals_a_step_by_hand(tmp_path: Path) -> None:
    """Accumulated over micro-batches, the step is SGD on the loss of the whole batch, with the paper's denominator."""
    for accumulation in (1, 2, 4):
        model = tiny_llama(dtype=torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        args = settings(
            tmp_path / str(accumulation), "sft", max_steps=1, per_device_train_batch_size=12 // accumulation,
            gradient_accumulation_steps=accumulation, max_grad_norm=None, dtype="float64",
        )  # fmt: skip
        t = Trainer(model, args, train_dataset=ANSWERS, processing_class=char_tokenizer(), optimizers=(sgd, None))
        t.train()
        if accumulation == 1:
            expected = weights(t)
        for name, value in weights(t).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13)
    tok, ref = char_tokenizer(), tiny_llama(dtype=torch.float64)
    total, count = 0.0, 0
    for row in ANSWERS:
        prompt = tok(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = tok(row["completion"], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        logits = ref(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total - torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()
        count += len(answer)
    (total / count).backward()
    by_hand = {f"model.{n}": (p - 0.5 * p.grad).detach() for n, p in ref.named_parameters()}
    for name, value in by_hand.items():
        torch.testing.assert_close(expected[name], value, rtol=1e-9, atol=1e-12)


def test_rewards_pull_the_policy(tmp_path: Path) -> None:
    t = trainer(tmp_path, "rloo", PROMPTS, reward=digits_reward, beta=0.0, max_steps=25, learning_rate=2e-2, num_generations=8,
                per_device_train_batch_size=32)  # fmt: skip
    t.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(r["reward"] for r in part) / len(part) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3, (first, last)


# -- counts -------------------------------------------------------------------------------------------------------------
def test_every_example_is_seen_once_an_epoch_and_prompts_are_drawn_once(tmp_path: Path) -> None:
    seen: list[str] = []

    class Spy(Trainer):
        def rollout(self, indices: Any, step: int) -> Any:
            seen.extend(self.train_data.examples[i].prompt for i in indices)
            return super().rollout(indices, step)

    args = settings(tmp_path, "grpo", online=True, max_steps=None, num_train_epochs=2.0, gradient_accumulation_steps=2)
    t = Spy(tiny_llama(), args, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=digits_reward)
    t.train()
    assert t.step == t.plan.total_steps == 6
    assert sorted(seen) == sorted(r["prompt"] for r in PROMPTS * 2)


def test_a_generation_feeds_its_steps_in_order(tmp_path: Path) -> None:
    calls: list[int] = []

    class Spy(Trainer):
        def rollout(self, indices: Any, step: int) -> Any:
            calls.append(step)
            return super().rollout(indices, step)

    args = settings(tmp_path, "grpo", online=True, max_steps=9, steps_per_generation=2, num_iterations=2)
    t = Spy(tiny_llama(), args, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=digits_reward)
    t.train()
    assert calls == [0, 4, 8]
    assert t.plan.updates_per_generation == 4


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, max_steps=6, warmup_steps=2, lr_scheduler_type="linear", learning_rate=1.0e-3)
    t.train()
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


# -- resume -------------------------------------------------------------------------------------------------------------
def digest(t: Trainer, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    from rlft import checkpoint
    from rlft.metrics import comparable, read_metrics

    kept = comparable(read_metrics(folder))
    moments, _ = checkpoint.optimizer_to_tensors(
        t.optimizer, [n for n, p in t.policy.named_parameters() if p.requires_grad]
    )
    return checkpoint.fingerprint({**weights(t), **moments}), kept


RUNS = {
    "dpo": (PAIRS, None, {"beta": 0.1, "per_device_train_batch_size": 5}),
    "agro_off_policy": (PROMPTS, digits_reward, {"beta": 0.05, "replay_probability": 0.5}),
    "ppo": (PROMPTS, digits_reward, {"steps_per_generation": 2, "num_iterations": 2}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_bit_identical(tmp_path: Path, name: str, stop: int) -> None:
    """Interrupted after any step (inside a generation too), the run ends with the same bits and the same log."""
    rows, reward, extra = RUNS[name]
    extra = {**extra, "max_steps": 7, "lora": True, "logging_steps": 2}
    whole = trainer(tmp_path / "whole", name, rows, reward=reward, **extra)
    whole.train()

    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = trainer(tmp_path / "cut", name, rows, reward=reward, **extra)
    cut.callbacks.append(interrupt)
    with pytest.raises(Interrupted, match=f"after step {stop}"):
        cut.train()
    torch.manual_seed(123)  # whatever the new process drew before
    resumed = trainer(tmp_path / "cut", name, rows, reward=reward, **extra)
    resumed.train()
    assert digest(resumed, tmp_path / "cut") == digest(whole, tmp_path / "whole")


def test_a_signal_inside_sampling_loses_no_step(tmp_path: Path) -> None:
    calls = {"n": 0}

    def interrupting(completions: list[str], **columns: Any) -> list[float]:
        calls["n"] += 1
        if calls["n"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return digits_reward(completions)

    extra = {"beta": 0.05, "max_steps": 5, "lora": True}
    interrupting.__name__ = "digits_reward"
    cut = trainer(tmp_path / "cut", "agro_off_policy", PROMPTS, reward=interrupting, **extra)
    with pytest.raises(Interrupted):
        cut.train()
    resumed = trainer(tmp_path / "cut", "agro_off_policy", PROMPTS, reward=digits_reward, **extra)
    resumed.train()
    whole = trainer(tmp_path / "whole", "agro_off_policy", PROMPTS, reward=digits_reward, **extra)
    whole.train()
    assert digest(resumed, tmp_path / "cut") == digest(whole, tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_signal_inside_an_evaluation_repeats_that_evaluation_and_nothing_else(tmp_path: Path, at: int) -> None:
    """Evaluations are at steps 0, 2 and 4 and at the end; the at-th one is cut short."""
    calls = {"n": 0}

    def run(folder: Path, cut: bool) -> Trainer:
        def digits(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
            if len(completions) == 3:  # the held-out prompts
                calls["n"] += 1
                if cut and calls["n"] == at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return digits_reward(completions)

        args = settings(
            folder,
            "rloo",
            beta=0.05,
            online=True,
            max_steps=5,
            eval_steps=2,
            eval_on_start=True,
            per_device_eval_batch_size=3,
        )
        held_out = [{"prompt": f"{i}-{i}="} for i in range(6)]
        return Trainer(
            tiny_llama(),
            args,
            train_dataset=PROMPTS,
            eval_dataset=held_out,
            processing_class=char_tokenizer(),
            reward_funcs=digits,
        )

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", True).train()
    resumed = run(tmp_path / "cut", False)
    resumed.train()
    whole = run(tmp_path / "whole", False)
    whole.train()
    assert digest(resumed, tmp_path / "cut") == digest(whole, tmp_path / "whole")


def test_an_older_checkpoint_on_request_replaces_what_came_after_it(tmp_path: Path) -> None:
    whole = trainer(tmp_path, "dpo", PAIRS, beta=0.1, max_steps=5, save_steps=2, save_total_limit=None)
    whole.train()
    expected = digest(whole, tmp_path)
    again = trainer(tmp_path, "dpo", PAIRS, beta=0.1, max_steps=5, save_steps=2, save_total_limit=None)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digest(again, tmp_path) == expected
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = trainer(tmp_path, "sft", ANSWERS)
    first.train()
    log = (tmp_path / "metrics.jsonl").read_text()
    again = trainer(tmp_path, "sft", ANSWERS)
    again.train()
    assert digest(again, tmp_path)[0] == digest(first, tmp_path)[0]
    assert (tmp_path / "metrics.jsonl").read_text() == log


def test_resume_with_other_settings_is_refused_and_shows_the_difference(tmp_path: Path) -> None:
    trainer(tmp_path, "dpo", PAIRS, beta=0.1).train()
    with pytest.raises(ConfigError, match=r"beta: 0\.1 -> 0\.2"):
        trainer(tmp_path, "dpo", PAIRS, beta=0.2).train()


def test_evaluating_changes_no_training_result(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", "agro_off_policy", PROMPTS, reward=digits_reward, beta=0.05)
    plain.train()
    args = settings(tmp_path / "b", "agro_off_policy", beta=0.05, online=True, eval_steps=1, eval_on_start=True)
    watched = Trainer(
        tiny_llama(),
        args,
        train_dataset=PROMPTS,
        eval_dataset=[{"prompt": f"{i}-{i}="} for i in range(3)],
        processing_class=char_tokenizer(),
        reward_funcs=digits_reward,
    )
    values = watched.train()
    assert "eval_reward" in values
    assert digest(plain, tmp_path / "a")[0] == digest(watched, tmp_path / "b")[0]


# -- guards ---------------------------------------------------------------------------------------------------------------
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(tmp_path: Path) -> None:
    def explode(logps: Tensor, mask: Tensor) -> Tensor:
        return logps * float("inf")

    args = settings(tmp_path, "", max_steps=1)
    t = Trainer(
        tiny_llama(), args, objective=Objective(explode), train_dataset=ANSWERS, processing_class=char_tokenizer()
    )
    before = weights(t)
    with pytest.raises(TrainingError, match=r"step 1: loss=.*was not applied"):
        t.train()
    assert not moved(before, weights(t))


def test_nothing_scored_means_no_update_and_then_a_stop(tmp_path: Path) -> None:
    t = trainer(
        tmp_path,
        "rloo",
        PROMPTS,
        reward=lambda completions, **k: [None] * len(completions),
        beta=0.0,
        max_steps=9,
        max_unscored_steps=3,
    )
    before = weights(t)
    with pytest.raises(TrainingError, match="no answer was scored for 3 steps"):
        t.train()
    assert not moved(before, weights(t))
    assert t.step == 2


def test_a_reward_that_raises_is_named(tmp_path: Path) -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("oops")

    with pytest.raises(RewardError, match="broken"):
        trainer(tmp_path, "rloo", PROMPTS, reward=broken, beta=0.0).train()


@pytest.mark.parametrize(
    ("objective", "rows", "extra", "message"),
    [
        ("dpo", ANSWERS, {"beta": 0.1}, "trains on preference data, got 'prompt_completion'"),
        ("kto", PAIRS, {"beta": 0.1}, "trains on unpaired data"),
        ("rloo", ANSWERS, {"beta": 0.1}, "needs rewards"),
        ("sft", ANSWERS, {"temperature": 0.7}, "temperature=0.7 does nothing without rewards"),
        ("sft", ANSWERS, {"num_generations": 4}, "num_generations=4 does nothing without rewards"),
        ("sft", ANSWERS, {"ref_model": "x"}, "ref_model does nothing"),
        ("dpo", PAIRS, {"beta": 0.1, "critic": "shared"}, "critic='shared' does nothing"),
        ("sft", ANSWERS, {"eval_steps": 2}, "eval_steps does nothing without evaluation data"),
        ("sft", ANSWERS, {"per_device_train_batch_size": 13}, "12 training examples are fewer than one step takes"),
        ("sft", PROMPTS, {}, "prompts only"),
        ("dpo", PAIRS, {"beta": 0.1, "pair_rewards": [1.0, 0.0]}, "pair_rewards does nothing"),
        ("ppo", RANKED, {}, "samples of the policy itself"),
        ("dpo", PAIRS, {"beta": 0.0}, "beta must be > 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Path, objective: str, rows: list[Any], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, objective, rows, **extra).train()


@pytest.mark.parametrize(
    ("objective", "extra", "message"),
    [
        ("sft", {}, "uses no rewards"),
        ("grpo", {"num_generations": 1}, "set num_generations >= 2"),
        ("grpo", {"per_device_train_batch_size": 6}, "6 completions cannot form groups of num_generations=4"),
        ("rloo", {"beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "needs whole groups in a micro-batch"),
        ("agro_on_policy_causal", {"beta": 0.1, "top_p": 0.9}, "biased for samples .* top_p=0.9 .*use agro_off_policy"),
        ("agro_on_policy", {"beta": 0.1, "num_iterations": 2}, "num_iterations=2 gives such samples"),
        ("grpo", {"replay_probability": 0.5}, "which replayed answers lack"),
    ],
)  # fmt: skip
def test_online_settings_that_cannot_work(tmp_path: Path, objective: str, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, objective, PROMPTS, reward=digits_reward, **extra)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    def second(event: str, t: Trainer, values: Any) -> None:
        if event == "step":
            with pytest.raises(RuntimeError, match=str(os.getpid())):
                trainer(tmp_path, "sft", ANSWERS).train()

    first = trainer(tmp_path, "sft", ANSWERS, max_steps=1)
    first.callbacks.append(second)
    first.train()


# -- what comes out -----------------------------------------------------------------------------------------------------
def test_saved_models_load_elsewhere_with_the_same_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 8]])
    for lora in (False, True):
        run = tmp_path / f"run{lora}"
        args = settings(run, "sft", **({"use_peft": True} if lora else {}))
        t = Trainer(str(tmp_path / "base"), args, train_dataset=ANSWERS)
        t.train()
        t.save_model(run / "out")
        if lora:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "out")
        else:
            loaded = AutoModelForCausalLM.from_pretrained(run / "out")
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, t.policy.hf_model.eval()(ids).logits)
        saved = run / "checkpoint-3" / "model"
        assert sorted(p.name for p in saved.iterdir() if "model" in p.name), (
            "a checkpoint holds a model that loads by itself"
        )


def test_a_trained_reward_model_scores_online(tmp_path: Path) -> None:
    scorer = trainer(tmp_path / "rm", "bradley_terry", PAIRS, max_steps=10)
    scorer.train()
    scorer.save_model(tmp_path / "rm" / "out")
    t = trainer(tmp_path / "rl", "rloo", PROMPTS, reward=str(tmp_path / "rm" / "out"), beta=0.0)
    assert math.isfinite(t.train()["reward"])


def test_subclass_and_callbacks(tmp_path: Path) -> None:
    events: list[str] = []

    class Half(Trainer):
        def compute_loss(self, batch: Any, denominators: Tensor) -> Tensor:
            return 0.5 * super().compute_loss(batch, denominators)

    args = settings(tmp_path, "", max_steps=2)
    t = Half(tiny_llama(), args, objective=losses.sft, train_dataset=ANSWERS, processing_class=char_tokenizer(),
             callbacks=[lambda event, t, values: events.append(event)])  # fmt: skip
    half = t.train()["loss"]
    assert events == ["step", "step", "save", "end"]
    assert half > 0


def test_config_objects_and_mappings_are_the_same(tmp_path: Path) -> None:
    args = settings(tmp_path, "sft")
    assert Trainer(
        tiny_llama(), Config(**args), train_dataset=ANSWERS, processing_class=char_tokenizer()
    ).config == Config.from_dict(args)


# -- the reference moves, prompts are refilled ----------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True])
def test_a_moving_reference_follows_the_policy_and_survives_a_resume(tmp_path: Path, lora: bool) -> None:
    """TRL 1.16 does not save a synchronised reference: after a resume it restarts from the base."""
    extra = {
        "beta": 0.1,
        "lora": lora,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 2,
        "max_steps": 5,
    }
    whole = trainer(tmp_path / "whole", "dpo", PAIRS, **extra)
    whole.train()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    margins = [abs(row["rewards/margins"]) for row in rows]
    assert margins[0] < 1e-6, "step 1: the policy is its reference"
    assert margins[1] > 1e-4
    assert margins[2] < 1e-6, "step 3: the reference was replaced by the policy"
    cut = trainer(tmp_path / "cut", "dpo", PAIRS, **extra)
    cut.callbacks.append(
        lambda event, t, values: os.kill(os.getpid(), signal.SIGTERM) if event == "step" and t.step == 3 else None
    )
    with pytest.raises(Interrupted):
        cut.train()
    resumed = trainer(tmp_path / "cut", "dpo", PAIRS, **extra)
    resumed.train()
    assert digest(resumed, tmp_path / "cut") == digest(whole, tmp_path / "whole")


def test_dynamic_sampling_replaces_prompts_that_teach_nothing(tmp_path: Path) -> None:
    def half(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [
            len(text) + i % 4 if int(prompt.split("+")[0]) % 2 else 1.0
            for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]

    used: list[int] = []

    class Spy(Trainer):
        def prepare(self, batch: Any) -> Any:
            used.append(sum(int(batch.rewards[batch.group_ids == g].std() > 0) for g in range(batch.num_groups)))
            return super().prepare(batch)

    for dynamic, expected in ((False, 6), (True, 12)):
        used.clear()
        args = settings(
            tmp_path / str(dynamic),
            "dapo",
            online=True,
            max_steps=3,
            per_device_train_batch_size=16,
            **({"dynamic_sampling": True} if dynamic else {}),
        )
        Spy(tiny_llama(), args, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=half).train()
        assert sum(used) == expected, (dynamic, used)


def test_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, "sft", ANSWERS).train()
    other = [*ANSWERS[:-1], {"prompt": "9+9=", "completion": "99"}]
    with pytest.raises(ConfigError, match="the training data changed"):
        trainer(tmp_path, "sft", other).train()


def test_a_numeric_column_reaches_the_objective_that_names_it(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def weighted(logps: Tensor, difficulty: Tensor, mask: Tensor) -> Tensor:
        seen.append(difficulty.tolist())
        return -logps * difficulty[:, None]

    rows = [{**row, "difficulty": i / 2} for i, row in enumerate(ANSWERS)]
    t = Trainer(
        tiny_llama(),
        settings(tmp_path, "", max_steps=3),
        objective=weighted,
        train_dataset=rows,
        processing_class=char_tokenizer(),
    )
    t.train()
    assert sorted(v for batch in seen[1:] for v in batch) == [i / 2 for i in range(12)], (
        "after the probe, each row once"
    )
    bad = [{**row, "difficulty": "hard"} for row in ANSWERS]
    with pytest.raises(ValueError, match=r"column 'difficulty'.*one number per prompt.*'hard'"):
        Trainer(
            tiny_llama(),
            settings(tmp_path / "b", "", max_steps=1),
            objective=weighted,
            train_dataset=bad,
            processing_class=char_tokenizer(),
        ).train()


def test_dropout_can_be_left_on(tmp_path: Path) -> None:
    model = tiny_gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    t = trainer(tmp_path, "dpo", PAIRS, model=model, beta=1.0, max_steps=1, disable_dropout=False)
    assert abs(t.train()["loss"] - math.log(2)) > 1e-3


def test_tensorboard_gets_the_metrics_by_default(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = {k: v for k, v in settings(tmp_path, "sft").items() if k != "report_to"}
    Trainer(tiny_llama(), args, train_dataset=ANSWERS, processing_class=char_tokenizer()).train()
    logged = []
    for folder in {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}:
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        logged += [(e.step, e.value) for tag in events.Tags()["scalars"] if tag == "loss" for e in events.Scalars(tag)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [value for _, value in logged] == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def test_a_critic_of_its_own_learns(tmp_path: Path) -> None:
    tiny_llama(seed=5).save_pretrained(tmp_path / "critic")
    char_tokenizer().save_pretrained(tmp_path / "critic")
    t = trainer(tmp_path / "run", "ppo", PROMPTS, reward=digits_reward, lora=True, critic=str(tmp_path / "critic"))
    before = weights(t)
    t.train()
    assert any(name.startswith("critic.") for name in moved(before, weights(t)))
