"""Which checkpoint a run goes on from, where it stands in the data, and what another number of processes changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlft import checkpoint
from rlft.config import ConfigError
from rlft.run import display

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["asked_for", "place", "warn_of_others", "wish"]


def wish(trainer: Trainer, given: str | bool | None) -> str | Path:
    """``auto``, ``never`` or a checkpoint's folder."""
    wanted = trainer.config.resume if given is None else {True: "auto", False: "never"}.get(given, given)  # type: ignore[call-overload]
    if not isinstance(wanted, (str, Path)):
        raise ConfigError(f"resume must be True, False or a checkpoint's folder, got {wanted!r}")
    return wanted


def asked_for(trainer: Trainer, folder: str | Path) -> tuple[checkpoint.Checkpoint, dict[str, str] | None]:
    """The checkpoint that was asked for, and what to note of it; or the newest of a run that began from it, and None.

    The one that was asked for may be gone by then: newer ones took its place among those that are kept.
    """
    path = Path(folder)
    asked = checkpoint.load(path, rank=trainer.rank) if path.is_dir() else None
    newest = None
    with contextlib.suppress(checkpoint.CheckpointError):  # where none can be read, the one that was asked for decides
        newest = checkpoint.load_latest(trainer.run_dir, rank=trainer.rank)
    noted = None if newest is None else newest.records["trainer"].get("resumed_from")
    if newest is not None and noted is not None:
        same = noted["id"] == asked.manifest.id if asked is not None else noted["path"] == str(path.resolve())
        if same:
            display.say(
                trainer,
                f"the run went on from {path} before and goes on from {newest.path.name} now; to begin from there "
                f"again, move the newer checkpoints out of {trainer.run_dir}",
            )
            return newest, None
    if asked is None:
        raise ConfigError(
            f"resume={str(folder)!r} is no folder; give 'auto', 'never', or a checkpoint such as {trainer.run_dir}/checkpoint-100"
        )
    return asked, {"id": asked.manifest.id, "path": str(path.resolve())}


def place(trainer: Trainer, found: checkpoint.Checkpoint) -> dict[str, Any]:
    """Where this process goes on in the data.

    Processes may stand at different places, each with its own share of the rows. Another number of them has other shares:
    then all go on at the first one's place.
    """
    if found.manifest.world_size == trainer.world_size:
        return found.records["source"]
    return checkpoint.load(found.path, only=["source"]).records["source"]


def warn_of_others(trainer: Trainer, found: checkpoint.Checkpoint, source: dict[str, Any]) -> None:
    """Say what another number of processes changes."""
    before, now = found.manifest.world_size, trainer.world_size
    said = [
        f"the checkpoint was written by {before} process{'es' if before > 1 else ''} and {now} resume it: the run goes on "
        f"from step {trainer.step}, but not bit for bit, and a step is of {now} x per_device_train_batch_size x "
        f"gradient_accumulation_steps rows (it was {before} x)"
    ]
    if source.get("queued"):
        said.append(
            f"what was still to be trained on of the last generation (steps: {source['queued']}) is left out: a new one is "
            f"sampled"
        )
    if trainer.replay is not None:
        said.append(
            f"the answers that processes {now} to {before - 1} kept for replay are left out"
            if now < before
            else "new processes begin with the answers that process 0 kept for replay"
        )
    display.warn(trainer, "; ".join(said))
