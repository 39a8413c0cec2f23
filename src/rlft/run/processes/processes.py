"""Several processes of a run: they meet, or one of them says why not; what stops one of them stops all of them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft._advantage import Everyone
from rlft.errors import Interrupted, TrainingError

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["SECONDS", "Failures", "anywhere", "everyone", "meet", "on_cpu", "same", "texts", "together"]

#: How long processes wait for each other at the start.
SECONDS = 50
_INTERRUPT = f"{Interrupted.__name__}:"
#: Characters of an error that the other processes are told.
_TOLD = 2000


def meet() -> None:
    """Bring the processes of a run together, or say within a minute who is missing: the default waits half an hour.

    Raises:
        TrainingError: when the port is in use, or not every process came.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "?")
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if size < 2 or torch.distributed.is_initialized() or any(name not in os.environ for name in needed):
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":  # it wants to start the processes itself
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    found, error = _rendezvous()
    if found is None:
        said = str(error).strip().splitlines()[0][:300].rstrip(".") if error else "what listens there does not answer"
        raise TrainingError(
            f"process {rank} of {size} could not meet the others at {place} within {SECONDS} s: {said}. If the "
            f"port is in use, set another MASTER_PORT (--main_process_port); if a process is missing, look for its own "
            f"error, start all {size} of them, or correct WORLD_SIZE"
        ) from error
    store, number, count = found
    store.set_timeout(timedelta(minutes=30))  # torch's own: later waits may be long, for a slow reward on one process
    accelerated = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    backend = "cpu:gloo,cuda:nccl" if accelerated else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=number, world_size=count)


def everyone(trainer: Trainer) -> Everyone | None:
    """What gathers numbers, differently many on each process, over all of them; None on one process. Collective."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return None

    def gather(values: Tensor) -> tuple[Tensor, slice]:
        own = values.to(trainer.device)
        counts = accelerator.gather(torch.tensor([len(own)], device=trainer.device)).tolist()
        width = max(1, *counts)
        padded = torch.nn.functional.pad(own, (0, width - len(own)))
        rows = accelerator.gather(padded).view(len(counts), width)
        first = sum(counts[: accelerator.process_index])
        every = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
        return every.to(values.device), slice(first, first + len(own))

    return gather


class Failures:
    """What :func:`together` found.

    Attributes:
        kinds: names of the exceptions, one for each process that failed; empty while none has.
    """

    def __init__(self) -> None:
        self.kinds: tuple[str, ...] = ()


@contextlib.contextmanager
def together(
    accelerator: Any, kind: type[Exception] = TrainingError, *, at: str = "", found: Failures | None = None
) -> Iterator[None]:
    """Work that each process does for itself, and that may fail on one alone: then it ends on all of them.

    A process that stops by itself leaves the others waiting for it, at best until it is gone. Here they wait at the end of
    the work, and hear what happened. Inside, nothing may wait for another process. Collective at its end.

    Args:
        accelerator: of the run.
        kind: of error on the processes whose own work went well.
        at: begins their message, such as ``"step 3: "``.
        found: is told which exceptions there were.

    Raises:
        Exception: the process's own, where it failed; else ``kind`` with the words of the first process that did. An
            interrupt counts as a failure only where nothing else went wrong on any of them.
    """
    own: Exception | None = None
    if found is not None:
        found.kinds = ()
    try:
        yield
    except Exception as error:
        own = error
    try:
        said = _failures(accelerator, own)
        if found is not None:
            found.kinds = tuple(text.partition(":")[0] for text in said if text)
        wrong = [text for text in said if text and not text.startswith(_INTERRUPT)]
        if own is not None and not (wrong and isinstance(own, Interrupted)):
            raise own
        if any(said):
            rank = said.index(wrong[0]) if wrong else next(rank for rank, text in enumerate(said) if text)
            raise kind(f"{at}another process stopped the run: process {rank} of {len(said)} says: {said[rank]}")
    finally:
        own = None  # its traceback holds this frame, which would hold it


def _failures(accelerator: Any, own: Exception | None) -> list[str]:
    """Kind and words of what every process met, "" where all went well; nothing at all where that is so on all."""
    words = "" if own is None else f"{type(own).__name__}: {str(own)[:_TOLD]}"
    if accelerator.num_processes == 1:
        return [words]
    failed = torch.tensor([float(own is not None)], device=accelerator.device)
    try:
        return texts(accelerator, words) if float(accelerator.reduce(failed, reduction="sum")) else []
    except Exception:
        if own is None:
            raise
        return [words]  # the others are gone already: what was wrong here says more


def on_cpu() -> bool:
    """Whether the processes can tell each other a number without their devices, which would have to finish first."""
    return torch.distributed.is_initialized() and "cpu:gloo" in torch.distributed.get_backend_config()


def anywhere(accelerator: Any, here: bool) -> bool:
    """Whether something is so on any process. Collective.

    Args:
        accelerator: of the run.
        here: whether it is so on this one.
    """
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor([float(here)])
    if not on_cpu():
        return bool(accelerator.reduce(flag.to(accelerator.device), reduction="sum").item())
    torch.distributed.all_reduce(flag)
    return bool(flag.item())


def same(accelerator: Any, facts: Mapping[str, str], *, remedy: str) -> None:
    """Refuse a run whose processes do not agree on what it is. Collective.

    Args:
        accelerator: of the run.
        facts: what to compare -> what this process has, both as one line for a person; the same names everywhere.
        remedy: what to do about it.

    Raises:
        ValueError: on every process, where one has other facts than the first.
    """
    if accelerator.num_processes == 1:
        return
    ours = "\n".join(f"{name}: {value}" for name, value in facts.items())
    said = texts(accelerator, ours)
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            pairs = zip(said[0].splitlines(), theirs.splitlines(), strict=True)
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            name, _, value = one.partition(": ")
            raise ValueError(
                f"the processes of a run must agree, but process {rank} has another {name} than process 0: "
                f"{other.partition(': ')[2]}, not {value}. {remedy}"
            )


def texts(accelerator: Any, own: str) -> list[str]:
    """What every process says, in the order of their ranks. Collective; as bytes, so that nothing is unpickled."""
    data = torch.tensor(list(own.encode("utf-8", "replace")), dtype=torch.uint8, device=accelerator.device)
    counts = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.nn.functional.pad(data, (0, max(1, *counts) - len(data)))
    rows = accelerator.gather(padded).view(len(counts), -1).cpu()
    return [bytes(row[:count].tolist()).decode("utf-8", "replace") for row, count in zip(rows, counts, strict=True)]


def _rendezvous() -> tuple[tuple[Any, int, int] | None, Exception | None]:
    """Store, rank and number of processes, or why not; neither where the limit passed in silence.

    In a thread of its own: torch waits twice its own timeout for a port that nobody listens on, and for ever for a
    stranger on it who accepts the connection and says nothing.
    """
    found: list[tuple[Any, int, int]] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            found.append(next(iter(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=SECONDS)))))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="rlft-meeting", daemon=True)
    thread.start()
    thread.join(SECONDS + 5)  # torch's own message, where it comes, says more
    return (found[0] if found else None), (errors[0] if errors else None)
