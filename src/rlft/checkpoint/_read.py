"""Finding and loading checkpoints. Nothing is used before it is verified; nothing here changes a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlft._json import loads
from rlft.checkpoint._errors import CheckpointError, CheckpointVersionError, CheckpointWarning
from rlft.checkpoint._manifest import Manifest, files_in, verify
from rlft.checkpoint._tensorfile import read_tensors

__all__ = [
    "STEM",
    "Checkpoint",
    "CheckpointInfo",
    "checkpoint_name",
    "file_name",
    "find_best",
    "find_latest",
    "inspect",
    "load",
    "load_latest",
    "numbered",
    "verify_in_run",
]

STEM = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FILE = re.compile(rf"({STEM.pattern})(?:\.rank(\d+))?\.(safetensors|json)")
_FOLDER = re.compile(r"checkpoint-(0|[1-9]\d*)")


def checkpoint_name(step: int) -> str:
    """Folder name of a step: ``checkpoint-<step>``."""
    return f"checkpoint-{step}"


def file_name(stem: str, kind: str, rank: int) -> str:
    """``model.safetensors`` for rank 0, ``model.rank1.safetensors`` for the others."""
    return f"{stem}.rank{rank}.{kind}" if rank else f"{stem}.{kind}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory, as one process sees it.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        tensors: file stem -> name -> tensor (CPU). A stem that this rank did not write is rank 0's.
        records: file stem -> value.
        own: the stems that this very rank wrote. A random state outside ``own`` belongs to another rank.
        manifest: what the folder says about itself (world size, config hash, ...).
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    records: dict[str, Any]
    own: frozenset[str]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One line of ``rlft doctor``.

    Attributes:
        path: folder.
        step: from its name.
        ok: whether it verifies.
        problem: what is wrong, else "".
        bytes: size on disk.
        best: whether it was saved as the best so far.
        created: UTC time, ISO 8601; "" when unreadable.
        world_size: processes that wrote it; 0 when unreadable.
        config_hash: of the run; "" when unreadable.
    """

    path: Path
    step: int
    ok: bool
    problem: str
    bytes: int
    best: bool = False
    created: str = ""
    world_size: int = 0
    config_hash: str = ""


def numbered(run_dir: Path) -> list[tuple[int, Path]]:
    """``(step, folder)`` of everything named like a checkpoint, newest first, sound or not."""
    if not run_dir.is_dir():
        return []
    named = [(match, path) for path in run_dir.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)


def load(path: str | Path, *, rank: int = 0, only: Iterable[str] | None = None) -> Checkpoint:
    """Verify a checkpoint, every file of it, then read it.

    Args:
        path: its folder.
        rank: whose view to load: that rank's own files, and rank 0's for the rest.
        only: stems to read; None reads all.

    Raises:
        CheckpointVersionError: when it was written by a newer format.
        CheckpointError: when anything is missing, damaged, added or linked, or a stem in ``only`` is absent.
    """
    path = Path(path)
    return _read(path, verify(path), rank, None if only is None else frozenset(only))


def _read(path: Path, manifest: Manifest, rank: int, only: frozenset[str] | None) -> Checkpoint:
    tensors: dict[str, dict[str, Tensor]] = {}
    records: dict[str, Any] = {}
    chosen: dict[tuple[str, str], tuple[int, str]] = {}
    for name in manifest.files:
        match = _FILE.fullmatch(name)
        if match and int(match[2] or 0) in (0, rank):
            stem, writer, kind = match[1], int(match[2] or 0), match[3]
            if (kind, stem) not in chosen or writer == rank:
                chosen[kind, stem] = (writer, name)
    absent = sorted((only or frozenset()) - {stem for _, stem in chosen})
    if absent:
        stems = ", ".join(sorted({stem for _, stem in chosen})) or "none"
        raise CheckpointError(f"{path} has no {absent[0]!r}; it holds {stems}")
    own = set()
    for (kind, stem), (writer, name) in sorted(chosen.items()):
        if only is not None and stem not in only:
            continue
        if writer == rank:
            own.add(stem)
        if kind == "safetensors":
            tensors[stem] = read_tensors(path / name)
        else:
            try:
                records[stem] = loads((path / name).read_bytes())
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return Checkpoint(path, manifest.step, tensors, records, frozenset(own), manifest)


def _sound(run_dir: Path) -> Iterator[tuple[Path, Manifest]]:
    """Verified checkpoints, newest first; a warning for each that is not."""
    damaged = 0
    for _, path in numbered(run_dir):
        try:
            manifest = verify_in_run(path)
        except CheckpointVersionError:
            # Falling back here would throw away the newer work and then rotate it out.
            raise
        except CheckpointError as error:
            damaged += 1
            warnings.warn(f"checkpoint skipped: {error}; falling back to an older one", CheckpointWarning, stacklevel=4)
            continue
        yield path, manifest
    if damaged and damaged == len(numbered(run_dir)):
        raise CheckpointError(
            f"none of the {damaged} checkpoints in {run_dir} is whole (see the warnings); "
            f"restore one from a backup, or move them away to start afresh"
        )


def verify_in_run(path: Path, *, contents: bool = True) -> Manifest:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link; a run holds its own checkpoints: remove it")
    return verify(path, contents=contents)


def find_latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is skipped with a warning that says what is wrong.

    Returns:
        Its folder, or None when the run has no checkpoint at all.

    Raises:
        CheckpointVersionError: when the newest sound one has a newer format.
        CheckpointError: when there are checkpoints and none is whole.
    """
    return next((path for path, _ in _sound(Path(run_dir))), None)


def load_latest(run_dir: str | Path, *, rank: int = 0) -> Checkpoint | None:
    """:func:`load` of :func:`find_latest`, hashing every file once.

    Args:
        run_dir: folder of the run.
        rank: whose view to load, see :func:`load`.

    Returns:
        The newest whole checkpoint, or None.
    """
    for path, manifest in _sound(Path(run_dir)):
        return _read(path, manifest, rank, None)
    return None


def find_best(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint that was saved with ``best=True``; None when there is none.

    Raises:
        CheckpointVersionError: when one has a newer format.
    """
    for _, path in numbered(Path(run_dir)):
        try:
            if verify_in_run(path, contents=False).best and verify_in_run(path).best:
                return path
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            warnings.warn(f"checkpoint skipped: {error}", CheckpointWarning, stacklevel=2)
    return None


def inspect(run_dir: str | Path) -> list[CheckpointInfo]:
    """Every checkpoint of a run, newest first, each fully verified. Never raises for a damaged one."""
    found = []
    for step, path in numbered(Path(run_dir)):
        try:
            manifest = verify_in_run(path)
        except CheckpointError as error:
            found.append(CheckpointInfo(path, step, False, str(error), _bytes_on_disk(path)))
        else:
            details = (manifest.best, manifest.created, manifest.world_size, manifest.config_hash)
            found.append(CheckpointInfo(path, step, True, "", _bytes_on_disk(path), *details))
    return found


def _bytes_on_disk(path: Path) -> int:
    try:
        return sum(files_in(path).values()) if path.is_dir() and not path.is_symlink() else 0
    except (CheckpointError, OSError):
        return 0
