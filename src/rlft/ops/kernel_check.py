"""Whether the Triton kernels run here and agree with torch's operators: asked before plan ``auto`` takes them."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal

import torch
from torch import Tensor

from rlft.ops.fused import BLOCK
from rlft.ops.plans import RecomputePlan, TilePlan
from rlft.ops.tiles import Problem

__all__ = ["flaw", "require", "usable"]

# Tiles of the self-test: two in each direction, as wide as a block, so that the kernels of later calls are those tested.
_TEST_TILE = (32, BLOCK + 256)
# The plans round alike and sum in another order. A wrong kernel is off by the size of the numbers themselves.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}


def require(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("plan 'triton' needs the package triton (it comes with torch's CUDA builds); use plan='tile'")
    if device.type != "cuda" and not _interpreted():
        raise ValueError(
            f"plan 'triton' needs a CUDA device, and the tensors are on {device}; use plan='tile' (or 'auto')"
        )


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether plan ``auto`` takes the kernels: on CUDA with triton, after they agreed with torch's operators once.

    Warns once in a process where they should and do not.
    """
    if device.type != "cuda" or _interpreted():
        return False
    wrong = flaw(device, dtype)
    if wrong is not None:
        _warn_once(device, wrong)
    return wrong is None


@functools.cache
def _warn_once(device: torch.device, wrong: str) -> None:
    warnings.warn(
        f"the Triton kernels of rlft.ops do not serve on {device} ({wrong}), so torch's operators do their work "
        f"(slower); pass plan='tile' to skip this check",
        stacklevel=2,
    )


@functools.cache
def flaw(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels, on a small problem with every output and gradient; None where nothing is.

    Compared with torch's operators around the same matrix products. Found once per process.

    Args:
        device: to run on.
        dtype: of hidden states and head.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    rows, columns = _TEST_TILE
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(device, dtype)

    with torch.inference_mode(False), torch.enable_grad():
        hidden = draw(rows + 8, 64, std=1.0)
        ref_hidden = hidden + draw(rows + 8, 64, std=1.0)
        weight = draw(2 * columns, 64, std=0.3)
        targets = torch.randint(2 * columns, (rows + 8,), generator=generator).to(device)
        upstream = torch.randn(3, rows + 8, generator=generator).to(device)
        names, declared = ("logps", "ref_logps", "entropy", "kl"), ("logps", "entropy", "kl")

        def solve(trains: bool, fused: Literal["", "triton"]) -> list[Tensor]:
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
            problem = Problem(
                hidden=h.detach(), weight=w.detach(), bias=None, targets=targets, ref_hidden=ref_hidden, ref_weight=None,
                ref_bias=None, pre=1.0, post=None, chunk=_TEST_TILE, fused=fused,
            )  # fmt: skip
            if trains:
                computed = RecomputePlan.apply(h, w, None, problem, names, declared)
            else:
                computed = TilePlan.apply(h, problem, names, declared)
            out = dict(zip(names, computed, strict=True))
            found = [out[name].detach() for name in names]
            parts = [(out[name] * g).sum() for name, g in zip(declared, upstream, strict=True)]
            if trains:
                return [*found, *torch.autograd.grad(torch.stack(parts).sum(), (h, w))]
            return [*found, *(torch.autograd.grad(part, h, retain_graph=True)[0] for part in parts)]

        try:
            for trains in (False, True):
                for mine, theirs in zip(solve(trains, "triton"), solve(trains, ""), strict=True):
                    error = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())
                    if not error <= _CLOSE.get(dtype, 2e-2):
                        return f"they differ from torch's operators by {error:.1e} on a small problem"
        except torch.OutOfMemoryError:  # says nothing about the kernels, and must not be remembered
            raise
        except Exception as error:  # compilers and drivers fail in many ways, and there is another plan
            return f"{type(error).__name__}: {(str(error).splitlines() or ['without a message'])[0]}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
