r"""From an answer's text to its parts: values, names, relations, lists, choices and words.

``x=3, y=2`` is two named values, ``x \le 3`` the interval ``(-\infty, 3]`` of ``x``, ``(E)`` a choice, ``\text{east}`` a
word. Nothing is evaluated; what is none of these stays a text, and work grows linearly with the text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from rlft.rewards.answers import MAX_CHARS, MAX_ITEMS, Number, read_number
from rlft.rewards.cleaning import clean, text_form
from rlft.rewards.names import NAME, named, top_level
from rlft.rewards.units import Unit, read_unit

__all__ = ["Group", "Leaf", "Named", "Node", "Relation", "read", "readable"]

MAX_DEPTH = 5


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value: its text in one form, and what it was recognised as."""

    form: str
    number: Number | None = None
    infinity: int = 0
    letter: str = ""
    """A letter alone, of a choice or a formula."""
    dressed: bool = False
    """Whether the letter is written as a choice: ``(A)``, ``A. five``."""
    rest: str = ""
    """What a choice says after its letter."""
    words: tuple[str, ...] = ()
    based: tuple[str, str] | None = None
    """Digits and base of ``52_8``."""
    unit: Unit | None = None
    """What a formula is measured in (``10\\pi cm``); a number has its own."""

    @property
    def known(self) -> bool:
        """Whether it is more than a text: two known values are equal or different, never in doubt."""
        choice = bool(self.letter) and (self.dressed or self.letter in "ABCDEFGHIJ")
        return bool(self.number or self.infinity or choice or self.words or self.based)


@dataclass(frozen=True, slots=True)
class Named:
    """``name = value``."""

    name: str
    value: Leaf | Group


@dataclass(frozen=True, slots=True)
class Relation:
    """Two sides and what is between them: an equation to solve, an inequality that is no interval."""

    operator: str
    left: Leaf
    right: Leaf


@dataclass(frozen=True, slots=True)
class Group:
    """Several: ``kind`` is ``""`` for a list, ``"{}"``, ``"∪"`` (these in any order), brackets, or ``":"`` for 4:30."""

    items: tuple[Node, ...]
    kind: str


Node = Leaf | Named | Relation | Group

# A comma before three digits is one of thousands, as in a number alone.
_LIST = re.compile(r";|(?<![0-9]),|,(?![0-9]{3}(?![0-9]))|(?<![A-Za-z\\])(?:and|or|And|Or|OR|AND)(?![A-Za-z])")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}]) ?U ?(?=[(\[{\\])")
_OPERATORS = re.compile(r"\\(?:leq|geq|neq|in|approx|equiv|subset|subseteq|to)(?![A-Za-z])|<|>")
_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_CLOSING = {"(": ")]", "[": "])", "{": "}"}
_INFINITY = re.compile(r"([+-]?) ?(?:\\infty|infinity|inf|oo)", re.IGNORECASE)
_LETTER = re.compile(r"(\(?) ?([A-Za-z]) ?(\)?)")
_CHOICE = re.compile(r"(?:\(([A-Ja-j])\)|([A-J])[).:](?= )) ?(?![,;]|and |or )(.+)", re.DOTALL)
_BASED = re.compile(r"([0-9A-F]+) ?_ ?(?:\{ ?([a-z0-9]+) ?\}|([0-9]+))")
_CLOCK = re.compile(r"([0-9]{1,9}) ?: ?([0-9]{1,9})(?: ?: ?([0-9]{1,9}))?( ?[ap]m)?", re.IGNORECASE)
_LABEL = re.compile(r"([A-Za-z][A-Za-z' ]{2,40}): ?(?=\S)")
_COMPOUND = re.compile(r"[0-9.]+ ?[A-Za-z]+(?: [0-9.]+ ?[A-Za-z]+){1,2}")
_COMPOUND_PART = re.compile(r"[0-9.]+ ?[A-Za-z]+")
_MEASURED = re.compile(
    r"([-(0-9\\].*[^ ]) ((?:(?:square|cubic|sq|cu) )?(?:[A-Za-z]{2,}|m)(?: ?\^ ?\{?[23]\}?)?(?: ?/ ?[A-Za-z]+| per [a-z]+)?)"
)
_MATRIX = re.compile(r"\\begin ?\{([bpvV]?)matrix\}((?:[^\\]|\\(?!begin))*?)\\end ?\{([bpvV]?)matrix\}", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_LONG = re.compile(r"[A-Za-z]{3,}")
_FORMULA_WORDS = re.compile(
    r"(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|log|ln|exp|sqrt|pi|max|min|gcd|lcm|mod|[abc]+|[xyz]+|[a-z][xyzn]+)$"
)
_PREFIX = re.compile(
    r"(?:(?:the|my|final|correct|right) )*(?:(?:answer|option|choice|result|solution)(?: is ?:?| ?:) ?"
    r"|(?:option|choice|answer) (?=\(?[A-J]\)?(?![A-Za-z])))",
    re.IGNORECASE,
)
_ARTICLES = frozenset(("the", "a", "an"))


def read(text: str, *, percent: bool = True) -> Node | None:
    """The parts of an answer; None for an empty or an overlong text.

    Args:
        text: the answer alone.
        percent: whether ``50%`` is 1/2.
    """
    if len(text) > MAX_CHARS:
        return None
    cleaned = clean(text)
    if prefix := _PREFIX.match(cleaned):
        cleaned = cleaned[prefix.end() :].strip() or cleaned
    if not cleaned or len(cleaned) > 3 * MAX_CHARS:
        return None
    return _Reader(percent).node(cleaned, 0)


class _Reader:
    def __init__(self, percent: bool) -> None:
        self.percent = percent

    def node(self, text: str, depth: int) -> Node:
        text = text.strip()
        number = read_number(text, percent=self.percent) or _compound(text)
        if number is not None or depth > MAX_DEPTH:
            return Leaf(text_form(text), number=number)
        if _CHOICE.fullmatch(text):
            return self.leaf(text)
        for separator, kind in ((_LIST, ""), (_UNION, "∪")):
            parts = top_level(text, separator)
            if parts is None:
                return self.leaf(text)
            parts = [part for part in parts if part.strip()]
            if len(parts) > MAX_ITEMS:
                return Leaf(text_form(text))
            if len(parts) > 1:
                return _flat([self.node(part, depth + 1) for part in parts], kind)
        return (
            self.matrix(text, depth)
            or self.bracketed(text, depth)
            or self.related(text, depth)
            or self.several_signs(text, depth)
        )

    def matrix(self, text: str, depth: int) -> Node | None:
        match = _MATRIX.fullmatch(text)
        if match is None or match.group(1) != match.group(3):
            return None
        rows = [row.split("&") for row in match.group(2).split(r"\cr") if row.strip()]
        if not rows or sum(map(len, rows)) > MAX_ITEMS or not all(cell.strip() for row in rows for cell in row):
            return None
        cells = [Group(tuple(self.node(cell, depth + 1) for cell in row), "row") for row in rows]
        return Group(tuple(cells), "determinant" if match.group(1) in "vV" and match.group(1) else "matrix")

    def bracketed(self, text: str, depth: int) -> Node | None:
        is_set = text.startswith("\\{") and text.endswith("\\}") and len(text) > 4
        body = "{" + text[2:-2] + "}" if is_set else text
        if len(body) < 3 or body[0] not in _CLOSING or body[-1] not in _CLOSING[body[0]] or _LETTER.fullmatch(body):
            return None
        level = 0
        for position, character in enumerate(body):
            level += (character in "([{") - (character in ")]}")
            if level == 0 and position < len(body) - 1:
                return None
        parts = top_level(body[1:-1], re.compile("[,;]"))
        if parts is None or len(parts) > MAX_ITEMS or not all(part.strip() for part in parts):
            return None
        items = [self.node(part, depth + 1) for part in parts]
        kind = body[0] + body[-1]
        if len(items) == 1 and not is_set and kind in ("()", "{}"):
            return items[0]  # only grouping
        return Group(tuple(items), kind)

    def related(self, text: str, depth: int) -> Node | None:
        sides = top_level(text, _OPERATORS)
        if sides is not None and len(sides) in (2, 3) and all(side.strip() for side in sides):
            operators = [match.group() for match in _OPERATORS.finditer(text)]
            sides = [side.strip() for side in sides]
            if len(operators) == len(sides) - 1:
                return self.relation(sides, operators, depth)
        if label := _LABEL.match(text):
            return _name(label.group(1).casefold(), self.node(text[label.end() :], depth + 1))
        if "=" not in text:
            return None
        found = named(text)
        if found is None:
            left, _, right = text.rpartition("=")
            return Relation("=", Leaf(text_form(left.strip())), self.leaf(right.strip()))
        name, value = found
        inner = self.node(value, depth + 1)
        if not name or isinstance(inner, (Named, Relation)):
            return inner
        if isinstance(inner, Group) and name.startswith("("):
            each = name[1:-1].split(",")
            if len(each) == len(inner.items):  # (x, y) = (1, 2)
                return _flat([_name(part, item) for part, item in zip(each, inner.items, strict=True)], "")
        if isinstance(inner, Group) and inner.kind == "":
            return _flat([_name(name, item) for item in inner.items], "")
        return Named(name, inner)

    def relation(self, sides: list[str], operators: list[str], depth: int) -> Node:
        left, right = sides[0], sides[-1]
        if len(sides) == 3:
            low, high = operators
            if low in (">", r"\geq") and high in (">", r"\geq"):  # 5 > x > 2
                left, right, low, high = right, left, _FLIPPED[high], _FLIPPED[low]
            if NAME.fullmatch(sides[1]) and {low, high} <= {"<", r"\leq"}:
                ends = (self.node(left, depth + 1), self.node(right, depth + 1))
                return Named(text_form(sides[1]), Group(ends, _interval(low, high)))
            return Relation(f"{low} {high}", Leaf(text_form(f"{left};{sides[1]}")), self.leaf(right))
        (operator,) = operators
        if operator == r"\approx" and not NAME.fullmatch(left):
            return self.node(left, depth + 1)  # 3/5, which is about 0.6
        if operator in (r"\in", r"\approx") and NAME.fullmatch(left):
            return _name(text_form(left), self.node(right, depth + 1))
        if operator in _FLIPPED and NAME.fullmatch(right) and not NAME.fullmatch(left):
            left, right, operator = right, left, _FLIPPED[operator]
        if operator in _FLIPPED and NAME.fullmatch(left):
            bound = self.node(right, depth + 1)
            if operator in ("<", r"\leq"):
                ends = (Leaf(r"-\infty", infinity=-1), bound)
                return Named(text_form(left), Group(ends, _interval("<", operator)))
            return Named(
                text_form(left), Group((bound, Leaf(r"\infty", infinity=1)), _interval(_FLIPPED[operator], "<"))
            )
        return Relation(operator, self.leaf(left), self.leaf(right))

    def several_signs(self, text: str, depth: int) -> Node:
        r"""``1 \pm \sqrt{2}`` is two values."""
        if text.count(r"\pm") == 1 and r"\mp" not in text:
            before, _, after = text.partition(r"\pm")
            plus = f"{before}+{after}" if before.strip() else after
            return Group((self.node(plus, depth + 1), self.node(f"{before}-{after}", depth + 1)), "")
        return self.clock(text) or self.leaf(text)

    def clock(self, text: str) -> Node | None:
        match = _CLOCK.fullmatch(text)
        if match is None:
            return None
        parts = [part for part in match.group(1, 2, 3) if part is not None]
        leaves = [Leaf(str(int(part)), number=Number(Fraction(int(part)))) for part in parts]
        half = match.group(4)
        if half:
            leaves[-1] = Leaf(
                half.strip().lower(), number=read_number(f"{parts[-1]} {half.strip().lower()}", percent=False)
            )
        elif len(parts) == 2 and len(parts[1]) != 2 and (common := math.gcd(int(parts[0]), int(parts[1]))):
            leaves = [Leaf(str(int(part) // common), number=Number(Fraction(int(part) // common))) for part in parts]
            return Group(tuple(leaves), "ratio")  # 4:6 is 2:3, and no time of the day
        return Group(tuple(leaves), ":")

    def leaf(self, text: str) -> Leaf:
        form = text_form(text)
        number = read_number(text, percent=self.percent)
        if number is not None:
            return Leaf(form, number=number)
        if match := _INFINITY.fullmatch(text):
            return Leaf(form, infinity=-1 if match.group(1) == "-" else 1)
        if match := _LETTER.fullmatch(text):
            return Leaf(match.group(2), letter=match.group(2), dressed=bool(match.group(3)))
        if match := _CHOICE.fullmatch(text):
            return Leaf(form, letter=match.group(1) or match.group(2), dressed=True, rest=match.group(3))
        if match := _BASED.fullmatch(text):
            return Leaf(form, based=(match.group(1).lstrip("0"), match.group(2) or match.group(3)))
        if match := _MEASURED.fullmatch(text):
            unit = read_unit(f" {match.group(2)}")
            if unit is not None and unit.powers:
                return Leaf(text_form(match.group(1)), unit=unit)
        if _WORDS.fullmatch(text) and (text.lower() == "no" or _is_prose(text)):
            words = tuple(word for word in text.casefold().replace("-", " ").split() if word not in _ARTICLES)
            return Leaf(form, words=words)
        return Leaf(form)


def _compound(text: str) -> Number | None:
    """``1 hour 30 minutes``, in the base unit."""
    if not _COMPOUND.fullmatch(text):
        return None
    parts = [read_number(part, percent=False) for part in _COMPOUND_PART.findall(text)]
    units = [part.unit for part in parts if part is not None and part.unit is not None]
    if len(units) != len(parts) or len({(unit.powers, unit.nouns) for unit in units}) > 1 or not units[0].powers:
        return None
    total = sum((part.value * unit.size for part, unit in zip(parts, units, strict=True) if part), Fraction(0))
    return Number(total, unit=Unit(Fraction(1), units[0].powers))


def _is_prose(text: str) -> bool:
    long = _LONG.findall(text)
    return bool(long) and not any(_FORMULA_WORDS.match(word) for word in long)


def _name(name: str, item: Node) -> Node:
    return item if isinstance(item, (Named, Relation)) else Named(name, item)


def _interval(low: str, high: str) -> str:
    return ("(" if low == "<" else "[") + (")" if high == "<" else "]")


def _flat(items: list[Node], kind: str) -> Group:
    r"""One list of all parts; ``x = 1, 2`` names both, and ``x = \pm 1`` within a list is two of it."""
    flat: list[Node] = []
    for item in items:
        flat += item.items if isinstance(item, Group) and item.kind == kind == "" else [item]
    if kind == "" and isinstance(flat[0], Named) and not any(isinstance(item, (Named, Relation)) for item in flat[1:]):
        flat = [_name(flat[0].name, item) for item in flat]
    return Group(tuple(flat), kind)


def readable(node: Node | None) -> bool:
    """Whether every value in it is known, so that what differs from it is wrong."""
    if isinstance(node, Leaf):
        return node.known
    if isinstance(node, Named):
        return readable(node.value)
    if isinstance(node, Group):
        return all(readable(item) for item in node.items)
    return False
