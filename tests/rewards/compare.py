"""False 1 and false 0 of verifiers, on pairs of answers with known verdicts and on the references of GSM8K.

``python -m tests.rewards.compare`` prints the table of docs/rewards.md for every verifier that is installed here: ours
always, math-verify with the extra ``math``, TRL's ``accuracy_reward`` with the extra ``bench`` too. RLFT_DATA names the
folder that holds ``gsm8k/test.jsonl``; without it those columns are left out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlft.rewards import MathVerifier, MathVerifyReward

PAIRS = Path(__file__).with_name("answer_pairs.jsonl")
Score = Callable[[list[str], list[str]], list[Any]]


def pairs() -> list[dict[str, Any]]:
    """The pairs written for this project: kind, reference, completion, and whether it is right."""
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def references() -> list[str] | None:
    """The 1,319 final answers of GSM8K's test rows, None where the data is not here."""
    path = Path(os.environ.get("RLFT_DATA", "")) / "gsm8k" / "test.jsonl"
    if not os.environ.get("RLFT_DATA") or not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["answer"].rpartition("####")[2].strip() for row in rows]


#: How a completion may give a number, and whether a box announces it.
WRITTEN = {
    r"So the answer is $\boxed{%s}$.": True, r"\boxed{\$%s}": True, r"\boxed{%s\text{ dollars}}": True,
    "We add.\n#### %s": False, "<answer>%s</answer>": False, "The final answer is %s.": False,
}  # fmt: skip


def gsm8k(answers: list[str], *, boxed: bool) -> Iterator[dict[str, Any]]:
    """Each reference in each way of writing: itself, and three wrong numbers near it."""
    for answer in answers:
        value = int(answer.replace(",", ""))
        near = sorted({value + 1, value * 10, -value, value // 10} - {value})[:3]
        for form, box in WRITTEN.items():
            if box == boxed:
                for number in (f"{value:,}", *map(str, near)):
                    right = number == f"{value:,}"
                    yield {"reference": answer, "completion": form.replace("%s", number), "right": right}


@functools.cache  # the process of sympy lives as long as its verifier
def verifiers() -> dict[str, Score]:
    """What is installed here, under the names of the table."""
    symbolic = MathVerifier(symbolic=True)
    symbolic.symbolic.timeout = 20.0  # type: ignore[union-attr] - a busy machine decides nothing
    found: dict[str, Score] = {
        "`math`": lambda completions, answers: MathVerifier()(completions, answer=answers),
        "`math`, `symbolic: true`": lambda completions, answers: symbolic(completions, answer=answers),
    }
    if importlib.util.find_spec("math_verify") is not None:
        found["`math_verify`"] = lambda completions, answers: MathVerifyReward()(completions, answer=answers)
        if importlib.util.find_spec("trl") is not None:
            from trl.rewards.accuracy_rewards import accuracy_reward

            def trl(completions: list[str], answers: list[str]) -> list[Any]:
                messages = [[{"role": "assistant", "content": text}] for text in completions]
                return accuracy_reward(messages, [f"${answer}$" for answer in answers])

            found["TRL `accuracy_reward`"] = trl
    return found


def scored(score: Score, rows: list[dict[str, Any]]) -> list[Any]:
    return score([row["completion"] for row in rows], [row["reference"] for row in rows])


def count(scores: list[Any], rows: list[dict[str, Any]]) -> dict[str, int]:
    """False 1, false 0, and what was left unscored of the right and of the wrong ones."""
    found = {"false 1": 0, "false 0": 0, "right, unscored": 0, "wrong, unscored": 0}
    for row, got in zip(rows, scores, strict=True):
        if got is None:
            found["right, unscored" if row["right"] else "wrong, unscored"] += 1
        elif bool(got) != row["right"]:
            found["false 0" if row["right"] else "false 1"] += 1
    return found


def sets() -> dict[str, list[dict[str, Any]]]:
    """The sets of pairs, under the names of the table."""
    found = {"pairs": pairs()}
    answers = references()
    if answers is not None:
        found["GSM8K, in a box"] = list(gsm8k(answers, boxed=True))
        found["GSM8K, other markers"] = list(gsm8k(answers, boxed=False))
    return found


def size(rows: list[dict[str, Any]]) -> str:
    right = sum(row["right"] for row in rows)
    return f"{right:,} right, {len(rows) - right:,} wrong"


HEAD = ["| set | verifier | false 1 | false 0 | right, unscored | wrong, unscored |", "|---|---|--:|--:|--:|--:|"]


def line(name: str, who: str, scores: list[Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table."""
    cells = " | ".join(f"{n:,}" for n in count(scores, rows).values())
    return f"| {name} ({size(rows)}) | {who} | {cells} |"


def kinds(scores: dict[str, list[Any]], rows: list[dict[str, Any]]) -> list[str]:
    """False 1 / false 0 of the pairs, by kind."""
    lines = ["| pairs of the kind | " + " | ".join(scores) + " |", "|---|" + "--:|" * len(scores)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        which = [k for k, row in enumerate(rows) if row["kind"] == kind]
        some = [rows[k] for k in which]
        counts = [count([all_of[k] for k in which], some) for all_of in scores.values()]
        lines.append(
            f"| {kind} ({size(some)}) | " + " | ".join(f"{c['false 1']} / {c['false 0']}" for c in counts) + " |"
        )
    return lines


def main() -> None:
    logging.getLogger("rlft.rewards").setLevel(logging.ERROR)
    found = {name: {who: scored(score, rows) for who, score in verifiers().items()} for name, rows in sets().items()}
    lines = HEAD + [line(name, who, made, sets()[name]) for name, each in found.items() for who, made in each.items()]
    print("\n".join([*lines, "", *kinds(found["pairs"], pairs())]))


if __name__ == "__main__":
    main()
