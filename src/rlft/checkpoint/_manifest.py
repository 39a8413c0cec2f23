"""The manifest: what a checkpoint folder must contain, byte for byte, and the check that it does.

``manifest.json`` lists every file with its size and SHA-256, and carries a SHA-256 of itself. It is written last, so a
folder without a sound manifest was never finished. The hashes find damage; they do not prove who wrote the files.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlft._files import Written, hash_file
from rlft._json import canonical, loads
from rlft.checkpoint._errors import CheckpointError, CheckpointVersionError

__all__ = ["FORMAT_VERSION", "MANIFEST", "Manifest", "check_name", "files_in", "read_manifest", "verify"]

FORMAT = "rlft-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was written.

    Attributes:
        step: optimizer steps done when it was written.
        config_hash: :func:`rlft.checkpoint.config_hash` of the run's configuration.
        world_size: processes that wrote it.
        best: whether it was the best of its run so far.
        id: random name of this very write.
        created: UTC time, ISO 8601.
        files: relative name -> size and SHA-256.
    """

    step: int
    config_hash: str
    world_size: int
    best: bool
    id: str
    created: str
    files: Mapping[str, Written]

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

    def text(self) -> bytes:
        """The bytes of the manifest file, its own hash included."""
        body: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        body["files"] = {name: entry._asdict() for name, entry in self.files.items()}
        return _sealed(body)


def _sealed(body: Mapping[str, Any]) -> bytes:
    return canonical({**body, "seal": hashlib.sha256(canonical(body)).hexdigest()}) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone.

    Raises:
        CheckpointVersionError: for a sound manifest of a newer format.
        CheckpointError: when it is missing, damaged, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no checkpoint, or was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes, which no manifest is")
    try:
        body = loads(data)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT!r}")
        seal = body.pop("seal", None)
        if _sealed(body) != data:
            raise ValueError(f"its contents do not match its own hash {str(seal)[:16]!r}")
        version = _typed(body, "version", int)
        if version > FORMAT_VERSION:
            raise CheckpointVersionError(
                f"{folder} has checkpoint format {version}, this version of rlft reads up to {FORMAT_VERSION}; "
                f"upgrade rlft, or give another run directory"
            )
        return _parsed(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _typed(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r:.80}")
    return value


def _parsed(body: Mapping[str, Any]) -> Manifest:
    files: dict[str, Written] = {}
    for name, entry in _typed(body, "files", dict).items():
        check_name(name)
        if not isinstance(entry, dict):
            raise ValueError(f"the entry of {name!r} must be a mapping, got {entry!r:.80}")
        size, sha256 = _typed(entry, "size", int), _typed(entry, "sha256", str)
        if size < 0 or not _HASH.fullmatch(sha256):
            raise ValueError(f"the entry of {name!r} has no valid size and hash")
        files[name] = Written(size, sha256)
    step, world_size = _typed(body, "step", int), _typed(body, "world_size", int)
    if step < 0 or world_size < 1:
        raise ValueError(f"step must be >= 0 and world_size >= 1, got {step} and {world_size}")
    texts = {name: _typed(body, name, str) for name in ("config_hash", "id", "created")}
    return Manifest(step=step, world_size=world_size, best=_typed(body, "best", bool), files=files, **texts)


def check_name(name: str) -> None:
    """Refuse every name that could leave the folder or mean two things."""
    parts = name.split("/")
    if (
        not name
        or name == MANIFEST
        or PurePosixPath(name).is_absolute()
        or any(part in ("", ".", "..") for part in parts)
        or any(letter in name for letter in "\\:\0")
    ):
        raise ValueError(f"it names {name!r}; every file must lie inside the checkpoint, under a plain relative name")


def files_in(folder: Path) -> dict[str, int]:
    """Relative name -> size of every file below a folder, the manifest left out.

    Raises:
        CheckpointError: when there is a link or a special file.
    """
    found: dict[str, int] = {}
    pending = [folder]
    while pending:
        current = pending.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    found[Path(entry.path).relative_to(folder).as_posix()] = status.st_size
                else:
                    kind = "a link" if stat.S_ISLNK(status.st_mode) else "a special file"
                    raise CheckpointError(f"{entry.path} is {kind}; a checkpoint holds plain files alone: remove it")
    found.pop(MANIFEST, None)
    return found


def verify(folder: Path, *, contents: bool = True) -> Manifest:
    """Check a checkpoint folder against its manifest.

    Args:
        folder: the checkpoint.
        contents: hash every file; False looks at names and sizes alone.

    Returns:
        The manifest.

    Raises:
        CheckpointVersionError: for a newer format.
        CheckpointError: names the first thing that is wrong.
    """
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; expected a checkpoint such as run/checkpoint-100")
        manifest = read_manifest(folder)
        named = _FOLDER.fullmatch(folder.name)
        if named and int(named[1]) != manifest.step:
            raise CheckpointError(f"{folder} holds step {manifest.step}; it was renamed or copied over another")
        found = files_in(folder)
        missing, extra = sorted(manifest.files.keys() - found.keys()), sorted(found.keys() - manifest.files.keys())
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]!r}, which its manifest lists ({len(missing)} missing)")
        if extra:
            raise CheckpointError(f"{folder} has {extra[0]!r}, which its manifest does not list ({len(extra)} such)")
        for name, entry in manifest.files.items():
            if found[name] != entry.size:
                raise CheckpointError(f"{folder / name} has {found[name]} bytes, its manifest says {entry.size}")
        if contents:
            for name, entry in manifest.files.items():
                if hash_file(folder / name) != entry:
                    raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in the manifest")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return manifest
