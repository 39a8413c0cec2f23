"""Run by tests/test_many_processes.py, once per process: every averaging, any accumulation, groups and tokens uneven."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests import _two_processes as job

#: 12 prompts in a step: 1, 2 and 3 processes and 1, 2 and 4 micro-batches all divide them. 20 in the data, so that the last
#: step is short, and not the same on every process.
ROWS, STEP = 20, 12
RAGGED = [
    {"prompt": f"{i}=", "completions": ["ab"[k % 2] * (1 + (3 * i + 2 * k) % 7) for k in range(2 + i % 4)],
     "scores": [float((i * k) % 3) for k in range(2 + i % 4)]}
    for i in range(ROWS)
]  # fmt: skip
PAIRS = [{"prompt": f"{i}=", "chosen": "a" * (1 + 5 * i % 7), "rejected": "b" * (1 + i % 3)} for i in range(ROWS)]
ANSWERS = [{"prompt": f"{i}=", "completion": "a" * (1 + 5 * i % 7)} for i in range(ROWS)]
THUMBS = [{"prompt": f"{i}=", "completion": "a" * (1 + 5 * i % 7), "label": i % 3 == 0} for i in range(ROWS)]
AVERAGINGS: dict[str, dict[str, Any]] = {
    "token_mean": {}, "sequence_mean": {}, "sequence_sum": {}, "fixed_length": {"length": 9},
}  # fmt: skip

#: name -> (objective, hyper-parameters, rows)
CASES: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    **{f"rloo {name}": ("rloo", {"beta": 0.1, "averaging": name, **more}, RAGGED) for name, more in AVERAGINGS.items()},
    "grpo": ("grpo", {"beta": 0.1}, RAGGED),
    "agro": ("agro_off_policy", {"beta": 0.1}, RAGGED),
    "dpo": ("dpo", {"beta": 0.1}, PAIRS),
    "kto": ("kto", {"beta": 0.1}, THUMBS),
    "sft": ("sft", {}, ANSWERS),
}
ACCUMULATIONS = (1, 2, 4)


def two_steps(folder: Path, case: str, processes: int, accumulation: int) -> Any:
    """A full step and a short one, by SGD in float64: what the weights end at are the gradients."""
    rows_each = STEP // processes // accumulation
    return job.one_step(
        folder / f"{accumulation}", case, rows_each=rows_each, accumulation=accumulation, max_steps=2, num_train_epochs=1.0, seed=1
    )  # fmt: skip


def main(folder: Path) -> None:
    job.CASES = CASES
    processes = int(os.environ["WORLD_SIZE"])
    for case in CASES:
        for accumulation in ACCUMULATIONS:
            if STEP % (processes * accumulation):
                continue
            t = two_steps(folder, case, processes, accumulation)
            if t.is_main:
                save_file(job.trainables(t), folder / f"{case}-{accumulation}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
