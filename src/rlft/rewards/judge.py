"""Whether two answers are the same: True, False, or None where these rules cannot tell.

Equal text is an equal answer; then the parts are compared, each with what it was named, related or measured by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlft.rewards.answers import MAX_CHARS, same_answer
from rlft.rewards.cleaning import clean, text_form
from rlft.rewards.names import names_agree
from rlft.rewards.reading import Group, Leaf, Named, Node, Relation, read, readable
from rlft.rewards.units import agree

__all__ = ["judge", "same_text"]

_ANY_ORDER = ("", "{}", "∪")
_EMPTY = r"\emptyset"
_NEGATIONS = frozenset(("no", "not", "never", "none", "neither", "non", "cannot"))


@dataclass(slots=True)
class _Rules:
    """How leaves are compared; ``symbolic`` is asked about a few, so that a long list does not take long."""

    tolerance: float
    symbolic: Callable[[str, str], bool | None] | None = None
    left: int = 24

    def asked(self, found: str, expected: str) -> bool | None:
        if self.symbolic is None or self.left == 0:
            return None
        self.left -= 1
        return self.symbolic(found, expected)


def judge(
    found: str,
    expected: str,
    *,
    tolerance: float = 0.0,
    percent: bool = True,
    symbolic: Callable[[str, str], bool | None] | None = None,
) -> bool | None:
    """Whether the answer ``found`` is the answer ``expected``.

    Args:
        found: the text of the answer to judge.
        expected: the text of the reference.
        tolerance: relative to the reference, where one side was written as a decimal.
        percent: whether ``50%`` is 1/2.
        symbolic: asked about both texts where their parts do not decide.

    Returns:
        None where the reference is a formula that only ``symbolic`` could compare, or where it is open what was meant.
    """
    if same_text(found, expected):
        return True
    left, right = read(found, percent=percent), read(expected, percent=percent)
    if right is None:
        return None
    if left is not None:
        verdict = _same_parts(left, right, _Rules(tolerance))
        alone = all(isinstance(node, Leaf) and node.unit is None for node in (left, right))
        if verdict is None and symbolic is not None and not alone:
            verdict = _same_parts(left, right, _Rules(tolerance, symbolic))
        if verdict is not None:
            return verdict
        measured = any(isinstance(node, Leaf) and node.unit is not None for node in (left, right))
        if symbolic is not None and not measured and (_words_only(left) or not _words_only(right)):
            return symbolic(found, expected)
    if isinstance(left, Leaf) and isinstance(right, Leaf) and left.letter and right.letter:
        return None  # a and A
    if readable(right) and not readable(left):
        return False
    if _words_only(right) != _words_only(left):
        # "no solution" may be meant by the sign of the empty set
        return None if _EMPTY in (getattr(left, "form", ""), getattr(right, "form", "")) else False
    return None


def same_text(found: str, expected: str) -> bool:
    """Whether two texts are the same but for markup, spaces and braces that change nothing."""
    if max(len(found), len(expected)) > MAX_CHARS:
        return bool(found.strip()) and found == expected
    left, right = clean(found), clean(expected)
    return bool(left) and (left == right or text_form(left) == text_form(right))


def _words_only(node: Node | None) -> bool:
    return isinstance(node, Leaf) and bool(node.words)


def _same_parts(left: Node, right: Node, rules: _Rules) -> bool | None:
    """:func:`judge` on what was read."""
    if isinstance(left, Named) and isinstance(right, Named):
        if not names_agree(left.name, right.name):
            return False
        return _same_parts(left.value, right.value, rules)
    if isinstance(left, Relation) or isinstance(right, Relation):
        return _relations(left, right, rules)
    if isinstance(left, Named) or isinstance(right, Named):
        left, right = _value(left), _value(right)
        return _same_parts(left, right, rules)
    if isinstance(left, Group) and isinstance(right, Group):
        return _groups(left, right, rules)
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return _leaves(left, right, rules)
    one = left if isinstance(left, Leaf) else right
    assert isinstance(one, Leaf)
    return False if one.known else None


def _value(node: Node) -> Node:
    return node.value if isinstance(node, Named) else node


def _relations(left: Node, right: Node, rules: _Rules) -> bool | None:
    if isinstance(left, Relation) and isinstance(right, Relation):
        first = _same_parts(left.left, right.left, rules)
        second = _same_parts(left.right, right.right, rules)
        if left.operator == right.operator:
            return True if first and second else False if first and second is False else None
        return False if first and second else None
    relation, other = (left, right) if isinstance(left, Relation) else (right, left)
    assert isinstance(relation, Relation)
    # An inequality is no value; an equation may be one that sympy solves for a name.
    return None if relation.operator == "=" or isinstance(_value(other), Group) else False


def _leaves(left: Leaf, right: Leaf, rules: _Rules) -> bool | None:
    if left.unit is not None or right.unit is not None:
        return _measured(left, right, rules)
    if left.form == right.form:
        return True
    if left.number is not None and right.number is not None:
        return same_answer(left.number, right.number, tolerance=rules.tolerance)
    if left.letter and right.letter:
        return _letters(left, right)
    for choice, other in ((left, right), (right, left)):
        if choice.rest:  # "(E) 42" for "42"
            said = read(choice.rest)
            return None if said is None else _same_parts(said, other, rules)
    if left.words and right.words:
        return _words(left.words, right.words)
    if left.infinity or right.infinity:
        return left.infinity == right.infinity if left.known and right.known else None
    if left.based or right.based:
        return left.based == right.based if left.known and right.known else None
    return rules.asked(left.form, right.form)


def _measured(left: Leaf, right: Leaf, rules: _Rules) -> bool | None:
    """Formulas with units: the units must agree; those of another size are left open."""
    units = [leaf.unit or (leaf.number.unit if leaf.number else None) for leaf in (left, right)]
    sizes = agree(*units)
    if sizes is None:
        return False
    if sizes[0] != sizes[1]:
        return False if left.form == right.form else None
    if left.form == right.form:
        return True
    return rules.asked(left.form, right.form)


def _letters(left: Leaf, right: Leaf) -> bool | None:
    if left.letter == right.letter:
        return True
    if left.letter.casefold() != right.letter.casefold():
        return False
    # A choice may be written small; in a formula a and A are two things, and bare letters may be either.
    return True if left.dressed or right.dressed else None


def _words(left: tuple[str, ...], right: tuple[str, ...]) -> bool | None:
    if left == right:
        return True
    if bool(_NEGATIONS & set(left)) != bool(_NEGATIONS & set(right)):
        return False
    return None if set(left) & set(right) else False


def _groups(left: Group, right: Group, rules: _Rules) -> bool | None:
    if len(left.items) != len(right.items):
        return False
    names = [[item.name for item in group.items if isinstance(item, Named)] for group in (left, right)]
    complete = [len(found) == len(left.items) for found in names]
    loose = left.kind in _ANY_ORDER and right.kind in _ANY_ORDER
    if complete != [True, True] and True in complete:
        different = len(set(names[complete.index(True)])) > 1
        if different and {left.kind, right.kind} <= {"", "()"}:  # x=1, y=2 for (1, 2)
            return _in_order(left, right, rules)
    if loose:
        return _in_any_order(left, right, rules)
    if {left.kind, right.kind} <= {":", "ratio"}:
        return _clocks(left, right, rules)
    if left.kind == right.kind:
        return _in_order(left, right, rules)
    same = _in_order(left, right, rules)
    # A list without its brackets may stand for the ordered one, or for two solutions.
    return None if same is not False and "" in (left.kind, right.kind) else False


def _clocks(left: Group, right: Group, rules: _Rules) -> bool | None:
    if _in_order(left, right, rules):
        return True
    (a, b, *_), (c, d, *_) = (
        [item.number for item in group.items if isinstance(item, Leaf)] for group in (left, right)
    )
    if len(left.items) != 2 or not (a and b and c and d) or b.unit or d.unit:
        return False
    # 1:20 and 2:40 are two times, or one ratio
    return None if a.value * d.value == b.value * c.value else False


def _in_order(left: Group, right: Group, rules: _Rules) -> bool | None:
    verdicts = [_same_parts(a, b, rules) for a, b in zip(left.items, right.items, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _in_any_order(left: Group, right: Group, rules: _Rules) -> bool | None:
    waiting, doubt = list(right.items), False
    for item in left.items:
        verdicts = [_same_parts(item, other, rules) for other in waiting]
        if True in verdicts:
            del waiting[verdicts.index(True)]
        elif None in verdicts:
            doubt = True
        else:
            return False
    return None if doubt else True
