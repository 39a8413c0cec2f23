"""Bad input 45-56 on two processes: hyper-parameters and settings."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from rlft import cli
from rlft.run.processes import launch
from tests.bad_input._two_case import NAN, ONE, Hold, add, case
from tests.bad_input.common import RANKED, trainer, varied

ONLINE = {"reward": varied, "beta": 0.1}
case(
    45,
    "group of one",
    "refused",
    "rloo",
    **ONLINE,
    num_generations=1,
    words=("'rloo'", "set num_generations >= 2, got 1"),
)
case(45, "row with one answer", "refused", "rloo", beta=0.1, good=RANKED, whose=ONE,
     rows=[*RANKED, {"prompt": "9=", "completions": ["a"], "scores": [1.0]}],
     words=("at least 2, got 1 in 1 of 9 rows (first: row 8)", "leave those rows out"))  # fmt: skip
case(46, "groups do not fit", "refused", "grpo", reward=varied, per_device_train_batch_size=6,
     words=("per_device_train_batch_size x gradient_accumulation_steps = 6 x 1", "num_generations=4", "a multiple of 4"))  # fmt: skip
case(47, "beta negative", "refused", "dpo", beta=-0.1, words=("beta must be >= 0, got -0.1", "change beta"))
case(47, "beta NaN", "refused", "rloo", reward=varied, beta=NAN, words=("beta must be", "got nan", "change beta"))
case(48, "beta 0", "refused", "dpo", beta=0.0, words=("beta must be > 0, got 0.0", "change beta"))
case(
    49, "clip", "refused", "grpo", reward=varied, epsilon=0.0, words=("epsilon must be > 0, got 0.0", "change epsilon")
)
case(49, "clip low above high", "refused", "grpo", reward=varied, epsilon=0.3, epsilon_high=0.2,
     words=("epsilon=0.3 is above epsilon_high=0.2", "raise epsilon_high"))  # fmt: skip
case(50, "temperature", "refused", "grpo", reward=varied, temperature=0.0,
     words=("temperature must be > 0, got 0.0", "change temperature"))  # fmt: skip
case(51, "objective", "refused", "gppo", good=RANKED, words=("objective 'gppo' is unknown; did you mean", "Known: "))
case(
    52, "idle option", "refused", "dpo", beta=0.1, epsilon=0.3, words=("'dpo' does not use epsilon=0.3", "drop epsilon")
)
case(
    53,
    "misspelt key",
    "refused",
    "sft",
    learning_rat=0.1,
    words=("unknown setting 'learning_rat'", "did you mean 'learning_rate'?"),
)
case(54, "wrong type", "refused", "sft", learning_rate="1e-5",
     words=("learning_rate must be a number, got '1e-5' of type str", "write it as the number 1e-05"))  # fmt: skip
case(
    55,
    "learning rate",
    "refused",
    "sft",
    learning_rate=0.0,
    words=("learning_rate must be > 0, got 0.0", "change learning_rate"),
)
case(
    55,
    "warm-up",
    "refused",
    "sft",
    warmup_steps=3,
    words=("warmup_steps=3 is more than max_steps=2", "lower warmup_steps"),
)
case(56, "accumulation 0", "refused", "sft", gradient_accumulation_steps=0,
     words=("gradient_accumulation_steps=0 must be at least 1", "change gradient_accumulation_steps"))  # fmt: skip


def impatient(folder: Path, met: bool, hold: Hold) -> None:
    """Settings are refused before processes meet: the other one waits for as long as processes wait at the start."""
    waited, launch.SECONDS = launch.SECONDS, 3
    try:
        hold.trainer = trainer(folder, "sft", None, **({"learning_rat": 0.1} if met else {}))
    finally:
        launch.SECONDS = waited


add(53, "misspelt key here", "refused", impatient, whose=("first", "second"), told=False,
    words=("unknown setting 'learning_rat'", "did you mean 'learning_rate'?"))  # fmt: skip


def by_command(folder: Path, met: bool, hold: Hold) -> None:
    """The command ends on both, before they meet."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["train", "objective=sft", "learning_rat=0.1"])
    raise ValueError(f"code {code}: {said.getvalue()}")


add(53, "misspelt key of a command", "refused", by_command,
    words=("code 2: rlft: unknown setting 'learning_rat'", "did you mean 'learning_rate'?"))  # fmt: skip


def differs(what: str, words: tuple[str, ...], **bad: float) -> None:
    case(0, f"{what} differs", "refused", "sft", bad=bad, whose=("first", "second"),
         words=("must agree", "than process 0", *words, "Give every process the same settings"))  # fmt: skip


differs("learning rate", ("another learning_rate", "0.5"), learning_rate=0.5)
differs("saving", ("another save_steps",), save_steps=1)
