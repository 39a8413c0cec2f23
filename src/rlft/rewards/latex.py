r"""From LaTeX or plain text to an expression tree of lists and strings, by a reader that evaluates nothing.

A tree is JSON: ``["num", "2.5"]``, ``["sym", "x"]``, ``["const", "pi"]``, ``["add" | "mul", ...]``, ``["neg", a]``,
``["div", a, b]``, ``["pow", a, b]``, ``["call", name, a]``, ``["items", brackets, ...]``, ``["eq", a, b]``.
"""

from __future__ import annotations

import re
from typing import Any

from rlft.rewards.answers import MAX_DIGITS
from rlft.rewards.cleaning import clean

__all__ = ["MAX_BYTES", "Tree", "parse_expression"]

MAX_BYTES = 1024
"""A longer text is not read."""
MAX_TOKENS = 400
MAX_DEPTH = 40

Tree = list[Any]

_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\[A-Za-z]+)|(\\[{}|])|([A-Za-z])|([-+*/^!()\[\]{},=|_]))")
_FUNCTIONS = frozenset(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp abs factorial".split()
)
_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega".split()
)
_CONSTANTS = {"\\pi": "pi", "\\infty": "oo"}
_WORDS = sorted((*_FUNCTIONS, "pi"), key=len, reverse=True)
_RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_SPLIT = re.compile(rf"[A-Za-z]{{0,2}}(?:{'|'.join(_WORDS)})[A-Za-z]{{0,2}}")
_CLOSING = {"(": ")]", "[": "])", "\\{": ("\\}",)}


class _Unreadable(Exception):
    """The text is outside the grammar."""


def parse_expression(text: str, *, names: bool = False) -> Tree | None:
    r"""The expression tree of an answer; None where it is outside the grammar.

    Numbers, one-letter and Greek symbols (with a subscript), ``+ - * / ^ !``, implied multiplication, ``\frac``,
    ``\sqrt[n]{}``, ``|x|``, the usual functions, ``\pi``, ``\infty``, ``e``, ``i``; tuples, intervals, sets, lists (also
    with "or" and one ``\pm``) and one equation sign.

    Args:
        text: at most 1,024 bytes.
        names: keep the name in ``x = 5`` (``["eq", x, 5]``). Without it the value alone is returned, in a list too.

    Returns:
        A tree, or None. Never raises.
    """
    if not isinstance(text, str) or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return None
    try:
        return _Reader(_tokens(_listed(clean(text))), names=names).answer()
    except (_Unreadable, RecursionError):
        return None


_OR = re.compile(r"(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])")
_CURRENCY = re.compile(r"(?<![A-Za-z\\])(?:USD|EUR|GBP|JPY|INR) ?(?=[0-9.(\\])")


def _listed(text: str) -> str:
    r"""With commas for "or" and both values of ``\pm``; without currency signs."""
    text = _CURRENCY.sub("", _OR.sub(",", text))
    if text.count(r"\pm") != 1 or "," in text:
        return text
    before, _, after = text.partition(r"\pm")
    return f"{before}+{after},{before}-{after}"


def _tokens(text: str) -> list[str]:
    for word in _RUN.findall(text):
        if len(word) > 2 and not set(word) <= set("abcxyz") and not _SPLIT.fullmatch(word):
            raise _Unreadable  # "seat" is a word, and not the product that "east" would equal
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        word = next((w for w in _WORDS if text.startswith(w, position)), None)
        if word is not None and not (position and text[position - 1] == "\\"):
            tokens.append("\\" + word)
            position += len(word)
            continue
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position:
            raise _Unreadable
        if match.group(4) and match.start(4) > position:  # after blanks: look again for a word
            position = match.start(4)
            continue
        tokens.append(next(group for group in match.groups() if group is not None))
        position = match.end()
        if len(tokens) > MAX_TOKENS:
            raise _Unreadable
    return tokens


class _Reader:
    """Recursive descent over the tokens; every method consumes what it returns a tree for."""

    def __init__(self, tokens: list[str], *, names: bool = False) -> None:
        self.tokens, self.position, self.depth, self.names = tokens, 0, 0, names

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise _Unreadable
        self.position += 1
        return token

    def answer(self) -> Tree:
        parts = [self.relation()]
        while self.peek() == ",":
            self.take()
            parts.append(self.relation())
        if self.peek():
            raise _Unreadable
        return parts[0] if len(parts) == 1 else ["items", "", *parts]

    def relation(self) -> Tree:
        left = self.expression()
        if self.peek() != "=":
            return left
        self.take()
        right = self.expression()
        return right if left[0] == "sym" and not self.names else ["eq", left, right]

    def expression(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        terms = [self.term()]
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.term()
            terms.append(["neg", term] if sign == "-" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ["add", *terms]

    def term(self) -> Tree:
        found = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "\\times", "\\cdot"):
                self.take()
                found = ["mul", found, self.signed()]
            elif token in ("/", "\\div"):
                self.take()
                found = ["div", found, self.signed()]
            elif self.begins_factor(token):
                found = ["mul", found, self.power()]  # 2x, 3\sqrt{2}, (a)(b)
            else:
                return found

    def begins_factor(self, token: str) -> bool:
        if not token or token in ("\\}", "\\{", "\\|"):
            return False
        # a number may open a product but not continue one: "2 3" is not 6
        return token[0].isalpha() or token in ("(", "{") or (token[0] == "\\" and self.known(token[1:]))

    def known(self, name: str) -> bool:
        return name in _FUNCTIONS or name in _GREEK or name in ("frac", "pi", "infty")

    def signed(self) -> Tree:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        found = self.power()
        return ["neg", found] if negative else found

    def power(self) -> Tree:
        base = self.postfix()
        if self.peek() != "^":
            return base
        self.take()
        return ["pow", base, self.exponent()]

    def exponent(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        if self.peek() in ("+", "-"):
            negative, found = self.take() == "-", self.exponent()
            found = ["neg", found] if negative else found
        elif self.peek() == "{":
            found = self.argument()
        else:
            found = self.power()  # 2^3^4 is 2^(3^4)
        self.depth -= 1
        return found

    def postfix(self) -> Tree:
        found = self.atom()
        while self.peek() == "!":
            self.take()
            found = ["call", "factorial", found]
        return found

    def atom(self) -> Tree:
        token = self.take()
        if token[0] in "0123456789.":
            if len(token) > MAX_DIGITS:
                raise _Unreadable
            return ["num", token]
        if token.isalpha():
            if token in ("e", "i") and self.peek() != "_":
                return ["const", token]
            return ["sym", token + self.subscript()]
        if token in ("(", "[", "\\{"):
            return self.bracketed(token)
        if token == "{":
            found = self.expression()
            self.take("}")
            return found
        if token in ("|", "\\|"):
            found = self.expression()
            self.take(token)
            return ["call", "abs", found]
        name = token[1:]
        if name == "frac":
            return ["div", self.argument(), self.argument()]
        if token in _CONSTANTS:
            return ["const", _CONSTANTS[token]]
        if name in _GREEK:
            return ["sym", name + self.subscript()]
        if name in _FUNCTIONS:
            return self.call(name)
        raise _Unreadable

    def subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.take()
        if self.peek() != "{":
            return "_" + self.plain(self.take())
        self.take()
        parts = []
        while self.peek() != "}":
            parts.append(self.plain(self.take()))
        self.take("}")
        return "_" + "".join(parts)

    def plain(self, token: str) -> str:
        if not token.isalnum() or len(token) > 8:
            raise _Unreadable
        return token

    def argument(self) -> Tree:
        r"""What a command applies to: a braced expression, a letter, or one digit of a number (``\frac12``)."""
        token = self.peek()
        if token == "{":
            self.take()
            found = self.expression()
            self.take("}")
            return found
        if token[:1].isdigit() and token.isdigit() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return ["num", token[0]]
        return self.atom()

    def call(self, name: str) -> Tree:
        if name == "sqrt":
            if self.peek() == "[":
                self.take()
                root = self.expression()
                self.take("]")
                return ["pow", self.argument(), ["div", ["num", "1"], root]]
            return ["call", "sqrt", self.argument()]
        power = base = None
        if self.peek() == "^":  # \sin^2 x
            self.take()
            power = self.exponent()
        if self.peek() == "_" and name == "log":
            self.take()
            base = self.argument()
        inner = self.argument() if self.peek() in ("{", "(") else self.power()
        found: Tree = ["call", name, inner] if base is None else ["div", ["call", "ln", inner], ["call", "ln", base]]
        return found if power is None else ["pow", found, power]

    def bracketed(self, opening: str) -> Tree:
        parts = [self.relation()]
        while self.peek() == ",":
            self.take()
            parts.append(self.relation())
        closing = self.take(*_CLOSING[opening])
        if opening == "(" and closing == ")" and len(parts) == 1:
            return parts[0]
        return ["items", "{}" if opening == "\\{" else opening + closing, *parts]
