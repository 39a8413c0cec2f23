"""float32 matrix products on a processor, by the faster of the two libraries that torch carries.

torch multiplies float32 matrices with MKL, which runs its AVX2 code on processors that Intel did not make. oneDNN, in the
same wheel, takes their AVX-512 units: twice the speed for the same float32 arithmetic (measured on AMD Zen 5; figures in
docs/benchmarks.md). The choice depends on the processor and on the shape alone, so a run repeats itself bit for bit.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["add_product", "backend", "linear", "pays", "product", "torch_only"]

#: Multiply-adds below which oneDNN's fixed cost per call outweighs its speed (about 15 us against 3 us).
_WORTH = 1 << 20
_off = False


def _vendor() -> str:
    """What the processor calls its maker; empty where it does not say."""
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("vendor_id"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()  # Windows names the vendor here


@functools.cache
def backend() -> str:
    """``"onednn"`` where it is the faster one for large float32 products on this processor, else ``"torch"``."""
    here = (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _vendor()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if not here:
        return "torch"
    try:  # the operator is torch's own, but not one that it documents
        eye = torch.eye(2)
        return "onednn" if torch.equal(_onednn(eye, eye, None), eye) else "torch"
    except (RuntimeError, TypeError, NotImplementedError):
        return "torch"


@contextmanager
def torch_only() -> Iterator[None]:
    """Leave everything to torch, for comparisons."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` and :func:`product` take oneDNN for these operands."""
    return (
        not _off
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= _WORTH
        and backend() == "onednn"
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(
    x: Float[Tensor, "... D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None = None
) -> Float[Tensor, "... V"]:
    """``x @ weight.T + bias``; no gradient flows through it.

    Args:
        x: ``[..., D]``.
        weight: ``[V, D]``, of any strides.
        bias: ``[V]`` or None.

    Returns:
        ``[..., V]``, a new tensor.
    """
    if pays(x, weight):
        return _onednn(x.detach(), weight.detach(), None if bias is None else bias.detach())
    return torch.nn.functional.linear(x.detach(), weight.detach(), None if bias is None else bias.detach())


def product(a: Float[Tensor, "N K"], b: Float[Tensor, "K M"], out: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """``a @ b``, in ``out`` or in a tensor of its own: use what is returned."""
    if pays(a, b.t()):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b, out=out)


def add_product(total: Float[Tensor, "N M"], a: Float[Tensor, "N K"], b: Float[Tensor, "K M"]) -> None:
    """``total += a @ b``."""
    if pays(a, b.t()):
        total.add_(_onednn(a, b.t(), None))
    else:
        total.addmm_(a, b)
