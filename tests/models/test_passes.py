"""How often a model's trunk runs in one forward of the policy: once for each set of weights that is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.scorer import unwrap
from rlft.ops import MOMENTS
from rlft.types import Batch
from tests.tiny import random_batch, tiny_llama

EVERYTHING = frozenset({"logps", "entropy", "token_kl", "ref_logps", "ref_states", *MOMENTS})


class Trunks:
    """Counts passes through the trunks of a policy and of its reference."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        for model in (policy.hf_model, policy.reference_model):
            if model is not None:
                unwrap(model).model.register_forward_pre_hook(self._passed)

    def _passed(self, *_: Any) -> None:
        self.count += 1

    def of(self, policy: Policy, batch: Batch, *want: str) -> int:
        """Passes of one forward."""
        before = self.count
        policy(batch, want=frozenset(want))
        return self.count - before


def policies(kind: str) -> Policy:
    if kind == "lora":
        return Policy(add_lora(tiny_llama(dtype=torch.float64), LoraSettings(r=2)))
    other = tiny_llama(seed=1, dtype=torch.float64).requires_grad_(False)
    return Policy(tiny_llama(dtype=torch.float64), reference=other if kind == "another model" else "copy")


def moved(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.hf_model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


LEAST = [
    (("logps",), 1),
    (("ref_logps",), 1),
    (("ref_states",), 1),
    (("states",), 1),
    (("logps", "states"), 1),
    (("ref_logps", "ref_states"), 1),
    (("logps", "ref_logps"), 2),
    (("logps", "ref_logps", "ref_states"), 2),
    (("logps", "ref_logps", "token_kl", "entropy", "ref_states", "states"), 2),
    (("logps", "token_kl", "token_log_ratio_sq"), 2),
    (("behaviour_log_ratio",), 2),
    (("logps", "token_kl", "behaviour_log_ratio", "behaviour_log_ratio_sq"), 2),
]


@pytest.mark.parametrize("kind", ["lora", "another model", "copy"])
@pytest.mark.parametrize(("want", "least"), LEAST, ids=lambda v: "+".join(v) if isinstance(v, tuple) else str(v))
def test_no_trunk_runs_twice(kind: str, want: tuple[str, ...], least: int) -> None:
    policy, batch = policies(kind), random_batch(groups=2, per_group=4)
    policy(batch, want=frozenset({"logps", "ref_logps"}))  # the paths are found
    trunks = Trunks(policy)
    assert trunks.of(policy, batch, *want) == least
    policy.remember_behaviour()
    moved(policy, 3)
    of_behaviour = bool(set(want) & {"behaviour_log_ratio", "behaviour_log_ratio_sq"})
    assert trunks.of(policy, batch, *want) == least + of_behaviour


@pytest.mark.parametrize("kind", ["lora", "another model", "copy"])
def test_kept_states_leave_the_policys_own_pass_alone(kind: str) -> None:
    policy, batch = policies(kind), random_batch(groups=2, per_group=4)
    moved(policy, 2)
    with torch.no_grad():
        kept = policy(batch, want=frozenset({"states", "ref_states"}))
    policy.remember_behaviour()
    moved(policy, 3)
    trunks = Trunks(policy)
    full = batch.replace(behaviour_states=kept["states"], ref_states=kept["ref_states"])
    assert trunks.of(policy, full, *EVERYTHING) == 1
    assert trunks.of(policy, full, "ref_logps") == 0
    assert trunks.of(policy, batch, *EVERYTHING) == 3


def outcome(policy: Policy, batch: Batch, want: frozenset[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs, and the gradient of a sum that weighs all of them differently."""
    out = policy(batch, want=want)
    parameters = [p for p in policy.hf_model.parameters() if p.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for place, name in enumerate(sorted(out)):
        if out[name].requires_grad and name != "entropy":
            total = total + (place + 1) * out[name].sum()
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: t.detach() for n, t in out.items()}, [g for g in grads if g is not None]


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("kind", ["lora", "another model", "copy"])
@pytest.mark.parametrize("remember", [False, True])
def test_kept_states_change_neither_outputs_nor_gradients(kind: str, remember: bool, layout: Any) -> None:
    policy, batch = policies(kind), random_batch(groups=3, per_group=3)
    policy.layout = layout
    moved(policy, 2)
    with torch.no_grad():
        kept = policy(batch, want=frozenset({"states", "ref_states"}))
    if remember:
        policy.remember_behaviour()
        moved(policy, 3)
    plain = outcome(policy, batch, EVERYTHING)
    full = batch.replace(behaviour_states=kept["states"], ref_states=kept["ref_states"])
    cached = outcome(policy, full, EVERYTHING)
    for name, value in plain[0].items():
        torch.testing.assert_close(cached[0][name], value, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(cached[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


# -- tokens that are masked -------------------------------------------------------------------------------------------
def with_gaps(batch: Batch, seed: int = 0) -> Batch:
    """Some tokens masked in the middle, some rows masked altogether."""
    keep = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    keep[1::4] = False
    return batch.replace(mask=batch.completion_mask & keep)


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("kind", ["lora", "another model", "copy"])
def test_masked_tokens_stay_out_of_the_head_and_change_nothing(kind: str, layout: Any) -> None:
    policy, batch = policies(kind), with_gaps(random_batch(groups=3, per_group=4, lengths=(2, 7)))
    policy.layout = layout
    moved(policy, 2)
    policy.remember_behaviour()
    moved(policy, 3)
    want = EVERYTHING - {"ref_states"}
    whole = policy(batch, want=want)
    assert policy.layout_used.scored == int(batch.completion_mask.sum())
    part = policy(batch, want=want | {"mask_only"})
    assert policy.layout_used.scored == int(batch.mask.sum())
    parameters = [p for p in policy.hf_model.parameters() if p.requires_grad]

    def gradient(out: dict[str, Tensor]) -> list[Tensor]:
        total = sum((out[n].where(batch.mask, 0.0).sum() for n in sorted(want) if n not in ("entropy", "ref_logps")),
                    torch.zeros((), dtype=torch.float64))  # fmt: skip
        return [g for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None]

    for name, value in whole.items():
        torch.testing.assert_close(part[name], value.where(batch.mask, 0.0), rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(gradient(part), gradient(whole), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_wish_alone_is_no_output() -> None:
    policy, batch = policies("copy"), with_gaps(random_batch())
    assert policy(batch, want=frozenset({"logps", "mask_only"})).keys() == {"logps"}
    blank = batch.replace(mask=torch.zeros_like(batch.mask))
    out = policy(blank, want=frozenset({"logps", "entropy", "ref_logps", "token_kl", "mask_only"}))
    assert all(not t.any() for t in out.values())
    out["logps"].sum().backward()
