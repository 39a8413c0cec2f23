"""Rows and tokens that teach nothing are in no pass, and loss, gradient, counts and metrics are those with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Trainer, recipes
from rlft.models import Policy
from rlft.objective import Objective
from rlft.run.step.micro_batches import MicroBatches
from rlft.run.step.passes import Passes
from rlft.types import Batch
from tests.losses.cases import CASES
from tests.test_trainer import weights
from tests.tiny import char_tokenizer, tiny_llama
from tests.trainer.common import PROMPTS, resumed_equals_whole, run, varied

RANKED = [
    {"prompt": f"{i}+{i}=", "completions": [f"{i}", f"{2 * i}ab", "c", "ddd"], "scores": [1.0, 0.5, 0.0, float(i % 3)]}
    for i in range(6)
]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": f"{2 * i + 1}ab"} for i in range(6)]
LABELLED = [{"prompt": f"{i}+{i}=", "completion": f"{i}ab", "label": i % 2 == 0} for i in range(12)]
ANSWERS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}abc"} for i in range(12)]


class Blanking(Trainer):
    """Masks some answers altogether and some tokens of others, as truncation or another speaker's turn would."""

    rows_in_pairs = False

    def prepare(self, batch: Batch) -> Batch:
        place = torch.arange(batch.num_rows, device=batch.device)
        row = place // 2 if self.rows_in_pairs else place
        mask = batch.mask & (row % 4 != 1)[:, None]
        mask[:, 1] &= place % 3 != 0
        mask[:, 0] |= batch.mask[:, 0] & (row % 4 != 1)  # what is left of a row is not blank
        return super().prepare(batch.replace(mask=mask))


class BlankingPairs(Blanking):
    rows_in_pairs = True


class Seen:
    """Rows and scored tokens of every pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[bool, int] = {True: 0, False: 0}
        self.scored: dict[bool, int] = {True: 0, False: 0}
        forward = Policy.forward

        def watched(policy: Policy, batch: Batch, *, want: frozenset[str], temperature: float = 1.0) -> Any:
            out = forward(policy, batch, want=want, temperature=temperature)
            grad = torch.is_grad_enabled()
            self.rows[grad] += batch.num_rows
            self.scored[grad] += policy.layout_used.scored
            return out

        monkeypatch.setattr(Policy, "forward", watched)


def nothing_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MicroBatches, "_without_idle_rows", lambda self, batches: batches)
    patch.setattr(MicroBatches, "unread", lambda self, batch: torch.zeros_like(batch.rewards, dtype=torch.bool)
                  if batch.rewards is not None else torch.zeros(batch.num_rows, dtype=torch.bool))  # fmt: skip
    patch.setattr("rlft.run.step.passes.mask_only", lambda batch: frozenset())


def one_step(
    folder: Path, objective: Objective, rows: Any, *, kind: type[Trainer] = Blanking, rewards: Any = None, **extra: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One SGD step in float64, so that the weights are the gradient."""
    model = tiny_llama(dtype=torch.float64)
    args = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 6, "max_completion_length": 9,
        "max_grad_norm": None, "dtype": "float64", "disable_tqdm": True, "report_to": [], "self_checks": False, **extra,
    }  # fmt: skip
    if rewards is not None:
        args |= {"num_generations": 4, "per_device_train_batch_size": 16, "sampler_check_steps": 0}
    parameters: list[Any] = list(model.parameters())
    t = kind(
        model, args, objective=objective, train_dataset=rows, processing_class=char_tokenizer(), reward_funcs=rewards,
        optimizers=(torch.optim.SGD(parameters, lr=0.5), None),
    )  # fmt: skip
    values = t.train()
    return weights(t), values


def build(name: str, **extra: Any) -> Any:
    return lambda: recipes.build(name, **extra)


OFFLINE: dict[str, tuple[Any, Any, bool]] = {
    "sft": (build("sft"), ANSWERS, False),
    "kto": (build("kto", beta=0.1), LABELLED, False),
    "dpo": (build("dpo", beta=0.1), PAIRS, True),
    "ld_dpo": (build("ld_dpo", beta=0.1, ld_alpha=0.5), PAIRS, True),
    "dpo + sft": (lambda: recipes.build("dpo", beta=0.1) + 0.3 * recipes.build("sft"), PAIRS, True),
    "agro": (build("agro_off_policy", beta=0.1), RANKED, False),
    "agro_cv": (build("agro_off_policy_cv", beta=0.1), RANKED, False),
    "rloo": (build("rloo", beta=0.0), RANKED, False),
    "grpo": (build("grpo", beta=0.04), RANKED, False),
    "grpo, fixed length": (build("grpo", beta=0.04, averaging="fixed_length", length=7), RANKED, False),
    "grpo, no kl": (build("grpo", beta=0.0), RANKED, False),
    "exact kl": (
        lambda: Objective(recipes.build("ppo_clip", clip_eps=0.2, advantage="group_norm").terms[0].function,
                          advantage="group_norm", kl="loss", kl_value="exact", beta=0.1, clip_eps=0.2),
        RANKED, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
def test_loss_gradient_and_metrics_are_those_with_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make, rows, in_pairs = OFFLINE[name]
    kind = BlankingPairs if in_pairs else Blanking
    ends, seen = [], []
    for drop in (True, False):
        with monkeypatch.context() as patch:
            passes = Seen(patch)
            if not drop:
                nothing_left_out(patch)
            ends.append(one_step(tmp_path / str(drop), make(), rows, kind=kind))
            seen.append(passes)
    assert seen[0].rows[True] < seen[1].rows[True]
    assert seen[0].scored[True] < seen[1].scored[True]
    start = tiny_llama(dtype=torch.float64).state_dict()
    assert any(not torch.equal(value, start[n.removeprefix("model.")]) for n, value in ends[0][0].items())
    for key, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][key], rtol=1e-10, atol=1e-12)
    left = {"frac_rows_dropped", "padding_efficiency", "prompt_sharing", "step_time", "update_time"}
    for key in {k for k in ends[1][1] if k not in left and not k.startswith("meter/")}:
        assert ends[0][1][key] == pytest.approx(ends[1][1][key], rel=1e-9, abs=1e-11, nan_ok=True), key


ONLINE: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04},
    "rloo": {"beta": 0.1},
    "agro_off_policy": {"beta": 0.1},
    "agro_off_policy_rb": {"beta": 0.1},
    "gspo": {"clip_eps": 0.2, "advantage": "group_norm"},
}


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("iterations", [1, 2])
def test_answers_without_an_end_are_in_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, iterations: int
) -> None:
    truncated = {
        "rewards": varied, "num_iterations": iterations, "max_steps": iterations, "mask_truncated_completions": True,
        "max_completion_length": 40,
    }  # fmt: skip
    ends, seen = [], []
    for drop in (True, False):
        with monkeypatch.context() as patch:
            passes = Seen(patch)
            if not drop:
                nothing_left_out(patch)
            ends.append(one_step(tmp_path / str(drop), recipes.build(name, **ONLINE[name]), PROMPTS, **truncated))
            seen.append(passes)
    assert seen[0].rows[True] < seen[1].rows[True]
    assert seen[0].rows[False] < seen[1].rows[False] or not seen[1].rows[False]
    for key, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][key], rtol=1e-9, atol=1e-11)


def flat(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The first prompt's answers differ, all others are worth the same."""
    return [float(sum(ids) % 7) / 7 if i < 4 else 0.5 for i, ids in enumerate(completion_ids)]


@pytest.mark.parametrize("budget", [None, 45])
def test_rows_of_advantage_zero_are_in_no_pass_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    """Old log-probs are needed for the ratio of the second iteration: of the rows that are trained on alone."""
    again = {"rewards": flat, "num_iterations": 3, "max_steps": 3, "max_tokens_per_micro_batch": budget}
    ends, seen = [], []
    for drop in (True, False):
        with monkeypatch.context() as patch:
            passes = Seen(patch)
            if not drop:
                nothing_left_out(patch)
            ends.append(one_step(tmp_path / str(drop), recipes.build("grpo", beta=0.0), PROMPTS, kind=Trainer, **again))
            seen.append(passes)
    assert (seen[0].rows[True], seen[1].rows[True]) == (12, 48)
    assert (seen[0].rows[False], seen[1].rows[False]) == (4, 16)
    for key, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][key], rtol=1e-9, atol=1e-11)
    assert ends[0][1]["loss"] == pytest.approx(ends[1][1]["loss"], abs=1e-12)


def test_the_sampler_is_compared_on_every_row_before_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Seen(monkeypatch)
    monkeypatch.setattr("tests.trainer.common.varied", flat)
    t = run(
        tmp_path, "grpo", beta=0.0, num_iterations=2, per_device_train_batch_size=16, max_steps=2, sampler_check_steps=0,
        self_checks={"reference": False, "padding": False},
    )  # fmt: skip
    t.train()
    assert t.sampling.trust.agrees is True
    assert passes.rows == {True: 8, False: 16}


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("grpo", {"beta": 0.04}),  # a KL in the loss
        ("reinforce", {"beta": 0.1, "objective_args": {"kl": "reward", "advantage": "leave_one_out"}}),
        ("ppo", {"beta": 0.0}),  # values
        ("grpo", {"beta": 0.0, "drop_zero_advantages": False}),
    ],
    ids=["kl", "reward kl", "critic", "switched off"],
)
def test_they_stay_where_something_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: dict[str, Any]
) -> None:
    passes = Seen(monkeypatch)
    seen: list[Batch] = []
    original = Passes.filled

    def watched(self: Passes, batch: Batch, objective: Objective, **options: Any) -> Batch:
        seen.append(original(self, batch, objective, **options))
        return seen[-1]

    monkeypatch.setattr(Passes, "filled", watched)
    monkeypatch.setattr("tests.trainer.common.varied", flat)
    t = run(tmp_path, name, num_iterations=2, max_steps=2, sampler_check_steps=0, top_p=0.9, self_checks=False, **extra)
    t.train()
    assert passes.rows[False] >= 8
    (batch,) = seen
    assert batch.old_logps is not None
    assert bool((batch.old_logps != 0)[batch.mask].all())


def test_missing_advantages_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gspo' needs 'advantages', and neither"):
        one_step(tmp_path, recipes.build("gspo", clip_eps=0.2), RANKED)


def test_a_generation_without_any_advantage_is_one_small_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Seen(monkeypatch)
    given: list[Tensor | None] = []
    original = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer,
        "compute_loss",
        lambda self, batch, counts: given.append(batch.old_logps) or original(self, batch, counts),
    )

    def constant(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [0.5] * len(completion_ids)

    end, values = one_step(tmp_path, recipes.build("grpo", beta=0.0), PROMPTS, kind=Trainer, rewards=constant,
                           steps_per_generation=2, max_steps=2)  # fmt: skip
    assert passes.rows == {True: 2, False: 1}
    assert values["frac_rows_dropped"] == 1.0
    assert values["grad_norm"] == 0.0
    assert values["entropy"] > 0.1
    # one row of the generation was scored; of the other step's, a ratio to zeros would be measured
    assert sorted(logps is None for logps in given) == [False, True]
    for name, value in tiny_llama(dtype=torch.float64).state_dict().items():
        assert torch.equal(end[f"model.{name}"], value)


GROUPED = [c for c in CASES if not c.per_pair and "group_ids" in c.tensor_names and c.layout == "groups"]


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.id)
def test_a_blank_row_of_a_group_is_no_row_of_it(case: Any) -> None:
    """What leaving such rows out of the forward pass rests on, for every loss that compares the answers of a prompt."""
    tensors = case.inputs()
    alive = tensors["mask"].any(-1)
    assert not alive.all()
    whole = case(tensors)
    part = case({name: t[alive] for name, t in tensors.items()})
    torch.testing.assert_close(part.loss, whole.loss[alive], rtol=1e-12, atol=1e-13)
    assert not whole.loss[~alive].any()
    for name, values in whole.metrics.items():
        torch.testing.assert_close(part.metrics[name], values[alive], rtol=1e-12, atol=1e-13, equal_nan=True)


def test_a_loss_of_somebody_elses_keeps_its_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may count on answers side by side; a group without any token that counts is left out all the same."""

    def by_fours(logps: Tensor, rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
        best = torch.nan_to_num(rewards).reshape(-1, 4).argmax(-1)
        return -(logps.where(mask, 0.0).sum(-1)).where(torch.arange(len(mask)) % 4 == best.repeat_interleave(4), 0.0)

    class OneGroupBlank(Trainer):
        def prepare(self, batch: Batch) -> Batch:
            keep = (batch.group_ids != 2) & (torch.arange(batch.num_rows) % 4 != 1)
            return super().prepare(batch.replace(mask=batch.mask & keep[:, None]))

    passes = Seen(monkeypatch)
    one_step(tmp_path, Objective(by_fours), RANKED, kind=OneGroupBlank)
    assert passes.rows[True] == 20  # of 24


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_leaves_rows_out_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    resumed_equals_whole(
        tmp_path, "grpo", stop, beta=0.0, num_iterations=3, max_steps=4, mask_truncated_completions=True,
        max_completion_length=30, per_device_train_batch_size=16,
    )  # fmt: skip
