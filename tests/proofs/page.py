"""docs/proofs.md, made from the registry; figures are filled in by whoever measures them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tests.proofs.loops import LOOPS
from tests.proofs.proof import Equal, Measured, Row, build
from tests.proofs.registry import FAMILIES, trained_by

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "proofs.md"

#: A figure of the page, and what stands in its place where nothing was measured.
FIGURE, BLANK = re.compile(r"(?:< )?\b\de[-+]\d\d\b|power -?\d\.\d\d|\b\d+ s of processor time"), "·"

HEAD = """\
# Proofs

How each objective is proven right, row by row. The tables are made from code. A test fails when an objective of `rlft
objectives` has no row, when a row lacks a column, or when this page is not the tables; `python -m tests.proofs` measures
everything and writes it.

All is float64, on ragged groups and pairs with gaps, blank rows and unscored answers, through the `Objective` that trains, and
with NaN in every slot that does not count. What a column means, as `tests/proofs/test_columns.py` holds it:

- **gradient**: *differences*, every entry of the gradient against central differences, and torch's gradcheck. Where an
  estimator's gradient is not that of its value: its expectation over *all* groups of answers of a small policy, against the
  exact gradient.
- **equal to**: value and gradient, entry by entry of everything that learns, on three random batches, to 1e-12. *In gradient*: a
  surrogate's value has no meaning there.
- **limit**: the error falls with the power that theory says (1 unless another is named), or is zero (*exactly*).
- **masked**: random numbers, 1e4, infinities and NaN where nothing counts change no bit of loss, metrics and gradient, and rows
  that count nowhere can as well be absent. The number is of the settings tried.
- **split**: micro-batches of whole groups, cut in three ways, add up to the same value and gradient, to 1e-12.
- **trained by**: a YAML file trains it for two steps (`test_trains_from_yaml`), *online* on sampled answers as well
  (`test_pair_objectives_train_online_from_yaml`); then the configurations that ship with it.
- **measured**: the largest error. ∂ differences, E enumeration, = identities, → nearest to the limit, ÷ splits.

h is the chosen log-ratio minus the rejected one, x_w and x_l are those two, S is a log-ratio summed over an answer, R = r - beta S,
A is R against the mean of the others, rho the ratio to the policy that sampled.
"""
LOOP_HEAD = """\
## Loops

What picks the answers, the opponents, the reference and the weights has no gradient of its own. Each loop is held by a truth, an
identity, a limit and a run; what is measured is so in `tests/proofs/test_loops.py`, the other tests are named.
"""


def figure(error: float) -> str:
    """An error in one digit, and its power of ten."""
    return f"{error:.0e}" if error >= 1e-17 else "< 1e-17"


def without_figures(text: str) -> str:
    return FIGURE.sub(BLANK, text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _named(node: str) -> str:
    """A node id as the name of its test."""
    return f"`{node.rpartition('::')[2].partition('[')[0]}`"


def gradient_cell(row: Row) -> str:
    parts = []
    count, total = len(row.differentiable), len(row.hyper)
    if count:
        which = f"{count} settings" if count > 1 else "1 setting" if total == 1 else f"1 setting of {total}"
        parts.append(f"differences, {which}")
    by_truth: dict[str, list[str]] = {}
    for expected in row.expected:
        ways = by_truth.setdefault(expected.to, [])
        if expected.parameter not in ways:
            ways.append(expected.parameter)
    parts += [f"{'; '.join(ways).replace('; all groups of', '; of')}: {truth}" for truth, ways in by_truth.items()]
    parts += [_named(node) for node in row.tests]
    return "<br>".join(parts)


def _equal(equal: Equal) -> str:
    words = equal.to + ("" if equal.value or "in gradient" in equal.to else ", in gradient")
    return f"{words} *when* {equal.when}" if equal.when else words


def _limit(parameter: str, to: str, order: float | None) -> str:
    how = " (exactly)" if order is None else "" if order == 1.0 else f" (power {order:g})"
    return f"{parameter}: {to}{how}"


def shipped() -> dict[str, list[str]]:
    """Objective -> configurations that train it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and "objective" in settings:
            found.setdefault(settings["objective"], []).append(f"`configs/{path.relative_to(ROOT / 'configs')}`")
    return found


def _online() -> set[str]:
    from tests.test_every_objective import of_pairs

    return set(of_pairs())


def training_cell(row: Row, configurations: Mapping[str, list[str]], online: set[str]) -> str:
    words = "YAML" if not row.trained_by else f"YAML, as a term of `{row.trained_by}`"
    assert trained_by(row)
    parts = [words + (", online" if row.name in online else "")]
    return "<br>".join([*parts, *configurations.get(row.name, [])])


def blanks() -> dict[str, dict[str, str]]:
    """The figures of the page before anything is measured."""
    found: dict[str, dict[str, str]] = {}
    for row in (row for rows in FAMILIES.values() for row in rows):
        marks = {"∂": bool(row.differentiable), "E": bool(row.expected), "=": True}
        own = {mark: BLANK for mark, there in marks.items() if there}
        own["→"] = "; ".join(BLANK if limit.order is None else f"{BLANK}, {BLANK}" for limit in row.limits)
        found[row.name] = own if build(row.name, **row.hyper[0]).couples_rows else {**own, "÷": BLANK}
    for loop in LOOPS:
        marks = {"=": loop.equals, "→": loop.limits}
        found[loop.name] = {m: BLANK for m, proofs in marks.items() if any(isinstance(p, Measured) for p in proofs)}
    return found


def measured_cell(figures: Mapping[str, str]) -> str:
    return "<br>".join(f"{mark}: {value}" for mark, value in figures.items())


def _rows(rows: list[Row], figures: Mapping[str, Mapping[str, str]]) -> list[str]:
    configurations, online = shipped(), _online()
    lines = [
        "| objective | gradient | equal to | limit | masked | split | trained by | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        coupled = build(row.name, **row.hyper[0]).couples_rows
        cells = [
            f"`{row.name}`",
            gradient_cell(row),
            "<br>".join(_equal(e) for e in row.equals),
            "<br>".join(_limit(e.parameter, e.to, e.order) for e in row.limits),
            f"{len(row.hyper)}",
            "refused: ranks all pairs" if coupled else f"{len(row.hyper)}",
            training_cell(row, configurations, online),
            measured_cell(figures[row.name]),
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _loop_cell(proofs: Sequence[Measured | tuple[str, str]]) -> str:
    words = []
    for proof in proofs:
        if isinstance(proof, Measured):
            words.append(_limit(proof.parameter, proof.to, proof.order))
        else:
            words.append(f"{proof[0]}: {_named(proof[1])}")
    return "<br>".join(words)


def _loops(figures: Mapping[str, Mapping[str, str]]) -> list[str]:
    lines = [
        "| loop | settings | truth | identity | limit | trained by | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for loop in LOOPS:
        cells = [
            loop.name,
            ", ".join(f"`{s}`" for s in loop.settings),
            "<br>".join(map(_named, loop.truth)),
            _loop_cell(loop.equals),
            _loop_cell(loop.limits),
            "<br>".join(map(_named, loop.trained_by)),
            measured_cell(figures[loop.name]),
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def page(figures: Mapping[str, Mapping[str, str]], seconds: float) -> str:
    """The whole page.

    Args:
        figures: by objective and loop, then by mark (∂, E, =, →, ÷), in words.
        seconds: of processor time that measuring them took.
    """
    count = sum(map(len, FAMILIES.values()))
    parts = [HEAD, f"{count} objectives, {seconds:.0f} s of processor time.\n"]
    for family, rows in FAMILIES.items():
        parts += [f"## {family}\n", *_rows(list(rows), figures), ""]
    return "\n".join([*parts, LOOP_HEAD, *_loops(figures), ""])
