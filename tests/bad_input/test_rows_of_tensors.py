"""Bad input 64-74: masks, shapes and values of the tensors themselves, in the pure losses and inside a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import advantages, losses
from rlft.errors import TrainingError
from rlft.types import Batch, LossOutput
from tests.bad_input.common import ANSWERS, PROMPTS, once, refused, stops, trainer, varied

B, T = 4, 3
GROUPS = torch.tensor([0, 0, 1, 1])


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Everything a token-level loss takes; deterministic and different in every entry."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return -torch.rand(B, T, generator=generator, dtype=torch.float64).add(0.1).to(dtype)

    return {
        "logps": draw().requires_grad_(), "old_logps": draw(), "ref_logps": draw(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=dtype),
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=dtype),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }  # fmt: skip


#: name -> the loss on those tensors.
LOSSES: dict[str, Callable[[dict[str, Tensor]], LossOutput]] = {
    "sft": lambda x: losses.sft(x["logps"], x["mask"]),
    "grpo": lambda x: losses.grpo(
        x["logps"], x["old_logps"], x["ref_logps"], x["advantages"], x["mask"], clip_eps=0.2, beta=0.04
    ),
    "ppo_clip": lambda x: losses.ppo_clip(x["logps"], x["old_logps"], x["advantages"], x["mask"], clip_eps=0.2),
    "rloo": lambda x: losses.rloo(x["logps"], x["ref_logps"], x["rewards"], GROUPS, x["mask"], beta=0.1),
    "agro_off_policy": lambda x: losses.agro_off_policy(
        x["logps"], x["ref_logps"], x["rewards"], GROUPS, x["mask"], beta=0.1
    ),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


def value_and_gradient(name: str, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss = LOSSES[name](x).mean()
    (gradient,) = torch.autograd.grad(loss, x["logps"])
    return loss.detach(), gradient


@EVERY
def test_bad_input_64_row_without_a_token(name: str) -> None:
    """It contributes 0, and its mates keep their gradient to the last bit where no group joins them."""
    x = tensors()
    x["mask"][3] = False
    loss, gradient = value_and_gradient(name, x)
    assert bool(torch.isfinite(loss))
    assert not bool(gradient[3].any())
    assert bool(gradient[0].any())
    if name in ("sft", "ppo_clip"):
        three = {key: value[:3].detach().requires_grad_(value.requires_grad) for key, value in x.items()}
        alone, its_gradient = value_and_gradient(name, three)
        assert torch.equal(loss, alone)
        assert torch.equal(gradient[:3], its_gradient)


class Ends:
    """A sampler whose answers end as asked: the others run to the limit and are masked."""

    def __init__(self, finished: Callable[[int], bool]) -> None:
        self.finished = finished

    def sample(
        self, prompt_ids: Any, n: int, params: Any, *, seed: int, weight_version: int = 0, poll: Any = None
    ) -> Any:
        from rlft.rollout import Rollout

        count = len(prompt_ids) * n
        ids = [[20 + (i + weight_version) % 9, 21, 2] for i in range(count)]
        ends = [self.finished(i) for i in range(count)]
        return Rollout(ids, [[-1.0] * 3 for _ in range(count)], ends, weight_version)


def masked_run(folder: Path, finished: Callable[[int], bool]) -> Any:
    extra = {
        "mask_truncated_completions": True,
        "sampler": Ends(finished),
        "save_steps": 1,
        "beta": 0.0,
        "sampler_check_steps": 0,
    }
    return trainer(folder, "grpo", PROMPTS, reward=varied, max_steps=3, **extra)


def test_bad_input_64_answer_without_a_token_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlft"):
        values = masked_run(tmp_path, lambda i: i != 3).train()
    assert math.isfinite(values["loss"])
    assert values["completions/clipped_ratio"] == pytest.approx(1 / 8)
    once(
        caplog.records, "step 1", "1 of 8 answers have no token to train on", "contribute 0", "max_completion_length=6"
    )


@EVERY
def test_bad_input_65_batch_without_a_token(name: str) -> None:
    x = tensors()
    x["mask"][:] = False
    loss, gradient = value_and_gradient(name, x)
    assert loss.item() == 0.0
    assert not bool(gradient.any())


def test_bad_input_65_generation_without_a_token(tmp_path: Path) -> None:
    """The run stops at that step: training on would only move the schedule."""
    t = masked_run(tmp_path, lambda i: False)
    stops(
        t,
        "step 1",
        "every answer was masked",
        "Raise max_completion_length (now 6)",
        "mask_truncated_completions: false",
        kind=TrainingError,
    )
    t = masked_run(tmp_path / "b", lambda i: True)
    t.callbacks.append(
        lambda event, run, values: setattr(run.sampler, "finished", lambda i: False) if event == "step" else None
    )
    stops(t, "step 2", "every answer was masked", kind=TrainingError, at=1)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_bad_input_66_mask_that_is_not_bool(name: str, dtype: torch.dtype) -> None:
    x = tensors()
    x["mask"] = x["mask"].to(dtype)
    refused(lambda: LOSSES[name](x), "mask must be a bool tensor", str(dtype), "mask.bool()")


def test_bad_input_66_mask_of_a_batch() -> None:
    refused(lambda: batch(mask=torch.ones(B, T)), "mask must be a bool tensor", "torch.float32", "mask.bool()")


def batch(**changes: Any) -> Batch:
    ids = torch.zeros(B, T, dtype=torch.long)
    base = {
        "prompt_ids": ids[:2], "prompt_mask": torch.ones(2, T, dtype=torch.bool), "completion_ids": ids,
        "completion_mask": torch.ones(B, T, dtype=torch.bool), "mask": torch.ones(B, T, dtype=torch.bool), "group_ids": GROUPS,
    }  # fmt: skip
    return Batch(**{**base, **changes})


@pytest.mark.parametrize(
    ("name", "field"),
    [("sft", "mask"), ("grpo", "old_logps"), ("ppo_clip", "old_logps"), ("rloo", "ref_logps"), ("agro_off_policy", "ref_logps")],
)  # fmt: skip
def test_bad_input_67_shape_or_device_mismatch(name: str, field: str) -> None:
    x = tensors()
    x[field] = x[field][:, :2]
    refused(lambda: LOSSES[name](x), f"{field} must have the shape of logps, [4, 3], got [4, 2]", "reshape")
    x = tensors()
    x[field] = x[field].to("meta")
    refused(lambda: LOSSES[name](x), f"{field} is on meta and logps on cpu", "move them to one device")


@pytest.mark.parametrize(
    ("name", "field", "shape"),
    [("sft", "mask", (B, 1)), ("grpo", "old_logps", (B, 1)), ("grpo", "ref_logps", (1, T)), ("grpo", "advantages", (B, 1)),
     ("ppo_clip", "advantages", (1,)), ("rloo", "rewards", (B, 1)), ("agro_off_policy", "rewards", (1,))],
)  # fmt: skip
def test_bad_input_68_shape_that_would_broadcast(name: str, field: str, shape: tuple[int, ...]) -> None:
    x = tensors()
    x[field] = x[field].reshape(B, -1)[: shape[0], : (shape[1] if len(shape) > 1 else 1)].reshape(shape)
    message = refused(lambda: LOSSES[name](x), field, str(list(shape)))
    assert "[4]" in message or "[4, 3]" in message


@EVERY
def test_bad_input_69_minus_infinity_that_counts(name: str) -> None:
    x = tensors()
    with torch.no_grad():
        x["logps"][1, 2] = -math.inf
    refused(lambda: LOSSES[name](x), "logps holds -inf at [1, 2]", "must be finite", "check the model's output")


def test_bad_input_69_in_a_run(tmp_path: Path) -> None:
    """The loss meets a token of probability zero in step 2: the run stops there, and keeps step 1."""

    def refuses(logps: Tensor, mask: Tensor) -> LossOutput:
        calls["n"] += 1
        return losses.sft(
            logps - (math.inf if calls["n"] > 2 else 0.0), mask
        )  # the first call is the objective's probe

    from rlft.objective import Objective

    calls = {"n": 0}
    t = trainer(tmp_path, "", ANSWERS, objective_given=Objective(refuses), save_steps=1, max_steps=3)
    stops(
        t,
        "step 2",
        "logps holds -inf at [0, 0]",
        "check the model's output",
        "weights are those of step 1",
        kind=TrainingError,
        at=1,
    )


@EVERY
def test_bad_input_70_nan_that_is_masked(name: str) -> None:
    x, y = tensors(), tensors()
    for key in ("logps", "old_logps", "ref_logps"):
        with torch.no_grad():
            y[key][0, 2] = math.nan
            y[key][2, 1] = math.inf
    for z in (x, y):
        z["mask"][0, 2] = z["mask"][2, 1] = False
    for left, right in zip(value_and_gradient(name, x), value_and_gradient(name, y), strict=True):
        assert torch.equal(left, right)


@EVERY
def test_bad_input_71_positive_log_prob(name: str) -> None:
    for dtype, value in ((torch.float64, 2e-6), (torch.float32, 1e-3)):
        x = tensors(dtype)
        with torch.no_grad():
            x["logps"][2, 0] = value
        refused(
            lambda x=x: LOSSES[name](x),
            "logps holds",
            "at [2, 0]",
            "cannot be positive",
            "log-softmax outputs, not logits",
        )
    x = tensors()
    with torch.no_grad():
        x["logps"][2, 0] = 5e-7  # rounding
    assert bool(torch.isfinite(LOSSES[name](x).mean()))


@EVERY
def test_bad_input_72_integer_log_probs(name: str) -> None:
    x = tensors()
    x["logps"] = torch.full((B, T), -1)
    refused(lambda: LOSSES[name](x), "logps must be floating point", "torch.int64", "logps.float()")


@pytest.mark.parametrize(
    ("name", "field"), [("grpo", "old_logps"), ("grpo", "ref_logps"), ("ppo_clip", "old_logps"), ("rloo", "ref_logps")]
)
def test_bad_input_73_constants_that_require_grad(name: str, field: str) -> None:
    """A batch refuses them; a pure loss detaches them at its door, so that no gradient can leak."""
    refused(
        lambda: batch(**{field: torch.zeros(B, T, requires_grad=True)}),
        f"{field} requires grad",
        f"pass {field}.detach()",
    )
    x, y = tensors(), tensors()
    y[field].requires_grad_()
    loss = LOSSES[name](y).mean()
    assert torch.autograd.grad(loss, y[field], allow_unused=True, retain_graph=True) == (None,)
    assert torch.equal(torch.autograd.grad(loss, y["logps"])[0], value_and_gradient(name, x)[1])


@pytest.mark.parametrize("name", ["rloo", "agro_off_policy"])
def test_bad_input_74_group_ids_in_any_order(name: str) -> None:
    """Rows of a group need not be neighbours, and ids may have gaps."""
    x = tensors()
    loss, gradient = value_and_gradient(name, x)
    order = torch.tensor([2, 0, 3, 1])
    y = {key: value[order].detach().requires_grad_(value.requires_grad) for key, value in x.items()}
    function = getattr(losses, name)
    for ids in (GROUPS[order], GROUPS[order] * 7 + 3):
        mixed = function(y["logps"], y["ref_logps"], y["rewards"], ids, y["mask"], beta=0.1).mean()
        torch.testing.assert_close(mixed, loss, rtol=1e-12, atol=1e-14)
        (its_gradient,) = torch.autograd.grad(mixed, y["logps"])
        torch.testing.assert_close(its_gradient, gradient[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        advantages.leave_one_out(y["rewards"].detach(), GROUPS[order] * 7 + 3),
        advantages.leave_one_out(x["rewards"], GROUPS)[order],
    )


def test_bad_input_74_group_ids_missing_or_no_integers() -> None:
    refused(lambda: batch(group_ids=None), "group_ids", "NoneType", "[4]")
    refused(lambda: batch(group_ids=GROUPS.float()), "group_ids must be integers", "torch.float32")
    refused(lambda: batch(group_ids=GROUPS[:3]), "group_ids", "[4]", "got [3]")
