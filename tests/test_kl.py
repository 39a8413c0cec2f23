from __future__ import annotations

import inspect
import json

import pytest
import torch

from rlft import kl
from rlft.worlds import World

F64 = torch.float64
WORLD = World.bandit(5)  # one token: the per-token KL is the KL


def on_policy_gradient(value: str, gradient: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The expected gradient of a penalty on samples of the policy, and the two true gradients."""
    logits, ref = WORLD.random_logits(seed=0).requires_grad_(), WORLD.random_logits(seed=1)
    estimate = kl.penalty(WORLD.token_logps(logits), WORLD.token_logps(ref), WORLD.mask, value=value, gradient=gradient)
    probabilities = WORLD.answer_logps(logits).exp().detach()
    expected = (probabilities * estimate.sum(-1)).sum()
    (reverse,) = torch.autograd.grad(WORLD.kl(logits, ref), logits)
    (forward,) = torch.autograd.grad(WORLD.kl(ref, logits), logits)
    (found,) = torch.autograd.grad(expected, logits)
    return found, reverse, forward


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
@pytest.mark.parametrize(
    ("gradient", "truth"), [("k1", "zero"), ("k2", "reverse"), ("k3", "forward"), ("ratio_k3", "reverse")]
)
def test_expected_gradients_by_enumeration(value: str, gradient: str, truth: str) -> None:
    found, reverse, forward = on_policy_gradient(value, gradient)
    expected = {"zero": torch.zeros_like(found), "reverse": reverse, "forward": forward}[truth]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert (reverse - forward).abs().max() > 0.05


def test_expected_values_by_enumeration() -> None:
    logits, ref = WORLD.random_logits(seed=0), WORLD.random_logits(seed=1)
    logps, ref_logps = WORLD.token_logps(logits), WORLD.token_logps(ref)
    probabilities = logps.exp().flatten()
    for estimator in (kl.k1, kl.k3):
        mean = (probabilities * estimator(logps, ref_logps, WORLD.mask).flatten()).sum()
        torch.testing.assert_close(mean, WORLD.kl(logits, ref), rtol=1e-13, atol=0)
    half_square = (probabilities * 0.5 * (logps - ref_logps).flatten().square()).sum()
    mean = (probabilities * kl.k2(logps, ref_logps, WORLD.mask).flatten()).sum()
    torch.testing.assert_close(mean, half_square, rtol=1e-13, atol=0)


def test_values_by_hand() -> None:
    logps, ref = torch.tensor([[-1.0, -2.0]], dtype=F64), torch.tensor([[-3.0, -1.5]], dtype=F64)
    mask = torch.ones(1, 2).bool()
    assert kl.k1(logps, ref, mask).tolist() == [[2.0, -0.5]]
    assert kl.k2(logps, ref, mask).tolist() == [[2.0, 0.125]]
    expected = [[1 + 0.1353352832366127, 1.6487212707001282 - 1.5]]
    torch.testing.assert_close(kl.k3(logps, ref, mask), torch.tensor(expected, dtype=F64), rtol=1e-14, atol=0)


def test_k3_is_exact_near_zero_and_never_negative() -> None:
    """exp(x) - 1 - x computed naively in float32 is off by 100 % at x = 1e-4."""
    x = torch.tensor([[-1e-3, -1e-4, 1e-4, 1e-3]])
    mask = torch.ones(1, 4).bool()
    ref = torch.full((1, 4), -1.0)
    found = kl.k3(ref - x, ref, mask)
    assert (found >= 0).all()
    narrow = (ref - x).double() - ref.double()
    torch.testing.assert_close(found.double(), torch.expm1(-narrow) + narrow, rtol=0, atol=1.2e-10)  # one ulp of x


def test_exact_passes_value_and_gradient_through() -> None:
    token_kl = torch.tensor([[0.2, torch.nan]], dtype=F64, requires_grad=True)
    out = kl.exact(token_kl, torch.tensor([[True, False]]))
    assert out.tolist() == [[0.2, 0.0]]
    (2 * out.sum()).backward()
    assert token_kl.grad.tolist() == [[2.0, 0.0]]
    with pytest.raises(ValueError, match="token_kl must be finite"):
        kl.exact(token_kl, torch.ones(1, 2).bool())


def test_value_and_gradient_are_independent() -> None:
    logps = -torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    ref = -torch.rand(2, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    plain = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
    for value, value_of in plain.items():
        leaf = logps.clone().requires_grad_()
        silent = kl.penalty(leaf, ref, mask, value=value, gradient="none")
        assert not silent.requires_grad
        assert torch.equal(silent, value_of(logps, ref, mask))
        for gradient, gradient_of in plain.items():
            found = kl.penalty(leaf, ref, mask, value=value, gradient=gradient)
            torch.testing.assert_close(found, value_of(logps, ref, mask), rtol=1e-14, atol=1e-15)
            expected = torch.autograd.grad(gradient_of(leaf, ref, mask).sum(), leaf)[0]
            torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_masked_garbage_and_reference_gradient(name: str) -> None:
    estimator = getattr(kl, name)
    mask = torch.tensor([[True, False, True]])
    clean = torch.tensor([[-1.0, -2.0, -0.5]], dtype=F64)
    ref = torch.tensor([[-1.5, -1.0, -0.2]], dtype=F64)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf, 1e4):
        leaf = clean.where(mask, garbage).requires_grad_()
        ref_leaf = ref.where(mask, -garbage).requires_grad_()
        out = estimator(leaf, ref_leaf, mask)
        out.sum().backward()
        assert ref_leaf.grad is None
        results.append((out.detach(), leaf.grad))
    for out, grad in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])
        assert out[0, 1] == 0
        assert grad[0, 1] == 0


@pytest.mark.parametrize("difference", [0.0, 11.2, 43.0, 45.0, 88.8, 1000.0])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_far_from_the_reference_it_is_finite_or_refused(name: str, difference: float) -> None:
    mask = torch.ones(1, 1).bool()
    for logp, ref_logp in ((-0.1 - difference, -0.1), (-0.1, -0.1 - difference)):
        leaf = torch.tensor([[logp]], requires_grad=True)
        arguments = (leaf, torch.tensor([[ref_logp]]), mask)
        if name == "k3" and logp < ref_logp and difference > 44.4:
            with pytest.raises(
                ValueError, match=r"ref_logps - logps is \d.*overflows torch.float32.*use k1, k2 or exact"
            ):
                kl.k3(*arguments)
            continue
        out = getattr(kl, name)(*arguments)
        out.sum().backward()
        assert out.isfinite().all()
        assert leaf.grad.isfinite().all()


def test_wrong_names_and_shapes_are_refused() -> None:
    logps, mask = -torch.ones(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match="value must be one of k1, k2, k3, got 'k4'"):
        kl.penalty(logps, logps, mask, value="k4", gradient="k2")
    with pytest.raises(ValueError, match="did you mean 'ratio_k3'"):
        kl.penalty(logps, logps, mask, value="k3", gradient="ratio_k")
    for estimator in (kl.k1, kl.k2, kl.k3):
        for wrong in ((logps[:, :1], logps, mask), (logps, logps[:1], mask), (logps, logps, mask[:, :1])):
            with pytest.raises(ValueError, match="must have the shape of"):
                estimator(*wrong)
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            estimator(logps, logps, mask.float())
        with pytest.raises(ValueError, match="one number per token"):
            estimator(logps[0], logps[0], mask[0])
        with pytest.raises(ValueError, match="floating point"):
            estimator(logps.long(), logps, mask)


# -- controllers ------------------------------------------------------------------------------------------------------


def test_fixed_stays() -> None:
    controller = kl.FixedKL(0.1)
    assert controller.update(99.0, samples=5) == controller


def test_proportional_by_hand() -> None:
    controller = kl.ProportionalKL(0.1, target=6.0, horizon=100.0)
    assert controller.update(6.0, samples=50).beta == 0.1
    assert controller.update(6.6, samples=50).beta == pytest.approx(0.1 * (1 + 0.1 * 0.5), rel=1e-12)
    assert controller.update(600.0, samples=50).beta == pytest.approx(0.1 * (1 + 0.2 * 0.5), rel=1e-12)
    assert controller.update(0.0, samples=50).beta == pytest.approx(0.1 * (1 - 0.2 * 0.5), rel=1e-12)
    assert controller.beta == 0.1  # by value: the old one stays
    with pytest.raises(ValueError, match="raise horizon"):
        controller.update(0.0, samples=600)


def test_halve_double_by_hand() -> None:
    controller = kl.HalveDoubleKL(0.4, target=0.03)
    for observed, beta in ((0.0199, 0.2), (0.0201, 0.4), (0.03, 0.4), (0.0449, 0.4), (0.0451, 0.8)):
        assert controller.update(observed).beta == pytest.approx(beta, rel=1e-15), observed


def test_controllers_steer_a_policy_to_the_target() -> None:
    """The KL of a policy answers inversely to beta: both adaptive controllers settle near the target."""
    for controller, tolerance in (
        (kl.ProportionalKL(5.0, target=2.0, horizon=10.0), 1e-3),
        (kl.HalveDoubleKL(5.0, target=2.0), 1.0),
    ):
        for _ in range(400):
            controller = controller.update(1 / controller.beta, samples=1)
        assert abs(1 / controller.beta - 2.0) <= tolerance


@pytest.mark.parametrize(
    "controller", [kl.FixedKL(0.0), kl.ProportionalKL(0.1, 6.0, 50.0, 0.3), kl.HalveDoubleKL(0.2, 0.01)], ids=repr
)
def test_controllers_survive_a_checkpoint(controller: kl.KLController) -> None:
    stepped = controller.update(0.5, samples=3)
    state = json.loads(json.dumps(stepped.state_dict()))
    assert kl.controller_from_state_dict(state) == stepped


def test_senseless_controllers_are_refused() -> None:
    with pytest.raises(ValueError, match="beta must be >= 0"):
        kl.FixedKL(-0.1)
    with pytest.raises(ValueError, match="target must be > 0"):
        kl.HalveDoubleKL(0.1, 0.0)
    with pytest.raises(ValueError, match="horizon must be > 0"):
        kl.ProportionalKL(0.1, 6.0, horizon=0)
    with pytest.raises(ValueError, match="observed must be finite"):
        kl.ProportionalKL(0.1, 6.0).update(float("nan"))
    with pytest.raises(ValueError, match="did you mean 'proportional'"):
        kl.controller_from_state_dict({"kind": "proportionate", "beta": 0.1})
    with pytest.raises(ValueError, match="has the fields beta, target, got beta, goal"):
        kl.controller_from_state_dict({"kind": "halve_double", "beta": 0.1, "goal": 1.0})


# -- to the edge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_log_probs_that_cannot_be_are_refused(name: str) -> None:
    good, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
    for bad in (torch.nan, torch.inf, -torch.inf, 3.0):
        wrong = torch.tensor([[-1.0, bad]])
        with pytest.raises(ValueError, match=r"^logps holds"):
            getattr(kl, name)(wrong, good, mask)
        with pytest.raises(ValueError, match=r"^ref_logps holds"):
            getattr(kl, name)(good, wrong, mask)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_is_float32_out(name: str, dtype: torch.dtype) -> None:
    a, b = torch.tensor([[-1.1, -2.3]]).to(dtype), torch.tensor([[-0.7, -3.9]]).to(dtype)
    mask = torch.ones(1, 2).bool()
    half, single = ((a.abs(),), (a.abs().float(),)) if name == "exact" else ((a, b), (a.float(), b.float()))
    found = getattr(kl, name)(*half, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, getattr(kl, name)(*single, mask))


def test_exact_refuses() -> None:
    token_kl, mask = torch.ones(1, 2), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match="token_kl must be one number per token"):
        kl.exact(token_kl[0], mask[0])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        kl.exact(token_kl, mask.float())


@pytest.mark.parametrize(
    ("make", "fields"),
    [(kl.ProportionalKL, ("beta", "target", "horizon", "limit")), (kl.HalveDoubleKL, ("beta", "target"))],
)
def test_every_field_of_a_controller_is_positive(make, fields: tuple[str, ...]) -> None:
    good = dict.fromkeys(fields, 0.5)
    for name in fields:
        assert getattr(make(**{**good, name: 1e-9}), name) == 1e-9
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            make(**{**good, name: 0.0})
    with pytest.raises(ValueError, match="observed must be finite"):
        make(**good).update(float("inf"))


def test_steps_of_controllers_at_their_edges() -> None:
    controller = kl.ProportionalKL(0.1, target=6.0, horizon=100.0)
    assert controller.update(6.6).beta == pytest.approx(0.1 * (1 + 0.1 / 100), rel=1e-14)  # one sample
    assert controller.update(6.6, samples=0) == controller
    with pytest.raises(ValueError, match="samples must be >= 0"):
        controller.update(6.6, samples=-1)
    with pytest.raises(ValueError, match="raise horizon"):
        controller.update(0.0, samples=500)  # beta would be exactly zero
    assert controller.update(0.0, samples=499).beta == pytest.approx(0.1 * 0.002, rel=1e-9)
    halving = kl.HalveDoubleKL(0.4, target=3.0)
    assert halving.update(2.0) is halving
    assert halving.update(4.5) is halving
    with pytest.raises(ValueError, match="kind must be one of"):
        kl.controller_from_state_dict({"beta": 0.1})


def test_controllers_share_one_interface() -> None:
    """A trainer updates any of them: by the observed KL, of one sample unless it says so."""
    for make in (kl.FixedKL, kl.ProportionalKL, kl.HalveDoubleKL):
        parameters = inspect.signature(make.update).parameters
        assert list(parameters) == ["self", "observed", "samples"]
        assert parameters["samples"].default == 1
        assert parameters["samples"].kind is inspect.Parameter.KEYWORD_ONLY
