"""Bad input 21-33 and 57-63: tokenizers, references, reward models, precision and adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlft.config import ConfigError
from rlft.data import tokenize
from rlft.models import ModelReward, add_lora, load_causal_lm
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, refused, refused_by_command, trainer, varied
from tests.tiny import EOS_ID, PAD_ID, VOCAB, char_tokenizer, tiny_llama, tiny_qwen2

CHAT = [
    {"prompt": [{"role": "user", "content": f"{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
    for i in range(8)
]
SHORT = {"max_prompt_length": None}


# -- tokenizers -----------------------------------------------------------------------------------------------------------
def test_bad_input_21_tokenizer_without_pad(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"no pad token; '<pad>' \(id 0\) is used.*end-of-sequence token is never"
    ) as caught:
        t = trainer(tmp_path, "sft", ANSWERS, processing_class=char_tokenizer(pad=False))
    assert len(caught) == 1
    assert t.tokenizer.pad_token_id == PAD_ID != t.tokenizer.eos_token_id
    t.train()


def test_bad_input_22_pad_is_eos(tmp_path: Path) -> None:
    """Masked by length: the end is trained on, and padding changes nothing."""
    tokenizer = char_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(
        UserWarning, match=r"pad and end-of-sequence token are the same \('<eos>'\).*masked by their length"
    ) as caught:
        t = trainer(tmp_path, "sft", ANSWERS, processing_class=tokenizer)
    assert len(caught) == 1
    (batch,) = t.source.next(0)
    lengths = batch.completion_mask.sum(-1)
    last = batch.completion_ids.gather(1, (lengths - 1)[:, None])[:, 0]
    assert last.tolist() == [EOS_ID] * 4
    assert bool(batch.mask.gather(1, (lengths - 1)[:, None]).all())
    assert int(batch.mask.sum()) == sum(len(str(2 * i)) + 1 for i in t_indices(t, batch))


def t_indices(t: Any, batch: Any) -> list[int]:
    """Which rows a batch holds, read from its prompts."""
    texts = t.tokenizer.batch_decode(batch.prompt_ids, skip_special_tokens=True)
    return [int(text.split("+")[0]) for text in texts]


def test_bad_input_23_tokenizer_without_eos(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, processing_class=char_tokenizer(eos=False)),
        "no end-of-sequence token", "set tokenizer.eos_token",
    )  # fmt: skip


def test_bad_input_24_messages_without_a_template(tmp_path: Path) -> None:
    refused(lambda: trainer(tmp_path, "sft", CHAT), "row 0", "no chat template", "set tokenizer.chat_template")
    prompts = [{"prompt": row["prompt"]} for row in CHAT]
    refused(
        lambda: trainer(tmp_path, "rloo", prompts, reward=varied, beta=0.0),
        "no chat template",
        "set tokenizer.chat_template",
    )


def test_bad_input_25_template_adds_a_second_bos(tmp_path: Path) -> None:
    template = "<bos><bos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = char_tokenizer(add_bos=True, chat_template=template)
    refused(
        lambda: trainer(tmp_path, "sft", CHAT, processing_class=tokenizer, **SHORT),
        "row 0", "two BOS tokens ('<bos>')", "take it out of the chat template",
    )  # fmt: skip
    # One from the template and one from the tokenizer would be two as well: the template's alone is kept.
    tokenizer = char_tokenizer(add_bos=True, chat_template=template[len("<bos>") :])
    t = trainer(tmp_path, "sft", CHAT, processing_class=tokenizer, **SHORT)
    assert t.train_data.examples[0].prompt_ids.count(tokenizer.bos_token_id) == 1


def test_bad_input_26_prompt_that_is_no_prefix(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    refused(
        lambda: trainer(tmp_path, "sft", CHAT, processing_class=char_tokenizer(chat_template=template), **SHORT),
        "row 0", "does not continue its own prompt", "'0<think>'", "chat_template_kwargs",
    )  # fmt: skip
    refused(
        lambda: tokenize([{"prompt": "2+2=", "completion": "=4"}], _merging(), boundary="refuse"),
        "row 0", "not a prefix", "'==4'", "separator=",
    )  # fmt: skip


def _merging() -> Any:
    """A tokenizer that writes two equals signs as one token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "0", "a", ".", "2", "4", "+", "=", "=="])}
    backend = Tokenizer(models.BPE(vocab, [("=", "=")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def test_bad_input_27_tokenizer_larger_than_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=tiny_llama(vocab_size=VOCAB - 10)),
        f"the tokenizer knows {VOCAB} tokens", "id 99", "the model embeds 90", "resize_token_embeddings(100)",
    )  # fmt: skip
    from tests.bad_input.common import MODEL

    refused_by_command(
        capsys, tmp_path, "the model embeds 5", "resize_token_embeddings", model={**MODEL, "vocab_size": 5}
    )


# -- references -----------------------------------------------------------------------------------------------------------
def test_bad_input_28_reference_of_another_vocabulary(tmp_path: Path) -> None:
    other = tiny_llama(vocab_size=VOCAB + 8).requires_grad_(False)
    refused(
        lambda: trainer(tmp_path, "dpo", PAIRS, beta=0.1, ref_model=other),
        "a vocabulary of 108", "the policy one of 100", "models of one tokenizer",
    )  # fmt: skip


def test_bad_input_29_reference_is_the_policy(tmp_path: Path) -> None:
    model = tiny_llama()
    refused(
        lambda: trainer(tmp_path, "dpo", PAIRS, beta=0.1, model=model, ref_model=model),
        "the reference is the policy itself", "use reference='auto'", "copy.deepcopy(model)",
    )  # fmt: skip


def test_bad_input_30_reference_with_trainable_parameters(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "dpo", PAIRS, beta=0.1, ref_model=tiny_llama(seed=1)),
        "trainable parameters", "model.embed_tokens.weight", "reference.requires_grad_(False)",
    )  # fmt: skip


# -- reward models --------------------------------------------------------------------------------------------------------
def classifier(folder: Path, *, tokenizer: Any = None, **config: Any) -> Path:
    """A trained reward model on disk."""
    model = tiny_llama(head="classifier", **{"num_labels": 1, **config})
    model.save_pretrained(folder)
    (tokenizer or char_tokenizer()).save_pretrained(folder)
    return folder


def test_bad_input_31_reward_tokenizer_differs(tmp_path: Path) -> None:
    """The text is encoded again, so scores are those of the text under the reward model's own tokens."""
    from tests.tiny import CHARS, SPECIALS

    other = _reversed_tokenizer(list(SPECIALS), CHARS)
    folder = classifier(tmp_path / "rm", tokenizer=other)
    with pytest.warns(
        UserWarning, match="reward model 'rm' has another tokenizer than the policy: answers are decoded"
    ) as caught:
        t = trainer(tmp_path, "rloo", PROMPTS, reward=str(folder), beta=0.0, max_steps=1)
    assert len(caught) == 1
    direct = ModelReward(str(folder))(prompts=["1+1="], completions=["2"])
    (through,) = t.rewards(prompts=["1+1="], completions=["2"], completion_ids=[[9]]).rewards.tolist()
    assert through == pytest.approx(direct[0], rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path / "same", "rloo", PROMPTS, reward=str(classifier(tmp_path / "rm2")), beta=0.0)


def _reversed_tokenizer(specials: list[str], characters: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*specials, *reversed(characters)])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def test_bad_input_32_reward_head_newly_initialised(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "lm")
    char_tokenizer().save_pretrained(tmp_path / "lm")
    refused(
        lambda: trainer(tmp_path, "rloo", PROMPTS, reward=str(tmp_path / "lm"), beta=0.0),
        "no trained score head (score.weight is random)", "train it first",
    )  # fmt: skip


def test_bad_input_33_reward_model_with_two_outputs(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "rm", num_labels=2)
    refused(
        lambda: trainer(tmp_path, "rloo", PROMPTS, reward=str(folder), beta=0.0),
        "num_labels=2", "one output",
    )  # fmt: skip
    model = tiny_llama(head="classifier", num_labels=2)
    refused(lambda: trainer(tmp_path, "bradley_terry", PAIRS, model=model), "num_labels=2", "num_labels=1")


# -- precision ------------------------------------------------------------------------------------------------------------
def test_bad_input_57_precision_that_the_device_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, mixed_precision="fp16"),
        "mixed_precision='fp16'", "needs a CUDA device", "use 'no' or 'bf16'", kind=ConfigError,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, mixed_precision="bf16"),
        "mixed_precision='bf16'", "an old card", "use 'no'", kind=ConfigError,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bad_input_58_trainable_parameters_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=tiny_llama(dtype=dtype)),
        "trainable parameter", f"is {dtype}", "dtype='float32'", "LoRA",
    )  # fmt: skip


# -- adapters -------------------------------------------------------------------------------------------------------------
def test_bad_input_59_lora_targets_match_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(
        capsys,
        tmp_path,
        "target_modules 'q_prj' matches no module",
        "q_proj",
        use_peft=True,
        lora_target_modules=["q_prj"],
    )
    from peft import LoraConfig

    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, peft_config=LoraConfig(target_modules=["c_attn"])),
        "'c_attn' matches no module", "q_proj",
    )  # fmt: skip


def test_bad_input_60_nothing_trains(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=tiny_llama().requires_grad_(False)),
        "no parameter is trainable", "model.requires_grad_(True)",
    )  # fmt: skip


def adapter(folder: Path, base: Path) -> Path:
    """A small adapter of ``base`` on disk."""
    from peft import LoraConfig

    wrapped = add_lora(load_causal_lm(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(folder)
    return folder


def test_bad_input_61_adapter_of_another_base(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_qwen2(hidden_size=16).save_pretrained(tmp_path / "other")
    folder = adapter(tmp_path / "adapter", tmp_path / "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "other")}))
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=str(folder)),
        f"the adapter in {folder} does not fit Qwen2ForCausalLM", str(tmp_path / "other"),
    )  # fmt: skip


def test_bad_input_62_adapter_keys_unmatched(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", tmp_path / "base")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.1", "layers.7"): value for name, value in tensors.items()}, path)
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=str(folder)),
        "2 tensors missing", "layers.1", "2 without a place", "layers.7", "load it onto the base it was trained on",
    )  # fmt: skip


def test_bad_input_63_rank_zero_alpha_nan(tmp_path: Path) -> None:
    from peft import LoraConfig

    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, use_peft=True, lora_r=0), "lora_r=0", "at least 1", kind=ConfigError
    )
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, use_peft=True, lora_alpha=float("nan")),
        "lora_alpha",
        "nan",
        kind=ConfigError,
    )
    refused(lambda: trainer(tmp_path, "sft", ANSWERS, peft_config={"r": 0}), "lora r must be", ">= 1", "got 0")
    nan = LoraConfig(r=2, lora_alpha=float("nan"), target_modules=["q_proj"])
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, peft_config=nan), "lora alpha must be a finite number > 0", "got nan"
    )
