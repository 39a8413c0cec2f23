from __future__ import annotations

import math

import pytest

from rlft.data import FORMATS, detect_format
from rlft.data.formats import check_format
from rlft.data.parsing import BadRow, ParsedRow, parse_row
from tests.data.conftest import assistant, user


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["prompt"], "prompt"),
        (["prompt", "answer", "numbers"], "prompt"),
        (["prompt", "completion"], "prompt_completion"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["chosen", "rejected", "margin"], "preference"),
        (["prompt", "prompt_id", "chosen", "rejected", "messages"], "preference"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "completions", "scores"], "ranked"),
        (["prompt", "completions", "rewards"], "ranked"),
        (["text"], "text"),
        (["messages", "tools"], "text"),
        (["text", "messages"], "text"),
        (["text", "label"], "text"),
    ],
)
def test_detected(columns, format):
    assert format in FORMATS
    assert detect_format(columns) == format
    assert detect_format(reversed(columns)) == format


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["promt"], "did you mean 'prompt' by 'promt'"),
        (["prompt_id", "choosen", "rejected"], "did you mean .*'chosen' by 'choosen'"),
        (["question", "answer"], "'prompt' by 'question', 'completion' by 'answer'"),
        (["conversations"], "did you mean 'messages' by 'conversations'"),
        (["alpha", "beta"], r"\['alpha', 'beta'\]; expected chosen \+ rejected \(preference\)"),
        ([], "no data format fits"),
        (["completions", "labels"], "no data format fits"),
        (["prompt", "text"], "format='text' or format='prompt'"),
        (["prompt", "completion", "messages"], "format='text' or format='prompt_completion'"),
        (["prompt", "completions", "scores", "rewards"], "mean the same"),
    ],
)
def test_undecidable_columns_are_refused(columns, said):
    with pytest.raises(ValueError, match=said):
        detect_format(columns)


def test_named_format_lists_what_is_there():
    with pytest.raises(
        ValueError, match=r"needs the column 'rejected'; the data has \['prompt', 'chosen', 'rejcted'\]"
    ) as e:
        check_format("preference", ["prompt", "chosen", "rejcted"])
    assert "did you mean 'rejected' by 'rejcted'" in str(e.value)
    with pytest.raises(ValueError, match="did you mean 'preference'"):
        check_format("preferences", ["prompt"])
    with pytest.raises(ValueError, match="'scores' or 'rewards'"):
        check_format("ranked", ["prompt", "completions"])
    check_format("text", ["prompt", "text"])


# -- rows ---------------------------------------------------------------------------------------------------------------
Q, A, B = user("q"), assistant("a"), assistant("b")


def row(format, **cells):
    return parse_row(cells, format)


def test_plain_rows():
    assert row("prompt", prompt="p", other=3) == ParsedRow("p")
    assert row("prompt_completion", prompt="p", completion="c") == ParsedRow("p", ("c",))
    assert row("preference", prompt="p", chosen="c", rejected="r", margin=2) == ParsedRow("p", ("c", "r"), margin=2.0)
    assert row("preference", prompt="p", chosen="c", rejected="r", margin=None).margin is None
    assert row("unpaired", prompt="p", completion="c", label=False).label is False
    assert row("unpaired", prompt="p", completion="c", label=1).label is True
    assert row("ranked", prompt="p", completions=["c", "d"], scores=[1, 0.5]).rewards == (1.0, 0.5)
    assert row("text", text="t") == ParsedRow("", ("t",))


def test_unscored_answers_are_nan():
    rewards = row("ranked", prompt="p", completions=["c", "d", "e"], rewards=[None, 2.0, math.nan]).rewards
    assert rewards[1] == 2.0
    assert math.isnan(rewards[0])
    assert math.isnan(rewards[2])


def test_conversations():
    assert row("prompt", prompt=[Q]).prompt == [Q]
    assert row("prompt_completion", prompt=[Q], completion=[A]) == ParsedRow([Q], ([A],))
    assert row("preference", prompt=[Q], chosen=[A], rejected=[B]) == ParsedRow([Q], ([A], [B]))
    system = {"role": "system", "content": "s"}
    assert row("text", messages=[system, Q, A, Q, B]) == ParsedRow([system, Q], ([A, Q, B],))
    assert row("ranked", prompt=[Q], completions=[[A], [B]], scores=[1, 0]).completions == ([A], [B])


def test_leading_user_turns_of_an_answer_belong_to_the_prompt():
    assert row("prompt_completion", prompt=[Q, A], completion=[user("r"), B]) == ParsedRow([Q, A, user("r")], ([B],))
    parsed = row("preference", prompt=[Q, A], chosen=[user("r"), A], rejected=[user("r"), B])
    assert parsed == ParsedRow([Q, A, user("r")], ([A], [B]))


def test_arrow_none_keys_are_dropped_and_the_row_is_not_changed():
    message = {"role": "user", "content": "q", "tool_calls": None, "name": None}
    cells = {"prompt": [message], "tools": None, "chat_template_kwargs": {"thinking": False, "other": None}}
    parsed = parse_row(cells, "prompt")
    assert parsed.prompt == [Q]
    assert parsed.tools is None
    assert parsed.template_kwargs == {"thinking": False}
    assert message == {"role": "user", "content": "q", "tool_calls": None, "name": None}


def test_tools_as_json_or_list_and_only_beside_messages():
    schema = [{"type": "function", "function": {"name": "f", "description": None}}]
    clean = [{"type": "function", "function": {"name": "f"}}]
    assert row("prompt", prompt=[Q], tools=schema).tools == clean
    assert row("prompt", prompt=[Q], tools='[{"type": "x"}]').tools == [{"type": "x"}]
    assert row("prompt", prompt="p", tools="hammer").tools is None


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert row("prompt", prompt=[{"role": "user", "content": parts}]).prompt == [user("ab")]


def test_tool_calls_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    answer = [call, {"role": "tool", "content": "1"}, A]
    assert row("prompt_completion", prompt=[Q], completion=answer).completions[0][0] == {
        "role": "assistant",
        "tool_calls": [{"name": "f"}],
    }


class TestImplicitPrompt:
    @pytest.mark.parametrize(
        ("chosen", "rejected", "parts"),
        [
            ("Say hi. Hello", "Say hi. Go away", ("Say hi.", " Hello", " Go away")),
            ("x y abc", "x y abd", ("x y", " abc", " abd")),
            ("x  y", "x  z", ("x", "  y", "  z")),
            ("x y", "x y z", ("x", " y", " y z")),
            (
                "\n\nHuman: hi\n\nAssistant: I am well",
                "\n\nHuman: hi\n\nAssistant: I am not",
                ("\n\nHuman: hi\n\nAssistant:", " I am well", " I am not"),
            ),
        ],
    )
    def test_texts(self, chosen, rejected, parts):
        parsed = row("preference", chosen=chosen, rejected=rejected)
        assert (parsed.prompt, *parsed.completions) == parts

    def test_conversations(self):
        parsed = row("preference", chosen=[Q, A, Q, A], rejected=[Q, A, Q, B])
        assert parsed == ParsedRow([Q, A, Q], ([A], [B]))

    def test_whole_conversations_beside_their_prompt(self):
        expected = ParsedRow([Q], ([A], [B]))
        assert row("preference", prompt="q", chosen=[Q, A], rejected=[Q, B]) == expected
        assert row("preference", prompt=[Q], chosen=[Q, A], rejected=[Q, B]) == expected


DIFFERENT = "chosen and rejected answer different prompts"
BAD = [
    # reliability.md 4.3: 5 and 6, empty prompt or completion
    ("prompt", {"prompt": ""}, "empty prompt"),
    ("prompt", {"prompt": " \n"}, "empty prompt"),
    ("prompt", {"prompt": []}, "empty prompt"),
    ("prompt", {"prompt": [user(" ")]}, "empty prompt"),
    ("prompt_completion", {"prompt": "p", "completion": ""}, "empty completion"),
    ("prompt_completion", {"prompt": [Q], "completion": [assistant("")]}, "empty completion"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": " "}, "empty completion"),
    ("preference", {"chosen": [Q, A, Q, A], "rejected": [Q, A]}, "empty completion"),
    ("ranked", {"prompt": "p", "completions": [], "scores": []}, "empty completion"),
    ("ranked", {"prompt": "p", "completions": ["c", ""], "scores": [1, 2]}, "empty completion"),
    ("text", {"text": ""}, "empty completion"),
    ("text", {"messages": [A]}, "empty prompt"),
    # 7, None or no text
    ("prompt", {"prompt": None}, "missing or non-text cell"),
    ("prompt", {"other": "x"}, "missing or non-text cell"),
    ("prompt", {"prompt": 3}, "missing or non-text cell"),
    ("prompt", {"prompt": ["a", "b"]}, "missing or non-text cell"),
    ("prompt", {"prompt": [{"role": "user", "content": None}]}, "missing or non-text cell"),
    ("prompt", {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message content is not text"),
    ("prompt", {"prompt": [{"role": "user", "content": 3}]}, "message content is not text"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": None}, "missing or non-text cell"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": "yes"}, "label is not a bool"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 2}, "label is not a bool"),
    ("ranked", {"prompt": "p", "completions": ["c"], "scores": None}, "missing or non-text cell"),
    ("ranked", {"prompt": "p", "completions": ["c"], "scores": [1, 2]}, "scores do not fit the completions"),
    ("ranked", {"prompt": "p", "completions": ["c"], "scores": [math.inf]}, "scores do not fit the completions"),
    ("ranked", {"prompt": "p", "completions": ["c"], "scores": ["1"]}, "scores do not fit the completions"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x"}, "margin is not a number"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": math.nan}, "margin is not a number"),
    ("prompt_completion", {"prompt": [Q], "completion": "c"}, "text and messages mixed in one row"),
    ("preference", {"prompt": "p", "chosen": [A], "rejected": [B]}, "text and messages mixed in one row"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": [B]}, "text and messages mixed in one row"),
    ("prompt", {"prompt": [Q], "tools": "{"}, "tools or chat_template_kwargs cannot be read"),
    ("prompt", {"prompt": [Q], "chat_template_kwargs": [1]}, "tools or chat_template_kwargs cannot be read"),
    # 8, equal pair
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "c"}, "chosen and rejected are equal"),
    ("preference", {"chosen": [Q, A], "rejected": [Q, A]}, "chosen and rejected are equal"),
    # 9, different prompts
    ("preference", {"chosen": "a b", "rejected": "c d"}, DIFFERENT),
    ("preference", {"chosen": "abc", "rejected": "abd"}, DIFFERENT),
    ("preference", {"chosen": [Q, A], "rejected": [user("r"), A]}, DIFFERENT),
    ("preference", {"chosen": [Q, A, Q, A], "rejected": [Q, A, user("r"), A]}, DIFFERENT),
    ("preference", {"prompt": [Q], "chosen": [Q, A], "rejected": [user("r"), B]}, DIFFERENT),
    ("preference", {"prompt": "r", "chosen": [Q, A], "rejected": [Q, B]}, DIFFERENT),
    ("preference", {"prompt": [Q], "chosen": [user("r"), A], "rejected": [user("r"), B]}, DIFFERENT),
    ("preference", {"prompt": [Q, A], "chosen": [user("r"), A], "rejected": [user("s"), B]}, DIFFERENT),
    ("preference", {"prompt": [Q, A], "chosen": [Q, A, B], "rejected": [B]}, DIFFERENT),
    # 13, text that is none
    ("prompt", {"prompt": "a\ud800"}, "invalid text (lone surrogate or NUL)"),
    ("prompt", {"prompt": "a\x00b"}, "invalid text (lone surrogate or NUL)"),
    ("prompt_completion", {"prompt": "p", "completion": "c\udcff"}, "invalid text (lone surrogate or NUL)"),
    ("prompt", {"prompt": [user("a\ud800")]}, "invalid text (lone surrogate or NUL)"),
    ("prompt", {"prompt": [Q], "tools": [{"name": "\ud800"}]}, "invalid text (lone surrogate or NUL)"),
    # 15, the last turn is not the assistant's
    ("prompt_completion", {"prompt": [Q], "completion": [A, Q]}, "conversation does not end with an assistant turn"),
    ("prompt_completion", {"prompt": [Q], "completion": [Q]}, "conversation does not end with an assistant turn"),
    ("text", {"messages": [Q, A, Q]}, "conversation does not end with an assistant turn"),
    ("text", {"messages": [Q]}, "conversation does not end with an assistant turn"),
    ("preference", {"prompt": [Q], "chosen": [A, Q], "rejected": [B]}, "conversation does not end with an assistant turn"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "cells", "reason"), BAD)
def test_unusable_rows_say_why(format, cells, reason):
    with pytest.raises(BadRow) as bad:
        parse_row(cells, format)
    assert bad.value.reason == reason


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "human", "content": "x"}, "role 'human' of a message is unknown; did you mean 'user'"),
        ({"role": "asistant", "content": "x"}, "did you mean 'assistant'"),
        ({"role": None, "content": "x"}, "role None"),
        ({"from": "human", "value": "x"}, "ShareGPT"),
        ({"speaker": "x"}, "'role' and 'content'"),
    ],
)
def test_unknown_roles_are_refused(message, said):
    with pytest.raises(ValueError, match=said):
        parse_row({"prompt": [message]}, "prompt")


def test_valid_unicode_is_kept():
    text = "naïve 漢字 👩‍🚀 \u2028"
    assert row("prompt", prompt=text).prompt == text
