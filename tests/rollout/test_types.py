"""SamplingParams and Rollout refuse what would silently do something else."""

from __future__ import annotations

import dataclasses

import pytest

from rlft.rollout import FastSampler, Rollout, Sampler, SamplingParams, TransformersSampler


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 5.0}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer"),
        ({"temperature": 0.0}, r"temperature must be > 0, got 0.0.*set greedy=True"),
        ({"temperature": -1.0}, r"temperature must be > 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p must be > 0 and <= 1"),
        ({"top_p": 1.1}, "top_p must be > 0 and <= 1"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"min_p": -0.1}, "min_p must be >= 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids must be token ids"),
        ({"greedy": True, "temperature": 0.7, "top_k": 5}, "greedy=True ignores temperature, top_k; leave them out"),
        ({"greedy": True, "top_p": 0.9}, "greedy=True ignores top_p; leave it out"),
    ],
)
def test_params(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams(**{"max_new_tokens": 5, **kwargs})


def test_params_are_frozen_and_normalised():
    params = SamplingParams(5, stop_token_ids=[1, 2], greedy=True, repetition_penalty=1.2)
    assert params.stop_token_ids == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3


def test_rollout_fields_must_fit():
    Rollout([[1, 2]], [[-0.1, -0.2]], [True], 3)
    with pytest.raises(ValueError, match="1 completions, 0 logps and 1 finished"):
        Rollout([[1]], [], [True])
    with pytest.raises(ValueError, match="row 1 has 2 ids and 1 logps"):
        Rollout([[1], [1, 2]], [[-1.0], [-1.0]], [True, True])


def test_both_back_ends_fit_the_protocol():
    assert isinstance(FastSampler.__new__(FastSampler), Sampler)
    assert isinstance(TransformersSampler.__new__(TransformersSampler), Sampler)
