from __future__ import annotations

import functools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.data.encoding import Encoder, Limits
from rlft.data.parsing import BadRow, ParsedRow
from tests.data.conftest import BOS, CHATML, EOS, IM_END, assistant, bpe_tokenizer, char_tokenizer, spm_tokenizer, user

QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.sampled_from("ab .\n0é"), min_size=1, max_size=12).filter(lambda s: s.strip())


@functools.cache
def made(make, **options):
    return make(**options)


def encode(tokenizer, row, *, limits=None, **options):
    (encoded,) = Encoder(tokenizer, limits=limits or Limits(), **options).encode([row])
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded


def shown(tokenizer, encoded, answer=0):
    """prompt | answer, with what is not trained in brackets."""
    ids, mask = encoded.answers[answer].ids, encoded.answers[answer].mask
    text = "".join(
        tokenizer.decode([i]) if flag else f"[{tokenizer.decode([i])}]" for i, flag in zip(ids, mask, strict=True)
    )
    return f"{tokenizer.decode(encoded.prompt_ids)}|{text.replace('][', '')}"


class TestGoldenIds:
    def test_characters(self):
        tokenizer = char_tokenizer()
        code = {c: tokenizer.convert_tokens_to_ids(c) for c in "2+=4"}
        encoded = encode(tokenizer, ParsedRow("2+2=", ("4",)))
        assert encoded.prompt_ids == [code["2"], code["+"], code["2"], code["="]]
        assert encoded.answers[0].ids == [code["4"], EOS]
        assert encoded.answers[0].mask == [True, True]
        assert not encoded.answers[0].truncated

    def test_one_bos_where_the_tokenizer_puts_one(self):
        tokenizer = char_tokenizer(add_bos=True)
        encoded = encode(tokenizer, ParsedRow("ab", ("c", "d")))
        assert encoded.prompt_ids == tokenizer("ab")["input_ids"]
        assert [*encoded.prompt_ids, *encoded.answers[1].ids].count(BOS) == 1

    def test_bos_written_in_the_text_is_not_doubled(self):
        encoded = encode(char_tokenizer(add_bos=True), ParsedRow("<s>ab", ("c",)))
        assert encoded.prompt_ids.count(BOS) == 1
        assert encoded.prompt_ids[0] == BOS

    def test_two_bos_are_refused(self):
        with pytest.raises(ValueError, match="two BOS tokens"):
            encode(char_tokenizer(add_bos=True), ParsedRow("<s><s>ab", ("c",)))
        doubled = char_tokenizer(template="{{ bos_token }}{{ bos_token }}" + CHATML)
        with pytest.raises(ValueError, match="take it out of the chat template"):
            encode(doubled, ParsedRow([user("q")], ([assistant("a")],)))

    def test_template_bos_and_tokenizer_bos_give_one(self):
        tokenizer = char_tokenizer(add_bos=True, template="{{ bos_token }}" + CHATML)
        encoded = encode(tokenizer, ParsedRow([user("q")], ([assistant("a")],)))
        assert [*encoded.prompt_ids, *encoded.answers[0].ids].count(BOS) == 1

    def test_without_bos_there_is_none(self):
        tokenizer = char_tokenizer(bos_token=None)
        encoded = encode(tokenizer, ParsedRow("ab", ("c",)))
        assert encoded.prompt_ids == tokenizer("ab")["input_ids"]
        assert None not in encoded.prompt_ids

    def test_without_eos_is_refused_unless_told(self):
        tokenizer = char_tokenizer(eos_token=None)
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            encode(tokenizer, ParsedRow("a", ("b",)))
        encoded = encode(tokenizer, ParsedRow("a", ("b",)), add_eos=False)
        assert shown(tokenizer, encoded) == "a|b"

    def test_eos_is_added_once(self):
        tokenizer = char_tokenizer()
        assert encode(tokenizer, ParsedRow("a", ("b</s>",))).answers[0].ids[1:] == [EOS]
        other = encode(tokenizer, ParsedRow("a", ("b<|im_end|>",)), end_token_ids=[IM_END])
        assert other.answers[0].ids[1:] == [IM_END]
        both = encode(tokenizer, ParsedRow("a", ("b<|im_end|>",)))
        assert both.answers[0].ids[1:] == [IM_END, EOS]

    def test_eos_inside_a_text_stays_and_the_last_is_supervised(self):
        encoded = encode(bpe_tokenizer(), ParsedRow("The answer", (" is</s> four",)))
        assert encoded.answers[0].ids.count(EOS) == 2
        assert all(encoded.answers[0].mask)

    def test_separator_belongs_to_the_prompt(self):
        tokenizer = char_tokenizer()
        encoded = encode(tokenizer, ParsedRow("ab", ("c",)), separator="\n")
        assert shown(tokenizer, encoded) == "ab\n|c</s>"
        assert tokenizer.decode(encode(tokenizer, ParsedRow("ab"), separator="\n").prompt_ids) == "ab\n"


class TestText:
    def test_bos_is_the_prompt(self):
        tokenizer = char_tokenizer(add_bos=True)
        assert shown(tokenizer, encode(tokenizer, ParsedRow("", ("abc",)))) == "<s>|abc</s>"
        assert shown(tokenizer, encode(tokenizer, ParsedRow("", ("<s>abc",)))) == "<s>|abc</s>"

    def test_without_bos_the_first_token_is(self):
        tokenizer = char_tokenizer()
        assert shown(tokenizer, encode(tokenizer, ParsedRow("", ("abc",)))) == "a|bc</s>"
        with pytest.raises(BadRow, match="empty completion"):
            encode(tokenizer, ParsedRow("", ("a",)))


class TestBoundary:
    def test_merge_across_the_boundary_is_split(self, bpe):
        # " friendly" is one token, so "The friend" + "ly" merges across the end of the prompt.
        prompt, answer = "The weather is friend", "ly"
        whole = bpe(prompt + answer)["input_ids"]
        alone = bpe(prompt)["input_ids"]
        assert whole[: len(alone)] != alone
        encoded = encode(bpe, ParsedRow(prompt, (answer,)))
        assert encoded.boundary_split
        assert encoded.prompt_ids == alone
        assert bpe.decode([*encoded.prompt_ids, *encoded.answers[0].ids]) == prompt + answer + "</s>"

    def test_merge_across_the_boundary_is_refused_on_request(self, bpe):
        with pytest.raises(ValueError, match=r"not a prefix.*' friend'.*' friendly'.*separator"):
            encode(bpe, ParsedRow("The weather is friend", ("ly",)), boundary="refuse")
        assert not encode(bpe, ParsedRow("The weather is", (" friendly",)), boundary="refuse").boundary_split

    def test_no_start_mark_is_put_into_the_answer(self, spm):
        # Tokenised on its own, "ly" begins with the mark that stands for a space.
        assert spm.convert_ids_to_tokens(spm("ly", add_special_tokens=False)["input_ids"])[0].startswith("▁")
        prompt, answer = "The weather is friend", "ly"
        encoded = encode(spm, ParsedRow(prompt, (answer,)))
        assert encoded.boundary_split
        assert encoded.prompt_ids == spm(prompt)["input_ids"]
        assert spm.decode([*encoded.prompt_ids, *encoded.answers[0].ids]) == spm.decode(
            spm(prompt + answer + "</s>")["input_ids"]
        )
        assert not spm.convert_ids_to_tokens(encoded.answers[0].ids[0]).startswith("▁")

    def test_what_cannot_be_split_is_no_row(self):
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "X": 4}, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace("ab", "X")  # a letter made of both sides of the boundary
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        with pytest.raises(BadRow, match="prompt is not a token prefix"):
            encode(tokenizer, ParsedRow("a", ("b",)))

    def test_unknown_characters_that_melt_into_the_prompt_are_no_answer(self, spm):
        assert spm("éé", add_special_tokens=False)["input_ids"] == spm("é", add_special_tokens=False)["input_ids"]
        with pytest.raises(BadRow, match="no tokens of its own"):
            encode(spm, ParsedRow("é", ("é",)))

    def test_an_unknown_policy_is_refused(self, char):
        with pytest.raises(ValueError, match="'split' or 'refuse'"):
            Encoder(char, limits=Limits(), boundary="merge")

    @QUIET
    @given(prompt=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3))
    @pytest.mark.parametrize("make", [char_tokenizer, bpe_tokenizer, spm_tokenizer], ids=lambda f: f.__name__)
    def test_prompt_is_a_prefix_and_everything_decodes_back(self, make, prompt, answers):
        tokenizer = made(make)
        if make is spm_tokenizer:  # runs of unknown characters become one token
            prompt, answers = prompt.replace("é", "e"), [text.replace("é", "e") for text in answers]
        encoded = encode(tokenizer, ParsedRow(prompt, tuple(answers)))
        assert encoded.prompt_ids == tokenizer(prompt)["input_ids"]
        assert encoded.prompt_ids[:2].count(tokenizer.bos_token_id) == (make is spm_tokenizer)
        for text, answer in zip(answers, encoded.answers, strict=True):
            assert answer.ids[-1] == EOS
            assert answer.ids.count(EOS) == 1
            assert all(answer.mask)
            expected = tokenizer.decode(tokenizer(prompt + text)["input_ids"])
            assert tokenizer.decode([*encoded.prompt_ids, *answer.ids]) == expected + "</s>"


class TestLimits:
    @pytest.mark.parametrize(
        "bad", [{"max_prompt_length": 0}, {"max_completion_length": -1}, {"max_length": 2.5}, {"max_length": True}]
    )
    def test_bad_limits_are_refused(self, bad):
        with pytest.raises(ValueError, match=re.escape(next(iter(bad)))):
            Limits(**bad)

    def test_unknown_mode_is_refused(self):
        with pytest.raises(ValueError, match="did you mean 'keep_end'"):
            Limits(truncation_mode="keepend")

    @pytest.mark.parametrize(
        ("mode", "limit", "prompt"),
        [
            ("keep_end", 6, "<s>abcde"),
            ("keep_end", 5, "<s>bcde"),
            ("keep_end", 2, "<s>e"),
            ("keep_end", 1, "e"),
            ("keep_start", 3, "<s>ab"),
            ("skip", 6, "<s>abcde"),
        ],
    )
    def test_prompt_side(self, mode, limit, prompt):
        tokenizer = char_tokenizer(add_bos=True)
        limits = Limits(max_prompt_length=limit, truncation_mode=mode)
        encoded = encode(tokenizer, ParsedRow("abcde", ("x",)), limits=limits)
        assert shown(tokenizer, encoded) == f"{prompt}|x</s>"
        assert encoded.prompt_truncated == (limit < 6)

    def test_skip_leaves_long_prompts_out(self, char):
        with pytest.raises(BadRow, match="prompt longer than max_prompt_length"):
            encode(char, ParsedRow("abc", ("x",)), limits=Limits(max_prompt_length=2, truncation_mode="skip"))

    def test_prompt_that_fills_max_length(self, char):
        row = ParsedRow("abc", ("xy",))
        assert shown(char, encode(char, row, limits=Limits(max_length=4))) == "abc|x"
        for limit in (1, 3):
            with pytest.raises(BadRow, match="prompt fills max_length"):
                encode(char, row, limits=Limits(max_length=limit))

    def test_answer_cut_before_its_first_trained_token(self):
        tokenizer = char_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
        # The first turn is a call without text, so the first trained token comes late.
        call = {**assistant(" "), "tool_calls": [1]}
        row = ParsedRow([user("q")], ([call, {"role": "tool", "content": "result"}, assistant("a")],))
        assert shown(tokenizer, encode(tokenizer, row)) == "q|[ result]a</s>"
        with pytest.raises(BadRow, match="nothing to train on"):
            encode(tokenizer, row, limits=Limits(max_completion_length=7))

    @QUIET
    @given(
        prompt_length=st.integers(1, 9),
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        max_prompt=st.none() | st.integers(1, 10),
        max_completion=st.none() | st.integers(1, 11),
        max_length=st.none() | st.integers(1, 20),
        mode=st.sampled_from(["keep_end", "keep_start", "skip"]),
        bos=st.booleans(),
    )
    def test_kept_tokens_are_counted(self, prompt_length, lengths, max_prompt, max_completion, max_length, mode, bos):
        tokenizer = made(char_tokenizer, add_bos=bos)
        row = ParsedRow("p" * prompt_length, tuple("c" * n for n in lengths))
        full = prompt_length + bos
        limits = Limits(max_prompt, max_completion, max_length, mode)
        prompt = full if max_prompt is None else min(full, max_prompt)
        unusable = (mode == "skip" and prompt < full) or (max_length is not None and prompt >= max_length)
        if unusable:
            with pytest.raises(BadRow):
                encode(tokenizer, row, limits=limits)
            return
        encoded = encode(tokenizer, row, limits=limits)
        assert len(encoded.prompt_ids) == prompt
        assert encoded.prompt_truncated == (prompt < full)
        room = min(max_completion or 99, (max_length or 99) - prompt)
        for n, answer in zip(lengths, encoded.answers, strict=True):
            assert len(answer.ids) == len(answer.mask) == sum(answer.mask) == min(n + 1, room)
            assert answer.truncated == (n + 1 > room)
            assert answer.ids.count(EOS) == (not answer.truncated)


def test_rows_of_a_batch_do_not_depend_on_each_other(bpe):
    rows = [
        ParsedRow("The weather is friend", ("ly",)),
        ParsedRow("What", (" is", " two")),
        ParsedRow("", ("hello there",)),
    ]
    encoder = Encoder(bpe, limits=Limits())
    assert encoder.encode(rows) == [encoder.encode([row])[0] for row in rows]


def test_error_names_the_position(char):
    rows = [ParsedRow("a", ("b",)), ParsedRow("<s><s>a", ("b",))]
    with pytest.raises(ValueError, match="two BOS") as error:
        Encoder(char, limits=Limits()).encode(rows)
    assert error.value.row == 1


def test_tokenizer_without_tokens_is_refused():
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    with pytest.raises(ValueError, match="no token at all"):
        Encoder(tokenizer, limits=Limits())
