"""Ways to launch several processes that a run cannot be saved and continued under: refused before anything is loaded."""

from __future__ import annotations

import os

from rlft.config import ConfigError

__all__ = ["check", "check_online"]

_INSTEAD = (
    "launch with torch's FSDP2 (configs/accelerate/fsdp.yaml), where weights must be spread over the GPUs, or with one "
    "whole model per process (configs/accelerate/ddp.yaml)"
)


def check() -> None:
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


def check_online(*, online: bool) -> None:
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
