"""Callbacks: functions of rlft, and what was written for transformers' Trainer; what they ask for, and what they keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl

from rlft import Trainer, checkpoint
from rlft.config import Config, ConfigError
from tests.trainer.common import PAIRS, bits, log_of, run

HELD_OUT = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(20, 24)]


def pairs(folder: Path, callbacks: list[Any], **extra: Any) -> Trainer:
    return run(folder, "dpo", rows=PAIRS, callbacks=callbacks, beta=0.1, **extra)


def held_out(folder: Path, callbacks: list[Any], **extra: Any) -> Trainer:
    """Evaluated after every step, on rows of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    return pairs(folder, callbacks, eval_data=str(path), eval_steps=1, **extra)


class Scored(Trainer):
    """Its evaluations give the numbers of a list, one after the other."""

    numbers: tuple[float, ...] = ()

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        return {"eval_reward": self.numbers[self.step - 1], "eval_loss": -self.numbers[self.step - 1]}


def scored(folder: Path, numbers: tuple[float, ...], callbacks: list[Any], **extra: Any) -> Scored:
    t = held_out(folder, callbacks, kind=Scored, **extra)
    assert isinstance(t, Scored)
    t.numbers = numbers
    return t


class Asks(TrainerCallback):
    """Asks for one thing after one step."""

    def __init__(self, wish: str, step: int) -> None:
        self.wish, self.step = wish, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.wish, True)


class Heard(TrainerCallback):
    """Notes every event by its name and step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.given: dict[str, Any] = {}


def _noted(name: str) -> Any:
    def method(self: Heard, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append((name, state.global_step))
        self.given[name] = kwargs

    return method


for _name in (
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_pre_optimizer_step",
    "on_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end",
):  # fmt: skip
    setattr(Heard, _name, _noted(_name))


# -- what they see -----------------------------------------------------------------------------------------------------------
def test_the_state_has_the_names_that_callbacks_know(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    t = pairs(
        tmp_path,
        [lambda event, t, values: seen.append((t.state.global_step, t.state.max_steps, t.state.epoch))],
        per_device_train_batch_size=4,
    )
    assert (t.state.global_step, t.state.max_steps, t.state.epoch, t.state.log_history) == (0, 4, 0.0, [])
    t.train()
    assert seen == [(1, 4, 1 / 3), (2, 4, 2 / 3), (3, 4, 1.0), (4, 4, 4 / 3), (4, 4, 4 / 3), (4, 4, 4 / 3)]  # save, end
    history = t.state.log_history
    assert [(row["step"], row["epoch"]) for row in history] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 4 / 3)]
    assert [row["loss"] for row in history] == [row["loss"] for row in log_of(tmp_path)]


def test_the_history_of_a_run_that_goes_on_is_whole(tmp_path: Path) -> None:
    def stop(event: str, t: Trainer, values: Mapping[str, Any]) -> None:
        if event == "step" and t.step == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pairs(tmp_path, [stop], save_steps=2).train()
    t = pairs(tmp_path, [], save_steps=2)
    t.train()
    assert [row["step"] for row in t.state.log_history] == [1, 2, 3, 4]
    assert all("loss" in row for row in t.state.log_history)


def test_events_come_in_order_with_what_they_are_about(tmp_path: Path) -> None:
    heard = Heard()
    t = held_out(tmp_path, [heard], max_steps=3, save_steps=2, per_device_train_batch_size=4)
    t.train()
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    expected = ["on_init_end", "on_train_begin", "on_epoch_begin"]
    expected += [*step[:3], "on_step_end", "on_log", "on_log", "on_evaluate"]  # its own row, and that of the evaluation
    expected += [*step[:3], "on_step_end", "on_log", "on_log", "on_evaluate", "on_save"]
    expected += [*step[:3], "on_step_end", "on_epoch_end", "on_log", "on_log", "on_evaluate", "on_save", "on_train_end"]
    names = [name for name, _ in heard.events]
    # a row is written before or after the end of its step is told: both are right, as long as it is there
    assert sorted(names) == sorted(expected)
    assert [n for n in names if n != "on_log"] == [n for n in expected if n != "on_log"]
    assert heard.given["on_evaluate"]["metrics"].keys() >= {"eval_loss"}
    assert "eval_loss" in heard.given["on_log"]["logs"]
    about = heard.given["on_step_end"]
    assert about["model"] is t.model
    assert about["optimizer"] is t.optimizer
    assert about["processing_class"] is t.tokenizer
    assert dict(heard.events)["on_train_end"] == 3


def test_settings_are_read_under_their_names(tmp_path: Path) -> None:
    class Reads(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert (args.logging_steps, args.save_steps, args.max_steps, args.world_size) == (1, 2, 4, 1)
            assert args.per_device_train_batch_size == 4
            assert args.to_dict()["objective"] == "dpo"
            assert state.is_world_process_zero
            with pytest.raises(AttributeError, match=r"args\.deepspeed_plugin, and a run of rlft has no such setting"):
                _ = args.deepspeed_plugin
            self.read = True

    reads = Reads()
    pairs(tmp_path, [reads], save_steps=2, max_steps=4).train()
    assert reads.read


def test_a_class_is_made_and_one_may_be_added_later(tmp_path: Path) -> None:
    t = pairs(tmp_path, [Heard], max_steps=2)
    t.add_callback(Heard)
    t.add_callback(lambda event, t, values: None)
    t.train()
    first, second, function = t.callbacks
    assert isinstance(first, Heard)
    assert isinstance(second, Heard)
    assert len(first.events) == len(second.events) + 1  # it heard on_init_end too
    assert callable(function)
    with pytest.raises(ConfigError, match=r"callbacks must be a list of functions .* or transformers\.TrainerCallback"):
        t.add_callback(3)


# -- what they ask for -------------------------------------------------------------------------------------------------------
def test_asked_for_a_checkpoint(tmp_path: Path) -> None:
    pairs(tmp_path, [Asks("should_save", 2)]).train()
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def checkpoint_folders(folder: Path) -> list[Path]:
    return sorted((folder / "run").glob("checkpoint-*"))


def test_asked_for_an_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    pairs(folder, [Asks("should_evaluate", 2)], eval_data=str(folder / "held_out.jsonl")).train()
    assert [row["step"] for row in log_of(folder) if "eval_loss" in row] == [2, 4]


def test_asked_for_a_row(tmp_path: Path) -> None:
    asked, whole = tmp_path / "asked", tmp_path / "whole"
    pairs(asked, [Asks("should_log", 1)], logging_steps=3).train()
    pairs(whole, [], logging_steps=1).train()
    assert [row["step"] for row in log_of(asked)] == [1, 3, 4]
    assert log_of(asked)[0]["loss"] == log_of(whole)[0]["loss"]  # of that step, and the next row begins after it
    assert log_of(asked)[1]["rewards/margins"] == pytest.approx(
        (log_of(whole)[1]["rewards/margins"] + log_of(whole)[2]["rewards/margins"]) / 2, rel=1e-9
    )


@pytest.mark.parametrize("how", ["function", "transformers"])
def test_a_callback_ends_a_run_in_good_order(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    def function(event: str, t: Trainer, values: Mapping[str, Any]) -> None:
        t.control.should_training_stop |= event == "step" and t.step == 2

    stops: Any = function if how == "function" else Asks("should_training_stop", 2)
    t = held_out(tmp_path, [stops], disable_tqdm=False, report=True)
    last = t.train()
    assert t.step == 2
    assert t.state.finished
    assert last["eval_loss"] == log_of(tmp_path)[-1]["eval_loss"]
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["checkpoint-2"]
    assert checkpoint.load(checkpoint_folders(tmp_path)[0]).records["trainer"]["finished"] is True
    assert (tmp_path / "run/model/config.json").exists()
    assert (tmp_path / "run/report.html").exists()
    assert "done: 2 steps of 4, ended by a callback" in capsys.readouterr().out
    again = held_out(tmp_path, [])
    assert again.train() == {}  # it came to its end
    assert bits(again) == bits(t)


def test_a_script_that_a_callback_stops_ends_with_0(tmp_path: Path) -> None:
    code = f"""
from tests.trainer.test_callbacks import Asks, pairs
from pathlib import Path
pairs(Path({str(tmp_path)!r}), [Asks("should_training_stop", 1)]).train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/model").is_dir()


def test_a_control_of_its_own_is_heeded(tmp_path: Path) -> None:
    class Returns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return TrainerControl(should_training_stop=state.global_step == 3)

    t = pairs(tmp_path, [Returns()])
    t.train()
    assert t.step == 3


def test_the_end_of_an_epoch_cannot_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = pairs(tmp_path, [Asks("should_epoch_stop", 1)])
    t.train()
    assert t.step == 4
    assert "should_epoch_stop), which is not heeded; should_training_stop ends the run" in caplog.text


# -- early stopping, the best step -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("metric", "greater"), [("reward", None), ("eval_reward", True), ("loss", None), ("eval_loss", False)]
)
def test_early_stopping_of_transformers(tmp_path: Path, metric: str, greater: bool | None) -> None:
    """The third number is the best; two worse ones in a row end the run."""
    extra = {} if greater is None else {"greater_is_better": greater}
    t = scored(
        tmp_path, (0.1, 0.2, 0.5, 0.4, 0.5, 0.9), [EarlyStoppingCallback(2)], max_steps=6, metric_for_best_model=metric,
        save_total_limit=1, **extra,
    )  # fmt: skip
    t.train()
    assert t.step == 5
    assert (abs(t.state.best_metric or 0), t.state.best_global_step) == (0.5, 3)
    # every best step was saved; the best of all is kept beside the newest
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-5"]
    assert checkpoint.find_best(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    assert t.state.best_model_checkpoint == str(tmp_path / "run/checkpoint-3")


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    """Patience that was used up before a stop is used up after it; and the best number is known."""
    numbers = (0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    settings: dict[str, Any] = {"max_steps": 6, "metric_for_best_model": "reward", "save_steps": 1}

    def cut(event: str, t: Trainer, values: Mapping[str, Any]) -> None:
        if event == "save" and t.step == 2:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        scored(tmp_path, numbers, [EarlyStoppingCallback(3), cut], **settings).train()
    stops = EarlyStoppingCallback(3)
    t = scored(tmp_path, numbers, [stops], **settings)
    t.train()
    assert (t.step, stops.early_stopping_patience_counter) == (4, 3)
    assert (t.state.best_metric, t.state.best_global_step) == (0.5, 1)


def test_early_stopping_without_its_settings_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="requires metric_for_best_model"):
        held_out(tmp_path, [EarlyStoppingCallback()]).train()
    assert not checkpoint_folders(tmp_path)


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    t = scored(tmp_path, (float("nan"), 0.1, float("nan"), 0.05), [], metric_for_best_model="reward")
    t.train()
    assert (t.state.best_metric, t.state.best_global_step) == (0.1, 2)


def test_a_metric_that_is_not_measured_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = held_out(tmp_path, [], metric_for_best_model="rewards/acuracies")
    t.train()
    assert t.state.best_metric is None
    said = [r.getMessage() for r in caplog.records if "best" in r.getMessage()]
    assert len(said) == 1
    assert "metric_for_best_model='rewards/acuracies' is not measured" in said[0]
    assert "eval_rewards/accuracies" in said[0]


def test_settings_of_the_best_that_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="greater_is_better does nothing without metric_for_best_model"):
        Config(objective="dpo", greater_is_better=True)
    with pytest.raises(ConfigError, match="metric_for_best_model does nothing without evaluation data"):
        pairs(tmp_path, [], metric_for_best_model="loss")


# -- what they keep ----------------------------------------------------------------------------------------------------------
class Counts:
    """A function with a state."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, event: str, t: Trainer, values: Mapping[str, Any]) -> None:
        if event == "step":
            self.steps.append(t.step)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = list(state["steps"])


def test_the_state_of_callbacks_is_in_the_checkpoint(tmp_path: Path) -> None:
    def cut(event: str, t: Trainer, values: Mapping[str, Any]) -> None:
        if event == "step" and t.step == 3:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        pairs(tmp_path, [Counts(), Counts(), cut], save_steps=2).train()
    one, other, third = Counts(), Counts(), Counts()
    pairs(tmp_path, [one, other, third], save_steps=2).train()
    assert one.steps == other.steps == [1, 2, 3, 4]
    assert third.steps == [3, 4]  # one that was not there begins anew


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(Counts):
        def state_dict(self) -> dict[str, Any]:
            return {"when": object()}

    odd = Odd()
    with pytest.raises(ConfigError, match="state of the callbacks Odd/0 must be made of numbers, texts"):
        pairs(tmp_path, [odd]).train()
    assert odd.steps == []


def test_no_callback_costs_nothing_in_the_checkpoint(tmp_path: Path) -> None:
    pairs(tmp_path, [lambda event, t, values: None], max_steps=1).train()
    assert "callbacks" not in checkpoint.load(checkpoint_folders(tmp_path)[0]).records
