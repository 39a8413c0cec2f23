"""What a bad input on two processes is: who meets it, how it must end, and what must be said. See test_two_processes.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlft import Trainer
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, trainer
from tests.tiny import char_tokenizer

__all__ = ["BOTH", "CASES", "CHAT", "EACH", "GONE", "NAN", "ONE", "Case", "Hold", "add", "case", "chatty", "fails"]

NAN = math.nan
CHAT = [
    {"prompt": [{"role": "user", "content": f"{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
    for i in range(8)
]
GOOD: dict[str, Any] = {"sft": ANSWERS, "dpo": PAIRS, "rloo": PROMPTS, "grpo": PROMPTS}
BOTH, ONE, EACH = ("both",), ("both", "second"), ("both", "first", "second")
#: What a process says when another one is gone: the trainer's words, or torch's in a loop without a trainer.
GONE = ("lost contact with another", "could not meet the others", "closed by peer", "reset by peer", "broken pipe")


class Hold:
    """Where a case leaves its trainer, so that what became of it can be looked at."""

    trainer: Trainer | None = None
    value: Any = None


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        row: of the table; 0 for a fault that is not in it.
        whose: which processes meet it; the others have good input.
        end: ``trains``, ``refused`` or ``either``, and the same on both processes.
        run: (folder, whether this process meets it, where to leave the trainer).
        words: field, value and remedy, in the error of a process that meets it.
        told: whether the other process says them too; False: it says that it lost contact. Or words of its own.
        warns: are in one warning or log line, on one process at least.
        at: finished steps when it ends, with a whole checkpoint of that step; None: not looked at.
    """

    row: int
    whose: str
    end: str
    run: Callable[[Path, bool, Hold], Any]
    words: tuple[str, ...] = ()
    told: bool | tuple[str, ...] = True
    warns: tuple[str, ...] = ()
    at: int | None = None

    def expects(self, rank: int) -> tuple[str, ...]:
        """Words in the error of this process; none where it only hears that the other one is gone."""
        if self.meets(rank) or self.told is True:
            return self.words
        return self.told or ()

    def meets(self, rank: int) -> bool:
        return self.whose == "both" or (self.whose == "second") == (rank == 1)


#: name -> case.
CASES: dict[str, Case] = {}


def add(row: int, what: str, end: str, run: Callable[..., Any], *, whose: Iterable[str] = BOTH, **rest: Any) -> None:
    """Register a case for each of ``whose``."""
    for who in whose:
        name = f"{row:02d} {what}, {who}"
        assert name not in CASES, name
        CASES[name] = Case(row, who, end, run, **rest)


def case(
    row: int,
    what: str,
    end: str,
    objective: str,
    *,
    rows: Any = None,
    good: Any = None,
    bad: Mapping[str, Any] | None = None,
    whose: Iterable[str] = BOTH,
    words: tuple[str, ...] = (),
    warns: tuple[str, ...] = (),
    told: bool = True,
    at: int | None = None,
    **common: Any,
) -> None:
    """A run with bad rows, or with bad settings and parts, on the processes that meet it.

    Args:
        row, what, end, whose, words, warns, told, at: see :class:`Case`.
        objective: of the run.
        rows: the bad rows; default: the good ones.
        good: the good rows; default: those that fit the objective.
        bad: arguments of ``trainer`` on the processes that meet it; functions make models and tokenizers anew.
        common: arguments of ``trainer`` on both.
    """
    fine = GOOD[objective] if good is None else good

    def run(folder: Path, met: bool, hold: Hold) -> None:
        extra = {**common, **((bad or {}) if met else {})}
        made = {key: value() if key in _MADE and callable(value) else value for key, value in extra.items()}
        hold.trainer = trainer(folder, objective, rows if met and rows is not None else fine, **made)
        hold.trainer.train()

    add(row, what, end, run, whose=whose, words=words, warns=warns, told=told, at=at)


_MADE = ("model", "ref_model", "processing_class", "sampler", "peft_config")


def chatty(**options: Any) -> Callable[[], Any]:
    """Makes a tokenizer with a chat template."""
    return lambda: char_tokenizer(**{"chat_template": True, **options})


def fails(error: BaseException) -> Any:
    raise error
