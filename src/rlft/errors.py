"""What a run may stop with, apart from ``ValueError`` (a wrong call) and ``ConfigError`` (a wrong setting)."""

from __future__ import annotations

__all__ = ["DataError", "Interrupted", "TrainingError", "out_of_memory"]


class TrainingError(RuntimeError):
    """A run that cannot go on: names the step and the remedy; the weights and the newest checkpoint are intact."""


class DataError(TrainingError):
    """Training rows that cannot be read on: a file, a row, or a process that reads for the run.

    A run that was under way was saved at its last finished step.
    """


class Interrupted(RuntimeError):
    """SIGTERM or SIGUSR1 arrived: the run was saved at its last finished step and stopped.

    Attributes:
        step: the last finished optimizer step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the same command resumes from there")
        self.step = step


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine was full."""
    import torch

    words = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in words
        or "can't allocate memory" in words
    )
