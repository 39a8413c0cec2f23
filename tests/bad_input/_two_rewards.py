"""Bad input 34-44 on two processes: what reward functions return."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlft.run.step import generation_counts
from tests.bad_input._two_case import EACH, NAN, Hold, add, fails
from tests.bad_input.common import ANSWERS, PROMPTS, trainer, varied

Wrong = Callable[[list[float]], Any]


class Reward:
    """Good, but where it is met wrong from the second call on."""

    __name__ = "sometimes"

    def __init__(self, wrong: Wrong, met: bool) -> None:
        self.wrong, self.met, self.calls = wrong, met, 0

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        self.calls += 1
        good = varied(completions, completion_ids)
        return self.wrong(good) if self.met and self.calls > 1 else good


def reward(
    row: int,
    what: str,
    end: str,
    wrong: Wrong,
    *words: str,
    warns: tuple[str, ...] = (),
    at: int | None = None,
    **extra: Any,
) -> None:
    """A reward that goes wrong at the second step, on both processes, on the first alone, on the second alone."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        settings = {"beta": 0.0, "max_steps": 3, **extra}  # no save_steps: what is saved is saved because it stops
        hold.trainer = trainer(folder, "rloo", PROMPTS, reward=Reward(wrong, met), **settings)
        hold.trainer.train()

    if at is None and end != "either":
        at = 1 if end == "refused" else 3
    add(row, what, end, run, whose=EACH, words=words, warns=warns, at=at)


SAYS = "reward function 'sometimes'"
reward(34, "NaN", "refused", lambda good: [NAN, *good[1:]], SAYS, "returned nan for row 0", "at step 2", "return None")
reward(
    34,
    "inf",
    "refused",
    lambda good: [-float("inf"), *good[1:]],
    SAYS,
    "returned -inf for row 0",
    "at step 2",
    "return None",
)
reward(35, "None", "trains", lambda good: [None, *good[1:]], warns=(SAYS, "returned None", "left out"))
reward(36, "all None", "trains", lambda good: [None] * len(good), warns=("no completion of a batch has a reward",))
reward(37, "bool", "trains", lambda good: [bool(r % 2) for r in good], warns=(SAYS, "of type bool: taken as a float"))
reward(
    38, "text", "refused", lambda good: ["1.0"] * len(good), SAYS, "'1.0' of type str for row 0", "return a plain float"
)
reward(
    39,
    "too few",
    "refused",
    lambda good: good[:-1],
    SAYS,
    "7 rewards for 8 completions",
    "one number or None per completion",
)
reward(
    40, "raises", "refused", lambda good: fails(KeyError("x")), SAYS, "raised KeyError: 'x'", "at step 2", "return None"
)
reward(40, "server gone", "refused", lambda good: fails(RuntimeError("Connection reset by peer")),
       SAYS, "raised RuntimeError: Connection reset by peer", "return None")  # fmt: skip
reward(41, "hangs", "refused", lambda good: time.sleep(20), SAYS, "did not return within 0.3 s", "at step 2",
       "raise the reward timeout", reward_timeout=0.3)  # fmt: skip
reward(42, "huge", "either", lambda good: [1e30, *good[1:]])
reward(
    42,
    "too huge",
    "refused",
    lambda good: [1e300, *good[1:]],
    "row 0 (sometimes) does not fit float32",
    "scale the reward",
)
reward(
    43,
    "equal",
    "trains",
    lambda good: [0.5] * len(good),
    warns=("step 2", "groups earn equal rewards", "dynamic_sampling: true"),
)


def unscored(folder: Path, met: bool, hold: Hold) -> None:
    """Nothing is scored for two steps in a row: on both, that stops the run; on one, the other's answers count."""
    settings = {"beta": 0.0, "max_steps": 4, "max_unscored_steps": 2}
    hold.trainer = trainer(folder, "rloo", PROMPTS, reward=Reward(lambda good: [None] * len(good), met), **settings)
    hold.trainer.train()


add(36, "all None for 2 steps", "refused", unscored, at=None,
    words=("step 3", "no answer was scored for 2 steps in a row", "check the reward functions"))  # fmt: skip
add(36, "all None for 2 steps here", "trains", unscored, whose=("first", "second"), at=4)


def equal(folder: Path, met: bool, hold: Hold) -> None:
    kept, generation_counts.EQUAL_STEPS = generation_counts.EQUAL_STEPS, 2
    try:
        wrong = Reward(lambda good: [0.5] * len(good), met)
        hold.trainer = trainer(folder, "rloo", PROMPTS, reward=wrong, beta=0.0, max_steps=4)
        hold.trainer.train()
    finally:
        generation_counts.EQUAL_STEPS = kept


add(
    44,
    "all groups equal",
    "trains",
    equal,
    at=4,
    warns=("step 3", "equal rewards for 2 generations in a row", "num_generations (now 4)"),
)
add(44, "all groups equal here", "trains", equal, whose=("first", "second"), at=4,
    warns=("step 2", "2 of 4 groups earn equal rewards"))  # fmt: skip


# -- not in the table -----------------------------------------------------------------------------------------------------
def in_evaluation(folder: Path, met: bool, hold: Hold) -> None:
    wrong = Reward(lambda good: fails(KeyError("x")), met)
    hold.trainer = trainer(
        folder, "rloo", PROMPTS, reward=wrong, beta=0.0, eval_dataset=PROMPTS[:2], eval_on_start=True
    )
    hold.trainer.train()


def no_reward_file(folder: Path, met: bool, hold: Hold) -> None:
    file = folder / f"own{met}.py"
    if not met:
        file.write_text("def own(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    hold.trainer = trainer(folder, "rloo", PROMPTS, reward=f"{file}:own", beta=0.0)
    hold.trainer.train()


def in_callback(folder: Path, met: bool, hold: Hold) -> None:
    def callback(event: str, run: Any, values: Any) -> None:
        if met and event == "step":
            raise KeyError("a callback")

    hold.trainer = trainer(folder, "sft", ANSWERS, callbacks=[callback])
    hold.trainer.train()


add(
    0,
    "reward raises in evaluation",
    "refused",
    in_evaluation,
    whose=EACH,
    words=(SAYS, "raised KeyError: 'x'", "return None"),
)
add(0, "reward file missing", "refused", no_reward_file, whose=EACH, words=("ownTrue.py",))
add(0, "callback raises", "refused", in_callback, whose=EACH, words=("a callback",), told=False)
