"""Do the processes of a run mean the same run? Each reads settings, files and rows for itself; nothing else compares them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from rlft._words import one_line
from rlft.config import Config
from rlft.objective import Objective
from rlft.run.processes.processes import Processes

__all__ = ["refuse_other_runs"]

#: Settings that may differ: where a process finds things, which are compared themselves, and what it prints.
_OWN = {
    "train_data", "eval_data", "model", "tokenizer", "ref_model", "critic", "rewards", "judge", "output_dir",
    "ref_cache_dir", "run_name", "report_to", "log_completions", "disable_tqdm", "report", "resume",
    "accept_changed",
}  # fmt: skip


def refuse_other_runs(
    processes: Processes,
    config: Config,
    objective: Objective,
    train: Any,
    held_out: Any,
    policy: Any,
    columns: Mapping[str, str],
) -> None:
    """Refuse a run whose processes differ in settings, data or model: they would wait for each other, or mix two runs.

    Weights are not compared: those of process 0 are sent to all when the model is wrapped. Collective.

    Args:
        processes: of the run.
        config: settings.
        objective: what is optimised.
        train: training data as tokens.
        held_out: evaluation data, or None.
        policy: the module that is about to be wrapped.
        columns: column that the objective or a reward reads -> hash of its cells.

    Raises:
        ValueError: naming the first thing in which a process differs from process 0.
    """
    if processes.world_size == 1:
        return
    settings = {name: repr(value) for name, value in config.to_dict().items() if name not in _OWN}
    read = ", ".join(f"{name} {digest[:12]}" for name, digest in columns.items()) or "none"
    data = {"training data": _data(train), "evaluation data": "none" if held_out is None else _data(held_out)}
    facts = {
        **settings,
        **objective.describe(),
        **data,
        "content of the columns that are read": read,
        "model": _layout(policy),
    }
    processes.same(
        {name: one_line(value) for name, value in facts.items()},
        remedy="Give every process the same settings, model files and rows, in the same order: the rows are shared out by rlft",
    )


def _data(data: Any) -> str:
    return f"{len(data.examples)} {data.format} examples with fingerprint {data.fingerprint[:20]}"


def _layout(policy: Any) -> str:
    """Names, shapes and types of all weights, and which of them train."""
    digest, count = hashlib.sha256(), 0
    for name, p in policy.named_parameters():
        digest.update(f"{name} {p.dtype} {list(p.shape)} {p.requires_grad};".encode())
        count += p.numel()
    return f"{count:,} weights with layout {digest.hexdigest()[:12]}"
