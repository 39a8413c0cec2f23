"""The reference is the policy as it was passed: which kind, what it computes, and what can move it."""

from __future__ import annotations

import copy

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.adapters import REFERENCE
from tests.models.oracle import alone, batch, close, exact_kl, perturb, pick, trained_lora
from tests.tiny import FAMILIES, tiny_gpt2, tiny_llama

WANT = frozenset({"logps", "token_kl", "ref_logps"})


def fresh_lora(family: str = "llama", **settings):
    return add_lora(FAMILIES[family](dtype=torch.float64), LoraSettings(r=2, **settings))


def biased_lora():
    """An adapter that trains the base model's biases too: switching it off does not give the base back."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(FAMILIES["qwen2"](dtype=torch.float64), config)
    perturb(model, size=0.01)
    return model


MODELS = {
    "adapter_off": fresh_lora,
    "adapter_off, gpt2": lambda: fresh_lora("gpt2"),
    "adapter_off, head saved": lambda: fresh_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "adapter_copy": trained_lora,
    "adapter_copy, gpt2": lambda: trained_lora(tiny_gpt2(dtype=torch.float64)),
    "adapter_copy, head saved": lambda: trained_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "adapter_copy, head adapted": lambda: trained_lora(target_modules=["q_proj", "lm_head"]),
    "snapshot": lambda: tiny_llama(dtype=torch.float64),
    "snapshot, changed in memory": lambda: changed(),
    "snapshot, tied": lambda: FAMILIES["qwen2"](dtype=torch.float64),
    "snapshot, biases train": biased_lora,
}


def changed():
    """A model trained earlier in the same script; its path still names the weights it started from (defect R1)."""
    model = tiny_llama(dtype=torch.float64)
    model.config._name_or_path = "some/other-model"
    perturb(model)
    return model


@pytest.mark.parametrize("case", sorted(MODELS))
def test_reference_is_the_policy_as_passed(case) -> None:
    """Before a step nothing differs, exactly; after one, the reference still is what it was and the KL is exact."""
    model, data = MODELS[case](), batch()
    before = alone(model, data).detach()
    policy = Policy(model)
    assert policy.reference_kind == case.split(",")[0]
    out = policy(data, want=WANT)
    close(out["logps"], pick(before, data))
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
    assert torch.equal(out["token_kl"].detach(), torch.zeros_like(out["token_kl"]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for grad in torch.autograd.grad(out["token_kl"].sum(), trainable):
        assert not grad.any()

    perturb(model, seed=9, size=0.2)
    out = policy(data, want=WANT)
    after = alone(model, data)
    assert (pick(after, data) - pick(before, data)).abs().max() > 1e-2
    close(out["logps"], pick(after, data))
    close(out["ref_logps"], pick(before, data))
    close(out["token_kl"], exact_kl(after, before).where(data.completion_mask, 0.0))
    close(policy.reference_logps(data), pick(before, data))
    mine = torch.autograd.grad(out["token_kl"].sum(), trainable)
    theirs = torch.autograd.grad(exact_kl(after, before).where(data.completion_mask, 0.0).sum(), trainable)
    for a, b in zip(mine, theirs, strict=True):
        assert b.any()
        close(a, b, 1e-9)


@pytest.mark.parametrize("case", sorted(MODELS))
def test_a_step_moves_what_trains_and_nothing_of_the_reference(case) -> None:
    model, data = MODELS[case](), batch()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    policy = Policy(model)
    parameters = dict(policy.named_parameters())
    assert {name.removeprefix("model.") for name, p in parameters.items() if p.requires_grad} == trains
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.1)
    for _ in range(2):  # a fresh LoRA moves its A only once B has moved
        optimizer.zero_grad()
        policy(data, want=WANT)["logps"].sum().backward()
        optimizer.step()
    for name, p in parameters.items():
        moved = not torch.equal(p, before[name])
        assert moved == p.requires_grad, name


def test_switching_leaves_requires_grad_and_the_active_adapter_alone() -> None:
    for case in ("adapter_off", "adapter_copy"):
        model = MODELS[case]()
        next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # a choice of the user's
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        policy = Policy(model)
        policy(batch(), want=WANT)
        now = {name: p.requires_grad for name, p in model.named_parameters()}
        assert {name: now[name] for name in flags} == flags
        assert not any(flag for name, flag in now.items() if name not in flags)
        assert model.active_adapters == ["default"]


def test_an_error_inside_the_reference_pass_leaves_the_adapter_on() -> None:
    policy = Policy(fresh_lora())
    perturb(policy.model)
    data, logps = batch(), frozenset({"logps"})
    before = policy(data, want=logps)["logps"]
    with pytest.raises(RuntimeError, match="boom"), policy._reference.active():
        raise RuntimeError("boom")
    assert torch.equal(policy(data, want=logps)["logps"], before)


def test_merged_adapter_is_refused() -> None:
    policy = Policy(fresh_lora())
    policy.model.merge_adapter()
    data, logps = batch(), frozenset({"logps"})
    for call in (lambda: policy(data, want=WANT), lambda: policy(data, want=logps)):
        with pytest.raises(ValueError, match="merged into the base weights"):
            call()
    with torch.no_grad():
        policy(data, want=logps)  # sampling and scoring without gradient may use it
        with pytest.raises(ValueError, match="merged into the base weights"):
            policy.reference_logps(data)
    policy.model.unmerge_adapter()
    policy(data, want=WANT)


def test_global_random_state_is_left_alone() -> None:
    model = trained_lora()
    state = torch.random.get_rng_state()
    Policy(model)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- explicit model ---------------------------------------------------------------------------------------------------
def test_explicit_reference_of_another_shape_and_logit_scale() -> None:
    data = batch()
    for family, settings in (("granite", {}), ("gemma2", {}), ("phi", {}), ("gpt2", {"n_embd": 24, "n_head": 2})):
        model = tiny_llama(dtype=torch.float64)
        other = FAMILIES[family](dtype=torch.float64, **settings).requires_grad_(False)
        policy = Policy(model, reference=other)
        assert policy.reference_kind == "model"
        out = policy(data, want=WANT, temperature=0.7)
        logp, ref = alone(model, data, temperature=0.7), alone(other, data, temperature=0.7)
        close(out["ref_logps"], pick(ref, data))
        close(out["token_kl"], exact_kl(logp, ref).where(data.completion_mask, 0.0))
        close(policy.reference_logps(data, temperature=0.7), pick(ref, data))


def test_unfit_references_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        Policy(model, reference=model)
    wrapped = fresh_lora()
    with pytest.raises(ValueError, match="shares layers with it"):
        Policy(wrapped, reference=wrapped.get_base_model())
    with pytest.raises(ValueError, match=r"trainable parameters .*requires_grad_\(False\)"):
        Policy(model, reference=tiny_llama(seed=1))
    with pytest.raises(ValueError, match="vocabulary of 90 and the policy one of 100"):
        Policy(model, reference=tiny_llama(vocab_size=90).requires_grad_(False))
    Policy(model, reference=copy.deepcopy(model).requires_grad_(False))


def test_several_adapters_or_prompt_tuning_are_refused() -> None:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    prefix = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning"):
        Policy(prefix)
    two = fresh_lora()
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"exactly one active adapter, got .'default', 'second'."):
        Policy(two)


# -- moving it --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["adapter_copy", "adapter_copy, head saved", "snapshot", "snapshot, tied"])
def test_update_reference(case) -> None:
    model, data = MODELS[case](), batch()
    policy = Policy(model)
    start = policy.reference_state()
    assert start
    perturb(model, seed=5)
    now = dict(model.named_parameters())
    policy.update_reference(0.25)
    for name, value in policy.reference_state().items():
        close(value, 0.75 * start[name] + 0.25 * now[name].detach(), 1e-12)
    policy.update_reference(1.0)
    out = policy(data, want=WANT)
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
    assert not out["token_kl"].detach().any()
    policy.update_reference(0.0)
    assert torch.equal(policy.reference_logps(data), out["ref_logps"])
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="mix must be"):
            policy.update_reference(bad)


def test_copy_of_a_fresh_adapter_can_be_moved() -> None:
    policy, data = Policy(fresh_lora(), reference="copy"), batch()
    assert policy.reference_kind == "adapter_copy"
    out = policy(data, want=WANT)
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
    perturb(policy.model)
    before = policy(data, want=WANT)
    assert before["token_kl"].detach().any()
    close(before["ref_logps"], out["ref_logps"])
    policy.update_reference(1.0)
    close(policy.reference_logps(data), before["logps"].detach())
    assert Policy(tiny_llama(), reference="copy").reference_kind == "snapshot"


def test_update_of_other_kinds_is_refused() -> None:
    model = tiny_llama()
    cases = {
        "adapter_off": Policy(fresh_lora()),
        "none": Policy(tiny_llama(), reference="none"),
        "model": Policy(model, reference=copy.deepcopy(model).requires_grad_(False)),
    }
    for kind, policy in cases.items():
        with pytest.raises(ValueError, match=rf"the reference \({kind}\) cannot be updated"):
            policy.update_reference(0.5)
        assert policy.reference_state() == {}


@pytest.mark.parametrize("case", ["adapter_copy", "snapshot"])
def test_reference_state_survives_a_restart(case) -> None:
    """An updated reference is in the checkpoint; without it a resumed run compares with another one (defect R2)."""
    policy, data = Policy(MODELS[case]()), batch()
    perturb(policy.model, seed=5)
    policy.update_reference(0.5)
    perturb(policy.model, seed=6)
    expected = policy(data, want=WANT)
    again = Policy(MODELS[case]())
    again.load_trainable_state(policy.trainable_state())
    assert not torch.equal(again(data, want=WANT)["ref_logps"], expected["ref_logps"])
    again.load_reference_state(policy.reference_state())
    for name, value in again(data, want=WANT).items():
        assert torch.equal(value, expected[name])
    state = policy.reference_state()
    name = next(iter(state))
    with pytest.raises(ValueError, match="1 tensors missing"):
        again.load_reference_state({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="has shape"):
        again.load_reference_state({**state, name: state[name][:1]})
    assert REFERENCE not in " ".join(again.trainable_state())


def test_reference_of_a_moved_module_still_follows() -> None:
    """``module.to`` and sharding replace tensors: the reference is found by name, not by object."""
    policy = Policy(tiny_llama(), reference="auto").double()
    perturb(policy.model)
    policy.update_reference(1.0)
    out = policy(batch(), want=WANT)
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
