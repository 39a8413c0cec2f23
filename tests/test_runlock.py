"""One run per folder, one process per run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rlft
from rlft._failpoint import failpoints_in_source
from rlft.runlock import LOCK_NAME, RUN_NAME, RunLock, RunLockError

CONFIG = {"objective": "dpo", "lr": 1e-5, "lora": {"r": 16}}


def _child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(rlft.__file__).parents[2],
    )


HOLDER = """
import os, sys, time
from rlft.runlock import RunLock
lock = RunLock(sys.argv[1]).acquire()
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def test_lock_is_held_and_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "run", CONFIG)
    assert not lock.held
    with lock:
        assert lock.held
        with pytest.raises(RunLockError, match=f"in use by process {os.getpid()} on {socket.gethostname()} since 20"):
            RunLock(tmp_path / "new" / "run", CONFIG).acquire()
        with pytest.raises(RunLockError, match=r"holds .* already"):
            lock.acquire()
    assert not lock.held
    lock.release()
    with RunLock(tmp_path / "new" / "run", CONFIG):
        pass


def test_another_process_is_refused_and_named(tmp_path: Path) -> None:
    holder = _child(HOLDER, tmp_path, "alone")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockError) as caught:
        RunLock(tmp_path).acquire()
    message = str(caught.value)
    assert f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}" in message
    assert "wait for that run, stop it, or choose another output directory" in message
    holder.communicate("")
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_killed_owner_lets_go_even_with_children_alive(tmp_path: Path) -> None:
    holder = _child(HOLDER, tmp_path, "fork")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(holder.pid)], capture_output=True, text=True, check=False
    )
    try:
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        with RunLock(tmp_path):
            pass
    finally:
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        for pipe in (holder.stdin, holder.stdout, holder.stderr):
            assert pipe is not None
            pipe.close()


def test_a_dead_owner_is_said_to_be_dead(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with RunLock(tmp_path):
        (tmp_path / LOCK_NAME).write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "then"}))
        with pytest.raises(RunLockError, match="that process is gone, but a child of it lives on"):
            RunLock(tmp_path).acquire()
        for text in ("", "garbage", "[]", '{"pid": "x"}'):
            (tmp_path / LOCK_NAME).write_text(text)
            with pytest.raises(RunLockError, match="in use by another process"):
                RunLock(tmp_path).acquire()


def test_another_configuration_is_refused_with_its_differences(tmp_path: Path) -> None:
    with RunLock(tmp_path, CONFIG):
        pass
    other = {**CONFIG, "lr": 2e-5, "lora": {"r": 32}}
    with pytest.raises(RunLockError) as caught:
        RunLock(tmp_path, other).acquire()
    for part in (
        str(tmp_path),
        "holds another run",
        "choose another output directory",
        "lora.r: 16 -> 32",
        "lr: 1e-05 -> 2e-05",
    ):
        assert part in str(caught.value)
    with RunLock(tmp_path, CONFIG):  # the refusal let go of the lock and changed nothing
        pass


def test_resume_tells_what_changed(tmp_path: Path) -> None:
    with RunLock(tmp_path, CONFIG):
        pass
    other = {**CONFIG, "lr": 2e-5}
    with pytest.raises(RunLockError, match="holds another run"):  # nothing there to resume
        RunLock(tmp_path, other, resume=True).acquire()
    (tmp_path / "checkpoint-3").mkdir()
    with RunLock(tmp_path, other, resume=True) as lock:
        assert lock.changes == ["lr: 1e-05 -> 2e-05"]
    with RunLock(tmp_path, CONFIG, resume=True) as lock:  # not rewritten until asked
        assert lock.changes == []
    with RunLock(tmp_path, other, resume=True) as lock:
        lock.store()
    with RunLock(tmp_path, other, resume=True) as lock:
        assert lock.changes == []


@pytest.mark.parametrize("leftover", ["checkpoint-3", "metrics.jsonl"])
@pytest.mark.parametrize("known", [True, False])
def test_results_are_not_overwritten_without_resume(tmp_path: Path, leftover: str, known: bool) -> None:
    if known:
        with RunLock(tmp_path, CONFIG):
            pass
    (tmp_path / leftover).write_text("x")
    with pytest.raises(RunLockError, match=f"holds {leftover} of an earlier run and this run is not to resume"):
        RunLock(tmp_path, CONFIG).acquire()
    with RunLock(tmp_path, CONFIG, resume=True):
        pass


def test_the_hash_alone_decides(tmp_path: Path) -> None:
    with RunLock(tmp_path, config_hash="abc") as lock:
        assert lock.config_hash == "abc"
    with RunLock(tmp_path, config_hash="abc"):
        pass
    with pytest.raises(RunLockError, match="holds another run"):
        RunLock(tmp_path, config_hash="abd").acquire()
    with RunLock(tmp_path / "free"):
        pass
    assert not (tmp_path / "free" / RUN_NAME).exists()


def test_secrets_are_not_stored_and_do_not_decide(tmp_path: Path) -> None:
    canary = "hf_" + "SECRETcanary0123456789"
    with RunLock(tmp_path, {**CONFIG, "hub_token": canary, "note": f"uses {canary}"}):
        pass
    for path in tmp_path.rglob("*"):
        assert canary not in path.read_text()
    with RunLock(tmp_path, {**CONFIG, "hub_token": "hf_" + "OTHERcanary0123456789", "note": f"uses {canary}"}):
        pass


def test_an_unreadable_record_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"config_hash": 1}', '{"config_hash": "x", "config": []}'):
        (tmp_path / RUN_NAME).write_text(text)
        with pytest.raises(RunLockError, match="cannot be understood"):
            RunLock(tmp_path, CONFIG).acquire()


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC"])
@pytest.mark.parametrize(
    "point", ["run.mkdir", "run.lock.open", "run.lock.write", "run.config.write", "run.config.rename"]
)
def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, point: str
) -> None:
    monkeypatch.setattr("rlft._failpoint._passages", __import__("collections").Counter())
    monkeypatch.setenv("RLFT_FAILPOINT", f"{point}.before:1:oserror:{code}")
    with pytest.raises(RunLockError) as caught:
        RunLock(tmp_path, CONFIG).acquire()
    words = {"EACCES": "Permission denied", "EROFS": "Read-only file system", "ENOSPC": "No space left"}[code]
    assert str(tmp_path) in str(caught.value)
    assert words in str(caught.value)
    assert "make it writable, free some space, or choose another output directory" in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]
    monkeypatch.delenv("RLFT_FAILPOINT")
    with RunLock(tmp_path, CONFIG):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunLockError, match="Permission denied"):
            RunLock(tmp_path, CONFIG).acquire()
    finally:
        tmp_path.chmod(0o755)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunLockError, match="cannot be written: it is there, and no folder"):
        RunLock(tmp_path / "run", CONFIG).acquire()


def test_a_linked_lock_file_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(victim)
    with pytest.raises(RunLockError, match="cannot be written"):
        RunLock(tmp_path / "run").acquire()
    assert victim.read_text() == "precious"


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="a second run in this folder would go unnoticed"), RunLock(tmp_path, CONFIG):
        pass


KILLED = """
import os, sys
from pathlib import Path
from rlft.runlock import RunLock, RUN_NAME
for index, name in enumerate(sys.argv[2].split(",")):
    folder = Path(sys.argv[1]) / str(index)
    folder.mkdir()
    (folder / f".tmp-{RUN_NAME}-old").write_text("half")
    pid = os.fork()
    if pid == 0:
        os.environ["RLFT_FAILPOINT"] = name + ":1"
        if name.startswith("run.config.remove"):
            os.environ["RLFT_FAILPOINT"] += ",run.config.rename.before:1:oserror:EIO"
        try:
            RunLock(folder, {"a": 1}).acquire()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9, name
    with RunLock(folder, {"a": 1}):
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "run.json"], name
    with RunLock(folder, {"a": 1}):
        pass
print("done")
"""


def test_kill_at_every_instant_of_taking_the_lock(tmp_path: Path) -> None:
    names = sorted(name for name in failpoints_in_source() if name.startswith("run."))
    assert len(names) > 15
    out, error = _child(KILLED, tmp_path, ",".join(names)).communicate(timeout=120)
    assert out == "done\n", error
