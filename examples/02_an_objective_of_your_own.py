"""An objective from outside the package: a function, passed as it is. Run: python examples/02_an_objective_of_your_own.py

Its positional parameters name the tensors it needs, its keyword-only ones the hyper-parameters. Because it names
`ref_logps`, the run gets a reference; because it names `difficulty`, that dataset column arrives with the batch.
"""

import tempfile

import torch
from torch import Tensor

from rlft import Objective, Trainer, reduce
from rlft.demo import MODEL, digit_rows


def focused_sft(logps: Tensor, ref_logps: Tensor, mask: Tensor, *, gamma: float, pull: float) -> Tensor:
    """Focal likelihood: tokens that are known already count less; a small pull keeps the rest where it was."""
    surprise = 1 - logps.detach().exp()
    return -(surprise**gamma) * logps + pull * (logps - ref_logps).square()


def per_answer(logps: Tensor, mask: Tensor) -> Tensor:
    """One loss per answer works too: the trainer averages over answers."""
    return -reduce.sequence_sum(logps, mask)


def main(steps: int = 30) -> dict[str, float]:
    """Train a tiny model on 0.9 of the one and 0.1 of the other."""
    torch.set_num_threads(1)
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in digit_rows(32 * steps, seed=0)]
    objective = 0.9 * Objective(focused_sft, gamma=1.0, pull=0.01) + 0.1 * Objective(per_answer)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "tokenizer": {"kind": "char"},
            "per_device_train_batch_size": 32,
            "max_steps": steps,
            "learning_rate": 2e-3,
            "output_dir": folder,
            "report_to": [],
        }
        return Trainer(MODEL, settings, objective=objective, train_dataset=rows).train()


if __name__ == "__main__":
    main()
