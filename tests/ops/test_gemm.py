"""Which library multiplies, and that it multiplies."""

from __future__ import annotations

import pytest
import torch

from rlft.ops import gemm, linear_logps
from tests.ops.problems import leaves, problem

has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not has_onednn, reason="this torch has no oneDNN")


@pytest.fixture(params=["torch", pytest.param("onednn", marks=needs_onednn)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library whatever the processor; products of any size count as large."""
    monkeypatch.setattr(gemm, "backend", lambda: request.param)
    monkeypatch.setattr(gemm, "_WORTH", 1)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (70, 33, 129), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
def test_products(library: str, shape: tuple[int, int, int], strides: str) -> None:
    n, k, m = shape
    a, b = torch.randn(n, k), torch.randn(k, m)
    if strides == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif strides == "sliced":
        a, b = torch.randn(n, 2 * k + 1)[:, :k], torch.randn(k, m + 3)[:, 1 : m + 1]
    expected = a.double() @ b.double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(gemm.product(a, b, torch.empty(n, m)).double(), expected, **close)
    torch.testing.assert_close(gemm.linear(a, b.t()).double(), expected, **close)
    bias, total = torch.randn(m), torch.randn(n, m)
    torch.testing.assert_close(gemm.linear(a, b.t(), bias).double(), expected + bias.double(), **close)
    before = total.double()
    gemm.add_product(total, a, b)
    torch.testing.assert_close(total.double(), before + expected, **close)


def test_linear_of_more_dimensions(library: str) -> None:
    x, weight = torch.randn(2, 3, 5), torch.randn(7, 5)
    torch.testing.assert_close(gemm.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_the_library_is_what_runs(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = gemm._onednn
    monkeypatch.setattr(gemm, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    made = problem(dtype=torch.float32)
    leaves(made, "hidden", "weight")
    linear_logps(**made).logps.sum().backward()
    assert bool(calls) == (library == "onednn")
    calls.clear()
    with gemm.torch_only():
        linear_logps(**made).logps.sum().backward()
    assert not calls


def test_only_float32_of_some_size_on_a_processor_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "backend", lambda: "onednn")
    large = torch.zeros(1024, 32)
    assert gemm.pays(large, torch.zeros(32, 32))
    assert not gemm.pays(large, torch.zeros(31, 32))
    assert not gemm.pays(large.double(), torch.zeros(32, 32).double())
    assert not gemm.pays(large.bfloat16(), torch.zeros(32, 32).bfloat16())
    assert not gemm.pays(large.to("meta"), torch.zeros(32, 32, device="meta"))
    monkeypatch.setattr(gemm, "backend", lambda: "torch")
    assert not gemm.pays(large, torch.zeros(32, 32))


@needs_onednn
@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", "onednn"),
        ("AuthenticAMD", "AVX2", "torch"),
        ("GenuineIntel", "AVX512", "torch"),
        ("", "AVX512", "torch"),
    ],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, expected: str) -> None:
    monkeypatch.setattr(gemm, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert gemm.backend.__wrapped__() == expected


def test_a_torch_without_the_operator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gemm, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(gemm, "_onednn", gone)
    assert gemm.backend.__wrapped__() == "torch"
