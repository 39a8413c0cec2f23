"""Deleting checkpoints, and clearing what a killed run left.

Folders on their way are named apart from checkpoints: ``.tmp-<step>-<id>`` is being written, ``.del-<step>-<id>`` is
being deleted, and ``.old-<step>-<id>`` is a checkpoint that is being replaced by another of its own step.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Collection
from pathlib import Path

from rlft._files import move, remove_tree, sync_dir
from rlft.checkpoint._errors import CheckpointError, CheckpointVersionError, CheckpointWarning
from rlft.checkpoint._read import checkpoint_name, numbered, verify_in_run

__all__ = ["PASSING", "check_keep", "clear_away", "discard_newer", "remove_stale", "retire", "rotate"]

PASSING = re.compile(r"\.(tmp|old|del)-(0|[1-9]\d*)-[0-9a-f]{32}")


def check_keep(keep: int | None) -> None:
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an integer >= 1, or None to keep every checkpoint, got {keep!r}")


def rotate(
    run_dir: str | Path, keep: int, protect: Collection[str | Path] = (), *, verified: Collection[str | Path] = ()
) -> list[Path]:
    """Delete all but the newest ``keep`` checkpoints.

    Never deleted: the newest one saved as best, those in ``protect``, those of a newer format, and at least one that
    verifies to the last byte: before anything goes, one of those that stay is read back. Damaged ones do not count as kept,
    and go once ``keep`` sound ones are newer.

    Args:
        run_dir: folder of the run.
        keep: how many to keep, >= 1.
        protect: folders to keep besides.
        verified: folders just read back, which need not be hashed again; kept as well.

    Returns:
        The deleted folders. A folder that cannot be deleted is left, with a :class:`CheckpointWarning`; so is the newest
        one that verifies, where none of those that stay does.

    Raises:
        ValueError: when ``keep`` is not an integer >= 1.
    """
    run_dir = Path(run_dir)
    check_keep(keep)
    sound: list[Path] = []
    doomed: list[Path] = []
    kept = {Path(path).name for path in (*protect, *verified)}
    best_seen = False
    for _, path in numbered(run_dir):
        enough = len(sound) >= keep
        try:
            best = verify_in_run(path, contents=False).best
        except CheckpointVersionError:
            continue
        except CheckpointError:
            if enough:
                doomed.append(path)
            continue
        if not enough or (best and not best_seen):
            kept.add(path.name)
        best_seen |= best
        sound.append(path)
    doomed = [path for path in (*doomed, *sound) if path.name not in kept]
    if doomed and not verified:
        staying = [path for path in sound if path.name in kept]
        last = _newest_verified([*staying, *(path for path in sound if path.name not in kept)])
        doomed = [path for path in doomed if path != last]
    for path in doomed:
        retire("checkpoint.rotate", path)
    return doomed


def _newest_verified(sound: list[Path]) -> Path | None:
    for path in sound:
        try:
            verify_in_run(path)
            return path
        except CheckpointError as error:
            text = f"checkpoint does not read back: {error}; an older one that does is kept"
            warnings.warn(text, CheckpointWarning, stacklevel=4)
    return None


def discard_newer(run_dir: str | Path, step: int) -> list[Path]:
    """Delete the checkpoints after ``step``, sound or not: what a resume from ``step`` is about to write anew.

    Args:
        run_dir: folder of the run.
        step: the last one to keep.

    Returns:
        The deleted folders.
    """
    newer = [path for number, path in numbered(Path(run_dir)) if number > step]
    for path in newer:
        retire("checkpoint.newer", path)
    return newer


def remove_stale(run_dir: str | Path) -> list[str]:
    """Clear what a killed run left behind; call it at start, with the run's lock held.

    Only folders with the names of this module are touched. A checkpoint caught between being set aside and being
    replaced is put back.

    Returns:
        The names found.
    """
    run_dir = Path(run_dir)
    found = sorted(name for name in os.listdir(run_dir) if PASSING.fullmatch(name)) if run_dir.is_dir() else []
    for name in found:
        kind, step = name[1:].split("-")[:2]
        final = run_dir / checkpoint_name(int(step))
        if kind == "old" and not final.exists():
            move("checkpoint.restore", run_dir / name, final)
            sync_dir("checkpoint.restore.sync", run_dir)
        else:
            clear_away("checkpoint.stale", run_dir / name)
    return found


def retire(point: str, path: Path) -> None:
    """Delete a checkpoint: a half-deleted folder never carries a checkpoint's name. Failure is a warning."""
    aside = path.with_name(f".del-{path.name.rpartition('-')[2]}-{uuid.uuid4().hex}")
    try:
        move(f"{point}.aside", path, aside)
    except OSError as error:
        _warn(path, error)
    else:
        clear_away(point, aside)


def clear_away(point: str, path: Path) -> None:
    """Delete a folder that is no checkpoint's. Failure is a warning: the next start clears it."""
    try:
        remove_tree(point, path)
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(f"{path} could not be deleted: {error.strerror}; delete it by hand", CheckpointWarning, stacklevel=4)
