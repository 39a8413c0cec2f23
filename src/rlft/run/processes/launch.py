"""How the processes of a run begin: launchers that no run can be saved under are refused, then all of them meet."""

from __future__ import annotations

import importlib.util
import os
import threading
from datetime import timedelta
from typing import Any

import torch

from rlft.config import Config, ConfigError
from rlft.errors import TrainingError

__all__ = ["SECONDS", "accelerator_for", "meet", "refuse_launcher", "refuse_online_launcher"]

#: Trackers of accelerate that are packages of the same name.
_TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")
#: How long processes wait for each other at the start.
SECONDS = 50

_INSTEAD = (
    "launch with torch's FSDP2 (configs/accelerate/fsdp.yaml), where weights must be spread over the GPUs, or with one "
    "whole model per process (configs/accelerate/ddp.yaml)"
)


def refuse_launcher() -> None:
    """Look at what ``accelerate launch`` asks for.

    Raises:
        ConfigError: for DeepSpeed, Megatron-LM and the first version of FSDP. They keep weights and moments in flat pieces of
            their own, under no parameter's name: a checkpoint could not hold them, nor another number of processes go on.
    """
    if _on("ACCELERATE_USE_DEEPSPEED") or _on("ACCELERATE_USE_MEGATRON_LM"):
        name = "DeepSpeed" if _on("ACCELERATE_USE_DEEPSPEED") else "Megatron-LM"
        raise ConfigError(
            f"the launcher asks for {name}, whose optimizer keeps its state in pieces that no checkpoint here can hold; "
            f"{_INSTEAD}"
        )
    if not _on("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"the launcher asks for version {version} of FSDP, which flattens weights into pieces that no checkpoint here can "
            f"hold; set fsdp_version: 2 in its configuration, or {_INSTEAD}"
        )
    if _on("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "the launcher asks for FSDP on CPUs, where accelerate leaves it out without a word; launch with "
            "configs/accelerate/cpu.yaml"
        )


def refuse_online_launcher(*, online: bool) -> None:
    """Refuse what would be found out at the first generation.

    Raises:
        ConfigError: for a run that samples with a sampler of this package from weights that are spread over processes: rows
            end at different times on each, so forward passes that wait for one another would hang.
    """
    if online and _on("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "the launcher asks for FSDP, and sampling needs whole weights on every process; launch online runs with one "
            "whole model per process (configs/accelerate/ddp.yaml; use_peft and gradient_checkpointing save memory), or give "
            "Trainer a sampler that gathers them"
        )


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def accelerator_for(config: Config) -> Any:
    """The accelerator of a run: where it computes, in which precision, and the processes that share the work. Collective.

    Raises:
        ConfigError: for a precision, a tracker or a launcher that cannot be used here.
        TrainingError: when the processes do not meet.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if config.mixed_precision == "fp16":  # the loss scale would never be updated
        raise ConfigError(
            "mixed_precision='fp16' needs a CUDA device and loss scaling, which is not supported; use 'no' or 'bf16'"
        )
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"mixed_precision='bf16' is not supported by {torch.cuda.get_device_name()}; use 'no'")
    missing = [t for t in config.report_to if t in _TRACKERS and importlib.util.find_spec(t) is None]
    if missing:
        raise ConfigError(
            f"report_to={config.report_to} needs {missing[0]}, which is not installed, so nothing would be reported; "
            f"install it, or drop {missing[0]!r}"
        )
    refuse_launcher()
    meet()
    trackers: list[Any] = [t for t in config.report_to if t != "tensorboard" or importlib.util.find_spec("tensorboard")]
    # DistributedDataParallel waits for the gradient of every trained tensor, unless it looks first which are used
    unused: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if config.unused_weights else []
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=unused,
    )


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
