"""Preference training from rows in memory. Run: python examples/03_dpo_in_ten_lines.py

Swap MODEL for a hub id or a local folder, and the rows for a path or a hub dataset; nothing else changes.
"""

import tempfile

from rlft import Trainer
from rlft.demo import MODEL


def main(steps: int = 20) -> dict[str, float]:
    """Learn to prefer the right sum."""
    rows = [
        {"prompt": f"{i}+{j}=", "chosen": str(i + j), "rejected": str(i + j + 1)} for i in range(16) for j in range(16)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "objective": "dpo",
            "beta": 0.1,
            "tokenizer": {"kind": "char"},
            "eval_fraction": 0.2,
            "max_steps": steps,
            "learning_rate": 2e-3,
            "output_dir": folder,
            "report_to": [],
        }
        return Trainer(MODEL, settings, train_dataset=rows).train()


if __name__ == "__main__":
    main()
