"""TRPO in the trainer: its step against dense algebra, its limits over many steps, any split, resume, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlft import Trainer, losses
from rlft.config import ConfigError
from rlft.errors import Interrupted
from rlft.rollout import Rollout
from rlft.run.step.trust_region import TrustRegion
from rlft.trust_region import flatten
from rlft.types import Batch
from tests.models.oracle import alone, pick, trained_lora
from tests.tiny import EOS_ID, char_tokenizer, tiny_llama
from tests.trainer.common import facts

PROMPTS = [{"prompt": f"{i}="} for i in range(8)]


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


class Known:
    """A sampler whose answers follow from the prompt alone: the same on every process, in any order."""

    def sample(self, prompt_ids: Sequence[Sequence[int]], n: int, params: Any, **_: Any) -> Rollout:
        answers = []
        for prompt in prompt_ids:
            for k in range(n):
                draw = hashlib.sha256(f"{list(prompt)} {k}".encode()).digest()
                answers.append([4 + d % 90 for d in draw[: 1 + draw[31] % 5]] + [EOS_ID])
        return Rollout(answers, [[0.0] * len(a) for a in answers], [True] * len(answers))


def trainer(
    folder: Path, model: Any = None, kind: type[Trainer] = Trainer, sampler: Any = None, **changes: Any
) -> Trainer:
    settings = {
        "objective": "trpo", "output_dir": str(folder), "max_steps": 3, "num_generations": 4,
        "per_device_train_batch_size": 16, "max_completion_length": 6, "disable_tqdm": True, "report_to": [], **changes,
    }  # fmt: skip
    if sampler is not None:
        settings["sampler_check_steps"] = 0
    return kind(
        tiny_llama() if model is None else model, settings, train_dataset=PROMPTS,
        processing_class=char_tokenizer(), reward_funcs=digits, sampler=sampler,
    )  # fmt: skip


def two_steps(folder: Path, *, rows_each: int, accumulation: int) -> Trainer:
    """Two steps in float64 on known answers to all eight prompts, however they are split; also run on two processes."""
    t = trainer(
        folder, tiny_llama(dtype=torch.float64), sampler=Known(), max_steps=2, dtype="float64",
        per_device_train_batch_size=rows_each, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    t.train()
    return t


def weights(t: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in t.policy.named_parameters() if p.requires_grad}


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


# -- truth ------------------------------------------------------------------------------------------------------------
def test_one_step_is_the_one_written_out_in_dense_matrices(tmp_path: Path) -> None:
    """Full logits, row by row: g, F and (F + damping)^-1 g as they stand in the paper, 1e-8."""
    kept: list[Batch] = []

    class Spy(Trainer):
        def prepare(self, batch: Batch) -> Batch:
            kept.append(super().prepare(batch))
            return kept[-1]

    def adapted() -> Any:
        return trained_lora(tiny_llama(dtype=torch.float64, num_hidden_layers=1), target_modules=["q_proj"])

    region = {"max_kl": 1e-7, "cg_iters": 600, "cg_tolerance": 1e-13, "cg_damping": 0.05}
    t = trainer(
        tmp_path / "run", adapted(), Spy, Known(), objective_args=region, max_steps=1, temperature=0.8, dtype="float64",
        per_device_train_batch_size=8,
    )  # fmt: skip
    before = flatten(list(weights(t).values()))
    t.train()
    moved = flatten(list(weights(t).values())) - before
    shortened = 0.8 ** logged(tmp_path / "run")[0]["trust_region/backtracks"]
    assert shortened > 0.5

    model, (batch,) = adapted(), kept
    trained = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        logp = alone(model, batch, temperature=0.8)
    assert batch.advantages is not None
    tokens = pick(logp, batch)
    surrogate = (
        losses.trpo(tokens, tokens.detach(), batch.advantages.double(), batch.mask).loss.sum() / batch.mask.sum()
    )
    gradient = flatten(torch.autograd.grad(surrogate, trained, retain_graph=True))
    old = logp.detach()
    kl = ((old.exp() * (old - logp)).sum(-1) * batch.mask).sum() / batch.mask.sum()
    slope = flatten(torch.autograd.grad(kl, trained, create_graph=True))
    eye = torch.eye(slope.numel(), dtype=torch.float64)
    fisher = torch.stack([flatten(torch.autograd.grad(slope, trained, e, retain_graph=True)) for e in eye])
    x = torch.linalg.solve(fisher + region["cg_damping"] * eye, gradient)
    truth = -shortened * torch.sqrt(2 * region["max_kl"] / (x @ fisher @ x)) * x
    torch.testing.assert_close(moved, truth, rtol=1e-6, atol=1e-8 * float(truth.abs().max()))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_the_split_into_micro_batches_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    whole, split = (
        weights(two_steps(tmp_path / str(parts), rows_each=32 // parts, accumulation=parts))
        for parts in (1, accumulation)
    )
    start = weights(trainer(tmp_path / "fresh", tiny_llama(dtype=torch.float64), dtype="float64"))
    assert not torch.equal(whole["model.lm_head.weight"], start["model.lm_head.weight"])
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-9, atol=1e-11)


# -- limits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"use_peft": True, "lora_r": 2}, {"kl": "loss", "beta": 0.05}], ids=str)
def test_every_step_is_within_the_kl_and_improves_the_surrogate(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    given = {key: changes.pop(key) for key in ("kl",) if key in changes}
    t = trainer(tmp_path / "run", objective_args={"max_kl": 0.02, **given}, max_steps=8, **changes)
    t.train()
    rows = logged(tmp_path / "run")
    assert len(rows) == 8
    assert all(row["trust_region/kl"] <= 0.02 and row["trust_region/gain"] >= 0 for row in rows)
    assert sum(row["trust_region/accepted"] for row in rows) >= 6
    assert max(row["trust_region/kl"] for row in rows) > 0.005
    assert all("learning_rate" not in row for row in rows)


def demo_run(tmp_path: Path, steps: int) -> list[dict[str, Any]]:
    """The demo's model and task: sort eight digits, LoRA, an exact-match verifier."""
    from rlft.demo import DIGITS, MODEL, digit_rows

    common = {
        "max_prompt_length": DIGITS + 2, "max_completion_length": DIGITS + 1, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    warm = [{name: row[name] for name in ("prompt", "completion")} for row in digit_rows(64 * 60, seed=0)]
    sft = {
        "objective": "sft", "per_device_train_batch_size": 64, "learning_rate": 3e-3, "tokenizer": {"kind": "char"},
        "output_dir": str(tmp_path / "sft"), **common,
    }  # fmt: skip
    Trainer(MODEL, sft, train_dataset=warm).train()
    args = {
        "objective": "trpo", "use_peft": True, "num_generations": 8, "per_device_train_batch_size": 32,
        "max_steps": steps, "rewards": ["exact_match"], "output_dir": str(tmp_path / "trpo"), **common,
    }  # fmt: skip
    Trainer(str(tmp_path / "sft" / "model"), args, train_dataset=digit_rows(4 * steps, seed=1)).train()
    return logged(tmp_path / "trpo")


@pytest.mark.filterwarnings("ignore")  # equal prompts and rewards among random ones
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_demo_stays_within_the_kl_and_never_worsens_its_surrogate(tmp_path: Path, steps: int) -> None:
    rows = demo_run(tmp_path, steps)
    assert len(rows) == steps
    assert all(row["trust_region/kl"] <= 0.001 and row["trust_region/gain"] >= 0 for row in rows)
    taken = [row for row in rows if row["trust_region/accepted"]]
    assert all(row["trust_region/kl"] > 0 for row in taken)
    usable = [row for row in rows if row["grad_norm"] > 0]  # all answers wrong, or all right: no gradient
    assert len(taken) >= 0.9 * len(usable) > 0


# -- what moves -------------------------------------------------------------------------------------------------------
def test_lora_moves_the_adapter_alone_and_holds_no_optimizer_state(tmp_path: Path) -> None:
    t = trainer(tmp_path / "run", use_peft=True, lora_r=2)
    before = {n: p.detach().clone() for n, p in t.policy.named_parameters()}
    t.train()
    moved = {n for n, p in t.policy.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert all("lora_" in name for name in moved)
    assert not t.optimizer.state


def test_a_critic_learns_by_the_optimizer_and_the_policy_by_the_trust_region(tmp_path: Path) -> None:
    tiny_llama(seed=4).save_pretrained(tmp_path / "critic")
    char_tokenizer().save_pretrained(tmp_path / "critic")
    args = {"objective_args": {"advantage": "gae"}, "critic": str(tmp_path / "critic"), "learning_rate": 1e-3}
    t = trainer(tmp_path / "run", max_steps=2, **args)
    before = weights(t)
    t.train()
    moved = {n for n, p in weights(t).items() if not torch.equal(before[n], p)}
    assert {n.split(".")[0] for n in moved} == {"model", "critic"}
    of_critic = {id(p) for n, p in t.policy.named_parameters() if n.startswith("critic.")}
    assert {id(p) for p in t.optimizer.state} <= of_critic
    assert len(t.optimizer.state) > 0
    rows = logged(tmp_path / "run")
    assert all(0 < row["trust_region/kl"] <= 0.001 and row["learning_rate"] == 1e-3 for row in rows)


def test_a_step_that_is_refused_leaves_every_bit_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrustRegion, "_kl", lambda self: 1.0)
    t = trainer(tmp_path / "run", objective_args={"max_backtracks": 2})
    before = weights(t)
    t.train()
    assert t.step == 3
    assert all(torch.equal(before[n], p) for n, p in weights(t).items())
    for row in logged(tmp_path / "run"):
        assert (row["trust_region/accepted"], row["trust_region/backtracks"], row["trust_region/kl"]) == (0.0, 3.0, 0.0)


def test_an_error_inside_the_line_search_leaves_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TrustRegion) -> float:
        raise RuntimeError("lost")

    monkeypatch.setattr(TrustRegion, "_kl", broken)
    t = trainer(tmp_path / "run")
    before = weights(t)
    with pytest.raises(RuntimeError, match="lost"):
        t.train()
    assert all(torch.equal(before[n], p) for n, p in weights(t).items())


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_is_bit_identical(tmp_path: Path, stop: int) -> None:
    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    extra = {"max_steps": 5, "use_peft": True, "lora_r": 2}
    whole = trainer(tmp_path / "whole", **extra)
    whole.train()
    cut = trainer(tmp_path / "cut", **extra)
    cut.callbacks.append(interrupt)
    with pytest.raises(Interrupted):
        cut.train()
    torch.manual_seed(123)  # whatever the new process drew before
    resumed = trainer(tmp_path / "cut", **extra)
    resumed.train()
    assert all(torch.equal(p, weights(whole)[n]) for n, p in weights(resumed).items())
    times = {"step_time", "update_time"}
    measured = [
        [{k: v for k, v in row.items() if k.startswith(("trust_region/", "loss", "reward")) and k not in times} for row in logged(p)]
        for p in (tmp_path / "whole", tmp_path / "cut")
    ]  # fmt: skip
    assert measured[0] == measured[1]


# -- words --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"warmup_steps": 2}, "warmup_steps"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"adam_beta1": 0.5}, "adam_beta1"),
        ({"num_iterations": 2}, "num_iterations"),
        ({"steps_per_generation": 2}, "steps_per_generation"),
        ({"top_p": 0.9}, "top_p"),
        ({"mixed_precision": "bf16"}, "mixed_precision"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"objective_args": {"advantage": "gae"}}, "critic"),
        ({"objective_args": {"max_kl": 0.0}}, "max_kl"),
        ({"objective_args": {"cg_iters": 1.5}}, "cg_iters"),
        ({"objective_args": {"delta": 0.1}}, "delta"),
        ({"epsilon": 0.2}, "epsilon"),
    ],
    ids=str,
)
def test_what_would_do_nothing_or_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        trainer(tmp_path / "run", **changes)


def test_without_rewards_and_with_an_optimizer_it_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "1=", "completions": ["a", "b"], "scores": [1.0, 0.0]}] * 8
    args = {"objective": "trpo", "output_dir": str(tmp_path), "per_device_train_batch_size": 4}
    with pytest.raises(ConfigError, match="rewards"):
        Trainer(tiny_llama(), args, train_dataset=rows, processing_class=char_tokenizer())
    model = tiny_llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="optimizers"):
        Trainer(model, {**args, "num_generations": 4}, train_dataset=PROMPTS, processing_class=char_tokenizer(),
                reward_funcs=digits, optimizers=(sgd, None))  # fmt: skip


def test_the_table_says_how_it_steps(tmp_path: Path) -> None:
    rows = facts(trainer(tmp_path / "run", objective_args={"max_kl": 0.02}))
    assert "KL(old, new) <= 0.02" in rows["step"]
    assert "no optimizer" in rows["steps"]
    assert "AdamW" not in rows["steps"]
