"""Paths of a GPU on a CPU that plays one: no tensor is left behind, and the kernels' callers are those of CUDA."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch

from rlft.errors import Interrupted
from rlft.models import Policy
from tests.gpu.pretend import CUDA, pretend_cuda
from tests.models.cuda_standins import CALLS
from tests.models.test_shared_layout import ragged
from tests.test_trainer import PAIRS, PROMPTS, digits_reward, trainer
from tests.tiny import tiny_llama

ALL = frozenset({"logps", "entropy", "token_kl", "ref_logps", "values"})


@pytest.fixture
def cuda() -> Iterator[None]:
    with pretend_cuda(), mock.patch.object(accelerate.Accelerator, "device", CUDA):
        yield


def test_the_pretence_can_tell(cuda: None) -> None:
    x = torch.zeros(3, device="cuda")
    assert (x + 1).device == x[1:].device == torch.zeros_like(x).device == CUDA
    assert x.cpu().device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="add found cuda:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()
    assert x[torch.tensor([0, 2])].device == CUDA  # indices may be on the CPU


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, "flash"), (torch.float32, "efficient")], ids=str)
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_policy_leaves_nothing_behind(cuda: None, layout: Any, dtype: torch.dtype, kernel: str) -> None:
    policy = Policy(tiny_llama(dtype=dtype).to(CUDA), critic="shared", layout=layout)
    out = policy(ragged().to(CUDA), want=ALL)
    (out["logps"].sum() + out["token_kl"].sum() + out["values"].sum()).backward()
    assert {p.grad.device for p in policy.parameters() if p.grad is not None} == {CUDA}
    assert (CALLS[f"{kernel} backward"] > 0) == (layout == "shared")


RUNS = {
    "dpo": ("dpo", PAIRS, {"beta": 0.1}),
    "grpo": ("grpo", PROMPTS, {"beta": 0.04, "reward": digits_reward, "lora": True}),
    "agro": ("agro_off_policy", PROMPTS, {"beta": 0.1, "reward": digits_reward}),
}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_steps_leave_nothing_behind(cuda: None, tmp_path: Path, name: str) -> None:
    objective, rows, extra = RUNS[name]
    t = trainer(tmp_path, objective, rows, max_steps=2, **extra)
    assert t.device == CUDA
    values = t.train()
    assert math.isfinite(values["loss"])
    assert {p.device for p in t.policy.parameters()} == {CUDA}
    rows_of_log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("meter/mfu" in row for row in rows_of_log if "meter/seconds" in row)


def test_a_generation_that_was_interrupted_comes_back_to_the_device(cuda: None, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"reward": digits_reward, "beta": 0.04, "num_iterations": 2, "max_steps": 4}

    def interrupt(event: str, t: Any, values: Any) -> None:
        if event == "step" and t.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = trainer(tmp_path, "grpo", PROMPTS, **extra)
    cut.callbacks.append(interrupt)
    with pytest.raises(Interrupted):
        cut.train()
    assert math.isfinite(trainer(tmp_path, "grpo", PROMPTS, **extra).train()["loss"])
