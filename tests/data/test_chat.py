from __future__ import annotations

import pytest

from rlft.data.parsing import BadRow, ParsedRow
from tests.data.conftest import (
    BOS,
    CHATML,
    EOS,
    IM_END,
    PLAIN_TEMPLATE,
    assistant,
    bpe_tokenizer,
    char_tokenizer,
    spm_tokenizer,
    user,
)
from tests.data.test_encoding import encode, shown

Q, A, R, B = user("q"), assistant("ans"), user("r"), assistant("b")

# Llama 2: a BOS in front of every exchange, an EOS after every answer.
EXCHANGES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[' + m.content + ']' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Reasoning models: thoughts of earlier turns are left out, so an earlier turn reads differently when it was last.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '{}' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + thoughts|default('') }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ '{}' }}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' + '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_answer_ends_with_the_templates_eos():
    tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
    encoded = encode(tokenizer, ParsedRow([Q], ([A], [B])))
    assert shown(tokenizer, encoded) == "u:qa:|ans</s>"
    assert shown(tokenizer, encoded, 1) == "u:qa:|b</s>"
    assert encoded.eos_added == 0
    assert tokenizer.decode(encoded.prompt_ids) == tokenizer.apply_chat_template(
        [Q], tokenize=False, add_generation_prompt=True
    )


def test_white_space_after_the_end_is_not_trained():
    tokenizer = char_tokenizer(template=CHATML, eos_token="<|im_end|>")
    encoded = encode(tokenizer, ParsedRow([Q], ([A],)))
    assert shown(tokenizer, encoded) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n|ans<|im_end|>"


def test_eos_is_added_where_the_template_ends_with_another_token():
    tokenizer = char_tokenizer(template=CHATML)
    encoded = encode(tokenizer, ParsedRow([Q], ([A],)))
    assert encoded.answers[0].ids[-2:] == [IM_END, EOS]
    assert encoded.eos_added == 1
    told = encode(tokenizer, ParsedRow([Q], ([A],)), end_token_ids=[IM_END])
    assert told.answers[0].ids[-2:] == [tokenizer.convert_tokens_to_ids("s"), IM_END]
    assert told.eos_added == 0


def test_eos_is_added_where_the_template_ends_with_none():
    tokenizer = char_tokenizer(template="{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    encoded = encode(tokenizer, ParsedRow([Q], ([A],)))
    assert shown(tokenizer, encoded) == "q\n|ans</s>"
    assert shown(tokenizer, encode(tokenizer, ParsedRow([Q], ([A],)), add_eos=False)) == "q\n|ans"


def test_an_end_that_the_template_writes_twice_is_kept_once():
    tokenizer = char_tokenizer(template=PLAIN_TEMPLATE.replace("eos_token", "eos_token + '\\n' + eos_token"))
    encoded = encode(tokenizer, ParsedRow([Q], ([A, R, B],)))
    assert shown(tokenizer, encoded) == "u:qa:|ans</s>[\n</s>u:ra:]b</s>"


def test_an_answer_after_an_assistant_turn_has_a_header_of_its_own():
    tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
    assert shown(tokenizer, encode(tokenizer, ParsedRow([Q, A], ([B],)))) == "u:qa:ans</s>a:|b</s>"


class TestTurns:
    def test_only_the_assistant_is_trained(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        encoded = encode(tokenizer, ParsedRow([Q], ([A, R, B],)))
        assert shown(tokenizer, encoded) == "u:qa:|ans</s>[u:ra:]b</s>"
        assert encoded.answers[0].ids.count(EOS) == 2

    def test_chatml(self):
        tokenizer = char_tokenizer(template=CHATML, eos_token="<|im_end|>")
        encoded = encode(tokenizer, ParsedRow([Q], ([A, R, B],)))
        middle = "[\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n]"
        assert shown(tokenizer, encoded).partition("|ans")[2] == f"<|im_end|>{middle}b<|im_end|>"

    def test_bos_of_every_exchange_stays(self):
        tokenizer = char_tokenizer(template=EXCHANGES, add_bos=True)
        encoded = encode(tokenizer, ParsedRow([Q], ([A, R, B],)))
        assert shown(tokenizer, encoded) == "<s>[q]|ans</s>[<s>[r]]b</s>"
        assert [*encoded.prompt_ids, *encoded.answers[0].ids].count(BOS) == 2

    def test_tool_turns_are_masked(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        answer = [A, {"role": "tool", "content": "42"}, B]
        assert shown(tokenizer, encode(tokenizer, ParsedRow([Q], (answer,)))) == "u:qa:|ans</s>[t:42a:]b</s>"

    def test_two_assistant_turns_in_a_row(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        assert shown(tokenizer, encode(tokenizer, ParsedRow([Q], ([A, B],)))) == "u:qa:|ans</s>[a:]b</s>"

    @pytest.mark.parametrize("make", [bpe_tokenizer, spm_tokenizer])
    def test_ids_are_those_of_the_whole_where_nothing_merges(self, make):
        tokenizer = make(template=CHATML)
        turns = [
            user("What is two plus two?"),
            assistant("The answer is four."),
            user("please"),
            assistant("hello there"),
        ]
        encoded = encode(tokenizer, ParsedRow(turns[:1], (turns[1:],)), end_token_ids=[IM_END])
        whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        ids = [*encoded.prompt_ids, *encoded.answers[0].ids]
        assert not encoded.boundary_split
        assert ids == whole[: len(ids)]
        assert tokenizer.decode(whole[len(ids) :]).strip() == ""
        trained = [i for i, flag in zip(encoded.answers[0].ids, encoded.answers[0].mask, strict=True) if flag]
        text = tokenizer.decode(trained).replace("<|im_end|> ", "<|im_end|>")
        assert text == "The answer is four.<|im_end|>hello there<|im_end|>"

    def test_every_turn_starts_from_the_prompt_generation_would_see(self):
        # "friend" + "ly" would merge across each header's end.
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer = bpe_tokenizer(template=template)
        turns = [user("is friend"), assistant("ly"), user(" is friend"), assistant("ly")]
        encoded = encode(tokenizer, ParsedRow(turns[:1], (turns[1:],)))
        assert encoded.boundary_split
        ids = [*encoded.prompt_ids, *encoded.answers[0].ids]
        assert tokenizer.decode(ids) == "is friendly is friendly</s>"
        answer = encoded.answers[0]
        asked = [i for i, flag in zip(answer.ids, answer.mask, strict=True) if not flag]
        assert tokenizer.decode(asked) == " is friend"


class TestTemplatesThatRewrite:
    def test_prompt_that_is_no_prefix_is_refused(self):
        tokenizer = char_tokenizer(template=THINKING)
        row = ParsedRow([Q], ([A],), template_kwargs={"thoughts": "<think>"})
        with pytest.raises(ValueError, match=r"does not continue its own prompt.*'.*<think>.*chat_template_kwargs"):
            encode(tokenizer, row)
        good = ParsedRow([Q], ([A],), template_kwargs={"thoughts": "{}"})
        assert shown(tokenizer, encode(tokenizer, good)).endswith("assistant\n{}|ans<|im_end|></s>")

    def test_turns_that_cannot_be_told_apart_are_refused(self):
        with pytest.raises(ValueError, match=r"cannot be told apart.*\{% generation %\}"):
            encode(char_tokenizer(template=THINKING), ParsedRow([Q], ([A, R, B],)))

    def test_generation_tags_tell_them_apart(self):
        tokenizer = char_tokenizer(template=TAGGED, eos_token="<|im_end|>")
        encoded = encode(tokenizer, ParsedRow([Q], ([A, R, B],)))
        middle = "[\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{}]"
        assert shown(tokenizer, encoded).partition("assistant\n|")[2] == f"ans<|im_end|>{middle}b<|im_end|>"

    def test_refusing_template_skips_the_row(self):
        template = (
            "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
        )
        with pytest.raises(BadRow, match="the chat template refused the conversation: roles must alternate"):
            encode(char_tokenizer(template=template), ParsedRow([{"role": "system", "content": "s"}, Q], ([A],)))

    @pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
    def test_sandbox_violations_stop_the_run(self, attack):
        with pytest.raises(ValueError, match="sandbox forbids"):
            encode(char_tokenizer(template=attack), ParsedRow([Q], ([A],)))

    def test_no_template_is_refused(self):
        with pytest.raises(ValueError, match="no chat template"):
            encode(char_tokenizer(), ParsedRow([Q], ([A],)))


class TestPrompts:
    def test_generation_prompt_is_added(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        assert tokenizer.decode(encode(tokenizer, ParsedRow([Q])).prompt_ids) == "u:qa:"

    def test_last_assistant_message_is_continued(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        assert tokenizer.decode(encode(tokenizer, ParsedRow([Q, A])).prompt_ids) == "u:qa:ans"

    def test_tools_and_arguments_reach_the_template(self):
        template = "{{ tools[0].name if tools else '' }}{{ mood|default('') }}" + PLAIN_TEMPLATE
        tokenizer = char_tokenizer(template=template)
        row = ParsedRow([Q], ([A],), tools=[{"name": "calc"}], template_kwargs={"mood": "!"})
        assert shown(tokenizer, encode(tokenizer, row)) == "calc!u:qa:|ans</s>"

    @pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt"])
    def test_a_row_cannot_bring_its_own_template(self, name):
        row = ParsedRow([Q], ([A],), template_kwargs={name: "x"})
        with pytest.raises(ValueError, match=f"variables of the template only.*{name}"):
            encode(char_tokenizer(template=PLAIN_TEMPLATE), row)
