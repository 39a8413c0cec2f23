"""Seeds and uniforms: stable values, distinct streams, and a reference in plain integers."""

from __future__ import annotations

import pytest
import torch

from rlft.rollout import fold_seed
from rlft.rollout.randomness import row_keys, uniforms

MASK = (1 << 64) - 1


def splitmix64(key: int, index: int) -> float:
    """Output ``index`` of the stream, in Python integers."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return (x >> 11) / 2**53


def test_uniforms_are_splitmix64_bit_for_bit():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789], dtype=torch.int64)
    positions = torch.tensor([0, 1, 2, 1000, 2**31, 2**40])
    expected = [[splitmix64(key & MASK, t) for t in positions.tolist()] for key in keys.tolist()]
    assert uniforms(keys, positions.expand(6, 6)).tolist() == expected
    assert uniforms(keys, positions).tolist() == [expected[k][k] for k in range(6)]


def test_the_published_first_output():
    # splitmix64 from seed 1234567 begins 6457827717110365317 (Vigna's reference implementation)
    assert uniforms(torch.tensor([1234567]), torch.tensor([0])).item() == (6457827717110365317 >> 11) / 2**53


def test_uniforms_look_uniform_and_independent():
    u = uniforms(row_keys(0, 50, 20), torch.arange(64).expand(1000, 64))
    assert u.min() >= 0
    assert u.max() < 1
    deviations = u.numel() ** 0.5
    assert abs(u.mean().item() - 0.5) * deviations < 4 * (1 / 12) ** 0.5
    counts = torch.histc(u.float(), 64, 0, 1)
    chi2 = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi2 < 63 + 4 * (2 * 63) ** 0.5
    rows, columns = u[:, :-1] - 0.5, u[:, 1:] - 0.5
    assert abs((rows * columns).mean().item()) * rows.numel() ** 0.5 < 4 / 12
    assert abs(((u[:-1] - 0.5) * (u[1:] - 0.5)).mean().item()) * deviations < 4 / 12


def test_a_rows_key_does_not_depend_on_the_others():
    assert torch.equal(row_keys(7, 3, 4).view(3, 4)[:2, :2], row_keys(7, 2, 2).view(2, 2))
    assert len(set(row_keys(7, 30, 30).tolist())) == 900
    assert not set(row_keys(7, 30, 30).tolist()) & set(row_keys(8, 30, 30).tolist())


def test_fold_seed_is_stable_and_distinct():
    assert fold_seed(0, rank=0, step=0) == 5101129979401281355
    assert fold_seed(42, rank=3, step=7, stream="eval") == 544662322853580966
    seeds = {
        fold_seed(seed, rank=rank, step=step, stream=stream)
        for seed in range(-2, 3)
        for rank in range(8)
        for step in range(100)
        for stream in ("rollout", "eval")
    }
    assert len(seeds) == 5 * 8 * 100 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", ["seed", "rank", "step"])
@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_fold_seed_wants_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        fold_seed(**{"seed": 0, name: value})
