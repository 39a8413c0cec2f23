"""Bad input 75-84: folders, checkpoints, processes and memory."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlft import checkpoint
from rlft.checkpoint import CheckpointVersionError, CheckpointWarning
from rlft.config import ConfigError
from rlft.errors import TrainingError
from rlft.objective import Objective
from rlft.rewards import RewardError
from rlft.runlock import RunLock, RunLockError
from tests.bad_input.common import (
    ANSWERS,
    PAIRS,
    PROMPTS,
    RANKED,
    command,
    refused,
    same,
    state,
    stops,
    trainer,
    varied,
)
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of its bytes; the lock file holds who used it last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(folder: Path, **extra: Any) -> Any:
    t = trainer(folder, "rloo", RANKED, beta=0.1, save_steps=1, **extra)
    t.train()
    return t


# -- folders --------------------------------------------------------------------------------------------------------------
def test_bad_input_75_folder_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    again = trainer(tmp_path, "rloo", RANKED, beta=0.1, save_steps=1, resume="never")
    refused(
        again.train, str(tmp_path / "run"), "holds checkpoint-", "choose another output directory", kind=RunLockError
    )
    other = trainer(tmp_path, "sft", ANSWERS, resume="never")
    refused(
        other.train,
        str(tmp_path / "run"),
        'objective: "rloo" -> "sft"',
        "choose another output directory",
        kind=RunLockError,
    )
    assert (again.step, other.step) == (0, 0)
    assert contents(tmp_path) == before


def test_bad_input_76_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    t = trainer(tmp_path, "sft", ANSWERS, output_dir=str(tmp_path / "file" / "run"))
    refused(
        t.train,
        f"{tmp_path}/file/run cannot be written: Not a directory",
        "choose another output directory",
        kind=RunLockError,
    )

    def read_only(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    t = trainer(tmp_path, "sft", ANSWERS)
    before = state(t)
    with monkeypatch.context() as patch:
        patch.setattr("rlft.runlock.os", SimpleNamespace(**{**vars(os), "open": read_only}))
        refused(
            t.train, f"{tmp_path}/run cannot be written: Read-only file system", "make it writable", kind=RunLockError
        )
    assert t.step == 0
    assert same(before, state(t))


def test_bad_input_76_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, save_steps=1)
    real = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
        refused(
            t.train,
            str(tmp_path / "run"),
            "0.0 MiB free",
            "one checkpoint takes about 0.",
            "free some space",
            kind=RunLockError,
        )
    assert t.step == 0
    with RunLock(tmp_path / "run"):  # and the folder was let go
        pass
    # full later: the run stops, and the checkpoint before stays
    t = trainer(tmp_path, "sft", ANSWERS, save_steps=1)

    def fill(event: str, run: Any, values: Any) -> None:
        if event == "save":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=9))

    t.callbacks.append(fill)
    refused(t.train, str(tmp_path / "run"), "needed", kind=checkpoint.CheckpointError)
    assert checkpoint.find_latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_bad_input_77_two_runs_in_one_folder(tmp_path: Path) -> None:
    t = trainer(tmp_path, "sft", ANSWERS)
    with RunLock(tmp_path / "run"):
        refused(
            t.train, f"{tmp_path}/run is in use by process {os.getpid()} on {socket.gethostname()}",
            "wait for that run, stop it, or choose another output directory", kind=RunLockError,
        )  # fmt: skip
    assert t.step == 0
    t.train()
    assert t.step == 2


# -- checkpoints ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_bad_input_78_newest_checkpoint_unreadable(tmp_path: Path, damage: str) -> None:
    """The one before it is used, with one warning; the run ends with the weights it would have had."""
    first = finished(tmp_path)
    path = tmp_path / "run" / "checkpoint-2" / "trainable.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b""}[damage])
    again = trainer(tmp_path, "rloo", RANKED, beta=0.1, save_steps=1)
    with pytest.warns(CheckpointWarning, match="checkpoint skipped: .*checkpoint-2.*falling back") as caught:
        again.train()
    assert len(caught) == 1
    assert again.step == 2
    assert same(state(first), state(again))


def test_bad_input_79_checkpoint_of_a_newer_format(tmp_path: Path) -> None:
    from rlft._json import loads
    from rlft.checkpoint._manifest import _sealed

    finished(tmp_path)
    path = tmp_path / "run" / "checkpoint-2" / "manifest.json"
    body = {key: value for key, value in loads(path.read_bytes()).items() if key != "seal"}
    path.write_bytes(_sealed({**body, "version": 99}))
    before = contents(tmp_path)
    t = trainer(tmp_path, "rloo", RANKED, beta=0.1, save_steps=1)
    refused(
        t.train, "checkpoint-2 has checkpoint format 99", "reads up to 1", "upgrade rlft", kind=CheckpointVersionError
    )
    assert t.step == 0
    assert contents(tmp_path) == before


def test_bad_input_80_resume_with_another_objective_or_other_data(tmp_path: Path) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    t = trainer(tmp_path, "rloo", RANKED, beta=0.2, save_steps=1, learning_rate=0.5)
    refused(
        t.train,
        "other settings",
        "beta: 0.1 -> 0.2",
        "learning_rate: 0.01 -> 0.5",
        "another output_dir",
        kind=ConfigError,
    )
    t = trainer(tmp_path, "agro_off_policy", RANKED, beta=0.1, save_steps=1)
    refused(t.train, "objective: 'rloo' -> 'agro_off_policy'", "use the settings it was started with", kind=ConfigError)
    fewer = trainer(tmp_path, "rloo", RANKED[:6], beta=0.1, save_steps=1)
    refused(
        fewer.train,
        "training data changed",
        "examples: 8 -> 6",
        "restore the data",
        "another output_dir",
        kind=ConfigError,
    )
    turned = trainer(tmp_path, "rloo", RANKED[::-1], beta=0.1, save_steps=1)
    refused(
        turned.train, "training data changed", "other ones or in another order", "restore the data", kind=ConfigError
    )
    assert (t.step, fewer.step, turned.step) == (0, 0, 0)
    assert contents(tmp_path) == before


def test_bad_input_81_resume_on_another_number_of_processes(tmp_path: Path) -> None:
    from rlft._json import loads
    from rlft.checkpoint._manifest import _sealed

    first = trainer(tmp_path, "rloo", RANKED, beta=0.1, save_steps=1)
    first.callbacks.append(_stop_after(1))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    path = tmp_path / "run" / "checkpoint-1" / "manifest.json"
    body = {key: value for key, value in loads(path.read_bytes()).items() if key != "seal"}
    path.write_bytes(_sealed({**body, "world_size": 2}))
    again = trainer(tmp_path, "rloo", RANKED, beta=0.1, save_steps=1, max_steps=2)
    with pytest.warns(UserWarning, match="written by 2 processes and 1 resume it: .*not bit for bit") as caught:
        again.train()
    assert len(caught) == 1
    assert again.step == 2


def _stop_after(step: int) -> Any:
    def callback(event: str, t: Any, values: Any) -> None:
        if event == "save" and t.step == step:
            raise KeyboardInterrupt

    return callback


def test_bad_input_82_resume_after_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, tmp_path)[0] == 0
    before = contents(tmp_path / "run")
    code, said = command(capsys, tmp_path)
    assert code == 0
    assert "this run is complete (2 steps); nothing to do" in said
    assert contents(tmp_path / "run") == before


# -- processes ------------------------------------------------------------------------------------------------------------
_START = """
import sys, time
from rlft import cli
from rlft.run.processes import launch
launch.SECONDS = 4

def timed(meet=launch.meet):
    started = time.monotonic()
    try:
        meet()
    finally:
        print(time.monotonic() - started)

launch.meet = timed
sys.exit(cli.main(["train", "objective=sft", "model=nowhere", "train_data=nowhere.jsonl", "report_to=[]"]))
"""


@pytest.mark.timeout(300)
def test_bad_input_83_port_in_use_or_a_process_missing(tmp_path: Path) -> None:
    """Both end within a minute, by themselves, and say which address and how many processes."""
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        taken_port, free_port = (str(s.getsockname()[1]) for s in (taken, free))
        free.close()
        cases = {"taken": (0, taken_port), "mute": (1, taken_port), "free": (0, free_port)}
        processes = {key: _start(tmp_path, key, *case) for key, case in cases.items()}
        told = {key: process.communicate(timeout=280) for key, process in processes.items()}
    said = {key: err for key, (_, err) in told.items()}
    for key, (out, _) in told.items():  # of the meeting itself: a busy machine takes long to import torch
        assert float(out) < 4 + 15, f"{key}: {out}"
    for key, (rank, port) in cases.items():
        assert processes[key].returncode == 1, said[key]
        assert f"process {rank} of 2 could not meet the others at 127.0.0.1:{port} within 4 s" in said[key]
        assert "Traceback" not in said[key]
        assert "set another MASTER_PORT" in said[key]
        assert "start all 2 of them" in said[key]
    assert "EADDRINUSE" in said["taken"]
    assert "what listens there does not answer" in said["mute"]
    assert "1/2 clients joined" in said["free"]


def _start(folder: Path, key: str, rank: int, port: str) -> subprocess.Popen[str]:
    """One process of two, alone."""
    world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **world, **address}
    work = folder / key
    work.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", _START], cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# -- memory ---------------------------------------------------------------------------------------------------------------
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_bad_input_84_out_of_memory(tmp_path: Path, error: Exception) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, save_steps=1, max_steps=3)
    compute = t.compute_loss

    def full(batch: Any, denominators: Any) -> Any:
        if t.step == 1:
            compute(batch, denominators).backward()  # a gradient that must not survive
            raise error
        return compute(batch, denominators)

    t.compute_loss = full
    said = stops(
        t, "step 2: out of memory", "per_device_train_batch_size=4", "raise gradient_accumulation_steps",
        "gradient_checkpointing: true", "use_peft: true", "max_completion_length (now 6)", "newest checkpoint is intact",
        kind=TrainingError, at=1,
    )  # fmt: skip
    assert "more" not in said.split("(")[1].split(")")[0]
    again = trainer(tmp_path, "sft", ANSWERS, save_steps=1, max_steps=3)
    again.train()
    assert again.step == 3


def test_bad_input_84_out_of_memory_for_real(tmp_path: Path) -> None:
    """An allocation of an exabyte, inside a loss of one's own, is told from other errors by what torch says."""

    def greedy(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logps * (torch.empty(2**58)[0] if logps.shape[0] > 4 or logps.shape[1] != 3 else 1.0)

    t = trainer(
        tmp_path, "", [{"prompt": f"{i}=", "completion": "abcde"} for i in range(8)], objective_given=Objective(greedy)
    )
    stops(t, "step 1: out of memory", "per_device_train_batch_size=4", kind=TrainingError)


def test_bad_input_84_out_of_memory_in_sampling_and_evaluation(tmp_path: Path) -> None:
    class Full:
        def sample(self, *arguments: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    t = trainer(tmp_path, "rloo", PROMPTS, reward=varied, beta=0.0, sampler=Full())
    said = stops(
        t,
        "step 1: out of memory while sampling",
        "8 answers at once (per_device_train_batch_size=8)",
        kind=TrainingError,
    )
    assert "raise gradient_accumulation_steps" not in said  # a generation would be as large as before
    t = trainer(
        tmp_path / "b", "sft", ANSWERS, eval_dataset=[{"prompt": "x", "completion": "y"}], eval_steps=1, save_steps=1
    )

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    t.evaluate = full
    refused(
        t.train, "out of memory", "per_device_eval_batch_size=8", "Lower per_device_eval_batch_size", kind=TrainingError
    )


def oom(*arguments: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_bad_input_84_out_of_memory_before_the_first_step(tmp_path: Path) -> None:
    """In the self-checks a smaller batch does not help; under the reference it does."""
    t = trainer(tmp_path / "a", "dpo", PAIRS, beta=0.1)
    t.forward = oom
    said = stops(
        t, "out of memory in the self-checks", "per_device_train_batch_size=4 would need more", "dtype: bfloat16",
        "shorten max_prompt_length", kind=TrainingError,
    )  # fmt: skip
    assert "Lower per_device_train_batch_size" not in said
    t = trainer(tmp_path / "b", "dpo", PAIRS, beta=0.1, precompute_ref_log_probs=True, self_checks=False)
    t.forward = oom
    stops(
        t, "out of memory while scoring the data under the reference", "per_device_train_batch_size=4",
        "Lower per_device_train_batch_size and raise gradient_accumulation_steps", kind=TrainingError,
    )  # fmt: skip


def test_bad_input_84_out_of_memory_where_tokens_make_the_micro_batches(tmp_path: Path) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, max_tokens_per_micro_batch=64)
    t.compute_loss = oom
    said = stops(
        t, "out of memory with max_tokens_per_micro_batch=64", "Lower max_tokens_per_micro_batch (the step stays the same)",
        kind=TrainingError,
    )  # fmt: skip
    assert "per_device_train_batch_size" not in said


def test_bad_input_84_out_of_memory_in_a_reward_and_a_critic(tmp_path: Path) -> None:
    t = trainer(tmp_path / "a", "rloo", PROMPTS, reward=oom, beta=0.0)
    stops(t, "'oom' ran out of memory", "for rows 0 to 7", "lower per_device_train_batch_size", kind=RewardError)
    critic = tmp_path / "critic"
    tiny_llama().save_pretrained(critic)
    t = trainer(tmp_path / "b", "ppo", PROMPTS, reward=varied, beta=0.1, critic=str(critic), self_checks=False)
    forward = t.forward
    t.forward = lambda batch, want: oom() if "values" in want else forward(batch, want)
    stops(
        t, "out of memory while scoring what a step needs beforehand", "per_device_train_batch_size=8", "set critic: shared",
        kind=TrainingError,
    )  # fmt: skip


@pytest.mark.parametrize("taken_back", [True, False])
def test_bad_input_84_out_of_memory_in_the_update(tmp_path: Path, taken_back: bool) -> None:
    """AdamW with ordinary settings leaves no copy to go back to, and the message does not pretend that it does."""
    t = trainer(tmp_path, "sft", ANSWERS, self_checks=False)
    if taken_back:
        t.optimizer.param_groups[0]["eps"] = 0.0  # no trust in it, so a copy is kept
    step, before = t.optimizer.step, [p.detach().clone() for p in t.policy.parameters()]

    def half(*arguments: Any) -> None:
        step(*arguments)
        oom()

    t.optimizer.step = half
    said = refused(
        t.train,
        "step 1: out of memory in the optimizer's update",
        "trained weights",
        "Set use_peft: true",
        kind=TrainingError,
    )
    same = all(torch.equal(p, q) for p, q in zip(t.policy.parameters(), before, strict=True))
    assert same is taken_back
    assert ("the step was not applied" in said) is taken_back
    assert (
        "may be applied to a part of the weights in memory, and no checkpoint was written" in said
    ) is not taken_back
    assert not list(t.run_dir.glob("checkpoint-*"))


def test_bad_input_84_other_errors_stay_themselves(tmp_path: Path) -> None:
    def breaks(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("something else")
        return logps

    calls: list[int] = []
    t = trainer(tmp_path, "", ANSWERS, objective_given=Objective(breaks))
    assert stops(t, "something else", kind=RuntimeError) == "something else"
