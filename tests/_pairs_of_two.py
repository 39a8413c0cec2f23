"""Run by tests/test_pairwise.py, once per process of two: a step of online DPO in which one of them samples ties alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.test_pairwise import coarse, run, weights
from tests.tiny import tiny_llama


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_llama(dtype=torch.float64)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return coarse(completions) if t.rank == 0 else [1.0] * len(completions)

    t = run(
        folder, "dpo", beta=0.3, max_steps=1, pair_selection="all", model=model, reward=reward, dtype="float64", max_grad_norm=None,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    t.train()
    (batch,) = t.seen
    save_file({name: x.contiguous() for name, x in batch.tensors().items()}, folder / f"batch{t.rank}.safetensors")
    save_file({name: x.contiguous() for name, x in weights(t).items()}, folder / f"weights{t.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
