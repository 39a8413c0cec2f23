"""Seven defects that TRL 1.16 ships (docs/differences.md), each turned into a test that rlft does it right. Needs no TRL."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Config, Trainer, losses
from rlft.config import ConfigError
from rlft.errors import Interrupted
from rlft.models import LoraSettings, Policy, add_lora
from rlft.rollout import FastSampler, SamplingParams, TransformersSampler
from tests.models.oracle import alone, close, perturb, pick
from tests.tiny import char_tokenizer, random_batch, tiny_gpt2, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(12)]


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def build(folder: Path, objective: str, model: Any, *, online: bool = False, **extra: Any) -> Trainer:
    """A trainer on tiny data; ``online`` samples and scores answers."""
    settings = {
        "objective": objective,
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8 if online else 4,
        "learning_rate": 1e-2,
        "max_prompt_length": 8,
        "max_completion_length": 6,
        "disable_tqdm": True,
        "report_to": [],
        **({"num_generations": 4} if online else {}),
        **extra,
    }
    rows, rewards = (PROMPTS, digits) if online else (PAIRS, None)
    return Trainer(model, settings, train_dataset=rows, processing_class=char_tokenizer(), reward_funcs=rewards)


def log(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without its clocks."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("step_time", "update_time") and not k.startswith("meter/")}
        for row in rows
    ]


def interrupted_after(step: int) -> Any:
    """A callback that sends SIGTERM at the end of a step."""

    def callback(event: str, trainer: Trainer, _: Any) -> None:
        if event == "step" and trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


# -- R1: the reference is the model that was passed, not the files it once came from ---------------------------------
@pytest.fixture
def changed_in_memory(tmp_path: Path) -> Any:
    """A model loaded from a folder and trained a little since, so that its folder is out of date."""
    import transformers

    tiny_llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config._name_or_path == str(tmp_path / "base")
    perturb(model)
    return model


def test_dpo_reference_is_the_model_in_memory(tmp_path: Path, changed_in_memory: Any) -> None:
    build(tmp_path / "run", "dpo", changed_in_memory, beta=0.1).train()
    first, second = log(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert abs(second["rewards/chosen"]) > 1e-3


def test_grpo_reference_is_the_model_in_memory(tmp_path: Path, changed_in_memory: Any) -> None:
    build(tmp_path / "run", "grpo", changed_in_memory, online=True, beta=0.04).train()
    first, second = log(tmp_path / "run")
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-4


def test_online_trainers_take_a_reference(tmp_path: Path) -> None:
    reference = tiny_llama(seed=1).requires_grad_(False)
    trainer = Trainer(
        tiny_llama(),
        Config(objective="grpo", beta=0.04, output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8,
               max_completion_length=4, disable_tqdm=True, report_to=[]),
        train_dataset=PROMPTS,
        processing_class=char_tokenizer(),
        reward_funcs=digits,
        ref_model=reference,
    )  # fmt: skip
    trainer.train()
    assert log(tmp_path)[0]["kl"] > 0.1


# -- R2: a reference that moves is part of the checkpoint --------------------------------------------------------------
def test_moving_reference_survives_a_restart(tmp_path: Path) -> None:
    def moving(event: str, trainer: Trainer, _: Any) -> None:
        if event == "step":
            trainer.policy.update_reference(0.5)

    def run(folder: Path, *more: Any) -> Trainer:
        trainer = build(folder, "dpo", tiny_llama(), beta=0.1, max_steps=5)
        trainer.callbacks += [moving, *more]
        return trainer

    run(tmp_path / "whole").train()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", interrupted_after(3)).train()
    resumed = run(tmp_path / "cut")
    resumed.train()
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    fixed = build(tmp_path / "fixed", "dpo", tiny_llama(), beta=0.1, max_steps=5)
    fixed.train()
    assert log(tmp_path / "fixed")[4]["loss"] != pytest.approx(log(tmp_path / "whole")[4]["loss"], rel=1e-3)


# -- R3: a checkpoint in the middle of a generation ---------------------------------------------------------------------
def test_resume_inside_a_generation_goes_on_with_it(tmp_path: Path) -> None:
    def run(folder: Path, sampled_at: list[int], *more: Any) -> Trainer:
        trainer = build(folder, "grpo", tiny_llama(), online=True, beta=0.04, max_steps=8, steps_per_generation=4)
        sample = trainer.sampler.sample

        def counted(*args: Any, **kwargs: Any) -> Any:
            sampled_at.append(trainer.step)
            return sample(*args, **kwargs)

        trainer.sampler.sample = counted
        trainer.callbacks += more
        return trainer

    whole: list[int] = []
    run(tmp_path / "whole", whole).train()
    before: list[int] = []
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", before, interrupted_after(2)).train()
    after: list[int] = []
    run(tmp_path / "cut", after).train()
    assert whole == [0, 4]
    assert (before, after) == ([0], [4])
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


# -- R4: padding never moves a position ---------------------------------------------------------------------------------
def test_absolute_positions_under_padding() -> None:
    """GPT-2 knows absolute positions: without explicit ones, padded rows would be scored at wrong places."""
    model = tiny_gpt2(dtype=torch.float64)
    batch = random_batch(groups=4, per_group=2, prompt_lengths=(1, 9), lengths=(1, 6))
    scored = Policy(model, reference="none")(batch, want=frozenset({"logps"}))["logps"]
    close(scored.detach(), pick(alone(model, batch), batch).detach())


@pytest.mark.parametrize("sampler", [FastSampler, TransformersSampler])
def test_sampled_log_probs_are_those_the_policy_scores(sampler: Any) -> None:
    model = tiny_gpt2(dtype=torch.float64)
    prompts = [[5], [6, 7, 8, 9, 10, 11, 12], [13, 14, 15]]
    drawn = sampler(model, char_tokenizer()).sample(prompts, 2, SamplingParams(5), seed=0)
    for row, ids in enumerate(drawn.completion_ids):
        prompt = prompts[row // 2]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        truth = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(drawn.logps[row]).double(), truth.detach(), rtol=1e-6, atol=1e-6)


# -- R5: a model that cannot learn is refused --------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_frozen_adapter_is_refused(tmp_path: Path, objective: str) -> None:
    import peft

    online = objective == "grpo"
    add_lora(tiny_llama(), LoraSettings(r=2)).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(tmp_path / "run", objective, frozen, online=online, beta=0.1)
    trainable = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"), is_trainable=True)
    trainer = build(tmp_path / "run", objective, trainable, online=online, beta=0.1)
    before = copy.deepcopy({n: p.detach() for n, p in trainer.policy.named_parameters() if p.requires_grad})
    trainer.train()
    after = dict(trainer.policy.named_parameters())
    assert len(before) == 2 * 2 * 7  # A and B of seven projections in two layers
    assert all(not torch.equal(before[name], after[name]) for name in before)


# -- R6: CISPO's bound is never below one --------------------------------------------------------------------------------
def test_cispo_on_fresh_samples_is_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logps = (-3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0, 2.0, -2.0]).double(), torch.ones(4, 5).bool()
    losses.cispo(logps, logps.detach(), advantages, mask, clip_eps_high=0.2).mean().backward()
    torch.testing.assert_close(logps.grad, (-advantages / 20)[:, None].expand(4, 5))


def test_cispo_needs_its_bound() -> None:
    with pytest.raises(ConfigError, match="clip_eps_high"):
        Trainer(tiny_llama(), {"objective": "cispo"}, train_dataset=PROMPTS, reward_funcs=digits)


# -- R7: a setting that would do nothing is refused -------------------------------------------------------------------
def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'padding_free'"):
        Config.from_dict({"objective": "dpo", "padding_free": True})


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"num_generations": 16}, "num_generations"),
        ({"lora_r": 8}, "lora_r"),
        ({"replay_capacity": 3}, "replay_capacity"),
    ],
)
def test_idle_setting_is_refused(tmp_path: Path, extra: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*does nothing"):
        build(tmp_path, "dpo", tiny_llama(), beta=0.1, **extra)
