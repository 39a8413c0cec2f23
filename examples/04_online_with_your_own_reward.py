"""Online training against a reward function. Run: python examples/04_online_with_your_own_reward.py

The reward has TRL's signature: keyword arguments, one entry per completion, None for what it cannot judge. Here it pays
for even digits, and a model from scratch learns to write nothing else. Change `objective` to compare algorithms.
"""

import tempfile
from typing import Any

from rlft import Trainer
from rlft.demo import MODEL


def even_digits(completions: list[str], **columns: Any) -> list[float | None]:
    """The share of characters that are even digits; an empty answer is not judged."""
    return [sum(c in "02468" for c in text) / len(text) if text else None for text in completions]


def main(steps: int = 30, objective: str = "agro_off_policy") -> dict[str, float]:
    """The reward climbs from about a third."""
    rows = [{"prompt": f"{i:03d}>"} for i in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "objective": objective,
            "beta": 0.05,
            "tokenizer": {"kind": "char"},
            "num_generations": 8,
            "per_device_train_batch_size": 64,
            "max_completion_length": 8,
            "max_steps": steps,
            "learning_rate": 2e-3,
            "output_dir": folder,
            "report_to": [],
        }
        return Trainer(MODEL, settings, train_dataset=rows, reward_funcs=even_digits).train()


if __name__ == "__main__":
    main()
