"""The figures of docs/rewards.md are those of the verifiers as they are."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from tests.rewards import compare

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def printed(name: str, who: str) -> str:
    rows = compare.sets()[name]
    return compare.line(name, who, compare.scored(compare.verifiers()[who], rows), rows)


def test_the_pairs_are_many_of_every_kind_and_each_once():
    rows = compare.pairs()
    assert len(rows) >= 400
    for right in (True, False):
        assert min(Counter(row["kind"] for row in rows if row["right"] is right).values()) >= 8
    assert len({(row["reference"], row["completion"]) for row in rows}) == len(rows)


def test_no_wrong_pair_is_paid():
    rows = compare.pairs()
    scores = compare.scored(compare.verifiers()["`math`"], rows) if importlib.util.find_spec("sympy") else []
    assert not [row for row, got in zip(rows, scores, strict=False) if got and not row["right"]]


@pytest.mark.parametrize("who", ["`math`", "`math`, `symbolic: true`"])
def test_pairs(who):
    pytest.importorskip("sympy")
    assert printed("pairs", who) in PAGE


@pytest.mark.parametrize("name", ["GSM8K, in a box", "GSM8K, other markers"])
def test_gsm8k(name):
    pytest.importorskip("sympy")
    if compare.references() is None:
        pytest.skip("needs the data set gsm8k/test.jsonl (set RLFT_DATA to the folder that holds gsm8k)")
    assert printed(name, "`math`") in PAGE


@pytest.mark.peers
@pytest.mark.parametrize(("who", "needs"), [("`math_verify`", "math_verify"), ("TRL `accuracy_reward`", "trl")])
def test_other_libraries(who, needs):
    for module in ("math_verify", needs):
        pytest.importorskip(module)
    for name in compare.sets():
        assert printed(name, who) in PAGE
