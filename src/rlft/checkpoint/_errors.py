"""What can be wrong with a checkpoint."""

from __future__ import annotations

__all__ = ["CheckpointError", "CheckpointVersionError", "CheckpointWarning"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what it was when it was written."""


class CheckpointVersionError(CheckpointError):
    """A sound checkpoint of a newer format, which this version of the library cannot read."""


class CheckpointWarning(UserWarning):
    """Training goes on, but something about the checkpoints deserves a look."""
