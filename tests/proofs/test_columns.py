"""One test per objective and column: gradient, identities, limits, masked slots, splits."""

from __future__ import annotations

import pytest
import torch

from tests.proofs import contract
from tests.proofs.proof import central_differences, check_equal, check_limit, gradients, row
from tests.proofs.registry import ROWS

every_row = pytest.mark.parametrize("name", ROWS)


@every_row
def test_gradient(name: str) -> None:
    """Central differences of every entry, gradcheck along a random direction, enumeration of every answer."""
    proved = ROWS[name]
    for hyper in proved.differentiable:
        central_differences(proved, hyper)
    for expected in proved.expected:
        check_limit(proved, expected)


@pytest.mark.parametrize("name", [name for name, proved in ROWS.items() if proved.differentiable])
def test_gradcheck(name: str) -> None:
    """torch's own, along random directions, for the first setting."""
    proved = ROWS[name]
    scene = proved.scene(1)
    value = row(name, **proved.differentiable[0])
    slopes = gradients(value(scene), scene)
    used = {n: t for n, t in scene.leaves.items() if bool(slopes[n].any())}
    # NaN sits in slots that do not count, and gradcheck would compare it
    clean = [t.detach().nan_to_num(-1.0).requires_grad_() for t in used.values()]

    def mean(*leaves: torch.Tensor) -> torch.Tensor:
        return value(scene.with_outputs(**dict(zip(used, leaves, strict=True))))

    assert torch.autograd.gradcheck(mean, clean, eps=1e-6, atol=1e-8, rtol=1e-7, fast_mode=True)


@every_row
def test_equal_to_other_rows(name: str) -> None:
    for equal in ROWS[name].equals:
        check_equal(ROWS[name], equal)


@every_row
def test_limits(name: str) -> None:
    for limit in ROWS[name].limits:
        check_limit(ROWS[name], limit)


@every_row
def test_masked_slots_change_nothing(name: str) -> None:
    for hyper in ROWS[name].hyper:
        contract.check_masks(ROWS[name], hyper)
        contract.check_blank_rows(ROWS[name], hyper)


@every_row
def test_splits_change_nothing(name: str) -> None:
    for hyper in ROWS[name].hyper:
        contract.check_split(ROWS[name], hyper)
