"""What is written can be read again, by us and by transformers and peft, and it is the same model."""

from __future__ import annotations

import json

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora, check_trainable, load_causal_lm
from tests.models.oracle import alone, batch, close, perturb, pick, trained_lora
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen2

LOGPS = frozenset({"logps"})


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_full_model_round_trip(build, tmp_path) -> None:
    model, data = build(), batch()
    policy = Policy(model, critic="shared")
    perturb(policy)
    expected = policy(data, want=LOGPS | {"values"})
    policy.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    again = Policy(load_causal_lm(tmp_path), critic="shared")
    again.load_value_head(tmp_path)
    for name, value in again(data, want=LOGPS | {"values"}).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("kind", ["adapter_off", "adapter_copy"])
def test_adapter_round_trip(kind, settings, tmp_path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = add_lora(load_causal_lm(base), LoraSettings(r=2, **settings))
    if kind == "adapter_copy":
        perturb(model)
    policy, data = Policy(model, critic="shared"), batch()
    assert policy.reference_kind == kind
    perturb(policy, seed=4)
    expected = policy(data, want=LOGPS | {"values"})
    policy.save_pretrained(tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "README.md"}
    assert "rlft_reference" not in json.dumps(json.loads((tmp_path / "out/adapter_config.json").read_text()))
    loaded = load_causal_lm(tmp_path / "out")
    again = Policy(loaded, critic="shared")
    again.load_value_head(tmp_path / "out")
    for name, value in again(data, want=LOGPS | {"values"}).items():
        assert torch.equal(value, expected[name])
    # Defect R5: an adapter that comes back frozen trains nothing.
    assert set(check_trainable(loaded).names) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert again.reference_kind == "adapter_copy"
    # peft alone reads the same folder.
    from peft import PeftModel

    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    close(pick(alone(plain, data), data), expected["logps"], 1e-5)
    merged = plain.merge_and_unload()
    close(pick(alone(merged, data), data), expected["logps"], 1e-4)


def test_critic_of_its_own_round_trip(tmp_path) -> None:
    policy, data = Policy(tiny_llama(), critic=tiny_gpt2(seed=1)), batch()
    perturb(policy)
    expected = policy(data, want=frozenset({"values"}))["values"]
    policy.save_pretrained(tmp_path)
    again = Policy(load_causal_lm(tmp_path), critic=load_causal_lm(tmp_path / "critic"))
    again.load_value_head(tmp_path)
    assert torch.equal(again(data, want=frozenset({"values"}))["values"], expected)


def test_trainable_state_round_trip_and_copies() -> None:
    policy, data = Policy(trained_lora(), critic="shared"), batch()
    perturb(policy)
    state = policy.trainable_state()
    assert set(state) == {n for n, p in policy.named_parameters() if p.requires_grad}
    expected = policy(data, want=LOGPS)["logps"]
    perturb(policy, seed=8)
    assert not torch.equal(policy(data, want=LOGPS)["logps"], expected)
    policy.load_trainable_state(state)
    assert torch.equal(policy(data, want=LOGPS)["logps"], expected)


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    policy = Policy(add_lora(tiny_llama(), LoraSettings(r=2)), critic="shared")
    state = policy.trainable_state()
    name = sorted(state)[0]
    perturb(policy)
    before = policy.trainable_state()
    cases = {
        "1 tensors missing": {k: v for k, v in state.items() if k != name},
        "1 unknown": {**state, "other": state[name]},
        "has shape": {**state, sorted(state)[-1]: torch.zeros(1)},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            policy.load_trainable_state(wrong)
    other = Policy(add_lora(tiny_llama(), LoraSettings(r=3)), critic="shared")
    with pytest.raises(ValueError, match="same LoRA rank"):
        policy.load_trainable_state(other.trainable_state())
    for key, value in policy.trainable_state().items():
        assert torch.equal(value, before[key])


def test_value_head_without_critic_or_file(tmp_path) -> None:
    with pytest.raises(ValueError, match="no critic to load"):
        Policy(tiny_llama()).load_value_head(tmp_path)
    with pytest.raises(ValueError, match=r"value_head.safetensors does not exist"):
        Policy(tiny_llama(), critic="shared").load_value_head(tmp_path)
