"""Modules that torch's ``fully_shard`` spreads over processes: parameters that are the optimizer's, and whole copies."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from rlft.models.reference import full_copy

__all__ = ["settle", "whole_state"]


def settle(module: nn.Module) -> None:
    """Let go of the whole parameters that a forward pass without a backward one leaves behind.

    While they are there, ``named_parameters`` gives those copies: not what the optimizer holds, and writing to them is lost.
    Does nothing to a module that is not sharded.
    """
    for part in module.modules():
        reshard: Any = getattr(part, "reshard", None)
        if reshard is not None and hasattr(part, "unshard"):
            reshard()


def whole_state(module: nn.Module, names: Collection[str], *, keep: bool) -> dict[str, Tensor]:
    """Some entries of the module's ``state_dict``, whole and on the CPU; tied ones share one copy. Collective.

    Args:
        module: sharded or not.
        names: of the entries.
        keep: False takes part in gathering them, and returns nothing: one process writes, and needs the memory.
    """
    settle(module)
    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in names:
            continue
        if id(tensor) not in copies:
            whole = full_copy(tensor)
            copies[id(tensor)] = whole if keep else whole.new_empty(0)
        found[name] = copies[id(tensor)]
    return found if keep else {}
