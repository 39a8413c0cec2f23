"""max_tokens_per_micro_batch holds in every pass of a run, not only in those with gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Config, Trainer
from rlft.config import ConfigError
from rlft.models import ModelReward, Policy, RewardScorer
from rlft.run.processes.processes import Processes
from rlft.run.step.micro_batches import by_rows, by_tokens
from rlft.types import Batch
from tests.tiny import char_tokenizer, random_batch, tiny_llama
from tests.trainer.common import PAIRS, PROMPTS, resumed_equals_whole, run

BUDGET = 40
LABELLED = [{"prompt": f"{i}+{i}=", "completion": str(2 * i + i % 2), "label": i % 2 == 0} for i in range(12)]
DEMONSTRATED = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]


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
    ("kto", {"rows": LABELLED, "online": False, "beta": 0.1, "per_device_train_batch_size": 12, "max_steps": 1}, {"logps", "ref_logps"}),
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
    rows = {"dpo": PAIRS, "kto": LABELLED, "sft": DEMONSTRATED}[name]
    found = []
    for budget in (None, BUDGET):
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            extra: dict[str, Any] = {} if name == "sft" else {"beta": 0.1}
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
    mine = t.passes.outputs(shuffled, want)
    assert len(seen.sizes[False]) > 1
    for name, value in truth.items():
        assert mine[name].shape == value.shape
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-12)


def test_passes_without_gradient_are_sorted_and_take_groups_whole_where_they_fit() -> None:
    batch = random_batch(groups=9, per_group=3, prompt_lengths=(1, 20), lengths=(1, 12), seed=3)
    for budget in (1, 20, 60, 100, 400):
        pieces = by_tokens(batch, budget, whole=False)
        assert sorted(torch.cat(pieces).tolist()) == list(range(batch.num_rows))
        for rows in pieces:
            assert padded_size(batch.select(rows)) <= budget or len(rows) == 1
    whole = by_tokens(batch, 100, whole=False)
    at = {row: i for i, rows in enumerate(whole) for row in rows.tolist()}
    for group in range(9):
        rows = (batch.group_ids == group).nonzero()[:, 0]
        if padded_size(batch.select(rows)) <= 100:
            assert len({at[row] for row in rows.tolist()}) == 1, "it fits, and its prompt is computed once"

    def padding(pieces: list[Tensor]) -> int:
        return sum(padded_size(batch.select(rows)) for rows in pieces)

    assert padding(by_rows(batch, 6)) < padding(list(torch.arange(27).split(6)))
    assert max(map(len, by_rows(batch, 6))) == 6
    assert sorted(torch.cat(by_rows(batch, 2)).tolist()) == list(range(27))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_with_a_budget_in_every_pass_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    resumed_equals_whole(
        tmp_path, "grpo", stop, beta=0.04, num_iterations=2, top_p=0.9, max_tokens_per_micro_batch=25, max_steps=4,
        per_device_train_batch_size=16, rows=PROMPTS,
    )  # fmt: skip


# -- reward models ----------------------------------------------------------------------------------------------------
def reward_model(folder: Path) -> str:
    tiny_llama(head="classifier", num_labels=1).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def scored_by_model(folder: Path, reward: Any, **extra: Any) -> Trainer:
    settings = {
        "objective": "rloo", "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 16, "num_generations": 4,
        "max_completion_length": 4, "disable_tqdm": True, "report_to": [], "beta": 0.0, "self_checks": False, **extra,
    }  # fmt: skip
    return Trainer(
        tiny_llama(), settings, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=reward
    )


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, None),
        ({"max_tokens_per_micro_batch": 40}, 40),
        ({"max_tokens_per_reward_batch": 55}, 55),
        ({"max_tokens_per_micro_batch": 40, "max_tokens_per_reward_batch": 90}, 90),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_run_says_how_much_a_reward_model_scores_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], budget: int | None, in_memory: bool
) -> None:
    sizes: list[int] = []
    forward = RewardScorer.forward

    def watched(scorer: RewardScorer, batch: Batch, **options: Any) -> Any:
        sizes.append(padded_size(batch))
        return forward(scorer, batch, **options)

    monkeypatch.setattr(RewardScorer, "forward", watched)
    source = reward_model(tmp_path / "model")
    t = scored_by_model(tmp_path / "run", ModelReward(source) if in_memory else source, **settings)
    t.train()
    if budget is None:
        assert len(sizes) == 2  # eight texts each
    else:
        assert max(sizes) <= budget
        assert len(sizes) > 2 or budget > 80


def test_a_reward_model_keeps_a_budget_of_its_own(tmp_path: Path) -> None:
    own = ModelReward(reward_model(tmp_path / "model"), max_tokens=33)
    scored_by_model(tmp_path / "run", own, max_tokens_per_micro_batch=70)
    assert (own.max_tokens, own.tokens_of_run) == (33, None)
    free = ModelReward(reward_model(tmp_path / "model"))
    for budget in (70, 80):  # the same function in a second run
        scored_by_model(tmp_path / "run", free, max_tokens_per_reward_batch=budget)
        assert (free.max_tokens, free.tokens_of_run) == (None, budget)


def test_a_budget_for_reward_models_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_reward_batch=50 does nothing: no reward is a reward model"):
        run(tmp_path, "rloo", beta=0.0, max_tokens_per_reward_batch=50)
    with pytest.raises(ConfigError, match="max_tokens_per_reward_batch=50 does nothing without rewards"):
        run(tmp_path, "dpo", beta=0.1, rows=PAIRS, max_tokens_per_reward_batch=50)
    own = ModelReward(reward_model(tmp_path / "model"), max_tokens=33)
    with pytest.raises(
        ConfigError, match="max_tokens_per_reward_batch=50 does nothing: every reward model has max_tokens"
    ):
        scored_by_model(tmp_path / "run", own, max_tokens_per_reward_batch=50)
    with pytest.raises(ConfigError, match="max_tokens_per_reward_batch=0 must be at least 1"):
        Config(max_tokens_per_reward_batch=0)


# -- processes that wait for each other -------------------------------------------------------------------------------
def test_sharded_processes_make_as_many_passes_as_the_longest_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = run(tmp_path, "grpo", beta=0.1, model=tiny_llama(dtype=torch.float64), dtype="float64",
            max_tokens_per_micro_batch=BUDGET)  # fmt: skip
    batch = random_batch(groups=4, per_group=4, prompt_lengths=(1, 9), lengths=(1, 7), seed=5)
    want = frozenset({"logps"})
    truth = t.passes.outputs(batch, want)["logps"]
    own = len(t.micro_batches.without_gradient(batch))
    asked: list[int] = []

    def others_have_more(counts: Tensor) -> Tensor:
        asked.append(int(counts))
        return torch.tensor([own + 3, int(counts)])

    monkeypatch.setattr(t.processes, "world_size", 2)
    monkeypatch.setattr(t.accelerator, "gather", others_have_more)
    monkeypatch.setattr(t.processes, "poll", lambda **_: None)
    seen = Seen(monkeypatch)
    t.passes.outputs(batch, want)
    assert (len(seen.sizes[False]), asked) == (own, []), "replicas do not wait"
    monkeypatch.setattr(Processes, "sharded", True)
    again = t.passes.outputs(batch, want)["logps"]
    assert (len(seen.sizes[False]), asked) == (2 * own + 3, [own])
    assert torch.equal(again, truth)
    t.passes.outputs(batch, want, alone=True)  # rows are counted: as many for every process with as many rows
    assert len(seen.sizes[False]) == 2 * own + 3 + len(by_rows(batch, t.plan.micro_batch_rows))
    assert asked == [own]
