"""How far the code of one step is spread: the files of the loop that a steady step enters, and how often it changes file.

Counted are :file:`trainer.py`, :file:`source.py` and all of :file:`run/`. At a call the step is in the file of what is
called, at a return in the file of the caller. Whatever is called from elsewhere (models, losses, torch) changes nothing,
so a return into such a frame leaves the step where it was. On Python 3.11 commit 154ce3d came to 18 files and 195 moves in
the step of GRPO below, and to 14 and 77 in that of DPO.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import rlft
from rlft import Trainer
from tests.tiny import char_tokenizer, tiny_llama
from tests.trainer.common import PAIRS, PROMPTS

SOURCE = Path(rlft.__file__).parent
#: The fourth step: the sampler is looked at in the first two generations, and everything is imported by then.
STEADY = 3
#: Objective -> the most files that a step may enter, and the most moves between two of them.
LIMITS = {"grpo": (13, 125), "dpo": (11, 57)}

# Two micro-batches. The sampler asks after each token whether to stop, so the length of the answers counts.
GRPO: dict[str, Any] = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": 8,
}  # fmt: skip
DPO: dict[str, Any] = {"per_device_train_batch_size": 4, "max_completion_length": 4}


def in_order(completions: list[str], **columns: Any) -> list[float]:
    """Rewards that are never equal within a group: such steps say and do something more."""
    return [float(i) for i in range(len(completions))]


class Trace:
    """Where control is among the tracked files, from :meth:`begin` to :meth:`end`."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.moves: Counter[tuple[str, str]] = Counter()
        self._last = ""
        self._names: dict[CodeType, str | None] = {}

    def begin(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._see)

    def end(self) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or self._name(frame) is None:
            return
        now = self._name(frame if event == "call" else frame.f_back)
        if now is None:
            return
        if self.files and now != self._last:
            self.moves[self._last, now] += 1
        if now not in self.files:
            self.files.append(now)
        self._last = now

    def _name(self, frame: FrameType | None) -> str | None:
        """The path below ``rlft`` of a frame's file; None where it is not tracked."""
        if frame is None:
            return None
        code = frame.f_code
        if code not in self._names:
            path = Path(code.co_filename)
            name = path.relative_to(SOURCE).as_posix() if path.is_relative_to(SOURCE) else ""
            tracked = name in ("trainer.py", "source.py") or name.startswith("run/")
            self._names[code] = name if tracked else None
        return self._names[code]

    def __str__(self) -> str:
        moves = [f"{count:5d}  {one} -> {other}" for (one, other), count in self.moves.most_common()]
        lines = [f"{len(self.files)} files, in order of entry:", *(f"       {name}" for name in self.files)]
        return "\n".join([*lines, f"{self.moves.total()} moves:", *moves])


class Traced(Trainer):
    """Traces one step. Counts do not hang on the clock, so one is enough."""

    trace: Trace

    def train_step(self) -> dict[str, float]:
        if self.step != STEADY:
            return super().train_step()
        self.trace = Trace()
        self.trace.begin()
        try:
            return super().train_step()
        finally:
            self.trace.end()


@pytest.mark.parametrize("objective", LIMITS)
def test_a_step_stays_in_few_files(tmp_path: Path, objective: str) -> None:
    online = objective == "grpo"
    settings = {
        "objective": objective, "beta": 0.1, "output_dir": str(tmp_path / "run"), "max_steps": STEADY + 2, "learning_rate": 1e-2,
        "max_prompt_length": 8, "self_checks": False, "disable_tqdm": True, "report_to": [], **(GRPO if online else DPO),
    }  # fmt: skip
    t = Traced(
        tiny_llama(hidden_size=16, num_hidden_layers=1),
        settings,
        train_dataset=PROMPTS if online else PAIRS,
        processing_class=char_tokenizer(),
        reward_funcs=in_order if online else None,
    )
    t.train()
    files, moves = LIMITS[objective]
    assert t.trace.files[0] == "trainer.py", "nothing was traced"
    if len(t.trace.files) > files or t.trace.moves.total() > moves:
        pytest.fail(
            f"a step of {objective} may enter {files} files and move {moves} times between them:\n{t.trace}", False
        )
