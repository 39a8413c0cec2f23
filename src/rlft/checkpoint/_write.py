"""Writing checkpoints.

The order is the whole point: every file is written and forced to disk in a temporary folder, the manifest last; then
the folder itself is forced to disk, renamed, and its parent forced to disk; only then is anything deleted.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlft._failpoint import instant
from rlft._files import Written, disk_trouble, hash_file, make_dir, move, remove_file, sync_dir, sync_file, write_file
from rlft._json import dumps, loads
from rlft.checkpoint._errors import CheckpointError
from rlft.checkpoint._manifest import MANIFEST, Manifest, check_name, files_in, read_manifest
from rlft.checkpoint._read import STEM, checkpoint_name, file_name
from rlft.checkpoint._remove import PASSING, check_keep, clear_away, rotate
from rlft.checkpoint._tensorfile import check_tensors, write_tensors

__all__ = ["save"]

_SLACK_BYTES = 1 << 20  # manifest, headers, folders

T = TypeVar("T")


def _no_barrier() -> None:
    """One process waits for nobody."""


def save(
    run_dir: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    records: Mapping[str, Any] | None = None,
    config_hash: str,
    keep: int | None = None,
    best: bool = False,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _no_barrier,
    extra_writer: Callable[[Path], None] | None = None,
    extra_bytes: int = 0,
) -> Path:
    """Write ``<run_dir>/checkpoint-<step>`` so that it is either whole or not there.

    Every rank calls this with its own files. Rank 0 creates the folder, writes the manifest over everybody's files and
    renames. A failure of any rank is an error on all of them. An existing checkpoint of the same step is replaced.

    Args:
        run_dir: folder of the run; created when missing.
        step: optimizer steps done, >= 0.
        tensors: file stem -> named tensors; one ``<stem>.safetensors`` each.
        records: file stem -> mappings, lists, tuples, numbers, strings; one ``<stem>.json`` each.
        config_hash: :func:`config_hash` of the run, stored in the manifest.
        keep: how many checkpoints to keep after this one (>= 1); None keeps all. The best is kept besides.
        best: mark this one as the best so far.
        rank: this process, 0 <= rank < world_size.
        world_size: processes that call this together.
        barrier: returns once all processes have called it; used three times.
        extra_writer: given the temporary folder, writes more files into subfolders of it (``save_pretrained``).
        extra_bytes: estimate of what ``extra_writer`` will write, for the check of free space.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: when it could not be written; earlier checkpoints are untouched and no temporary file is left.
        ValueError: when an argument makes no sense.
    """
    run_dir, records = Path(run_dir), records or {}
    _check_arguments(step, tensors, records, keep, rank, world_size)
    final = run_dir / checkpoint_name(step)
    work: Path | None = None
    listing: dict[str, Written] | None = None
    # Nobody raises while the others wait at a barrier: a failure is carried past it first.
    content, failure = _attempt(lambda: _Content(tensors, records, extra_bytes))
    try:
        if rank == 0 and content is not None:
            work, failure = _attempt(lambda: _create(run_dir, step, content))
        barrier()
        if rank != 0:
            work = _find_work(run_dir, step)
            failure = failure or (None if work is not None else _unseen(run_dir, rank))
        if work is not None and content is not None:
            listing, failure = _attempt(lambda: _write_files(work, content, rank, extra_writer))
        barrier()
        if rank == 0 and work is not None and listing is not None:
            _, failure = _attempt(lambda: _publish(work, final, listing, step, config_hash, world_size, best))
        barrier()
        if failure is not None:
            raise failure
        if rank != 0 and work is not None:
            _check_published(final, work)
    except Exception as error:
        raise _explained(error, run_dir, step, content.bytes if content else 0) from error
    finally:
        if rank == 0 and work is not None and work.exists():
            clear_away("checkpoint.discard", work)
    if rank == 0 and keep is not None:
        rotate(run_dir, keep, protect=[final])
    return final


def _check_arguments(
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    records: Mapping[str, Any],
    keep: int | None,
    rank: int,
    world_size: int,
) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer >= 0 (optimizer steps done), got {step!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} for world_size {world_size}, got {rank!r}")
    check_keep(keep)
    for stem in [*tensors, *records]:
        if not isinstance(stem, str) or not STEM.fullmatch(stem) or (stem == "manifest" and stem in records):
            raise ValueError(
                f"file stem {stem!r} cannot be used; expected small letters, digits, '_' and '-', and not 'manifest': "
                f"rename it, for instance 'optimizer'"
            )


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


class _Content:
    """What one rank is about to write, checked and counted before anything touches the disk."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any], extra: int) -> None:
        self.tensors = tensors
        self.records = {stem: dumps(value, what=f"records[{stem!r}]") for stem, value in records.items()}
        size = sum(check_tensors(named, what=f"tensors[{stem!r}]") for stem, named in tensors.items())
        headers = sum(200 + len(name) for named in tensors.values() for name in named)
        self.bytes = size + headers + sum(map(len, self.records.values())) + extra + _SLACK_BYTES

    def check_space(self, run_dir: Path) -> None:
        free = shutil.disk_usage(run_dir).free
        if free < self.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _create(run_dir: Path, step: int, content: _Content) -> Path:
    if not run_dir.is_dir():
        make_dir("checkpoint.run.mkdir", run_dir, exist_ok=True)
    content.check_space(run_dir)
    # The other ranks find the folder by its step, so a leftover of the same step must go first.
    for name in sorted(os.listdir(run_dir)):
        match = PASSING.fullmatch(name)
        if match and match[1] == "tmp" and int(match[2]) == step:
            clear_away("checkpoint.leftover", run_dir / name)
    work = run_dir / f".tmp-{step}-{uuid.uuid4().hex}"
    try:
        make_dir("checkpoint.mkdir", work)
    except OSError:
        if work.exists():
            clear_away("checkpoint.discard", work)
        raise
    return work


def _unseen(run_dir: Path, rank: int) -> CheckpointError:
    return CheckpointError(
        f"rank 0 could not start a checkpoint in {run_dir}; see its own error. If it has none, rank {rank} does not see that "
        f"folder: put it on a file system that all processes share"
    )


def _find_work(run_dir: Path, step: int) -> Path | None:
    found = list(run_dir.glob(f".tmp-{step}-*")) if run_dir.is_dir() else []
    return found[0] if len(found) == 1 else None


def _write_files(
    work: Path, content: _Content, rank: int, extra_writer: Callable[[Path], None] | None
) -> dict[str, Written]:
    if rank != 0:
        content.check_space(work)
    if extra_writer is not None:
        with instant("checkpoint.extra"):
            extra_writer(work)
    listing = {}
    for stem, named in sorted(content.tensors.items()):
        name = file_name(stem, "safetensors", rank)
        listing[name] = write_tensors(work / name, named)
    for stem, data in sorted(content.records.items()):
        name = file_name(stem, "json", rank)
        listing[name] = write_file("checkpoint.record", work / name, [data])
    if rank != 0:
        part = {name: list(entry) for name, entry in listing.items()}
        write_file("checkpoint.part", work / _part_name(rank), [dumps(part)])
    return listing


def _part_name(rank: int) -> str:
    return f".part-{rank}"


def _collect(work: Path, listing: dict[str, Written], world_size: int) -> dict[str, Written]:
    """Everybody's files, and those of extra writers, which are hashed and forced to disk here."""
    files = dict(listing)
    failed = [rank for rank in range(1, world_size) if not (work / _part_name(rank)).exists()]
    if failed:
        raise CheckpointError(f"ranks {failed} could not write their files; see their own errors")
    for rank in range(1, world_size):
        part = work / _part_name(rank)
        files |= {name: Written(*entry) for name, entry in loads(part.read_bytes()).items()}
        remove_file("checkpoint.part.remove", part)
    found = files_in(work)
    for name in sorted(found.keys() - files.keys()):
        check_name(name)
        if "/" not in name:
            raise CheckpointError(f"extra_writer wrote {name!r} beside the checkpoint's own files; use a subfolder")
        sync_file("checkpoint.extra.sync", work / name)
        files[name] = hash_file(work / name)
    changed = [name for name, entry in files.items() if found.get(name) != entry.size]
    if changed:
        raise CheckpointError(f"{work / changed[0]} changed while the checkpoint was being written")
    return files


def _publish(
    work: Path, final: Path, listing: dict[str, Written], step: int, config_hash: str, world_size: int, best: bool
) -> None:
    manifest = Manifest(
        step=step,
        config_hash=config_hash,
        world_size=world_size,
        best=best,
        id=_id_of(work),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=_collect(work, listing, world_size),
    )
    write_file("checkpoint.manifest", work / MANIFEST, [manifest.text()])
    for folder in [path for path in work.rglob("*") if path.is_dir()] + [work]:
        sync_dir("checkpoint.sync", folder)
    old = final.with_name(f".old-{step}-{_id_of(work)}") if final.exists() or final.is_symlink() else None
    try:
        if old is not None:
            move("checkpoint.aside", final, old)
        move("checkpoint.rename", work, final)
    except OSError:
        if old is not None and old.exists() and not final.exists():
            move("checkpoint.back", old, final)
        raise
    sync_dir("checkpoint.parent.sync", final.parent)
    if old is not None:
        clear_away("checkpoint.replaced", old)


def _id_of(work: Path) -> str:
    return work.name.rpartition("-")[2]


def _check_published(final: Path, work: Path) -> None:
    try:
        published = read_manifest(final).id
    except CheckpointError:
        published = ""
    if published != _id_of(work):
        raise CheckpointError(f"rank 0 could not finish {final}; see its own error")


def _explained(error: Exception, run_dir: Path, step: int, needed: int) -> CheckpointError:
    """What failed, where, and what to do."""
    start = f"checkpoint of step {step} not written to {run_dir}"
    end = "earlier checkpoints are untouched"
    return CheckpointError(f"{start}: {disk_trouble(error, run_dir, needed) or error}; {end}")
