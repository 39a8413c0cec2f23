"""A loss against its oracle: value, what counts, gradient, refusals, and inputs that come back untouched."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from rlft import losses
from tests.fuzz import generate
from tests.fuzz.oracle import ORACLE, Refused, averaged

#: Largest error allowed, relative to the largest term that goes into the number: float64 and float32.
BOUND = {False: 1e-12, True: 2e-5}


@dataclass
class Figures:
    """What a series of cases of one loss found."""

    name: str
    cases: int = 0
    gradients: int = 0
    refused: int = 0
    corners: int = 0
    narrow: int = 0
    worst: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("value", "gradient", "value32", "gradient32"), 0.0)
    )

    def note(self, kind: str, error: float, narrow: bool, where: str) -> None:
        """Keep the largest error; too large a one fails."""
        key = kind + "32" * narrow
        assert error <= BOUND[narrow], f"{where}: {key} is off by {error:.3g}"  # NaN fails too
        self.worst[key] = max(self.worst[key], error)


def tensor(value: object, case: generate.Case, rng: Random) -> Tensor:
    """As the caller may hold it: contiguous, a transposed view, every second number, or one number repeated."""
    dtype = torch.float32 if case.narrow else torch.float64
    leaf = value
    while isinstance(leaf, list):
        leaf = leaf[0]
    made = torch.tensor(value, dtype=dtype if isinstance(leaf, float) else None)
    layout = rng.randrange(8)
    if layout == 0 and made.ndim == 2:
        return made.t().contiguous().t()
    if layout == 1:
        return torch.stack([made, made.flip(0)], -1)[..., 0]
    if layout == 2 and made.ndim == 2 and made.shape[0] == 1:
        return made[:1].expand(1, -1)
    if layout == 3 and made.ndim == 1 and made.shape[0] > 1 and bool((made == made[0]).all()):
        return made[:1].expand(made.shape[0])
    return made


def wide(values: float | list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check(case: generate.Case, figures: Figures, *, gradient: bool, seed: int) -> None:
    """One case; raises AssertionError with the name and the number of the case."""
    where = f"{case.name} case {seed} {case.hyper}"
    rng = Random(seed)
    float_dtype = torch.float32 if case.narrow else torch.float64
    inputs = {}
    for name, value in case.tensors.items():
        made = tensor(value, case, rng)
        if name in case.learned and gradient:
            made = made.to(float_dtype).detach().requires_grad_()
        inputs[name] = made
    bits = {name: value.detach().numpy().tobytes() for name, value in inputs.items()}
    figures.cases += 1
    figures.narrow += case.narrow
    try:
        answer = ORACLE[case.name](case)
    except Refused as why:
        figures.refused += 1
        try:
            getattr(losses, case.name)(*inputs.values(), **case.hyper)
        except ValueError as error:
            assert str(why) in str(error), f"{where}: {error}"  # noqa: PT017
            return
        raise AssertionError(f"{where}: accepted, though it must be refused ({why})") from None
    try:
        output = getattr(losses, case.name)(*inputs.values(), **case.hyper)
    except ValueError as error:
        raise AssertionError(f"{where}: refused: {error}") from error
    assert output.loss.dtype == float_dtype, where
    assert output.counted.tolist() == answer.counted, f"{where}: other entries count"
    got = output.loss.detach().double()
    want = wide(answer.loss).reshape(got.shape)
    assert bool((got[~output.counted] == 0).all()), f"{where}: masked entries are not zero"
    scale, slope_scale = wide(answer.scale), wide(answer.slope_scale)
    figures.note("value", ((got - want).abs() / scale).max().item(), case.narrow, where)
    mean, grads = averaged(case.name, answer)
    figures.note("value", abs(output.mean().item() - mean) / scale.max().item(), case.narrow, where + " (mean)")
    if gradient:
        if answer.kink:
            figures.corners += 1
        else:
            figures.gradients += 1
            output.mean().backward()
            assert grads.keys() == case.learned, where
            for name, expected in grads.items():
                found = inputs[name].grad
                found = torch.zeros_like(inputs[name]) if found is None else found
                error = (found.double() - wide(expected).reshape(found.shape)).abs() / slope_scale
                figures.note("gradient", error.max().item(), case.narrow, f"{where} d/d{name}")
    for name, before in bits.items():
        assert inputs[name].detach().numpy().tobytes() == before, f"{where}: {name} was changed"


def series(name: str, count: int, *, start: int = 0, every: int = 5) -> Figures:
    """``count`` cases of a loss, every so many of them with its gradient."""
    figures = Figures(name)
    for seed in range(start, start + count):
        check(generate.case(name, seed), figures, gradient=seed % every == 0, seed=seed)
    return figures
