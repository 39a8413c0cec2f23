"""How exact the sums are, against float64 truth of the same inputs; and how much is ever allocated."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlft.ops import linear_logps
from tests.ops.problems import ALL, GRADS, leaves, problem, truth

N, D, V = 48, 64, 2000


def near(apart: float, *, own_head: bool, dtype: torch.dtype) -> dict:
    return problem(N, D, V, apart=apart, own_head=own_head, dtype=dtype, scale=0.3, bias=False)


@pytest.mark.parametrize("plan", ["tile", "recompute", "dense"])
@pytest.mark.parametrize(
    ("own_head", "apart", "median", "dtype"),
    # With one head the difference of hidden states goes through it, and nothing is lost; with two heads the logits
    # themselves carry an error of 1e-6, which a log-ratio of 1e-3 feels.
    [
        (True, 6e-4, 2e-5, torch.float32),
        (False, 4e-4, 2e-3, torch.float32),
        (True, 0.1, 1e-5, torch.float32),
        (True, 0.1, 1e-5, torch.bfloat16),
        (False, 0.1, 1e-4, torch.bfloat16),
    ],
)
def test_small_kl_keeps_its_digits(plan, dtype, own_head, apart, median) -> None:
    made = near(apart, own_head=own_head, dtype=dtype)
    if plan == "dense" and own_head:
        median = 2e-3 if apart < 1e-2 else 1e-4  # the oracle has no shortcut for a shared head
    out = linear_logps(**made, want=ALL, plan=plan, chunk=(20, 256))
    expected = truth(**made)["kl"]
    if apart < 1e-2:
        assert 1e-7 < expected.median() < 1e-5
    error = ((out.kl.double() - expected) / expected).abs()
    assert (out.kl >= 0).all()
    assert error.median() < median
    assert error.max() < 50 * median


@pytest.mark.parametrize("plan", ["tile", "recompute"])
def test_gradient_of_a_small_kl_keeps_its_digits(plan) -> None:
    made = near(6e-4, own_head=True, dtype=torch.float32)
    (hidden,) = leaves(made, "hidden")
    (mine,) = torch.autograd.grad(
        linear_logps(**made, want=frozenset({"kl"}), grad=frozenset({"kl"}), plan=plan, chunk=(20, 256)).kl.sum(),
        hidden,
    )
    (theirs,) = torch.autograd.grad(truth(**made)["kl"].sum(), hidden)
    assert (mine - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.parametrize("plan", ["tile", "recompute"])
@pytest.mark.parametrize(("dtype", "absolute"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
def test_float32_sums_of_low_precision_inputs(plan, dtype, absolute) -> None:
    made = near(0.1, own_head=False, dtype=dtype)
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight"]))
    out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(20, 256))
    expected = truth(**made)
    for name in ("logps", "ref_logps", "entropy"):
        assert (getattr(out, name).double() - expected[name]).abs().max() < absolute
    double = {k: v.detach().double() if v.is_floating_point() else v for k, v in made.items()}
    exact = leaves(double, *(["hidden"] if plan == "tile" else ["hidden", "weight"]))
    wanted = torch.autograd.grad(sum(truth(**double)[n].sum() for n in GRADS), exact)
    got = torch.autograd.grad((out.logps + out.entropy + out.kl).sum(), inputs)
    limit = 1e-5 if dtype == torch.float32 else 4e-3  # a bfloat16 input takes a bfloat16 gradient
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < limit
        # Rounding has no preferred side: a bias here would drift the weights the same way every step.
        residual = (a.double() - b) / b.abs().mean()
        assert residual.mean().abs() < 4 * residual.std() / residual.numel() ** 0.5


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            # A view of an input, or an in-place result, is no new memory.
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("plan", ["tile", "recompute"])
def test_nothing_larger_than_a_tile_or_a_basis_is_allocated(plan, own_head, softcap, dtype) -> None:
    n, d, v, chunk = 64, 8, 1000, (16, 50)
    made = problem(n, d, v, dtype=dtype, own_head=own_head)
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight", "bias"]))
    allowed = max(chunk[0] * chunk[1], n * d, v)  # v: the bias, one number for each id
    if plan == "recompute":
        allowed = max(allowed, v * d)  # the gradient of the head itself
    with Largest() as largest:
        out = linear_logps(**made, softcap=softcap, want=ALL, grad=GRADS, plan=plan, chunk=chunk)
        torch.autograd.grad((out.logps + out.entropy + out.kl).sum(), inputs)
    assert 0 < largest.elements <= allowed
    if plan == "tile":
        with Largest() as largest:
            linear_logps(**made, want=ALL, grad=GRADS, plan="dense")
        assert largest.elements >= n * v  # the measurement can tell


class Held(TorchDispatchMode):
    """The most bytes that tensors made by operators held at one time, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given | self.alive.keys():
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize(("softcap", "tiles"), [(None, 5), (5.0, 6)])
def test_the_joint_op_holds_few_tiles_and_two_rows_of_derivatives(softcap, tiles) -> None:
    n, d, v, chunk = 96, 8, 4000, (64, 500)
    made = problem(n, d, v, dtype=torch.float32)
    leaves(made, "hidden")
    with Held() as held:
        out = linear_logps(**made, softcap=softcap, want=ALL, grad=frozenset({"logps", "kl"}), plan="tile", chunk=chunk)
        assert out.kl is not None
    tile, rows = 4 * chunk[0] * chunk[1], 4 * n * d
    assert tiles * tile <= held.most <= tiles * tile + 8 * rows + 2 * 4 * v


def test_a_tile_of_the_head_gradient_is_float32_whatever_the_head() -> None:
    """Many rows add up in the gradient of a bfloat16 head: summed in bfloat16 the small ones would vanish."""
    made = problem(400, 4, 6, dtype=torch.bfloat16, scale=0.1, bias=False)
    (weight,) = leaves(made, "weight")
    (mine,) = torch.autograd.grad(linear_logps(**made, plan="recompute", chunk=(8, 3)).logps.sum(), weight)
    double = {k: v.detach().double() if v.is_floating_point() else v for k, v in made.items()}
    (exact,) = leaves(double, "weight")
    (theirs,) = torch.autograd.grad(truth(**double)["logps"].sum(), exact)
    assert ((mine.double() - theirs).abs() <= theirs.abs() * 2**-8 + 1e-6).all()
