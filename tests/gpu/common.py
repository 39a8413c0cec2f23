"""What the tests of a GPU share: the mark, models of a size that its kernels notice, and a measure of error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# read by cuBLAS when it is first used; without it deterministic algorithms are refused
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

#: Warnings of libraries are not what these tests look for: versions on a GPU machine differ.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CUDA = torch.device("cuda", 0)


def free_memory() -> int:
    """Bytes of the device that nobody holds."""
    return torch.cuda.mem_get_info()[0]


def peak_of_device() -> int:
    """Bytes allocated at most since :func:`reset_peak`."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def reset_peak() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def apart(mine: Tensor, truth: Tensor) -> float:
    """Size of the difference over the size of the truth."""
    mine, truth = mine.detach().double().cpu(), truth.detach().double().cpu()
    return float((mine - truth).norm() / truth.norm().clamp(min=1e-30))


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def small_qwen2(*, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Four layers of 256, eight heads of 32, two for keys: large enough for real tiles, quick to build."""
    from tests.tiny import tiny_qwen2

    settings = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "initializer_range": 0.05, "max_position_embeddings": 2048,
    }  # fmt: skip
    return tiny_qwen2(dtype=dtype, **{**settings, **config})
