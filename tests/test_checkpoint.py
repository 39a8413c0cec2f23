"""Saving and loading: what comes back is what went in, and the order of writing is the one that survives a power cut."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlft import _failpoint, checkpoint
from rlft.checkpoint import _tensorfile
from tests import checkpoint_harness as harness

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def _save(run_dir: Path, step: int = 1, **options) -> Path:
    given = {"tensors": {"model": {"w": torch.arange(4.0) + step}}, "records": {"trainer": {"step": step}}}
    return checkpoint.save(run_dir, step, config_hash="hash", **{**given, **options})


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# -- round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)]:
        count = int(torch.tensor(shape).prod()) if shape else 1
        raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        raw = raw % 2 if dtype == torch.bool else raw
        tensors[f"t{list(shape)}"] = raw.view(dtype).reshape(shape)
    path = _save(tmp_path, tensors={"all": tensors})
    back = checkpoint.load(path).tensors["all"]
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        assert _bits(back[name]) == _bits(tensor)
    # and the file is one that the safetensors library itself understands
    assert load_file(path / "all.safetensors").keys() == tensors.keys()


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38])
    nans = torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    back = checkpoint.load(_save(tmp_path, tensors={"m": {"odd": odd, "nans": nans}})).tensors["m"]
    assert _bits(back["odd"]) == _bits(odd)
    assert _bits(back["nans"]) == _bits(nans)


def test_views_that_share_memory_or_are_not_contiguous(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.nn.Parameter(base.clone())
    tensors = {
        "whole": base,
        "transposed": base.T,
        "column": base[:, 2],
        "expanded": torch.tensor([7.0]).expand(5),
        "tied_a": tied,
        "tied_b": tied,
        "conjugated": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "negated": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
    }
    back = checkpoint.load(_save(tmp_path, tensors={"m": tensors})).tensors["m"]
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.detach()), name
        assert not back[name].requires_grad
    assert back["tied_a"].data_ptr() != back["tied_b"].data_ptr()
    assert torch.equal(base, torch.arange(24.0).reshape(4, 6))


def test_a_tensor_larger_than_one_write(tmp_path: Path) -> None:
    big = torch.randint(0, 255, (9_000_001,), dtype=torch.uint8)
    assert torch.equal(checkpoint.load(_save(tmp_path, tensors={"m": {"big": big}})).tensors["m"]["big"], big)


def test_records_come_back_as_what_they_were(tmp_path: Path) -> None:
    record = {
        "tuple": (1, (2.5, "x"), []),
        "nan": [float("nan"), float("inf"), -float("inf"), -0.0],
        "float": 0.1 + 0.2,
        "big": 2**200,
        "none": None,
        "bool": True,
        "text": 'é"\n\ud800',
        "": {"nested": {}},
    }
    back = checkpoint.load(_save(tmp_path, records={"r": record, "list": [1], "number": 3})).records
    assert repr(back["r"]) == repr(record)
    assert back["list"] == [1]
    assert back["number"] == 3


def test_loaded_tensors_outlive_the_folder(tmp_path: Path) -> None:
    loaded = checkpoint.load(_save(tmp_path)).tensors["model"]["w"]
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:  # in place: a mapped file would change under the tensor
        file.write(b"\0" * size)
    assert torch.equal(loaded, torch.arange(4.0) + 1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    loaded += 1
    assert torch.equal(loaded, torch.arange(4.0) + 2)


def test_saving_draws_no_random_number_and_changes_no_tensor(tmp_path: Path) -> None:
    tensors = harness.content(5)
    before = checkpoint.rng_state(), checkpoint.fingerprint(tensors["model"])
    _save(tmp_path, tensors=tensors, keep=1)
    checkpoint.load_latest(tmp_path)
    after = checkpoint.rng_state(), checkpoint.fingerprint(tensors["model"])
    assert checkpoint.fingerprint(before[0][0]) == checkpoint.fingerprint(after[0][0])
    assert before[0][1] == after[0][1]
    assert before[1] == after[1]


def test_manifest_says_what_was_saved(tmp_path: Path) -> None:
    path = _save(tmp_path, 7, best=True)
    manifest = checkpoint.verify(path)
    assert (manifest.step, manifest.config_hash, manifest.world_size, manifest.best) == (7, "hash", 1, True)
    assert manifest.files.keys() == {"model.safetensors", "trainer.json"}
    assert manifest.bytes == sum((path / name).stat().st_size for name in manifest.files)


def test_only_some_stems(tmp_path: Path) -> None:
    path = _save(tmp_path, tensors=harness.content(1))
    assert checkpoint.load(path, only=["model"]).tensors.keys() == {"model"}
    with pytest.raises(checkpoint.CheckpointError, match="has no 'modle'; it holds model, optimizer, trainer"):
        checkpoint.load(path, only=["modle"])


def test_extra_writer_writes_into_subfolders(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "adapter" / "deep").mkdir(parents=True)
        (folder / "adapter" / "deep" / "x.bin").write_bytes(b"123")
        (folder / "empty").mkdir()

    path = _save(tmp_path, extra_writer=write)
    assert checkpoint.verify(path).files["adapter/deep/x.bin"].size == 3
    assert checkpoint.load(path).tensors.keys() == {"model"}


@pytest.mark.parametrize("name", ["model.safetensors", "loose.txt", "manifest.json", "a/colon:name"])
def test_extra_writer_keeps_to_plain_names_in_subfolders(tmp_path: Path, name: str) -> None:
    _save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"mine")

    with pytest.raises(checkpoint.CheckpointError, match="checkpoint of step 2 not written"):
        _save(tmp_path, 2, extra_writer=write)
    assert _steps(tmp_path) == [1]
    assert _hidden(tmp_path) == []


def test_extra_writer_that_raises(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise KeyError("boom")

    with pytest.raises(checkpoint.CheckpointError, match="boom") as caught:
        _save(tmp_path, 1, extra_writer=write)
    assert isinstance(caught.value.__cause__, KeyError)
    assert _hidden(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 1, extra_writer=write)
    assert list(tmp_path.iterdir()) == []


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"step": -1}, "step must be an integer >= 0"),
        ({"step": True}, "step must be an integer >= 0"),
        ({"step": 1.0}, "step must be an integer >= 0"),
        ({"keep": 0}, "keep must be an integer >= 1"),
        ({"keep": True}, "keep must be an integer >= 1"),
        ({"rank": 1}, "rank must be in 0..0"),
        ({"tensors": {"../x": {}}}, "file stem '../x' cannot be used"),
        ({"tensors": {"a.rank1": {}}}, "cannot be used"),
        ({"records": {"manifest": {}}}, "cannot be used"),
    ],
)
def test_bad_arguments(tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _save(tmp_path, **{"step": 1, **bad})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tensors": {"m": {"w": [1.0]}}}, r"tensors\['m'\]\['w'\] must be a tensor, got list"),
        ({"tensors": {"m": {"w": torch.eye(2).to_sparse()}}}, "torch.sparse_coo"),
        ({"tensors": {"m": {"w": torch.empty(2, device="meta")}}}, "on meta"),
        ({"tensors": {"m": {"w": torch.zeros(2, dtype=torch.complex128)}}}, "complex128"),
        ({"tensors": {"m": {"": torch.zeros(2)}}}, "non-empty strings"),
        ({"tensors": {"m": {"__metadata__": torch.zeros(2)}}}, "__metadata__"),
        ({"records": {"r": {"x": {1: 2}}}}, r"records\['r'\].x has the key 1; keys must be strings"),
        ({"records": {"r": {"x": [torch.zeros(1)]}}}, r"records\['r'\].x\[0\] is a Tensor"),
        ({"records": {"r": {"x": {1, 2}}}}, "is a set, which has no exact JSON form"),
        ({"records": {"r": {"__tuple__": 1}}}, "__tuple__"),
    ],
)
def test_what_cannot_be_stored_exactly_is_named(tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=message):
        _save(tmp_path, **bad)
    assert list(tmp_path.iterdir()) == []


def test_not_enough_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    written = []
    monkeypatch.setattr(_failpoint, "failpoint", written.append)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        _save(tmp_path, 2, tensors={"m": {"w": torch.zeros(1_000_000)}})
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "2,000,000 bytes free" in message
    needed = int(message.split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert 4_000_000 < needed < 6_000_000
    assert written == []
    with pytest.raises(checkpoint.CheckpointError, match="bytes needed"):
        _save(tmp_path, 2, extra_bytes=3_000_000)
    assert _save(tmp_path, 2).exists()


# -- order --------------------------------------------------------------------------------------------------------


def test_order_of_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.put(tmp_path, 1, 1)
    harness.put(tmp_path, 2, 2)
    seen: list[str] = []
    monkeypatch.setattr(_failpoint, "failpoint", seen.append)
    harness.put(tmp_path, 3, 3, keep=2)

    def first(name: str) -> int:
        return seen.index(f"checkpoint.{name}")

    def last(name: str) -> int:
        return len(seen) - 1 - seen[::-1].index(f"checkpoint.{name}")

    files = ["tensors.sync.after", "record.sync.after", "extra.sync.after"]
    assert all(last(name) < first("manifest.open.before") for name in files)
    assert last("manifest.sync.after") < first("sync.before")
    assert seen.count("checkpoint.sync.after") == 2  # the folder and its subfolder
    assert last("sync.after") < first("rename.before")
    assert first("rename.after") < first("parent.sync.before")
    assert first("parent.sync.after") < first("rotate.aside.before")
    assert all(seen.count(f"checkpoint.{name}.open.after") == n for name, n in {"tensors": 2, "record": 1}.items())
    assert seen.count("checkpoint.tensors.sync.after") == 2


# -- finding, rotating, replacing ---------------------------------------------------------------------------------


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path / "missing") is None
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.find_best(tmp_path) is None
    assert checkpoint.inspect(tmp_path) == []
    assert checkpoint.remove_stale(tmp_path / "missing") == []


def test_newest_by_number_not_by_text(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        _save(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-0200").mkdir()
    latest = checkpoint.load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 100
    assert checkpoint.find_latest(str(tmp_path)) == tmp_path / "checkpoint-100"
    assert [info.step for info in checkpoint.inspect(tmp_path)] == [100, 20, 9]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 3, tensors={"model": {"w": torch.zeros(2)}, "old": {"x": torch.zeros(1)}})
    _save(tmp_path, 3, tensors={"model": {"w": torch.ones(2)}}, keep=1)
    loaded = checkpoint.load(tmp_path / "checkpoint-3")
    assert loaded.tensors.keys() == {"model"}
    assert torch.equal(loaded.tensors["model"]["w"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_keep_counts_the_new_one_and_spares_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        _save(tmp_path, step, keep=2, best=step in (2, 3))
    assert _steps(tmp_path) == [3, 5, 6]
    assert checkpoint.find_best(tmp_path) == tmp_path / "checkpoint-3"


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    for step in range(4):
        _save(tmp_path, step)
    assert _steps(tmp_path) == [0, 1, 2, 3]


def _damage(path: Path) -> None:
    target = path / "model.safetensors"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(bytes(data))


def test_rotate_never_deletes_the_last_verified(tmp_path: Path) -> None:
    for step in range(1, 5):
        _save(tmp_path, step)
    for step in (3, 4):
        _damage(tmp_path / f"checkpoint-{step}")
    with pytest.warns(
        checkpoint.CheckpointWarning, match=r"does not read back: .*checkpoint-[34].model\.safetensors is damaged"
    ):
        assert checkpoint.rotate(tmp_path, 2) == [tmp_path / "checkpoint-1"]
    assert _steps(tmp_path) == [2, 3, 4]
    with pytest.warns(checkpoint.CheckpointWarning, match="falling back"):
        assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_new_checkpoint_that_does_not_read_back_costs_no_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """A bit that is lost between memory and disk: the manifest has the hash of what was meant."""
    for step in (1, 2):
        _save(tmp_path, step, keep=keep)
    real = _tensorfile.write_file

    def losing(point: str, path: Path, chunks: Any) -> Any:
        written = real(point, path, chunks)
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        return written

    if keep == 2:
        _damage(tmp_path / "checkpoint-2")
    before = _steps(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(_tensorfile, "write_file", losing)
        with pytest.warns(checkpoint.CheckpointWarning, match="does not read back: .*; an older one that does is kept"):
            _save(tmp_path, 3, keep=keep)
    assert _steps(tmp_path) == [*before, 3]
    with pytest.warns(checkpoint.CheckpointWarning, match="falling back"):
        assert checkpoint.find_latest(tmp_path) == tmp_path / f"checkpoint-{3 - keep}"
    _save(tmp_path, 4, keep=1)
    assert _steps(tmp_path) == [4]


def test_rotate_keeps_what_is_protected(tmp_path: Path) -> None:
    for step in range(1, 5):
        _save(tmp_path, step)
    checkpoint.rotate(tmp_path, 1, [tmp_path / "checkpoint-1", "checkpoint-2"])
    assert _steps(tmp_path) == [1, 2, 4]
    with pytest.raises(ValueError, match="keep must be"):
        checkpoint.rotate(tmp_path, 0)


def test_rotate_does_not_count_broken_ones_and_removes_them_late(tmp_path: Path) -> None:
    for step in range(1, 5):
        _save(tmp_path, step)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    checkpoint.rotate(tmp_path, 2)
    assert _steps(tmp_path) == [1, 2, 3, 4]  # 3 and 1 are the two sound ones
    checkpoint.rotate(tmp_path, 1)
    assert _steps(tmp_path) == [3, 4]


def test_the_checkpoint_just_written_stays_below_newer_numbers(tmp_path: Path) -> None:
    _save(tmp_path, 100)
    _save(tmp_path, 200)
    _save(tmp_path, 150, keep=1)
    assert _steps(tmp_path) == [150, 200]
    assert checkpoint.discard_newer(tmp_path, 150) == [tmp_path / "checkpoint-200"]
    assert _steps(tmp_path) == [150]
    assert _hidden(tmp_path) == []


def test_stale_folders_of_ours_alone_are_removed(tmp_path: Path) -> None:
    name = "0" * 32
    ours = [f".tmp-3-{name}", f".del-3-{name}"]
    others = [".tmp-3-abc", "tmp-3", f".tmp-x-{name}", f".tmp-3-{name}.bak", ".git"]
    for folder in ours + others:
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "file").write_text("x")
    outside = tmp_path / "keep.txt"
    outside.write_text("x")
    (tmp_path / ours[0] / "link").symlink_to(outside)
    assert checkpoint.remove_stale(tmp_path) == sorted(ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "keep.txt"])


def test_deletion_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    monkeypatch.setenv("RLFT_FAILPOINT", "checkpoint.rotate.file.before:1:oserror:EIO")
    with pytest.warns(checkpoint.CheckpointWarning, match="could not be deleted: Input/output error"):
        _save(tmp_path, 2, keep=1)
    assert _steps(tmp_path) == [2]
    assert len(checkpoint.remove_stale(tmp_path)) == 1
    assert _hidden(tmp_path) == []


# -- several processes --------------------------------------------------------------------------------------------


def test_ranks_write_together_and_each_reads_its_own(tmp_path: Path) -> None:
    results = harness.in_ranks(tmp_path, 4, 3)
    assert results == [tmp_path / "checkpoint-4"] * 3
    assert checkpoint.verify(tmp_path / "checkpoint-4").world_size == 3
    for rank in range(3):
        loaded = checkpoint.load(tmp_path / "checkpoint-4", rank=rank)
        assert loaded.records["rng"] == {"rank": rank}
        assert checkpoint.fingerprint(loaded.tensors["model"]) == checkpoint.fingerprint(harness.content(4)["model"])
        if rank:
            assert loaded.tensors["rng"]["state"].tolist() == [rank] * 3
            assert loaded.own == {"rng"}
    stranger = checkpoint.load(tmp_path / "checkpoint-4", rank=7)
    assert stranger.own == frozenset()
    assert stranger.records["rng"] == {"rank": 0}
    assert _hidden(tmp_path) == []


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("kind", ["record", "tensor", "extra"])
def test_one_failing_rank_fails_all_and_leaves_nothing(tmp_path: Path, failing: int, kind: str) -> None:
    harness.in_ranks(tmp_path, 1, 3)

    def explode(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    bad = {
        "record": {"records": {"x": {1: 2}}},
        "tensor": {"tensors": {"x": {"w": torch.zeros(1, dtype=torch.complex128)}}},
        "extra": {"extra_writer": explode},
    }[kind]
    results = harness.in_ranks(tmp_path, 2, 3, each=lambda rank: bad if rank == failing else {}, keep=1)
    assert all(isinstance(result, checkpoint.CheckpointError) for result in results)
    assert _steps(tmp_path) == [1]
    assert _hidden(tmp_path) == []
    own = {"record": "keys must be strings", "tensor": "complex128", "extra": "No space left on device"}[kind]
    assert own in str(results[failing])
    assert all("see its own error" in str(r) or "own errors" in str(r) for i, r in enumerate(results) if i != failing)


def test_a_broken_barrier_leaves_nothing(tmp_path: Path) -> None:
    calls = []

    def barrier() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise threading.BrokenBarrierError("rank 1 is gone")

    with pytest.raises(checkpoint.CheckpointError, match="rank 1 is gone"):
        _save(tmp_path, 1, world_size=2, barrier=barrier)
    assert list(tmp_path.iterdir()) == []


# -- state helpers are in test_checkpoint_state.py; hashes here ---------------------------------------------------


def test_fingerprint_sees_every_difference() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3]])}
    same = {"b": torch.tensor([[3]]), "a": torch.tensor([1.0, 0.0, 2.0])[::2]}
    others = [
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].reshape(2, 1), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.0000002]), "b": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {},
    ]
    assert checkpoint.fingerprint(base) == checkpoint.fingerprint(same)
    hashes = {checkpoint.fingerprint(tensors) for tensors in [base, *others]}
    assert len(hashes) == len(others) + 1
    zeros = [checkpoint.fingerprint({"a": torch.tensor([value])}) for value in (0.0, -0.0)]
    assert zeros[0] != zeros[1]


def test_config_hash_and_diff() -> None:
    config = {"lr": 1e-5, "lora": {"r": 16, "targets": ["q", "v"]}, "path": Path("a/b")}
    shuffled = {"path": "a/b", "lora": {"targets": ["q", "v"], "r": 16}, "lr": 1e-5}
    assert checkpoint.config_hash(config) == checkpoint.config_hash(shuffled)
    other = {"lr": 1e-5, "lora": {"r": 32, "targets": ["q", "v"]}, "new": None}
    assert checkpoint.config_hash(config) != checkpoint.config_hash(other)
    assert checkpoint.config_diff(config, other) == [
        "lora.r: 16 -> 32",
        "new: (absent) -> null",
        'path: "a/b" -> (absent)',
    ]
    assert checkpoint.config_diff(config, shuffled) == []
    assert checkpoint.config_hash({"a": 1}) != checkpoint.config_hash({"a": 1.0})
    assert checkpoint.config_hash({"a": (1,)}) != checkpoint.config_hash({"a": [1]})
    assert checkpoint.config_hash({"a": True}) != checkpoint.config_hash({"a": 1})
    with pytest.raises(ValueError, match=r"config.f is a function"):
        checkpoint.config_hash({"f": _save})


def test_random_state_is_untouched_by_this_file() -> None:
    # the helpers above draw from their own generators; the global ones belong to the caller
    random.seed(1)
    np.random.seed(1)
    before = checkpoint.rng_state()[1]
    harness.content(3)
    assert checkpoint.rng_state()[1] == before
