"""Bad input 34-46: what reward functions return, and groups."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.config import ConfigError
from rlft.errors import TrainingError
from rlft.rewards import RewardError
from rlft.run.step import generation_counts
from tests.bad_input.common import (
    PROMPTS,
    RANKED,
    once,
    refused,
    refused_by_command,
    same,
    state,
    stops,
    trainer,
    varied,
)


class Later:
    """A good reward until call number ``at`` (evaluations included), then what the test wants."""

    __name__ = "later"

    def __init__(self, bad: Any, at: int = 1) -> None:
        self.bad, self.at, self.calls = bad, at, 0

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        self.calls += 1
        good = varied(completions, completion_ids)
        return good if self.calls <= self.at else self.bad(good)


def run(folder: Path, reward: Any, **extra: Any) -> Any:
    return trainer(folder, "rloo", PROMPTS, reward=reward, **{"beta": 0.0, "max_steps": 3, "save_steps": 1, **extra})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_input_34_reward_not_finite(tmp_path: Path, value: float) -> None:
    t = run(tmp_path, Later(lambda good: [*good[:3], value, *good[4:]]))
    stops(
        t,
        "'later'",
        f"returned {value} for row 3",
        "at step 2",
        "must be finite",
        "return None",
        kind=RewardError,
        at=1,
    )


def test_bad_input_35_one_reward_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Out of the loss and out of the baseline: the group of four has the baseline of its other three."""
    t = trainer(tmp_path, "reinforce", PROMPTS, reward=Later(lambda good: [None, *good[1:]], at=0))
    (batch,) = t.source.next(0)
    assert math.isnan(float(batch.rewards[0]))
    assert not bool(batch.mask[0].any())
    own = batch.rewards[1:4]
    torch.testing.assert_close(batch.advantages[1:4], own - (own.sum() - own) / 2, rtol=1e-5, atol=1e-5)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        t = run(tmp_path / "b", Later(lambda good: [None, *good[1:]], at=0))
        values = t.train()
    assert values["rewards/unscored_fraction"] == pytest.approx(1 / 8)
    once(caplog.records, "'later'", "returned None", "left out")


def test_bad_input_36_all_rewards_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No update, the moments included; after N such steps in a row the run stops."""
    seen: list[Any] = []

    def note(event: str, t: Any, values: Any) -> None:
        if event == "step":
            seen.append(state(t))

    nothing = Later(lambda good: [None] * len(good))
    t = run(tmp_path, nothing, max_steps=9, max_unscored_steps=3, save_steps=None, callbacks=[note])
    with caplog.at_level(logging.WARNING):
        refused(
            t.train,
            "step 4",
            "no answer was scored for 3 steps in a row",
            "check the reward functions",
            kind=TrainingError,
        )
    assert len(seen) == 3
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])
    assert same(seen[0], state(t))
    once(caplog.records, "no completion of a batch has a reward")
    once(caplog.records, "step 2", "the weights stay as they are")


@pytest.mark.parametrize("kind", [int, bool])
def test_bad_input_37_reward_int_or_bool(tmp_path: Path, kind: type, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        t = run(tmp_path, Later(lambda good: [kind(r % 2) for r in good], at=0))
        (batch,) = t.source.next(0)
        t.source.next(1)
    assert batch.rewards.dtype == torch.float32
    assert set(batch.rewards.tolist()) <= {0.0, 1.0}
    once(caplog.records, "'later'", f"of type {kind.__name__}: taken as a float")


def test_bad_input_38_reward_string_or_with_gradient(tmp_path: Path) -> None:
    t = run(tmp_path, Later(lambda good: ["1.0"] * len(good), at=0))
    stops(t, "'later'", "'1.0' of type str for row 0", "return a plain float", kind=RewardError)
    t = run(tmp_path / "b", Later(lambda good: torch.tensor(good, requires_grad=True), at=0))
    stops(t, "'later'", "requires grad", "under torch.no_grad()", kind=RewardError)
    t = run(tmp_path / "c", Later(lambda good: [torch.tensor(r, requires_grad=True) for r in good], at=0))
    stops(t, "'later'", "requires grad for row 0", "return a plain float", kind=RewardError)


@pytest.mark.parametrize("count", [0, 7, 9])
def test_bad_input_39_wrong_number_of_rewards(tmp_path: Path, count: int) -> None:
    t = run(tmp_path, Later(lambda good: [0.5] * count))
    stops(
        t, "'later'", f"{count} rewards for 8 completions", "one number or None per completion", kind=RewardError, at=1
    )


def test_bad_input_40_reward_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def raises(good: list[float]) -> Any:
        raise KeyError("no such answer")

    stops(
        run(tmp_path, Later(raises)),
        "'later' raised KeyError",
        "no such answer",
        "at step 2",
        "return None",
        kind=RewardError,
        at=1,
    )
    (tmp_path / "own.py").write_text("def own(completions, **columns):\n    raise OSError('gone')\n")
    folder = tmp_path / "cli"
    folder.mkdir()
    said = refused_by_command_online(capsys, folder, tmp_path / "own.py")
    assert "'own' raised OSError: gone" in said


def refused_by_command_online(capsys: pytest.CaptureFixture[str], folder: Path, file: Path) -> str:
    """The command fails while running: exit code 1, one line, no traceback."""
    from tests.bad_input.common import command

    settings = {
        "objective": "rloo",
        "beta": 0.0,
        "rewards": [f"{file}:own"],
        "num_generations": 4,
        "per_device_train_batch_size": 8,
    }
    code, said = command(capsys, folder, rows=PROMPTS, **settings)
    assert code == 1
    assert "Traceback" not in said
    # the state before the failed step is kept, for the same command to go on from
    assert [path.name for path in (folder / "run").glob("checkpoint-*")] == ["checkpoint-0"]
    return said


@pytest.mark.timeout(60)
def test_bad_input_41_reward_hangs(tmp_path: Path) -> None:
    def hangs(good: list[float]) -> Any:
        time.sleep(20)

    t = run(tmp_path, Later(hangs), reward_timeout=0.3)
    started = time.monotonic()
    stops(t, "'later'", "did not return within 0.3 s", "at step 2", "raise the reward timeout", kind=RewardError, at=1)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("objective", ["rloo", "grpo", "agro_off_policy", "ppo"])
@pytest.mark.parametrize("size", [1e30, 1e300])
def test_bad_input_42_reward_huge(tmp_path: Path, objective: str, size: float) -> None:
    """A finite result, or the run stops with its weights as they were: never a NaN in a weight."""
    huge = Later(lambda good: [*good[:2], size, *good[3:]], at=0)
    t = trainer(tmp_path, objective, PROMPTS, reward=huge, beta=0.1, max_steps=1)
    before = state(t)
    said = ""
    try:
        t.train()
    except (TrainingError, RewardError) as error:
        said = str(error)
    if said:
        assert "step" in said
        assert "Lower" in said or "scale the reward" in said
        assert same(before, state(t))
        assert {path.name for path in t.run_dir.glob("checkpoint-*")} <= {"checkpoint-0"}
    else:
        assert size == 1e30
    assert all(bool(torch.isfinite(v).all()) for v in state(t).values())


def test_bad_input_43_equal_rewards_in_a_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlft"):
        t = trainer(tmp_path, "reinforce", PROMPTS, reward=Later(lambda good: [0.5] * 4 + good[4:], at=0))
        (batch,) = t.source.next(0)
        t.source.next(1)
    assert batch.advantages[:4].tolist() == [0.0] * 4
    assert bool((batch.advantages[4:] != 0).any())
    once(caplog.records, "step 1", "1 of 2 groups earn equal rewards", "advantage is 0", "dynamic_sampling: true")


@pytest.mark.parametrize("objective", ["rloo", "grpo"])
def test_bad_input_44_all_groups_equal_for_many_steps(
    tmp_path: Path, objective: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_counts, "EQUAL_STEPS", 3)
    reward = Later(lambda good: [0.5] * len(good), at=0)
    reward.at = 2  # two good generations first: the count begins with the first bad one
    with caplog.at_level(logging.WARNING, "rlft"):
        t = trainer(tmp_path, objective, PROMPTS, reward=reward, beta=0.0, max_steps=9)
        values = t.train()
    assert values["frac_reward_zero_std"] == 1.0
    once(caplog.records, "step 5", "equal rewards for 3 generations in a row", "num_generations (now 4)")


@pytest.mark.parametrize("objective", ["rloo", "grpo", "agro_off_policy"])
def test_bad_input_45_group_of_one(tmp_path: Path, objective: str) -> None:
    refused(
        lambda: trainer(tmp_path, objective, PROMPTS, reward=varied, beta=0.1, num_generations=1),
        f"'{objective}'", "set num_generations >= 2, got 1", kind=ConfigError,
    )  # fmt: skip
    rows = [*RANKED, {"prompt": "9=", "completions": ["a"], "scores": [1.0]}]
    refused(
        lambda: trainer(tmp_path, objective, rows, beta=0.1),
        f"'{objective}'", "at least 2, got 1 in 1 of 9 rows (first: row 8)", "leave those rows out", kind=ConfigError,
    )  # fmt: skip


def test_bad_input_46_batch_not_divisible_by_the_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        lambda: trainer(tmp_path, "grpo", PROMPTS, reward=varied, per_device_train_batch_size=6),
        "per_device_train_batch_size x gradient_accumulation_steps = 6 x 1", "num_generations=4", "a multiple of 4",
        kind=ConfigError,
    )  # fmt: skip
    refused_by_command(
        capsys, tmp_path, "per_device_train_batch_size=6", "a multiple of num_generations=4", rows=PROMPTS, objective="rloo",
        beta=0.1, rewards=["length"], num_generations=4, per_device_train_batch_size=6, gradient_accumulation_steps=2,
    )  # fmt: skip
