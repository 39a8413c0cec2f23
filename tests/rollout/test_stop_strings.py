"""Stop strings: the automaton against searching the text, tokens' bytes against the text, rows against uncut rows."""

from __future__ import annotations

import dataclasses
import random
import types

import pytest
import torch

from rlft.rollout import FastSampler, SamplingParams, TransformersSampler
from rlft.rollout.stop_strings import IDLE, STOPPED, StopStrings, _by_token, _token_bytes
from tests import tiny
from tests.rollout.test_samplers import PROMPTS
from tests.rollout.test_vllm import vllm  # noqa: F401 - a fixture

TEXTS = ["the cat sat.\n\nIt said: stop ", "naïve café – 東京 🙂 done", "  two  spaces\tand tabs", "</answer> 12,345"]


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def sentence_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,:", "▁the", "at"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def walk(table, ids, state=2):
    for place, token in enumerate(ids):
        state = int(table[state, token])
        if state == STOPPED:
            return place + 1
    return None


@pytest.mark.parametrize("trial", range(20))
def test_the_automaton_finds_what_a_search_finds(trial):
    """Short strings over few letters: they overlap themselves, each other and the borders of tokens."""
    rng = random.Random(trial)

    def word(shortest, longest):
        return bytes(rng.choice(b"abc") for _ in range(rng.randint(shortest, longest)))

    tokens = [word(0, 5) for _ in range(30)]
    strings = [word(1, 6) for _ in range(rng.randint(1, 4))]
    table = _by_token(strings, tokens)
    for _ in range(60):
        ids = [rng.randrange(30) for _ in range(12)]
        text, expected = b"", None
        for place, token in enumerate(ids):
            text += tokens[token]
            if expected is None and any(string in text for string in strings):
                expected = place + 1
        assert walk(table, ids) == expected
    assert (table[IDLE] == IDLE).all()
    assert (table[STOPPED] == STOPPED).all()


@pytest.mark.parametrize("backend", [byte_level, sentence_piece])
def test_bytes_of_tokens_make_the_text(backend):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="<eos>")
    found = _token_bytes(tokenizer, len(tokenizer) + 3)
    assert found[-3:] == [b""] * 3  # rows of the head that no token has
    for text in [*TEXTS, "🙂東", "stop: cat"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = b"".join(found[i] for i in ids)
        assert whole.removeprefix(b" ") == text.encode().removeprefix(b" ")  # SentencePiece puts a space in front
    strings = StopStrings(tokenizer, len(tokenizer))
    ids = tokenizer("it is 🙂", add_special_tokens=False)["input_ids"]
    assert strings.cut(ids, ("🙂",)) == len(ids)  # a character of four bytes, in several tokens
    assert strings.cut(ids[:-1], ("🙂",)) is None
    assert strings.cut([*ids, tokenizer.eos_token_id], ("<eos>",)) == len(ids) + 1


MANY = [
    SamplingParams(40),
    SamplingParams(40, temperature=1.5),
    SamplingParams(30, temperature=0.7, stop_token_ids=(50, 51)),
    SamplingParams(40),
    SamplingParams(25, greedy=True),
]


def with_strings(texts, n):
    """MANY, some with strings that their own rows come to write: of one to three tokens, in the middle of a row."""
    found = []
    for index, params in enumerate(MANY):
        rng = random.Random(index)
        own = [text for text in texts[index * n : (index + 1) * n] if len(text) > 6]
        starts = [(text, rng.randrange(2, len(text) - 3)) for text in own[::2]]
        strings = () if index == 1 else tuple(text[k : k + rng.randint(1, 3)] for text, k in starts)
        found.append(dataclasses.replace(params, stop_strings=(*strings, "no such text") if strings else ()))
    return found


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["fast", "fast, 3 slots", "transformers", "vllm"])
def test_rows_are_the_uncut_ones_until_a_string_is_complete(kind, n, request):
    if kind == "vllm":
        request.getfixturevalue("vllm")
        from rlft.rollout import VLLMSampler as Kind
    else:
        Kind = TransformersSampler if kind == "transformers" else FastSampler
    tokenizer = tiny.char_tokenizer()
    model = tiny.tiny_llama().to(torch.float32 if kind == "vllm" else torch.float64)
    sampler = Kind(model, tokenizer, **({"max_batch": 3} if "slots" in kind else {}))
    uncut = sampler.sample(PROMPTS, n, MANY, seed=6)
    each = with_strings([tokenizer.decode(ids, skip_special_tokens=False) for ids in uncut.completion_ids], n)
    found = sampler.sample(PROMPTS, n, each, seed=6)
    stopped = 0
    for row, (ids, logps, finished) in enumerate(zip(uncut.completion_ids, uncut.logps, uncut.finished, strict=True)):
        params = each[row // n]
        texts = [tokenizer.decode(ids[: k + 1], skip_special_tokens=False) for k in range(len(ids))]
        end = next((k + 1 for k, text in enumerate(texts) if any(s in text for s in params.stop_strings)), None)
        stopped += end is not None
        assert found.completion_ids[row] == ids[:end]
        assert found.finished[row] == (finished or end is not None)
        assert found.logps[row] == pytest.approx(logps[:end], abs=3e-6)
    assert stopped >= 2 * n


def test_one_setting_for_all_and_a_string_over_the_prompts_end():
    """Text of the prompt does not count: a string that begins there is not complete."""
    model, tokenizer = tiny.tiny_llama(), tiny.char_tokenizer()
    prompt = tokenizer("ab", add_special_tokens=False)["input_ids"]
    sampler = FastSampler(model, tokenizer)
    plain = sampler.sample([prompt], 3, SamplingParams(10), seed=0)
    first = tokenizer.decode(plain.completion_ids[0][:1])
    out = sampler.sample([prompt], 3, SamplingParams(10, stop_strings=("b" + first,)), seed=0)
    assert len(out.completion_ids[0]) > 1
    out = sampler.sample([prompt], 3, SamplingParams(10, stop_strings=[first]), seed=0)
    assert out.completion_ids[0] == plain.completion_ids[0][:1]
    assert out.finished[0]


def test_tables_are_made_once_and_not_kept_for_ever():
    strings = StopStrings(tiny.char_tokenizer(), tiny.VOCAB)
    first = strings.table(("ab",))
    assert strings.table(("ab",)) is first
    for letter in "cdefghijkl":
        strings.table((letter,))
    assert len(strings._tables) == 8
    joint, begins = strings.joint([(), ("ab",), ("c", "d"), ()])
    assert begins == [IDLE, 2, 4, IDLE]
    assert joint.shape == (5, tiny.VOCAB)


@pytest.mark.parametrize("value", ["stop", [""], [b"x"], [3]])
def test_what_is_no_list_of_texts_is_refused(value):
    with pytest.raises(ValueError, match="stop_strings must be a list of texts, none empty"):
        SamplingParams(5, stop_strings=value)


def test_a_tokenizer_that_rewrites_text_is_refused():
    class Odd:
        def __len__(self):
            return 5

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [4]}

        def decode(self, ids, **options):
            return "x" * (10 - len(ids))

    FastSampler(tiny.tiny_llama(), types.SimpleNamespace(eos_token_id=2))  # text is not asked for until it is needed
    strings = StopStrings(Odd(), 5)
    with pytest.raises(ValueError, match=r"cannot be used with this Odd: token 0 changes the text before it"):
        strings.table(("a",))
