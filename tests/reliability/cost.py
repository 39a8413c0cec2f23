"""What the self-checks and the sampler watchdog cost on a model of a real size: ``python -m tests.reliability.cost``.

A Llama of 135 million weights from scratch (the sizes of SmolLM-135M, with a smaller vocabulary), LoRA, GRPO with 16 answers of 64
tokens per step, float32, one thread. The checks before the first step time themselves; here the others are timed too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from rlft import Trainer
from rlft.run.checks.before import SelfChecks
from rlft.run.checks.first_step import FirstStep
from rlft.run.step.sampler_trust import SamplerTrust
from tests.tiny import char_tokenizer

MODEL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    """Three steps; processor seconds of the checks, of the watchdog, and of a step, whatever else the machine does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return call(*args, **options)
            finally:
                spent[name].append(time.process_time() - started)

        return around

    def time_of(kind: Any, method: str, name: str) -> None:
        setattr(kind, method, timed(name, getattr(kind, method)))

    time_of(SelfChecks, "run", "self-checks before the first step")
    time_of(FirstStep, "__init__", "fingerprints of all weights before it")
    for part in ("begins", "saw", "before_update", "after_update"):
        time_of(FirstStep, part, "checks inside the first step")
    time_of(SamplerTrust, "look", "watchdog, one comparison")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "objective": "grpo", "beta": 0.04, "output_dir": folder, "max_steps": 3, "use_peft": True, "num_generations": 8,
            "per_device_train_batch_size": 16, "max_completion_length": tokens, "learning_rate": 1e-4, "report_to": [],
            "disable_tqdm": True,
        }  # fmt: skip
        rows = [{"prompt": f"What comes after {i}? "} for i in range(12)]
        trainer = Trainer(MODEL, settings, train_dataset=rows, processing_class=char_tokenizer(), reward_funcs=letters)
        trainer.callbacks.append(
            lambda event, t, values: spent["ends"].append(time.process_time()) if event == "step" else None
        )
        trainer.train()
    ends = spent.pop("ends")
    step = ends[-1] - ends[-2]  # the third: nothing is checked in it
    weights = sum(p.numel() for p in trainer.policy.parameters())
    print(f"{weights / 1e6:.0f} million weights; a step of 16 answers of {tokens} tokens: {step:.1f} s")
    for name, times in spent.items():
        total = sum(times) if "inside" in name else times[0]
        print(f"{name}: {total:.2f} s ({100 * total / step:.1f} % of a step)")
    every = trainer.config.sampler_check_steps
    print(
        f"watchdog, spread over {every} generations: {100 * spent['watchdog, one comparison'][0] / every / step:.2f} %"
    )


if __name__ == "__main__":
    main()
