"""The prompt of a group computed once, against the prompt repeated: ``python -m benchmarks.sharing``.

One forward and backward pass of log-probs, in turns, on one thread; CPU-seconds, the best of a few rounds. ``bound`` is
the ratio of token counts; ``auto`` is the layout that a Policy picks by itself, against the repeated prompt.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from rlft.models import LoraSettings, Policy, add_lora, load_causal_lm
from rlft.models.shared import build_shared
from rlft.types import Batch

__all__ = ["main", "measure"]

#: Prompt tokens, answer tokens, answers of a prompt, prompts, and the shortest answer as a share of the longest.
SHAPES = (
    (9, 9, 8, 8, 1.0),
    (64, 64, 8, 2, 1.0),
    (256, 64, 8, 1, 1.0),
    (64, 256, 8, 1, 1.0),
    (512, 128, 8, 1, 1.0),
    (64, 64, 8, 2, 0.2),
    (256, 64, 2, 4, 0.5),
    (64, 64, 1, 16, 1.0),
    (64, 64, 1, 16, 0.2),
)
LAYOUTS = ("padded", "shared", "auto")


def _model(hidden: int, layers: int, lora: bool) -> Any:
    settings = {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    model = load_causal_lm(settings)
    return add_lora(model, LoraSettings(r=16)) if lora else model


def _batch(prompt: int, length: int, each: int, groups: int, shortest: float) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = groups * each
    low = max(1, round(shortest * length))
    lengths = torch.randint(low, length + 1, (rows,), generator=generator)
    lengths[0] = length
    exists = torch.arange(length)[None] < lengths[:, None]
    return Batch(
        prompt_ids=torch.randint(1, 512, (groups, prompt), generator=generator),
        prompt_mask=torch.ones(groups, prompt, dtype=torch.bool),
        completion_ids=torch.randint(1, 512, (rows, length), generator=generator),
        completion_mask=exists,
        mask=exists,
        group_ids=torch.arange(groups).repeat_interleave(each),
    )


def measure(
    shape: tuple[int, int, int, int, float], *, hidden: int, layers: int, rounds: int, lora: bool
) -> dict[str, float]:
    """Seconds of each layout, and ``bound``."""
    model, batch = _model(hidden, layers, lora), _batch(*shape)
    policies = {name: Policy(model, reference="none", layout=name) for name in LAYOUTS}
    best = dict.fromkeys(LAYOUTS, float("inf"))
    for turn in range(rounds + 1):
        for name in LAYOUTS if turn % 2 else reversed(LAYOUTS):
            start = time.process_time()
            policies[name](batch, want=frozenset({"logps"}))["logps"].sum().backward()
            if turn:  # the first turn warms up
                best[name] = min(best[name], time.process_time() - start)
            model.zero_grad(set_to_none=True)
    shared = build_shared(batch)
    assert shared is not None
    return {**best, "bound": shared.ratio}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("prompt  answer  n  groups  shortest |  padded s  shared s | speedup  bound  share  auto")
    for shape in SHAPES:
        r = measure(shape, hidden=options.hidden, layers=options.layers, rounds=options.rounds, lora=options.lora)
        speedup = r["padded"] / r["shared"]
        print(
            f"{shape[0]:6d} {shape[1]:7d} {shape[2]:2d} {shape[3]:7d} {shape[4]:9.1f} | {r['padded']:9.3f} {r['shared']:9.3f}"
            f" | {speedup:6.2f}x {r['bound']:6.2f} {speedup / r['bound']:6.2f} {r['padded'] / r['auto']:4.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
