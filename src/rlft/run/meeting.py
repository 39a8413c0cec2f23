"""The start of a run on several processes: they meet, or one of them says why not."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft._advantage import Everyone
from rlft.errors import TrainingError

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["SECONDS", "everyone", "meet"]

#: How long processes wait for each other at the start.
SECONDS = 50


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
