"""Whatever happens to a checkpoint's files is seen before they are used, and nothing in them is ever run."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rlft
from rlft import checkpoint
from rlft._json import canonical
from rlft.checkpoint import _manifest
from tests import checkpoint_harness as harness

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "adapter/weights.txt"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pristine")
    harness.put(run, 1, 1)
    harness.put(run, 2, 2)
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def _check_detected(run: Path, what: str) -> None:
    """Refused on its own, and passed over, with a warning, in favour of the one before."""
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(run / "checkpoint-2")
    assert str(run / "checkpoint-2") in str(caught.value), what
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert checkpoint.find_latest(run) == run / "checkpoint-1", what
    assert len(seen) == 1, what
    assert "checkpoint-2" in str(seen[0].message), what
    newest = checkpoint.inspect(run)[0]
    assert (newest.step, newest.ok) == (2, False), what
    assert newest.problem, what


def test_the_pristine_one_loads(run: Path) -> None:
    assert checkpoint.load(run / "checkpoint-2").step == 2
    assert all(info.ok and not info.problem and info.bytes > 400 for info in checkpoint.inspect(run))


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(run: Path, name: str) -> None:
    path = run / "checkpoint-2" / name
    data = path.read_bytes()
    bits = random.Random(name).sample(range(len(data) * 8), min(45, len(data) * 8))
    for bit in [0, len(data) * 8 - 1, *bits]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        _check_detected(run, f"{name}: bit {bit}")
    path.write_bytes(data)
    assert checkpoint.load(run / "checkpoint-2").step == 2


@pytest.mark.parametrize("name", FILES)
def test_cut_short_grown_or_removed(run: Path, name: str) -> None:
    path = run / "checkpoint-2" / name
    data = path.read_bytes()
    for size in {0, 1, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:size])
        _check_detected(run, f"{name}: cut to {size}")
    for more in (b"\0", b" ", b"\n"):
        path.write_bytes(data + more)
        _check_detected(run, f"{name}: grown by {more!r}")
    path.unlink()
    _check_detected(run, f"{name}: removed")


@pytest.mark.parametrize("name", FILES)
def test_replaced_by_what_is_no_plain_file(run: Path, name: str) -> None:
    path = run / "checkpoint-2" / name
    outside = run / "outside"
    path.rename(outside)
    kinds: dict[str, Callable[[], object]] = {
        "link to the same bytes": lambda: path.symlink_to(outside),
        "dangling link": lambda: path.symlink_to(run / "nowhere"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    for kind, make in kinds.items():
        make()
        started = time.monotonic()
        _check_detected(run, f"{name}: {kind}")
        assert time.monotonic() - started < 60, kind  # a pipe must not be waited for
        path.rmdir() if kind == "folder" else path.unlink()


def test_files_exchanged(run: Path) -> None:
    one, two = (run / "checkpoint-2" / name for name in FILES[1:3])
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    _check_detected(run, "exchanged")


@pytest.mark.parametrize("name", ["extra.safetensors", "extra.json", "adapter/more.txt", "deep/er/file", ".hidden"])
def test_files_added(run: Path, name: str) -> None:
    path = run / "checkpoint-2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")
    _check_detected(run, name)


def test_a_link_added(run: Path) -> None:
    (run / "checkpoint-2" / "adapter" / "link").symlink_to("/")
    _check_detected(run, "link")


def test_a_folder_replaced_by_a_link(run: Path) -> None:
    (run / "checkpoint-2" / "adapter").rename(run / "moved")
    (run / "checkpoint-2" / "adapter").symlink_to(run / "moved")
    _check_detected(run, "linked folder")


def test_a_checkpoint_that_is_a_link_does_not_count(run: Path) -> None:
    (run / "checkpoint-3").symlink_to(run / "checkpoint-2")
    with pytest.warns(checkpoint.CheckpointWarning, match="is a link"):
        assert checkpoint.find_latest(run) == run / "checkpoint-2"


def test_a_renamed_checkpoint(run: Path) -> None:
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    with pytest.warns(checkpoint.CheckpointWarning, match="holds step 2"):
        assert checkpoint.find_latest(run) == run / "checkpoint-1"
    (run / "checkpoint-9").rename(run / "my-best")
    assert checkpoint.load(run / "my-best").step == 2


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path) -> None:
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "trainer.json").unlink()
    for find in (checkpoint.find_latest, checkpoint.load_latest):
        with (
            pytest.warns(checkpoint.CheckpointWarning, match="lacks 'trainer.json'"),
            pytest.raises(checkpoint.CheckpointError, match=r"none of the 2 checkpoints .* restore one from a backup"),
        ):
            find(run)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in [
        (tmp_path, "has no manifest.json"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "missing", "not a folder"),
    ]:
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(path)


# -- manifests that are whole but hostile -------------------------------------------------------------------------


def _reseal(path: Path, change: Callable[[dict], object]) -> None:
    """Write a manifest whose own hash is right."""
    body = json.loads((path / "manifest.json").read_bytes())
    del body["seal"]
    change(body)
    (path / "manifest.json").write_bytes(_manifest._sealed(body))


def test_resealing_nothing_changes_nothing(run: Path) -> None:
    before = (run / "checkpoint-2" / "manifest.json").read_bytes()
    _reseal(run / "checkpoint-2", lambda body: None)
    assert (run / "checkpoint-2" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.json", "/etc/passwd", "adapter/../../outside.json", "..", ".", "", "a//b", "./a", "a/"),
        *("..\\outside.json", "C:\\x", "c:x", "a\0b", "manifest.json"),
    ],
)
def test_names_that_leave_the_folder(run: Path, name: str) -> None:
    (run / "outside.json").write_bytes(b"{}")
    entry = {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    _reseal(run / "checkpoint-2", lambda body: body["files"].update({name: entry}))
    with pytest.raises(checkpoint.CheckpointError, match="every file must lie inside"):
        checkpoint.load(run / "checkpoint-2")
    _check_detected(run, name)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": True},
        {"step": -1},
        {"step": 2.0},
        {"world_size": 0},
        {"best": 1},
        {"id": None},
        {"config_hash": 3},
        {"created": []},
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": True, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "xyz"}}},
        {"files": {"a": {"size": 1}}},
        {"format": "other"},
        {"version": "1"},
        {"version": None},
    ],
)
def test_fields_of_the_wrong_kind(run: Path, change: dict) -> None:
    _reseal(run / "checkpoint-2", lambda body: body.update(change))
    _check_detected(run, str(change))


def test_a_newer_format_is_refused_not_skipped(run: Path) -> None:
    _reseal(run / "checkpoint-2", lambda body: body.update(version=2, unheard_of=[1]))
    message = "checkpoint format 2, this version of rlft reads up to 1; upgrade rlft"
    for act in (checkpoint.find_latest, checkpoint.load_latest, checkpoint.find_best):
        with pytest.raises(checkpoint.CheckpointVersionError, match=message):
            act(run)
    with pytest.raises(checkpoint.CheckpointVersionError, match=message):
        checkpoint.load(run / "checkpoint-2")
    assert message in checkpoint.inspect(run)[0].problem
    assert checkpoint.rotate(run, 1) == []
    assert (run / "checkpoint-2").exists()


def test_sealed_files_that_are_not_what_they_are_called(run: Path) -> None:
    path = run / "checkpoint-2"
    manifest = (path / "manifest.json").read_bytes()
    for name, data in [
        ("model.safetensors", b"not a safetensors file"),
        ("model.safetensors", b""),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
        ("trainer.json", b"{"),
        ("trainer.json", b"[" * 100_000),
        ("trainer.json", b"NaN"),
        ("trainer.json", b'{"a": 1, "a": 2}'),
        ("trainer.json", b"\xff\xfe"),
        ("trainer.json", b"9" * 5000),
    ]:
        kept = (path / name).read_bytes()
        (path / name).write_bytes(data)
        size, sha256 = _manifest.hash_file(path / name)
        _reseal(path, lambda body, n=name, s=size, h=sha256: body["files"].update({n: {"size": s, "sha256": h}}))
        checkpoint.verify(path)
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load(path)
        (path / name).write_bytes(kept)
        (path / "manifest.json").write_bytes(manifest)


def test_two_thousand_mutated_manifests(run: Path) -> None:
    path = run / "checkpoint-2" / "manifest.json"
    data = path.read_bytes()
    body = json.loads(data)
    rng = random.Random(0)
    started = time.process_time()
    for _ in range(2000):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(mutated))
            what = rng.choice(
                [b"", b"\0", b"{", b"}", b'"', b"[" * 2000, b"9" * 5000, b"\xff", b"1e999", b"null", b","]
            )
            mutated[start : start + rng.randint(0, 9)] = what
        if bytes(mutated) == data:
            continue
        path.write_bytes(bytes(mutated))
        with pytest.raises(checkpoint.CheckpointError):
            _manifest.read_manifest(path.parent)
    path.write_bytes(canonical(dict(body, seal="0" * 64)) + b"\n")
    with pytest.raises(checkpoint.CheckpointError, match="own hash"):
        checkpoint.load(path.parent)
    assert time.process_time() - started < 30


# -- nothing is run -----------------------------------------------------------------------------------------------

AUDITED = """
import sys, warnings
import torch, safetensors.torch, numpy
from rlft import checkpoint

forbidden = ("pickle.find_class", "exec", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "socket.connect", "socket.bind", "socket.__new__", "ctypes.dlopen", "code.__new__", "marshal.loads")
seen = []

def use(run, best):
    loaded = checkpoint.load(best)
    checkpoint.find_latest(run); checkpoint.load_latest(run); checkpoint.inspect(run); checkpoint.find_best(run)
    checkpoint.set_rng_state(*checkpoint.rng_state())
    checkpoint.save(run, 3, tensors=loaded.tensors, records=loaded.records, config_hash="x", keep=1)

use(sys.argv[2], sys.argv[1] + "/checkpoint-1")  # whatever is imported on first use
sys.addaudithook(lambda event, args: seen.append(event) if event in forbidden else None)
use(sys.argv[1], sys.argv[1] + "/checkpoint-2")
print("events:", seen)
try:
    exec("1")
finally:
    print("heard:", seen)
"""


def test_audit_hook_hears_nothing(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(run), str(run.parent / "warm")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(rlft.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "events: []"
    assert "'exec'" in second  # the hook does hear


def _imports_and_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_no_way_to_run_code_in_the_source() -> None:
    source = Path(rlft.__file__).parent
    own = (
        "_failpoint.py",
        "_files.py",
        "_json.py",
        "_redact.py",
        "_metrics_log.py",
        "metrics.py",
        "runlock.py",
        "report.py",
    )
    banned = {
        "pickle",
        "marshal",
        "shelve",
        "subprocess",
        "importlib",
        "ctypes",
        "eval",
        "exec",
        "compile",
        "__import__",
    }
    banned |= {"torch.load", "torch.save", "os.system", "np.load", "numpy.load", "yaml.load", "cloudpickle", "dill"}
    for path in [*(source / "checkpoint").glob("*.py"), *(source / name for name in own)]:
        if path.exists():
            assert not banned & set(_imports_and_calls(ast.parse(path.read_text()))), path.name
