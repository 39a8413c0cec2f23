from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.data import DataWarning, EpochSampler
from rlft.data.sampler import fold


def take(sampler, n):
    return [next(sampler) for _ in range(n)]


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda bw: st.tuples(st.just(bw[0]), st.just(bw[1]), st.integers(bw[0] * bw[1], 30))
)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, last=st.sampled_from(["keep", "drop"]), seed=st.integers(0, 5), shuffle=st.booleans())
def test_an_epoch_over_all_ranks(sizes, last, seed, shuffle):
    batch_size, world_size, n = sizes
    ranks = [
        EpochSampler(n, batch_size=batch_size, seed=seed, shuffle=shuffle, rank=r, world_size=world_size, last=last)
        for r in range(world_size)
    ]
    steps = ranks[0].steps_per_epoch
    size = batch_size * world_size
    for epoch in range(2):
        seen = []
        for step in range(steps):
            parts = [next(rank) for rank in ranks]
            assert all(rank.epoch == epoch for rank in ranks)
            lengths = [len(part) for part in parts]
            assert min(lengths) >= 1
            assert max(lengths) - min(lengths) <= 1
            if step < steps - 1 or last == "drop":
                assert lengths == [batch_size] * world_size
            seen += [i for part in parts for i in part]
        assert len(set(seen)) == len(seen)  # disjoint between ranks and batches
        assert len(seen) == (n if last == "keep" else n // size * size)
        if not shuffle:
            assert seen == list(range(len(seen)))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, last=st.sampled_from(["keep", "drop"]), steps=st.integers(0, 25))
def test_resume_anywhere_equals_uninterrupted(sizes, last, steps):
    batch_size, world_size, n = sizes
    options = {"batch_size": batch_size, "seed": 3, "rank": world_size - 1, "world_size": world_size, "last": last}
    sampler = EpochSampler(n, **options)
    take(sampler, steps)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = take(sampler, 12)
    resumed = EpochSampler(n, **options)
    resumed.load_state_dict(state)
    assert take(resumed, 12) == expected
    assert resumed.state_dict() == sampler.state_dict()


def test_resume_at_every_position():
    options = {"batch_size": 2, "seed": 1, "world_size": 2, "rank": 1, "last": "keep"}
    straight = take(EpochSampler(11, **options), 12)
    walker = EpochSampler(11, **options)
    for step in range(12):
        resumed = EpochSampler(11, **options)
        resumed.load_state_dict(walker.state_dict())
        assert take(resumed, 12 - step) == straight[step:]
        next(walker)


def test_golden_order():
    # The order is part of what resuming promises: a new version must not change it.
    sampler = EpochSampler(7, batch_size=3, seed=0, last="keep")
    assert take(sampler, 3) == [[2, 3, 1], [4, 0, 6], [5]]
    assert take(sampler, 3) == [[5, 0, 1], [4, 3, 2], [6]]


def test_seeds_and_epochs_differ():
    def order(seed, epoch):
        sampler = EpochSampler(50, batch_size=50, seed=seed)
        return take(sampler, epoch + 1)[epoch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 1) != order(1, 0)  # seed + epoch would make them equal


def test_fold_is_fixed_and_spreads():
    assert fold(0, 0) == 7689419447139100721
    assert len({fold(a, b) for a in range(30) for b in range(30)}) == 900
    assert all(0 <= fold(a, 1) < 2**63 for a in (0, -1, 2**64))


def test_processes_share_the_batches_of_one():
    one = EpochSampler(22, batch_size=4, seed=5, last="keep")
    two = [EpochSampler(22, batch_size=2, seed=5, rank=r, world_size=2, last="keep") for r in range(2)]
    for _ in range(11):
        assert next(one) == next(two[0]) + next(two[1])


def test_global_random_state_is_neither_read_nor_changed():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = take(EpochSampler(20, batch_size=3, seed=0, last="keep"), 20)
    assert states() == before
    torch.manual_seed(123)
    random.seed(5)
    assert take(EpochSampler(20, batch_size=3, seed=0, last="keep"), 20) == first


def test_smaller_than_one_global_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"7 examples, fewer than one global batch of 8 \(batch_size 4 x 2 processes\)"
    ):
        EpochSampler(7, batch_size=4, seed=0, world_size=2)
    assert EpochSampler(8, batch_size=4, seed=0, world_size=2).steps_per_epoch == 1


def test_uneven_last_batch_warns_unless_chosen():
    with pytest.warns(DataWarning, match="last batch of each epoch holds the remaining 3"):
        sampler = EpochSampler(11, batch_size=4, seed=0)
    assert [len(batch) for batch in take(sampler, 4)] == [4, 4, 3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpochSampler(12, batch_size=4, seed=0)
        EpochSampler(11, batch_size=4, seed=0, last="keep")
        dropped = EpochSampler(11, batch_size=4, seed=0, last="drop")
    assert [len(batch) for batch in take(dropped, 4)] == [4, 4, 4, 4]
    assert dropped.steps_per_epoch == 2


def test_too_few_for_a_batch_of_their_own_join_the_one_before():
    ranks = [EpochSampler(13, batch_size=2, seed=0, rank=r, world_size=3, last="keep") for r in range(3)]
    assert ranks[0].steps_per_epoch == 2
    sizes = [[len(next(rank)) for rank in ranks] for _ in range(3)]
    assert sizes[0] == sizes[2] == [2, 2, 2]
    assert sorted(sizes[1]) == [2, 2, 3]


def test_other_batch_size_after_resuming_loses_nothing():
    sampler = EpochSampler(20, batch_size=4, seed=2, last="keep")
    seen = [i for batch in take(sampler, 2) for i in batch]
    resumed = EpochSampler(20, batch_size=3, seed=2, last="keep")
    with pytest.warns(DataWarning, match="global batch was 4 examples and is 3 now"):
        resumed.load_state_dict(sampler.state_dict())
    while resumed.epoch == 0 and resumed.position < 20:
        seen += next(resumed)
    assert sorted(seen) == list(range(20))
    same = EpochSampler(20, batch_size=2, seed=2, world_size=2, last="keep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(sampler.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_examples": 21}, "n_examples 21 -> 20"),
        ({"seed": 9}, "seed 9 -> 2"),
        ({"shuffle": False}, "shuffle False -> True"),
        ({"last": "drop"}, "last 'drop' -> 'keep'"),
        ({"position": 21}, "position"),
        ({"position": -1}, "position"),
        ({"epoch": -1}, "epoch"),
        ({"extra": 1}, "another version"),
    ],
)
def test_state_of_another_run_is_refused(change, said):
    sampler = EpochSampler(20, batch_size=4, seed=2)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=said):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    "options",
    [
        {"n_examples": 0},
        {"n_examples": 2.0},
        {"batch_size": 0},
        {"batch_size": True},
        {"world_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"last": "wrap"},
    ],
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EpochSampler(**{"n_examples": 4, "batch_size": 2, "seed": 0, **options})
