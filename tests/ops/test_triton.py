"""The Triton kernels through every test of the op, under Triton's interpreter (on a GPU: tests/gpu/test_head.py)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton (Linux)")

from rlft.ops import head, kernel_check, linear_logps
from tests.ops import test_linear_logps, test_precision
from tests.ops.problems import ALL, GRADS, leaves, problem, truth

# pytest collects these names here too, with their parameters; the fixture sends every plan but the oracle to the kernels
from tests.ops.test_linear_logps import (  # noqa: F401
    test_disjoint_tiles_move_the_centre_far,
    test_rows_at_ten_thousand,
    test_tiny_policy_mass_where_the_reference_has_half,
)

pytestmark = [
    # the interpreter is NumPy, which warns of what where() then leaves out
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="triton is compiled here: see tests/gpu"),
]


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch: pytest.MonkeyPatch):
    """Every plan but the oracle becomes ``triton``; a head that trains is recomputed, as with ``auto``."""

    def fused(*args, plan: str = "auto", **settings):
        return linear_logps(*args, plan="dense" if plan == "dense" else "triton", **settings)

    monkeypatch.setattr(test_linear_logps, "linear_logps", fused)
    monkeypatch.setattr(test_precision, "linear_logps", fused)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    from rlft.ops import kernels

    class Broken:
        def __getitem__(self, grid: object) -> object:
            raise RuntimeError("the kernel was called")

    monkeypatch.setattr(kernels, "d_logits" if trains else "fold", Broken())
    made = problem()
    leaves(made, "hidden", *(["weight"] if trains else []))
    with pytest.raises(RuntimeError, match="the kernel was called"):
        linear_logps(**made, plan="triton", want=ALL, grad=GRADS).logps.sum().backward()


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e-3, 0.3, 0.7, 5.0])
def test_differences_of_any_size_keep_their_digits(magnitude: float) -> None:
    """float32 logits that differ by ``magnitude``: the KL keeps its digits, from underflow to saturation of the cap.

    Its terms are ``e^u - 1 - u``, u of that magnitude, and float32 rounds away about 1e-7 u of their u^2 / 2.
    """
    made = problem(16, 8, 64, dtype=torch.float32, apart=0.0, bias=False)
    made["ref_hidden"] = (made["hidden"].double() + magnitude * torch.randn(16, 8, dtype=torch.float64)).float()
    moved = bool((made["ref_hidden"] != made["hidden"]).any())
    for softcap in (None, 3.0):
        kl = linear_logps(**made, softcap=softcap, want=frozenset({"kl"}), plan="triton", chunk=(8, 24)).kl
        expected = truth(**made, softcap=softcap)["kl"]
        assert kl is not None
        assert (kl >= 0).all()
        if moved:
            torch.testing.assert_close(kl.double(), expected, rtol=1e-5 + 6e-7 / magnitude, atol=0.0)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0, "temperature": 0.7}, {"logit_scale": 0.25}], ids=str)
@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "reference head"])
def test_values_and_gradients(own_head: bool, settings: dict[str, float], trains: bool) -> None:
    made = problem(own_head=own_head, scale=1.5)
    inputs = leaves(made, "hidden", *(["weight", "bias"] if trains else []))
    expected = truth(**made, **settings)
    out = linear_logps(**made, **settings, want=ALL, grad=GRADS, plan="triton", chunk=(3, 4))._asdict()
    upstream = {name: torch.randn(7, dtype=torch.float64) for name in GRADS}
    for name in ALL:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-11, atol=1e-11)
    mine = torch.autograd.grad(sum((out[n] * g).sum() for n, g in upstream.items()), inputs)
    theirs = torch.autograd.grad(sum((expected[n] * g).sum() for n, g in upstream.items()), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_without_a_gpu_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ValueError, match=r"plan 'triton' needs a CUDA device, and the tensors are on cpu; use plan='tile'"
    ):
        linear_logps(**problem(), plan="triton")


# -- plan auto --------------------------------------------------------------------------------------------------------
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def unproved() -> Iterator[None]:
    """Verdicts of other tests are forgotten, and those of this one."""
    verdicts = (kernel_check.flaw, kernel_check._warn_once)
    for verdict in verdicts:
        verdict.cache_clear()
    yield
    for verdict in verdicts:
        verdict.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "_TEST_TILE", (8, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_kernels_agree_with_torch(unproved: None, small: None, dtype: torch.dtype) -> None:
    assert kernel_check.flaw(CPU, dtype) is None


class Spoilt:
    """A kernel that changes one of its results after it ran."""

    def __init__(self, kernel: object, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid: object) -> object:
        def run(**arguments: object) -> None:
            self.kernel[grid](**arguments)
            if arguments[self.name] is not None:
                arguments[self.name].mul_(1.1)

        return run


@pytest.mark.parametrize(
    ("kernel", "result"),
    [("fold", "e_ptr"), ("fold", "ed_ptr"), ("fold", "ez_ptr"), ("fold", "state_ptr"), ("d_logits", "out_ptr")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_proof_finds_a_wrong_kernel(
    monkeypatch, unproved, small, kernel: str, result: str, dtype: torch.dtype
) -> None:
    from rlft.ops import kernels

    monkeypatch.setattr(kernels, kernel, Spoilt(getattr(kernels, kernel), result))
    assert "differ from torch's operators by" in (kernel_check.flaw(CPU, dtype) or "")


def test_a_kernel_that_does_not_compile_is_told_once(monkeypatch, unproved, small) -> None:
    from rlft.ops import kernels

    class Broken:
        def __getitem__(self, grid: object) -> object:
            raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    monkeypatch.setattr(kernels, "fold", Broken())
    reason = kernel_check.flaw(CPU, torch.float32)
    assert reason == "RuntimeError: PTX was compiled with an unsupported toolchain"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(kernel_check, "flaw", lambda device, dtype: reason)
    with pytest.warns(UserWarning, match=r"do not serve on cuda \(RuntimeError: PTX was .* toolchain\), so torch's"):
        assert not kernel_check.usable(CUDA, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel_check.usable(CUDA, torch.float32)


def test_auto_takes_the_kernels_where_they_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlft.ops import kernels

    calls: list[str] = []

    class Counted:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> object:
            calls.append("kernel")
            return self.kernel[grid]

    monkeypatch.setattr(kernels, "fold", Counted(kernels.fold))
    made = problem()
    linear_logps(**made)  # the real one: this module's plans all become triton
    assert not calls
    monkeypatch.setattr(head, "usable", lambda device, dtype: True)
    expected = linear_logps(**made, plan="tile").logps
    assert not calls
    torch.testing.assert_close(linear_logps(**made).logps, expected, rtol=1e-11, atol=1e-11)
    assert calls


def test_usable_only_on_cuda_and_never_interpreted(monkeypatch: pytest.MonkeyPatch, unproved: None) -> None:
    monkeypatch.setattr(kernel_check, "flaw", lambda device, dtype: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel_check.usable(CUDA, torch.bfloat16)  # an interpreter is no kernel
        monkeypatch.delenv("TRITON_INTERPRET")
        assert kernel_check.usable(CUDA, torch.bfloat16)
        assert not kernel_check.usable(CPU, torch.bfloat16)
