"""What every public loss must do, whatever its formula."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import Tensor

from rlft import losses, reduce
from tests.losses.cases import CASES, Case

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
masked_case = pytest.mark.parametrize("case", [c for c in CASES if not c.per_pair], ids=lambda case: case.id)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def assert_same(case: Case, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Loss, metrics and gradient are the same bits."""
    a, a_grads = case.gradients(first)
    b, b_grads = case.gradients(second)
    assert same_bits(a.loss, b.loss)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        assert same_bits(a.metrics[name], b.metrics[name]), name
    for name in a_grads:
        assert same_bits(a_grads[name], b_grads[name]), name
        assert a_grads[name].isfinite().all(), name


def select(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def test_every_public_loss_is_here() -> None:
    assert {case.name for case in CASES} == set(losses.__all__)
    assert losses.__all__ == sorted(losses.__all__)


@pytest.mark.parametrize("name", losses.__all__)
def test_signature_and_docstring(name: str) -> None:
    fn = getattr(losses, name)
    kinds = [p.kind for p in inspect.signature(fn).parameters.values()]
    assert set(kinds) <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for parameter in inspect.signature(fn).parameters.values():
        is_tensor = "Tensor" in str(parameter.annotation)
        assert is_tensor == (parameter.kind is parameter.POSITIONAL_OR_KEYWORD), parameter
        assert re.search(rf"^ +{parameter.name}: ", fn.__doc__, re.M), f"{name} does not document {parameter.name}"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in fn.__doc__
    assert ("References:" in fn.__doc__) or name == "sft"
    assert fn.reduction in reduce.REDUCTIONS
    assert fn.min_group >= 1
    assert isinstance(fn.on_policy_only, bool)
    assert isinstance(fn.couples_rows, bool)


@every_case
def test_output_is_unreduced_and_masked(case: Case) -> None:
    tensors = case.inputs()
    output = case(tensors)
    assert output.reduction == case.fn.reduction
    assert output.loss.ndim == (1 if output.reduction == "mean" else 2)
    assert output.loss[~output.counted].eq(0).all()
    assert output.loss.isfinite().all()
    for name, metric in output.metrics.items():
        assert not metric.requires_grad, name
        assert metric.shape in (output.loss.shape, output.loss.shape[:1], tensors.get("mask", output.loss).shape), name
        if not case.per_pair:
            kept = tensors["mask"] if metric.ndim == 2 else tensors["mask"].any(-1)
            assert metric[~kept].nan_to_num(0).eq(0).all(), name
    if not case.per_pair:
        row_count = tensors["mask"].any(-1)
        assert not output.counted[~row_count].any()
    if "rewards" in case.tensor_names:
        assert not output.counted[8].any()
        members = output.counted.any(-1) if output.loss.ndim == 2 else output.counted
        assert members.tolist() == [True, True, True, False, True, True, True, True, False]


@every_case
def test_only_the_policy_receives_gradient(case: Case) -> None:
    tensors = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in case.inputs().items()}
    output = case(tensors)
    output.mean().backward()
    for name, tensor in tensors.items():
        if name in case.learned:
            assert tensor.grad is not None, name
            assert tensor.grad.abs().sum() > 0, name
        else:
            assert tensor.grad is None, name
    for name, metric in output.metrics.items():
        assert not metric.requires_grad, name


@every_case
def test_inputs_come_back_unmodified(case: Case) -> None:
    tensors = case.inputs()
    before = {n: t.clone() for n, t in tensors.items()}
    case.gradients(tensors)
    case(tensors)
    assert all(same_bits(tensors[n], before[n]) for n in tensors)


@masked_case
@pytest.mark.parametrize("garbage", [1e4, torch.inf, -torch.inf, torch.nan, "random"], ids=str)
def test_masked_slots_change_nothing(case: Case, garbage: float | str) -> None:
    clean, dirty = case.inputs(), case.inputs()
    empty = ~clean["mask"].any(-1)
    for name, tensor in dirty.items():
        where = ~clean["mask"] if tensor.ndim == 2 else empty
        if name != "mask" and tensor.is_floating_point():
            noise = torch.randn_like(tensor) if garbage == "random" else torch.full_like(tensor, float(garbage))
            dirty[name] = torch.where(where, noise, tensor)
        elif name == "labels":
            dirty[name] = tensor ^ empty
    assert_same(case, clean, dirty)


@pytest.mark.parametrize("case", [c for c in CASES if "rewards" in c.tensor_names], ids=lambda case: case.id)
def test_unscored_rows_change_nothing(case: Case) -> None:
    clean, dirty = case.inputs(), case.inputs()
    for name, tensor in dirty.items():
        if tensor.is_floating_point() and name != "rewards":
            tensor[8] -= 1.5
    dirty["mask"][8] = torch.tensor([True, False, False, True])
    assert_same(case, clean, dirty)


@every_case
def test_permuting_rows_permutes_the_loss(case: Case) -> None:
    tensors = case.inputs()
    size = next(iter(tensors.values())).shape[0]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    if case.layout == "pairs":
        order = (torch.randperm(size // 2, generator=torch.Generator().manual_seed(3)) * 2)[:, None] + torch.arange(2)
        order = order.flatten()
    output, grads = case.gradients(tensors)
    permuted, permuted_grads = case.gradients(select(tensors, order))
    torch.testing.assert_close(permuted.loss, output.loss[order], rtol=1e-12, atol=1e-13)
    for name in output.metrics:
        torch.testing.assert_close(
            permuted.metrics[name], output.metrics[name][order], rtol=1e-12, atol=1e-13, equal_nan=True
        )
    for name in grads:
        torch.testing.assert_close(permuted_grads[name], grads[name][order], rtol=1e-12, atol=1e-13)


@every_case
def test_splitting_by_whole_groups_changes_nothing(case: Case) -> None:
    tensors = case.inputs()
    size = next(iter(tensors.values())).shape[0]
    if case.fn.couples_rows:  # and says so: a trainer must not split its batch
        pieces = torch.cat([case(select(tensors, torch.arange(i, i + 2))).loss for i in range(0, size, 2)])
        assert (pieces - case(tensors).loss).abs().max() > 1e-3
        return
    if case.per_pair:
        parts = [torch.arange(0, 1), torch.arange(1, size)]
    else:
        ids = tensors.get("group_ids", torch.arange(size) // 3)
        parts = [(ids == g).nonzero().flatten() for g in ids.unique()]
    length = 4 if case.fn.reduction == "fixed_length" else None
    output, grads = case.gradients(tensors, length=length)
    count = reduce.denominator(output.counted, output.reduction, length=length)
    pieces = {n: torch.zeros_like(g) for n, g in grads.items()}
    seen = torch.zeros(())
    for rows in parts:
        leaves = {n: t.clone().requires_grad_(n in case.learned) for n, t in select(tensors, rows).items()}
        piece = case(leaves)
        torch.testing.assert_close(piece.loss, output.loss[rows], rtol=1e-12, atol=1e-14)
        seen = seen + reduce.denominator(piece.counted, piece.reduction, length=length)
        (reduce.numerator(piece.loss, piece.counted, piece.reduction, length=length) / count).backward()
        for name in grads:
            pieces[name][rows] = leaves[name].grad
    assert seen == count
    for name in grads:
        torch.testing.assert_close(pieces[name], grads[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in CASES if c.exact_gradient], ids=lambda case: case.id)
def test_gradcheck(case: Case) -> None:
    tensors = case.inputs(seed=5)
    learned = [n for n in tensors if n in case.learned]

    def mean(*values: Tensor) -> Tensor:
        return case({**tensors, **dict(zip(learned, values, strict=True))}).mean()

    leaves = [tensors[n].clone().requires_grad_() for n in learned]
    assert torch.autograd.gradcheck(mean, leaves, eps=1e-6, atol=1e-8, rtol=1e-7)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_is_float32_maths(case: Case, dtype: torch.dtype) -> None:
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.inputs().items()}
    single = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    a, a_grads = case.gradients(half)
    b, b_grads = case.gradients(single)
    assert a.loss.dtype == torch.float32
    assert same_bits(a.loss, b.loss)
    for name in a.metrics:
        assert same_bits(a.metrics[name], b.metrics[name]), name
    for name in a_grads:
        assert same_bits(a_grads[name], b_grads[name].to(dtype)), name


@every_case
def test_float32_agrees_with_float64(case: Case) -> None:
    wide = {n: t.float().double() if t.is_floating_point() else t for n, t in case.inputs().items()}
    narrow = {n: t.float() if t.is_floating_point() else t for n, t in wide.items()}
    a, a_grads = case.gradients(narrow)
    b, b_grads = case.gradients(wide)
    assert a.loss.dtype == torch.float32
    torch.testing.assert_close(a.loss.double(), b.loss, rtol=1e-5, atol=3e-6)
    for name in a_grads:
        torch.testing.assert_close(a_grads[name].double(), b_grads[name], rtol=1e-5, atol=1e-6)


@every_case
def test_strides_do_not_matter(case: Case) -> None:
    tensors = case.inputs()

    def strided(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor.t().contiguous().t()
        return torch.stack([tensor, tensor], dim=1)[:, 0]

    output, grads = case.gradients(tensors)
    other, other_grads = case.gradients({n: strided(t) for n, t in tensors.items()})
    close = {"rtol": 1e-13, "atol": 1e-14}  # vectorised and scalar exp differ in the last bit
    torch.testing.assert_close(other.loss, output.loss, **close)
    for name in grads:
        torch.testing.assert_close(other_grads[name], grads[name], **close)


@pytest.mark.parametrize("case", [c for c in CASES if c.log_prob_names], ids=lambda case: case.id)
@pytest.mark.parametrize("far", [-40.0, -90.0, -1e4], ids=str)
def test_extreme_log_probs_are_finite_or_refused(case: Case, far: float) -> None:
    """One entry of one tensor is tiny, in float32: the result is finite, or the overflow is named."""
    for name in case.log_prob_names:
        tensors = case.inputs(dtype=torch.float32)
        tensors[name][0] = far
        tensors[case.log_prob_names[0]].flatten()[1] = -0.0
        try:
            output, grads = case.gradients(tensors)
        except ValueError as error:
            assert re.search("overflows? torch.float32", str(error))  # noqa: PT017
            assert far < -40 or case.name == "p3o"  # a product over tokens
        else:
            assert output.loss.isfinite().all()
            assert all(g.isfinite().all() for g in grads.values())


@masked_case
def test_nothing_unmasked_gives_zero_and_zero_gradient(case: Case) -> None:
    tensors = case.inputs()
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    output, grads = case.gradients(tensors)
    assert output.mean() == 0
    assert all(g.eq(0).all() for g in grads.values())


@every_case
def test_log_probs_that_cannot_be_are_refused(case: Case) -> None:
    for name, tensor in case.inputs().items():
        if not name.endswith("logps"):
            continue
        for bad in (torch.nan, -torch.inf, torch.inf, 3.0):
            tensors = case.inputs()
            tensors[name] = tensor.clone()
            tensors[name][0] = bad
            with pytest.raises(ValueError, match=rf"\b{name} holds"):
                case(tensors)


def wrong_versions(name: str, tensor: Tensor, *, alone: bool) -> list[tuple[str, object]]:
    """Tensors that must be refused in place of this one; ``alone``: no other tensor tells how many tokens there are."""
    wrong: list[tuple[str, object]] = [
        ("a row too few", tensor[:-1]),
        ("a dimension too many", tensor.unsqueeze(-1)),
        ("a dimension in front", tensor.unsqueeze(0)),
        ("one row, broadcastable", tensor[:1]),
        ("a number", 1.0),
    ]
    if tensor.ndim == 2 and not alone:
        wrong += [("one column, broadcastable", tensor[:, :1]), ("a column too few", tensor[:, :-1])]
        if name != "advantages":  # the one tensor that may be per row or per token
            wrong.append(("per row", tensor[:, 0]))
    if tensor.is_floating_point():
        wrong.append(("integers", tensor.nan_to_num(0).long()))
    elif tensor.dtype == torch.bool:
        wrong += [("0 and 1 as integers", tensor.long()), ("0 and 1 as floats", tensor.float())]
    elif name == "group_ids":
        wrong.append(("floats", tensor.float()))
    return wrong


@every_case
def test_wrong_tensors_are_refused(case: Case) -> None:
    matrices = sum(tensor.ndim == 2 for tensor in case.inputs().values())
    for name, tensor in case.inputs().items():
        for what, wrong in wrong_versions(name, tensor, alone=matrices == 1):
            tensors = case.inputs()
            tensors[name] = wrong
            try:
                case(tensors)
            except ValueError as error:
                assert "must" in str(error), f"{name}, {what}: {error}"  # noqa: PT017
                assert any(n in str(error) for n in tensors), f"{name}, {what}: {error}"  # noqa: PT017
            else:
                pytest.fail(f"{name} was accepted with {what}")


@every_case
def test_wrong_hyper_parameters_are_refused(case: Case) -> None:
    tensors = case.inputs()
    for name, parameter in inspect.signature(case.fn).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        for bad in (torch.nan, torch.inf, -1.0, "x", True):
            if bad == -1.0 and name in case.signed:
                continue
            with pytest.raises(ValueError, match=name):
                case.fn(*tensors.values(), **{**case.hyper, name: bad})


def test_a_group_of_one_is_refused_but_not_one_whose_siblings_are_unscored() -> None:
    for case in CASES:
        if case.fn.min_group < 2 or "rewards" not in case.tensor_names or case.name.startswith("kl_policy_gradient"):
            continue  # the KL term of kl_policy_gradient needs no siblings
        tensors = select(case.inputs(), torch.tensor([0, 1, 2, 4, 5, 6, 7]))
        tensors["group_ids"] = torch.tensor([4, 1, 4, 1, 4, 1, 5])
        with pytest.raises(ValueError, match="needs groups of at least"):
            case(tensors)
        tensors["group_ids"] = torch.tensor([4, 1, 4, 1, 4, 1, 4])
        tensors["rewards"][torch.tensor([0, 2, 4])] = torch.nan  # row 6 is now alone
        output, grads = case.gradients(tensors)
        assert output.loss[6].eq(0).all(), case.id
        assert output.counted[6].any(), case.id
        for grad in grads.values():
            assert grad[torch.tensor([0, 2, 4, 6])].eq(0).all(), case.id
            assert grad[1].abs().sum() > 0, case.id
