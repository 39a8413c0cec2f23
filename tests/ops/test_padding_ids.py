"""Ids that no text has: a vocabulary padded to a round size, with its padding forbidden by a bias of -inf."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from rlft.ops import MOMENTS, linear_logps, log_ratio_moments, logits_logps
from tests.ops.problems import ALL, GRADS, leaves, problem

REAL = 11
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def forbid(made: dict, dtype: torch.dtype) -> dict:
    for name in ("bias", "ref_bias"):
        if name in made:
            made[name] = made[name].to(dtype)
            made[name][REAL:] = -torch.inf
    made["targets"] = made["targets"] % REAL
    return made


def without(made: dict) -> dict:
    heads = ("weight", "bias", "ref_weight", "ref_bias")
    return {name: value[:REAL] if name in heads else value for name, value in made.items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter is NumPy
@pytest.mark.parametrize("plan", ["dense", "tile", "recompute", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "reference head"])
def test_forbidden_ids_are_as_if_they_were_not_there(plan, own_head) -> None:
    padded = forbid(problem(own_head=own_head, scale=2.0), torch.float64)
    names = ["hidden"] if plan in ("tile", "triton") else ["hidden", "weight", "bias"]
    inputs = leaves(padded, *names)
    settings = {"want": ALL, "grad": GRADS, "temperature": 0.7, "chunk": (3, 4)}
    out = linear_logps(**padded, **settings, plan=plan)
    real = without(padded)
    expected = linear_logps(**real, **settings, plan="dense")
    for name in ALL:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-11, atol=1e-11)
    for name in sorted(GRADS):
        mine = torch.autograd.grad(getattr(out, name).sum(), inputs, retain_graph=True)
        theirs = torch.autograd.grad(getattr(expected, name).sum(), inputs, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert b.abs().max() > 1e-3
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["dense", "tile", "recompute"])
def test_in_every_precision(plan, dtype) -> None:
    made = forbid(problem(dtype=dtype), dtype)
    leaves(made, "hidden")
    out = linear_logps(**made, want=ALL, grad=GRADS, plan=plan, chunk=(3, 4))
    expected = linear_logps(**without(made), want=ALL, grad=GRADS, plan="dense")
    for name in ALL:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad((out.logps + out.entropy + out.kl).sum(), made["hidden"])
    assert grad.isfinite().all()


@pytest.mark.parametrize("plan", ["dense", "tile", "recompute"])
@pytest.mark.parametrize("own_head", [True, False])
def test_a_target_that_is_forbidden_has_no_probability(plan, own_head) -> None:
    """Minus infinity, which stops a run, and not a large number, which would train it."""
    made = forbid(problem(own_head=own_head), torch.float64)
    made["targets"][2] = REAL + 1
    out = linear_logps(**made, want=frozenset({"logps", "ref_logps"}), plan=plan, chunk=(3, 4))
    for values in (out.logps, out.ref_logps):
        assert values.isneginf().tolist() == [i == 2 for i in range(len(values))]
    capped = linear_logps(**made, plan=plan, softcap=5.0, chunk=(3, 4)).logps  # a cap ends at -5
    assert capped.isfinite().all()


def test_ids_that_a_model_itself_forbids() -> None:
    """Heads that are no single matrix hand over logits."""
    g = torch.Generator().manual_seed(0)
    logits, ref, behaviour = (torch.randn(5, 13, generator=g, dtype=torch.float64) for _ in range(3))
    targets = torch.arange(5)
    for x in (logits, ref, behaviour):
        x[:, REAL:] = -torch.inf
    full, real = logits.clone().requires_grad_(), logits[:, :REAL].clone().requires_grad_()
    out = logits_logps(full, targets, ref_logits=ref, want=ALL, grad=GRADS)
    expected = logits_logps(real, targets, ref_logits=ref[:, :REAL], want=ALL, grad=GRADS)
    pairs = [(getattr(out, name), getattr(expected, name)) for name in sorted(ALL)]
    found = log_ratio_moments(full, ref, behaviour, want=frozenset(MOMENTS))
    shown = log_ratio_moments(real, ref[:, :REAL], behaviour[:, :REAL], want=frozenset(MOMENTS))
    pairs += [(found[name], shown[name]) for name in MOMENTS]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        if b.requires_grad:
            (mine,) = torch.autograd.grad(a.sum(), full, retain_graph=True)
            (theirs,) = torch.autograd.grad(b.sum(), real, retain_graph=True)
            assert mine[:, REAL:].eq(0).all()
            torch.testing.assert_close(mine[:, :REAL], theirs, rtol=1e-12, atol=1e-12)
