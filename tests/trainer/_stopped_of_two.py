"""Run by tests/trainer/test_stopped_of_two.py, once per process of two: runs that are stopped and go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from rlft import Trainer
from rlft.errors import Interrupted
from tests.tiny import char_tokenizer, tiny_llama
from tests.trainer.common import bits

ROWS = [{"prompt": f"{i}+{i}="} for i in range(32)]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(32)]
_COMMON = {
    "max_steps": 6, "learning_rate": 1e-2, "max_prompt_length": 8, "max_completion_length": 4, "self_checks": False,
    "disable_tqdm": True, "report_to": [], "per_device_train_batch_size": 4,
}  # fmt: skip
_ONLINE = {**_COMMON, "num_generations": 2}

#: name -> settings. Refills differ by process; a generation feeds several steps; replay; a stream; rows in memory.
KINDS: dict[str, dict[str, Any]] = {
    "refills": {**_ONLINE, "objective": "grpo", "beta": 0.0, "dynamic_sampling": True, "max_refills": 4},
    "generation": {**_ONLINE, "objective": "grpo", "beta": 0.1, "steps_per_generation": 2, "num_iterations": 2, "logging_steps": 4},
    "replay": {**_ONLINE, "objective": "agro_off_policy", "beta": 0.1, "num_iterations": 2, "replay_probability": 0.5},
    "pairs": {**_COMMON, "objective": "dpo", "beta": 0.1, "use_peft": True, "lora_dropout": 0.2, "disable_dropout": False},
    "stream": {**_COMMON, "objective": "dpo", "beta": 0.1, "streaming": True, "shuffle_buffer": 5},
}  # fmt: skip
#: The step after which a run is stopped: inside a generation, where there are several steps to one.
STOP = 3


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Often equal for two answers, so that dynamic sampling draws again, and not equally often on each process."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def run(folder: Path, kind: str, *, stop: bool = False) -> Trainer:
    """Train to the end, or to the signal after step 3."""

    def signalled(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    online = "num_generations" in KINDS[kind]
    rows: Any = ROWS if online else PAIRS
    if kind == "stream":
        folder.mkdir(parents=True, exist_ok=True)
        rows = str(folder / f"rows{os.environ.get('RANK', '0')}.jsonl")
        Path(rows).write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    t = Trainer(
        tiny_llama(hidden_size=16, num_hidden_layers=1), {**KINDS[kind], "output_dir": str(folder / kind)}, train_dataset=rows,
        processing_class=char_tokenizer(), reward_funcs=parity if online else None, callbacks=[signalled] if stop else (),
    )  # fmt: skip
    with contextlib.suppress(Interrupted) if stop else contextlib.nullcontext():
        t.train()
    return t


def main(folder: Path) -> None:
    """Each kind whole, and stopped and resumed; then one stopped for one process to go on with, and one of a single process."""
    rank, said = int(os.environ["RANK"]), dict[str, Any]()
    torch.set_num_threads(1)
    for kind in KINDS:
        whole = run(folder / "whole", kind)
        cut = run(folder / "cut", kind, stop=True)
        stopped = {"step": cut.step, "generations": cut.state.generations}
        torch.manual_seed(123)  # whatever a new process drew before
        resumed = run(folder / "cut", kind)
        said[kind] = {
            "stopped": stopped, "generations": [t.state.generations for t in (whole, resumed)], "bits": [bits(whole), bits(resumed)],
        }  # fmt: skip
        run(folder / "fewer", kind, stop=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            more = run(folder / "more", kind)
        said[f"more {kind}"] = {"step": more.step, "bits": bits(more), "said": [str(w.message) for w in caught]}
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
