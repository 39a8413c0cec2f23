"""Models from folders, configs and memory; unsafe or incomplete folders are refused before anything is read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from rlft.models import load_causal_lm, load_sequence_classifier
from rlft.models.folder_checks import check_folder
from rlft.models.pretrained import new_head
from tests.tiny import tiny_llama, tiny_qwen2

TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


# -- sources ----------------------------------------------------------------------------------------------------------
def test_from_a_config_under_a_seed() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (load_causal_lm(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(first, again)
    assert not same(first, other)
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert {p.dtype for p in load_causal_lm(TINY, dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert load_causal_lm(TINY, attn_implementation="eager").config._attn_implementation == "eager"


def test_from_a_folder(saved: Path) -> None:
    state = torch.random.get_rng_state()
    for source in (saved, str(saved)):
        assert same(load_causal_lm(source), tiny_llama())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert load_causal_lm(saved, dtype=torch.float64).dtype == torch.float64


def test_from_memory_is_the_same_object() -> None:
    model = tiny_llama()
    assert load_causal_lm(model) is model
    for option in ({"revision": "main"}, {"load_in_4bit": True}, {"attn_implementation": "eager"}):
        with pytest.raises(ValueError, match="has no effect on a model in memory"):
            load_causal_lm(model, **option)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is no family.*did you mean 'llama'"),
        ({"model_type": None}, "for example 'llama'"),
        ({"hiden_size": 3}, "'hiden_size' is no setting of a llama config; did you mean 'hidden_size'"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map names Python code"),
    ],
)
def test_configs_that_are_wrong_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_causal_lm({**TINY, **change})


def test_no_such_folder_and_no_config(tmp_path: Path) -> None:
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(ValueError, match="there is no folder"):
            load_causal_lm(source)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="dtype 'flot32' is unknown; did you mean 'float32'"):
        load_causal_lm(TINY, dtype="flot32")


def test_incomplete_weights_are_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a causal language model \(model.layers.1.mlp.up_proj"):
        load_causal_lm(saved)


# -- classifiers ------------------------------------------------------------------------------------------------------
def test_classifier_remembers_a_new_head(saved: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    fresh = load_sequence_classifier(saved, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fresh.config.num_labels == 1
    assert new_head(fresh) == ("score.weight",)
    assert same(fresh, load_sequence_classifier(saved, seed=5))
    assert not same(fresh, load_sequence_classifier(saved, seed=6))
    fresh.save_pretrained(tmp_path / "reward")
    assert new_head(load_sequence_classifier(tmp_path / "reward")) == ()
    assert new_head(load_sequence_classifier(TINY)) == ("score.weight",)
    assert new_head(load_sequence_classifier(tiny_llama(head="classifier", num_labels=1))) == ()


def test_classifier_from_an_incomplete_model_is_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model itself \(model.norm.weight"):
        load_sequence_classifier(saved)


# -- quantisation -----------------------------------------------------------------------------------------------------
def test_quantisation_settings(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from rlft.models.pretrained import quantization

    assert quantization(False, False, torch.float32) is None
    with pytest.raises(ValueError, match="exclude each other"):
        quantization(True, True, torch.float32)
    with pytest.raises(ValueError, match="leave out load_in_4bit"):
        load_causal_lm(saved, load_in_4bit=True, quantization_config=object())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'rlft\[quant\]'"):
        load_causal_lm(saved, load_in_4bit=True)


# -- safety -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_local_config_is_refused_and_never_run(saved: Path, where: str, nested: bool) -> None:
    (saved / "evil.py").write_text("raise SystemExit('executed')")
    entry = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    edit(saved / where, **({"text_config": {"auto_map": entry}} if nested else {"auto_map": entry}))
    with pytest.raises(ValueError, match=r"auto_map.*trust_remote_code=True"):
        load_causal_lm(saved)
    assert "evil" not in sys.modules
    check_folder(saved, trust_remote_code=True)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd.safetensors", "a/../../b.safetensors", "a\\b.safetensors"]
)
def test_index_that_leads_out_of_the_folder_is_refused(saved: Path, name: str) -> None:
    edit(saved / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": name})
    with pytest.raises(ValueError, match="leads out of the folder"):
        load_causal_lm(saved)


def test_index_with_pickles_is_refused(saved: Path) -> None:
    edit(saved / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "pytorch_model.bin"})
    with pytest.raises(ValueError, match=r"only \.safetensors files are loaded"):
        load_causal_lm(saved)


def test_links_out_of_the_folder_are_refused_but_the_hub_cache_is_not(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    os.replace(saved / "model.safetensors", outside)
    (saved / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to a file outside the folder"):
        load_causal_lm(saved)
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    (saved / "model.safetensors").unlink()
    os.replace(outside, hub / "blobs" / "abc")
    os.replace(saved, hub / "snapshots" / "rev")
    (hub / "snapshots" / "rev" / "model.safetensors").symlink_to("../../blobs/abc")
    assert same(load_causal_lm(hub / "snapshots" / "rev"), tiny_llama())


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
     "added_tokens.json", "tokenizer.model", "generation_config.json", "anything.else", "additional_chat_templates/tool.jinja"],
)  # fmt: skip
def test_no_file_of_a_folder_may_be_a_link_out_of_it(saved: Path, tmp_path: Path, name: str) -> None:
    """Else a template could carry a file of this machine into the exported model."""
    from rlft.models import load_tokenizer
    from tests.tiny import char_tokenizer

    char_tokenizer().save_pretrained(saved)
    outside = tmp_path / "secret.txt"
    outside.write_text("top {{ secret }}")
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(outside)
    for load in (load_tokenizer, load_causal_lm):
        with pytest.raises(ValueError, match=rf"{name} is a link to a file outside the folder; copy the file into it"):
            load(saved)
    (saved / name).unlink()
    (saved / name).symlink_to(tmp_path / "gone")  # one that leads nowhere may lead somewhere tomorrow
    with pytest.raises(ValueError, match="is a link to a file outside the folder"):
        load_tokenizer(saved)


def test_links_inside_a_folder_are_followed(saved: Path) -> None:
    from rlft.models import load_tokenizer
    from tests.tiny import char_tokenizer

    char_tokenizer().save_pretrained(saved)
    (saved / "template").write_text("{{ messages }}")
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    (saved / "chat_template.jinja").symlink_to("template")
    assert load_tokenizer(saved).chat_template == "{{ messages }}"


def test_pickled_weights_are_refused_and_never_read(saved: Path) -> None:
    class Boom:
        def __reduce__(self):
            return (sys.exit, ("executed",))

    (saved / "model.safetensors").unlink()
    torch.save({"x": Boom()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle"):
        load_causal_lm(saved)


def test_broken_json_names_the_file(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_causal_lm(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_causal_lm(saved)


def test_nothing_unpickles_while_loading(saved: Path) -> None:
    seen: list[str] = []
    active = [True]

    def hook(event: str, args: tuple) -> None:
        if active[0] and event in ("pickle.find_class", "subprocess.Popen", "socket.connect"):
            seen.append(f"{event} {args}")

    sys.addaudithook(hook)
    try:
        load_causal_lm(saved)
        tiny_qwen2().save_pretrained(saved.parent / "other", max_shard_size="20KB")
        load_causal_lm(saved.parent / "other")
    finally:
        active[0] = False
    assert len(list((saved.parent / "other").glob("*.safetensors"))) > 1
    assert seen == []


def test_hub_models_are_asked_for_without_pickles_and_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: dict = {}

    def from_pretrained(name: str, **options):
        asked.update(options, name=name)
        raise OSError("no network in tests")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"from the hub .OSError: no network in tests.; check the name"):
        load_causal_lm("some/model", revision="abc", dtype="bfloat16")
    assert asked["name"] == "some/model"
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False
    assert asked["revision"] == "abc"
    assert asked["dtype"] == torch.bfloat16
