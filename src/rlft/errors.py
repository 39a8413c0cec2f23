"""What a run may stop with, apart from ``ValueError`` (a wrong call) and ``ConfigError`` (a wrong setting)."""

from __future__ import annotations

__all__ = ["Interrupted", "TrainingError"]


class TrainingError(RuntimeError):
    """A run that cannot go on: names the step and the remedy; the weights and the newest checkpoint are intact."""


class Interrupted(RuntimeError):
    """SIGTERM or SIGUSR1 arrived: the run was saved at its last finished step and stopped.

    Attributes:
        step: the last finished optimizer step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the same command resumes from there")
        self.step = step
