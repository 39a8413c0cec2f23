"""Run by tests/trainer/test_workers.py, once per process of two."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from rlft import Trainer
from rlft.data import dataset
from rlft.errors import TrainingError
from tests.test_workers import gone
from tests.trainer.common import bits
from tests.trainer.test_workers import go, settings_of


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dataset._CHUNK, dataset._WORTH = 2, 0
    said: dict[str, Any] = {}
    small = {"per_device_train_batch_size": 2}
    for kind in ("sft stream", "grpo stream", "dpo map"):
        for workers in (0, 2):
            more = small if kind[0] != "g" else {}
            t = go(folder / f"{kind} {workers}", settings_of(kind, folder / f"rows{rank}"), workers, **more)
            t.train()
            said[f"{kind} {workers}"] = bits(t)

    def kill(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == 2 and rank == 1:
            pid = t.source.order.stream.workers.pids[0]  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
            gone(pid)

    settings = settings_of("sft stream", folder / f"rows{rank}")
    t = go(folder / "killed", settings, 2, callbacks=[kill], **small)
    try:
        t.train()
    except TrainingError as error:
        said |= {"error": str(error), "step": t.step}
    t = go(folder / "killed", settings, 1, **small)
    t.train()
    said["resumed"] = bits(t)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
