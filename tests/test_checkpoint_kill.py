"""Kills and disk faults at every instant of a checkpoint: the previous one is whole, the new one whole or absent."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import rlft
from rlft import checkpoint
from rlft._failpoint import failpoint, failpoints_in_source
from rlft._files import disk_trouble
from tests import checkpoint_harness as harness

SOURCE = Path(rlft.__file__).parent
# Points that are passed only after an earlier failure: the spec that leads there comes first.
FAULTS = {
    "replace": "checkpoint.rename.before:1:oserror:EIO",
    "new": "checkpoint.manifest.write.before:1:oserror:ENOSPC",
}
# Deleting what is no longer needed may fail without harm: the new checkpoint is written by then.
HARMLESS = ("checkpoint.rotate", "checkpoint.replaced", "checkpoint.leftover", "checkpoint.stale", "checkpoint.newer")
MOVED = ("checkpoint.rename.after", "checkpoint.parent.sync")  # the new one is in place, the old one still beside it


class Harness:
    """The forking process, and a fresh folder per job."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint_harness"],
            cwd=SOURCE.parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, scenario: str, **job: object) -> tuple[Path, dict]:
        self.count += 1
        folder = self.root / f"job-{self.count}"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "scenario": scenario, **job}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the harness died; see its stderr"
        return folder, json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory):
    # Thousands of fsyncs: a folder in memory keeps them off the disk, and fails and dies the same way.
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("kill")))
    harness_process = Harness(root)
    yield harness_process
    harness_process.close()
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def passages(runner: Harness) -> dict[tuple[str, str], dict[str, int]]:
    """(scenario, leading fault) -> how often each point is passed."""
    found = {
        (scenario, ""): runner.run(scenario, trace=True)[1]["passages"]
        for scenario in ("new", "replace", "first", "stale", "ranks")
    }
    for scenario, fault in FAULTS.items():
        found[scenario, fault] = runner.run(scenario, trace=True, spec=fault)[1]["passages"]
    return found


def _fingerprints(folder: Path) -> dict[int, str]:
    """Step -> fingerprint of every checkpoint; each must load."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        loaded = checkpoint.load(path)
        flat = {f"{stem}/{name}": t for stem, named in loaded.tensors.items() for name, t in named.items()}
        found[loaded.step] = checkpoint.fingerprint(flat)
    return found


def _expected(seed: int) -> str:
    return checkpoint.fingerprint(
        {f"{stem}/{name}": t for stem, named in harness.content(seed).items() for name, t in named.items()}
    )


def _hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")} if folder.exists() else set()


def _check_unharmed(scenario: str, folder: Path, at: str) -> None:
    """After whatever happened, the newest whole checkpoint is the old one or the new one, complete."""
    found = _fingerprints(folder) if folder.exists() else {}
    old = {1: _expected(1), 2: _expected(2)}
    allowed = {
        "new": [old, {**old, 3: _expected(3)}, {2: old[2], 3: _expected(3)}],
        "full": [old],
        "replace": [old, {1: old[1]}, {1: old[1], 2: _expected(22)}],
        "first": [{}, {1: old[1]}],
        "stale": [old, {**old, 3: _expected(3)}],
    }
    if scenario == "ranks":
        assert set(found) in ({1, 2}, {1, 2, 3}, {2, 3}), at
    else:
        assert found in allowed[scenario], at
    if folder.exists():
        checkpoint.remove_stale(folder)
    if scenario == "replace":  # an old checkpoint that was set aside comes back
        assert _fingerprints(folder).get(2) in (old[2], _expected(22)), at
    latest = checkpoint.find_latest(folder)
    assert (latest is not None) or scenario == "first", at


def _finish(scenario: str, folder: Path, at: str) -> None:
    """Doing it again ends as if nothing had happened."""
    harness.act(scenario, folder)
    ends = {
        "new": {2: _expected(2), 3: _expected(3)},
        "replace": {1: _expected(1), 2: _expected(22)},
        "first": {1: _expected(1)},
        "stale": {1: _expected(1), 2: _expected(2)},
    }
    if scenario in ends:
        assert _fingerprints(folder) == ends[scenario], at
    assert _hidden(folder) == set(), at


@pytest.mark.parametrize(
    ("scenario", "fault"),
    [("new", ""), ("replace", ""), ("first", ""), ("stale", ""), ("ranks", ""), *FAULTS.items()],
)
def test_kill_at_every_instant(runner: Harness, passages: dict, scenario: str, fault: str) -> None:
    points = passages[scenario, fault]
    if fault:  # only what the fault leads to
        points = {name: n for name, n in points.items() if name.startswith(("checkpoint.discard", "checkpoint.back"))}
    assert points
    for name, count in sorted(points.items()):
        for passage in range(1, count + 1):
            at = f"{scenario}: killed at {name}, passage {passage}, after {fault or 'nothing'}"
            spec = ",".join(filter(None, [fault, f"{name}:{passage}"]))
            folder, answer = runner.run(scenario, spec=spec)
            assert answer["status"] == -signal.SIGKILL, at
            _check_unharmed(scenario, folder, at)
            _finish(scenario, folder, at)


@pytest.mark.parametrize(
    ("scenario", "kind"), [("new", "ENOSPC"), ("new", "EIO"), ("replace", "ENOSPC"), ("first", "EACCES")]
)
def test_disk_fault_at_every_instant(runner: Harness, passages: dict, scenario: str, kind: str) -> None:
    for name, count in sorted(passages[scenario, ""].items()):
        for passage in range(1, count + 1):
            at = f"{scenario}: {kind} at {name}, passage {passage}"
            folder, answer = runner.run(scenario, spec=f"{name}:{passage}:oserror:{kind}")
            if name.startswith(HARMLESS):
                assert answer["status"] == 0, at
            else:
                assert answer["status"] == harness.ERROR, at
                message = folder.with_suffix(".error").read_text()
                assert str(folder) in message, at
                assert "earlier checkpoints are untouched" in message, at
                if kind == "ENOSPC":
                    assert "bytes needed" in message, at
                    assert "bytes free" in message, at
                left = {entry for entry in _hidden(folder) if harness.HEX not in entry}
                if name.startswith(MOVED):
                    left = {entry for entry in left if not entry.startswith(".old-")}
                assert left == set(), at
            _check_unharmed(scenario, folder, at)
            _finish(scenario, folder, at)


def test_file_size_limit_at_forty_budgets(runner: Harness) -> None:
    biggest = max(path.stat().st_size for path in harness.put(runner.root / "sizes", 3, 3).rglob("*") if path.is_file())
    for index in range(40):
        limit = biggest * index // 40
        folder, answer = runner.run("full", file_limit=limit)
        assert answer["status"] == harness.ERROR, limit
        assert _hidden(folder) == set(), limit
        _check_unharmed("full", folder, f"limit {limit}")
    folder, answer = runner.run("full", file_limit=biggest)
    assert answer["status"] == 0


def test_every_point_of_the_source_is_killed_at(passages: dict) -> None:
    reached = {name for points in passages.values() for name in points}
    in_source = {name for name in failpoints_in_source() if name.startswith("checkpoint.")}
    assert reached == in_source


# -- no write without a failpoint ---------------------------------------------------------------------------------

WRITES = set(
    "open write pwrite writev rename replace renames unlink remove rmdir removedirs mkdir makedirs fsync fdatasync "
    "truncate ftruncate link symlink rmtree copy copy2 copyfile copytree write_text write_bytes touch hardlink_to "
    "symlink_to save_file save save_pretrained".split()
)
GUARDED = sorted(SOURCE.rglob("*.py"))
#: Functions and methods of this package that write, and are scanned where they are defined.
_OURS = ("checkpoint.save(", "self.checkpoints.save(", "self.export.write(", "self.journal.write(")
#: module -> call -> why it has no instant of its own.
_THERE = "a function of this package, whose own writes are scanned"
_PIPE = "a pipe to another process, no file"
EXEMPT: dict[str, dict[str, str]] = {
    "_metrics_log.py": {
        "os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 438)": "an empty log harms nothing",
        "os.ftruncate(self._descriptor, before)": "takes back half a line, as the next start would",
    },
    "run/measure/journal.py": {"self.log.write(step, values)": _THERE},
    "rewards/symbolic.py": {"process.stdin.write(question.encode() + b'\\n')": _PIPE},
    "rewards/symbolic_worker.py": {
        "out.write(b'ready\\n')": _PIPE,
        "out.write(reply.encode() + b'\\n')": _PIPE,
    },
}
#: Modules that write outside of run folders alone, and where to.
ELSEWHERE = {
    "demo.py": "the folder of the demo, round its runs",
    "doctor.py": "a temporary folder, to look at a copy",
    "rollout/vllm_sampler.py": "a temporary folder that the engine reads from",
}


def _is_instant(item: ast.withitem) -> bool:
    return isinstance(item.context_expr, ast.Call) and ast.unparse(item.context_expr.func) == "instant"


def _unguarded_writes(text: str) -> set[str]:
    """Calls that change files and are not inside ``with instant(...)``."""
    tree = ast.parse(text)
    withs = [node for node in ast.walk(tree) if isinstance(node, ast.With) and any(map(_is_instant, node.items))]
    guarded = {id(inner) for node in withs for inner in ast.walk(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in guarded]
    return {ast.unparse(call) for call in calls if _changes_files(call)}


def _changes_files(call: ast.Call) -> bool:
    name = getattr(call.func, "id", None) or getattr(call.func, "attr", "")
    text = ast.unparse(call)
    if text.startswith("os.open("):
        return "O_CREAT" in text or "O_WRONLY" in text or "O_RDWR" in text
    if name == "open":
        return _opens_to_write(call)
    if name in ("replace", "remove", "copy"):  # methods of str, list, dict
        return text.startswith(("os.", "shutil."))
    return name in WRITES and not text.startswith(_OURS)


def _opens_to_write(call: ast.Call) -> bool:
    """``open(path, mode)`` or ``path.open(mode)`` with a mode that writes, or one that is not written out."""
    own = isinstance(call.func, ast.Attribute)
    if own and call.args and not isinstance(call.args[0], ast.Constant):
        return False  # something else that opens: no mode comes first
    given = call.args[0 if own else 1 :][:1] + [word.value for word in call.keywords if word.arg == "mode"]
    return bool(given) and not (isinstance(given[0], ast.Constant) and set(str(given[0].value)) <= set("rbtU"))


def test_every_write_has_a_failpoint() -> None:
    """In every module of the package: whatever changes a file of a run is inside a named instant, or listed with a reason."""
    names = {path.relative_to(SOURCE).as_posix(): path for path in GUARDED}
    assert names.keys() >= EXEMPT.keys() | ELSEWHERE.keys()
    found = {name: _unguarded_writes(path.read_text()) for name, path in names.items()}
    assert all(found[name] for name in ELSEWHERE)
    unnamed = {name: calls for name, calls in found.items() if calls and name not in ELSEWHERE}
    assert unnamed == {name: set(calls) for name, calls in EXEMPT.items()}


@pytest.mark.parametrize(
    "line",
    [
        *("os.replace(a, b)", "path.unlink()", "open(p, 'wb')", "os.fsync(3)", "shutil.rmtree(p)", "p.write_text('')"),
        *("p.open('w')", "p.open(mode='r+')", "open(p, mode)", "model.save_pretrained(p)", "torch.save(x, p)"),
        *("self.policy.save(p)", "self.log.write(x)", "checkpoints.write(p)", "self.exported.write(p)"),
    ],
)
def test_the_scan_sees_a_write_without_a_failpoint(line: str) -> None:
    assert _unguarded_writes(line) == {line}
    assert _unguarded_writes(f"with instant(point):\n    {line}") == set()


def test_the_scan_lets_reading_pass() -> None:
    assert (
        _unguarded_writes(
            "text.replace('a', 'b')\nopen(p, 'rb')\nos.open(p, os.O_RDONLY)\np.open(newline='')\nopen(p)\ncache.open(x)"
        )
        == set()
    )


# -- the failpoints themselves ------------------------------------------------------------------------------------


def test_failpoint_is_silent_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLFT_FAILPOINT", raising=False)
    failpoint("some.name")


def test_failpoint_raises_at_the_counted_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLFT_FAILPOINT", "only.here:2:oserror:EIO")
    failpoint("only.here")
    failpoint("elsewhere")
    with pytest.raises(OSError, match="Input/output error"):
        failpoint("only.here")
    failpoint("only.here")


def test_failpoint_sends_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    monkeypatch.setenv("RLFT_FAILPOINT", "signal.here:2:signal:SIGUSR1")
    try:
        for _ in range(3):
            failpoint("signal.here")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert heard == [signal.SIGUSR1]


@pytest.mark.parametrize(
    "spec",
    [
        *("", "name", "name:0", "name:x", "name:1:oserror", "name:1:oserror:NOPE", "name:1:boom:EIO"),
        *("name:1:signal", "name:1:signal:NOPE", "name:1:signal:SIGTERM:more", "name:1:oserror:__doc__"),
    ],
)
def test_failpoint_refuses_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setenv("RLFT_FAILPOINT", spec)
    with pytest.raises(ValueError, match="must be 'name:count'"):
        failpoint("name")


def test_a_computed_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(x):\n    failpoint(x)\n")
    with pytest.raises(ValueError, match="literal string"):
        failpoints_in_source(tmp_path)


def test_names_are_followed_through_helpers(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "def low(point, x):\n    failpoint(f'{point}.low')\n"
        "def high(point):\n    low(point, 1)\n    low(f'{point}.again', 2)\n"
        "def use():\n    high('top')\n    failpoint('bare')\n"
    )
    assert failpoints_in_source(tmp_path) == {"top.low", "top.again.low", "bare"}


# -- what a disk refused, in words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "x"),
            "No space left on device, about 1,234 bytes needed, N bytes free; free some space",
        ),
        (
            OSError(errno.EFBIG, "x"),
            "File too large, about 1,234 bytes needed, N bytes free; a file grew over the limit",
        ),
        (OSError(errno.EROFS, "x"), "Read-only file system, about 1,234 bytes needed, N bytes free; make the folder"),
        (OSError(errno.EIO, "x"), "Input/output error, about 1,234 bytes needed, N bytes free"),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), "No space left on device, about"),
        (RuntimeError("something else"), None),
        (OSError("without a number"), None),
    ],
)
def test_disk_trouble_in_words(tmp_path: Path, error: Exception, words: str | None) -> None:
    said = disk_trouble(error, tmp_path, 1234)
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert re.sub(r"[\d,]+ bytes free", "N bytes free", said).startswith(words)


def test_disk_trouble_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    """The space of the file system that it was on, or would be made on."""
    assert "bytes free" in str(disk_trouble(OSError(errno.EIO, "x"), tmp_path / "gone" / "deeper", 1))
