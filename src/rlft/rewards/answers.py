"""Reading a mathematical answer: text in, exact fractions out.

The text comes from a model and is hostile until proved otherwise. Nothing here evaluates anything: a hand-written
reader accepts a closed list of notations, refuses the rest by returning None, never raises, and does work that grows
linearly with the text (a long answer is refused by its length before it is read).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rlft.rewards.cleaning import clean
from rlft.rewards.names import named
from rlft.rewards.units import Unit, agree, read_unit

__all__ = [
    "MAX_CHARS",
    "MAX_DIGITS",
    "MAX_ITEMS",
    "Answer",
    "Items",
    "Number",
    "parse_answer",
    "read_number",
    "same_answer",
]

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
    """An exact value, whether it was written as a decimal (and so may be a rounded one), and the unit it was given in."""

    value: Fraction
    decimal: bool = False
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """Several answers. ``brackets`` is ``"()"``, ``"[)"``, ..., ``"{}"`` for a set, or ``""`` for a bare list.

    Sets and bare lists compare in any order, bracketed ones in the order written.
    """

    items: tuple[Answer, ...]
    brackets: str


Answer = Number | Items

# -- one number -------------------------------------------------------------------------------------------------------
_PLAIN = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_GROUPED = r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])(?:\.[0-9]+)?"
_SIGN = re.compile(r"\s*([+-]?)\s*")
_MIXED = re.compile(
    r"([0-9]+)\s*(?:\s([0-9]+)\s*/\s*([0-9]+)|\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|\\frac ?([0-9]) ?([0-9])(?![0-9]))"
)
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
_CURRENCY = re.compile(r"(?:US ?)?(USD|EUR|GBP|JPY|INR) ?([+-]?) ?(?=[.0-9])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?(?:\{ ?([0-9]+) ?\}|([0-9]))")
_REMARK = re.compile(r" \(([A-Za-z][A-Za-z' -]*)\)$")


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
    if match := _REPEATING.match(text, start):
        value = _repeating(match)
        return None if value is None else (Number(value), match.end())
    if match := _MIXED.match(text, start):
        whole, *parts = match.groups()
        top, bottom = (part for part in parts if part is not None)
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


def _repeating(match: re.Match[str]) -> Fraction | None:
    r"""``0.1\overline{6}``: the digits under the bar are that many nines of the last place."""
    whole, fixed, bar = match.group(1), match.group(2), match.group(3) or match.group(4)
    if len(whole) + len(fixed) + len(bar) > MAX_DIGITS:
        return None
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return head + Fraction(int(bar), (10 ** len(bar) - 1) * 10 ** len(fixed))


def _remark(text: str) -> tuple[str, Unit | None]:
    """The text without words in brackets at its end, and the unit that they name: "72 (seventy-two)", "5 (cm)"."""
    match = _REMARK.search(text)
    if match is None:
        return text, None
    said = match.group(1).replace("-", " ")
    unit = read_unit(" " + said)
    if unit is not None and unit.powers:
        return text[: match.start()], unit
    if (_NUMERAL.search(said) and not _SCALE_WORD.search(said)) or (unit is not None and said.islower()):
        return text[: match.start()], None
    return text, None


_NUMERAL = re.compile(
    r"(?i)\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty"
    r"|seventy|eighty|ninety|hundred|thousand|million|billion|exact|exactly|rounded|approx|approximately|answer)\b"
)
_SCALE_WORD = re.compile(r"(?i)^(?:in )?(?:hundred|thousand|million|billion|trillion|dozen|negative|minus|half)s?$")


def read_number(text: str, *, percent: bool) -> Number | None:
    """One number and its unit, from cleaned text; None where anything else is beside them."""
    text, said = _remark(text) if text.endswith(")") else (text, None)
    sign = _SIGN.match(text)
    assert sign is not None
    start, negative = sign.end(), sign.group(1) == "-"
    money = None
    if currency := _CURRENCY.match(text, start):
        money, start = read_unit(" " + currency.group(1)), currency.end()
        if currency.group(2):
            if sign.group(1):
                return None
            negative = currency.group(2) == "-"
    found = _unsigned(text, start)
    if found is None:
        return None
    number, position = found
    value, decimal = number.value, number.decimal
    if match := _SCALE.match(text, position):
        value, position = value * _SCALES[match.group(1).lower()], match.end()
    if match := _PERCENT.match(text, position):
        value, position = value / 100 if percent else value, match.end()
    unit = money or said
    if rest := text[position:].rstrip():
        unit = read_unit(rest)
        if currency and unit != money:
            unit = read_unit(f" {currency.group(1)} {rest.lstrip()}")  # "$5 per hour"
        if unit is None:
            return None
    return Number(-value if negative else value, decimal, unit)


# -- several numbers --------------------------------------------------------------------------------------------------
_CLOSING = {"(": ")]", "[": "])", "{": "}"}
_SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")
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
    found = read_number(text, percent=percent)
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

    Known: integers, decimals, ``a/b``, ``\frac{a}{b}``, mixed numbers (``1 1/2``), repeating decimals
    (``0.\overline{3}``), thousands separators (comma, space, ``{,}``), scientific notation (``1.5e3``,
    ``1.5 \times 10^3``), signs, percent, ``3 million``, units and currency signs around a number, digits of other
    alphabets, and tuples, lists and sets of these. The name before ``=`` is dropped (``x = 5``), and so is a sum
    (``2 + 3 = 5``); an equation (``2x = 6``) and several (``x=3, y=2``) are None. ``2x``, ``16t``, ``\sqrt{2}``,
    ``2\pi`` and ``2^10`` are None: they are not numbers as written here. In a bracket a comma always separates;
    outside, ``1,234`` is a thousand and more, ``1, 2`` two answers.

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
        if sum("=" in part for part in _SEVERAL.split(cleaned)) > 1:
            return None
        found = named(cleaned)
        if found is None:
            return None
        cleaned = found[1]
    return _answer(cleaned, depth=0, percent=percent_is_ratio)


def same_answer(found: Answer, expected: Answer, *, tolerance: float = 0.0) -> bool:
    """Whether two answers are equal. Units of one kind are converted; a side without a unit means the other's.

    Args:
        found: the answer to judge.
        expected: the reference.
        tolerance: relative to the reference; used only where one of the two was written as a decimal, so that
            0.333 may pass for 1/3 while 7/2 never passes for 10/3. 0 compares exactly.
    """
    if isinstance(found, Number) and isinstance(expected, Number):
        sizes = agree(found.unit, expected.unit)
        if sizes is None:
            return False
        left, right = found.value * sizes[0], expected.value * sizes[1]
        if left == right:
            return True
        close = abs(left - right) <= Fraction(tolerance) * abs(right)
        return close and (found.decimal or expected.decimal)
    if not isinstance(found, Items) or not isinstance(expected, Items):
        return False
    loose = ("", "{}")
    if found.brackets != expected.brackets and not (found.brackets in loose and expected.brackets in loose):
        return False
    if len(found.items) != len(expected.items):
        return False
    if found.brackets not in loose:
        pairs = zip(found.items, expected.items, strict=True)
        return all(same_answer(a, b, tolerance=tolerance) for a, b in pairs)
    rest = list(expected.items)
    for item in found.items:
        match = next((k for k, other in enumerate(rest) if same_answer(item, other, tolerance=tolerance)), None)
        if match is None:
            return False
        del rest[match]
    return True
