"""The only calls of the library that change files whose loss would matter.

Each takes the name of its failpoint first (see :mod:`rlft._failpoint`), so that tests can kill the process before and
after every one of them. Nothing here is clever: exclusive create, write, fsync, rename, delete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rlft._failpoint import instant

__all__ = [
    "Written",
    "append_bytes",
    "cut_file",
    "disk_trouble",
    "hash_file",
    "make_dir",
    "move",
    "remove_file",
    "remove_tree",
    "replace_file",
    "sync_dir",
    "sync_file",
    "write_file",
]

_CHUNK = 4 << 20
# Some network file systems cannot fsync a folder and say so; a rename is then as durable as they make it.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class Written(NamedTuple):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


def disk_trouble(error: BaseException, folder: Path, needed: int) -> str | None:
    """What the disk refused and what to do, in words; None when it was not the disk.

    Args:
        error: as raised. The libraries that write safetensors and tokenizers raise errors of their own around the system's.
        folder: what was written to, or was to be made.
        needed: about how many bytes were to be written.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number is None:
        return None
    try:
        there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
        free = f"{shutil.disk_usage(there).free:,} bytes free"
    except OSError:
        free = "free space unknown"
    remedy = {
        errno.EFBIG: "; a file grew over the limit of this process or file system: raise `ulimit -f`",
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space or keep fewer checkpoints"),
        **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; make the folder writable or choose another"),
    }.get(number, "")
    return f"{os.strerror(number)}, about {needed:,} bytes needed, {free}{remedy}"


def write_file(point: str, path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Create a file that must not exist, write the chunks, fsync. The hash is of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with instant(f"{point}.open"):
        file = open(path, "xb", buffering=0)
    with file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            while view.nbytes:
                with instant(f"{point}.write"):
                    written = file.write(view[:_CHUNK])
                size += written
                view = view[written:]
        with instant(f"{point}.sync"):
            os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def replace_file(point: str, path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    work = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        write_file(point, work, [data])
        move(f"{point}.rename", work, path)
    except OSError:
        if work.exists():
            remove_file(f"{point}.remove", work)
        raise
    sync_dir(f"{point}.dirsync", path.parent)


def append_bytes(point: str, descriptor: int, data: bytes) -> None:
    """Write all bytes to an open descriptor."""
    view = memoryview(data)
    while view.nbytes:
        with instant(f"{point}.write"):
            written = os.write(descriptor, view)
        view = view[written:]


def sync_file(point: str, path: Path | int) -> None:
    """Force a file, given by path or open descriptor, to disk."""
    descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY)
    try:
        with instant(point):
            os.fsync(descriptor)
    finally:
        if not isinstance(path, int):
            os.close(descriptor)


def sync_dir(point: str, path: Path) -> None:
    """Force a folder's entries (creations, renames, deletions) to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with instant(point):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_dir(point: str, path: Path, *, exist_ok: bool = False) -> None:
    """Create a folder, and those above it when ``exist_ok``."""
    with instant(point):
        path.mkdir(parents=exist_ok, exist_ok=exist_ok)


def move(point: str, source: Path, target: Path) -> None:
    """Rename within one file system; a file at the target is replaced, a filled folder is not (OSError)."""
    with instant(point):
        os.replace(source, target)


def remove_file(point: str, path: Path) -> None:
    """Delete one file or link."""
    with instant(point):
        path.unlink()


def remove_tree(point: str, path: Path) -> None:
    """Delete a folder with everything in it, or a file; links are deleted, never followed."""
    if path.is_symlink() or not path.is_dir():
        remove_file(f"{point}.file", path)
        return
    for entry in sorted(os.listdir(path)):
        remove_tree(point, path / entry)
    with instant(f"{point}.folder"):
        path.rmdir()


def cut_file(point: str, path: Path, size: int) -> None:
    """Shorten a file to ``size`` bytes and force that to disk."""
    with instant(f"{point}.truncate"):
        os.truncate(path, size)
    sync_file(f"{point}.sync", path)


def hash_file(path: Path) -> Written:
    """Size and SHA-256 of a regular file; a link is refused (OSError)."""
    digest, size = hashlib.sha256(), 0
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())
