"""Bad input 1-20 on two processes: rows, columns, files and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bad_input._two_case import CHAT, ONE, Hold, add, case, chatty
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, trainer, varied

THUMBS = [{"prompt": f"{i}=", "completion": "ab"[i % 2], "label": i % 2 == 0} for i in range(8)]
#: The processes read different rows; both say so.
OTHER = ("must agree", "process 1 has another training data than process 0", "Give every process the same")


def skipped(row: int, what: str, objective: str, good: list[Any], bad: Any, reason: str, **extra: Any) -> None:
    """One bad row after eight good ones: refused at the default limit, skipped above it, met by both or by one."""
    rows = [*good, bad]
    case(
        row, what, "refused", objective, rows=rows, good=good, whose=ONE,
        words=("1 of 9 rows (11.1%)", "max_bad_fraction=0.01", f"1 {reason}", "repair the rows or raise max_bad_fraction"),
        **extra,
    )  # fmt: skip
    case(
        row, f"{what} skipped", "trains", objective, rows=rows, good=good, whose=ONE, max_bad_fraction=0.5, at=2,
        warns=("1 of 9 rows were skipped", f"1 {reason}"), **extra,
    )  # fmt: skip


def file(row: int, what: str, text: str | None, *words: str) -> None:
    """A file of the process's own: bad where it is met, else the good rows."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        path = folder / f"rows-{'bad' if met else 'good'}.jsonl"
        said = text if met else "".join(json.dumps(line) + "\n" for line in ANSWERS)
        if said is not None:
            path.write_text(said)
        hold.trainer = trainer(folder, "sft", str(path))
        hold.trainer.train()

    add(row, what, "refused", run, whose=ONE, words=words)


def evaluation(what: str, rows: Any, count: int, objective: str, **extra: Any) -> None:
    """The processes have unequal numbers of batches to evaluate, or none."""
    settings = {"eval_dataset": rows[:count], "eval_steps": 1, "per_device_eval_batch_size": 2, **extra}
    case(20, f"evaluation of {count} {what}", "trains", objective, good=rows, at=2, **settings)


case(1, "column missing", "refused", "dpo", rows=[{"prompt": "1", "chosen": "2"}] * 8, whose=ONE, beta=0.1,
     data_format="preference", words=("needs the column 'rejected'", "['prompt', 'chosen']"))  # fmt: skip
case(2, "column misspelt", "refused", "dpo", rows=[{"prompt": "1", "choosen": "2", "rejected": "3"}] * 8, whose=ONE,
     beta=0.1, words=("did you mean 'chosen' by 'choosen'?", "rename with columns="))  # fmt: skip
case(3, "no rows", "refused", "sft", rows=[], whose=ONE, words=("no rows", "at least one row"))
case(4, "all rows filtered out", "refused", "sft", rows=[{"prompt": "", "completion": "a"}] * 8, whose=ONE,
     max_bad_fraction=1.0, words=("none of the 8 rows can be used", "8 empty prompt (first: row 0)", "repair the data"))  # fmt: skip
skipped(5, "empty prompt", "sft", ANSWERS, {"prompt": "", "completion": "a"}, "empty prompt")
skipped(6, "empty completion", "sft", ANSWERS, {"prompt": "1", "completion": ""}, "empty completion")
skipped(7, "cell without text", "sft", ANSWERS, {"prompt": "1", "completion": None}, "missing or non-text cell")
skipped(8, "chosen equals rejected", "dpo", PAIRS, {"prompt": "1", "chosen": "a", "rejected": "a"},
        "chosen and rejected are equal", beta=0.1)  # fmt: skip


def two_prompts(i: int, other: int) -> dict[str, Any]:
    ask, again = ({"role": "user", "content": str(n)} for n in (i, other))
    yes, no = ({"role": "assistant", "content": word} for word in "ab")
    return {"chosen": [ask, yes], "rejected": [again, no]}


skipped(9, "prompts differ", "dpo", [two_prompts(i, i) for i in range(8)], two_prompts(1, 2),
        "chosen and rejected answer different prompts", beta=0.1, processing_class=chatty(), max_prompt_length=None)  # fmt: skip
skipped(10, "prompt too long", "sft", ANSWERS, {"prompt": "1" * 99, "completion": "a"},
        "prompt longer than max_prompt_length", truncation_mode="skip")  # fmt: skip
case(11, "completion cut", "trains", "sft", rows=[*ANSWERS[:7], {"prompt": "1", "completion": "a" * 99}],
     warns=("1 of 8 answers were cut to max_completion_length=6",), at=2)  # fmt: skip
case(11, "completion cut here", "refused", "sft", rows=[*ANSWERS[:7], {"prompt": "1", "completion": "a" * 99}],
     whose=("second",), words=OTHER)  # fmt: skip
skipped(12, "completion cut to zero", "sft", [{"prompt": f"{i}", "completion": "abcdefg"[: 1 + i % 3]} for i in range(8)],
        {"prompt": "123456789", "completion": "a"}, "prompt fills max_length", max_prompt_length=None, max_length=9)  # fmt: skip
skipped(
    13,
    "lone surrogate",
    "sft",
    ANSWERS,
    {"prompt": "1", "completion": "\ud800"},
    "invalid text (lone surrogate or NUL)",
)
WIZARD = [{"prompt": [{"role": "wizard", "content": "1"}], "completion": CHAT[0]["completion"]}]
case(14, "unknown role", "refused", "sft", rows=[*CHAT, *WIZARD], good=CHAT, whose=ONE, processing_class=chatty(),
     max_prompt_length=None, words=("row 8", "role 'wizard'", "known: assistant"))  # fmt: skip
ENDS_WRONG = {"prompt": CHAT[0]["prompt"], "completion": [*CHAT[0]["completion"], {"role": "user", "content": "b"}]}
skipped(15, "ends with the user", "sft", CHAT, ENDS_WRONG, "conversation does not end with an assistant turn",
        processing_class=chatty(), max_prompt_length=None)  # fmt: skip
case(16, "rows repeated", "trains", "sft", rows=[*ANSWERS, ANSWERS[0], ANSWERS[0]], at=2,
     warns=("2 of 10 rows repeat an earlier one; they count twice",))  # fmt: skip
case(16, "rows repeated here", "refused", "sft", rows=[*ANSWERS, ANSWERS[0]], whose=("second",), words=OTHER)
file(
    17,
    "broken line",
    '{"prompt": "1", "completion": "a"}\n{"prompt": \n',
    "rows-bad.jsonl:2",
    "broken JSON",
    "repair the line",
)
file(0, "file missing", None, "rows-bad.jsonl", "give")
OVERLAP = ("3 of 3 evaluation examples (first: 0)", "trained on")
case(18, "overlap", "trains", "sft", eval_dataset=ANSWERS[:3], eval_steps=1, at=2, warns=OVERLAP)
case(18, "overlap here", "refused", "sft", eval_dataset=[{"prompt": "x", "completion": "y"}] * 3, eval_steps=1,
     bad={"eval_dataset": ANSWERS[:3]}, whose=("second",), words=("must agree", "another evaluation data"))  # fmt: skip
case(19, "fewer rows than a step", "refused", "sft", rows=ANSWERS[:3], whose=ONE,
     words=("3 training examples", "(4 on each of 2 processes)", "lower per_device_train_batch_size"))  # fmt: skip
UNEVEN = {"max_steps": None, "num_train_epochs": 1.0}
case(20, "last batch uneven", "trains", "sft", rows=[*ANSWERS, *ANSWERS[:3]], at=2, **UNEVEN,
     warns=("11 training examples", "the last 3 of an epoch make a smaller last step"))  # fmt: skip
case(
    20,
    "last batch uneven here",
    "refused",
    "sft",
    rows=[*ANSWERS, *ANSWERS[:3]],
    whose=("second",),
    words=OTHER,
    **UNEVEN,
)
for _count in (1, 3, 5):
    evaluation("pairs", PAIRS, _count, "dpo", beta=0.1)
    evaluation("thumbs", THUMBS, _count, "kto", beta=0.1)
    evaluation("prompts", PROMPTS, _count, "rloo", beta=0.0, reward=varied)
case(0, "other rows", "refused", "sft", rows=ANSWERS[::-1], whose=("second",), words=OTHER)
case(
    0, "other answers for the reward", "refused", "rloo", rows=[{**row, "answer": "1"} for row in PROMPTS], reward=varied,
    good=[{**row, "answer": "2"} for row in PROMPTS], whose=("second",), beta=0.0,
    words=("must agree", "process 1 has another content of the columns that are read", "answer ", "Give every process the same"),
)  # fmt: skip


class BreaksOff:
    """Rows that cannot be read on after the tenth, where this process meets it."""

    def __init__(self, bad: bool) -> None:
        self.bad = bad

    def __iter__(self) -> Any:
        for number in range(400):
            if self.bad and number >= 300:
                raise OSError("the disk is gone")
            yield {"prompt": f"{number}", "completion": "a"}


def broken_stream(folder: Path, met: bool, hold: Hold) -> None:
    settings = {"streaming": True, "max_steps": 45, "save_steps": 30, "self_checks": False}
    hold.trainer = trainer(folder, "sft", BreaksOff(met), **settings)
    hold.trainer.train()


add(
    0, "stream breaks off", "refused", broken_stream, whose=ONE, words=("the disk is gone", "Repair it", "same command")
)
