"""NaN and infinity in loss, gradient or an updated weight: the step is not applied, and the newest checkpoint stays good."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import checkpoint
from rlft.config import ConfigError
from rlft.errors import TrainingError
from rlft.metrics import read_metrics
from rlft.objective import Objective
from rlft.run.step.update import undo_for
from tests.bad_input.common import ANSWERS, same, state, stops, trainer
from tests.tiny import tiny_llama

BAD = [math.nan, math.inf, -math.inf]


def run(folder: Path, **extra: Any) -> Any:
    return trainer(folder, "sft", ANSWERS, **{"save_steps": 1, "max_steps": 4, **extra})


def checkpoints(t: Any) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(t.run_dir.glob("checkpoint-*/**/*")) if p.is_file()}


def fails_then_resumes(folder: Path, t: Any, *words: str, at: int = 2, **extra: Any) -> None:
    """The run stops at step ``at``; the same run without the fault goes on from there and ends as if nothing had been."""
    saved: list[dict[str, bytes]] = []
    t.callbacks.append(lambda event, run, values: saved.append(checkpoints(run)) if event == "save" else None)
    expected = [f"checkpoint-{at}"]
    before: dict[str, Tensor] = {}

    def remember(event: str, r: Any, values: Any) -> None:
        if event == "step":
            before.clear()
            before.update(state(r))

    t.callbacks.append(remember)
    with pytest.raises(TrainingError) as caught:
        t.train()
    for word in (f"step {at + 1}", *words):
        assert word in str(caught.value), str(caught.value)
    assert t.step == at
    assert any(name.startswith("moment") for name in before)
    assert same(before, state(t))
    assert all(p.grad is None for p in t.policy.parameters())
    latest = checkpoint.find_latest(t.run_dir)
    assert latest is not None
    assert latest.name in expected
    assert saved[-1] == checkpoints(t)
    again, whole = run(folder, **extra), run(folder / "whole", **extra)
    again.train()
    whole.train()
    assert same(state(again), state(whole))


@pytest.mark.parametrize("value", BAD)
def test_loss(tmp_path: Path, value: float) -> None:
    t = run(tmp_path)
    compute = t.compute_loss
    t.compute_loss = lambda b, d: compute(b, d) + (value if t.step == 2 else 0.0)
    fails_then_resumes(tmp_path, t, f"loss={value}", "was not applied", "Lower learning_rate")


@pytest.mark.parametrize("value", BAD)
def test_one_entry_of_one_gradient(tmp_path: Path, value: float) -> None:
    """The loss is finite; one number of one gradient is not."""
    t = run(tmp_path)

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        if t.step == 2:
            gradient.view(-1)[7] = value
        return gradient

    dict(t.policy.named_parameters())["model.model.layers.1.mlp.up_proj.weight"].register_hook(poison)
    fails_then_resumes(tmp_path, t, "gradient norm=", "was not applied")


def test_loss_of_the_last_micro_batch(tmp_path: Path) -> None:
    value, accumulation = math.nan, 2
    extra = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    t = run(tmp_path, **extra)
    compute, calls = t.compute_loss, []

    def last(b: Any, d: Any) -> Tensor:
        calls.append(t.step)
        spoil = t.step == 2 and calls.count(2) == accumulation
        return compute(b, d) + (value if spoil else 0.0)

    t.compute_loss = last
    fails_then_resumes(tmp_path, t, f"loss={value}", **extra)


class Spoils(torch.optim.AdamW):
    """AdamW whose third step leaves something that is no number in one weight."""

    value = math.nan

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        parameter = self.param_groups[0]["params"][3]
        if int(self.state[parameter]["step"]) == 3:
            with torch.no_grad():
                parameter.view(-1)[5] = self.value
        return result


@pytest.mark.parametrize("value", BAD)
def test_weight_after_the_update(tmp_path: Path, value: float) -> None:
    """Loss and gradient are finite; the update is not, and it is taken back, moments and all."""
    model = tiny_llama()
    optimizer = Spoils(model.parameters(), lr=1e-2)
    optimizer.value = value
    t = run(tmp_path, model=model, optimizers=(optimizer, None))
    saved: list[dict[str, bytes]] = []
    t.callbacks.append(lambda event, r, values: saved.append(checkpoints(r)) if event == "save" else None)
    name = {id(p): n for n, p in t.policy.named_parameters()}[id(optimizer.param_groups[0]["params"][3])]
    before: list[dict[str, Tensor]] = []
    t.callbacks.append(lambda event, r, values: before.append(state(r)) if event == "step" else None)
    with pytest.raises(TrainingError, match=f"step 3: the update left {name} not finite; it was taken back") as caught:
        t.train()
    assert "Lower learning_rate (now 0.01)" in str(caught.value)
    assert same(before[-1], state(t))
    assert any(key.startswith("moment") for key in before[-1])
    assert saved[-1] == checkpoints(t)
    assert (t.step, len(saved)) == (2, 2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_learning_rate_that_overflows_the_weights(tmp_path: Path, kind: Any) -> None:
    """The optimizers that are trusted without a copy are not trusted with a learning rate like this one."""
    model = tiny_llama()
    t = run(tmp_path, model=model, optimizers=(kind(model.parameters(), lr=1e-3), None))

    def explode(event: str, r: Any, values: Any) -> None:
        if event == "step" and r.step == 2:
            for group in r.optimizer.param_groups:
                group["lr"] = 1e308

    t.callbacks.append(explode)
    t.config.max_grad_norm = None
    states: list[dict[str, Tensor]] = []
    t.callbacks.append(lambda event, r, values: states.append(state(r)) if event == "step" else None)
    # SGD raises by itself, in the middle of its step
    message = "step 3: the update left .* not finite; it was taken back" if kind is torch.optim.AdamW else "overflow"
    with pytest.raises(RuntimeError, match=message):
        t.train()
    assert t.step == 2
    assert same(states[-1], state(t))


def test_ordinary_settings_spend_no_copy() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    groups: list[tuple[Callable[..., Any], dict[str, Any], bool]] = [
        (torch.optim.AdamW, {"lr": 1e-3}, False),
        (torch.optim.AdamW, {"lr": 10.0, "weight_decay": 1.0}, False),
        (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}, False),
        (torch.optim.AdamW, {"lr": 1e21}, True),
        (torch.optim.AdamW, {"lr": 1e-3, "eps": 0.0}, True),
        (torch.optim.SGD, {"lr": 1e21}, True),
        (torch.optim.RMSprop, {"lr": 1e-3}, True),
        (Spoils, {"lr": 1e-3}, True),
    ]
    for kind, options, copied in groups:
        assert (undo_for(kind([weight], **options), norm=5.0) is not None) is copied, (kind, options)
    assert undo_for(torch.optim.SGD([weight], lr=1.0), norm=1e22) is not None


@pytest.mark.parametrize("save_steps", [1, 3])
def test_spoilt_weight_that_no_gradient_sees(tmp_path: Path, save_steps: int) -> None:
    """A NaN in the embedding of a token that no row holds: never saved over a good checkpoint, and found by the next step."""
    t = run(tmp_path, save_steps=save_steps, max_steps=6)

    def spoil(event: str, r: Any, values: Any) -> None:
        if event == "step" and r.step == 4:
            with torch.no_grad():
                dict(r.policy.named_parameters())["model.model.embed_tokens.weight"][90, 3] = math.nan

    t.callbacks.append(spoil)
    found = (
        "step 4: .*embed_tokens.weight holds NaN"
        if save_steps == 1
        else "step 5: the update left .*embed_tokens.weight not"
    )
    with pytest.raises(TrainingError, match=found):
        t.train()
    latest = checkpoint.load_latest(t.run_dir)
    assert latest is not None
    assert latest.step == 3
    assert all(bool(torch.isfinite(x).all()) for x in latest.tensors["trainable"].values())


def test_log_prob_of_minus_infinity(tmp_path: Path) -> None:
    def zero_probability(logps: Tensor, mask: Tensor) -> Tensor:
        calls.append(1)
        return torch.log(torch.exp(logps) * (0.0 if len(calls) > 3 else 1.0))

    calls: list[int] = []
    t = trainer(tmp_path, "", ANSWERS, objective_given=Objective(zero_probability), save_steps=1, max_steps=4)
    stops(t, "step 3", "loss=", "was not applied", kind=TrainingError, at=2)


def test_settings_that_are_no_numbers_never_reach_the_optimizer(tmp_path: Path) -> None:
    for name in (
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "temperature",
    ):
        for value in (math.nan, math.inf):
            with pytest.raises(ConfigError, match=name):
                run(tmp_path, **{name: value})


# -- steps that may be skipped ------------------------------------------------------------------------------------------------
def poison_steps(t: Any, *steps: int, value: float = math.nan) -> list[dict[str, Tensor]]:
    """Make the loss of these steps (counted from 0) not finite; gives the state after each step, as it goes."""
    compute = t.compute_loss
    t.compute_loss = lambda b, d: compute(b, d) + (value if t.step in steps else 0.0)
    states = [state(t)]
    t.callbacks.append(lambda event, r, values: states.append(state(r)) if event == "step" else None)
    return states


@pytest.mark.parametrize("value", BAD)
def test_a_skipped_step_changes_nothing_and_is_logged_raw(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    t = run(tmp_path, max_nonfinite_steps=2, save_steps=None)
    states = poison_steps(t, 1, 2, value=value)
    t.train()
    assert t.step == 4
    assert [same(a, b) for a, b in itertools.pairwise(states)] == [False, True, True, False]
    assert any(name.startswith("moment") for name in states[2])
    rows = read_metrics(t.run_dir)
    assert [math.isfinite(row["loss"]) for row in rows] == [True, False, False, True]
    assert str(rows[1]["loss"]) == str(value)
    assert [row.get("nonfinite_steps") for row in rows] == [0, 1, 2, 2]
    told = [r.message for r in caplog.records if "was not applied" in r.message]
    assert [message.split(":")[0] for message in told] == ["step 2", "step 3"]
    assert "1 of max_nonfinite_steps=2 skipped" in told[0]


def test_one_too_many_stops(tmp_path: Path) -> None:
    """In all, not in a row."""
    t = run(tmp_path, max_nonfinite_steps=1, max_steps=6)
    states = poison_steps(t, 1, 3)
    with pytest.raises(TrainingError, match="step 4: loss=nan"):
        t.train()
    assert (t.step, t.update.nonfinite_steps) == (3, 1)
    assert same(states[3], state(t))


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    t = run(tmp_path, max_nonfinite_steps=1, max_steps=6)
    poison_steps(t, 1, 3)
    with pytest.raises(TrainingError, match="step 4"):
        t.train()
    again = run(tmp_path, max_nonfinite_steps=1, max_steps=6)
    poison_steps(again, 4)
    with pytest.raises(TrainingError, match="step 5"):
        again.train()
    assert again.update.nonfinite_steps == 1
    more = run(tmp_path, max_nonfinite_steps=2, max_steps=6)  # the limit may be raised for the same run
    poison_steps(more, 4)
    more.train()
    assert (more.step, more.update.nonfinite_steps) == (6, 2)


def test_outputs_that_are_not_finite_can_be_skipped_too(tmp_path: Path) -> None:
    """The objective itself would refuse them."""
    for limit in (0, 1):
        t = run(tmp_path / str(limit), max_nonfinite_steps=limit, save_steps=None)
        forward, states = t.forward, [state(t)]

        def spoilt(batch: Any, want: Any, t: Any = t, forward: Any = forward) -> Any:
            outputs = forward(batch, want)
            bad = torch.where(batch.mask, outputs["logps"] * math.nan, outputs["logps"])
            return {**outputs, "logps": bad} if t.step == 2 else outputs

        t.forward = spoilt
        t.callbacks.append(lambda event, r, values, s=states: s.append(state(r)) if event == "step" else None)
        if limit == 0:
            with pytest.raises(ValueError, match=r"step 3: .*NaN"):
                t.train()
            continue
        t.train()
        assert same(states[2], states[3])
        assert not same(states[3], states[4])


def test_an_update_that_was_taken_back_can_be_skipped(tmp_path: Path) -> None:
    model = tiny_llama()
    t = run(
        tmp_path,
        model=model,
        optimizers=(Spoils(model.parameters(), lr=1e-2), None),
        max_nonfinite_steps=1,
        max_steps=3,
    )
    states: list[dict[str, Tensor]] = []
    t.callbacks.append(lambda event, r, values: states.append(state(r)) if event == "step" else None)
    t.train()
    assert same(states[1], states[2])
    assert t.update.nonfinite_steps == 1


# -- the number itself ----------------------------------------------------------------------------------------------------
def rows_of(t: Any) -> dict[int, Any]:
    return {row["step"]: row["loss"] for row in read_metrics(t.run_dir / "metrics.jsonl")}


def spoil(t: Any, value: float, *, at: int = 2) -> None:
    compute = t.compute_loss
    t.compute_loss = lambda b, d: compute(b, d) + (value if t.step == at else 0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_the_value_that_stops_a_run_is_in_its_log(tmp_path: Path, value: float) -> None:
    t = run(tmp_path, logging_steps=4)
    spoil(t, value)
    with pytest.raises(TrainingError):
        t.train()
    assert rows_of(t) == {3: value}
    again = run(tmp_path, logging_steps=4)
    again.train()
    assert list(rows_of(again)) == [4]  # the step was done again: its row is gone with it


def test_log_probs_that_stop_a_run_are_in_its_log(tmp_path: Path) -> None:
    t = run(tmp_path, logging_steps=4)
    forward = t.forward
    t.forward = lambda batch, want: {k: v * (math.nan if t.step == 2 else 1.0) for k, v in forward(batch, want).items()}
    with pytest.raises(TrainingError, match="step 3"):
        t.train()
    assert list(rows_of(t)) == [3]
    assert math.isnan(rows_of(t)[3])


@pytest.mark.parametrize("every", [1, 4])
def test_the_value_of_a_skipped_step_is_in_the_log_once(tmp_path: Path, every: int) -> None:
    t = run(tmp_path, logging_steps=every, max_nonfinite_steps=1)
    spoil(t, -math.inf)
    t.train()
    rows = list(read_metrics(t.run_dir / "metrics.jsonl"))
    assert [(row["step"], row["nonfinite_steps"]) for row in rows if row["loss"] == -math.inf] == [(3, 1.0)]
    assert [row["step"] for row in rows] == ([1, 2, 3, 4] if every == 1 else [3, 4])


def test_trackers_get_what_is_not_finite(tmp_path: Path) -> None:
    t, got = run(tmp_path, max_nonfinite_steps=1), {}
    t.accelerator.log = lambda values, step: got.setdefault(step, values)
    spoil(t, math.inf)
    t.train()
    assert got[3]["loss"] == math.inf
    assert got[3]["nonfinite_steps"] == 1.0
