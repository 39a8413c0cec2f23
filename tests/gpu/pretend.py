"""A CUDA device that is not there: CPU tensors that say they are on it, and errors where real ones would not mix.

Two modes. One answers for tensors (``x.device``, ``x.to("cuda")``, ``torch.zeros(..., device="cuda")``); the other sees
every operator and refuses what CUDA refuses: operands on two devices (but for scalars, and indices on the CPU). Tags hang
on storages, so views share them. What kernels compute is left to the CPU. Good for one question: does a path that was
written for a CPU leave tensors behind when the model is on a GPU?
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from rlft.models import attention
from rlft.models.attention import GroupMask
from rlft.rollout import step_graphs
from tests.models.cuda_standins import standins
from tests.rollout.recorded import Recorder

__all__ = ["CUDA", "pretend_cuda"]

CUDA = torch.device("cuda", 0)
_MOVES = {"to", "cuda", "cpu"}


class Tags:
    """Which storages are on the device. They are kept alive: another storage must not come to their address."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.made_here = False  # whether what is made of no tensor, inside an operator, belongs to the device

    def on(self, x: Tensor) -> bool:
        return _storage(x)._cdata in self.held

    def put(self, x: Tensor, there: bool) -> None:
        storage = _storage(x)
        if there:
            self.held[storage._cdata] = storage
        else:
            self.held.pop(storage._cdata, None)


def _storage(x: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        return x.untyped_storage()


def _real(x: Any) -> bool:
    """Whether a value is a tensor with storage."""
    return isinstance(x, Tensor) and not isinstance(x, GroupMask)


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


class _Answers(TorchFunctionMode):
    """What Python sees of the device."""

    def __init__(self, tags: Tags) -> None:
        super().__init__()
        self.tags = tags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "__get__" and _real(first):
            what = getattr(getattr(func, "__self__", None), "__name__", "")
            if what == "device" and self.tags.on(first):
                return CUDA
            if what in ("is_cuda", "is_cpu"):
                return self.tags.on(first) == (what == "is_cuda")
        if name == "get_device" and _real(first):
            return 0 if self.tags.on(first) else -1
        if name in ("numpy", "__array__") and _real(first) and self.tags.on(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        # Python runs inside this one, and must see the device as well
        if name == "scaled_dot_product_attention" and isinstance(kwargs.get("attn_mask"), GroupMask):
            with self:
                return attention._answer(*args, **kwargs)
        if name == "_parse_to":  # reads arguments, moves nothing
            return func(*args, **kwargs)
        if name in _MOVES and _real(first):
            return self._moved(name, func, args, kwargs)
        asked = [v for v in (*args, *kwargs.values()) if _names_cuda(v)]
        if not asked:
            before = self.tags.made_here
            self.tags.made_here = any(_real(x) and self.tags.on(x) for x in tree_flatten((args, kwargs))[0])
            try:
                return func(*args, **kwargs)
            finally:
                self.tags.made_here = before
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        here = tree_map(lambda v: torch.device("cpu") if _names_cuda(v) else v, (args, kwargs))
        made = func(*here[0], **here[1])
        for x in tree_flatten(made)[0]:
            if _real(x):
                self.tags.put(x, True)
        return made

    def _moved(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        first = args[0]
        was = there = self.tags.on(first)
        if name != "to":
            there = name == "cuda"
        for value in (*args[1:], *kwargs.values()):
            if _real(value):
                there = self.tags.on(value)
            elif isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")):
                there = _names_cuda(value)
        keep = [torch.device("cpu") if isinstance(v, (torch.device, str)) else v for v in args[1:]]
        named = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        if there != was:
            first = first.clone()  # a move copies
            self.tags.put(first, there)
        if name != "to":
            return first
        moved = torch.Tensor.to(first, *keep, **named)
        self.tags.put(moved, there)
        return moved


class _Checks(TorchDispatchMode):
    """What the operators see of it."""

    def __init__(self, tags: Tags) -> None:
        super().__init__()
        self.tags = tags

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if _real(x)]
        there = [self.tags.on(x) for x in tensors]
        shaped = [(x, t) for x, t in zip(tensors, there, strict=True) if x.dim() > 0]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):  # takes CPU indices
            first = self.tags.on(args[0])
            shaped = [(x, t) for x, t in shaped if t or not first]
        foreach = name.startswith("_foreach")  # pairs up lists; scalars on a CPU are their own list
        if name not in ("copy_", "_to_copy", "resize_", "set_") and not foreach and len({t for _, t in shaped}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu")
        result = func(*args, **kwargs)
        if func._schema.is_mutable or foreach:
            return result
        for x in tree_flatten(result)[0]:
            if _real(x):
                self.tags.put(x, any(there) if tensors else self.tags.made_here)
        return result


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        import time

        self.at = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.at - self.at)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Tags]:
    """Inside, ``torch.device("cuda", 0)`` can be named; its attention kernels are the stand-ins of the tests."""
    tags = Tags()
    functions = {
        "Event": _Event,
        "synchronize": lambda *_: None,
        "get_device_name": lambda *_: "NVIDIA H200",
        "max_memory_allocated": lambda *_: 2**30,
        "memory_allocated": lambda *_: 2**30,
        "memory_reserved": lambda *_: 2**30,
        "mem_get_info": lambda *_: (2**37, 2**37),
        "get_device_properties": lambda *_: SimpleNamespace(name="NVIDIA H200", total_memory=2**37),
        "current_device": lambda: 0,
    }
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(standins())
        stack.enter_context(mock.patch.object(step_graphs, "CudaCapture", Recorder))
        answers, engine = _Answers(tags), torch.autograd._engine_run_backward

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            with answers:  # which is left while torch's own functions run, backward among them
                return engine(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        # compared between forward and recomputation, which see the device at different depths of these modes
        known = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(mock.patch.dict(known, default=lambda x: {"shape": x.shape, "dtype": x.dtype}))
        stack.enter_context(answers)
        stack.enter_context(_Checks(tags))
        yield tags
