"""The answer reader: notations and their exact values, what is refused, and hostile text in linear time."""

from __future__ import annotations

import time
from fractions import Fraction as F

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlft.rewards.answers import MAX_CHARS, Items, Number, parse_answer, same_answer
from rlft.rewards.verifiers import MathVerifier

NUMBERS = {
    "5": F(5),
    "-5": F(-5),
    "− 5": F(-5),
    "+3": F(3),
    "007": F(7),
    "3.14": F(157, 50),
    ".5": F(1, 2),
    "5.": F(5),
    "1,234": F(1234),
    "1,234,567.5": F(2469135, 2),
    "1{,}234": F(1234),
    r"1,\!234": F(1234),
    r"1\,000\,000": F(10**6),
    "1 000 000": F(10**6),
    "1/2": F(1, 2),
    "-3 / 4": F(-3, 4),
    "1.5/2": F(3, 4),
    r"\frac{1}{2}": F(1, 2),
    r"\dfrac{-1}{2}": F(-1, 2),
    r"-\frac{1}{-2}": F(1, 2),
    r"\frac12": F(1, 2),
    r"\frac 1 2": F(1, 2),
    r"\frac1{20}": F(1, 20),
    r"\tfrac{10}3": F(10, 3),
    "1 1/2": F(3, 2),
    "-1 1/2": F(-3, 2),
    r"1\frac{1}{2}": F(3, 2),
    "3½": F(7, 2),
    "50%": F(1, 2),
    r"12.5\%": F(1, 8),
    "50 percent": F(1, 2),
    "1.5e3": F(1500),
    "2E-3": F(1, 500),
    r"1.5 \times 10^{3}": F(1500),
    "1.5 x 10^3": F(1500),
    "1.5×10^-3": F(3, 2000),
    "10^3": F(1000),
    "3 million": F(3 * 10**6),
    "2 dozen": F(24),
    "$5$": F(5),
    r"\$1,000.50": F(2001, 2),
    "-$5": F(-5),
    "€20": F(20),
    "5 dollars": F(5),
    "5 cm": F(5),
    "5cm": F(5),
    r"5\text{ cm}^2": F(5),
    "60 km/h": F(60),
    "60 miles per hour": F(60),
    r"90^\circ": F(90),
    "90°": F(90),
    "x = 5": F(5),
    "2 + 3 = 5": F(5),
    "**5**": F(5),
    r"\(5\)": F(5),
    r"\textbf{5}": F(5),
    "`5`": F(5),
    "(5)": F(5),
    r"\left( 5 \right)": F(5),
    "5;": F(5),
    "٣": F(3),  # digits and dashes of other alphabets
    "१२": F(12),
    "５": F(5),
    "–5": F(-5),
    "‑5": F(-5),
    "١٢٫٥": F(25, 2),
    r"0.\overline{3}": F(1, 3),
    r"1.2\overline{45}": F(1233, 990),
    "72 (seventy-two)": F(72),
    r"\$5": F(5),
    "$5": F(5),
    "$5 per hour": F(5),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    found = parse_answer(text)
    assert isinstance(found, Number), text
    assert found.value == NUMBERS[text]


NOT_NUMBERS = """2x|2 pi|2\\pi|\\sqrt{2}|2\\sqrt{3}|x|2^10|9^9^9|5!|1/0|\\frac{1}{0}|1/2/3|3.14.15|--5|+-5|-|+|.|,|1,23|5 or more|
5 squared|5²|0x10|1_000|inf|nan|infinity|1e|1e5.5|1e999999999|1e-999999999|10^9999999|2 + 3|3-5|1 : 2|5\x00|\x00|5 5 5|
__import__('os').getpid()|5; import os|\\frac{1}|\\frac|{|}|{}|()|(|)|\\boxed{5}|∞|½½|5 i|5i|3 and|e|5 less|12 3""".replace(
    "\n", ""
).split("|")


@pytest.mark.parametrize("text", [*NOT_NUMBERS, "", " ", "5\n\n6", "9" * 301, "(" * 20 + "5" + ")" * 20])
def test_what_is_no_number_is_not_read_as_one(text):
    assert not isinstance(parse_answer(text), Number), text


def numbers(*values):
    return tuple(Number(F(value)) for value in values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1, 2", Items(numbers(1, 2), "")),
        ("2 and 3", Items(numbers(2, 3), "")),
        ("1, 2, and 3", Items(numbers(1, 2, 3), "")),
        ("(1,234)", Items(numbers(1, 234), "()")),
        (r"\left(1, \frac{1}{2}\right)", Items(numbers(1, "1/2"), "()")),
        (r"\{1,2\}", Items(numbers(1, 2), "{}")),
        ("[1, 2)", Items(numbers(1, 2), "[)")),
        ("[5]", Items(numbers(5), "[]")),
        ("((1, 2), 3)", Items((Items(numbers(1, 2), "()"), *numbers(3)), "()")),
    ],
)
def test_several_numbers(text, expected):
    assert parse_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "(1, x)",
        "(1, 2",
        "1, 2)",
        "(1,,2)",
        "x=3, y=2",
        "a=5 or a=-2",
        "2x=6",
        "x + y = 5",
        "(,)",
        "((((((1, 2), 3), 4), 5), 6), 7)",
        "1," * 100,
    ],
)
def test_broken_lists(text):
    assert parse_answer(text) is None


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "equal"),
    [
        ("0.5", "1/2", 0.0, True),
        ("50%", "0.5", 0.0, True),
        ("0.333", "1/3", 0.0, False),
        ("0.333", "1/3", 1e-2, True),
        ("0.333", "1/3", 1e-4, False),
        ("333/1000", "1/3", 1e-2, False),  # nothing here is rounded: fractions compare exactly
        ("-0.333", "1/3", 1e-2, False),
        ("1, 2", "2, 1", 0.0, True),
        (r"\{1, 2\}", r"\{2, 1\}", 0.0, True),
        (r"\{1, 1\}", r"\{1, 2\}", 0.0, False),
        ("(1, 2)", "(2, 1)", 0.0, False),
        ("(1, 2)", "[1, 2]", 0.0, False),
        ("(1, 2)", "(1, 2, 3)", 0.0, False),
        ("(1, 2)", "1", 0.0, False),
        ("(0.333, 1)", "(1/3, 1)", 1e-2, True),
    ],
)
def test_equality(found, expected, tolerance, equal):
    left, right = parse_answer(found), parse_answer(expected)
    assert left is not None
    assert right is not None
    assert same_answer(left, right, tolerance=tolerance) is equal


def test_percent_can_be_a_unit():
    assert parse_answer("50%", percent_is_ratio=False) == Number(F(50))


# -- any text ---------------------------------------------------------------------------------------------------------
ALPHABET = "0123456789.,/%+-−=(){}[]\\$^ eExX*_½٣²\x00\n\ud800" + "frac boxed text times pi"


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=ALPHABET, max_size=60))
def test_never_raises(text):
    parse_answer(text)
    MathVerifier().verify(text, "5")
    MathVerifier(fallback="last_number").verify("#### " + text, text)


@settings(max_examples=100, deadline=None)
@given(st.fractions(max_denominator=10**6), st.booleans())
def test_what_is_printed_is_read_back(value, latex):
    sign = "-" if value < 0 else ""
    text = rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}" if latex else str(value)
    assert parse_answer(text) == Number(value)


@settings(max_examples=100, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_decimals_and_thousands(value):
    assert parse_answer(f"{value:,}") == Number(F(value), True)


MILLION = 10**6
HOSTILE = {
    "nested braces": "{" * MILLION,
    "boxed, never closed": "\\boxed" + "{" * MILLION,
    "boxed in boxed": "\\boxed{" * (MILLION // 7),
    "boxed, closed late": "\\boxed{" + "{}" * (MILLION // 2) + "}",
    "power tower": "#### 9^9^9^9^9",
    "huge exponent": "#### 1e999999999999",
    "huge latex exponent": "#### 10^{" + "9" * MILLION + "}",
    "many digits": "#### " + "9" * MILLION,
    "markers": "####" * (MILLION // 4),
    "phrases": "the final answer is " * (MILLION // 20),
    "unicode digits": "#### " + "٣" * MILLION,
    "nul": "\x00" * MILLION,
    "spaces": "#### 5" + " " * MILLION + "x",
    "spaces within": "#### 1" + " " * 900 + "/" + " " * 90 + "x",
    "commas": "#### " + "1," * 450,
    "fractions": "#### " + "\\frac" * 190,
    "brackets": "#### " + "(" * 900,
    "units": "#### 5 " + "cm" * 450,
    "text commands": "#### " + "\\text{" * 150 + "}" * 90,
    "slashes": "#### " + "1/" * 490,
    "newlines": "\n" * MILLION,
    "a code injection": "#### __import__('os').system('echo no')",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("fallback", ["whole", "last_number"])
def test_hostile_text_is_wrong_and_fast(name, fallback):
    verifier = MathVerifier(fallback=fallback)
    start = time.process_time()
    assert verifier.verify(HOSTILE[name], "5") is False
    verifier.verify("5", HOSTILE[name])  # a hostile reference
    assert time.process_time() - start < 1.0


def test_time_is_linear_in_the_text():
    verifier = MathVerifier()

    def seconds(size):
        text = "\\boxed{ the final answer is #### " * size
        return min(_timed(lambda: verifier.verify(text, "5")) for _ in range(3))

    assert seconds(16_000) < 40 * seconds(1_000) + 0.01  # quadratic would be 256 times


def _timed(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def test_a_long_answer_is_not_read():
    assert parse_answer("5" + " " * MAX_CHARS) is None
    assert parse_answer("5" + " " * (MAX_CHARS - 1)) == Number(F(5))
