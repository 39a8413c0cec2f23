"""A stand-in for CUDA graphs on any device: it records operations, and replays them on the very tensors of the recording.

As with a graph, a replay runs no Python. What was a number is a constant, a tensor is an address: results are written
where the recording wrote them, and inputs are read from where the recording read them. So whatever is not a static
buffer is stale at the next replay. As with a graph, a recording that waits for the device or copies from the host fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations whose result decides what Python does next, or that bring numbers of the host.
_FORBIDDEN = {"_local_scalar_dense", "nonzero", "lift_fresh", "item", "masked_select", "unique", "equal", "is_nonzero"}
_UNSET = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder:
    """A :class:`rlft.rollout.step_graphs.Capture`; ``captures`` counts its recordings."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.captures = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        for _ in range(2):
            run()
        tape = _Tape()
        with tape:
            out = run()
        self.captures += 1
        steps = []
        for func, args, kwargs, made in tape.steps:
            inside = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            fresh = [t.untyped_storage().data_ptr() not in inside for t in _tensors(made)]
            if func.overloadpacket.__name__ in _UNSET or (not func._schema.is_mutable and not any(fresh)):
                continue  # memory without contents, or a view: an address, and that stays
            steps.append((func, args, kwargs, made, fresh))

        def replay() -> None:
            for func, args, kwargs, made, fresh in steps:
                again = func(*args, **kwargs)
                for old, new, own in zip(_tensors(made), _tensors(again), fresh, strict=True):
                    if own:
                        old.copy_(new)

        # What a graph's memory holds between recording and the first replay is not its result.
        with torch.no_grad():
            out.fill_(float("nan"))
        return replay, out
