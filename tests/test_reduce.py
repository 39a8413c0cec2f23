from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft import reduce
from rlft.types import LossOutput

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).bool()
TOKEN_REDUCTIONS = [r for r in reduce.REDUCTIONS if r != "mean"]


def length_of(reduction: str) -> int | None:
    return 7 if reduction == "fixed_length" else None


def test_by_hand() -> None:
    loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [99.0, 99.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert reduce.average(loss, mask, "token_mean") == 10 / 4
    assert reduce.average(loss, mask, "sequence_mean") == (2 + 4) / 2
    assert reduce.average(loss, mask, "sequence_sum") == 10 / 2
    assert reduce.average(loss, mask, "fixed_length", length=8) == 10 / 16
    assert reduce.average(loss[:, 0], mask[:, 0], "mean") == 5 / 2
    assert reduce.masked_mean(loss, mask) == 10 / 4
    assert reduce.masked_mean(loss, torch.zeros_like(mask)) == 0
    assert reduce.sequence_sum(loss, mask).tolist() == [6, 4, 0]
    assert reduce.segment_sum(loss[:, 0], torch.tensor([1, 0, 1]), 3).tolist() == [4, 100, 0]


@pytest.mark.parametrize("reduction", reduce.REDUCTIONS)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2, 3], [4, 5]], [[2], [5, 0], [4], [3, 1]]])
def test_micro_batches_give_the_gradient_of_the_whole(reduction: str, parts: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    length = length_of(reduction)
    mask = MASK.any(-1) if reduction == "mean" else MASK
    features = torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(rows: list[int]) -> Tensor:
        return (features[rows] @ weight).sin()

    (whole,) = torch.autograd.grad(reduce.average(loss(list(range(6))), mask, reduction, length=length), weight)
    count = sum(reduce.denominator(mask[rows], reduction, length=length) for rows in parts)
    total = torch.zeros_like(weight)
    naive = torch.zeros_like(weight)
    for rows in parts:
        piece = reduce.numerator(loss(rows), mask[rows], reduction, length=length) / count
        total += torch.autograd.grad(piece, weight)[0]
        naive += torch.autograd.grad(reduce.average(loss(rows), mask[rows], reduction, length=length), weight)[0] / len(
            parts
        )
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
    if len(parts) > 1:
        assert (naive - whole).abs().max() > 1e-3  # a mean of means is not the mean: the test can fail


@pytest.mark.parametrize("reduction", reduce.REDUCTIONS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_masked_entries_change_nothing(reduction: str, garbage: float) -> None:
    mask = MASK[:, 0] if reduction == "mean" else MASK
    clean = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for filled in (clean, clean.where(mask, garbage)):
        leaf = filled.clone().requires_grad_()
        value = LossOutput(leaf, {}, reduction, mask).mean(length=length_of(reduction))
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1][~mask].eq(0).all()


@pytest.mark.parametrize("reduction", reduce.REDUCTIONS)
def test_nothing_unmasked_is_zero_with_zero_gradient(reduction: str) -> None:
    leaf = torch.rand(3, dtype=torch.float64) if reduction == "mean" else torch.rand(3, 2, dtype=torch.float64)
    leaf.requires_grad_()
    value = reduce.average(leaf, torch.zeros_like(leaf, dtype=torch.bool), reduction, length=length_of(reduction))
    value.backward()
    assert value == 0
    assert leaf.grad.eq(0).all()


def test_average_keeps_the_dtype_of_the_loss() -> None:
    for dtype in (torch.float32, torch.float64):
        assert reduce.average(torch.ones(3, 2, dtype=dtype), torch.ones(3, 2).bool(), "token_mean").dtype == dtype


def test_all_entries_count_without_a_mask() -> None:
    output = LossOutput(torch.tensor([1.0, 2.0, 6.0]), {}, "mean")
    assert output.counted.tolist() == [True] * 3
    assert output.mean() == 3


def test_wrong_use_is_refused() -> None:
    tokens, rows = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="did you mean 'token_mean'"):
        reduce.average(tokens, tokens.bool(), "token_means")
    with pytest.raises(ValueError, match=r"does not fit a loss that is per token"):
        reduce.average(tokens, tokens.bool(), "mean")
    for reduction in TOKEN_REDUCTIONS:
        with pytest.raises(ValueError, match=r"does not fit a loss that is per pair or per sequence"):
            reduce.average(rows, rows.bool(), reduction, length=length_of(reduction))
    with pytest.raises(ValueError, match="give length > 0"):
        reduce.average(tokens, tokens.bool(), "fixed_length")
    with pytest.raises(ValueError, match="does nothing"):
        reduce.average(tokens, tokens.bool(), "token_mean", length=3)
    with pytest.raises(ValueError, match="shape of loss"):
        reduce.average(tokens, tokens.bool()[:, :1], "token_mean")


def test_one_entry_counts_once() -> None:
    loss, mask = torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])
    assert reduce.masked_mean(loss, mask) == 3
    for reduction in TOKEN_REDUCTIONS:
        assert reduce.average(loss, mask, reduction, length=1 if reduction == "fixed_length" else None) == 3
    assert reduce.average(loss[0], mask[0], "mean") == 3


@pytest.mark.parametrize("reduction", reduce.REDUCTIONS)
def test_nothing_unmasked_is_zero_in_float32_too(reduction: str) -> None:
    leaf = torch.ones(3 if reduction == "mean" else (3, 2), requires_grad=True)
    value = reduce.average(leaf, torch.zeros_like(leaf).bool(), reduction, length=length_of(reduction))
    value.backward()
    assert value == 0
    assert leaf.grad.eq(0).all()


def test_parts_refuse_what_the_whole_refuses_and_count_in_float64() -> None:
    tokens, mask = torch.ones(2, 3), torch.ones(2, 3).bool()
    for part in (
        lambda *a, **k: reduce.numerator(tokens, mask, *a, **k),
        lambda *a, **k: reduce.denominator(mask, *a, **k),
    ):
        with pytest.raises(ValueError, match="is unknown"):
            part("token_means")
        with pytest.raises(ValueError, match="does not fit"):
            part("mean")
        for length in (0, -1, None):
            with pytest.raises(ValueError, match="give length > 0"):
                part("fixed_length", length=length)
        part("fixed_length", length=1)
    for reduction in TOKEN_REDUCTIONS:
        assert reduce.denominator(mask, reduction, length=length_of(reduction)).dtype == torch.float64
    assert reduce.denominator(mask[:, 0], "mean").dtype == torch.float64
