"""Verifiers: extraction of the answer, references of every kind, equations, exact match; real data where present."""

from __future__ import annotations

import json
import logging
import os
from decimal import Decimal
from fractions import Fraction as F
from pathlib import Path

import pytest

from rlft.rewards import EquationVerifier, ExactMatch, MathVerifier, RewardSet, completion_text, math_reward

DATA = Path(os.environ.get("RLFT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs the data set {name} (set RLFT_DATA to its folder)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 3 = 5. The final answer is 5.", "5"),
        ("The final answer is: $\\frac{1}{2}$. I hope it is correct.", "$\\frac{1}{2}$"),
        ("THE FINAL ANSWER IS 5\nand more", "5"),
        ("The final answer is\n\n5", "5"),
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed {3}", "3"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("The final answer is \\boxed{7}.", "7"),
        ("#### 1,000", "1,000"),
        ("the final answer is 3.5.", "3.5"),
        ("\\boxed{4} The final answer is 5.", "5"),
        ("İ the final answer is 5", "5"),  # its lower case is longer: positions must not shift
        ("18", "18"),
    ],
)
def test_extraction(completion, answer):
    assert MathVerifier().extract(completion) == answer


def test_fallbacks():
    text = "I think 7 apples, or -3/4 in all"
    assert MathVerifier(fallback="none").extract(text) is None
    assert MathVerifier(fallback="last_number").extract(text) == "-3/4"
    assert MathVerifier(fallback="whole").verify(text, "-3/4") is False
    assert MathVerifier(fallback="last_number").verify(text, "-3/4") is True
    assert MathVerifier(markers=("Answer:",)).verify("#### 4\nAnswer: 5", "5") is True


@pytest.mark.parametrize(
    "reference",
    ["5", 5, 5.0, "5.0", F(5), Decimal(5), "Some steps.\n#### 5", "thus \\boxed{5}", "$5$", "five is 5 = 5"],
)
def test_references_of_every_kind(reference):
    assert MathVerifier().verify("#### 5", reference) is True
    assert MathVerifier().verify("#### 6", reference) is False


@pytest.mark.parametrize(
    "reference", [r"\sum_k k", "x + 1", None, [5], "", float("nan"), float("inf"), Decimal("1e999999999")]
)
def test_an_unreadable_reference_is_unscored(reference, caplog):
    verifier = MathVerifier()
    with caplog.at_level(logging.WARNING, logger="rlft.rewards"):
        assert verifier(completions=["#### 5", "#### 5"], answer=[reference] * 2) == [None, None]
    assert len(caplog.records) == 1
    assert "cannot judge against the reference" in caplog.text


def test_a_decimal_is_what_it_shows():
    assert MathVerifier().verify("#### 1/10", 0.1) is True


def test_symbolic_is_asked_only_when_a_side_is_no_number():
    asked = []

    def symbolic(answer, reference):
        asked.append((answer, reference))
        return None if "?" in answer else answer == "2^3"

    verifier = MathVerifier(symbolic=symbolic)
    assert verifier(completions=["#### 8", "#### 9", "#### 2^3", "#### ?", "nothing here"], answer=["8"] * 5) == [
        1.0,
        0.0,
        1.0,
        None,
        0.0,
    ]
    assert asked == [("2^3", "8"), ("?", "8"), ("nothing here", "8")]


def test_as_a_reward_function():
    output = RewardSet(math_reward)(
        ["p"] * 3,
        ["#### 5", [{"role": "assistant", "content": "#### 5"}], "#### 6"],
        [[1]] * 3,
        {"solution": ["#### 5"] * 3},
    )
    assert output.rewards.tolist() == [1.0, 1.0, 0.0]
    assert output.names == ("math_reward",)
    with pytest.raises(ValueError, match="needs the column 'answer' or 'solution'"):
        math_reward(completions=["5"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"fallback": "wole"}, "did you mean 'whole'"),
        ({"markers": "####"}, "markers must be a list"),
        ({"markers": (), "fallback": "none"}, "no completion can score"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
    ],
)
def test_wrong_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MathVerifier(**kwargs)


# -- equations --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("- number0 number1", F(6)),
        ("* number0 + number1 number1", F(32)),
        ("/ number1 number0", F(1, 4)),
        ("- / number0 number1 number1", F(2)),  # (8 / 2) - 2, not 8 / (2 - 2)
        ("+ number0 0.5", F(17, 2)),
        ("number0", F(8)),
    ],
)
def test_equations(equation, value):
    assert EquationVerifier().evaluate(equation, [8.0, 2.0]) == value


@pytest.mark.parametrize(
    "equation",
    ["", "+", "+ number0", "number0 number1", "+ number0 number1 number1", "/ number0 - number1 number1", "number2",
     "number-1", "number٣", "** number0 number1", "+ number0 x", "+ number0 -1", "+ number0 1e9", "+ number0 " + "9" * 99,
     "+ " * 63 + "number0", "number0 " * 65, "+ " * 10**6, "(" * 10**6, "__import__('os')"],
)  # fmt: skip
def test_malformed_equations(equation):
    assert EquationVerifier().evaluate(equation, [8.0, 2.0]) is None
    assert EquationVerifier()(completions=[equation], numbers=[[8.0, 2.0]], answer=[0.0]) == [0.0]


def test_equation_rewards():
    verifier = EquationVerifier()
    completions = ["- number0 number1", "+ number0 number1", "6", "- number0 number1", "/ number0 number1"]
    answers = [6.0, 6.0, 6.0, None, 3.3333]
    numbers = [[8.0, 2.0]] * 4 + [[10.0, 3.0]]
    assert verifier(completions=completions, numbers=numbers, answer=answers) == [1.0, 0.0, 1.0, None, 1.0]
    strict = EquationVerifier(constants=False, tolerance=0.0)
    assert strict(completions=completions, numbers=numbers, answer=answers) == [1.0, 0.0, 0.0, None, 0.0]


def test_real_equations():
    data = rows("word_problems/train.jsonl") + rows("word_problems/dev.jsonl")
    columns = {"numbers": [r["numbers"] for r in data], "answer": [r["answer"] for r in data]}
    scores = EquationVerifier()(completions=[r["equation"] for r in data], **columns)
    assert sum(scores) / len(data) > 0.99  # a few labels of the data set are wrong
    assert sum(EquationVerifier()(completions=["+ number0 number0"] * len(data), **columns)) / len(data) < 0.03


def test_real_solutions():
    data = rows("gsm8k/test.jsonl")
    solutions = [r["answer"] for r in data]
    assert set(math_reward(completions=solutions, answer=solutions)) == {1.0}
    bare = [f"So the final answer is {s.split('#### ')[1]}." for s in solutions]
    assert set(math_reward(completions=bare, answer=solutions)) == {1.0}
    wrong = math_reward(completions=solutions[1:] + solutions[:1], answer=solutions)
    assert sum(wrong) / len(wrong) < 0.03


# -- exact match and text ---------------------------------------------------------------------------------------------
def test_exact_match():
    completions = [" yes\n", "Yes", "no", "no", [{"role": "assistant", "content": "yes"}]]
    columns = {"answer": ["yes", "yes", "yes", None, ["y", "yes"]]}
    assert ExactMatch()(completions=completions, **columns) == [1.0, 0.0, 0.0, None, 1.0]
    assert ExactMatch(ignore_case=True)(completions=completions, **columns)[1] == 1.0
    with pytest.raises(ValueError, match=r"needs the column 'target'.*known: answer"):
        ExactMatch(column="target")(completions=completions, **columns)


def test_completion_text():
    turns = [
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "again"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "la"}, {"type": "image"}, {"type": "text", "text": "st"}],
        },
        {"role": "tool", "content": "x"},
    ]
    assert completion_text(turns) == "last"
    assert completion_text([{"role": "user", "content": "x"}]) == ""
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    for wrong in (5, [5], [{"role": "assistant", "content": 5}]):
        with pytest.raises(ValueError, match="must be a string or a list"):
            completion_text(wrong)
