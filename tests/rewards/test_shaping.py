"""Format, length, repetition and overlong rewards, worked by hand; and patterns that would hang."""

from __future__ import annotations

import time

import pytest

from rlft.rewards import LengthReward, RegexReward, RepetitionPenalty, SoftOverlong, TagFormat

GOOD = "<think>\nwhy\n</think>\n<answer>5</answer>"


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (GOOD, True),
        (f"  {GOOD}\n", True),
        ("<think></think><answer></answer>", True),
        (GOOD + " and", False),
        ("so " + GOOD, False),
        ("<answer>5</answer><think>why</think>", False),
        ("<think>why</think> then <answer>5</answer>", False),
        ("<think>why<answer>5</answer></think>", False),
        ("<think>a</think><think>b</think><answer>5</answer>", False),
        ("</think><think><answer>5</answer>", False),
        ("<think>why</think><answer>5", False),
        ("", False),
    ],
)
def test_tags(text, matches):
    assert TagFormat()(completions=[text]) == [float(matches)]


def test_tags_of_ones_own_and_conversations():
    reward = TagFormat(["plan"])
    assert reward(completions=[[{"role": "assistant", "content": "<plan>x</plan>"}], "<plan>"]) == [1.0, 0.0]
    for wrong in ([], "think", [""]):
        with pytest.raises(ValueError, match="tags must be a list"):
            TagFormat(wrong)


def test_regex():
    pattern = r"<think>.*?</think>\s*<answer>[0-9]+</answer>"
    assert RegexReward(pattern)(completions=[GOOD, GOOD + "x", "x" + GOOD]) == [1.0, 0.0, 0.0]
    assert RegexReward(pattern, full=False)(completions=[GOOD + "x"]) == [1.0]
    assert RegexReward("a+", max_chars=3)(completions=["aaa", "aaaa"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+b", r"(a*)*", r"((a+)b?)+", r"(a|b)*", r"(a|aa)+$", r"(?:x+x+)+y", r"([a-z]+)*", r"(a{1,9}){1,}", r"(a)\1",
     r"(?P<x>a)(?P=x)+",
     r"((a)|b)+", r"([\]]+)*", r"([]a]+)*"],
)  # fmt: skip
def test_patterns_that_may_explode_are_refused(pattern):
    with pytest.raises(ValueError, match="may take exponential time"):
        RegexReward(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"(abc)+", r"(a[+*|]b)*", r"(a\+b)*", r"a+b+", r"(a+)b", r"(?:yes|no)", r"[(a+)]+", r"(\(x\))+", r"\\1a"],
)
def test_patterns_that_cannot_are_taken(pattern):
    RegexReward(pattern)


def test_a_pattern_that_does_not_compile():
    with pytest.raises(ValueError, match="is no regular expression"):
        RegexReward("(")


def test_hostile_text_against_a_taken_pattern_is_fast():
    start = time.process_time()
    RegexReward(r"<think>.*?</think>\s*<answer>.*?</answer>")(
        completions=["<think></think><answer>" * 400, "<" * 10**7]
    )
    TagFormat()(completions=["<think>" * 10**6, "<think>" + "</think><answer>" * 10**5])
    assert time.process_time() - start < 2.0


def test_length():
    ids = [[0] * n for n in (0, 5, 10, 15, 20, 100)]
    texts = ["a b"] * 6
    assert LengthReward(10)(completions=texts, completion_ids=ids) == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert LengthReward(2, unit="words")(completions=texts, completion_ids=ids) == [1.0] * 6
    assert LengthReward(6, unit="chars")(completions=texts, completion_ids=ids) == [0.5] * 6
    with pytest.raises(ValueError, match="unit 'token' is unknown; did you mean 'tokens'"):
        LengthReward(10, unit="token")


def test_repetition():
    texts = ["a b c", "a a a a a", "a b a b A B", "a b", ""]
    # bigrams: ab bc | aa x 4 | ab ba ab ba ab | ab | none
    expected = [0.0, -(1 - 1 / 4), -(1 - 2 / 5), 0.0, 0.0]
    assert RepetitionPenalty(2)(completions=texts, completion_ids=[[]] * 5) == pytest.approx(expected)
    tokens = RepetitionPenalty(1, penalty=-2.0, unit="tokens")
    assert tokens(completions=["x"], completion_ids=[[7, 7, 7, 8]]) == pytest.approx([-1.0])
    with pytest.raises(ValueError, match="penalty must be"):
        RepetitionPenalty(2, penalty=1.0)


def test_soft_overlong_is_equation_13_of_dapo():
    ids = [[0] * n for n in (0, 60, 70, 80, 90, 100, 101, 500)]
    assert SoftOverlong(100, 40)(completion_ids=ids) == pytest.approx([0, 0, -0.25, -0.5, -0.75, -1, -1, -1], abs=1e-12)
    with pytest.raises(ValueError, match="cache must be"):
        SoftOverlong(100, 101)
