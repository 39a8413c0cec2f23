"""Adapters: what they sit on, what trains, in which dtype; and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora, check_trainable, load_adapter, load_causal_lm
from tests.models.oracle import alone, batch, close, perturb, pick
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen2

LOGPS = frozenset({"logps"})


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_fresh_adapter_changes_no_output_and_trains_alone(build) -> None:
    data, state = batch(), torch.random.get_rng_state()
    before = pick(alone(build(), data), data)
    model = add_lora(build())
    assert torch.equal(torch.random.get_rng_state(), state)
    close(pick(alone(model, data), data), before, 1e-6)
    report = check_trainable(model)
    assert report.names
    assert all("lora_" in name for name in report.names)
    assert not any("lm_head" in name for name in report.names)
    assert report.count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert f"{report.count:,} of {report.total:,} parameters train" in str(report)
    assert str(report).endswith("float32")


def test_seed_of_the_adapter() -> None:
    def first(seed: int) -> torch.Tensor:
        model = add_lora(tiny_llama(), LoraSettings(r=2), seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens", "lm_head"], ["embed_tokens"], ["norm"]], ids=str)
def test_adapter_is_float32_over_a_bfloat16_base(saved) -> None:
    """verl and others cast it: updates below 2^-8 of a weight then vanish. And it must run, and move."""
    model = add_lora(
        tiny_llama(dtype=torch.bfloat16), LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=saved)
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert check_trainable(model).dtype == torch.float32
    assert next(p for p in model.parameters() if not p.requires_grad).dtype == torch.bfloat16
    policy, data = Policy(model), batch()
    out = policy(data, want=frozenset({"logps", "token_kl", "ref_logps"}))
    close(out["logps"].detach(), out["ref_logps"], 1e-6 if not saved else 5e-2)
    (out["logps"].sum() + out["token_kl"].sum()).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert moved >= {n for n in before if "lora_B" in n or "modules_to_save" in n}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora r must be a whole number >= 1"),
        ({"r": True}, "lora r must be"),
        ({"r": 2.0}, "lora r must be"),
        ({"alpha": float("nan")}, "lora alpha must be a finite number > 0"),
        ({"alpha": 0.0}, "lora alpha must be"),
        ({"dropout": 1.0}, "lora dropout must be"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "key_proj"]}, r"target_modules 'key_proj' matches no module.*k_proj"),
        ({"target_modules": ["c_attn"]}, r"target_modules 'c_attn' matches no module"),
        ({"modules_to_save": ["head"]}, r"modules_to_save 'head' matches no module.*lm_head"),
    ],
)
def test_names_that_match_nothing_are_refused(settings, message) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraSettings(r=2, **settings))
    assert not any("lora" in name for name, _ in model.named_parameters())  # refused before anything is changed


def test_a_peft_config_is_taken_as_it_is() -> None:
    from peft import LoraConfig

    model = add_lora(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True))
    assert model.peft_config["default"].use_dora
    policy, data = Policy(model), batch()
    assert policy.reference_kind == "adapter_off"
    close(policy(data, want=LOGPS)["logps"], policy.reference_logps(data), 1e-6)
    with pytest.raises(ValueError, match="'nothing' matches no module"):
        add_lora(tiny_llama(), LoraConfig(r=3, target_modules=["nothing"]))


def test_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(add_lora(tiny_llama(), LoraSettings(r=2)), LoraSettings(r=2))


def test_models_that_cannot_learn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no parameter is trainable.*is_trainable=True"):
        check_trainable(tiny_llama().requires_grad_(False))
    with pytest.raises(ValueError, match=r"is torch.bfloat16; updates below 1/256.*dtype='float32'"):
        check_trainable(tiny_llama(dtype=torch.bfloat16))
    assert check_trainable(tiny_llama(dtype=torch.float64)).dtype == torch.float64
    policy = Policy(tiny_llama().requires_grad_(False), critic="shared")
    assert check_trainable(policy).names == ("value_head.weight", "value_head.bias")


# -- adapter folders --------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model and, in ``adapter``, a trained adapter of it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = add_lora(load_causal_lm(tmp_path / "base"), LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))
    perturb(model)
    Policy(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_folder_comes_back_trainable_and_learns(folder: Path) -> None:
    state = torch.random.get_rng_state()
    model = load_causal_lm(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = check_trainable(model).names
    assert len(names) == 8  # defect R5: 0 of 8 moved
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Policy(model)(batch(), want=LOGPS)["logps"].sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])} == set(names)


def test_adapter_over_a_bfloat16_base_stays_float32(folder: Path) -> None:
    model = load_causal_lm(folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    exact = load_causal_lm(folder)
    for (name, a), (_, b) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a, b), name


@pytest.mark.parametrize(
    "base",
    [
        lambda: tiny_llama(hidden_size=16, head_dim=4),  # other shapes
        tiny_gpt2,  # other names
        lambda: tiny_llama(num_hidden_layers=1),  # tensors without a place
        lambda: tiny_llama(num_hidden_layers=3),  # tensors missing
    ],
    ids=["shapes", "names", "unmatched", "missing"],
)
def test_adapter_of_another_base_is_refused(folder: Path, base) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(folder, model=base())


def test_adapter_on_an_equal_base_in_memory(folder: Path) -> None:
    data = batch()
    ours = pick(alone(load_adapter(folder, model=tiny_llama()), data), data)
    close(ours, pick(alone(load_causal_lm(folder), data), data), 1e-6)


def test_renamed_adapter_tensors_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("q_proj", "k_proj"): value for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="does not fit"):
        load_causal_lm(folder)


def test_adapter_folders_that_lack_something_are_refused(folder: Path) -> None:
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        load_causal_lm(folder)
    config.write_text(text)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        load_causal_lm(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_head_and_embedding_agree_when_merged(settings) -> None:
    """unsloth 9331: a tied head was lost at merge, 5.9 logits off. The live model and the merged one agree."""
    data = batch()
    model = add_lora(tiny_qwen2(), LoraSettings(r=2, **settings))
    perturb(model)
    live = Policy(model, reference="none")(data, want=LOGPS)["logps"].detach()
    close(pick(alone(model, data), data), live, 1e-5)
    close(Policy(model.merge_and_unload(), reference="none")(data, want=LOGPS)["logps"], live, 1e-4)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_adapter_on_a_tied_weight_is_refused(name) -> None:
    with pytest.raises(ValueError, match=rf"'{name}', whose weight is embedding and head at once"):
        add_lora(tiny_qwen2(), LoraSettings(r=2, target_modules=["q_proj", name]))
    add_lora(tiny_llama(), LoraSettings(r=2, target_modules=["q_proj", name]))  # not tied: fine
