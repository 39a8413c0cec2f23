"""KL controllers from YAML: beta follows the KL that was logged, is in the loss that trains, and survives a resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Objective, Trainer, kl, losses
from rlft.config import ConfigError
from rlft.rules.kl_weight import check_kl_controller, kl_weights, with_beta
from rlft.run.measure.journal import Journal
from rlft.run.processes.processes import Processes
from rlft.run.progress import Progress
from rlft.run.step.kl_control import KLControl
from rlft.types import Batch, LossOutput
from tests.tiny import random_batch
from tests.trainer.common import PAIRS, facts, log_of, resumed_equals_whole, run

PROPORTIONAL = {"type": "proportional", "target": 0.05, "horizon": 100.0}


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        ("rloo", {"beta": 0.05}),
        ("grpo", {"beta": 0.05}),
        ("agro_off_policy", {"beta": 0.05}),
        ("kl_policy_gradient_exact", {"beta": 0.05}),
        ("reinforce", {"beta": 0.05, "objective_args": {"kl": "loss", "kl_value": "k2"}}),
        ("reinforce", {"beta": 0.05, "objective_args": {"kl": "reward", "kl_value": "k1"}}),
        ("ppo", {"beta": 0.05}),
    ],
    ids=["rloo", "grpo", "agro", "exact", "loss", "reward", "ppo"],
)
def test_beta_follows_the_logged_kl_wherever_it_sits(tmp_path: Path, objective: str, extra: dict[str, Any]) -> None:
    t = run(tmp_path, objective, kl_controller=PROPORTIONAL, gradient_accumulation_steps=2, **extra)
    t.train()
    rows = log_of(tmp_path)
    expected: Any = kl.ProportionalKL(0.05, 0.05, 100.0)
    for row in rows:
        assert row["kl/beta"] == pytest.approx(expected.beta, rel=1e-12)
        expected = expected.update(row["objective/kl"], samples=16)
    assert t.kl_control is not None
    assert t.kl_control.controller.beta == pytest.approx(expected.beta, rel=1e-12)
    assert len({row["kl/beta"] for row in rows}) == 4
    (weight,) = kl_weights(t.objective)
    assert weight.beta == pytest.approx(expected.beta, rel=1e-12)
    assert t.objective.beta == pytest.approx(expected.beta, rel=1e-12)
    if weight.place == "loss":
        assert t.objective.terms[weight.term].weight == pytest.approx(expected.beta, rel=1e-9)


class Watched(Trainer):
    """Keeps the loss of every micro-batch beside what the loss function gives at the logged beta."""

    seen: list[tuple[float, float]]

    def compute_loss(self, batch: Batch, denominators: Tensor) -> Tensor:
        loss = super().compute_loss(batch, denominators)
        outputs = self.forward(batch, frozenset({"logps"}))
        assert batch.old_logps is not None
        assert batch.advantages is not None
        assert self.kl_control is not None
        by_hand = losses.ppo_penalty(
            outputs["logps"], batch.old_logps, batch.advantages, batch.mask, beta=self.kl_control.controller.beta
        )
        part = by_hand.loss.where(batch.mask, 0.0).sum() / denominators[0]
        self.seen = [*getattr(self, "seen", []), (float(loss.detach()), float(part.detach()))]
        return loss


PENALTY = {
    "beta": 0.5, "objective_args": {"advantage": "leave_one_out"}, "num_iterations": 3,
    "kl_controller": {"type": "halve_double", "target": 0.02}, "max_steps": 12,
}  # fmt: skip


@pytest.mark.parametrize(("target", "factor"), [(0.02, 2.0), (50.0, 0.5)])
def test_ppo_penalty_halves_and_doubles_once_per_generation(tmp_path: Path, target: float, factor: float) -> None:
    controller = {"type": "halve_double", "target": target}
    t = run(tmp_path, "ppo_penalty", kind=Watched, **{**PENALTY, "kl_controller": controller})
    t.train()
    rows = log_of(tmp_path)
    assert rows[0]["policy/approxkl"] < 1e-12, "the first step of a generation is where it sampled"
    beta, factors = 0.5, []
    for index, row in enumerate(rows):
        assert row["kl/beta"] == beta
        if index % 3 == 2:
            measured = row["policy/approxkl"]
            factors.append(0.5 if measured < target / 1.5 else 2.0 if measured > target * 1.5 else 1.0)
            beta *= factors[-1]
    assert factors[0] == factor
    assert len(factors) == 4
    assert t.objective.terms[0].hyper["beta"] == beta
    for trained, by_hand in t.seen:  # type: ignore[attr-defined]
        assert trained == pytest.approx(by_hand, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("stop", [2, 4])
def test_penalty_resumes_bit_for_bit_in_the_middle_of_a_generation(tmp_path: Path, stop: int) -> None:
    resumed = resumed_equals_whole(tmp_path, "ppo_penalty", stop, **{**PENALTY, "max_steps": 7})
    assert resumed.kl_control is not None
    assert resumed.kl_control.controller.beta != 0.5


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_proportional_resumes_bit_for_bit(tmp_path: Path, place: str) -> None:
    axes = {"kl": place, "kl_value": "k2" if place == "loss" else "k1"}
    extra = {"beta": 0.05, "objective_args": axes, "kl_controller": PROPORTIONAL, "num_iterations": 2, "max_steps": 6}
    resumed_equals_whole(tmp_path, "reinforce", 3, **extra)


def test_a_kl_in_the_reward_moves_beta_once_per_generation(tmp_path: Path) -> None:
    run(
        tmp_path, "reinforce", beta=0.05, objective_args={"kl": "reward", "kl_value": "k1"}, num_iterations=2,
        kl_controller={"type": "halve_double", "target": 10.0},
    ).train()  # fmt: skip
    assert [row["kl/beta"] for row in log_of(tmp_path)] == [0.05, 0.025, 0.025, 0.0125]


def measure(t: Trainer) -> None:
    """Prepare and score a batch that is no step's: here with a KL of hundreds of nats per answer."""
    batch = random_batch()
    old, ref = (torch.full(batch.mask.shape, value) for value in (-0.1, -100.0))
    batch = t.prepare(batch.replace(old_logps=old, ref_logps=ref, rewards=torch.arange(float(batch.num_rows))))
    t.compute_loss(batch, t.objective.denominators(batch))


class Looking(Trainer):
    """Measures inside every evaluation, one of which is in the middle of every step."""

    looking = False

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        self.looking = True
        try:
            return super().evaluate(eval_dataset)
        finally:
            self.looking = False

    def prepare(self, batch: Batch) -> Batch:
        if not self.looking:
            self.evaluate()
        return super().prepare(batch)

    def score(self, examples: Any, completions: Any, completion_ids: Any) -> Any:
        if self.looking:
            measure(self)
        return super().score(examples, completions, completion_ids)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_only_training_steps_move_beta(tmp_path: Path, place: str) -> None:
    """Batches that are scored inside an evaluation, or by a callback between steps, leave no trace in beta."""
    extra = {
        "beta": 0.05, "objective_args": {"kl": place}, "kl_controller": PROPORTIONAL, "eval_fraction": 0.25, "eval_steps": 1,
        "self_checks": False,
    }  # fmt: skip
    betas = []
    for name, kind, callbacks in (
        ("plain", Trainer, []),
        ("evaluation", Looking, []),
        ("callback", Trainer, [lambda event, t, values: measure(t) if event == "step" else None]),
    ):
        run(tmp_path / name, "reinforce", kind=kind, callbacks=callbacks, **extra).train()
        betas.append([row["kl/beta"] for row in log_of(tmp_path / name) if "kl/beta" in row])
    assert len(set(betas[0])) == 4
    assert betas[0] == betas[1] == betas[2]


def test_fixed_logs_beta_and_keeps_it(tmp_path: Path) -> None:
    t = run(tmp_path, "grpo", beta=0.04, kl_controller={"type": "fixed"})
    assert facts(t)["KL controller"] == "fixed; by objective/kl, beta now 0.04"
    t.train()
    assert [row["kl/beta"] for row in log_of(tmp_path)] == [0.04] * 4


def test_the_plan_names_rule_target_unit_and_beta(tmp_path: Path) -> None:
    t = run(tmp_path, "rloo", beta=0.05, kl_controller=PROPORTIONAL)
    words = facts(t)["KL controller"]
    assert words == (
        "proportional, target 0.05 nats per answer, horizon 100, limit 0.2; by objective/kl, beta now 0.05"
    )
    assert "KL controller" not in facts(run(tmp_path / "without", "rloo", beta=0.05))


def test_beta_stays_within_a_millionfold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = run(tmp_path, "rloo", beta=0.05, kl_controller={"type": "halve_double", "target": 1e9}, max_steps=22)
    with caplog.at_level(logging.WARNING, logger="rlft"):
        t.train()
    assert t.kl_control is not None
    assert t.kl_control.controller.beta == pytest.approx(0.05 / 2**20)
    assert sum("cannot be reached" in r.getMessage() for r in caplog.records) == 1


def control_of(objective: Objective, settings: Mapping[str, Any], *, reduce: Any) -> KLControl:
    """A controller on the first of two processes, for sums over both."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=2, is_main_process=True, reduce=reduce
    )
    progress = Progress(4, step=1)
    processes = Processes(accelerator, progress)
    parts: Any = SimpleNamespace(
        config=SimpleNamespace(kl_controller=settings, num_generations=2), objective=objective, processes=processes,
        sizes=SimpleNamespace(draws=1, groups_per_step=1), journal=Journal(processes, progress, Path("run"), quiet=True),
    )  # fmt: skip
    source: Any = SimpleNamespace(waiting=False)
    return KLControl(parts, source)


def test_the_measured_kl_is_summed_over_processes_before_it_is_divided() -> None:
    """One process saw 3 answers of 0.1 nats, the other one of 0.9: the mean is 0.3, not 0.5."""
    other = torch.tensor([0.9, 1.0, 1.0], dtype=torch.float64)
    objective = Objective(losses.rloo, beta=0.1)
    rule = {"type": "proportional", "target": 0.25, "horizon": 10.0, "limit": 1.0}
    control = control_of(objective, rule, reduce=lambda sums, reduction: sums + other)
    control._take(torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([True, True, True, False]), 3)
    assert control.after_update(moved=True) == {"kl/beta": 0.1}
    assert control.controller.beta == pytest.approx(0.1 * (1 + 0.2 * 4 / 10), rel=1e-7)
    assert control.steered(objective).terms[0].hyper["beta"] == control.controller.beta
    control._take(torch.tensor([float("nan")]), torch.tensor([True]), 1)
    before = control.controller
    control.after_update(moved=False)  # a step that was skipped for NaN moves nothing
    assert control.controller == before


def test_a_sum_with_one_beta_is_moved_and_the_objective_given_is_not_touched() -> None:
    given = 0.5 * Objective(losses.reinforce, advantage="leave_one_out", kl="loss", kl_value="k2", beta=0.1)
    moved = with_beta(given, 0.2)
    assert [term.weight for term in moved.terms] == pytest.approx([0.5, 0.1])
    assert [term.weight for term in given.terms] == pytest.approx([0.5, 0.05])
    assert (moved.beta, given.beta) == (0.2, 0.1)


def mine(logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, *, beta: float) -> LossOutput:
    gap = (logps - ref_logps).where(mask, 0.0)
    return LossOutput(beta * gap.square() - rewards[:, None] * logps.where(mask, 0.0), {}, "token_mean", mask)


def test_a_function_of_ones_own_is_moved_too(tmp_path: Path) -> None:
    from tests.tiny import char_tokenizer, tiny_llama
    from tests.trainer.common import PROMPTS, varied

    settings: Mapping[str, Any] = {
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 8,
        "max_completion_length": 4, "disable_tqdm": True, "report_to": [], "learning_rate": 1e-2,
        "kl_controller": {"type": "halve_double", "target": 5.0},
    }  # fmt: skip
    t = Trainer(
        tiny_llama(), settings, objective=Objective(mine, beta=0.1), train_dataset=PROMPTS,
        processing_class=char_tokenizer(), reward_funcs=varied,
    )  # fmt: skip
    t.train()
    assert [row["kl/beta"] for row in log_of(tmp_path)] == [0.1, 0.05]


HALVE = {"type": "halve_double", "target": 0.02}
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("dpo", {"rows": PAIRS, "beta": 0.1, "kl_controller": HALVE}, ("kl_controller", "does nothing without rewards")),
    ("dapo", {"kl_controller": HALVE}, ("no KL whose weight beta", "'dapo'")),
    ("reinforce", {"kl_controller": HALVE}, ("no KL whose weight beta", "drop kl_controller")),
    ("rloo", {"beta": 0.0, "kl_controller": HALVE}, ("no KL whose weight beta", "set beta")),
    ("ppo_penalty", {"beta": 0.1, "objective_args": {"advantage": "leave_one_out"}, "kl_controller": HALVE},
     ("would measure 0 at every step", "num_iterations")),
    ("agro_off_policy", {"beta": 0.1, "replay_probability": 0.5, "kl_controller": HALVE},
     ("replay_probability=0.5", "drop one")),
    ("rloo", {"beta": 0.1, "kl_controller": {"type": "halfdouble"}}, ("kl_controller.type", "did you mean 'halve_double'?")),
    ("rloo", {"beta": 0.1, "kl_controller": {}}, ("kl_controller.type must be one of fixed",)),
    ("rloo", {"beta": 0.1, "kl_controller": {"type": "fixed", "target": 1.0}}, ("of type fixed has no 'target'",)),
    ("rloo", {"beta": 0.1, "kl_controller": {**HALVE, "horizon": 1.0}}, ("has no 'horizon'",)),
    ("rloo", {"beta": 0.1, "kl_controller": {**HALVE, "beta": 1.0}}, ("kl_controller.beta does nothing", "set beta")),
    ("rloo", {"beta": 0.1, "kl_controller": {"type": "proportional"}}, ("kl_controller: ", "target")),
    ("rloo", {"beta": 0.1, "kl_controller": {**HALVE, "target": 0.0}}, ("target must be > 0",)),
    ("rloo", {"beta": 0.1, "kl_controller": {**HALVE, "target": "6"}}, ("kl_controller: ", "target")),
    ("rloo", {"beta": 0.1, "kl_controller": {**PROPORTIONAL, "horizon": 1.5}},
     ("horizon=1.5 is not above limit x answers", "0.2 x 8", "raise horizon")),
    ("rloo", {"beta": 0.1, "kl_controller": "proportional"}, ("kl_controller must be",)),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "extra", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path: Path, objective: str, extra: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, objective, **extra)
    for word in words:
        assert word in str(caught.value)


def test_two_betas_are_refused() -> None:
    both = Objective(losses.rloo, beta=0.1) + Objective(losses.agro_off_policy, beta=0.2)
    config: Any = SimpleNamespace(kl_controller=HALVE)
    with pytest.raises(ConfigError, match="moves one beta, and objective 'rloo \\+ agro_off_policy' has 2"):
        check_kl_controller(config, both)
