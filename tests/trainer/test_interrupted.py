"""Runs that are stopped at awkward places: what was saved is a boundary, and the restart ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlft import Trainer, checkpoint
from rlft.errors import Interrupted, TrainingError
from rlft.rewards import RewardError
from rlft.run.processes.processes import Processes
from rlft.run.progress import Progress
from tests.reliability.runs import digest, leftovers, newest
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(8)]
HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "0", "rejected": "1"} for i in range(6)]


def run(folder: Path, *, reward: Any = None, held_out: Any = None, **extra: Any) -> Trainer:
    settings = {
        "objective": "rloo" if reward else "dpo", "beta": 0.1, "output_dir": str(folder), "max_steps": 5, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "max_prompt_length": 8, "max_completion_length": 4, "disable_tqdm": True, "report_to": [],
        "self_checks": False, **({"num_generations": 4} if reward else {}), **extra,
    }  # fmt: skip
    rows = PROMPTS if reward else PAIRS
    model, tokenizer = tiny_llama(hidden_size=16, num_hidden_layers=1), char_tokenizer()
    data = {"train_dataset": rows, "eval_dataset": held_out, "processing_class": tokenizer, "reward_funcs": reward}
    return Trainer(model, settings, **data)


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def test_a_signal_in_the_last_evaluation_saves_the_weights_with_their_own_step(tmp_path: Path) -> None:
    """The last step's evaluation is not on eval_steps: weights of step 5 must not be saved as those of step 4."""

    class Cut(Trainer):
        def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(eval_dataset)

    extra = {"held_out": HELD_OUT, "eval_steps": 2}
    run(tmp_path / "whole", **extra).train()
    cut = run(tmp_path / "cut", **extra)
    cut.__class__ = Cut
    with pytest.raises(Interrupted):
        cut.train()
    assert newest(tmp_path / "cut") == 5
    run(tmp_path / "cut", **extra).train()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_signal_in_an_evaluation_of_a_callback(tmp_path: Path) -> None:
    """Between a step's update and the next step, the present state is what is saved."""

    def evaluate(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            t.evaluate()

    extra = {"held_out": HELD_OUT}
    run(tmp_path / "whole", **extra).train()
    cut = run(tmp_path / "cut", **extra)
    cut.callbacks.append(evaluate)
    with pytest.raises(Interrupted):
        cut.train()
    assert newest(tmp_path / "cut") == 3
    run(tmp_path / "cut", **extra).train()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["gone", "half", "foreign"])
def test_a_run_killed_before_its_model_was_written_writes_it_at_the_next_start(tmp_path: Path, harm: str) -> None:
    run(tmp_path).train()
    expected = digest(tmp_path)
    if harm == "foreign":
        (tmp_path / "model" / "model.safetensors").write_bytes(b"another run's")
    elif harm == "half":
        (tmp_path / "model").rename(tmp_path / ".tmp-model")
        (tmp_path / ".tmp-model" / "model.safetensors").unlink()
    else:
        shutil.rmtree(tmp_path / "model")
    again = run(tmp_path)
    assert again.train() == {}
    assert digest(tmp_path) == expected
    assert leftovers(tmp_path) == []


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    run(tmp_path).train()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")} == before


def test_dropout_depends_on_the_seed_and_on_nothing_drawn_before(tmp_path: Path) -> None:
    extra = {"use_peft": True, "lora_dropout": 0.5, "disable_dropout": False, "max_steps": 1}
    found = []
    for index, seed in enumerate((0, 0, 1)):
        torch.manual_seed(index)
        random.seed(index)
        run(tmp_path / str(index), seed=seed, **extra).train()
        found.append(digest(tmp_path / str(index)))
    assert found[0] == found[1]
    assert found[0]["tensors/rng"] != found[2]["tensors/rng"]


@pytest.mark.parametrize("call", [1, 4])
def test_a_reward_that_raises_leaves_a_checkpoint_of_the_step_before(tmp_path: Path, call: int) -> None:
    calls = 0

    def broken(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyError("oops")
        return digits(completions)

    broken.__name__ = "digits"
    run(tmp_path / "whole", reward=digits).train()
    with pytest.raises(RewardError, match=f"'digits' raised KeyError: 'oops' at step {call}, in rows 0 to 3;"):
        run(tmp_path / "cut", reward=broken).train()
    assert newest(tmp_path / "cut") == call - 1
    run(tmp_path / "cut", reward=digits).train()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_equal_rewards_are_counted_over_a_stop(tmp_path: Path) -> None:
    def stop(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def zero(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    cut = run(tmp_path, reward=zero)
    cut.callbacks.append(stop)
    with pytest.raises(Interrupted):
        cut.train()
    resumed = run(tmp_path, reward=zero)
    resumed.train()
    assert resumed.counts.equal_steps == 5


def test_a_model_that_cannot_be_written_is_named_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole").train()
    monkeypatch.setenv("RLFT_FAILPOINT", "export.rename.before:1:oserror:ENOSPC")
    with pytest.raises(
        TrainingError, match=r"model was not written to .*bytes needed, .* bytes free.* writes it again"
    ):
        run(tmp_path / "cut").train()
    assert leftovers(tmp_path / "cut") == []
    monkeypatch.delenv("RLFT_FAILPOINT")
    assert run(tmp_path / "cut").train() == {}
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_settings_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLFT_FAILPOINT", "settings.write.before:1:oserror:ENOSPC")
    with pytest.raises(
        TrainingError, match=r"config\.json could not be written: No space left on device, about .* free"
    ):
        run(tmp_path).train()
    assert leftovers(tmp_path) == []


def test_an_older_checkpoint_takes_the_exported_model_with_it(tmp_path: Path) -> None:
    run(tmp_path, save_steps=2, save_total_limit=None).train()
    expected = digest(tmp_path)
    older = run(tmp_path, save_steps=2, save_total_limit=None)

    def stop(event: str, t: Trainer, values: Any) -> None:
        if event == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    older.callbacks.append(stop)
    with pytest.raises(Interrupted):
        older.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "model").exists()
    run(tmp_path, save_steps=2, save_total_limit=None).train()
    assert digest(tmp_path) == expected


def test_the_digest_sees_each_part(tmp_path: Path) -> None:
    """The oracle of every test here: another optimizer moment, random state, log line or record is another digest."""
    run(tmp_path).train()
    before, last = digest(tmp_path), tmp_path / f"checkpoint-{newest(tmp_path)}"
    found = checkpoint.load(last)
    found.tensors["optimizer"][next(iter(found.tensors["optimizer"]))].view(-1)[0] += 1e-7
    found.tensors["rng"]["cpu"][0] += 1
    found.records["source"]["order"]["position"] += 1

    def copy_model(folder: Path) -> None:
        shutil.copytree(last / "model", folder / "model")

    checkpoint.save(
        tmp_path, found.step, tensors=found.tensors, records=found.records, config_hash="x", extra_writer=copy_model
    )
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = {**json.loads(rows[0]), "loss": 0.0, "step_time": 9.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps(first), *rows[1:]]) + "\n")
    after = digest(tmp_path)
    different = {part for part in before if before[part] != after.get(part)}
    assert different == {"tensors/optimizer", "tensors/rng", "records/source", "metrics"}


@pytest.mark.parametrize("said", ["[pair.cc:534] Connection closed by peer [127.0.0.1]:1", "Broken pipe", "NCCL error"])
def test_a_lost_process_is_named(tmp_path: Path, said: str) -> None:
    """As `make kill-tests` sees it on two real processes."""
    wrapped = RuntimeError("checkpoint of step 4 not written")
    wrapped.__cause__ = RuntimeError(said)
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=1, num_processes=2, is_main_process=False)
    processes = Processes(accelerator, Progress(5, step=4))
    with pytest.raises(TrainingError, match="step 5: process 1 of 2 lost contact with another one"):
        processes.explain_lost_peer(wrapped, tmp_path)
    processes.explain_lost_peer(ValueError("of its own"), tmp_path)
    processes.explain_lost_peer(TrainingError(f"explained already: {said}"), tmp_path)
    processes.world_size = 1
    processes.explain_lost_peer(wrapped, tmp_path)


def test_a_signal_inside_a_step_is_answered_before_the_next_micro_batch(tmp_path: Path) -> None:
    extra = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(tmp_path / "whole", **extra).train()
    cut, passes = run(tmp_path / "cut", **extra), [0]
    compute = cut.compute_loss

    def signalled(*arguments: Any) -> Any:
        passes[0] += 1
        if passes[0] == 6:  # the second micro-batch of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*arguments)

    cut.compute_loss = signalled
    with pytest.raises(Interrupted, match="after step 1"):
        cut.train()
    assert passes == [6]
    assert all(p.grad is None for p in cut.policy.parameters())
    assert newest(tmp_path / "cut") == 1
    run(tmp_path / "cut", **extra).train()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_trainer_that_was_stopped_goes_on_to_the_end(tmp_path: Path) -> None:
    """The same object: a signal that was answered does not stop it again."""
    run(tmp_path / "whole").train()
    cut = run(tmp_path / "cut")
    cut.callbacks.append(
        lambda event, t, values: os.kill(os.getpid(), signal.SIGTERM) if (event, t.step) == ("step", 2) else None
    )
    with pytest.raises(Interrupted, match="after step 2"):
        cut.train()
    cut.train()
    assert cut.step == 5
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run does not look into a report that is there, so half a one would stay."""
    monkeypatch.setenv("RLFT_FAILPOINT", "report.page.write.after:1:oserror:ENOSPC")
    with pytest.raises(
        TrainingError, match=r"report was not written to .*report\.html: No space .*`rlft report .*`, writes"
    ):
        run(tmp_path, report=True).train()
    assert not (tmp_path / "report.html").exists()
    assert leftovers(tmp_path) == []
    monkeypatch.delenv("RLFT_FAILPOINT")
    for kind in ("html", "png"):  # as a kill would leave them
        (tmp_path / f".tmp-report.{kind}-{'0' * 32}").write_text("half")
    assert run(tmp_path, report=True).train() == {}
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert leftovers(tmp_path) == []
