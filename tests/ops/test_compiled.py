"""Plan ``compiled`` through every test of the op: its functions as torch runs them, and, slowly, as it compiles them."""

from __future__ import annotations

import pytest
import torch

from rlft.ops import compiled, linear_logps
from tests.ops import test_linear_logps, test_precision
from tests.ops.problems import ALL, GRADS, leaves, problem, truth
from tests.ops.test_linear_logps import (  # noqa: F401
    test_disjoint_tiles_move_the_centre_far,
    test_frozen_hidden_states_still_train_the_head,
    test_gradient_of_one_output_alone,
    test_no_row_and_one_row,
    test_non_contiguous_inputs,
    test_properties_hold_in_low_precision,
    test_reference_equal_to_policy_gives_exactly_nothing,
    test_rows_at_ten_thousand,
    test_target_in_every_tile,
    test_tile_size_changes_nothing,
    test_tiny_policy_mass_where_the_reference_has_half,
    test_twice_in_one_graph,
    test_undeclared_gradient_is_an_error,
    test_values_and_gradients_are_the_definition,
)
from tests.ops.test_precision import (  # noqa: F401
    test_a_tile_of_the_head_gradient_is_float32_whatever_the_head,
    test_float32_sums_of_low_precision_inputs,
    test_gradient_of_a_small_kl_keeps_its_digits,
    test_small_kl_keeps_its_digits,
)


@pytest.fixture(autouse=True)
def not_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan but the oracle becomes ``compiled``, and the functions run as they are unless a test is slow."""

    def fused(*args, plan: str = "auto", **settings):
        return linear_logps(*args, plan="dense" if plan == "dense" else "compiled", **settings)

    monkeypatch.setattr(test_linear_logps, "linear_logps", fused)
    monkeypatch.setattr(test_precision, "linear_logps", fused)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(compiled, "_compiled", lambda function: function)
        monkeypatch.setattr(compiled, "_flaw", lambda: None)


@pytest.mark.parametrize("name", ["_fold", "_d_logits"])
def test_the_functions_are_what_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("it was called")

    monkeypatch.setattr(compiled, name, broken)
    made = problem()
    leaves(made, "hidden", *(["weight"] if name == "_d_logits" else []))
    with pytest.raises(RuntimeError, match="it was called"):
        linear_logps(**made, plan="compiled", want=ALL, grad=GRADS).logps.sum().backward()


def test_without_a_compiler_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_flaw", lambda: "InvalidCxxCompiler: No working C++ compiler found")
    with pytest.raises(
        ValueError, match=r"plan 'compiled' needs torch.compile, which fails here: .*or use plan='tile'"
    ):
        linear_logps(**problem(), plan="compiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_values_and_gradients(softcap: float | None, trains: bool) -> None:
    torch._dynamo.reset()
    made = problem(own_head=True, scale=1.5)
    inputs = leaves(made, "hidden", *(["weight", "bias"] if trains else []))
    expected = truth(**made, softcap=softcap)
    out = linear_logps(**made, softcap=softcap, want=ALL, grad=GRADS, plan="compiled", chunk=(3, 4))._asdict()
    upstream = {name: torch.randn(7, dtype=torch.float64) for name in GRADS}
    for name in ALL:
        torch.testing.assert_close(out[name], expected[name].detach(), rtol=1e-11, atol=1e-11)
    mine = torch.autograd.grad(sum((out[n] * g).sum() for n, g in upstream.items()), inputs)
    theirs = torch.autograd.grad(sum((expected[n] * g).sum() for n, g in upstream.items()), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_equal_logits_have_no_kl() -> None:
    torch._dynamo.reset()
    made = problem(64, 32, 500, dtype=torch.float32, apart=0.0)
    made["ref_weight"], made["ref_bias"] = made["weight"].clone(), made["bias"].clone()
    (hidden,) = leaves(made, "hidden")
    kl = linear_logps(**made, want=frozenset({"kl"}), grad=frozenset({"kl"}), plan="compiled", chunk=(20, 64)).kl
    assert kl is not None
    assert (kl == 0).all()
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    assert (grad == 0).all()
