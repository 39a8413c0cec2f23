"""Values: of the state before each token, from a shared head or from a critic of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora, load_sequence_classifier
from tests.models.oracle import batch, close, row_ids
from tests.tiny import tiny_gpt2, tiny_llama

VALUES = frozenset({"values"})


def states_alone(trunk, data) -> torch.Tensor:
    """``[B, T, D]`` hidden states before each completion token, each row by itself."""
    out = torch.zeros(*data.completion_ids.shape, 32, dtype=torch.float64)
    for i in range(data.num_rows):
        prompt, completion = row_ids(data, i)
        hidden = trunk(torch.cat([prompt, completion])[None]).last_hidden_state[0]
        out[i, : len(completion)] = hidden[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
    return out


def test_shared_head_starts_at_zero_and_reads_the_state_before_each_token() -> None:
    model, data = tiny_llama(dtype=torch.float64), batch()
    policy = Policy(model, reference="none", critic="shared")
    out = policy(data, want=VALUES | {"logps"})
    assert not out["values"].detach().any()
    with torch.no_grad():
        policy.value_head.weight.normal_()
        policy.value_head.bias.fill_(0.5)
    states = states_alone(model.model, data)
    expected = states @ policy.value_head.weight[0] + policy.value_head.bias
    expected = expected.where(data.completion_mask, 0.0)
    for want in (VALUES, VALUES | {"logps"}):
        close(policy(data, want=want)["values"], expected)
    parameters = list(policy.parameters())
    mine = torch.autograd.grad(policy(data, want=VALUES)["values"].square().sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    for (name, _), a, b in zip(policy.named_parameters(), mine, theirs, strict=True):
        assert (a is None) == (b is None) == (name == "model.lm_head.weight")
        if a is not None:
            close(a, b, 1e-9)


def test_shared_head_is_float32_over_a_bfloat16_trunk() -> None:
    policy = Policy(tiny_llama(dtype=torch.bfloat16), reference="none", critic="shared")
    assert {p.dtype for p in policy.value_head.parameters()} == {torch.float32}
    with torch.no_grad():
        policy.value_head.weight.fill_(1.0)
    plain = policy(batch(), want=VALUES)["values"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = policy(batch(), want=VALUES)["values"]
    assert plain.dtype == cast.dtype == torch.float32
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_critic_of_its_own(build) -> None:
    model, other, data = tiny_llama(dtype=torch.float64), build(dtype=torch.float64, seed=1), batch()
    policy = Policy(model, reference="none", critic=other)
    with torch.no_grad():
        policy.critic.head.weight.normal_()
    trunk = policy.critic.model.base_model
    expected = (states_alone(trunk, data) @ policy.critic.head.weight[0]).where(data.completion_mask, 0.0)
    out = policy(data, want=VALUES | {"logps"})
    close(out["values"], expected)
    # One loss trains the policy, the other the critic; neither reaches the other model.
    for name, loss in (("critic.", out["values"].sum()), ("model.", out["logps"].sum())):
        trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        reached = {n for n, g in zip(trainable, grads, strict=True) if g is not None}
        assert reached == {n for n in trainable if n.startswith(name)}


def test_a_reward_model_lends_its_score_head() -> None:
    reward = load_sequence_classifier(tiny_llama(head="classifier", num_labels=1, dtype=torch.float64))
    policy = Policy(tiny_llama(dtype=torch.float64), reference="none", critic=reward)
    data = batch()
    expected = reward.score(states_alone(reward.model, data)).squeeze(-1).where(data.completion_mask, 0.0)
    close(policy(data, want=VALUES)["values"], expected)
    assert not reward.score.weight.requires_grad


def test_critic_with_an_adapter_and_policy_with_one() -> None:
    policy = Policy(add_lora(tiny_llama(), LoraSettings(r=2)), critic=add_lora(tiny_gpt2(), LoraSettings(r=2)))
    policy(batch(), want=VALUES)["values"].sum().backward()
    assert policy.critic.head.bias.grad is not None
    trainable = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert all("lora" in n or "critic.head" in n for n in trainable)


def test_a_damaged_value_head_is_named(tmp_path: Path) -> None:
    policy = Policy(tiny_llama(), critic="shared")
    policy.save_pretrained(tmp_path)
    (tmp_path / "value_head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"value_head\.safetensors cannot be read .* save the model again"):
        policy.load_value_head(tmp_path)
