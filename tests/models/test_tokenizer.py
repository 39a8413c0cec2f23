"""Tokenizers: an end token is required, the pad token is never it, and ids must fit the embedding."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from rlft.models import LoraSettings, Policy, add_lora, check_tokenizer, load_causal_lm, load_tokenizer
from tests.tiny import EOS_ID, PAD_ID, UNK_ID, char_tokenizer, tiny_llama


def byte_tokenizer():
    """Like GPT-2: bytes, one special token that is everything, no pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<|endoftext|>": len(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, unk_token=end)


def test_complete_tokenizer_round_trip(tmp_path: Path) -> None:
    char_tokenizer(chat_template=True).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(tmp_path)
        assert load_tokenizer(tokenizer) is tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)
    assert tokenizer.decode(tokenizer("Hello, you!")["input_ids"]) == "Hello, you!"
    assert tokenizer.chat_template


def test_no_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*tokenizer\.eos_token"):
        load_tokenizer(char_tokenizer(eos=False))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        check_tokenizer(char_tokenizer(eos=False))


def test_missing_pad_is_filled_with_its_own_token() -> None:
    with pytest.warns(UserWarning, match=r"has no pad token; '<pad>' \(id 0\) is used"):
        tokenizer = load_tokenizer(char_tokenizer(pad=False))
    assert tokenizer.pad_token_id == PAD_ID != tokenizer.eos_token_id


def test_missing_pad_without_a_spare_token() -> None:
    """GPT-2: nothing but the end token is special. The token of a NUL byte pads; text is tokenised as before."""
    plain = byte_tokenizer()
    text = "Ā ā! naïve\n"
    ids = plain(text)["input_ids"]
    with pytest.warns(UserWarning, match="has no pad token"):
        tokenizer = load_tokenizer(byte_tokenizer())
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert plain.decode([tokenizer.pad_token_id]) == "\0"
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == len(plain)


def test_unknown_token_pads_before_the_start_token() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for unk, expected in (("<unk>", UNK_ID), (None, 1)):
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        named = {"eos_token": "</s>", "bos_token": "<s>"} | ({"unk_token": unk} if unk else {})
        with pytest.warns(UserWarning, match="has no pad token"):
            assert load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **named)).pad_token_id == expected


def test_nothing_to_pad_with_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="no other token that could serve"):
        load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_pad_equal_to_end_is_said() -> None:
    tokenizer = char_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(UserWarning, match="pad and end-of-sequence token are the same"):
        assert load_tokenizer(tokenizer).pad_token_id == EOS_ID


def test_larger_than_the_embedding_is_refused() -> None:
    tokenizer = char_tokenizer()
    check_tokenizer(tokenizer, tiny_llama())
    check_tokenizer(tokenizer, add_lora(tiny_llama(), LoraSettings(r=2)))
    check_tokenizer(tokenizer, tiny_llama(vocab_size=128))  # padded embeddings are fine
    with pytest.raises(ValueError, match=r"100 tokens.*id 99.*embeds 99.*resize_token_embeddings\(100\)"):
        check_tokenizer(tokenizer, tiny_llama(vocab_size=99))


def test_adapter_folder_without_tokenizer_uses_its_base(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    policy = Policy(add_lora(load_causal_lm(tmp_path / "base"), LoraSettings(r=2)))
    policy.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == char_tokenizer().get_vocab()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="adapter without tokenizer or base"):
        load_tokenizer(tmp_path / "adapter")


def test_wrong_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be a hub id, a folder or a tokenizer, got int"):
        load_tokenizer(3)
    with pytest.raises(ValueError, match="there is no folder"):
        load_tokenizer(tmp_path / "none")
    char_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(ValueError, match="auto_map"):
        load_tokenizer(tmp_path)
