"""The processes of a run, seen from one of them: sums over all, and what stops one of them stops all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft._advantage import Everyone
from rlft.errors import Interrupted, TrainingError
from rlft.rewards import RewardError
from rlft.run.processes.signals import Signals
from rlft.run.progress import Progress

__all__ = ["Processes", "on_cpu"]

_INTERRUPT = f"{Interrupted.__name__}:"
#: Characters of an error that the other processes are told.
_TOLD = 2000
#: How gloo and NCCL say that a peer is gone.
_GONE = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "timed out waiting", "gloo", "nccl")


class Processes:
    """One process among those of a run. Where it is the only one, nothing here waits.

    Args:
        accelerator: of the run.
        progress: says which step the messages name.

    Attributes:
        signals: what asked this process to stop.
        failed: kinds of exceptions that ended the last work done :meth:`together`, one for each process that failed.
    """

    def __init__(self, accelerator: Any, progress: Progress) -> None:
        self.accelerator, self.progress = accelerator, progress
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        progress.is_world_process_zero = self.is_main
        self.signals = Signals()
        self.failed: tuple[str, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether weights and gradients are spread over processes (FSDP, DeepSpeed), so that none sees them whole."""
        kind = str(self.accelerator.distributed_type).rpartition(".")[2]
        return kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    # -- numbers over all processes; collective -------------------------------------------------------------------------
    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor of one shape over all processes, on their device."""
        return self.accelerator.reduce(values.to(self.device), reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; as many on each."""
        return self.accelerator.gather(values.to(self.device))

    def most(self, count: int) -> int:
        """The largest of one number from each process."""
        return count if self.world_size == 1 else int(self.gather(torch.tensor([count])).max())

    def everyone(self) -> Everyone | None:
        """What gathers numbers, differently many on each process, over all of them; None on one process."""
        if self.world_size == 1:
            return None

        def gather(values: Tensor) -> tuple[Tensor, slice]:
            counts = self.gather(torch.tensor([len(values)])).tolist()
            width = max(1, *counts)
            rows = self.gather(torch.nn.functional.pad(values, (0, width - len(values)))).view(len(counts), width)
            first = sum(counts[: self.rank])
            every = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
            return every.to(values.device), slice(first, first + len(values))

        return gather

    def texts(self, own: str) -> list[str]:
        """What every process says, in the order of their ranks; as bytes, so that nothing is unpickled."""
        if self.world_size == 1:
            return [own]
        data = torch.tensor(list(own.encode("utf-8", "replace")), dtype=torch.uint8)
        counts = self.gather(torch.tensor([len(data)])).tolist()
        rows = self.gather(torch.nn.functional.pad(data, (0, max(1, *counts) - len(data)))).view(len(counts), -1).cpu()
        return [bytes(row[:count].tolist()).decode("utf-8", "replace") for row, count in zip(rows, counts, strict=True)]

    def same(self, facts: Mapping[str, str], *, remedy: str) -> None:
        """Refuse a run whose processes do not agree on what it is.

        Args:
            facts: what to compare -> what this process has, both as one line for a person; the same names everywhere.
            remedy: what to do about it.

        Raises:
            ValueError: on every process, where one has other facts than the first.
        """
        if self.world_size == 1:
            return
        said = self.texts("\n".join(f"{name}: {value}" for name, value in facts.items()))
        for rank, theirs in enumerate(said):
            if theirs != said[0]:
                pairs = zip(said[0].splitlines(), theirs.splitlines(), strict=True)
                one, other = next(pair for pair in pairs if pair[0] != pair[1])
                name, _, value = one.partition(": ")
                raise ValueError(
                    f"the processes of a run must agree, but process {rank} has another {name} than process 0: "
                    f"{other.partition(': ')[2]}, not {value}. {remedy}"
                )

    # -- what stops one stops all -----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def together(self, kind: type[Exception] = TrainingError, *, at: str | None = None) -> Iterator[None]:
        """Work that each process does for itself, and that may fail on one alone: then it ends on all of them.

        A process that stops by itself leaves the others waiting for it, at best until it is gone. Here they wait at the end
        of the work, and hear what happened. Inside, nothing may wait for another process. Collective at its end.

        Args:
            kind: of error on the processes whose own work went well.
            at: begins their message; default: the step that is being made.

        Raises:
            Exception: the process's own, where it failed; else ``kind`` with the words of the first process that did.
            Interrupted: on all processes, where a signal came to any of them and nothing else went wrong.
        """
        own: Exception | None = None
        self.failed = ()
        try:
            self.signals.alone += 1
            yield
        except Exception as error:
            own = error
        finally:
            self.signals.alone -= 1
        try:
            said = self._failures(own)
            self.failed = tuple(text.partition(":")[0] for text in said if text)
            wrong = [text for text in said if text and not text.startswith(_INTERRUPT)]
            if own is not None and not (wrong and isinstance(own, Interrupted)):
                raise own
            if any(said) and not wrong:
                raise Interrupted(self.progress.step)
            if wrong:
                at = f"step {self.progress.step + 1}: " if at is None else at
                rank = said.index(wrong[0])
                raise kind(f"{at}another process stopped the run: process {rank} of {len(said)} says: {said[rank]}")
        finally:
            own = None  # its traceback holds this frame, which would hold it

    def _failures(self, own: Exception | None) -> list[str]:
        """Kind and words of what every process met, "" where all went well; nothing at all where that is so on all."""
        words = "" if own is None else f"{type(own).__name__}: {str(own)[:_TOLD]}"
        if self.world_size == 1:
            return [words]
        try:
            return self.texts(words) if float(self.sum(torch.tensor([float(own is not None)]))) else []
        except Exception:
            if own is None:
                raise
            return [words]  # the others are gone already: what was wrong here says more

    def agree(self, failure: str | None) -> None:
        """Stop every process for what one of them found: one that stops alone leaves the others waiting. Collective.

        Args:
            failure: what this process found, or None.

        Raises:
            TrainingError: on all processes, where any found something.
        """
        if failure is None and self.world_size == 1:
            return
        with self.together():
            if failure is not None:
                raise TrainingError(failure)

    def poll(self, *, boundary: bool = False) -> None:
        """Stop where a signal asked for it, to this process or another: all of them leave at the same step.

        Args:
            boundary: every process calls this at the same place, so that they decide it there. Collective.

        Raises:
            Interrupted: after a signal.
        """
        asked = self.signals.number is not None
        if self.world_size > 1:
            if boundary:
                asked = self._anywhere(asked)
                self.failed = ("Interrupted",) if asked else self.failed
            else:
                asked = self.signals.alone > 0 and self.signals.told()
        if asked:
            raise Interrupted(self.progress.step)

    def _anywhere(self, here: bool) -> bool:
        """Whether something is so on any process."""
        flag = torch.tensor([float(here)])
        if not on_cpu():
            return bool(self.sum(flag).item())
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    # -- when the run stops -----------------------------------------------------------------------------------------------
    def saves(self, error: Exception) -> bool:
        """Whether the last finished step is saved as the run stops; the same answer on all processes, as saving takes all.

        It is where a signal, rewards or data stopped the run, and nothing else on any process.
        """
        if self.world_size == 1 and isinstance(error, Interrupted):
            return True
        kinds = set(self.failed)
        known = isinstance(error, (Interrupted, RewardError, TrainingError))
        return bool(kinds) and kinds <= {"RewardError", "DataError", "Interrupted"} and known

    def explain_lost_peer(self, error: BaseException, run_dir: Path) -> None:
        """Say it plainly when a collective failed because another process is gone.

        Args:
            error: what stops the run.
            run_dir: where its checkpoints are.

        Raises:
            TrainingError: when that is what happened.
        """
        words, cause = "", error
        while cause is not None:
            words += f"{cause} " if isinstance(cause, RuntimeError) else ""  # torch's; others are of a server or a file
            cause = cause.__cause__
        own = isinstance(error, (TrainingError, RewardError))
        if self.world_size > 1 and not own and any(sign in words.lower() for sign in _GONE):
            raise TrainingError(
                f"step {self.progress.step + 1}: process {self.rank} of {self.world_size} lost contact with another one, which "
                f"was killed or failed: look for its own error. The newest checkpoint in {run_dir} is intact: the same "
                f"command on {self.world_size} processes resumes from it"
            ) from error


def on_cpu() -> bool:
    """Whether the processes can tell each other a number without their devices, which would have to finish first."""
    return torch.distributed.is_initialized() and "cpu:gloo" in torch.distributed.get_backend_config()
