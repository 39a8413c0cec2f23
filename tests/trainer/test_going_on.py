"""Where a run goes on from: the folder it finds, the checkpoint that was asked for, a stop before its first step."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer, checkpoint
from rlft.config import ConfigError
from rlft.errors import Interrupted
from rlft.rewards import RewardError
from rlft.run.checks.before import SelfChecks
from rlft.run.checks.first_step import FirstStep
from rlft.runlock import RunLockError
from tests.reliability.runs import digest, newest
from tests.tiny import char_tokenizer, tiny_llama
from tests.trainer.common import PAIRS, PROMPTS

HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "0", "rejected": "1"} for i in range(4)]


def run(
    folder: Path, *, kind: type[Trainer] = Trainer, reward: Any = None, callbacks: Any = (), **extra: Any
) -> Trainer:
    settings = {
        "objective": "grpo" if reward else "dpo", "beta": 0.1, "output_dir": str(folder / "run"), "max_steps": 8, "save_steps": 2,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_prompt_length": 8, "max_completion_length": 4,
        "self_checks": False, "disable_tqdm": True, "report_to": [], **({"num_generations": 4} if reward else {}), **extra,
    }  # fmt: skip
    return kind(
        tiny_llama(hidden_size=16, num_hidden_layers=1), settings, train_dataset=PROMPTS if reward else PAIRS,
        eval_dataset=HELD_OUT if settings.get("eval_on_start") else None, processing_class=char_tokenizer(),
        reward_funcs=reward, callbacks=callbacks,
    )  # fmt: skip


def stop_at(step: int) -> Any:
    def stop(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def steps_of(folder: Path, *, stop: int | None = None, given: Any = None, **extra: Any) -> list[int]:
    """Train, and tell which steps were taken; ``stop``: the step after which a signal ends it."""
    taken: list[int] = []
    callbacks = [lambda event, t, values: taken.append(t.step) if event == "step" else None]
    t = run(folder, callbacks=[*callbacks, *([stop_at(stop)] if stop else [])], **extra)
    if stop is None:
        t.train(given)
    else:
        with pytest.raises(Interrupted):
            t.train(given)
    return taken


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_is_not_to_resume_leaves_another_runs_folder_as_it_is(tmp_path: Path, finished: bool) -> None:
    """``train(False)`` means what ``resume: never`` means: it does not write over a run."""
    steps_of(tmp_path, stop=None if finished else 3)
    before = contents(tmp_path / "run")
    wishes: list[dict[str, Any]] = [{"given": False}, {"resume": "never"}]
    for wish in wishes:
        with pytest.raises(RunLockError, match=r"holds checkpoint-\d of an earlier run and this run is not to resume"):
            steps_of(tmp_path, **wish)
    assert contents(tmp_path / "run") == before


def test_what_train_is_given_counts_and_not_the_setting(tmp_path: Path) -> None:
    assert steps_of(tmp_path, resume="auto", given=False) == list(range(1, 9))
    shutil.rmtree(tmp_path / "run")
    steps_of(tmp_path, stop=3, resume="never")
    assert steps_of(tmp_path, resume="never", given=True) == [4, 5, 6, 7, 8]
    with pytest.raises(ConfigError, match="resume must be True, False or a checkpoint's folder, got 3"):
        run(tmp_path).train(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [None, 1])
def test_the_same_command_goes_on_with_a_run_that_began_from_a_checkpoint_by_name(
    tmp_path: Path, kept: int | None
) -> None:
    """A scheduler that starts it again and again must come to an end; ``kept`` 1: the checkpoint itself is soon gone."""
    steps_of(tmp_path / "whole", save_total_limit=kept)
    steps_of(tmp_path / "cut", save_total_limit=None)
    by_name: dict[str, Any] = {"resume": str(tmp_path / "cut" / "run" / "checkpoint-2"), "save_total_limit": kept}
    assert steps_of(tmp_path / "cut", stop=5, **by_name) == [3, 4, 5]
    assert (tmp_path / "cut" / "run" / "checkpoint-2").exists() is (kept is None)
    assert steps_of(tmp_path / "cut", stop=7, **by_name) == [6, 7]
    assert steps_of(tmp_path / "cut", **by_name) == [8]
    assert steps_of(tmp_path / "cut", **by_name) == []
    assert digest(tmp_path / "cut" / "run") == digest(tmp_path / "whole" / "run")


def test_what_a_checkpoint_was_begun_from_survives_an_ordinary_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps_of(tmp_path, save_total_limit=None)
    by_name: dict[str, Any] = {"given": str(tmp_path / "run" / "checkpoint-2"), "save_total_limit": None}
    assert steps_of(tmp_path, stop=3, **by_name) == [3]
    assert steps_of(tmp_path, stop=6, save_total_limit=None) == [4, 5, 6]
    capsys.readouterr()
    assert steps_of(tmp_path, stop=7, **by_name) == [7]
    assert "goes on from checkpoint-6 now; to begin from there again, move the newer" in capsys.readouterr().out


def test_another_checkpoint_by_name_is_begun_from(tmp_path: Path) -> None:
    steps_of(tmp_path, save_total_limit=None)
    folder = tmp_path / "run"
    assert steps_of(tmp_path, stop=5, given=str(folder / "checkpoint-4"), save_total_limit=None) == [5]
    assert steps_of(tmp_path, stop=3, given=str(folder / "checkpoint-2"), save_total_limit=None) == [3]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ConfigError, match="checkpoint-4' is no folder; give 'auto', 'never', or a checkpoint such as"):
        steps_of(tmp_path, given=str(folder / "checkpoint-4"))


def test_a_checkpoint_of_another_folder_by_name(tmp_path: Path) -> None:
    """Begun from once, too."""
    steps_of(tmp_path / "whole", save_total_limit=None)
    by_name: dict[str, Any] = {"resume": str(tmp_path / "whole" / "run" / "checkpoint-4"), "save_total_limit": None}
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has 0 bytes, the checkpoint of step 4 knew"):
        assert steps_of(tmp_path / "cut", stop=5, **by_name) == [5]
    assert steps_of(tmp_path / "cut", **by_name) == [6, 7, 8]
    one, other = digest(tmp_path / "cut" / "run"), digest(tmp_path / "whole" / "run")
    assert {part for part in one if one[part] != other[part]} <= {"metrics"}  # steps 1 to 4 were logged elsewhere


# -- checks of a run that was stopped before or at its first step ---------------------------------------------------------
@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which checks a start ran."""
    said: list[str] = []
    kinds: tuple[tuple[str, Any, str], ...] = (("before", SelfChecks, "run"), ("watch", FirstStep, "__init__"))
    for name, kind, method in kinds:
        real = getattr(kind, method)
        monkeypatch.setattr(
            kind, method, lambda self, *given, real=real, name=name: (said.append(name), real(self, *given))[1]
        )
    return said


def test_a_run_that_was_stopped_before_its_first_step_checks_itself_when_it_goes_on(
    tmp_path: Path, checked: list[str]
) -> None:
    class Cut(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            if self.step == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(eval_dataset)

    extra: dict[str, Any] = {"self_checks": True, "eval_on_start": True}
    run(tmp_path / "whole", **extra).train()
    assert checked == ["before", "watch"]
    with pytest.raises(Interrupted, match="after step 0"):
        run(tmp_path / "cut", kind=Cut, **extra).train()
    checked.clear()
    run(tmp_path / "cut", **extra).train()
    assert checked == ["before", "watch"]
    assert digest(tmp_path / "cut" / "run") == digest(tmp_path / "whole" / "run")
    checked.clear()
    steps_of(tmp_path / "later", stop=3, **extra)
    assert checked == ["before", "watch"]
    steps_of(tmp_path / "later", **extra)
    assert checked == ["before", "watch"], "a run whose first step passed is not checked again"


def test_checks_of_the_first_step_wait_for_one_that_moves_the_weights_over_a_stop(
    tmp_path: Path, checked: list[str]
) -> None:
    """Equal rewards at first: nothing has moved at the stop, so the watch begins anew; before-the-start checks do not."""

    def reward(completion_ids: list[list[int]], trainer_state: Any = None, **columns: Any) -> list[float]:
        return [float(sum(ids) % 7) * (trainer_state.global_step > 1) for ids in completion_ids]

    def online(folder: Path, **extra: Any) -> Trainer:
        return run(folder, reward=reward, weight_decay=0.0, self_checks=True, max_steps=4, **extra)

    with pytest.raises(Interrupted):
        online(tmp_path, callbacks=[stop_at(1)]).train()
    checked.clear()
    resumed = online(tmp_path)
    resumed.train()
    assert checked == ["watch"]
    assert not any(isinstance(watcher, FirstStep) for watcher in resumed.watchers)


def test_checkpoints_from_before_the_mark_count_as_checked(tmp_path: Path, checked: list[str]) -> None:
    steps_of(tmp_path, stop=3, self_checks=True)
    assert checked == ["before", "watch"]
    found = checkpoint.load(tmp_path / "run" / "checkpoint-3")
    del found.records["trainer"]["checked"]
    checkpoint.save(
        tmp_path / "run", 3, tensors=found.tensors, records=found.records, config_hash=found.manifest.config_hash
    )
    checked.clear()
    steps_of(tmp_path, self_checks=True)
    assert checked == []


# -- the disk at the start ------------------------------------------------------------------------------------------------
def _full(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=0) if full() else real(path))


def test_what_a_killed_save_left_is_cleared_before_the_disk_is_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_of(tmp_path, stop=3)
    stale = tmp_path / "run" / f".tmp-4-{'a' * 32}"
    stale.mkdir()
    (stale / "trainable.safetensors").write_bytes(b"x" * 1000)
    _full(monkeypatch, stale.exists)
    assert steps_of(tmp_path) == [4, 5, 6, 7, 8]


def test_a_finished_run_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_of(tmp_path)
    before = contents(tmp_path / "run")
    _full(monkeypatch, lambda: True)
    assert steps_of(tmp_path) == []
    assert contents(tmp_path / "run") == before


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _full(monkeypatch, lambda: True)
    with pytest.raises(RunLockError, match=r"has 0\.0 MiB free and one checkpoint takes about"):
        steps_of(tmp_path)


# -- callbacks while the run stops ----------------------------------------------------------------------------------------
def test_a_callback_that_raises_does_not_hide_why_the_run_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    def down(event: str, t: Trainer, values: Any) -> None:
        if event == "save":
            raise ValueError("tracker down")

    def hears(event: str, t: Trainer, values: Any) -> None:
        if event == "save":
            heard.append(t.step)

    with pytest.raises(Interrupted, match="after step 3"):
        run(tmp_path / "signal", callbacks=[stop_at(3), down, hears], save_steps=None).train()
    assert heard == [3]
    assert newest(tmp_path / "signal" / "run") == 3
    assert "a callback raised ValueError: tracker down at 'save'; the run was saved and stops" in caplog.text

    def broken(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        raise KeyError("oops")

    with pytest.raises(RewardError, match="KeyError: 'oops'"):
        run(tmp_path / "reward", reward=broken, callbacks=[down]).train()


def test_a_callback_that_raises_at_an_ordinary_save_stops_the_run(tmp_path: Path) -> None:
    def down(event: str, t: Trainer, values: Any) -> None:
        if event == "save":
            raise ValueError("tracker down")

    with pytest.raises(ValueError, match="tracker down"):
        run(tmp_path, callbacks=[down]).train()
