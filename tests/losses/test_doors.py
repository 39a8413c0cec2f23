"""At the door of every loss: what is refused, and by which name; what is cast; what gets no gradient."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from rlft import losses
from tests.losses.cases import CASES, Case

#: NaN says that a row was not scored.
MAY_BE_NAN = {"rewards", "win_rates"}
LIKE_LOGPS = {"token_kl", "teacher_kl", "token_log_ratio_sq", "behaviour_log_ratio", "behaviour_log_ratio_sq"}


def numbers(case: Case) -> list[str]:
    """Floating-point tensors that are no log-probs."""
    return [n for n, t in case.inputs().items() if t.is_floating_point() and not n.endswith("logps")]


@pytest.mark.parametrize("case", [case for case in CASES if numbers(case)], ids=lambda case: case.id)
def test_numbers_that_are_not_finite_are_refused_by_name(case: Case) -> None:
    for name in numbers(case):
        for bad in (torch.nan, torch.inf, -torch.inf):
            if bad != bad and name in MAY_BE_NAN:
                continue
            tensors = case.inputs()
            tensors[name][0] = bad  # a whole row, unmasked in part
            with pytest.raises(ValueError, match=rf"\b{name} must (be finite|lie in)"):
                case(tensors)


@pytest.mark.parametrize("case", [case for case in CASES if numbers(case)], ids=lambda case: case.id)
def test_the_tensor_of_another_shape_is_the_one_that_is_blamed(case: Case) -> None:
    for name in [name for name in numbers(case) if name != case.tensor_names[0]]:
        tensors = case.inputs()
        tensors[name] = tensors[name][:-1]
        with pytest.raises(
            ValueError, match=rf"^{name} must" + (" have the shape of logps, " if name in LIKE_LOGPS else "")
        ):
            case(tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_metrics_have_the_dtype_of_the_loss(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        output = case(case.inputs(dtype=dtype))
        assert output.loss.dtype == dtype
        assert {name: metric.dtype for name, metric in output.metrics.items()} == dict.fromkeys(output.metrics, dtype)


WITH_LENGTHS = [case for case in CASES if any(name.endswith("_lengths") for name in case.tensor_names)]


@pytest.mark.parametrize("case", WITH_LENGTHS, ids=lambda case: case.id)
def test_lengths_are_constants_in_the_dtype_of_the_log_probs(case: Case) -> None:
    tensors = case.inputs(dtype=torch.float32)
    expected = case(tensors)
    wide = {n: t.double().requires_grad_() if n.endswith("_lengths") else t for n, t in tensors.items()}
    found = case({**wide, "chosen_logps": wide["chosen_logps"].requires_grad_()})
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    for name, metric in expected.metrics.items():
        assert found.metrics[name].dtype == metric.dtype, name
    found.mean().backward()
    assert all(t.grad is None for n, t in wide.items() if n.endswith("_lengths"))
    for name in wide:
        if name.endswith("_lengths"):
            for bad in (0.0, 0.5, -1.0, torch.nan):
                few = {**tensors, name: tensors[name].float().index_fill(0, torch.tensor(1), bad)}
                with pytest.raises(ValueError, match=f"{name} must be at least 1 token everywhere"):
                    case(few)


@pytest.mark.parametrize("name", losses.__all__)
def test_words_are_refused_by_the_list_of_known_ones(name: str) -> None:
    """A hyper-parameter that takes words names them all when it is given another."""
    case = next(case for case in CASES if case.name == name)
    for parameter in inspect.signature(case.fn).parameters.values():
        words = re.findall(r"['\"](\w+)['\"]", str(parameter.annotation))
        if parameter.kind is parameter.KEYWORD_ONLY and words:
            with pytest.raises(ValueError, match=f"^{parameter.name} must be one of {', '.join(words)}"):
                case.fn(*case.inputs().values(), **{**case.hyper, parameter.name: "nothing of the kind"})
