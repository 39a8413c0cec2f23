"""What stands before an equals sign: the name of the value after it, a calculation, or one side of an equation."""

from __future__ import annotations

import re

from rlft.rewards.cleaning import text_form

__all__ = ["NAME", "is_prose", "named", "names_agree", "top_level"]

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|"
    "chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell"
)
_LETTER = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![A-Za-z]))"
_SUBSCRIPT = r"(?: ?_ ?(?:\{[A-Za-z0-9 ,+-]{1,12}\}|[A-Za-z0-9]))?"
NAME = re.compile(
    rf"{_LETTER}{_SUBSCRIPT}'{{0,3}}(?: ?\([A-Za-z0-9 ,.+-]{{1,16}}\))?"
    rf"|\( ?{_LETTER}{_SUBSCRIPT}(?: ?, ?{_LETTER}{_SUBSCRIPT}){{1,7}} ?\)"
    r"|(?:m ?)?\\angle ?[A-Z]{1,3}|[A-Z]{2,4}|\|[A-Z]{2}\||\\(?:overline|vec|hat|bar|widehat) ?\{ ?[A-Za-z]{1,3} ?\}"
    r"|\\frac ?\{ ?d ?[a-z] ?\} ?\{ ?d ?[a-z] ?\}"
)
_COMMANDS = re.compile(r"\\(?:frac|times|div|sqrt|cdot|log|ln|sin|cos|tan|pi|binom|degrees?)(?![a-z])")
#: What stands for the value of an expression, whatever letters are bound in it.
_BOUND = re.compile(r"\\(?:lim|int|iint|sum|prod|max|min|gcd|lcm|deg|det|inf|sup)(?![a-z])")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt abs mod xyz abc".split()
)


def top_level(text: str, separator: re.Pattern[str]) -> list[str] | None:
    """``text`` cut at the separators that stand in no bracket; None for brackets that do not match up."""
    # A formula's own braces and brackets of intervals, "(2, 3]", count alike.
    depths, depth = [], 0
    for character in text:
        if character in ")]}":
            depth -= 1
        depths.append(depth)
        if character in "([{":
            depth += 1
        if depth < 0:
            return None
    if depth:
        return None
    parts, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


_EQUALS = re.compile(r"={1,2}")


def named(text: str) -> tuple[str, str] | None:
    r"""The name and the value of one equation, from cleaned text: ``x = 2 + 3 = 5`` is ``("x", "5")``.

    The name is empty for a calculation (``2 + 3 = 5``) and without an equals sign; words are a name (``the total = 5``).

    Returns:
        None for an equation to be solved (``2x = 6``, ``x + y = 5``) and for a missing side.
    """
    sides = top_level(text, _EQUALS)
    if sides is None:
        return None
    sides = [side.strip() for side in sides]
    first, value = sides[0], sides[-1]
    if len(sides) == 1:
        return "", first
    if not first or not value:
        return None
    if NAME.fullmatch(first):
        return text_form(first), value
    if len(sides) == 2 and NAME.fullmatch(value) and not re.search(r"[A-Za-z]", first):
        return text_form(value), first  # 5 = x
    if not re.search(r"[A-Za-z]", _COMMANDS.sub("", first)) or _BOUND.match(first):
        return "", value
    if is_prose(first):
        return first.casefold(), value
    return None


def is_prose(text: str) -> bool:
    """Whether there is a word in it that is no function's name."""
    return any(word not in _FUNCTIONS for word in _PROSE.findall(text))


def names_agree(left: str, right: str) -> bool:
    """Whether two names may be of one thing.

    The same, one of them missing, ``y`` and ``f(x)``, words of which some were left out, words for a letter.
    """
    if not left or not right or left == right:
        return True
    words = [frozenset(name.split()) - {"the", "a", "an", "is"} if is_prose(name) else None for name in (left, right)]
    if words[0] is not None and words[1] is not None:
        return words[0] <= words[1] or words[1] <= words[0]
    pair = {left, right}
    return words != [None, None] or ("y" in pair and any(re.fullmatch(r"[a-z]\([a-z]\)", name) for name in pair))
