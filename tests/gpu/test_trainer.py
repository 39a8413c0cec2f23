"""Steps of the trainer on a GPU: they train, they fit, they resume bit for bit; and the sampler is ``generate``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.rollout import FastSampler, SamplingParams
from tests.gpu.common import CUDA, deterministic, peak_of_device, pytestmark, reset_peak  # noqa: F401
from tests.test_trainer import PAIRS, PROMPTS, digits_reward, moved, trainer, weights
from tests.tiny import char_tokenizer, tiny_gpt2, tiny_llama, tiny_qwen2
from tests.trainer.common import resumed_equals_whole

RUNS = {
    "dpo": ("dpo", PAIRS, {"beta": 0.1}),
    "dpo, adapter": ("dpo", PAIRS, {"beta": 0.1, "lora": True}),
    "sft, checkpointing": ("sft", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS],
                           {"gradient_checkpointing": True}),
    "grpo": ("grpo", PROMPTS, {"beta": 0.04, "reward": digits_reward, "num_iterations": 2}),
    "grpo, adapter": ("grpo", PROMPTS, {"beta": 0.04, "reward": digits_reward, "lora": True}),
    "agro": ("agro_off_policy", PROMPTS, {"beta": 0.1, "reward": digits_reward, "lora": True}),
    "exact kl": ("agro_on_policy_exact_kl", PROMPTS, {"beta": 0.1, "reward": digits_reward}),
    "ppo with a critic": ("ppo", PROMPTS, {"reward": digits_reward}),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", sorted(RUNS))
def test_steps_train_on_the_device(tmp_path: Path, name: str, precision: str) -> None:
    objective, rows, extra = RUNS[name]
    reset_peak()
    t = trainer(tmp_path, objective, rows, mixed_precision=precision, max_steps=4, **extra)
    assert t.device.type == "cuda"
    before = weights(t)
    values = t.train()
    assert math.isfinite(values["loss"])
    assert values["grad_norm"] > 0
    assert {p.device.type for p in t.policy.parameters()} == {"cuda"}
    changed = moved(before, weights(t))
    assert changed
    assert changed <= {name for name, p in t.policy.named_parameters() if p.requires_grad}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = max(line["meter/peak_memory_gib"] for line in lines if "meter/peak_memory_gib" in line)
    assert 0 < logged <= peak_of_device() / 2**30 + 1e-6
    assert logged < 4  # a model of 17,000 weights: the kernels' tiles, and little else


def test_memory_does_not_grow_from_step_to_step(tmp_path: Path) -> None:
    held: list[int] = []

    def note(event: str, t: Any, values: Any) -> None:
        if event == "step":
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())

    from tests.trainer.common import run

    run(tmp_path, "grpo", beta=0.04, max_steps=8, callbacks=[note]).train()
    assert len(held) == 8
    assert max(held[4:]) <= max(held[:4]) * 1.05, held


@pytest.mark.parametrize(
    ("objective", "extra"), [("grpo", {"beta": 0.04, "num_iterations": 2}), ("rloo", {"beta": 0.05})]
)
def test_resume_is_bit_identical(tmp_path: Path, objective: str, extra: dict[str, Any]) -> None:
    with deterministic():
        t = resumed_equals_whole(tmp_path, objective, 2, **extra)
    assert t.device.type == "cuda"


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2], ids=["llama", "qwen2", "gpt2"])
def test_greedy_answers_are_those_of_generate(make: Any) -> None:
    """In float64, where no two tokens are within rounding of each other."""
    model, tokenizer = make(dtype=torch.float64).to(CUDA), char_tokenizer()
    prompts = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1+1=", "a", "the quick brown", "42")
    ]
    drawn = FastSampler(model, tokenizer).sample(prompts, 2, SamplingParams(24, greedy=True), seed=0)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=CUDA)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        expected = out[0, len(prompt) :].tolist()
        assert list(drawn.completion_ids[2 * i]) == list(drawn.completion_ids[2 * i + 1]) == expected


def test_the_samplers_log_probs_are_the_policys() -> None:
    model, tokenizer = tiny_llama().to(CUDA), char_tokenizer()
    prompts = [[5, 6, 7], [9]]
    drawn = FastSampler(model, tokenizer).sample(prompts, 4, SamplingParams(16), seed=3)
    for row, (ids, logps) in enumerate(zip(drawn.completion_ids, drawn.logps, strict=True)):
        whole = torch.tensor([[*prompts[row // 4], *ids]], device=CUDA)
        logits = model(whole).logits[0, len(prompts[row // 4]) - 1 : -1].double()
        truth = logits.log_softmax(-1).gather(-1, whole[0, -len(ids) :, None])[:, 0]
        assert (torch.tensor(logps, dtype=torch.float64) - truth.cpu()).abs().max() < 1e-4
