"""Every public loss against an oracle of its own, in float64, on random cases; `make fuzz` runs 10,000 of each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft import losses
from tests.fuzz import generate
from tests.fuzz.losses import Figures, check, series
from tests.fuzz.oracle import AVERAGING, ORACLE

every_loss = pytest.mark.parametrize("name", losses.__all__)


def test_every_public_loss_has_an_oracle() -> None:
    assert ORACLE.keys() == set(losses.__all__)
    assert {name: AVERAGING.get(name, "mean") for name in ORACLE} == {
        name: getattr(losses, name).reduction for name in losses.__all__
    }


@every_loss
def test_agrees_with_its_oracle(name: str) -> None:
    figures = series(name, 40, every=2)
    assert figures.gradients >= 10


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, len(losses.__all__) - 1))
def test_agrees_with_its_oracle_far_from_the_first_cases(seed: int, index: int) -> None:
    name = losses.__all__[index]
    check(generate.case(name, seed), Figures(name), gradient=True, seed=seed)


@every_loss
@pytest.mark.parametrize("part", ["value", "gradient"])
def test_an_error_of_one_in_a_billion_is_seen(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(losses, name)

    def wrong(*tensors: Any, **hyper: Any) -> Any:
        output = right(*tensors, **hyper)
        off = output.loss * (1 + 1e-9)
        return replace(output, loss=off if part == "value" else output.loss.detach() + (off - off.detach()))

    monkeypatch.setattr(losses, name, wrong)
    with pytest.raises(AssertionError, match=rf"{name} case \d+ .*{part} is off by"):
        series(name, 60, every=2)


@pytest.mark.parametrize("name", ["agro_off_policy", "dpo", "grpo", "kto"])
def test_a_changed_input_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(losses, name)

    def meddling(*tensors: Any, **hyper: Any) -> Any:
        output = right(*tensors, **hyper)
        tensors[1].data[0] = -1.25
        return output

    monkeypatch.setattr(losses, name, meddling)
    with pytest.raises(AssertionError, match="was changed"):
        series(name, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_loss
def test_agrees_with_its_oracle_in_two_thousand_cases(name: str) -> None:
    series(name, 2000, start=10_000)


@pytest.mark.parametrize("margin", [-30.0, 19.0, 21.0, 25.0, 40.0])
def test_found_by_an_oracle(margin: float) -> None:
    """torch's softplus is linear from 20 on, which is 2e-9 off in float64; two losses had it."""
    zero = torch.zeros(1, dtype=torch.float64)
    below = torch.full((1,), -50.0, dtype=torch.float64)
    pair = (below + margin, below, zero - 50, zero - 50)
    want = max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))
    assert losses.generalised_po(*pair, beta=1.0, f="logistic").loss.item() == pytest.approx(want, rel=1e-14, abs=0)
