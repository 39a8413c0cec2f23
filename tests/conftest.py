"""Every test draws the same random numbers, alone or among all, in any order and on any worker."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels are interpreted, but where tests for a GPU are asked for: triton decides when it is imported."""
    if "gpu" not in str(config.getoption("markexpr")).replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a GPU say that there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed the global generators from the test's name; ``RLFT_TEST_SEED=1`` gives other numbers, to look for flukes."""
    import torch

    seed = zlib.crc32(f"{os.environ.get('RLFT_TEST_SEED', '')}{request.node.nodeid}".encode())
    random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
