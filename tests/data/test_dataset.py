from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace

import datasets
import pytest

from rlft.data import DataWarning, Example, Rows, check_overlap, load_rows, preview, tokenize
from rlft.data.report import DataReport, quantiles
from tests.data.conftest import CHATML, PLAIN_TEMPLATE, assistant, char_tokenizer, user

GOOD = {"prompt": "a", "completion": "b"}


def good(n):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(n)]


def quietly(rows, tokenizer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return tokenize(rows, tokenizer, **options)


class TestFormats:
    def test_every_format(self, char):
        made = {
            "prompt": {"prompt": "p", "answer": 42},
            "prompt_completion": {"prompt": "p", "completion": "c"},
            "preference": {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5},
            "unpaired": {"prompt": "p", "completion": "c", "label": False},
            "ranked": {"prompt": "p", "completions": ["c", "d"], "scores": [1.0, None]},
            "text": {"messages": [user("q"), assistant("a")]},
        }
        for format, row in made.items():
            data = tokenize([row], char)
            assert data.format == data.report.format == format
            (example,) = data
            assert example.columns == row
            assert example.index == 0
        assert tokenize([made["prompt"]], char)[0].completions == ()
        assert tokenize([made["prompt"]], char)[0].extra_columns == {"answer": 42}
        assert tokenize([made["preference"]], char)[0].margin == 0.5
        assert tokenize([made["unpaired"]], char)[0].completions[0].label is False
        rewards = [completion.reward for completion in tokenize([made["ranked"]], char)[0].completions]
        assert rewards[0] == 1.0
        assert math.isnan(rewards[1])
        assert tokenize([made["text"]], char)[0].prompt == [user("q")]

    def test_format_can_be_named(self, char):
        row = {"prompt": "p", "completion": "c", "label": "unrelated"}
        assert tokenize([row], char, format="prompt").format == "prompt"
        assert tokenize([row], char, format="prompt_completion")[0].completions[0].label is None
        with pytest.raises(ValueError, match="needs the column 'chosen'"):
            tokenize([row], char, format="preference")

    def test_rows_come_back_unchanged(self, char):
        rows = [{"prompt": [user("q")], "completion": [assistant("a")], "tools": None, "n": [1, 2]}]
        before = copy.deepcopy(rows)
        assert tokenize(rows, char)[0].columns == before[0]
        assert rows == before

    def test_datasets_and_lists_agree(self, char):
        rows = [{"prompt": [user(f"q{i}")], "completion": [assistant("a")], "extra": {"x": i}} for i in range(5)]
        from_list, from_arrow = tokenize(rows, char), tokenize(datasets.Dataset.from_list(rows), char)
        assert [e.prompt_ids for e in from_list] == [e.prompt_ids for e in from_arrow]
        assert from_list.fingerprint == from_arrow.fingerprint

    def test_chunks_of_the_tokenizer_do_not_show(self, char, monkeypatch):
        rows = good(23)
        whole = tokenize(rows, char)
        monkeypatch.setattr("rlft.data.dataset._CHUNK", 5)
        assert tokenize(rows, char).examples == whole.examples
        assert [example.index for example in whole] == list(range(23))

    def test_nothing_global_is_touched(self, char):
        import random

        import torch

        states = random.getstate(), torch.get_rng_state()
        tokenize(good(3), char)
        assert random.getstate() == states[0]
        assert bool((torch.get_rng_state() == states[1]).all())


class TestRefusals:
    def test_missing_column(self, char):
        with pytest.raises(ValueError, match=r"\['promt', 'completion'\]; did you mean 'prompt' by 'promt'"):
            tokenize([{"promt": "a", "completion": "b"}], char)

    def test_empty(self, char):
        with pytest.raises(ValueError, match="holds no rows"):
            tokenize([], char)

    def test_all_rows_unusable(self, char):
        with pytest.raises(ValueError, match=r"none of the 2 rows can be used: 2 empty prompt \(first: row 0\)"):
            tokenize([{"prompt": ""}, {"prompt": " "}], char, max_bad_fraction=1.0)

    def test_share_of_bad_rows(self, char):
        rows = [*good(98), {"prompt": "", "completion": "x"}, {"prompt": "x", "completion": None}]
        said = (
            r"2 of 100 rows \(2\.0%\) cannot be used, more than max_bad_fraction=0\.01 allows: 1 empty prompt "
            r"\(first: row 98\), 1 missing or non-text cell \(first: row 99\)"
        )
        with pytest.raises(ValueError, match=said):
            tokenize(rows, char)
        with pytest.warns(DataWarning, match="2 of 100 rows were skipped"):
            data = tokenize(rows, char, max_bad_fraction=0.02)
        assert len(data) == data.report.kept == 98
        assert data.report.skipped == {"empty prompt": 1, "missing or non-text cell": 1}
        with pytest.warns(DataWarning):  # exactly the default of 1 % is allowed
            tokenize(rows[:-1] + good(1), char)

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.1"])
    def test_bad_fraction(self, char, fraction):
        with pytest.raises(ValueError, match="max_bad_fraction"):
            tokenize(good(1), char, max_bad_fraction=fraction)

    def test_unknown_role_names_the_place(self, char, tmp_path):
        path = tmp_path / "a.jsonl"
        rows = [{"prompt": [user("q")]}, {"prompt": [{"role": "human", "content": "q"}]}]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(ValueError, match=r"a\.jsonl:2: role 'human'.*did you mean 'user'"):
            tokenize(load_rows(path), char)

    def test_template_problem_names_the_place(self):
        rows = [
            {"prompt": "a", "completion": "b"},
            {"prompt": None, "completion": "b"},
            {"prompt": "<s><s>a", "completion": "b"},
        ]
        with pytest.raises(ValueError, match=r"^row 2: the prompt begins with two BOS"):
            tokenize(rows, char_tokenizer(add_bos=True))

    def test_no_eos(self):
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            tokenize(good(1), char_tokenizer(eos_token=None))

    def test_bad_utf8_in_a_file_is_counted(self, char, tmp_path):
        path = tmp_path / "a.jsonl"
        lines = [json.dumps(row).encode() for row in good(3)]
        path.write_bytes(
            b"\n".join([*lines, b'{"prompt": "\xff", "completion": "x"}', rb'{"prompt": "\ud800", "completion": "x"}'])
        )
        data = quietly(load_rows(path), char, max_bad_fraction=0.5)
        assert data.report.skipped == {"invalid text (lone surrogate or NUL)": 2}
        assert data.report.first == {"invalid text (lone surrogate or NUL)": f"{path}:4"}


class TestCounts:
    def test_truncation_is_counted_and_warned_once(self, char):
        rows = [{"prompt": "p" * n, "completion": "c" * n} for n in (1, 3, 5)]
        with pytest.warns(DataWarning) as seen:
            data = tokenize(rows, char, max_prompt_length=3, max_completion_length=4)
        assert [str(w.message).split(" to ")[0] for w in seen] == ["1 of 3 prompts were cut", "1 of 3 answers were cut"]
        assert [len(e.prompt_ids) for e in data] == [1, 3, 3]
        assert [len(e.completions[0].ids) for e in data] == [2, 4, 4]
        assert [e.completions[0].truncated for e in data] == [False, False, True]
        report = data.report
        assert (report.truncated_prompts, report.truncated_completions, report.completions) == (1, 1, 3)
        assert report.trained_tokens == 10
        assert report.prompt_lengths == (1, 3, 3, 3, 3)
        assert report.completion_lengths == (2, 4, 4, 4, 4)

    def test_prompt_that_fills_max_length_is_skipped(self, char):
        rows = [{"prompt": "p" * n, "completion": "cc"} for n in (1, 2, 3, 4)]
        data = quietly(rows, char, max_length=3, max_bad_fraction=0.5)
        assert data.report.skipped == {"prompt fills max_length": 2}
        assert [(len(e.prompt_ids), len(e.completions[0].ids)) for e in data] == [(1, 2), (2, 1)]

    def test_pair_that_truncation_makes_equal_is_skipped(self, char):
        rows = [{"prompt": "p", "chosen": "abc", "rejected": "abd"}, {"prompt": "p", "chosen": "x", "rejected": "y"}]
        data = quietly(rows, char, max_completion_length=2, max_bad_fraction=0.5)
        assert data.report.skipped == {"chosen and rejected are equal after truncation": 1}

    def test_duplicates(self, char):
        with pytest.warns(DataWarning, match="2 of 4 rows repeat an earlier one"):
            data = tokenize([GOOD, dict(GOOD), {"completion": "b", "prompt": "a"}, {**GOOD, "n": 1}], char)
        assert data.report.duplicates == 2
        assert len(data) == 4

    def test_merged_boundaries_warn(self, bpe):
        with pytest.warns(DataWarning, match=r"in 1 of 1 rows the tokenizer merges.*separator"):
            assert tokenize([{"prompt": "is friend", "completion": "ly"}], bpe).report.boundary_splits == 1
        with pytest.raises(ValueError, match="row 0: the prompt's tokens are not a prefix"):
            tokenize([{"prompt": "is friend", "completion": "ly"}], bpe, boundary="refuse")

    def test_clean_data_warns_of_nothing(self, char):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenize(good(5), char, max_prompt_length=9, max_completion_length=9, max_length=18)

    def test_quantiles(self):
        assert quantiles([]) == ()
        assert quantiles([3]) == (3, 3, 3, 3, 3)
        assert quantiles(range(1, 101)) == (1, 50, 90, 99, 100)
        assert quantiles(range(1, 11)) == (1, 5, 9, 10, 10)
        assert quantiles([5, 1]) == (1, 1, 5, 5, 5)

    def test_report_as_a_table(self, char):
        rows = [*good(8), {"prompt": "p" * 9, "completion": "x"}, {"prompt": "", "completion": "x"}]
        text = str(quietly(rows, char, max_prompt_length=5, max_bad_fraction=0.1).report)
        assert text.splitlines() == [
            "prompt_completion: 9 of 10 rows kept",
            "  skipped          1  empty prompt (first: row 9)",
            "  note             1  of 9 prompts cut to the limit",
            "  tokens           min     50%     90%     99%     max",
            "  prompt             2       2       5       5       5",
            "  completion         2       3       3       3       3",
            "  trained           26  in all",
        ]
        assert str(DataReport("prompt")) == "prompt: 0 of 0 rows kept"


class TestMemory:
    def test_equal_ids_and_masks_are_shared(self, char):
        first, second = tokenize(good(2), char)
        assert first.completions[0].mask is second.completions[0].mask
        assert first.prompt_ids[0] is second.prompt_ids[0]

    def test_fingerprint_tells_data_apart(self, char):
        rows = [
            {"prompt": "p", "completions": ["c", "d"], "scores": [1.0, 0.0]},
            {"prompt": "q", "completions": ["c"], "scores": [1]},
        ]
        base = tokenize(rows, char).fingerprint
        assert tokenize(copy.deepcopy(rows), char).fingerprint == base
        changed = [
            [rows[1], rows[0]],
            [{**rows[0], "scores": [1.0, 0.5]}, rows[1]],
            [{**rows[0], "completions": ["c", "e"]}, rows[1]],
            [{**rows[0], "prompt": "pp"}, rows[1]],
        ]
        assert len({base, *(tokenize(other, char).fingerprint for other in changed)}) == 5

    def test_fingerprint_sees_masks(self):
        tokenizer = char_tokenizer(template=PLAIN_TEMPLATE)
        made = tokenize([{"messages": [user("q"), assistant("x"), user("y"), assistant("z")]}], tokenizer)
        completion = made[0].completions[0]
        unmasked = replace(completion, mask=(True,) * len(completion.ids))
        other = replace(made, examples=[replace(made[0], completions=(unmasked,))])
        assert made.fingerprint != other.fingerprint


class TestOverlap:
    def test_counts(self, char):
        train = tokenize([{"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"}], char)
        held = tokenize(
            [
                {"prompt": "c", "completion": "x"},
                {"prompt": "b", "completion": "x"},
                {"prompt": "a", "completion": "y"},
            ],
            char,
        )
        with pytest.warns(DataWarning, match=r"2 of 3 evaluation examples \(first: 1\).*1 of them"):
            overlap = check_overlap(train, held)
        assert (overlap.prompts, overlap.examples, overlap.of, overlap.first) == (2, 1, 3, 1)

    def test_none(self, char):
        train = tokenize(good(3), char)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_overlap(train, tokenize([{"prompt": "z", "completion": "x"}], char)).prompts == 0

    def test_texts_share_their_bos_and_nothing_else(self):
        tokenizer = char_tokenizer(add_bos=True)
        train = tokenize([{"text": "abc"}, {"text": "abd"}], tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_overlap(train, tokenize([{"text": "abe"}], tokenizer)).prompts == 0
        with pytest.warns(DataWarning):
            assert check_overlap(train, tokenize([{"text": "abd"}], tokenizer)).examples == 1

    def test_split_rows_do_not_overlap(self, char):
        rows = Rows([{"prompt": f"p{i % 7}", "completion": f"c{i}"} for i in range(40)])
        kept, held = rows.split(0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_overlap(tokenize(kept, char), tokenize(held, char)).prompts == 0


class TestPreview:
    def test_colours(self):
        tokenizer = char_tokenizer(template=CHATML, eos_token="<|im_end|>")
        row = {"messages": [user("q"), assistant("one"), user("r"), assistant("two")]}
        text = preview(tokenize([row], tokenizer)[0], tokenizer)
        assert text == (
            "\x1b[2m<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n\x1b[0m\n"
            "--- answer 1 of 1, 29 tokens, 8 trained\n"
            "\x1b[30;42mone<|im_end|>\x1b[0m\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
            "\x1b[30;42mtwo<|im_end|>\x1b[0m"
        )

    def test_rewards_labels_and_how_many(self, char):
        ranked = tokenize([{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 0.5, None]}], char)[0]
        text = preview(ranked, char)
        assert "answer 1 of 3, 2 tokens, 2 trained, reward 1" in text
        assert "reward 0.5" in text
        assert "answer 3" not in text
        labelled = tokenize([{"prompt": "p", "completion": "c", "label": True}], char)[0]
        assert "label True" in preview(labelled, char)

    def test_data_cannot_steer_the_terminal(self, bpe):
        data = quietly([{"prompt": "a\x1b[2J\x07", "completion": "b\x9b31m\rc\n"}], bpe)
        text = preview(data[0], bpe)
        for colour in ("\x1b[2m", "\x1b[30;42m", "\x1b[0m"):
            text = text.replace(colour, "")
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)
        assert r"a\x1b[2J\x07" in text

    def test_spaces_survive_between_stretches(self, spm):
        data = tokenize([{"prompt": "What is", "completion": " two"}], spm)
        assert "\x1b[30;42m two</s>" in preview(data[0], spm)


def test_completion_checks_its_mask():
    from rlft.data import Completion

    with pytest.raises(ValueError, match="one bool per id, 2, got 1"):
        Completion((1, 2), (True,))
    assert Example((1,), (), {"prompt": "x", "completions": 1, "answer": 2}, "x").extra_columns == {"answer": 2}


class TestSpecialTokensInText:
    @pytest.mark.parametrize(
        ("row", "count"),
        [
            ({"prompt": "a</s>b", "completion": "c"}, 1),
            ({"prompt": "a", "completion": "c</s>d"}, 1),
            ({"prompt": "a", "completion": "c<|im_end|>"}, 1),
            ({"prompt": "a", "completion": "c</s>"}, 0),
            ({"prompt": "<s>a", "completion": "c"}, 0),
            ({"prompt": "a<s>", "completion": "c"}, 1),
            ({"prompt": "a</s>", "completion": "c"}, 1),
            ({"prompt": "a", "completion": "</s>c</s>"}, 1),
            ({"text": "<s>ab</s>"}, 0),
            ({"prompt": [user("say </s>")], "completion": [assistant("ok")]}, 1),
            ({"prompt": [user("a")], "completion": [assistant("b")]}, 0),
            ({"text": "a<unk>b"}, 1),
            ({"text": "ab"}, 0),
        ],
    )
    def test_counted(self, char, row, count):
        if not count:
            assert tokenize([row], char).report.special_in_text == 0
            return
        with pytest.warns(DataWarning, match=r"1 of 1 rows write a special token.*first: row 0"):
            report = tokenize([row], char).report
        assert report.special_in_text == 1
        assert report.num_skipped == 0
        assert "write" in str(report)
