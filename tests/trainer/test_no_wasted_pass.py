"""No pass is spent twice: old log-probs, the reference's hidden states, answers that teach nothing, micro-batches by tokens."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Config, Trainer, losses, recipes
from rlft._terms import split_signature
from rlft.config import ConfigError
from rlft.errors import Interrupted
from rlft.models import Policy
from rlft.objective import Objective
from rlft.run.step.micro_batches import by_tokens
from tests.test_trainer import ANSWERS, PAIRS, PROMPTS, RANKED, digest, digits_reward, settings, trainer, weights
from tests.tiny import char_tokenizer, random_batch, tiny_llama


class Calls:
    """What the policy was asked for, pass by pass, and how often the reference's trunk ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from rlft.models.scorer import CausalScorer

        self.wants: list[tuple[frozenset[str], bool]] = []
        self.trunks = 0
        forward, states = Policy.forward, CausalScorer.states

        def counted(policy: Policy, batch: Any, *, want: frozenset[str], temperature: float = 1.0) -> Any:
            self.wants.append((frozenset(want), torch.is_grad_enabled()))
            return forward(policy, batch, want=want, temperature=temperature)

        def trunk(scorer: Any, *args: Any) -> Tensor:
            self.trunks += 1
            return states(scorer, *args)

        monkeypatch.setattr(Policy, "forward", counted)
        monkeypatch.setattr(CausalScorer, "states", trunk)

    def constants(self) -> list[frozenset[str]]:
        """Passes without gradient."""
        return [want for want, grad in self.wants if not grad]


QUIET = {"self_checks": {"reference": False, "padding": False}, "sampler_check_steps": 0}


# -- old log-probs ------------------------------------------------------------------------------------------------------
def test_old_log_probs_come_from_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    t = trainer(
        tmp_path, "grpo", PROMPTS, reward=digits_reward, lora=True, beta=0.0, max_steps=6, num_iterations=2, **QUIET
    )
    t.train()
    assert t.state.generations == 3
    # the first generation compares; the others have no pass at all
    assert calls.constants() == [frozenset({"logps"})]
    assert t.sampling.trust.agrees is True


@pytest.mark.parametrize(
    "extra", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}, {"repetition_penalty": 1.1}, {"dtype": "float64"}]
)
def test_a_sampler_that_is_not_the_policy_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    calls = Calls(monkeypatch)
    model = tiny_llama(dtype=torch.float64) if "dtype" in extra else None
    t = trainer(tmp_path, "grpo", PROMPTS, model=model, reward=digits_reward, beta=0.0, max_steps=4, num_iterations=2, **QUIET, **extra)  # fmt: skip
    t.train()
    assert calls.constants() == [frozenset({"logps"})] * 2
    assert t.sampling.trust.agrees is None


@pytest.mark.parametrize("sampler", ["builtin", "transformers"])
def test_the_samplers_log_probs_train_like_scored_ones(tmp_path: Path, sampler: str) -> None:
    ends = []
    for exact in (True, False):
        model = tiny_llama()
        args = settings(
            tmp_path / str(exact), "grpo", beta=0.04, online=True, max_steps=4, num_iterations=2, sampler=sampler, temperature=0.7,
            max_grad_norm=None,
        )  # fmt: skip
        t = Trainer(model, args, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=digits_reward,
                    optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None))  # fmt: skip
        t.sampling.trust.agrees = None if exact else False
        t.train()
        ends.append(weights(t))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-5)


def test_log_probs_that_disagree_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rlft.rollout import FastSampler

    class Off(FastSampler):
        """Notes log-probs a little wrong."""

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            found = super().sample(*args, **kwargs)
            found.logps[0][0] -= 3e-4
            return found

    calls = Calls(monkeypatch)
    model, tokenizer = tiny_llama(), char_tokenizer()
    args = settings(tmp_path, "grpo", online=True, beta=0.0, max_steps=4, num_iterations=2, **QUIET)
    t = Trainer(
        model, args, train_dataset=PROMPTS, processing_class=tokenizer, reward_funcs=digits_reward,
        sampler=Off(model, tokenizer),
    )  # fmt: skip
    t.train()
    assert t.sampling.trust.agrees is False
    assert calls.constants() == [frozenset({"logps"})] * 2
    assert "scored again for every generation" in caplog.text


# -- the reference's hidden states --------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [True, False])
def test_reference_states_are_kept_over_the_passes_of_a_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """Exact KL: as many trunk passes as policy forwards, and one of the reference per generation."""
    hyper = {
        "objective_args": {"kl": "loss", "kl_value": "exact", "clip_eps": 0.2, "advantage": "group_norm"},
        "beta": 0.1,
    }
    runs = {}
    for kept in (True, False):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            if not kept:
                forward = Policy.forward

                def without(policy: Policy, batch: Any, *, _forward: Any = forward, **options: Any) -> Any:
                    return _forward(policy, batch.replace(ref_states=None), **options)

                patch.setattr(Policy, "forward", without)
            t = trainer(
                tmp_path / f"{kept}", "ppo_clip", PROMPTS, reward=digits_reward, lora=lora, max_steps=6, num_iterations=3,
                **hyper, **QUIET,
            )  # fmt: skip
            t.train()
            runs[kept] = weights(t), calls.trunks
    # kept: 1 compared pass, 2 of the reference, 6 of training; else the reference runs in each of the 6 as well
    assert (runs[True][1], runs[False][1]) == (9, 15)
    for name, value in runs[True][0].items():
        torch.testing.assert_close(value, runs[False][0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_reference_states_give_the_same_kl_and_gradient(layout: Any) -> None:
    model, reference = tiny_llama(dtype=torch.float64), tiny_llama(seed=1, dtype=torch.float64).requires_grad_(False)
    policy = Policy(model, reference=reference, layout=layout)
    batch = random_batch(groups=3, per_group=3)
    with torch.no_grad():
        states = policy(batch, want=frozenset({"ref_states"}))["ref_states"]
    assert states.shape == (*batch.completion_ids.shape, 32)
    results = []
    for data in (batch, batch.replace(ref_states=states)):
        out = policy(data, want=frozenset({"logps", "token_kl", "ref_logps"}))
        (out["token_kl"].sum() + out["logps"].sum()).backward()
        results.append((out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    for name in ("token_kl", "ref_logps"):
        torch.testing.assert_close(results[0][0][name], results[1][0][name], rtol=1e-12, atol=1e-13)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-10, atol=1e-12)


def test_reference_states_follow_their_rows() -> None:
    batch = random_batch(groups=3, per_group=2)
    marks = torch.arange(batch.completion_ids.numel(), dtype=torch.float32).reshape(*batch.completion_ids.shape, 1)
    batch = batch.replace(ref_states=marks.expand(-1, -1, 4).contiguous())
    rows = torch.tensor([4, 1])
    picked = batch.select(rows)
    width = picked.completion_ids.shape[1]
    assert torch.equal(picked.ref_states, batch.ref_states[rows][:, :width])
    joined = type(batch).concat([picked, batch])
    assert torch.equal(joined.ref_states[2:], batch.ref_states)
    assert torch.equal(type(batch).from_tensors(batch.tensors()).ref_states, batch.ref_states)
    with pytest.raises(ValueError, match="ref_states must be"):
        batch.replace(ref_states=marks[:, :-1])


# -- answers that teach nothing -----------------------------------------------------------------------------------------
WEIGHTED = sorted(n for n in losses.__all__ if getattr(getattr(losses, n), "advantage_weighted", False))


def test_the_weighted_losses_are_these() -> None:
    assert {"reinforce", "ppo_clip", "grpo", "gspo", "cispo"} <= set(WEIGHTED)


@pytest.mark.parametrize("name", WEIGHTED)
def test_at_advantage_zero_a_marked_loss_has_no_gradient(name: str) -> None:
    """And every loss that is not marked, and takes advantages, has one: none is forgotten."""
    loss = getattr(losses, name)
    tensors, keywords = split_signature(loss)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return -3 * torch.rand(4, 5, generator=generator, dtype=torch.float64) - 0.05

    mask = torch.rand(4, 5, generator=generator) > 0.2
    logps = draw().requires_grad_()
    near = logps.detach() + 0.01 * draw()
    pool = {"logps": logps, "old_logps": near, "ref_logps": draw(), "mask": mask}
    hyper = {k: 0.3 for k, p in keywords.items() if p.default is p.empty} | (
        {"beta": 0.0} if "beta" in keywords else {}
    )
    advantages = torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    out = loss(*({**pool, "advantages": advantages}[t] for t in tensors), **hyper)
    (grad,) = torch.autograd.grad(out.loss.sum(), logps)
    assert not out.loss[1::2].any()
    assert not grad[1::2].any()
    assert grad[0].any()


def one_step(folder: Path, objective: Objective, *, drop: bool, **extra: Any) -> tuple[Trainer, dict[str, float]]:
    """One SGD step in float64: the weights are the gradient. Half of the groups have equal rewards."""
    model = tiny_llama(dtype=torch.float64)
    args = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
        "max_completion_length": 9, "max_grad_norm": None, "dtype": "float64", "disable_tqdm": True, "report_to": [],
        **({} if drop else {"drop_zero_advantages": False}), **extra,
    }  # fmt: skip
    scores = [[1.0, 0.5, 0.0], [0.7, 0.7, 0.7]]
    rows = [
        {"prompt": f"{i}=", "completions": ["ab" * (k + i % 2) + "c" for k in range(3)], "scores": scores[i % 2]}
        for i in range(len(RANKED))
    ]
    t = Trainer(
        model, args, objective=objective, train_dataset=rows, processing_class=char_tokenizer(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )  # fmt: skip
    return t, t.train()


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"])
def test_dropped_answers_change_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaging: str) -> None:
    length = {"length": 7} if averaging == "fixed_length" else {}
    seen: list[int] = []
    original = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda self, batch, d: seen.append(batch.num_rows) or original(self, batch, d)
    )
    ends, losses_, rows = [], [], []
    for drop in (True, False):
        seen.clear()
        objective = recipes.build("grpo", beta=0.0, averaging=averaging, **length)
        t, values = one_step(tmp_path / str(drop), objective, drop=drop)
        ends.append(weights(t))
        losses_.append(values["loss"])
        rows.append(sum(seen))
    assert rows == [12, 36]  # the middle answer of a group that is ranked has advantage 0 as well
    assert losses_[0] == pytest.approx(losses_[1], abs=1e-12)
    start = {f"model.{n}": p for n, p in tiny_llama(dtype=torch.float64).named_parameters()}
    assert any(not torch.equal(ends[0][name], start[name]) for name in start)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "objective",
    [
        recipes.build("grpo", beta=0.04),
        recipes.build("reinforce", kl="loss", beta=0.1),
        recipes.build("dapo") + 0.01 * Objective(recipes.entropy_bonus),
        recipes.build("ppo"),
        recipes.build("rloo", beta=0.0),
        0.5 * Objective(lambda logps, advantages, mask: -logps.where(mask, 0.0) * (1 + advantages[:, None]), advantage="group_mean"),
    ],
    ids=["kl inside", "kl term", "entropy", "critic", "rewards", "a user's own"],
)  # fmt: skip
def test_any_other_term_keeps_all_answers(objective: Objective) -> None:
    assert not objective.advantage_weighted


def test_a_step_without_any_advantage_still_runs(tmp_path: Path) -> None:
    def constant(completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    t = trainer(tmp_path, "grpo", PROMPTS, reward=constant, beta=0.0, max_steps=2)
    values = t.train()
    assert values["frac_rows_dropped"] == 1.0
    assert values["grad_norm"] == 0.0


def test_keeping_them_is_refused_where_none_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="drop_zero_advantages=False does nothing"):
        trainer(tmp_path, "dpo", PAIRS, beta=0.1, drop_zero_advantages=False)


# -- micro-batches by tokens ---------------------------------------------------------------------------------------------
def test_a_budget_is_kept_and_groups_stay_whole() -> None:
    batch = random_batch(groups=12, per_group=3, prompt_lengths=(1, 20), lengths=(1, 12), seed=3)
    for budget in (1, 60, 100, 400, 10_000):
        pieces = by_tokens(batch, budget)
        assert sorted(torch.cat(pieces).tolist()) == list(range(batch.num_rows))
        groups = [set(batch.group_ids[rows].tolist()) for rows in pieces]
        assert sum(map(len, groups)) == batch.num_groups, "no group is in two pieces"
        for rows, inside in zip(pieces, groups, strict=True):
            part = batch.select(rows)
            longest = (part.prompt_mask.sum(-1)[part.group_ids] + part.completion_mask.sum(-1)).max()
            assert len(rows) * longest <= budget or len(inside) == 1
    assert len(by_tokens(batch, 1)) == 12
    assert len(by_tokens(batch, 10_000)) == 1


@pytest.mark.parametrize(("objective", "rows"), [("dpo", PAIRS), ("sft", ANSWERS), ("agro_off_policy", RANKED)])
def test_micro_batches_by_tokens_give_the_gradient_of_rows(tmp_path: Path, objective: str, rows: list[Any]) -> None:
    ends = []
    for budget in (None, 20, 45):
        model = tiny_llama(dtype=torch.float64)
        args = settings(
            tmp_path / str(budget), objective, max_steps=1, per_device_train_batch_size=12, max_grad_norm=None,
            dtype="float64", max_tokens_per_micro_batch=budget, **({} if objective == "sft" else {"beta": 0.1}),
        )  # fmt: skip
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        t = Trainer(model, args, train_dataset=rows, processing_class=char_tokenizer(), optimizers=(sgd, None))
        t.train()
        ends.append(weights(t))
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_by_tokens_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Kept reference states, the sampler's log-probs and dropped answers included."""
    hyper = {
        "objective_args": {"kl": "loss", "kl_value": "exact", "clip_eps": 0.2, "advantage": "group_norm"},
        "beta": 0.1,
    }
    extra = {**hyper, "max_steps": 6, "lora": True, "num_iterations": 3, "max_tokens_per_micro_batch": 40}
    whole = trainer(tmp_path / "whole", "ppo_clip", PROMPTS, reward=digits_reward, **extra)
    whole.train()

    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = trainer(tmp_path / "cut", "ppo_clip", PROMPTS, reward=digits_reward, **extra)
    cut.callbacks.append(interrupt)
    with pytest.raises(Interrupted):
        cut.train()
    resumed = trainer(tmp_path / "cut", "ppo_clip", PROMPTS, reward=digits_reward, **extra)
    resumed.train()
    assert digest(resumed, tmp_path / "cut") == digest(whole, tmp_path / "whole")


def test_a_budget_is_refused_where_a_step_is_one_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one micro-batch"):
        trainer(tmp_path, "aot", PAIRS, beta=0.1, max_tokens_per_micro_batch=100)
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch=0 must be at least 1"):
        Config(max_tokens_per_micro_batch=0)
