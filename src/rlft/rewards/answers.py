"""Reading a mathematical answer: text in, exact fractions out.

The text comes from a model and is hostile until proved otherwise. Nothing here evaluates anything: a hand-written
reader accepts a closed list of notations, refuses the rest by returning None, never raises, and does work that grows
linearly with the text (a long answer is refused by its length before it is read).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["MAX_CHARS", "Answer", "Items", "Number", "clean", "extract_answer", "parse_answer", "same_answer"]

MAX_CHARS = 1000
"""An answer longer than this is not read."""
MAX_DIGITS = 300
"""A number written with more digits is not read."""
MAX_EXPONENT = 300
"""A power of ten beyond ``10**±300`` is not read."""
MAX_ITEMS = 64
MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value, and whether it was written as a decimal (and so may be a rounded one)."""

    value: Fraction
    decimal: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """Several answers. ``brackets`` is ``"()"``, ``"[)"``, ..., ``"{}"`` for a set, or ``""`` for a bare list.

    Sets and bare lists compare in any order, bracketed ones in the order written.
    """

    items: tuple[Answer, ...]
    brackets: str


Answer = Number | Items

# -- cleaning ---------------------------------------------------------------------------------------------------------
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u2044": "/",
        "\u00d7": r"\times ",
        "\u00b7": r"\times ",
        "\u00b0": " degrees ",
        "\u00bd": r" \frac{1}{2}",
        "\u00bc": r" \frac{1}{4}",
        "\u00be": r" \frac{3}{4}",
        "\u2153": r" \frac{1}{3}",
        "\u2154": r" \frac{2}{3}",
        "\u20ac": "",
        "\u00a3": "",
        "\u00a5": "",
    }
)
# Order matters: an escaped dollar goes before bare ones, a thousands comma before the spacing command within it.
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\s+", " "),  # also keeps the patterns below linear: no two of them can share a long run of spaces
        (r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9])", ""),
        (r"\\[,;:>]|\\ |~|\\q?quad(?![A-Za-z])", " "),
        (r"\\!|\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr)(?![A-Za-z])|\\[()\[\]]", ""),
        (r"\\?\$", ""),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\cdot(?![A-Za-z])|\*(?!\*)", r"\\times "),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", " degrees "),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    )
)


def clean(text: str) -> str:
    """Without markup that does not change the value: spacing commands, dollar signs, text boxes, bold, a final full stop."""
    text = text.strip().strip("*_`\"'").translate(_CHARACTERS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip().strip("*_`\"'").strip().rstrip(".,;:").strip()


# -- one number -------------------------------------------------------------------------------------------------------
_PLAIN = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_GROUPED = r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])(?:\.[0-9]+)?"
_SIGN = re.compile(r"\s*([+-]?)\s*")
_MIXED = re.compile(r"([0-9]+)\s*(?:\s([0-9]+)\s*/\s*([0-9]+)|\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})")
_FRAC = re.compile(
    rf"\\frac\s*(?:\{{\s*([+-]?)\s*({_PLAIN})\s*\}}|\s()([0-9])|()([0-9]))"
    rf"\s*(?:\{{\s*([+-]?)\s*({_PLAIN})\s*\}}|()([0-9]))"
)
_LITERAL = re.compile(rf"{_GROUPED}|{_PLAIN}")
_OVER = re.compile(r"\s*/\s*")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]+)(?![0-9.])")
_TIMES_TEN = re.compile(r"\s*(?:\\times|x|X)\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([+-]?[0-9]+))")
_TEN_TO = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([+-]?[0-9]+))")
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|trillion|dozen)(?![A-Za-z])", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PERCENT = re.compile(r"\s*(?:%|percent(?![A-Za-z])|per cent(?![A-Za-z]))", re.IGNORECASE)
_WORD = re.compile(r"(\s*)(/?)\s*([A-Za-z]+)(?: ?\^ ?\{?-?[0-9]\}?|[\u00b2\u00b3])?")

_UNITS = frozenset(
    "mm cm dm m km in ft yd mi g mg kg t lb lbs oz s sec min h hr hrs ms l L ml mL cl dl gal mph kmh kph rpm "
    "Hz N J W kW V A C F K Pa mol deg rad USD EUR GBP am pm".split()
)
# Words that change what a number means, so a number before them is not the whole answer.
_NOT_UNITS = frozenset(
    "pi e i sqrt root log ln exp sin cos tan sec csc cot mod div plus minus times over choose factorial squared cubed "
    "inf infty infinity or and to is are was be not no more less fewer than at by of if for but either half third "
    "quarter fifth hundredth thousandth".split()
)
_MAX_UNIT_WORDS = 8


def _digits(text: str) -> Fraction | None:
    digits = sum(c.isdigit() for c in text)
    if not 0 < digits <= MAX_DIGITS:
        return None
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _power(text: str) -> Fraction | None:
    # The length is looked at before the value: int() of a long string is slow, and refused above 4300 digits.
    if len(text) > 5 or abs(int(text)) > MAX_EXPONENT:
        return None
    return Fraction(10) ** int(text)


def _unsigned(text: str, start: int) -> tuple[Number, int] | None:
    """The longest number that starts at ``start`` (no sign), and where it ends."""
    if match := _MIXED.match(text, start):
        whole, *parts = (match.group(k) for k in range(1, 6))
        top, bottom = parts[:2] if parts[0] is not None else parts[2:]
        found = _divide(_digits(top), _digits(bottom))
        base = _digits(whole)
        return None if found is None or base is None else (Number(base + found), match.end())
    if match := _FRAC.match(text, start):
        groups = match.groups()
        top, bottom = groups[:6], groups[6:]
        (top_sign, top_text), (bottom_sign, bottom_text) = _first_pair(top), _first_pair(bottom)
        found = _divide(_digits(top_text), _digits(bottom_text))
        if found is None:
            return None
        value = -found if (top_sign == "-") != (bottom_sign == "-") else found
        return Number(value, "." in top_text or "." in bottom_text), match.end()
    if match := _TEN_TO.match(text, start):
        value = _power(match.group(1) or match.group(2))
        return None if value is None else (Number(value), match.end())
    match = _LITERAL.match(text, start)
    if match is None or (value := _digits(match.group())) is None:
        return None
    decimal, end = "." in match.group(), match.end()
    if (over := _OVER.match(text, end)) and (below := _LITERAL.match(text, over.end())):
        found = _divide(value, _digits(below.group()))
        return None if found is None else (Number(found, decimal or "." in below.group()), below.end())
    if power := _EXPONENT.match(text, end) or _TIMES_TEN.match(text, end):
        scale = _power(next(group for group in power.groups() if group is not None))
        return None if scale is None else (Number(value * scale, True), power.end())
    return Number(value, decimal), end


def _first_pair(groups: tuple[str | None, ...]) -> tuple[str, str]:
    """The (sign, digits) of the alternative that matched."""
    for sign, digits in zip(groups[::2], groups[1::2], strict=True):
        if digits is not None:
            return sign or "", digits
    raise AssertionError("one alternative matched")


def _divide(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return None if top is None or bottom is None or bottom == 0 else top / bottom


def _only_units(rest: str) -> bool:
    """Whether ``rest`` is nothing but units ("cm", " km/h", " square feet"): the number before is the answer."""
    position = words = 0
    while position < len(rest):
        match = _WORD.match(rest, position)
        if match is None:
            return not rest[position:].strip()
        space, slash, word = match.groups()
        known = word in _UNITS
        if not known and (word.lower() in _NOT_UNITS or not 2 <= len(word) <= 20 or not (space or slash)):
            return False
        words += 1
        if words > _MAX_UNIT_WORDS:
            return False
        position = match.end()
    return True


def _number(text: str, *, percent: bool) -> Number | None:
    sign = _SIGN.match(text)
    assert sign is not None
    found = _unsigned(text, sign.end())
    if found is None:
        return None
    number, position = found
    value, decimal = number.value, number.decimal
    if match := _SCALE.match(text, position):
        value, position = value * _SCALES[match.group(1).lower()], match.end()
    if match := _PERCENT.match(text, position):
        value, position = value / 100 if percent else value, match.end()
    if not _only_units(text[position:]):
        return None
    return Number(-value if sign.group(1) == "-" else value, decimal)


# -- several numbers --------------------------------------------------------------------------------------------------
_CLOSING = {"(": ")]", "[": "])", "{": "}"}
_AND = re.compile(r"\s+(?:and|or)\s+")


def _split(text: str) -> list[str] | None:
    """The parts between commas that are in no bracket; None for unbalanced, deep or many."""
    parts, start, depth = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        if depth > MAX_DEPTH + 2 or len(parts) > MAX_ITEMS:
            return None
    return None if depth else [*parts, text[start:]]


def _enclosed(text: str) -> bool:
    """Whether the first bracket closes at the last character and not before."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _answer(text: str, *, depth: int, percent: bool) -> Answer | None:
    text = text.strip()
    if not text or depth > MAX_DEPTH:
        return None
    found = _number(text, percent=percent)
    if found is not None:
        return found
    is_set = text.startswith("\\{") and text.endswith("\\}")
    body = "{" + text[2:-2] + "}" if is_set and len(text) >= 4 else text
    if body[0] in _CLOSING and body[-1] in _CLOSING[body[0]] and _enclosed(body):
        brackets = body[0] + body[-1]
        items = _items(body[1:-1], depth=depth + 1, percent=percent)
        if items is None:
            return None
        # (5) and the LaTeX group {5} are only grouping; [5] and \{5\} are a list and a set of one.
        return items[0] if len(items) == 1 and not is_set and brackets in ("()", "{}") else Items(items, brackets)
    if depth:
        return None
    items = _items(_AND.sub(",", text), depth=1, percent=percent, skip_empty=True)
    return Items(items, "") if items is not None and len(items) > 1 else None


def _items(text: str, *, depth: int, percent: bool, skip_empty: bool = False) -> tuple[Answer, ...] | None:
    parts = _split(text)
    if parts is None:
        return None
    if skip_empty:  # "1, 2, and 3"
        parts = [part for part in parts if part.strip()]
    items = tuple(_answer(part, depth=depth, percent=percent) for part in parts)
    return None if any(item is None for item in items) else items  # type: ignore[return-value]


def parse_answer(text: str, *, percent_is_ratio: bool = True) -> Answer | None:
    r"""Read an answer; None when it is in no notation known here.

    Known: integers, decimals, ``a/b``, ``\frac{a}{b}``, mixed numbers (``1 1/2``), thousands separators (comma, space,
    ``{,}``), scientific notation (``1.5e3``, ``1.5 \times 10^3``), signs, percent, ``3 million``, units and currency
    signs around a number, and tuples, lists and sets of these. What stands before the last ``=`` is dropped
    (``x = 5``). ``2x``, ``\sqrt{2}``, ``2\pi`` and ``2^10`` are None: they are not numbers as written here. In a
    bracket a comma always separates; outside, ``1,234`` is a thousand and more, ``1, 2`` two answers.

    Args:
        text: the answer alone, at most ``MAX_CHARS`` characters.
        percent_is_ratio: True reads ``50%`` as 1/2; False drops the sign like a unit.

    Returns:
        The value, or None. Never raises, whatever the text.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        return None
    cleaned = clean(text)
    if len(cleaned) > 2 * MAX_CHARS:
        return None
    if "=" in cleaned:
        cleaned = cleaned.rsplit("=", 1)[1]
    return _answer(cleaned, depth=0, percent=percent_is_ratio)


def same_answer(found: Answer, expected: Answer, *, tolerance: float = 0.0) -> bool:
    """Whether two answers are equal.

    Args:
        found: the answer to judge.
        expected: the reference.
        tolerance: relative to the reference; used only where one of the two was written as a decimal, so that
            0.333 may pass for 1/3 while 7/2 never passes for 10/3. 0 compares exactly.
    """
    if isinstance(found, Number) and isinstance(expected, Number):
        if found.value == expected.value:
            return True
        close = abs(found.value - expected.value) <= Fraction(tolerance) * abs(expected.value)
        return close and (found.decimal or expected.decimal)
    if not isinstance(found, Items) or not isinstance(expected, Items) or found.brackets != expected.brackets:
        return False
    if len(found.items) != len(expected.items):
        return False
    if found.brackets not in ("", "{}"):
        pairs = zip(found.items, expected.items, strict=True)
        return all(same_answer(a, b, tolerance=tolerance) for a, b in pairs)
    left = list(expected.items)
    for item in found.items:
        match = next((k for k, other in enumerate(left) if same_answer(item, other, tolerance=tolerance)), None)
        if match is None:
            return False
        del left[match]
    return True


# -- finding the answer in a completion -------------------------------------------------------------------------------
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_LAST_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?%?")
_TAIL = 4 * MAX_CHARS


def _braced(text: str, start: int) -> str | None:
    """What ``{...}`` at ``start`` (spaces allowed) encloses, braces within balanced; None if it does not close soon."""
    window = text[start : start + MAX_CHARS + 16]
    opened = len(window) - len(window.lstrip())
    if window[opened : opened + 1] != "{":
        return None
    depth = 0
    for position in range(opened, len(window)):
        depth += (window[position] == "{") - (window[position] == "}")
        if depth == 0:
            return window[opened + 1 : position]
    return None


def _last(text: str, marker: re.Pattern[str]) -> re.Match[str] | None:
    found = None
    for found in marker.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    return found


def extract_answer(text: str, markers: tuple[re.Pattern[str], ...], *, fallback: str = "whole") -> str | None:
    r"""The text of the final answer in a completion: what follows the marker that comes last.

    Args:
        text: the completion.
        markers: compiled literals; after one that ends in ``\boxed`` the answer is what the braces enclose, after any
            other it runs to the end of the sentence or line.
        fallback: without a marker: ``"none"``, ``"whole"`` (the whole text, if short enough to be an answer alone) or
            ``"last_number"`` (the last number in the last 4,000 characters).

    Returns:
        The answer's text, or None. Never raises, and takes time linear in the text.
    """
    hits = [hit for hit in (_last(text, marker) for marker in markers) if hit is not None]
    if hits:
        hit = max(hits, key=lambda match: match.end())
        if hit.group().lower().endswith(r"\boxed"):
            return _braced(text, hit.end())
        window = text[hit.end() : hit.end() + 2 * MAX_CHARS].lstrip().lstrip(":*_ ").lstrip()
        end = _SENTENCE_END.search(window)
        return window[: end.start()] if end else window
    if fallback == "whole":
        return text if len(text) <= MAX_CHARS else None
    if fallback == "last_number":
        last = _last(text[-_TAIL:], _LAST_NUMBER)
        return last.group() if last else None
    return None
