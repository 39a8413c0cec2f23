"""The kernels of a packed row on a GPU, against a dense mask in float64."""

from __future__ import annotations

import pytest
import torch

from rlft.models import attention
from rlft.models.attention import attend, flaw, plan_segments
from tests.gpu.common import CUDA, apart, deterministic, pytestmark  # noqa: F401
from tests.models.test_segment_kernels import ROWS, by_mask
from tests.models.test_shared_layout import dense

HALF = (torch.bfloat16, torch.float16)
#: Query heads, key heads and head size of common models (Llama, Qwen2 0.5B, Gemma, Phi, one wide head).
SHAPES = [((32, 8), 128), ((14, 2), 64), ((8, 4), 256), ((32, 32), 80), ((1, 1), 8)]

BIG = (
    [(0, 300), (300, 129), *((429 + 70 * i, 70) for i in range(7)), (919, 1), (920, 200)],
    [((429, 280), (0, 300)), ((709, 210), (300, 129))],
)


@pytest.mark.parametrize(("heads", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_every_kernel_is_proved(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    for kernel in attention.candidates(CUDA, dtype):
        mine = heads if kernel.grouped else (heads[0], heads[0])
        assert flaw(kernel, CUDA, dtype, mine, size) is None, kernel.name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_takes_flash_attention(dtype: torch.dtype) -> None:
    q = torch.empty(1, 8, 9, 64, dtype=dtype, device=CUDA)
    assert attention.choose(q, q).name == "flash attention"


@pytest.mark.parametrize("row", [*sorted(ROWS), "big"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # roundings of the dtype; memory-efficient attention multiplies float32 in three parts of TF32
    [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3), (torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=str,
)
def test_a_row_equals_a_dense_mask(row: str, dtype: torch.dtype, tolerance: float) -> None:
    segments, groups = BIG if row == "big" else ROWS[row]
    plan, allowed = plan_segments(segments, groups, device=CUDA), by_mask(segments, groups).to(CUDA)
    q, k, v = (torch.randn(1, h, plan.tokens, 64).to(CUDA, dtype).requires_grad_() for h in (6, 2, 2))
    weight = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mine, truth = attend(q, k, v, plan), dense(*exact, allowed, 64**-0.5)
    grads = torch.autograd.grad((mine * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((truth * weight).sum(), exact)
    for a, b in zip((mine, *grads), (truth, *expected), strict=True):
        assert apart(a, b) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_deterministic_algorithms_are_honoured(dtype: torch.dtype) -> None:
    plan = plan_segments(*BIG, device=CUDA)
    q, k, v = (torch.randn(1, 8, plan.tokens, 64).to(CUDA, dtype).requires_grad_() for _ in range(3))
    with deterministic():
        runs = [torch.autograd.grad(attend(q, k, v, plan).square().sum(), (q, k, v)) for _ in range(5)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
