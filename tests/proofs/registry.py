"""The table: every objective of the catalogue, and its proofs."""

from __future__ import annotations

from collections.abc import Sequence

from tests.proofs import (
    rows_agro,
    rows_agro_on,
    rows_anchored,
    rows_lengths,
    rows_online,
    rows_pairs,
    rows_ratios,
    rows_recipes,
    rows_rewards,
    rows_supervised,
)
from tests.proofs.proof import Row, build

#: Family -> its rows, in the order of the page.
FAMILIES: dict[str, Sequence[Row]] = {
    "Preference pairs": [*rows_pairs.CORE, *rows_anchored.ANCHORED],
    "Preference pairs: lengths, likelihoods, transport": [*rows_lengths.LENGTHS, *rows_lengths.TRANSPORT],
    "Supervised, thumbs, reward models, critics": [*rows_supervised.SUPERVISED, *rows_rewards.REWARD_MODELS],
    "AGRO": [*rows_agro.OFF_POLICY, *rows_agro_on.ON_POLICY],
    "Policy gradients and ratios": [*rows_online.POLICY_GRADIENTS, *rows_ratios.RATIOS],
    "Named algorithms and rankings": rows_recipes.RECIPES,
}
ROWS: dict[str, Row] = {row.name: row for rows in FAMILIES.values() for row in rows}

YAML = "tests/test_every_objective.py::test_trains_from_yaml"
ADVICE = """\
{names} of the catalogue without proofs. Add a Row to the file of its family under tests/proofs (rows_pairs.py, rows_online.py, ...):
    name and the hyper-parameters to try; the scene that makes its data;
    equals: at least one Equal with an expression in other rows;
    limits: at least one Limit, or Measured;
    expected: an enumeration, where the gradient is not that of the value (then differences=False).
Masked slots, splits and training follow from these. Then `python -m tests.proofs` writes docs/proofs.md."""


def problems(catalogue: Sequence[str], families: dict[str, Sequence[Row]]) -> list[str]:
    """What is missing or too much, in words; nothing when every objective has all its proofs."""
    rows = [row for family in families.values() for row in family]
    named = [row.name for row in rows]
    found = []
    if missing := sorted(set(catalogue) - set(named)):
        found.append(ADVICE.format(names=", ".join(missing)))
    if unknown := sorted(set(named) - set(catalogue)):
        found.append(f"{', '.join(unknown)}: proofs of what is not in the catalogue; remove them")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        found.append(f"{', '.join(twice)}: two rows each; make one of them")
    for row in rows:
        if not row.equals:
            found.append(f"{row.name}: no identity with another row; add an Equal")
        elif all(not equal.value for equal in row.equals):
            found.append(
                f"{row.name}: its identities hold for gradients alone; add one that holds for the value as well"
            )
        if not row.limits:
            found.append(f"{row.name}: no limiting case; add a Limit")
        if len(row.differentiable) < len(row.hyper) and not row.expected:
            found.append(f"{row.name}: a gradient that is not that of the value, and no enumeration; add expected=")
        if not row.hyper:
            found.append(f"{row.name}: no hyper-parameters to try; give [{{}}] if it has none")
    return found


def trained_by(row: Row) -> str:
    """The test that trains it from a YAML file, as a node id."""
    return f"{YAML}[{row.trained_by or row.name}]"


def cannot_train_alone(name: str, hyper: dict[str, object]) -> bool:
    """Whether a run has no way to what it needs: the targets of a critic, without advantages that make them."""
    objective = build(name, **hyper)
    return "returns" in objective.needs and objective.advantage != "gae"


def node_ids() -> list[str]:
    """Every test that a row refers to."""
    return sorted({node for row in ROWS.values() for node in (trained_by(row), *row.tests)})
