"""Every objective of the catalogue has every proof, nothing else has, and what is referred to exists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlft import catalogue, losses, recipes
from tests.proofs import loops
from tests.proofs.proof import Limit, Measured, build, recording
from tests.proofs.registry import FAMILIES, ROWS, cannot_train_alone, node_ids, problems

ROOT = Path(__file__).parents[2]
NAMES = [entry.name for entry in catalogue.entries()]


def test_every_objective_has_every_proof() -> None:
    assert sorted(recipes.names()) == sorted(NAMES)
    assert not problems(NAMES, FAMILIES), "\n\n".join(problems(NAMES, FAMILIES))


def test_what_is_missing_is_said() -> None:
    dpo = ROWS["dpo"]

    def said(**changes: object) -> str:
        return "\n".join(problems(["dpo"], {"pairs": [replace(dpo, **changes)]}))  # type: ignore[arg-type]

    assert said() == ""
    assert "focal_sft of the catalogue without proofs. Add a Row" in "\n".join(
        problems(["dpo", "focal_sft"], {"": [dpo]})
    )
    assert "dpo: proofs of what is not in the catalogue" in "\n".join(problems([], {"": [dpo]}))
    assert "dpo: two rows each" in "\n".join(problems(["dpo"], {"": [dpo, dpo]}))
    assert "no identity with another row" in said(equals=[])
    assert "gradients alone" in said(equals=[replace(dpo.equals[0], value=False)])
    assert "no limiting case" in said(limits=[])
    assert "no enumeration" in said(differences=False)


@pytest.mark.parametrize("name", ROWS)
def test_every_setting_takes_part_in_an_identity_or_a_limit(name: str) -> None:
    """A setting that is only differentiated could mean anything."""
    row = ROWS[name]
    with recording() as used:
        for equal in row.equals:
            scene = (equal.scene or row.scene)(0)
            (equal.left or row.left)(scene)
            equal.right(scene)
        for limit in row.limits:
            if isinstance(limit, Limit):
                limit.left(limit.at[0])((limit.scene or row.scene)(0))
    defaults = {p.name: repr(p.default) for p in inspect.signature(inspect.unwrap(function(name))).parameters.values()}
    moved = {key for used_name, key, value in used if used_name == name and value != defaults.get(key)}
    told = [proof for proof in (*row.expected, *row.limits) if isinstance(proof, Measured)]
    moved |= {key for proof in told for key in proof.settings}
    idle = sorted(set(recipes.parameters(name)) - moved - row.idle.keys())
    assert not idle, f"{name}: no identity or limit of its row sets {', '.join(idle)}; add one, or the reason to `idle`"


def function(name: str) -> Callable[..., object]:
    return recipes.RECIPES.get(name) or getattr(losses, name)


@pytest.mark.parametrize("name", ROWS)
def test_its_settings_build(name: str) -> None:
    row = ROWS[name]
    for hyper in row.hyper:
        build(name, **hyper)
    assert cannot_train_alone(name, row.hyper[0]) == bool(row.trained_by)
    if row.trained_by:
        assert name in {term.name for term in recipes.build(row.trained_by).terms}


def test_tests_that_are_referred_to_are_collected_and_run_by_default(request: pytest.FixtureRequest) -> None:
    wanted = {*node_ids(), *loops.node_ids()}
    found: dict[str, pytest.Item] = {}
    for path in sorted({node.partition("::")[0] for node in wanted}):
        module = pytest.Module.from_parent(request.session, path=ROOT / path)
        found |= {item.nodeid: item for item in request.session.genitems(module)}
    plain = {node.partition("[")[0] for node in found}
    missing = sorted(node for node in wanted if node not in found and node not in plain)
    assert not missing, f"no such test: {missing}"
    for node in wanted:
        marked = [item for item in found.values() if item.nodeid == node or item.nodeid.startswith(f"{node}[")]
        assert any(not any(item.get_closest_marker(m) for m in ("slow", "gpu", "data", "peers")) for item in marked), (
            f"{node} does not run by default"
        )
