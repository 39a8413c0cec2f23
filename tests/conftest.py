"""Every test draws the same random numbers, alone or among all, in any order and on any worker."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed the global generators from the test's name; ``RLFT_TEST_SEED=1`` gives other numbers, to look for flukes."""
    import torch

    seed = zlib.crc32(f"{os.environ.get('RLFT_TEST_SEED', '')}{request.node.nodeid}".encode())
    random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
