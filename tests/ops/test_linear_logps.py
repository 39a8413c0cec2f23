"""``linear_logps`` against the definitions: values and gradients of every plan, on every kind of input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlft.ops import HeadOutputs, linear_logps
from tests.ops.problems import ALL, GRADS, leaves, problem, truth

PLANS = ("dense", "tile", "recompute")
TRANSFORMS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 2.0, "temperature": 0.7},
    {"softcap": 1.5, "logit_scale": 0.5},
]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "reference head"])
@pytest.mark.parametrize("settings", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_are_the_definition(plan, own_head, settings, bias) -> None:
    made = problem(own_head=own_head, bias=bias, scale=1.5)
    names = ["hidden"] + (["weight"] + ["bias"] * bias if plan != "tile" else [])
    inputs = leaves(made, *names)
    upstream = {name: torch.randn(7, dtype=torch.float64) for name in GRADS}
    expected = truth(**made, **settings)
    out = linear_logps(**made, **settings, want=ALL, grad=GRADS, plan=plan, chunk=(3, 4))._asdict()
    for name in ALL:
        close(out[name], expected[name])
    mine = torch.autograd.grad(sum((out[n] * g).sum() for n, g in upstream.items()), inputs)
    theirs = torch.autograd.grad(sum((expected[n] * g).sum() for n, g in upstream.items()), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 1e-3
        close(a, b)


SUBSETS = [
    (frozenset(want), frozenset(grad))
    for size in (1, 2, 3)
    for want in itertools.combinations(sorted(GRADS), size)
    for k in range(1, size + 1)
    for grad in itertools.combinations(want, k)
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("want", "grad"), SUBSETS, ids=lambda s: "+".join(sorted(s)))
def test_gradcheck_of_every_want_and_grad(plan, want, grad) -> None:
    made = problem(4, 3, 7, own_head=plan == "tile")  # a shared head would move the reference too
    names = ["hidden"] if plan == "tile" else ["hidden", "weight", "bias"]
    inputs = leaves(made, *names)

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = {**made, **dict(zip(names, tensors, strict=True))}
        out = linear_logps(**changed, softcap=3.0, temperature=0.8, want=want, grad=grad, plan=plan, chunk=(3, 3))
        assert {name for name in HeadOutputs._fields if getattr(out, name) is not None} == want
        return tuple(getattr(out, name) for name in sorted(grad))

    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("plan", ["tile", "recompute"])
@pytest.mark.parametrize("chunk", [(1, 1), (2, 5), (7, 13), (3, 100), (100, 4), (512, 4096)], ids=str)
def test_tile_size_changes_nothing(plan, chunk) -> None:
    made = problem(own_head=False, apart=1.0)
    (hidden,) = leaves(made, "hidden")
    reference = linear_logps(**made, want=ALL, grad=GRADS, plan="dense")
    out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=chunk)
    for a, b in zip(out, reference, strict=True):
        close(a, b)
    sums = [sum(getattr(o, n).sum() for n in GRADS) for o in (out, reference)]
    close(torch.autograd.grad(sums[0], hidden)[0], torch.autograd.grad(sums[1], hidden)[0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(plan, n) -> None:
    made = problem(n, own_head=False)
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight", "bias"]))
    out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(4, 4))
    assert all(t is not None and t.shape == (n,) for t in out)
    grads = torch.autograd.grad((out.logps + out.kl + out.entropy).sum(), inputs)
    for tensor, grad in zip(inputs, grads, strict=True):
        assert grad.shape == tensor.shape
        assert bool(grad.any()) == (n > 0)


@pytest.mark.parametrize("target", range(13))
def test_target_in_every_tile(target) -> None:
    made = problem(2) | {"targets": torch.tensor([target, 12 - target])}
    close(linear_logps(**made, chunk=(2, 3)).logps, truth(**made)["logps"])


@pytest.mark.parametrize("plan", ["tile", "recompute"])
@pytest.mark.parametrize("name", sorted(GRADS))
def test_gradient_of_one_output_alone(plan, name) -> None:
    made = problem(own_head=False)
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight", "bias"]))
    upstream = torch.randn(7, dtype=torch.float64)
    out = getattr(linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(3, 4)), name)
    mine = torch.autograd.grad((out * upstream).sum(), inputs)
    theirs = torch.autograd.grad((truth(**made)[name] * upstream).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", sorted(GRADS))
def test_undeclared_gradient_is_an_error(plan, name) -> None:
    made = problem()
    leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight"]))
    out = linear_logps(**made, want=ALL, grad=GRADS - {name}, plan=plan)
    value = getattr(out, name)
    close(value.detach(), truth(**made)[name].detach())
    with pytest.raises(ValueError, match=f"a gradient reached '{name}'"):
        value.sum().backward()
    assert out.ref_logps is not None
    assert not out.ref_logps.requires_grad


@pytest.mark.parametrize("plan", ["tile", "recompute"])
def test_twice_in_one_graph(plan) -> None:
    made = problem()
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight"]))
    first = linear_logps(**made, plan=plan, chunk=(3, 4)).logps
    second = linear_logps(**made, temperature=0.5, want=ALL, grad=GRADS, plan=plan, chunk=(2, 5)).kl
    mine = torch.autograd.grad((first * second).sum(), inputs)
    theirs = torch.autograd.grad((truth(**made)["logps"] * truth(**made, temperature=0.5)["kl"]).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("plan", PLANS)
def test_non_contiguous_inputs(plan) -> None:
    made = problem(own_head=False)
    plain = linear_logps(**made, want=ALL, plan=plan, chunk=(3, 4))
    strided = dict(made)
    for name in ("hidden", "ref_hidden", "weight", "ref_weight"):
        strided[name] = made[name].t().contiguous().t()
        assert not strided[name].is_contiguous()
    strided["targets"] = made["targets"].repeat_interleave(2)[::2]
    strided["hidden"] = torch.stack([strided["hidden"], strided["hidden"]], 1)[:, 0]
    for a, b in zip(linear_logps(**strided, want=ALL, plan=plan, chunk=(3, 4)), plain, strict=True):
        close(a, b, 1e-13)
    one = made | {"hidden": made["hidden"][:1].expand(7, -1)}
    same = linear_logps(**one, want=frozenset({"entropy"}), plan=plan).entropy
    assert same is not None
    close(same, same[:1].expand(7), 1e-13)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_equal_to_policy_gives_exactly_nothing(plan, own_head, softcap, dtype) -> None:
    made = problem(20, 8, 50, dtype=dtype, scale=4.0)
    made["ref_hidden"] = made["hidden"].clone()
    if not own_head:
        made |= {"ref_weight": made["weight"].clone(), "ref_bias": made["bias"].clone()}
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight", "bias"]))
    out = linear_logps(**made, softcap=softcap, want=ALL, grad=frozenset({"kl"}), plan=plan, chunk=(6, 7))
    assert torch.equal(out.kl, torch.zeros_like(out.kl))
    assert torch.equal(out.logps.detach(), out.ref_logps)
    for grad in torch.autograd.grad(out.kl.sum(), inputs):
        assert not grad.any()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_properties_hold_in_low_precision(plan, dtype, scale) -> None:
    made = problem(64, 16, 300, dtype=dtype, scale=scale, apart=1.0, own_head=False)
    out = linear_logps(**made, want=ALL, plan=plan, chunk=(17, 64))
    for value in out:
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert (out.logps <= 0).all()
    assert (out.ref_logps <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(300) * (1 + 1e-6)).all()
    assert (out.kl >= 0).all()


@pytest.mark.parametrize("plan", ["tile", "recompute"])
@pytest.mark.parametrize("spread", ["all low", "one hot", "both ends", "opposite"])
def test_rows_at_ten_thousand(plan, spread) -> None:
    """Logits of +-1e4 (SkyRL's NaN): finite, and equal to float64 up to the rounding of the logits themselves."""
    d, v = 4, 11
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = {"all low": -1e4, "one hot": 0.0, "both ends": 0.0, "opposite": 0.0}[spread]
    if spread != "all low":
        weight[3, 0], weight[7, 0] = 1e4, (-1e4 if spread != "one hot" else 0.0)
    hidden = torch.randn(6, d, generator=torch.Generator().manual_seed(2))
    hidden[:, 0] = 1.0
    ref_hidden = hidden.clone()
    ref_hidden[:, 0] = -1.0 if spread == "opposite" else 1.0
    ref_hidden[:, 1] += 0.1
    made = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(plan == "recompute"),
        "targets": torch.tensor([3, 7, 0, 1, 3, 10]),
        "ref_hidden": ref_hidden,
    }
    out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(4, 3))
    expected = truth(**made)
    for name, value in out._asdict().items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(
            value.double(), expected[name], rtol=1e-5, atol=2e-2 if spread == "all low" else 2e-3
        )
    inputs = [made["hidden"]] + ([made["weight"]] if plan == "recompute" else [])
    for grad in torch.autograd.grad((out.logps + out.entropy + out.kl).sum(), inputs):
        assert torch.isfinite(grad).all()


def test_disjoint_tiles_move_the_centre_far() -> None:
    """The first tile says nothing about the others: the running centre of the KL jumps by hundreds."""
    v, d = 40, 3
    g = torch.Generator().manual_seed(0)
    weight, ref_weight = (torch.randn(v, d, generator=g, dtype=torch.float64) for _ in range(2))
    weight[:10, 0], ref_weight[:10, 0] = -300.0, 200.0
    weight[20:30, 0], ref_weight[20:30, 0] = 50.0, 199.0
    hidden = torch.randn(5, d, generator=g, dtype=torch.float64)
    hidden[:, 0] = 1.0
    made = {"hidden": hidden, "weight": weight, "ref_weight": ref_weight, "ref_hidden": hidden.clone()}
    made["targets"] = torch.arange(5)
    leaves(made, "hidden")
    out = linear_logps(**made, want=ALL, grad=GRADS, plan="tile", chunk=(5, 5))
    expected = truth(**made)
    for name in ALL:
        close(getattr(out, name), expected[name], 1e-10)
    (mine,) = torch.autograd.grad(out.kl.sum(), made["hidden"], retain_graph=True)
    (theirs,) = torch.autograd.grad(expected["kl"].sum(), made["hidden"])
    close(mine, theirs, 1e-9)


@pytest.mark.parametrize("plan", ["tile", "recompute"])
def test_tiny_policy_mass_where_the_reference_has_half(plan) -> None:
    """One token: p = e^-200, q = 1/2. Its share of the KL, the reference's mass, must not be lost to underflow."""
    weight = torch.tensor([[0.0], [0.0], [-200.0]])
    ref_weight = torch.tensor([[-0.7], [-0.7], [0.0]])
    made = {
        "hidden": torch.ones(1, 1),
        "weight": weight,
        "targets": torch.zeros(1, dtype=torch.long),
        "ref_hidden": torch.ones(1, 1),
        "ref_weight": ref_weight,
    }
    for chunk in ((1, 1), (1, 3)):
        out = linear_logps(**made, want=ALL, plan=plan, chunk=chunk)
        torch.testing.assert_close(out.kl.double(), truth(**made)["kl"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("plan", ["tile", "recompute"])
def test_autocast_changes_nothing(plan) -> None:
    made = problem(dtype=torch.float32)
    inputs = leaves(made, *(["hidden"] if plan == "tile" else ["hidden", "weight"]))

    def run() -> tuple[torch.Tensor, ...]:
        out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(3, 4))
        return (*out, *torch.autograd.grad((out.logps + out.kl + out.entropy).sum(), inputs))

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_plan_that_the_head_needs() -> None:
    made = problem()
    (hidden,) = leaves(made, "hidden")
    assert "TilePlan" in linear_logps(**made).logps.grad_fn.name()
    frozen = linear_logps(**made).logps
    weight, bias = leaves(made, "weight", "bias")
    out = linear_logps(**made).logps
    assert "RecomputePlan" in out.grad_fn.name()
    close(out, frozen)
    assert all(g.any() for g in torch.autograd.grad(out.sum(), [hidden, weight, bias]))
    with torch.no_grad():
        assert not linear_logps(**made, want=ALL, grad=GRADS).kl.requires_grad


def test_frozen_hidden_states_still_train_the_head() -> None:
    made = problem()
    (weight,) = leaves(made, "weight")
    (mine,) = torch.autograd.grad(linear_logps(**made, chunk=(3, 4)).logps.sum(), weight)
    (theirs,) = torch.autograd.grad(truth(**made)["logps"].sum(), weight)
    close(mine, theirs)


def test_zero_upstream_does_not_read_the_basis() -> None:
    """A masked token whose hidden state is NaN leaves every other gradient alone, and its own at zero."""
    made = problem()
    made["hidden"][2] = float("nan")
    (hidden,) = leaves(made, "hidden")
    keep = torch.ones(7, dtype=torch.float64)
    keep[2] = 0.0
    out = linear_logps(**made, chunk=(3, 4)).logps
    (grad,) = torch.autograd.grad(out.where(keep.bool(), 0.0).sum(), hidden)
    assert torch.isfinite(grad).all()
    assert not grad[2].any()
    assert grad[1].any()


BAD = [
    ({"want": frozenset({"logp"})}, "want holds 'logp'.*did you mean 'logps'"),
    ({"want": frozenset()}, "want is empty"),
    ({"want": frozenset({"logps"}), "grad": frozenset({"kl"})}, "grad names .'kl'., which want does not"),
    ({"grad": frozenset({"ref_logps"})}, "only logps, entropy, kl have a gradient"),
    ({"want": frozenset({"kl"}), "ref_hidden": None}, "need ref_hidden"),
    ({"plan": "fast"}, "plan 'fast' is unknown"),
    ({"temperature": 0.0}, "temperature must be > 0"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"softcap": -1.0}, "softcap must be"),
    ({"chunk": (0, 4)}, "chunk must be two positive sizes"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, 13])}, "id 13, outside the vocabulary of 13"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, -100])}, "id -100, outside"),
    ({"targets": torch.zeros(7)}, "targets must be int64"),
    ({"targets": torch.zeros(6, dtype=torch.long)}, "one id per row"),
    ({"hidden": torch.zeros(1, 7, 5, dtype=torch.float64)}, r"hidden must be \[N, D\]"),
    ({"hidden": torch.zeros(7, 5)}, "float64 needs both"),
    ({"weight": torch.zeros(13, 4, dtype=torch.float64)}, r"weight \[V, D\]"),
    ({"weight": torch.zeros(13, 5, dtype=torch.long)}, "weight must be floating point"),
    ({"bias": torch.zeros(5, dtype=torch.float64)}, "bias must be"),
    ({"ref_bias": torch.zeros(13, dtype=torch.float64)}, "ref_bias needs ref_weight"),
    ({"ref_weight": torch.zeros(12, 5, dtype=torch.float64)}, "same vocabulary"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logps(**{**problem(), **change})


def test_tile_plan_refuses_a_trainable_head() -> None:
    made = problem()
    leaves(made, "weight")
    with pytest.raises(ValueError, match="plan 'tile' cannot give the head a gradient"):
        linear_logps(**made, plan="tile")


@pytest.mark.parametrize("plan", PLANS)
def test_linearity_ties_each_output_to_another_gradient(plan) -> None:
    """Without bias and cap the logits are linear in h (Euler): with E_p[W] = W_t - dlogp_t/dh,

    entropy = lse - E_p[W].h = dlogp/dh . h - logp, and KL = (logp - ref_logp) - dlogp/dh . (h - h_ref).
    """
    made = problem(9, 5, 30, bias=False, scale=1.5)
    (hidden,) = leaves(made, "hidden")
    out = linear_logps(**made, want=ALL, plan=plan, chunk=(4, 7))
    (slope,) = torch.autograd.grad(out.logps.sum(), hidden)
    assert out.kl.min() > 1e-3
    close(out.entropy.detach(), (slope * hidden.detach()).sum(-1) - out.logps.detach())
    away = (slope * (hidden.detach() - made["ref_hidden"])).sum(-1)
    close(out.kl.detach(), out.logps.detach() - out.ref_logps - away)
