"""What a trainer reads off a loss before the forward pass."""

from __future__ import annotations

import inspect

import pytest
import torch

from rlft import losses
from tests.losses.cases import CASES

#: Biased on tokens that the current policy did not sample; see their docstrings.
ON_POLICY = {
    "agro_on_policy",
    "agro_on_policy_causal",
    "agro_on_policy_exact_kl",
    "agro_on_policy_lr_causal",
    "agro_on_policy_lr_kl",
    "agro_on_policy_lr_moments",
    "agro_on_policy_lr_token",
    "nash_md_pg",
    "trpo",
}
#: The advantage times something: a row whose advantage is 0 has neither loss nor gradient.
ADVANTAGE_WEIGHTED = {"cispo", "grpo", "gspo", "gspo_token", "ppo_clip", "ppo_penalty", "reinforce", "sapo"}
#: Make every answer they see more likely: beside a preference loss they are kept to the chosen ones.
IMITATES = {"distillation", "sft"}
#: Sort the rows of all prompts together.
COUPLED = {"aot", "aot_unpaired"}
FIRST = {case.name: case for case in reversed(CASES)}  # each loss with the hyper-parameters of its first case


@pytest.mark.parametrize("name", losses.__all__)
def test_marks(name: str) -> None:
    fn = getattr(losses, name)
    assert fn.couples_rows == (name in COUPLED)
    assert fn.on_policy_only == (name in ON_POLICY)
    assert fn.advantage_weighted == (name in ADVANTAGE_WEIGHTED)
    assert fn.imitates == (name in IMITATES)
    if "group_ids" not in inspect.signature(fn).parameters:
        assert fn.min_group == 1


@pytest.mark.parametrize("name", [name for name, case in FIRST.items() if "group_ids" in case.tensor_names])
def test_min_group_is_the_smallest_group_that_is_taken(name: str) -> None:
    case = FIRST[name]
    tensors = {name: tensor[:6].clone() for name, tensor in case.inputs().items()}
    size = case.fn.min_group
    assert size in (1, 2)
    tensors["group_ids"] = torch.arange(6) // size
    case(tensors)
    if size > 1:
        tensors["group_ids"] = torch.tensor([0, 0, 1, 1, 2, 3])  # two of one row
        with pytest.raises(ValueError, match=r"needs groups of at least 2 rows|must pair the rows up"):
            case(tensors)


@pytest.mark.parametrize("name", sorted(ADVANTAGE_WEIGHTED))
def test_rows_without_advantage_have_neither_loss_nor_gradient(name: str) -> None:
    case = FIRST[name]
    hyper = {**case.hyper, **({"beta": 0.0} if "beta" in case.hyper else {})}
    tensors = case.inputs()
    tensors["advantages"] = torch.zeros_like(tensors["advantages"])
    logps = tensors["logps"].clone().requires_grad_()
    loss = case.fn(*({**tensors, "logps": logps}[n] for n in case.tensor_names), **hyper).loss
    assert not loss.detach().any()
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert not gradient.any()


def test_a_mark_is_off_unless_it_is_set() -> None:
    for name in ("dpo", "rloo", "agro_off_policy", "kto", "sft"):
        assert getattr(losses, name).on_policy_only is False
        assert getattr(losses, name).couples_rows is False
        assert getattr(losses, name).advantage_weighted is False
    assert losses.dpo.imitates is False
    assert losses.sft.min_group == 1
