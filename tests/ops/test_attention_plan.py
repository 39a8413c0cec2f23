"""Plan ``attention``: the head as one call of flash attention."""

from __future__ import annotations

import math

import pytest
import torch

from rlft.ops import linear_logps
from tests.ops.problems import leaves, problem, truth

BOTH = frozenset({"logps", "entropy"})


def made(**settings):
    found = problem(bias=False, **settings)
    del found["ref_hidden"]
    found.pop("ref_weight", None)
    return found


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"logit_scale": 0.25, "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("size", [(7, 5, 13), (70, 40, 300), (1, 3, 2)], ids=str)
def test_values_and_gradient_are_the_definition(size, settings) -> None:
    inputs = made(n=size[0], d=size[1], v=size[2], scale=0.5)
    (hidden,) = leaves(inputs, "hidden")
    expected = truth(**inputs, ref_hidden=inputs["hidden"].detach(), **settings)
    out = linear_logps(**inputs, **settings, want=BOTH, plan="attention")
    torch.testing.assert_close(out.logps, expected["logps"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.entropy, expected["entropy"], rtol=1e-11, atol=1e-11)
    upstream = torch.randn(size[0], dtype=torch.float64)
    (mine,) = torch.autograd.grad((out.logps * upstream).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected["logps"] * upstream).sum(), hidden)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    inputs = made(n=4, d=3, v=7)

    def f(hidden):
        return linear_logps(**{**inputs, "hidden": hidden}, temperature=0.8, plan="attention").logps

    assert torch.autograd.gradcheck(f, [inputs["hidden"].requires_grad_()])


def test_no_row() -> None:
    inputs = made(n=0)
    (hidden,) = leaves(inputs, "hidden")
    out = linear_logps(**inputs, plan="attention").logps
    out.sum().backward()
    assert out.shape == (0,)
    assert hidden.grad.shape == hidden.shape


def test_a_masked_token_gets_no_gradient_even_where_it_overflows() -> None:
    inputs = made(dtype=torch.float32)
    inputs["hidden"][2] = torch.inf
    (hidden,) = leaves(inputs, "hidden")
    out = linear_logps(**inputs, plan="attention").logps
    torch.where(torch.arange(7) == 2, 0.0, out).sum().backward()
    assert (hidden.grad[2] == 0).all()
    assert hidden.grad.isfinite().all()


def test_float32_is_as_exact_as_the_tiles() -> None:
    inputs = made(n=48, d=64, v=2000, scale=0.3, dtype=torch.float32)
    expected = truth(**inputs, ref_hidden=inputs["hidden"])["logps"]
    assert (linear_logps(**inputs, plan="attention").logps - expected).abs().max() < 2e-5


def test_undeclared_gradient_is_an_error() -> None:
    inputs = made()
    leaves(inputs, "hidden")
    out = linear_logps(**inputs, want=BOTH, grad=frozenset(), plan="attention")
    with pytest.raises(ValueError, match="a gradient reached 'logps'"):
        out.logps.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(13, dtype=torch.float64)}, "knows no bias and no soft cap"),
        ({"softcap": 2.0}, "knows no bias and no soft cap"),
        ({"want": frozenset({"entropy", "logps"}), "grad": frozenset({"entropy"})}, "log-probs alone a gradient"),
        (
            {"ref_hidden": torch.zeros(7, 5, dtype=torch.float64), "want": frozenset({"kl"}), "grad": frozenset()},
            r"not \['kl'\]",
        ),
        ({"hidden": torch.zeros(7, 5, dtype=torch.bfloat16), "weight": torch.zeros(13, 5)}, "float32 or float64"),
    ],
    ids=["bias", "softcap", "entropy gradient", "kl", "half precision"],
)
def test_what_attention_cannot_do_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=rf"plan 'attention' .*{message}.*; use plan='auto'"):
        linear_logps(**{**made(), **change}, plan="attention")


def test_a_head_that_trains_is_refused() -> None:
    inputs = made()
    leaves(inputs, "weight")
    with pytest.raises(ValueError, match="cannot give the head a gradient"):
        linear_logps(**inputs, plan="attention")


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0])
def test_what_rounding_loses_leads_past_no_bound(scale) -> None:
    """The likeliest id as target: its log-prob is next to 0, the difference of two numbers of the logits' size."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(256, 64, generator=g), torch.randn(500, 64, generator=g) * scale
    out = linear_logps(hidden, weight, (hidden @ weight.T).argmax(-1), want=BOTH, plan="attention")
    assert (out.logps <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(500) * (1 + 1e-6)).all()
