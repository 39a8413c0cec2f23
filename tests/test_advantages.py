from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import advantages
from rlft.advantages import (
    Groups,
    batch_norm,
    gae,
    group_mean,
    group_mean_batch_norm,
    group_norm,
    leave_one_out,
    whiten,
)

F64 = torch.float64
NAN = torch.nan


def rewards(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


BY_GROUP = {"group_mean": group_mean, "leave_one_out": leave_one_out, "group_norm": group_norm}
every_advantage = pytest.mark.parametrize("advantage", BY_GROUP.values(), ids=BY_GROUP)


def test_by_hand() -> None:
    r, ids = rewards(1, 0, 0.5, 3, 5), torch.tensor([7, 7, 7, 2, 2])
    assert group_mean(r, ids).tolist() == [0.5, -0.5, 0, -1, 1]
    assert leave_one_out(r, ids).tolist() == [0.75, -0.75, 0, -2, 2]
    norm = group_norm(r, ids, eps=0.0)
    torch.testing.assert_close(norm, rewards(1, -1, 0, -(0.5**0.5), 0.5**0.5), rtol=1e-14, atol=0)
    norm = group_norm(r, ids, eps=0.0, ddof=0)
    torch.testing.assert_close(norm, rewards(1.5**0.5, -(1.5**0.5), 0, -1, 1), rtol=1e-14, atol=0)


def test_three_right_of_eight() -> None:
    r, ids = rewards(1, 1, 1, 0, 0, 0, 0, 0), torch.zeros(8, dtype=torch.long)
    assert leave_one_out(r, ids)[[0, 7]].tolist() == pytest.approx([5 / 7, -3 / 7], rel=1e-14)
    deviation = (15 / 56) ** 0.5
    assert group_norm(r, ids)[[0, 7]].tolist() == pytest.approx(
        [0.625 / (deviation + 1e-4), -0.375 / (deviation + 1e-4)]
    )
    assert group_norm(r, ids)[[0, 7]].tolist() == pytest.approx([1.2074, -0.7244], abs=6e-5)
    assert group_norm(r, ids, ddof=0)[[0, 7]].tolist() == pytest.approx([1.2907, -0.7744], abs=6e-5)


def test_agrees_with_torch_on_ragged_interleaved_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, 1, 3, 1, 1, 9, 3, 9, 3])
    r = torch.randn(9, generator=generator, dtype=F64)
    for g in ids.unique():
        rows = ids == g
        x = r[rows]
        torch.testing.assert_close(group_mean(r, ids)[rows], x - x.mean(), rtol=1e-13, atol=1e-15)
        others = (x.sum() - x) / (len(x) - 1)
        torch.testing.assert_close(leave_one_out(r, ids)[rows], x - others, rtol=1e-13, atol=1e-15)
        for ddof in (0, 1):
            expected = (x - x.mean()) / (x.std(correction=ddof) + 0.01)
            torch.testing.assert_close(group_norm(r, ids, eps=0.01, ddof=ddof)[rows], expected, rtol=1e-13, atol=1e-15)


def test_identities_between_them() -> None:
    generator = torch.Generator().manual_seed(1)
    r, ids, n = torch.randn(8, generator=generator, dtype=F64), torch.tensor([0, 1] * 4), 4
    mean, loo, norm = group_mean(r, ids), leave_one_out(r, ids), group_norm(r, ids, eps=0.0)
    torch.testing.assert_close(mean, (n - 1) / n * loo, rtol=1e-14, atol=1e-15)
    std = torch.stack([r[ids == g].std() for g in (0, 1)])[ids]
    torch.testing.assert_close(loo, n / (n - 1) * std * norm, rtol=1e-13, atol=1e-15)


@every_advantage
def test_shift_scale_and_permutation(advantage) -> None:
    generator = torch.Generator().manual_seed(2)
    r, ids = torch.randn(10, generator=generator, dtype=F64), torch.tensor([4, 1] * 5)
    found = advantage(r, ids)
    torch.testing.assert_close(advantage(r + 100 * ids, ids), found, rtol=1e-10, atol=1e-12)
    order = torch.randperm(10, generator=generator)
    torch.testing.assert_close(advantage(r[order], ids[order]), found[order], rtol=1e-13, atol=1e-15)
    assert found[ids == 4].sum().abs() < 1e-14
    if advantage is group_norm:
        torch.testing.assert_close(group_norm(7 * r, ids, eps=0.0), group_norm(r, ids, eps=0.0), rtol=1e-12, atol=1e-15)
    else:
        torch.testing.assert_close(advantage(7 * r, ids), 7 * found, rtol=1e-12, atol=1e-15)


@every_advantage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_exactly_zero(advantage, dtype: torch.dtype) -> None:
    """The mean of three 0.1 is not 0.1 in floating point; dividing that by a tiny std must not blow up."""
    for value in (0.1, 1 / 3, -7.3, 1e30, 0.0):
        r = torch.full((7,), value, dtype=dtype)
        found = advantage(r, torch.tensor([0, 0, 0, 1, 1, 1, 1]))
        assert found.eq(0).all(), value
    assert group_norm(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long), eps=0.0).eq(0).all()


@every_advantage
def test_huge_rewards_stay_finite(advantage) -> None:
    found = advantage(torch.tensor([1e30, -1e30, 0.0]), torch.zeros(3, dtype=torch.long))
    assert found.isfinite().all()
    assert found[0] > 0.9
    assert found[0].item() == pytest.approx(-found[1].item(), rel=1e-6)


@every_advantage
def test_unscored_rows_are_no_members(advantage) -> None:
    ids = torch.tensor([0, 0, 0, 1, 0, 1, 1])
    r = rewards(1.0, NAN, 0.25, 2.0, -1.0, NAN, NAN)
    found = advantage(r, ids)
    kept = torch.tensor([0, 2, 4])
    torch.testing.assert_close(found[kept], advantage(r[kept], ids[kept]), rtol=1e-14, atol=0)
    assert found[[1, 5, 6]].eq(0).all()
    assert found[3] == 0  # its siblings are all unscored
    assert advantage(rewards(NAN, NAN), torch.tensor([0, 0])).eq(0).all()


def test_groups_of_one() -> None:
    r, ids = rewards(1, 2, 3), torch.tensor([5, 5, 8])
    assert group_mean(r, ids)[2] == 0
    for advantage in (leave_one_out, group_norm):
        with pytest.raises(ValueError, match=r"needs groups of at least 2 rows, group 8 has 1; sample 2 or more"):
            advantage(r, ids)


@every_advantage
def test_results_are_constants_and_inputs_unmodified(advantage) -> None:
    r = rewards(1, 2, NAN, 4).requires_grad_()
    before = r.detach().clone()
    assert not advantage(r, torch.zeros(4, dtype=torch.long)).requires_grad
    assert torch.equal(r.detach().nan_to_num(9), before.nan_to_num(9))
    assert advantage(torch.tensor([1.0, 2.0]).bfloat16(), torch.zeros(2, dtype=torch.long)).dtype == torch.float32


@every_advantage
def test_wrong_inputs_are_refused(advantage) -> None:
    r, ids = rewards(1, 2), torch.zeros(2, dtype=torch.long)
    for wrong in ((r[:, None], ids), (r, ids[:1]), (r, ids[:, None]), (r, ids.float()), (r.long(), ids)):
        with pytest.raises(ValueError, match="must"):
            advantage(*wrong)
    with pytest.raises(ValueError, match="rewards must be finite"):
        advantage(rewards(1, torch.inf), ids)
    with pytest.raises(ValueError, match="eps must be >= 0"):
        group_norm(r, ids, eps=-1.0)
    with pytest.raises(ValueError, match="ddof must be 0"):
        group_norm(r, ids, ddof=2)


def test_group_statistics_per_position() -> None:
    """Group 0: rows 0 and 2, row 3 unscored; group 1: row 1 alone; group 2: row 4, unscored."""
    ids, member = torch.tensor([0, 1, 0, 0, 2]), torch.tensor([True, True, True, False, False])
    groups = Groups.of(ids, member)
    x = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 8.0], [99.0, NAN], [-7.0, NAN]], dtype=F64)
    assert groups.count.tolist() == [2, 1, 2, 2, 0]
    assert groups.total(x).tolist() == [[4, 10], [5, 6], [4, 10], [4, 10], [0, 0]]
    assert groups.mean(x).tolist() == [[2, 5], [5, 6], [2, 5], [2, 5], [0, 0]]
    assert groups.centred(x).tolist() == [[-1, -3], [0, 0], [1, 3], [0, 0], [0, 0]]
    assert groups.others_mean(x).tolist() == [[3, 8], [0, 0], [1, 2], [0, 0], [0, 0]]
    assert groups.against_others(x).tolist() == [[-2, -6], [0, 0], [2, 6], [0, 0], [0, 0]]
    assert groups.std(x, ddof=0).tolist() == [[1, 3], [0, 0], [1, 3], [1, 3], [0, 0]]
    sample = torch.tensor([[2, 18], [0, 0], [2, 18], [2, 18], [0, 0]], dtype=F64).sqrt()
    torch.testing.assert_close(groups.std(x, ddof=1), sample, rtol=1e-15, atol=0)
    deep = torch.stack([x, 10 * x], dim=1)  # [B, 2, 2]: every further dimension is a position of its own
    for statistic in (groups.total, groups.mean, groups.centred, groups.others_mean, groups.against_others):
        torch.testing.assert_close(statistic(deep)[:, 0], statistic(x), rtol=0, atol=0)
        torch.testing.assert_close(statistic(deep)[:, 1], 10 * statistic(x), rtol=1e-15, atol=0)


def test_the_others_of_a_large_group_are_not_its_smallest() -> None:
    """Four members, by hand: their mean is 4, that of the others (16 - x) / 3."""
    groups = Groups.of(torch.zeros(4).long(), torch.ones(4).bool(), at_least=4, wanted_by="this test")
    x = torch.tensor([1.0, 4.0, 4.0, 7.0], dtype=F64)
    torch.testing.assert_close(groups.others_mean(x), (16 - x) / 3, rtol=1e-15, atol=0)
    torch.testing.assert_close(groups.against_others(x), x - (16 - x) / 3, rtol=1e-15, atol=1e-15)
    with pytest.raises(ValueError, match="this test needs groups of at least 5 rows, group 0 has 4"):
        Groups.of(torch.zeros(4).long(), torch.ones(4).bool(), at_least=5, wanted_by="this test")


# -- gae --------------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    r = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    v = torch.tensor([[0.5, 0.25, 0.75]], dtype=F64)
    mask = torch.ones(1, 3).bool()
    advantages, returns = gae(r, v, mask, gamma=0.5, lam=0.5)
    # deltas: .5*.25-.5 = -.375 ; .5*.75-.25 = .125 ; 1-.75 = .25
    assert advantages.tolist() == [[-0.375 + 0.25 * (0.125 + 0.25 * 0.25), 0.125 + 0.25 * 0.25, 0.25]]
    assert torch.equal(returns, advantages + v)


def test_gae_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(3, 5, generator=generator, dtype=F64)
    v = torch.randn(3, 5, generator=generator, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    advantages, returns = gae(r, v, mask, gamma=0.9, lam=1.0)
    discounts = 0.9 ** torch.arange(5, dtype=F64)
    for row in range(3):
        n = int(mask[row].sum())
        for t in range(n):
            monte_carlo = (discounts[: n - t] * r[row, t:n]).sum()
            torch.testing.assert_close(returns[row, t], monte_carlo, rtol=1e-12, atol=1e-14)
    advantages, _ = gae(r, v, mask, gamma=0.9, lam=0.0)
    following = torch.cat([v[:, 1:], torch.zeros(3, 1)], 1).where(
        torch.cat([mask[:, 1:], torch.zeros(3, 1).bool()], 1), 0.0
    )
    torch.testing.assert_close(advantages, (r + 0.9 * following - v).where(mask, 0.0), rtol=1e-13, atol=1e-15)


def test_gae_is_the_definition_over_token_subsets() -> None:
    """Gaps are stepped over: packing the unmasked tokens together first gives the same numbers."""
    generator = torch.Generator().manual_seed(1)
    r = torch.randn(4, 6, generator=generator, dtype=F64)
    v = torch.randn(4, 6, generator=generator, dtype=F64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    advantages, returns = gae(r, v, mask, gamma=0.97, lam=0.9)
    assert advantages[~mask].eq(0).all()
    assert returns[~mask].eq(0).all()
    for row in range(3):
        rr, vv = r[row][mask[row]], v[row][mask[row]]
        delta = rr + 0.97 * torch.cat([vv[1:], vv.new_zeros(1)]) - vv
        n = len(rr)
        expected = torch.stack([sum((0.97 * 0.9) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
        torch.testing.assert_close(advantages[row][mask[row]], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("garbage", [NAN, torch.inf, -torch.inf, 1e4])
def test_gae_ignores_masked_slots(garbage: float) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    r, v = torch.rand(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)
    clean = gae(r, v, mask, gamma=0.9, lam=0.8)
    dirty = gae(r.where(mask, garbage), v.where(mask, garbage), mask, gamma=0.9, lam=0.8)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_gae_refuses() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match="gamma must be >= 0 and <= 1"):
        gae(x, x, mask, gamma=1.5, lam=0.9)
    with pytest.raises(ValueError, match="lam must be"):
        gae(x, x, mask, gamma=1.0, lam=-0.1)
    for wrong in ((x[:, :1], x, mask), (x, x[:1], mask), (x, x, mask[:, :1]), (x[:, 0], x[:, 0], mask[:, 0])):
        with pytest.raises(ValueError, match="must"):
            gae(*wrong, gamma=1.0, lam=0.9)
    with pytest.raises(ValueError, match="lam must be >= 0 and <= 1"):
        gae(x, x, mask, gamma=1.0, lam=1.5)
    with pytest.raises(ValueError, match="gamma must be"):
        gae(x, x, mask, gamma=-0.1, lam=1.0)
    with pytest.raises(ValueError, match="values must be finite"):
        gae(x, x + NAN, mask, gamma=1.0, lam=0.9)
    with pytest.raises(ValueError, match="rewards must be finite"):
        gae(x + NAN, x, mask, gamma=1.0, lam=0.9)
    assert gae(x[:, :0], x[:, :0], mask[:, :0], gamma=1.0, lam=0.0)[0].shape == (2, 0)


# -- whitening --------------------------------------------------------------------------------------------------------


def test_whiten() -> None:
    generator = torch.Generator().manual_seed(3)
    x = 5 + 3 * torch.randn(4, 5, generator=generator, dtype=F64)
    mask = torch.rand(4, 5, generator=generator) > 0.3
    kept = x[mask]
    for ddof in (0, 1):
        out = whiten(x.where(mask, NAN), mask, eps=0.0, ddof=ddof)
        torch.testing.assert_close(out[mask], (kept - kept.mean()) / kept.std(correction=ddof), rtol=1e-12, atol=1e-14)
        assert out[~mask].eq(0).all()
    scaled = whiten(x, mask, shift_mean=False, eps=0.0)
    torch.testing.assert_close(scaled[mask], (kept - kept.mean()) / kept.std() + kept.mean(), rtol=1e-12, atol=1e-14)


def test_whiten_edges() -> None:
    x = torch.tensor([[0.1, 0.1, 0.1]])
    for mask in (torch.tensor([[True, False, False]]), torch.ones(1, 3).bool(), torch.zeros(1, 3).bool()):
        assert whiten(x, mask, eps=0.0).eq(0).all()
    only = torch.tensor([[True, False, False]])
    assert whiten(x, only, shift_mean=False).tolist() == [[pytest.approx(0.1), 0, 0]]
    assert not whiten(x.requires_grad_(), only).requires_grad
    with pytest.raises(ValueError, match="ddof must be 0"):
        whiten(x, only, ddof=3)
    with pytest.raises(ValueError, match="shape of values"):
        whiten(x, only[:, :1])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 0.3, 2.0])
def test_whiten_by_hand(ddof: int, eps: float) -> None:
    """1, 2 and 6 count: mean 3, squares 4 + 1 + 9."""
    x, mask = torch.tensor([[1.0, NAN, 2.0], [6.0, -9.0, 50.0]], dtype=F64), torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    deviation = math.sqrt(14 / (3 - ddof) + eps)
    found = whiten(x, mask, eps=eps, ddof=ddof)
    assert found.flatten().tolist() == pytest.approx([v / deviation for v in (-2, 0, -1, 3, 0, 0)], rel=1e-14)
    kept = whiten(x, mask, eps=eps, ddof=ddof, shift_mean=False)
    by_hand = [3 - 2 / deviation, 0, 3 - 1 / deviation, 3 + 3 / deviation, 0, 0]
    assert kept.flatten().tolist() == pytest.approx(by_hand, rel=1e-14)
    r, ids = torch.tensor([1.0, NAN, 2.0, 6.0], dtype=F64), torch.tensor([0, 0, 0, 1])
    batch = batch_norm(r, ids, eps=eps, ddof=ddof)
    assert batch.tolist() == pytest.approx([v / deviation for v in (-2, 0, -1, 3)], rel=1e-14)
    # less the group's mean: -1/2, 1/2 and 0
    deviation = math.sqrt(0.5 / (3 - ddof) + eps)
    centred = group_mean_batch_norm(r, ids, eps=eps, ddof=ddof)
    assert centred.tolist() == pytest.approx([-0.5 / deviation, 0, 0.5 / deviation, 0], rel=1e-14)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_whiten_of_equal_entries_is_exactly_zero(eps: float) -> None:
    """Seven 0.1 have a mean that is not 0.1: what rounding leaves must not be scaled up."""
    for value in (0.1, 1 / 3, -7.3, 1e30, 0.0):
        for size in (1, 2, 7):
            x, mask = torch.full((size,), value), torch.ones(size).bool()
            for ddof in (0, 1):
                assert whiten(x, mask, eps=eps, ddof=ddof).eq(0).all()
                assert torch.equal(whiten(x, mask, eps=eps, ddof=ddof, shift_mean=False), x)


def test_whiten_at_the_ends_of_float32() -> None:
    mask = torch.ones(2).bool()
    for size in (1e-30, 1.0, 1e30):
        found = whiten(torch.tensor([size, -size]), mask, eps=0.0, ddof=0)
        assert found.tolist() == pytest.approx([1, -1], rel=1e-6)
    assert whiten(torch.tensor([1e-30, -1e-30]), mask).abs().max() < 1e-20  # eps is far larger
    assert whiten(torch.zeros(0, 3), torch.zeros(0, 3).bool()).shape == (0, 3)


def test_whiten_refuses() -> None:
    x, mask = torch.tensor([1.0, 2.0]), torch.ones(2).bool()
    for wrong, message in (
        ((x.long(), mask), "values must be floating point"),
        ((x, mask.float()), "mask must be a bool"),
        ((x + NAN, mask), "values must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            whiten(*wrong)
    with pytest.raises(ValueError, match="eps must be >= 0"):
        whiten(x, mask, eps=-1e-6)


def test_reward_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 99.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    found = advantages.reward_to_go(rewards, mask, gamma=0.5)
    assert found.tolist() == [[3.0, 4.0, 4.0], [2.5, 0.0, 3.0]]
    assert advantages.reward_to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [4.0, 0.0, 3.0]]
