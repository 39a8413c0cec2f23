"""Tokenizers of four kinds, built in memory: characters, byte-level BPE, words with a start mark, and the real GPT-2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("RLFT_DATA", ROOT.parent / "shared" / "data"))

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, EOS, UNK, IM_START, IM_END = range(6)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
CORPUS = [
    "What is two plus two? The answer is four.",
    "Write a friendly sentence about the weather, please.",
    "The weather is friendly and the answer is a sentence.",
    "human: hello there\nassistant: hello, how are you today?",
]


def wrap(backend: Tokenizer, **named: Any) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def with_bos(backend: Tokenizer) -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return backend


def char_tokenizer(*, add_bos: bool = False, template: str | None = None, **named: Any) -> PreTrainedTokenizerFast:
    """One token per character, so that ids can be read."""
    chars = [chr(c) for c in range(32, 127)] + ["\n", "é"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIALS, *chars])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if add_bos:
        with_bos(backend)
    options = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", **named}
    tokenizer = wrap(backend, **{name: token for name, token in options.items() if token is not None})
    tokenizer.chat_template = template
    return tokenizer


def bpe_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2: no BOS is added, pad and BOS are the EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = wrap(backend, eos_token="</s>", bos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def spm_tokenizer(*, add_bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: the start of every text is marked like a space, and a BOS is added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = wrap(with_bos(backend) if add_bos else backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """The real vocabulary of 50,257 tokens, with ChatML's two tokens beside it."""
    folder = DATA / "gpt2_bpe"
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:]
    backend = Tokenizer(
        models.BPE(
            vocab=json.loads((folder / "vocab.json").read_text("utf-8")),
            merges=[(line.split(" ")[0], line.split(" ")[1]) for line in lines if line],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def char() -> PreTrainedTokenizerFast:
    return char_tokenizer(template=PLAIN_TEMPLATE)


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def spm() -> PreTrainedTokenizerFast:
    return spm_tokenizer()


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedTokenizerFast:
    if not (DATA / "gpt2_bpe" / "vocab.json").is_file():
        pytest.skip("the real data is not here: set RLFT_DATA to the folder that holds gpt2_bpe")
    return gpt2_tokenizer()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
