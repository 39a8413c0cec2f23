"""Bad input 1-20: columns, rows, files and batches."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from rlft.config import ConfigError
from rlft.data import DataWarning
from tests.bad_input.common import (
    ANSWERS,
    PAIRS,
    PROMPTS,
    RANKED,
    once,
    refused,
    refused_by_command,
    trainer,
    varied,
)
from tests.tiny import char_tokenizer

CHAT = [
    {"prompt": [{"role": "user", "content": f"{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
    for i in range(8)
]


def skipped(folder: Path, objective: str, good: list[Any], bad: Any, reason: str, **extra: Any) -> None:
    """One bad row in 8 good ones: skipped, counted by reason and place, and refused where the limit is the default 1 %."""
    message = refused(
        lambda: trainer(folder, objective, [*good, bad], **extra),
        "1 of 9 rows (11.1%)", "max_bad_fraction=0.01", f"1 {reason}", "first: row 8", "raise max_bad_fraction",
    )  # fmt: skip
    assert "repair the rows" in message
    with pytest.warns(DataWarning, match="1 of 9 rows were skipped") as caught:
        t = trainer(folder, objective, [*good, bad], max_bad_fraction=0.2, **extra)
    assert len([w for w in caught if "skipped" in str(w.message)]) == 1
    assert t.train_data.report.skipped == {reason: 1}
    assert len(t.train_data.examples) == 8
    assert f"{reason} (first: row 8)" in str(t.train_data.report)
    t.train()
    assert t.step == 2
    facts = json.loads((t.run_dir / "summary.json").read_text())["data"]
    assert facts["skipped"] == {reason: 1}


def test_bad_input_01_column_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1", "chosen": "2"}] * 8
    said = refused_by_command(
        capsys, tmp_path, "'prompt', 'chosen'", rows=rows, data_format="preference", objective="dpo", beta=0.1
    )
    assert "needs the column 'rejected'" in said
    refused(
        lambda: trainer(tmp_path, "rloo", [{"question": "1"}] * 8, reward=varied, beta=0.0), "'prompt'", "['question']"
    )


def test_bad_input_02_column_misspelt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": str(i), "choosen": "2", "rejected": "3"} for i in range(8)]
    for form in ("auto", "preference"):
        refused_by_command(
            capsys, tmp_path, "did you mean 'chosen' by 'choosen'?", "rename with columns=",
            rows=rows, objective="dpo", beta=0.1, data_format=form,
        )  # fmt: skip


def test_bad_input_03_empty_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(capsys, tmp_path, "train.jsonl", "no rows", rows=[])
    refused(lambda: trainer(tmp_path, "sft", []), "no rows")


def test_bad_input_04_all_rows_filtered_out(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", [{"prompt": "", "completion": "a"}] * 8, max_bad_fraction=1.0),
        "none of the 8 rows can be used", "8 empty prompt (first: row 0)", "repair the data",
    )  # fmt: skip
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, train_slice=[0.0, 0.01]),
        "train_slice=[0.0, 0.01]", "8 rows holds none", "widen it", kind=ConfigError,
    )  # fmt: skip


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_bad_input_05_empty_prompt(tmp_path: Path, prompt: str) -> None:
    skipped(tmp_path, "sft", ANSWERS, {"prompt": prompt, "completion": "a"}, "empty prompt")


def test_bad_input_06_empty_completion(tmp_path: Path) -> None:
    skipped(tmp_path, "sft", ANSWERS, {"prompt": "1", "completion": ""}, "empty completion")


@pytest.mark.parametrize("cell", [None, 7, ["a"]])
def test_bad_input_07_cell_that_is_no_text(tmp_path: Path, cell: Any) -> None:
    skipped(tmp_path, "sft", ANSWERS, {"prompt": "1", "completion": cell}, "missing or non-text cell")


def test_bad_input_08_chosen_equals_rejected(tmp_path: Path) -> None:
    bad = {"prompt": "1", "chosen": "a", "rejected": "a"}
    skipped(tmp_path, "dpo", PAIRS, bad, "chosen and rejected are equal", beta=0.1)
    long = {"prompt": "1", "chosen": "a" * 9 + "b", "rejected": "a" * 9 + "c"}
    with pytest.warns(DataWarning, match="equal after truncation"):
        t = trainer(tmp_path, "dpo", [*PAIRS, long], beta=0.1, max_bad_fraction=0.2)
    assert t.train_data.report.skipped == {"chosen and rejected are equal after truncation": 1}


def test_bad_input_09_prompts_of_a_pair_differ(tmp_path: Path) -> None:
    def pair(i: int, other: int) -> dict[str, Any]:
        ask, again = ({"role": "user", "content": str(n)} for n in (i, other))
        yes, no = ({"role": "assistant", "content": word} for word in "ab")
        return {"chosen": [ask, yes], "rejected": [again, no]}

    tokenizer = char_tokenizer(chat_template=True)
    skipped(
        tmp_path, "dpo", [pair(i, i) for i in range(8)], pair(1, 2), "chosen and rejected answer different prompts",
        beta=0.1, processing_class=tokenizer, max_prompt_length=None,
    )  # fmt: skip


def test_bad_input_10_prompt_at_the_limit(tmp_path: Path) -> None:
    bad = {"prompt": "1234567890", "completion": "a"}
    skipped(tmp_path, "sft", ANSWERS, bad, "prompt longer than max_prompt_length", truncation_mode="skip")
    skipped(tmp_path / "b", "sft", ANSWERS, bad, "prompt fills max_length", max_prompt_length=None, max_length=10)


def test_bad_input_11_completion_truncated(tmp_path: Path) -> None:
    rows = [*ANSWERS, {"prompt": "1", "completion": "abcdefgh"}]
    with pytest.warns(DataWarning, match=r"1 of 9 answers were cut to max_completion_length=6.*no end") as caught:
        t = trainer(tmp_path, "sft", rows)
    assert len(caught) == 1
    last = t.train_data.examples[-1].completions[0]
    assert (last.truncated, len(last.ids), sum(last.mask)) == (True, 6, 6)
    assert t.tokenizer.decode(last.ids) == "abcdef"  # no end of sequence is put on a cut answer
    t.train()
    assert t.step == 2


def test_bad_input_12_completion_cut_to_zero(tmp_path: Path) -> None:
    """The prompt takes the whole of max_length: what is left of the answer is nothing, and the row is not kept."""
    long = {"prompt": "123456789", "completion": "a"}
    good = [{"prompt": f"{i}", "completion": "abcdefg"[: 1 + i % 3]} for i in range(8)]
    skipped(tmp_path, "sft", good, long, "prompt fills max_length", max_prompt_length=None, max_length=9)


@pytest.mark.parametrize("text", ["a\ud800b", "a\x00b"])
def test_bad_input_13_text_that_cannot_be_encoded(tmp_path: Path, text: str) -> None:
    reason = "invalid text (lone surrogate or NUL)"
    skipped(tmp_path, "sft", ANSWERS, {"prompt": "1", "completion": text}, reason)
    path = tmp_path / "bytes.jsonl"
    lines = [json.dumps(row).encode() for row in ANSWERS] + [b'{"prompt": "1", "completion": "\xff\xfe"}']
    path.write_bytes(b"\n".join(lines))
    refused(lambda: trainer(tmp_path, "sft", str(path)), reason, f"{path}:9", "max_bad_fraction=0.01")


def test_bad_input_14_role_unknown(tmp_path: Path) -> None:
    rows = [*CHAT, {"prompt": [{"role": "human", "content": "a"}], "completion": CHAT[0]["completion"]}]
    refused(
        lambda: trainer(tmp_path, "sft", rows, processing_class=char_tokenizer(chat_template=True)),
        "row 8", "role 'human'", "did you mean 'user'?",
    )  # fmt: skip


def test_bad_input_15_conversation_ends_with_the_user(tmp_path: Path) -> None:
    bad = {"prompt": CHAT[0]["prompt"], "completion": [*CHAT[0]["completion"], {"role": "user", "content": "b"}]}
    skipped(
        tmp_path, "sft", CHAT, bad, "conversation does not end with an assistant turn",
        processing_class=char_tokenizer(chat_template=True), max_prompt_length=None,
    )  # fmt: skip


def test_bad_input_16_same_row_again(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="2 of 10 rows repeat an earlier one; they count twice") as caught:
        t = trainer(tmp_path, "sft", [*ANSWERS, ANSWERS[0], ANSWERS[0]])
    assert len(caught) == 1
    assert len(t.train_data.examples) == 10
    assert t.train_data.report.duplicates == 2


def test_bad_input_17_broken_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(ANSWERS[0]), json.dumps(ANSWERS[1]), '{"prompt": "1", "completion": }']))
    refused_by_command(capsys, tmp_path, f"{path}:3", "broken JSON", "column 31", "repair the line")


def test_bad_input_18_evaluation_rows_that_are_trained_on(tmp_path: Path) -> None:
    held = [ANSWERS[3], {"prompt": "9+9=", "completion": "18"}]
    with pytest.warns(DataWarning, match=r"1 of 2 evaluation examples \(first: 0\) .*trained on, 1 of them") as caught:
        t = trainer(tmp_path, "sft", ANSWERS, eval_dataset=held)
    assert len(caught) == 1
    assert "eval_loss" in t.train()


def test_bad_input_19_less_data_than_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_by_command(
        capsys, tmp_path, "8 training examples", "(12 on each of 1 processes)", "lower per_device_train_batch_size",
        per_device_train_batch_size=6, gradient_accumulation_steps=2,
    )  # fmt: skip
    refused(
        lambda: trainer(tmp_path, "rloo", PROMPTS[:1], reward=varied, beta=0.0),
        "1 training examples", "(2 on each of 1 processes)", "gradient_accumulation_steps, or add data", kind=ConfigError,
    )  # fmt: skip


def test_bad_input_20_last_batch_uneven(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is a smaller step of its own, averaged over its own rows, and said once."""
    with caplog.at_level(logging.WARNING, "rlft"):
        t = trainer(tmp_path, "sft", ANSWERS, per_device_train_batch_size=5, max_steps=3)
        seen: list[int] = []
        draw = t.source.next

        def counted(step: int) -> list[Any]:
            batches = draw(step)
            seen.append(sum(b.num_rows for b in batches))
            return batches

        t.source.next = counted
        assert math.isfinite(t.train()["loss"])
    assert seen == [5, 3, 5]
    once(caplog.records, "8 training examples", "steps of 5", "the last 3 of an epoch make a smaller last step")
    caplog.clear()
    trainer(tmp_path / "b", "sft", ANSWERS, per_device_train_batch_size=4)
    trainer(tmp_path / "c", "rloo", RANKED, beta=0.1, per_device_train_batch_size=4)
    assert not caplog.records


def test_bad_input_20_micro_batches_of_one_row_are_no_trouble(tmp_path: Path) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, per_device_train_batch_size=1, gradient_accumulation_steps=7, max_steps=2)
    t.train()
    assert t.step == 2
