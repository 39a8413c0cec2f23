"""Every schedule of the reference, from YAML: what it is at each step, and a resume that changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer
from rlft.config import ConfigError
from tests.tiny import tiny_llama
from tests.trainer.common import PAIRS, log_of, resumed_equals_whole, run

#: name -> (objective, settings, kind of reference)
SCHEDULES: dict[str, tuple[str, dict[str, Any], str]] = {
    "frozen copy": ("dpo", {"rows": PAIRS}, "snapshot"),
    "adapter off": ("dpo", {"rows": PAIRS, "use_peft": True, "lora_r": 4}, "adapter_off"),
    "moving average": (
        "grpo",
        {"sync_ref_model": True, "ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 1},
        "snapshot",
    ),
    "moving average, adapter": (
        "grpo",
        {
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 0.4,
            "ref_model_sync_steps": 2,
            "use_peft": True,
            "lora_r": 4,
        },
        "adapter_copy",
    ),
    "swapped": (
        "dpo",
        {"rows": PAIRS, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2},
        "snapshot",
    ),
    "behaviour": (
        "agro_off_policy",
        {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3, "num_iterations": 3},
        "snapshot",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_reference_after_every_step(tmp_path: Path, name: str) -> None:
    """Against weights kept by hand: the reference is the mixture that the settings say, and nothing else."""
    objective, extra, kind = SCHEDULES[name]
    alpha, every = extra.get("ref_model_mixup_alpha", 0.0), extra.get("ref_model_sync_steps", 10**6)
    t = run(tmp_path, objective, beta=0.1, max_steps=7, **extra)
    assert t.policy.reference_kind == kind
    expected = {key: p.detach().clone() for key, p in t.policy.reference_state().items()}
    checked = []

    def watch(event: str, trainer: Trainer, values: Any) -> None:
        if event != "step":
            return
        if trainer.step % every == 0:
            policy = dict(trainer.policy.hf_model.named_parameters())
            for key in expected:
                expected[key] = (1 - alpha) * expected[key] + alpha * policy[key].detach()
        found = trainer.policy.reference_state()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=1e-6), (trainer.step, key)
        checked.append(trainer.step)

    t.callbacks.append(watch)
    t.train()
    assert checked == [1, 2, 3, 4, 5, 6, 7]
    assert bool(expected) == (kind != "adapter_off")


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    """Stopped after step 4: between two moves of the reference, and inside a generation."""
    objective, extra, _ = SCHEDULES[name]
    resumed_equals_whole(tmp_path, objective, 4, beta=0.1, max_steps=7, **extra)


def test_a_reference_from_a_folder_resumes_and_never_moves(tmp_path: Path) -> None:
    tiny_llama(seed=5).save_pretrained(tmp_path / "ref")
    extra: dict[str, Any] = {"rows": PAIRS, "beta": 0.1, "ref_folder": str(tmp_path / "ref")}
    t = resumed_equals_whole(tmp_path, "dpo", 2, **extra)
    assert t.policy.reference_kind == "model"
    theirs = dict(tiny_llama(seed=5).named_parameters())
    assert all(torch.equal(theirs[name], p) for name, p in t.policy.reference_model.named_parameters())


SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dapo", SYNC, "sync_ref_model does nothing: the reference of objective 'dapo' is not there"),
    ("grpo", {**SYNC, "beta": 0.0}, "is not there"),
    ("rloo", {"beta": 0.1, **SYNC, "ref_folder": "ref"}, "is a model of its own"),
    ("rloo", {"beta": 0.1, "ref_model_sync_steps": 2}, "does nothing while sync_ref_model is off"),
    ("rloo", {"beta": 0.1, **SYNC, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha"),
]


@pytest.mark.parametrize(("objective", "extra", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path: Path, objective: str, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, objective, **extra)
    assert words in str(caught.value)


@pytest.mark.parametrize("objective", ["agro_off_policy", "kl_policy_gradient_exact", "agro_off_policy_rb"])
def test_a_reference_that_moves_inside_a_generation_is_the_one_compared_with(tmp_path: Path, objective: str) -> None:
    """Reference := policy after every step, so every step starts at it: no KL, though the answers are old ones."""
    extra = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "num_iterations": 3}
    run(tmp_path, objective, beta=0.1, **extra).train()
    kls = [row["kl"] for row in log_of(tmp_path)]
    assert len(kls) == 4
    assert max(map(abs, kls)) < 1e-6
