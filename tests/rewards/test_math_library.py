"""The reward of math-verify: what it needs, what it hands to the library, what it does without it."""

from __future__ import annotations

import logging
import sys
import threading
import types

import pytest

from rlft.rewards import MathVerifyReward, load_reward, math_library


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs math-verify, which is not installed: pip install 'rlft\[math\]'"):
        load_reward("math_verify")


@pytest.fixture
def library(monkeypatch):
    """A stand-in that records its calls: an answer is read as its text, words not at all."""
    calls = []

    def parse(text, parsing_timeout):
        calls.append(("parse", text, parsing_timeout))
        return [] if "east" in text else [text.strip("$")]

    def verify(gold, read, float_rounding, timeout_seconds):
        calls.append(("verify", timeout_seconds))
        return gold == read or "\\sqrt{8}" in read

    module = types.ModuleType("math_verify")
    module.parse, module.verify = parse, verify
    monkeypatch.setitem(sys.modules, "math_verify", module)
    monkeypatch.setattr(math_library.importlib.util, "find_spec", lambda name: module)
    return calls


def test_the_library_is_asked_about_the_answer_alone(library):
    reward = load_reward({"name": "math_verify", "timeout": 3})
    assert reward.__name__ == "math_verify_reward"
    long = "so " * 40_000
    assert reward([rf"{long} \boxed{{\sqrt{{8}}}}", r"\boxed{7}"], answer=[r"2\sqrt{2}"] * 2) == [1.0, 0.0]
    assert library[:3] == [("parse", r"$2\sqrt{2}$", 3), ("parse", r"$\sqrt{8}$", 3), ("verify", 3)]


def test_equal_text_is_right_unasked_and_no_answer_is_wrong(library):
    reward = MathVerifyReward()
    assert reward([r"\boxed{\text{east}}", r"\boxed{}", "x" * 5000], solution=["east"] * 3) == [1.0, 0.0, 0.0]
    assert library == []


def test_a_reference_it_cannot_read_is_unscored_and_told_once(library, caplog):
    with caplog.at_level(logging.WARNING, logger="rlft.rewards"):
        assert MathVerifyReward()(["#### 5"] * 2, answer=["east"] * 2) == [None, None]
    assert [record.message for record in caplog.records] == [
        "math-verify cannot read the reference 'east': such rows are unscored"
    ]


def test_outside_the_main_thread_no_alarm_is_set(library):
    thread = threading.Thread(target=lambda: MathVerifyReward()(["#### 5"], answer=["6"]))
    thread.start()
    thread.join()
    assert {call[-1] for call in library} == {None}


@pytest.mark.parametrize("options", [{"timeout": 0}, {"float_rounding": -1}])
def test_wrong_settings(library, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MathVerifyReward(**options)


def test_it_needs_a_reference(library):
    with pytest.raises(ValueError, match="needs the column 'answer' or 'solution'"):
        MathVerifyReward()(["5"])


def test_the_real_library():
    pytest.importorskip("math_verify")
    completions = [r"\boxed{\sqrt{8}}", r"\boxed{3}", r"<answer>\frac{4}{\sqrt{2}}</answer>"]
    assert MathVerifyReward()(completions, answer=[r"2\sqrt{2}"] * 3) == [1.0, 0.0, 1.0]
    prose = ["I cannot. 5 is in the question.", r"\boxed{\$5}", "10/2"]
    assert MathVerifyReward()(prose, answer=["5"] * 3) == [0.0, 1.0, 1.0]
