"""The range a docstring gives for a hyper-parameter is the range that is accepted, to the edge."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.losses.cases import CASES, Case

NUMBER = r"(\d+(?:\.\d+)?)"
RANGE = re.compile(rf"(>=?) {NUMBER}(?![\w^])|\bin ([\[(]){NUMBER}, {NUMBER}([\])])")


def documented(case: Case, name: str) -> tuple[float, bool, float | None, bool] | None:
    """Lowest value and whether it is itself allowed, highest value and whether it is; None for words."""
    entry = re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^$)", inspect.getdoc(case.fn) or "", re.M | re.S)
    assert entry is not None
    found = list(RANGE.finditer(entry[1].replace("tau where A > 0", "").replace("tau where A <= 0", "")))
    if not found:
        return None
    later = len(found) > 1 and "with the term" in entry[1] and case.hyper.get("lr_coef")
    sign, low, left, low_in, high_in, right = found[1 if later else 0].groups()
    if sign:
        return float(low), sign == ">=", None, False
    return float(low_in), left == "[", float(high_in), right == "]"


RANGES = [
    pytest.param(case, p.name, documented(case, p.name), id=f"{case.id}:{p.name}")
    for case in CASES
    for p in inspect.signature(case.fn).parameters.values()
    if p.kind is p.KEYWORD_ONLY and documented(case, p.name)
]


def test_ranges_are_read() -> None:
    by_hand = {
        ("ppo_clip", "clip_eps"): (0.0, False, 1.0, True),
        ("ppo_clip", "dual_clip"): (1.0, False, None, False),
        ("rloo", "beta"): (0.0, True, None, False),
        ("dpo", "beta"): (0.0, False, None, False),
        ("dpo", "label_smoothing"): (0.0, True, 0.5, False),
        ("sapo", "temperature_negative"): (0.0, False, None, False),
    }
    for case in CASES:
        for (loss, name), expected in by_hand.items():
            if case.name == loss:
                assert documented(case, name) == expected


@pytest.mark.parametrize(("case", "name", "bounds"), RANGES)
def test_documented_ranges_hold_to_the_edge(case: Case, name: str, bounds: tuple) -> None:
    low, low_allowed, high, high_allowed = bounds
    tensors = case.inputs()

    def call(value: float) -> None:
        case.fn(*tensors.values(), **{**case.hyper, name: value})

    allowed = [low if low_allowed else low + 0.01]
    refused = [low - 1e-6 if low_allowed else low]
    if high is not None:
        allowed.append(high if high_allowed else high - 0.01)
        refused += [high + 1e-6] if high_allowed else [high, high + 1e-6]
    for value in allowed:
        call(value)
    for value in refused:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            call(value)
