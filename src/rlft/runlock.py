"""One run per folder, and one process per run.

A lock of the operating system (``flock``), not a file that someone must remember to delete: it goes when the process
goes, however it goes. Beside it, ``run.json`` says which configuration the folder belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rlft._failpoint import instant
from rlft._files import append_bytes, disk_trouble, make_dir, remove_file, replace_file
from rlft._json import config_diff, dumps, loads
from rlft._json import config_hash as hash_of
from rlft._redact import redact

__all__ = ["LOCK_NAME", "RUN_NAME", "RunLock", "RunLockError", "holder", "stored_config_hash"]

LOCK_NAME = ".lock"
RUN_NAME = "run.json"
_FORMAT = 1
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class RunLockError(RuntimeError):
    """The folder cannot be used for this run; the message says why and what to do."""


class RunLock:
    """Hold a run's folder, as a context manager or by :meth:`acquire` and :meth:`release`.

    Args:
        run_dir: folder of the run; created when missing.
        config: configuration of the run, written to ``run.json`` without its secrets.
        config_hash: what decides whether the folder belongs to this run; default: the hash of ``config`` without
            its secrets. With neither, nothing is checked or written.
        resume: the folder's own run goes on, even if its configuration changed: see :attr:`changes`. Whether the change
            is acceptable is for the caller to say. False refuses a folder that any run has written to.

    Attributes:
        changes: after acquiring, lines ``path: old -> new`` for what differs from the stored configuration.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        config_hash: str | None = None,
        resume: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.config = config
        self.resume = resume
        self.config_hash = hash_of(redact(config)) if config_hash is None and config is not None else config_hash or ""
        self.changes: list[str] = []
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0

    def acquire(self) -> RunLock:
        """Take the lock and claim the folder.

        Raises:
            RunLockError: when another process holds it, it belongs to another run, or it cannot be written.
        """
        if self.held:
            raise RunLockError(f"this process holds {self.run_dir} already; release it first")
        try:
            make_dir("run.mkdir", self.run_dir, exist_ok=True)
            with instant("run.lock.open"):
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._descriptor = os.open(self.run_dir / LOCK_NAME, flags, 0o666)
            self._lock()
            for kind in ("json", "html", "png"):  # run.json, the trainer's own small files, the report
                for stale in sorted(self.run_dir.glob(f".tmp-*.{kind}-*")):
                    remove_file("run.config.stale", stale)
            self._claim()
        except OSError as error:
            self.release()
            trouble = disk_trouble(error, self.run_dir, len(dumps(redact(self.config or {}), what="run.json")))
            if isinstance(error, FileExistsError):
                trouble = "it is there, and no folder (a file, or a link to nothing)"
            elif error.filename is not None and Path(error.filename) != self.run_dir:
                trouble = f"{error.filename}: {trouble}"
            raise RunLockError(
                f"{self.run_dir} cannot be written: {trouble}; make it writable, free some space, "
                f"or choose another output directory"
            ) from error
        except BaseException:
            self.release()
            raise
        # A forked child (a data loader, a reward worker) would keep the lock alive after this process is killed.
        _held.add(self)
        return self

    def store(self) -> None:
        """Write this run's configuration to ``run.json``; for a resume whose :attr:`changes` were accepted."""
        if not self.held:
            raise RunLockError(f"acquire {self.run_dir} before writing to it")
        record = {"format": _FORMAT, "config_hash": self.config_hash, "config": redact(self.config or {})}
        replace_file("run.config", self.run_dir / RUN_NAME, dumps(record, what="run.json"))

    def release(self) -> None:
        """Give the lock back; more than once is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        _held.discard(self)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockError(
                f"{self.run_dir} is in use by {_owner(self._descriptor)}; "
                f"wait for that run, stop it, or choose another output directory"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.run_dir} has no locks: a second run in this folder would go unnoticed",
                stacklevel=4,
            )
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with instant("run.lock.truncate"):
            os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        append_bytes("run.lock", self._descriptor, json.dumps(owner).encode() + b"\n")

    def _claim(self) -> None:
        if not self.config_hash:
            return
        stored = _stored(self.run_dir)
        checkpoints = sorted(path.name for path in self.run_dir.glob("checkpoint-*"))
        log = [path.name for path in self.run_dir.glob("metrics.jsonl") if path.stat().st_size]
        if stored is not None and stored["config_hash"] != self.config_hash:
            self.changes = config_diff(stored["config"], redact(self.config or {})) or ["(only the hash is known)"]
            # Without a checkpoint there is nothing to resume: the caller would start over in another run's folder.
            if not (self.resume and checkpoints):
                shown = "\n  ".join(self.changes[:10] + (["..."] if len(self.changes) > 10 else []))
                way = "resume that run with its own settings" if checkpoints else "remove the folder"
                raise RunLockError(
                    f"{self.run_dir} holds another run; choose another output directory, or {way}. "
                    f"What differs (there -> here):\n  {shown}"
                )
            return
        if (checkpoints or log) and not self.resume:
            raise RunLockError(
                f"{self.run_dir} holds {(checkpoints + log)[0]} of an earlier run and this run is not to resume; "
                f"choose another output directory, resume that run, or remove the folder"
            )
        if stored is None:
            self.store()


def holder(run_dir: str | Path) -> str | None:
    """Who holds a run's folder, in words; None when nobody does, or the file system has no locks."""
    try:
        descriptor = os.open(Path(run_dir) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def stored_config_hash(run_dir: str | Path) -> str | None:
    """The hash of the configuration that a folder belongs to; None without ``run.json``.

    Raises:
        RunLockError: when ``run.json`` cannot be understood.
    """
    record = _stored(Path(run_dir))
    return None if record is None else record["config_hash"]


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _stored(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RUN_NAME
    try:
        record = loads(path.read_bytes())
        if not isinstance(record["config_hash"], str) or not isinstance(record["config"], dict):
            raise ValueError("it has no configuration")
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunLockError(
            f"{path} cannot be understood ({error}); choose another output directory, or remove the file "
            f"if this folder is yours to overwrite"
        ) from error


def _owner(descriptor: int) -> str:
    """Who wrote the lock file, in words."""
    owner: Any = None
    with contextlib.suppress(ValueError, OSError):
        owner = json.loads(os.pread(descriptor, 4096, 0))
    if not isinstance(owner, dict) or not isinstance(owner.get("pid"), int):
        return "another process"
    words = f"process {owner['pid']} on {owner.get('host')} since {owner.get('since')}"
    if owner.get("host") == socket.gethostname() and not _alive(owner["pid"]):
        words += " (that process is gone, but a child of it lives on: stop the child)"
    return words


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
