"""Units after a number: "cm", "km/h", "square feet", "apples"; what they measure and how large they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Unit", "agree", "read_unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A size and what it is a size of, as powers of base units, and the nouns that no table knows ("apples")."""

    size: Fraction
    powers: tuple[tuple[str, int], ...]
    nouns: frozenset[str] = frozenset()


def _table() -> dict[str, tuple[Fraction, dict[str, int]]]:
    lines = """
    mm millimeter millimetre: 1/1000 m | cm centimeter centimetre: 1/100 m | dm: 1/10 m | m meter metre: 1 m
    km kilometer kilometre: 1000 m | in inch inche: 127/5000 m | ft foot feet: 381/1250 m | yd yard: 1143/1250 m
    mi mile: 201168/125 m | mg milligram: 1/1000 g | g gram: 1 g | kg kilogram kilo: 1000 g | tonne: 1000000 g
    lb lbs pound GBP: 1 pound | oz ounce: 1/16 pound | ms millisecond: 1/1000 s | s sec second: 1 s | min minute: 60 s
    h hr hrs hour: 3600 s | day: 86400 s | week: 604800 s | month: 1 month | year yr: 12 month
    decade: 120 month | century: 1200 month
    l L liter litre: 1/1000 m 3 | ml mL milliliter millilitre: 1/1000000 m 3 | cl cL: 1/100000 m 3 | dl: 1/10000 m 3
    gal gallon: 1 gallon | quart: 1/4 gallon | pint: 1/8 gallon | cup: 1/16 gallon
    deg degree: 1 degree | rad radian: 1 rad | rpm: 1 rpm | Hz hertz: 1 Hz | N newton: 1 N | J joule: 1 J | W watt: 1 W
    kW kilowatt: 1000 W | V volt: 1 V | A amp ampere: 1 A | C celsius: 1 C | F fahrenheit: 1 F | K kelvin: 1 K
    Pa pascal: 1 Pa | mol mole: 1 mol | USD dollar buck: 1 dollar | cent: 1/100 dollar | EUR euro: 1 euro
    JPY yen: 1 yen | INR rupee: 1 rupee | am: 1 am | pm: 1 pm
    """
    found: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for entry in lines.replace("\n", "|").split("|"):
        names, _, meaning = entry.partition(":")
        if meaning:
            size, base, *power = meaning.split()
            for name in names.split():
                found[name] = Fraction(size), {base: int(power[0]) if power else 1}
    hour = Fraction(3600)
    found["mph"] = Fraction(201168, 125) / hour, {"m": 1, "s": -1}
    found["kmh"] = found["kph"] = 1000 / hour, {"m": 1, "s": -1}
    return found


_TABLE = _table()
# Words that change what a number means, so a number before them is not the whole answer.
_NOT_UNITS = frozenset(
    "pi e i sqrt root log ln exp sin cos tan sec csc cot mod div plus minus times over choose factorial squared cubed "
    "inf infty infinity or and to is are was be not no more less fewer than at by of if for but either half third "
    "quarter fifth hundredth thousandth hundred thousand million billion trillion dozen about around above below "
    "under least most negative positive".split()
)
_WORD = re.compile(r"( *)(/?) *([A-Za-z]+)(?: ?\^ ?(?:\{(-?[0-9])\}|(-?[0-9])(?![0-9])))?")
_RAISED = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER = {"squared": 2, "cubed": 3}
_MAX_WORDS = 8


def _known(word: str) -> tuple[Fraction, dict[str, int]] | None:
    """A word of the table: short ones as written, long ones in any capitals and number."""
    if word in _TABLE:
        return _TABLE[word]
    lower = word.lower()
    if len(word) < 3:
        return None
    return _TABLE.get(lower) or _TABLE.get(lower.removesuffix("s")) or _TABLE.get(lower.removesuffix("es"))


def _noun(word: str) -> str | None:
    """A noun that no table knows, in one form; None for what may be a product of letters (``mv``, ``xyz``)."""
    lower = word.lower()
    if not 3 <= len(word) <= 20 or not set("aeiouy") & set(lower) or set(lower) <= set("abcxyz"):
        return None
    if word.isupper():
        return None
    for ending, short in (("ies", "y"), ("es", ""), ("e", ""), ("s", "")):
        if lower.endswith(ending) and len(lower) > len(ending) + 2:
            return lower.removesuffix(ending) + short
    return lower


def read_unit(text: str) -> Unit | None:
    """The unit that ``text``, what stands after a number, spells; None where it is something else.

    A single letter that touches the number (``16t``, ``2m``) is a letter of a formula and no unit; so is ``t`` wherever
    it stands, and a word of two letters that is in no table.
    """
    size, powers, nouns = Fraction(1), dict[str, int](), set[str]()
    position = words = 0
    sign, power_before = 1, 1
    last: tuple[Fraction, dict[str, int], int] | None = None
    while text[position:].strip():
        match = _WORD.match(text, position)
        if match is None or words >= _MAX_WORDS:
            return None
        space, slash, word = match.group(1, 2, 3)
        raised = int(match.group(4) or match.group(5) or 1)
        touches = position == 0 and not space and not slash
        position, words, lower = match.end(), words + 1, word.lower()
        if slash:
            sign = -1
        if lower == "per":
            sign = -1
            continue
        if lower in _RAISED and text[position:].strip():
            power_before = _RAISED[lower]
            continue
        if lower in _AFTER and last is not None:
            known, raised = (last[0], last[1]), last[2] * (_AFTER[lower] - 1)
        else:
            if lower in _NOT_UNITS:
                return None
            known = _known(word)
            if len(word) == 1 and touches and not (known and re.match(r" ?/ ?[A-Za-z]+$", text[position:])):
                return None
            raised *= sign * power_before
        sign, power_before = 1, 1
        if known is None:
            if lower in ("unit", "units"):
                nouns.add("unit")  # of whatever power
                continue
            noun = None if touches else _noun(word)
            if noun is None or raised not in (1, -1):
                return None
            nouns.add(noun if raised == 1 else f"per {noun}")
            continue
        last = (*known, raised)
        size *= known[0] ** raised
        for base, power in known[1].items():
            powers[base] = powers.get(base, 0) + power * raised
    if {"C", "F"} & set(powers):  # degrees of a thermometer
        powers.pop("degree", None)
    return Unit(size, tuple(sorted((base, power) for base, power in powers.items() if power)), frozenset(nouns))


def agree(left: Unit | None, right: Unit | None) -> tuple[Fraction, Fraction] | None:
    """The sizes to multiply two values by before they are compared; None where the units differ in kind.

    Who leaves the unit out means the unit of the other. Further nouns ("apples left") do no harm.
    """
    if left is None or right is None:
        return Fraction(1), Fraction(1)
    nouns = left.nouns <= right.nouns or right.nouns <= left.nouns
    return (left.size, right.size) if nouns and left.powers == right.powers else None
