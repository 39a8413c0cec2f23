"""Run by tests/test_distributed.py under `accelerate launch`: one SGD step per case, weights written by rank 0."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlft import Trainer, recipes
from tests.test_trust_step import two_steps
from tests.tiny import char_tokenizer, tiny_llama

torch.set_num_threads(1)

RAGGED = [
    {"prompt": f"{i}=", "completions": ["a" * (1 + (i + k) % 5) for k in range(2 + i % 3)], "scores": [float(k) for k in range(2 + i % 3)]}
    for i in range(8)
]  # fmt: skip
PAIRS = [{"prompt": f"{i}=", "chosen": "a" * (1 + i % 4), "rejected": "b" * (1 + i % 3)} for i in range(8)]
ANSWERS = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 5)} for i in range(8)]
THUMBS = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 5), "label": i % 3 == 0} for i in range(8)]
PROMPTS = [{"prompt": f"{i}="} for i in range(8)]

#: name -> (objective, hyper-parameters, rows). Every averaging and every kind of data.
CASES: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "token_mean": ("reinforce", {"averaging": "token_mean"}, RAGGED),
    "sequence_mean": ("grpo", {"beta": 0.1}, RAGGED),
    "sequence_sum": ("rloo", {"beta": 0.1}, RAGGED),
    "fixed_length": ("dr_grpo", {"length": 9}, RAGGED),
    "whitened": ("reinforce", {"advantage": "group_mean_batch_norm"}, RAGGED),
    "rows": ("kto", {"beta": 0.1}, THUMBS),
    "pairs": ("dpo", {"beta": 0.1}, PAIRS),
    "agro": ("agro_off_policy", {"beta": 0.1}, RAGGED),
    "sft": ("sft", {}, ANSWERS),
}


def constant(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that depends on the tokens alone."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def one_step(
    folder: Path, case: str, *, rows_each: int, accumulation: int, kind: type[Trainer] = Trainer, **extra: Any
) -> Trainer:
    objective, hyper, rows = CASES[case]
    model = tiny_llama(dtype=torch.float64)
    # a policy that has left its reference: gradients of every term are there
    reference = tiny_llama(dtype=torch.float64, seed=1).requires_grad_(False)
    wants = recipes.build(objective, **hyper)
    args = {
        "output_dir": str(folder / case), "max_steps": 1, "per_device_train_batch_size": rows_each, "gradient_accumulation_steps": accumulation,
        "max_completion_length": 8, "max_grad_norm": None, "dtype": "float64", "disable_tqdm": True, "report_to": [], "self_checks": False,
        **extra,
    }  # fmt: skip
    t = kind(
        model, args, objective=wants, train_dataset=rows, processing_class=char_tokenizer(),
        ref_model=reference if wants.needs_reference else None, optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )  # fmt: skip
    t.train()
    return t


def trainables(t: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone().contiguous() for name, p in t.policy.named_parameters() if p.requires_grad}


class Counting(Trainer):
    """Notes the rows of each micro-batch, blank ones (which count nowhere) as 0."""

    def compute_loss(self, batch: Any, denominators: Tensor) -> Tensor:
        self.rows = [*getattr(self, "rows", []), batch.num_rows if bool(batch.mask.any()) else 0]
        return super().compute_loss(batch, denominators)


#: Long and short rows: a budget of tokens makes different numbers of micro-batches of them on the two processes.
UNEVEN = [
    {"prompt": f"{i}=", "chosen": "a" * (1 if i % 3 else 7), "rejected": "b" * (1 if i % 3 else 6)} for i in range(8)
]
CASES["uneven"] = ("dpo", {"beta": 0.1}, UNEVEN)
#: Equal rewards on one half: rows without advantage, on one rank more than on the other.
FLAT = [
    {"prompt": f"{i}=", "completions": ["a" * (1 + (i + k) % 5) for k in range(3)], "scores": [float(k == i % 3) * (i % 4 > 0) for k in range(3)]}
    for i in range(8)
]  # fmt: skip
CASES["dropped"] = ("grpo", {"beta": 0.0}, FLAT)


def by_tokens(folder: Path) -> dict[str, list[int]]:
    """Steps whose micro-batches are made by tokens: as many as it takes on each process, one gradient."""
    counts = {}
    for case in ("uneven", "sequence_mean", "agro", "dropped"):
        t = one_step(folder / "tokens", case, rows_each=4, accumulation=1, max_tokens_per_micro_batch=24, kind=Counting)
        if t.is_main:
            save_file(trainables(t), folder / f"{case}-tokens.safetensors")
        counts[case] = t.rows  # type: ignore[attr-defined]
    kept = {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder / "ref")}
    for name in ("computed", "read"):
        t = one_step(folder / name, "pairs", rows_each=4, accumulation=1, **kept)
        if t.is_main:
            save_file(trainables(t), folder / f"pairs-{name}.safetensors")
    return counts


def nonfinite(folder: Path) -> dict[str, Any]:
    """One process alone meets a NaN: in its outputs at step 2, in its loss at step 3, in a self-check of another run."""
    args = {
        "objective": "sft", "output_dir": str(folder / "skipped"), "max_steps": 4, "per_device_train_batch_size": 2, "num_train_epochs": 4.0,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "disable_tqdm": True, "report_to": [], "max_nonfinite_steps": 2,
    }  # fmt: skip

    class Spoilt(Trainer):
        def forward(self, batch: Any, want: frozenset[str]) -> dict[str, Tensor]:
            outputs = super().forward(batch, want)
            bad = self.step == 1 and self.rank == 1
            return {**outputs, "logps": outputs["logps"] * float("nan")} if bad else outputs

        def compute_loss(self, batch: Any, denominators: Tensor) -> Tensor:
            loss = super().compute_loss(batch, denominators)
            return loss * float("nan") if self.step == 2 and self.rank == 1 else loss

    t = Spoilt(tiny_llama(), args, train_dataset=ANSWERS, processing_class=char_tokenizer())
    sums: list[float] = []
    t.callbacks.append(lambda event, r, values: sums.append(_sum(r)) if event == "step" else None)
    t.train()
    other = Trainer(
        tiny_llama(), {**args, "output_dir": str(folder / "refused")}, train_dataset=ANSWERS, processing_class=char_tokenizer()
    )  # fmt: skip
    if other.rank == 1:
        other.policy.requires_grad_(False)
    try:
        other.train()
        said = ""
    except RuntimeError as error:
        said = str(error)
    return {"sums": sums, "skipped": t.update.nonfinite_steps, "step": t.step, "said": said}


#: Held-out rows, and how many of them: also an odd number, and fewer than there are processes.
HELD_OUT = [{**row, "prompt": f"{i}+"} for i, row in enumerate(RAGGED)]
SHARES = (7, 8, 1)


def evaluated(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Held-out numbers of objectives whose advantages are normalised over a whole step."""
    to_go = {"advantage": "reward_to_go", "gamma": 0.5, "whiten": True}
    CASES["to_go"] = ("reinforce", to_go, RAGGED)
    CASES["batch_norm"] = ("reinforce", {"advantage": "batch_norm"}, RAGGED)
    found = {}
    for case in ("whitened", "batch_norm", "to_go"):
        size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
        t = one_step(folder / "evaluated", case, rows_each=size, accumulation=1, per_device_eval_batch_size=3)
        found[case] = [t.evaluate(HELD_OUT[:rows]) for rows in SHARES]
    return found


def unused(folder: Path) -> dict[str, Any]:
    """A model with a trained layer that the forward pass never comes by, under three ways to check for it."""
    said: dict[str, Any] = {}
    for name, checks in {"checked": True, "unchecked": False, "allowed": {"gradients": False}}.items():
        model = tiny_llama(dtype=torch.float64)
        torch.manual_seed(0)
        model.spare = torch.nn.Linear(3, 3, dtype=torch.float64)
        args = {
            "objective": "sft", "output_dir": str(folder / name), "max_steps": 2, "dtype": "float64", "self_checks": checks,
            "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")), "gradient_accumulation_steps": 2,
            "max_grad_norm": None, "disable_tqdm": True, "report_to": [],
        }  # fmt: skip
        t = Trainer(
            model, args, train_dataset=ANSWERS, processing_class=char_tokenizer(),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
        )  # fmt: skip
        try:
            t.train()
            said[name] = _sum(t)
        except RuntimeError as error:
            said[name] = str(error)
    return said


def _sum(t: Trainer) -> float:
    return sum(p.double().sum().item() for p in trainables(t).values())


def main(folder: Path) -> None:
    """Every case on two processes, then one online run whose ranks must sample different answers."""
    report: dict[str, Any] = {}
    for case in CASES:
        for accumulation in (1, 2):
            t = one_step(folder / f"a{accumulation}", case, rows_each=4 // accumulation, accumulation=accumulation)
            if t.is_main:
                save_file(trainables(t), folder / f"{case}-{accumulation}.safetensors")
    for accumulation in (1, 2):
        t = two_steps(folder / f"trust{accumulation}", rows_each=16 // accumulation, accumulation=accumulation)
        if t.is_main:
            save_file(trainables(t), folder / f"trust-{accumulation}.safetensors")
    values = evaluated(folder)
    if t.is_main:
        (folder / "evaluated.json").write_text(json.dumps(values))
    (folder / f"unused{t.rank}.json").write_text(json.dumps(unused(folder)))
    counts = by_tokens(folder)
    args = {
        "objective": "rloo", "beta": 0.1, "output_dir": str(folder / "online"), "max_steps": 3, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 6, "disable_tqdm": True, "report_to": [], "use_peft": True, "save_steps": 2,
        "learning_rate": 1e-2, "kl_controller": {"type": "proportional", "target": 1.0, "horizon": 1000.0, "limit": 10.0},
    }  # fmt: skip
    seen: list[list[int]] = []

    class Spy(Trainer):
        def score(self, examples: Any, completions: Any, completion_ids: Any) -> Any:
            seen.extend(completion_ids)
            return super().score(examples, completions, completion_ids)

    same_prompt = [{"prompt": "1="} for _ in range(24)]
    t = Spy(tiny_llama(), args, train_dataset=same_prompt, processing_class=char_tokenizer(), reward_funcs=constant)
    t.train()
    (folder / f"rank{t.rank}.json").write_text(
        json.dumps(
            {
                "samples": seen,
                "micro_batches": counts,
                "weights": {n: p.double().sum().item() for n, p in trainables(t).items()},
                "step": t.step,
                "world": t.world_size,
            }
        )
    )
    again = Spy(tiny_llama(), args, train_dataset=same_prompt, processing_class=char_tokenizer(), reward_funcs=constant)
    again.train()
    report["resumed"] = again.step
    (folder / f"skipped{t.rank}.json").write_text(json.dumps(nonfinite(folder)))
    if t.is_main:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
