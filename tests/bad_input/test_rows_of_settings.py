"""Bad input 47-56: hyper-parameters and settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import losses, recipes
from rlft.config import ConfigError
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, command, refused, refused_by_command, trainer, varied

NAN = math.nan
PAIR_TENSORS = [torch.tensor([-1.0, -2.0]) for _ in range(4)]


@pytest.mark.parametrize("beta", [-0.1, NAN, math.inf])
def test_bad_input_47_beta_negative_or_nan(tmp_path: Path, beta: float) -> None:
    for name, rows, extra in (("dpo", PAIRS, {}), ("rloo", PROMPTS, {"reward": varied})):
        refused(
            lambda n=name, r=rows, e=extra: trainer(tmp_path, n, r, beta=beta, **e),
            "beta must be >= 0",
            repr(beta),
            kind=ConfigError,
        )
    refused(
        lambda: trainer(tmp_path, "dpo", PAIRS, objective_args={"beta": beta}),
        "beta must be > 0",
        repr(beta),
        "change beta",
    )
    refused(lambda: losses.dpo(*PAIR_TENSORS, beta=beta), "beta must be > 0", repr(beta), "change beta")
    refused(lambda: recipes.build("rloo", beta=beta), "beta must be >= 0", repr(beta), "change beta")


@pytest.mark.parametrize("objective", ["dpo", "ipo", "ipo_mean"])
def test_bad_input_48_beta_zero_where_it_is_a_temperature(
    tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_by_command(
        capsys, tmp_path, "beta must be > 0, got 0.0", "change beta", rows=PAIRS, objective=objective, beta=0.0
    )


@pytest.mark.parametrize("epsilon", [0.0, -0.2, NAN])
def test_bad_input_49_clip_range_empty(tmp_path: Path, epsilon: float) -> None:
    for name in ("epsilon", "epsilon_high"):
        refused(
            lambda n=name: trainer(tmp_path, "grpo", PROMPTS, reward=varied, **{n: epsilon}),
            f"{name} must be > 0", repr(epsilon), f"change {name}", kind=ConfigError,
        )  # fmt: skip
    refused(lambda: recipes.build("grpo", clip_eps=epsilon), "clip_eps must be > 0", repr(epsilon), "change clip_eps")


def test_bad_input_49_clip_low_above_high(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "grpo", PROMPTS, reward=varied, epsilon=0.3, epsilon_high=0.2),
        "epsilon=0.3 is above epsilon_high=0.2", "raise epsilon_high", kind=ConfigError,
    )  # fmt: skip
    refused(
        lambda: trainer(tmp_path, "dapo", PROMPTS, reward=varied, epsilon=0.3),
        "'dapo'", "epsilon=0.3", "above epsilon_high=0.28", "lower epsilon", kind=ConfigError,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_bad_input_50_temperature_without_ratios(tmp_path: Path, temperature: float) -> None:
    refused(
        lambda: trainer(tmp_path, "grpo", PROMPTS, reward=varied, temperature=temperature),
        "temperature must be > 0", repr(temperature), "change temperature", kind=ConfigError,
    )  # fmt: skip


def test_bad_input_51_objective_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused_by_command(capsys, tmp_path, "objective 'gppo' is unknown; did you mean", objective="gppo")
    far = refused_by_command(capsys, tmp_path, "objective 'xyzzy' is unknown", objective="xyzzy")
    for text in (said, far):
        assert all(text.count(f" {name}") >= 1 for name in recipes.names())
        assert text.count(" agro_off_policy_rb2") == 1
    refused_by_command(capsys, tmp_path, "objective is missing; name one of: ", "agro_off_policy", objective="")


def test_bad_input_52_option_that_the_objective_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_by_command(
        capsys, tmp_path, "'dpo' does not use epsilon=0.3", "known: beta, label_smoothing", "drop epsilon",
        rows=PAIRS, objective="dpo", beta=0.1, epsilon=0.3,
    )  # fmt: skip
    refused_by_command(
        capsys, tmp_path, "'dpo' does not use label_smothing=0.1", "did you mean 'label_smoothing'?",
        objective="dpo", beta=0.1, objective_args={"label_smothing": 0.1},
    )  # fmt: skip
    refused_by_command(capsys, tmp_path, "'sft' does not use beta=0.1", "drop beta", objective="sft", beta=0.1)
    idle: dict[str, Any]
    for words, idle in (
        ("lora_r=4 does nothing while use_peft is off; set use_peft: true or drop lora_r", {"lora_r": 4}),
        ("num_generations=4 does nothing without rewards", {"num_generations": 4}),
        ("critic='shared' does nothing", {"critic": "shared"}),
        ("sync_ref_model does nothing", {"sync_ref_model": True}),
    ):
        refused_by_command(capsys, tmp_path, words, "drop", objective="sft", **idle)


def test_bad_input_53_misspelt_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(
        capsys, tmp_path, "unknown setting 'learning_rat'", "did you mean 'learning_rate'?", learning_rat=0.1
    )
    from rlft import cli

    (tmp_path / "run.yaml").write_text("objective: dpo\n")
    assert cli.main(["train", str(tmp_path / "run.yaml"), "bta=0.1"]) == 2
    assert "did you mean 'beta'?" in capsys.readouterr().err
    path = tmp_path / "twice.yaml"
    path.write_text("objective: sft\nbeta: 0.1\nobjective: dpo\n")
    assert cli.main(["train", str(path)]) == 2
    assert f"{path}: key 'objective' appears twice (line 3); keep one" in capsys.readouterr().err


def test_bad_input_54_wrong_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(
        capsys, tmp_path, "learning_rate must be a number, got '1e-5' of type str", "write it as the number 1e-05", "1.0e-5",
        learning_rate="1e-5",
    )  # fmt: skip
    wrong: dict[str, Any]
    for words, wrong in (
        ("max_steps must be a whole number or null, got 2.5 of type float", {"max_steps": 2.5}),
        ("use_peft must be true or false, got 'yes' of type str", {"use_peft": "yes"}),
        ("seed must be a whole number, got True of type bool", {"seed": True}),
        ("lr_scheduler_type must be 'constant' or 'linear' or 'cosine', got 'cosin'", {"lr_scheduler_type": "cosin"}),
        ("rewards must be list", {"rewards": "math"}),
    ):
        refused_by_command(capsys, tmp_path, words, **wrong)
    path = tmp_path / "plain.yaml"  # what YAML itself makes of 1e-5
    path.write_text("objective: sft\nlearning_rate: 1e-5\n")
    from rlft import cli

    assert cli.main(["train", str(path)]) == 2
    assert "write it as the number 1e-05" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [0.0, -1e-5, NAN, math.inf])
def test_bad_input_55_learning_rate(tmp_path: Path, rate: float) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, learning_rate=rate),
        "learning_rate must be > 0", repr(rate), "change learning_rate", kind=ConfigError,
    )  # fmt: skip


def test_bad_input_55_warmup_longer_than_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(
        capsys, tmp_path, "warmup_steps=3 is more than max_steps=2", "lower warmup_steps", warmup_steps=3
    )
    refused_by_command(
        capsys, tmp_path, "warmup_steps=3 is more than the 2 steps of this run", "lower warmup_steps",
        warmup_steps=3, max_steps=None,
    )  # fmt: skip


def test_bad_input_56_accumulation_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "max_steps"):
        refused_by_command(capsys, tmp_path, f"{name}=0 must be at least 1", f"change {name}", **{name: 0})


def test_bad_input_settings_of_these_tests_work_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its bad setting the command trains: the refusals above are about that setting."""
    assert command(capsys, tmp_path, rows=ANSWERS)[0] == 0
