"""What a proof is: expressions in objectives, equalities and limits between them, and how far they are off.

``row("dpo", beta=0.3)`` is a function of a scene: the step's loss of that objective, computed as the trainer computes it
(:class:`rlft.objective.Objective`, prepared and divided by its own counts). Rows add up, are scaled, and can be put on a
changed scene; two expressions are compared in value and in the gradient of every leaf.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlft import recipes
from rlft.objective import Objective
from tests.proofs import scene as scenes
from tests.proofs.scene import Scene

Make = Callable[[int], Scene]
Change = Callable[[Scene], Scene]

#: Objectives that were computed since :func:`recording` began, with the settings that were given: (name, key, value).
_USED: list[set[tuple[str, str, str]]] = []


@contextmanager
def recording() -> Iterator[set[tuple[str, str, str]]]:
    """The objectives that are computed inside; the key is "" for the objective itself."""
    _USED.append(set())
    try:
        yield _USED[-1]
    finally:
        _USED.pop()


def names(used: set[tuple[str, str, str]]) -> set[str]:
    """The objectives among what was recorded."""
    return {name for name, _, _ in used}


@dataclass(frozen=True)
class Value:
    """A number of a scene, differentiable in its leaves."""

    run: Callable[[Scene], Tensor]

    def __call__(self, scene: Scene) -> Tensor:
        return self.run(scene)

    def on(self, *changes: Change) -> Value:
        """The same number of a changed scene; the first change is made first."""
        return Value(lambda s: self.run(functools.reduce(lambda was, change: change(was), changes, s)))

    def __add__(self, other: Value | float) -> Value:
        return Value(lambda s: self.run(s) + (other.run(s) if isinstance(other, Value) else other))

    def __sub__(self, other: Value | float) -> Value:
        return Value(lambda s: self.run(s) - (other.run(s) if isinstance(other, Value) else other))

    def __mul__(self, factor: Callable[[Scene], Tensor] | float) -> Value:
        return Value(lambda s: self.run(s) * (factor(s) if callable(factor) else factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Value:
        return self * (1 / divisor)


@functools.cache
def _build(name: str, hyper: tuple[tuple[str, Any], ...]) -> Objective:
    return recipes.build(name, **dict(hyper))


def build(name: str, **hyper: Any) -> Objective:
    """The objective of that name; built once."""
    return _build(name, tuple(sorted(hyper.items())))


def row(name: str, **hyper: Any) -> Value:
    """The step's loss of an objective, as the trainer computes it."""

    def run(scene: Scene) -> Tensor:
        for used in _USED:
            used |= {(name, "", ""), *((name, key, repr(value)) for key, value in hyper.items())}
        return step_loss(build(name, **hyper))(scene)

    return Value(run)


def step_loss(objective: Objective) -> Value:
    """The step's loss of any objective, prepared and divided by its own counts."""

    def run(scene: Scene) -> Tensor:
        batch = objective.prepare(scene.batch)
        return objective.compute(scene.outputs, batch, objective.denominators(batch))[0]

    return Value(run)


def gradients(value: Tensor, scene: Scene) -> dict[str, Tensor]:
    """The gradient of every leaf, zero for those without a part in it."""
    names = list(scene.leaves)
    found = torch.autograd.grad(value, list(scene.leaves.values()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(t) if g is None else g for n, g, t in zip(names, found, scene.leaves.values(), strict=True)
    }


def difference(left: Value, right: Value, scene: Scene, *, value: bool = True) -> float:
    """How far two expressions are apart, in value and in every entry of the gradient, relative to the larger.

    Raises:
        AssertionError: when neither has a gradient: the comparison would be empty.
    """
    a, b = left(scene), right(scene)
    ga, gb = gradients(a, scene), gradients(b, scene)
    scale = max(float(g.abs().max()) for g in (*ga.values(), *gb.values()))
    assert scale > 1e-4, "neither side has a gradient"
    error = max(float((ga[n] - gb[n]).abs().max()) for n in ga) / scale
    if value:
        error = max(error, abs(float(a.detach() - b.detach())) / max(1.0, abs(float(a.detach()))))
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Equal:
    """A row is an expression in other rows, on any data of a kind.

    Attributes:
        to: the other side, in words, objectives in backticks.
        right: the other side.
        left: this side; None for the row with its first hyper-parameters.
        when: on which data, in words.
        scene: makes those data; None for those of the row.
        value: False where only the gradients agree (a surrogate's value has no meaning).
        within: largest error allowed.
    """

    to: str
    right: Value
    left: Value | None = None
    when: str = ""
    scene: Make | None = None
    value: bool = True
    within: float = 1e-12


@dataclass(frozen=True)
class Limit:
    """What a row becomes as something goes to an end of its range.

    Attributes:
        parameter: what goes where, in words.
        to: what the row becomes, in words.
        left: the row at one value of the parameter.
        right: the limit.
        at: values of the parameter, nearer and nearer to the limit. It is written so that the limit is at 0.
        order: the power of the parameter with which the error falls; None: the limit is reached, every value is equal to it.
        scene: makes the data; None for those of the row.
        value: False where only the gradients agree.
        slack: how far the measured order may be from ``order``.
        within: largest error allowed at the last value.
    """

    parameter: str
    to: str
    left: Callable[[float], Value]
    right: Value
    at: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    order: float | None = 1.0
    scene: Make | None = None
    value: bool = True
    slack: float = 0.15
    within: float = 1e-2


@dataclass(frozen=True)
class Measured:
    """A limit, or an enumeration, that is no comparison of two expressions: its errors are worked out by a function.

    Attributes:
        parameter: what goes where, or what is enumerated, in words.
        to: what comes out, in words.
        errors: the error at a value of the parameter.
        at: values of the parameter.
        order: as in :class:`Limit`.
        slack: as in :class:`Limit`.
        within: largest error allowed at the last value.
        settings: of the objective, that were given.
    """

    parameter: str
    to: str
    errors: Callable[[float], float]
    at: tuple[float, ...] = (0.0,)
    order: float | None = None
    slack: float = 0.15
    within: float = 1e-12
    settings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """Everything that proves one objective.

    Attributes:
        name: of the catalogue.
        hyper: hyper-parameters to try; the first are those of every column.
        scene: makes its data.
        equals: equalities with other rows.
        limits: limiting cases.
        expected: enumerations of every answer: the estimator's expectation against the exact gradient.
        differences: whether finite differences apply, to all or to each of ``hyper``: the gradient is that of the value.
        tests: further proofs, as node ids of tests.
        trained_by: the objective whose file trains it, when it is not its own.
        idle: settings that no identity or limit moves, each with what holds it instead.
    """

    name: str
    hyper: Sequence[dict[str, Any]]
    scene: Make
    equals: Sequence[Equal]
    limits: Sequence[Limit | Measured]
    expected: Sequence[Measured] = ()
    differences: bool | Sequence[bool] = True
    tests: Sequence[str] = ()
    trained_by: str = ""
    idle: Mapping[str, str] = field(default_factory=dict)

    @property
    def differentiable(self) -> list[dict[str, Any]]:
        """The hyper-parameters whose gradient is that of the value."""
        each = [self.differences] * len(self.hyper) if isinstance(self.differences, bool) else self.differences
        return [h for h, exact in zip(self.hyper, each, strict=True) if exact]

    @property
    def left(self) -> Value:
        return row(self.name, **self.hyper[0])


@dataclass
class Found:
    """Figures of one proof."""

    errors: list[float] = field(default_factory=list)
    order: float | None = None

    @property
    def last(self) -> float:
        return self.errors[-1]


def check_equal(proved: Row, equal: Equal, *, seeds: int = 3) -> Found:
    """The largest error over a few random scenes; the other side must be made of other rows."""
    left = equal.left or proved.left
    found = Found([0.0])
    for seed in range(seeds):
        scene = (equal.scene or proved.scene)(seed)
        with recording() as mine:
            left(scene)
        with recording() as others:
            error = difference(left, equal.right, scene, value=equal.value)
        assert proved.name in names(mine), f"the left side of '{equal.to}' does not compute {proved.name}"
        assert names(others) - {proved.name}, f"'{equal.to}' is no identity with another row"
        found.errors[0] = max(found.last, error)
    assert found.last <= equal.within, f"{proved.name} is not {equal.to} {equal.when}: off by {found.last:.3g}"
    return found


def check_limit(proved: Row, limit: Limit | Measured) -> Found:
    """The errors on the way to the limit, and the power with which they fall."""
    what = f"{proved.name}, {limit.parameter}: {limit.to}"
    if isinstance(limit, Measured):
        return check_errors(what, limit, [limit.errors(x) for x in limit.at])
    scene = (limit.scene or proved.scene)(0)
    with recording() as used:
        errors = [difference(limit.left(x), limit.right, scene, value=limit.value) for x in limit.at]
    assert proved.name in names(used), f"{what}: the objective has no part in it"
    return check_errors(what, limit, errors)


def check_errors(what: str, limit: Limit | Measured, errors: list[float]) -> Found:
    """Errors that are zero all along, or fall with the power that was said to what was said."""
    found = Found(errors)
    if limit.order is None:
        bound = limit.within if isinstance(limit, Measured) else 1e-12
        assert max(errors) <= bound, f"{what}: off by {max(errors):.3g}"
        return found
    assert found.last <= limit.within, f"{what}: still off by {found.last:.3g}"
    for (x, e), (y, f) in pairwise(zip(limit.at, errors, strict=True)):
        found.order = math.log(f / e) / math.log(y / x)
        assert abs(found.order - limit.order) <= limit.slack, (
            f"{what}: falls with the power {found.order:.3g}: {errors}"
        )
    return found


def central_differences(proved: Row, hyper: dict[str, Any], *, step: float = 1e-5) -> float:
    """The gradient against central differences, entry by entry of every leaf, relative to its largest entry."""
    scene = proved.scene(0)
    value = row(proved.name, **hyper)
    analytic = gradients(value(scene), scene)
    scale = max(float(g.abs().max()) for g in analytic.values())
    assert scale > 1e-4, f"{proved.name} has no gradient"
    worst = 0.0
    with torch.no_grad():
        for name, leaf in scene.leaves.items():
            flat, slopes = leaf.view(-1), analytic[name].reshape(-1)
            if not bool(slopes.any()):
                # a leaf without a part: one nudge of all of it moves nothing
                kept = flat.clone()
                before = value(scene)
                flat.add_(1e-3)
                assert torch.equal(value(scene), before), f"{proved.name} depends on {name} and has no gradient to it"
                flat.copy_(kept)
                continue
            for i in range(flat.numel()):
                was = flat[i].item()
                if math.isnan(was):
                    assert slopes[i] == 0
                    continue
                flat[i] = was + step
                above = value(scene)
                flat[i] = was - step
                slope = float(above - value(scene)) / (2 * step)
                flat[i] = was
                worst = max(worst, abs(slope - float(slopes[i])) / scale)
    assert worst <= 1e-8, f"{proved.name} {hyper}: central differences are off by {worst:.3g}"
    return worst


__all__ = [
    "Change", "Equal", "Found", "Limit", "Make", "Measured", "Row", "Value", "build", "central_differences",
    "check_equal", "check_errors", "check_limit", "difference", "gradients", "names", "recording", "row", "scenes", "step_loss",
]  # fmt: skip
