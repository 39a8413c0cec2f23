"""From an answer's text to plain notation: markup goes, other alphabets' digits and dashes become ASCII, values stay."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["clean", "plain_characters", "text_form"]

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63", "-"),  # hyphens, dashes, minus signs
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        # without width; those of direction come with right-to-left digits
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u2060\u2066\u2067\u2068\u2069\ufeff", None),
        **{0xFF01 + k: chr(0x21 + k) for k in range(94)},  # full-width forms of ASCII
        "\u066b": ".",  # Arabic decimal point and thousands mark
        "\u066c": ",",
        "\u3001": ",",
        "\u2044": "/",
        "\u2215": "/",
        "\u00f7": "/",
        "\u00d7": r"\times ",
        "\u00b7": r"\times ",
        "\u22c5": r"\times ",
        "\u00b0": " degrees ",
        "\u00bd": r" \frac{1}{2}",
        "\u00bc": r" \frac{1}{4}",
        "\u00be": r" \frac{3}{4}",
        "\u2153": r" \frac{1}{3}",
        "\u2154": r" \frac{2}{3}",
        "\u20ac": "EUR ",
        "\u00a3": "GBP ",
        "\u00a5": "JPY ",
        "\u20b9": "INR ",
        "\u2264": r"\leq ",
        "\u2a7d": r"\leq ",
        "\u2265": r"\geq ",
        "\u2a7e": r"\geq ",
        "\u2260": r"\neq ",
        "\u2248": r"\approx ",
        "\u2208": r"\in ",
        "\u221e": r"\infty ",
        "\u03c0": r"\pi ",
        "\u222a": r"\cup ",
        "\u2205": r"\emptyset ",
        "\u00b1": r"\pm ",
        "\u2213": r"\mp ",
        "\u2032": "'",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u3002": ".",
    }
)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_RAISED_RUN = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_LOWERED_RUN = re.compile("[\u2080-\u2089]+")
_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathsf|mathit|boldsymbol|bm|mbox|operatorname)"

# Order matters: an escaped dollar goes before bare ones, a thousands comma before the spacing command within it.
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\s+", " "),  # also keeps the patterns below linear: no two of them can share a long run of spaces
        (r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9])", ""),
        (r"\\\\(?![A-Za-z])", r"\\cr "),  # a row's end is no space
        (r"\\[,;:>]|\\ |~|\\q?quad(?![A-Za-z])", " "),
        (r"\\!|\\(?:displaystyle|textstyle|left|right|[Bb]igg?[lr]?)(?![A-Za-z])|\\[()\[\]]", ""),
        (r"\\\$", "USD "),
        (r"^ ?([+-]?) ?\$(?= ?-?[.0-9][^$]*$)", r"\1USD "),  # one dollar sign is money, two are a formula's edges
        (r"\$", ""),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\cdot(?![A-Za-z])|(?<!\^)\*(?!\*)", r"\\times "),
        (r"\^ ?\{? ?\\(?:circ|degree) ?\}?|\\degree", " degrees "),
        (r"\^ ?(?:\{ ?\\prime ?\}|\\prime(?![A-Za-z]))", "'"),
        (r"\\(?:leqslant|le)(?![A-Za-z])|<=", r"\\leq "),
        (r"\\(?:geqslant|ge)(?![A-Za-z])|>=", r"\\geq "),
        (r"\\ne(?![A-Za-z])|(?<= )!=", r"\\neq "),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset "),
        (r"\\(?:lor|vee)(?![A-Za-z])", " or "),
        (r"\\(?:land|wedge)(?![A-Za-z])", " and "),
        (rf"{_TEXT} ?\{{ ?t ?\}}", " tonne "),  # alone, t is a letter of a formula
        (rf"{_TEXT} ?\{{([^{{}}]*)\}}", r" \1 "),
        (r"(?<=[ 0-9])([ap])\. ?m\.(?![a-z])", r" \1m "),
        ("\u221a ?([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        ("\u221a", r"\\sqrt"),
        (r" {2,}", " "),
    )
)


def plain_characters(text: str) -> str:
    """Dashes, spaces, digits and signs of other alphabets as ASCII or LaTeX; nothing else changes."""
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: "^{" + run.group().translate(_RAISED) + "}", text)
    text = _LOWERED_RUN.sub(lambda run: "_{" + run.group().translate(_LOWERED) + "}", text)
    text = text.translate(_CHARACTERS)
    return "".join(c if c.isascii() or not c.isdecimal() else str(unicodedata.decimal(c)) for c in text)


def _unwrapped(text: str) -> str:
    """Without the marks of bold, code and quotation around it. A prime or a star at the end alone is mathematics."""
    text = text.strip().lstrip("*`\"'").rstrip('`"')
    while text.endswith("*") and not text.endswith("^*"):
        text = text[:-1]
    if text.endswith("'") and text.count("'") == 1 and re.search("[a-z]{3}'$", text):
        text = text[:-1]
    while len(text) > 1 and text[0] == text[-1] == "_":
        text = text[1:-1]
    return text.strip()


def clean(text: str) -> str:
    """Without markup that does not change the value: spacing commands, dollar signs, text boxes, bold, a final full stop."""
    text = _unwrapped(plain_characters(text))
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _unwrapped(text)
    # "1, 2, 3, ..." goes on, and is not the list of three
    return text if text.endswith("..") else text.rstrip(".,;: ")


# What may be written in several ways inside a formula, brought to one. Nothing is removed but spaces and braces.
_FORMS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"([\^_]) ?([A-Za-z0-9])(?![A-Za-z0-9])", r"\1{\2}"),
        (r"\\frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9])(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\}) ?([0-9])(?![0-9])", r"\1{\2}"),
        (r"\\sqrt ?([A-Za-z0-9])(?![A-Za-z0-9])", r"\\sqrt{\1}"),
        (r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\x1f"),  # "\pi r" keeps what ends the command
        (r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<=[0-9]) (?=[A-Za-z])", ""),
    )
)


def text_form(cleaned: str) -> str:
    r"""One form of a cleaned text, such that texts of equal form are the same answer as written (``x^2``, ``x^{2}``)."""
    for pattern, new in _FORMS:
        cleaned = pattern.sub(new, cleaned)
    return cleaned.strip()
