"""max_tokens_per_micro_batch holds in every pass of a run, not only in those with gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft.models import Policy
from rlft.run import micro, online
from rlft.types import Batch
from tests.tiny import random_batch, tiny_llama
from tests.trainer.common import PAIRS, PROMPTS, resumed_equals_whole, run

BUDGET = 40


def padded_size(batch: Batch) -> int:
    """Rows x longest row, as the setting counts."""
    lengths = batch.prompt_mask.sum(-1)[batch.group_ids] + batch.completion_mask.sum(-1)
    return int(len(lengths) * lengths.max())


class Seen:
    """The size of every pass of the policy, those without gradient apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[bool, list[int]] = {True: [], False: []}
        self.wants: dict[bool, set[str]] = {True: set(), False: set()}
        forward = Policy.forward

        def watched(policy: Policy, batch: Batch, *, want: frozenset[str], temperature: float = 1.0) -> Any:
            grad = torch.is_grad_enabled()
            self.sizes[grad].append(padded_size(batch))
            self.wants[grad] |= want
            return forward(policy, batch, want=want, temperature=temperature)

        monkeypatch.setattr(Policy, "forward", watched)


ONLINE: dict[str, Any] = {"per_device_train_batch_size": 32, "top_p": 0.9, "max_steps": 2}
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("grpo", {**ONLINE, "beta": 0.04, "num_iterations": 2}, {"logps", "ref_logps"}),
    ("grpo", {**ONLINE, "beta": 0.0, "num_iterations": 2}, {"logps"}),
    ("ppo", {**ONLINE, "beta": 0.05}, {"values", "logps", "ref_logps"}),
    ("agro_off_policy_rb", {"per_device_train_batch_size": 32, "max_steps": 2, "beta": 0.1, "num_iterations": 2}, set()),
    ("kto", {"rows": PAIRS, "beta": 0.1, "per_device_train_batch_size": 12, "max_steps": 1}, {"logps", "ref_logps"}),
    ("rloo", {**ONLINE, "beta": 0.1, "sampler_check_steps": 1, "top_p": 1.0}, {"logps"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "extra", "without"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)])
def test_every_pass_keeps_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: dict[str, Any], without: set[str]
) -> None:
    seen = Seen(monkeypatch)
    run(tmp_path, name, max_tokens_per_micro_batch=BUDGET, self_checks={"padding": False}, **extra).train()
    assert seen.wants[False] >= without
    assert max(seen.sizes[True]) <= BUDGET
    assert max(seen.sizes[False], default=0) <= BUDGET
    assert len(seen.sizes[True]) > 1


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_evaluation_keeps_it_too_and_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = PAIRS if name != "sft" else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    found = []
    for budget in (None, BUDGET):
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            extra = {} if name == "sft" else {"beta": 0.1}
            t = run(
                tmp_path / str(budget), name, rows=rows, online=False, model=tiny_llama(dtype=torch.float64), dtype="float64",
                max_tokens_per_micro_batch=budget, per_device_eval_batch_size=12, **extra,
            )  # fmt: skip
            found.append(t.evaluate(rows))
            assert (max(seen.sizes[False]) <= BUDGET) is (budget is not None)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-10, abs=1e-12), key


def test_a_group_above_the_budget_is_cut_where_nothing_compares_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    extra = {"max_tokens_per_micro_batch": 10, "max_steps": 1, "self_checks": False, "beta": 0.0}
    run(tmp_path / "grpo", "grpo", **extra).train()  # a group of 4 takes more than 10 tokens
    assert max(seen.sizes[True]) <= 10
    seen.sizes[True].clear()
    run(tmp_path / "rloo", "rloo", **extra).train()
    assert max(seen.sizes[True]) > 10


@pytest.mark.parametrize("budget", [None, 13, 60, 200])
def test_outputs_come_back_in_the_order_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    t = run(tmp_path, "grpo", beta=0.1, model=tiny_llama(dtype=torch.float64), dtype="float64",
            per_device_train_batch_size=4, max_tokens_per_micro_batch=budget)  # fmt: skip
    batch = random_batch(groups=6, per_group=4, prompt_lengths=(1, 9), lengths=(1, 7), seed=5)
    shuffled = batch.select(torch.randperm(batch.num_rows, generator=torch.Generator().manual_seed(1)))
    want = frozenset({"logps", "ref_logps", "ref_states"})
    truth = t.policy(shuffled, want=want)
    seen = Seen(monkeypatch)
    mine = online.no_grad_outputs(t, shuffled, want)
    assert len(seen.sizes[False]) > 1
    for name, value in truth.items():
        assert mine[name].shape == value.shape
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-12)


def test_passes_without_gradient_are_sorted_and_take_groups_whole_where_they_fit() -> None:
    batch = random_batch(groups=9, per_group=3, prompt_lengths=(1, 20), lengths=(1, 12), seed=3)
    for budget in (1, 20, 60, 100, 400):
        pieces = micro.by_tokens(batch, budget, whole=False)
        assert sorted(torch.cat(pieces).tolist()) == list(range(batch.num_rows))
        for rows in pieces:
            assert padded_size(batch.select(rows)) <= budget or len(rows) == 1
    whole = micro.by_tokens(batch, 100, whole=False)
    at = {row: i for i, rows in enumerate(whole) for row in rows.tolist()}
    for group in range(9):
        rows = (batch.group_ids == group).nonzero()[:, 0]
        if padded_size(batch.select(rows)) <= 100:
            assert len({at[row] for row in rows.tolist()}) == 1, "it fits, and its prompt is computed once"

    def padding(pieces: list[Tensor]) -> int:
        return sum(padded_size(batch.select(rows)) for rows in pieces)

    assert padding(micro.by_rows(batch, 6)) < padding(list(torch.arange(27).split(6)))
    assert max(map(len, micro.by_rows(batch, 6))) == 6
    assert sorted(torch.cat(micro.by_rows(batch, 2)).tolist()) == list(range(27))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_with_a_budget_in_every_pass_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    resumed_equals_whole(
        tmp_path, "grpo", stop, beta=0.04, num_iterations=2, top_p=0.9, max_tokens_per_micro_batch=25, max_steps=4,
        per_device_train_batch_size=16, rows=PROMPTS,
    )  # fmt: skip
