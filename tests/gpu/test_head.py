"""The head op on a GPU: Triton kernels against the definitions in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton (Linux)")

from rlft.ops import HeadOutputs, kernel_check, linear_logps
from tests.gpu.common import CUDA, apart, free_memory, peak_of_device, pytestmark, reset_peak  # noqa: F401
from tests.ops import test_linear_logps, test_precision
from tests.ops.problems import ALL, GRADS, truth

# pytest collects these names here too, with their parameters; the fixture sends every plan but the oracle to the device
from tests.ops.test_linear_logps import (  # noqa: F401
    test_disjoint_tiles_move_the_centre_far,
    test_gradient_of_one_output_alone,
    test_no_row_and_one_row,
    test_non_contiguous_inputs,
    test_reference_equal_to_policy_gives_exactly_nothing,
    test_rows_at_ten_thousand,
    test_target_in_every_tile,
    test_tiny_policy_mass_where_the_reference_has_half,
    test_twice_in_one_graph,
    test_values_and_gradients_are_the_definition,
)
from tests.ops.test_precision import test_gradient_of_a_small_kl_keeps_its_digits  # noqa: F401


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan but the oracle becomes ``triton`` on the device, with inputs from and results on the CPU."""

    def there(*args: Any, plan: str = "auto", **settings: Any) -> HeadOutputs:
        if plan == "dense":
            return linear_logps(*args, plan="dense", **settings)
        args = tuple(a.to(CUDA) for a in args)
        settings = {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        out = linear_logps(*args, plan="triton", **settings)
        return HeadOutputs(*(None if x is None else x.cpu() for x in out))

    monkeypatch.setattr(test_linear_logps, "linear_logps", there)
    monkeypatch.setattr(test_precision, "linear_logps", there)


def inputs(
    n: int, d: int, v: int, *, dtype: torch.dtype, apart: float = 0.05, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Hidden states whose logits have a standard deviation of about 2, as a trained model's; drawn on the device."""
    generator = torch.Generator(CUDA).manual_seed(seed)

    def draw(*shape: int, std: float) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=CUDA)).to(dtype)

    hidden = draw(n, d, std=1.0)
    return {
        "hidden": hidden,
        "weight": draw(v, d, std=2.0 * d**-0.5),
        "targets": torch.randint(v, (n,), generator=generator, device=CUDA),
        "ref_hidden": hidden + draw(n, d, std=apart),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16], ids=str)
def test_auto_takes_the_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from rlft.ops import kernels

    assert kernel_check.flaw(CUDA, dtype) is None
    calls = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            calls.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(kernels, "fold", Counted(kernels.fold))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*do not serve on.*")
        linear_logps(**inputs(50, 32, 500, dtype=dtype), want=ALL)
    assert calls


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(
    ("dtype", "values", "grads"), [(torch.float32, 2e-5, 1e-5), (torch.bfloat16, 1e-4, 4e-3)], ids=["fp32", "bf16"]
)
def test_the_numerics_contract(dtype: torch.dtype, values: float, grads: float, trains: bool) -> None:
    """Log-probs and entropy absolute, KL relative, gradients in norm, and no preferred side of the rounding."""
    made = inputs(256, 256, 50_000, dtype=dtype)
    names = ["hidden"] + ["weight"] * trains
    leaves = [made[name].requires_grad_() for name in names]
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in made.items()}
    double = [exact[name].requires_grad_() for name in names]
    expected = truth(**exact)
    out = linear_logps(**made, want=ALL, grad=GRADS, plan="triton")
    for name in ("logps", "ref_logps", "entropy"):
        assert (getattr(out, name).double() - expected[name]).abs().max() < values, name
    assert (out.kl >= 0).all()
    assert ((out.kl.double() - expected["kl"]) / expected["kl"]).abs().median() < 1e-3
    for name in ("logps", "entropy", "kl"):
        # the gradient of a KL of 1e-3 is a small difference of weights that are all rounded to the dtype
        limit = 10 * grads if name == "kl" else grads
        mine = torch.autograd.grad(getattr(out, name).sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad(expected[name].sum(), double, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert apart(a, b) < limit, (name, apart(a, b))
            # rows share the head, so a row is one draw; four standard errors, for three would fail one seed in 370
            towards = ((a.double() - b) * b.sign()).mean(-1) / b.abs().mean()
            assert towards.mean().abs() < 4 * towards.std() / towards.numel() ** 0.5 + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_kl_keeps_its_digits(dtype: torch.dtype) -> None:
    step = 6e-4 if dtype == torch.float32 else 4e-3  # the smallest that bfloat16 hidden states hold
    made = inputs(256, 128, 50_000, dtype=torch.float32, apart=step)
    made = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
    expected = truth(**{k: v.double() if v.is_floating_point() else v for k, v in made.items()})["kl"]
    kl = linear_logps(**made, want=frozenset({"kl"}), plan="triton").kl
    moved = expected > 1e-7
    assert moved.float().mean() > 0.5
    assert (kl >= 0).all()
    assert ((kl.double() - expected) / expected)[moved].abs().median() < 2e-3


def test_the_plans_agree_at_the_size_of_a_model() -> None:
    made = inputs(3000, 896, 151_936, dtype=torch.bfloat16)
    results = {}
    for plan in ("tile", "triton"):
        hidden = made["hidden"].clone().requires_grad_()
        out = linear_logps(
            **{**made, "hidden": hidden},
            want=ALL,
            grad=frozenset({"logps", "kl"}),
            plan=plan,  # type: ignore[arg-type]
        )
        (out.logps.sum() + out.kl.sum()).backward()
        results[plan] = {**{k: v.detach() for k, v in out._asdict().items()}, "grad": hidden.grad}
    for name, theirs in results["tile"].items():
        assert apart(results["triton"][name], theirs) < 2e-3, name


def test_tiles_of_more_than_two_to_the_31_entries() -> None:
    """One tile of 2.2e9 logits: an index of 32 bits would wrap."""
    n, d, v = 16_640, 64, 131_072
    needed = n * v * (4 + 2) * 1.3
    if free_memory() < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    made = inputs(n, d, v, dtype=torch.bfloat16)
    made["targets"][-200:] = v - 1 - torch.arange(200, device=CUDA)  # in the far corner of the tile
    del made["ref_hidden"]
    results = []
    for chunk in ((n, v), (1000, 5000)):
        hidden = made["hidden"].clone().requires_grad_()
        logps = linear_logps(**{**made, "hidden": hidden}, plan="triton", chunk=chunk).logps
        logps.sum().backward()
        results.append((logps.detach(), hidden.grad))
        torch.cuda.empty_cache()
    assert (results[0][0] - results[1][0]).abs().max() < 1e-4
    assert apart(results[0][1], results[1][1]) < 4e-3
    rows = slice(-200, None)
    exact = (made["hidden"][rows].double() @ made["weight"].double().t()).log_softmax(-1)
    expected = exact.gather(-1, made["targets"][rows, None])[:, 0]
    assert (results[0][0][rows].double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
def test_more_than_65535_rows_in_a_tile(trains: bool) -> None:
    n = 70_001
    made = inputs(n, 32, 300, dtype=torch.float32)
    expected = truth(**{k: v.double() if v.is_floating_point() else v for k, v in made.items()})
    leaves = [made["hidden"].requires_grad_(), made["weight"].requires_grad_(trains)]
    out = linear_logps(**made, want=ALL, grad=frozenset({"logps"}), plan="triton", chunk=(n, 300))
    assert (out.logps.double() - expected["logps"]).abs().max() < 2e-5
    (grad,) = torch.autograd.grad(out.logps.sum(), leaves[-1:] if trains else leaves[:1])
    assert grad.isfinite().all()
    assert grad.abs().amax(-1).min() > 0


def test_memory_is_that_of_a_tile() -> None:
    made = inputs(8192, 256, 151_936, dtype=torch.bfloat16)
    made["hidden"].requires_grad_()
    del made["ref_hidden"]
    linear_logps(**made).logps.sum().backward()
    reset_peak()
    before = torch.cuda.memory_allocated()
    linear_logps(**made).logps.sum().backward()
    used, whole = peak_of_device() - before, 8192 * 151_936 * 4
    assert used < whole / 5, f"{used / 2**20:.0f} MiB of {whole / 2**20:.0f} MiB of logits"
