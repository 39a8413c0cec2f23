"""The expression reader, and the process behind SymbolicChecker: what is equal, what is refused, what is killed."""

from __future__ import annotations

import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.rewards import MathVerifier
from rlft.rewards.latex import MAX_BYTES, parse_expression


def num(text):
    return ["num", text]


X, Y = ["sym", "x"], ["sym", "y"]


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("2x", ["mul", num("2"), X]),
        ("xy", ["mul", X, Y]),
        ("2 - 3 - 4", ["add", num("2"), ["neg", num("3")], ["neg", num("4")]]),
        ("12/3/2", ["div", ["div", num("12"), num("3")], num("2")]),
        ("-x^2", ["neg", ["pow", X, num("2")]]),
        ("2^3^4", ["pow", num("2"), ["pow", num("3"), num("4")]]),
        ("x^{-2}", ["pow", X, ["neg", num("2")]]),
        ("x^-2", ["pow", X, ["neg", num("2")]]),
        ("2x^2", ["mul", num("2"), ["pow", X, num("2")]]),
        (r"2\sqrt{3}", ["mul", num("2"), ["call", "sqrt", num("3")]]),
        (r"\sqrt2", ["call", "sqrt", num("2")]),
        (r"\sqrt[3]{x}", ["pow", X, ["div", num("1"), num("3")]]),
        (r"\frac12", ["div", num("1"), num("2")]),
        (r"\dfrac{x}{2}", ["div", X, num("2")]),
        (r"\left(x+1\right)y", ["mul", ["add", X, num("1")], Y]),
        (r"\sin^2 x", ["pow", ["call", "sin", X], num("2")]),
        (r"\log_{2}(x)", ["div", ["call", "ln", X], ["call", "ln", num("2")]]),
        ("sqrt(2)", ["call", "sqrt", num("2")]),
        ("2pi", ["mul", num("2"), ["const", "pi"]]),
        (r"\theta_1", ["sym", "theta_1"]),
        ("x_{12}", ["sym", "x_12"]),
        ("|x|", ["call", "abs", X]),
        ("5!", ["call", "factorial", num("5")]),
        ("x = 5", num("5")),
        ("x + y = 5", ["eq", ["add", X, Y], num("5")]),
        (r"(-\infty, 3]", ["items", "(]", ["neg", ["const", "oo"]], num("3")]),
        (r"\{x, y\}", ["items", "{}", X, Y]),
        ("x, y", ["items", "", X, Y]),
        ("$x$.", X),
    ],
)
def test_reading(text, tree):
    assert parse_expression(text) == tree


@pytest.mark.parametrize(
    "text",
    ["", " ", "2 3", "2 +", "(", "(2", "2)", "{2", r"\frac{1}", "x^", "^2", "=", "1=2=3", r"\unknown{2}", r"\pm 2 \pm 3", "east",
     "seat", "__import__('os').getpid()", "x.__class__", "lambda: 0", "x'y", "x;y", "x@y", "x\x00", "²", "x_{a+b}", "\\",
     "(" * 41 + "x" + ")" * 41, "9" * 301, "x+" * 201 + "x", "x" + " " * MAX_BYTES],
)  # fmt: skip
def test_what_is_outside_the_grammar(text):
    assert parse_expression(text) is None


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="xyei0123456789.+-*/^!()[]{}|,=_ \\\\ \ud800é", max_size=80) | st.text(max_size=40))
def test_reading_never_raises(text):
    parse_expression(text)
    parse_expression("\\frac" + text + "\\sqrt" + text)


def test_reading_is_fast():
    start = time.process_time()
    for hostile in (
        "{" * 1000,
        "(" * 30 + "x^" * 400,
        "-" * 1000,
        "x^" * 500,
        r"\frac" * 200,
        "!" * 1000,
        "x" + "!" * 399,
    ):
        parse_expression(hostile)
    assert time.process_time() - start < 1.0


# -- the process ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checker():
    pytest.importorskip("sympy")
    from rlft.rewards.symbolic import SymbolicChecker

    with SymbolicChecker(timeout=20.0) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        (r"\frac{x^2-1}{x-1}", "x+1", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+1", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        (r"\sin^2 x + \cos^2 x", "1", True),
        ("2^{10}", "1024", True),
        ("2pi", r"2\pi", True),
        ("6.283185", r"2\pi", False),
        ("2x", "3x", False),
        ("x", "y", False),
        ("i^2", "-1", True),
        (r"\log_2 8", "3", True),
        ("5!", "120", True),
        ("0.5", r"\frac12", True),
        ("x + y = 1", "1 - y = x", True),
        ("x + y = 1", "x + y = 2", False),
        (r"(-\infty, 3]", r"(-\infty, \frac{9}{3}]", True),
        (r"(-\infty, 3]", r"(-\infty, 3)", False),
        (r"\{1, \sqrt{4}\}", r"\{2, 1\}", True),
        (r"(1, \sqrt{4})", "(2, 1)", False),
        (r"(1, \sqrt{4})", "(1, 3)", False),
        (r"\infty", "5", False),
        (r"\frac{1}{0}", "5", False),
        ("nonsense here", "x+1", False),
        ("x+1", "nonsense here", None),
    ],
)
def test_equality(checker, answer, reference, equal):
    assert checker(answer, reference) is equal


def test_answers_are_remembered(checker):
    first = checker("(x+2)^2", "x^2+4x+4")
    pid = checker._process.pid
    checker.close()
    assert checker("(x+2)^2", "x^2+4x+4") is first is True
    assert checker._process is None
    assert checker("(x+3)^2", "x^2+6x+9") is True
    assert checker._process.pid != pid


def test_the_process_has_no_environment_and_no_way_to_write(checker):
    checker("x+x", "2x")
    pid = checker._process.pid
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert not [name for name in file.read().split(b"\0") if name and not name.startswith(b"LC_CTYPE")]
    with open(f"/proc/{pid}/limits") as file:
        limits = {line[:25].strip(): line[25:].split() for line in file}
    assert limits["Max file size"][:2] == ["0", "0"]
    assert limits["Max address space"][:2] == [str(1024 << 20)] * 2
    assert os.getpgid(pid) == pid != os.getpgrp()


def test_a_question_that_takes_too_long_is_unscored_and_the_next_one_answered(caplog):
    pytest.importorskip("sympy")
    from rlft.rewards.symbolic import SymbolicChecker

    with SymbolicChecker(timeout=0.3) as checker:
        verifier = MathVerifier(symbolic=checker)
        for hostile in ("9^{9^{9}}", "100000000!"):
            start = time.monotonic()
            checker._start() if checker._process is None else None  # the time of the question, not of the start
            assert verifier.verify(f"#### {hostile}", "x+1") is None
            assert time.monotonic() - start < 15
            assert checker._process is None
        assert checker.timeouts == 2
        assert sum("out of time (0.3 s) or memory (1024 MB)" in record.message for record in caplog.records) == 1
        checker.timeout = 20.0
        assert verifier.verify("#### 1 + x", "x+1") is True
        assert verifier.verify("#### 7", "8") is False  # numbers never reach the process
        pid = checker._process.pid
    assert not os.path.exists(f"/proc/{pid}")


def test_what_sympy_fails_on_is_unscored_counted_and_told_once(monkeypatch, caplog):
    pytest.importorskip("sympy")
    from rlft.rewards import symbolic
    from rlft.rewards.symbolic import SymbolicChecker

    #: What the reader never gives out: a function that the process refuses, a node that it does not know.
    trees = {"bad": ["call", "system", num("1")], "worse": ["call", "eval", num("2")], "odd": ["add"] * 2}
    monkeypatch.setattr(symbolic, "parse_expression", lambda text: trees.get(text) or parse_expression(text))
    caplog.set_level("WARNING", logger="rlft.rewards")
    with SymbolicChecker(timeout=20.0) as checker:
        assert checker("bad", "x") is None
        assert checker("worse", "x") is None
        assert checker("worse", "x") is None, "a remembered question is not asked again"
        assert checker("odd", "x") is None
        assert checker("x + x", "2x") is True, "the process lives on"
        assert dict(checker.errors) == {"ValueError": 3}
        assert checker.timeouts == 0
    (told,) = [record.message for record in caplog.records]
    assert told == (
        "sympy failed on 'bad' = 'x' with ValueError: system: such answers are unscored (SymbolicChecker.errors counts them)"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb  c"), "!ValueError: a b c"),
        (MemoryError(), "!MemoryError: "),
        (ValueError("é'\ud800"), "!ValueError: \\xe9'\\ud800"),
        (TypeError("x" * 999), "!TypeError: " + "x" * 200),
    ],
)
def test_a_failure_is_one_short_line(error, line):
    from rlft.rewards.symbolic_worker import failure

    assert failure(error) == line


def test_from_threads():
    pytest.importorskip("sympy")
    from rlft.rewards.symbolic import SymbolicChecker

    verdicts = {}
    with SymbolicChecker(timeout=20.0) as checker:

        def ask(k):
            verdicts[k] = checker(f"x + {k}", f"{k} + x"), checker(f"x + {k}", f"{k + 1} + x")

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == dict.fromkeys(range(8), (True, False))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"timeout": 0.0}, "timeout must be > 0"),
        ({"memory_mb": 10}, "memory_mb must be >= 256"),
        ({"cache_size": -1}, "cache_size"),
    ],
)
def test_wrong_settings(kwargs, match):
    from rlft.rewards.symbolic import SymbolicChecker

    with pytest.raises(ValueError, match=match):
        SymbolicChecker(**kwargs)


def test_without_sympy(monkeypatch):
    from rlft.rewards import symbolic

    monkeypatch.setattr(symbolic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rlft\[math\]'"):
        symbolic.SymbolicChecker()
