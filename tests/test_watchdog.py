"""A sampler that does not draw from the policy stops the run; one that does is left alone, filters and all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.config import Config, ConfigError
from rlft.errors import TrainingError
from rlft.metrics import read_metrics
from rlft.rollout import Rollout, make_sampler
from rlft.run.step.calls import sampling_params
from rlft.run.step.sampler_trust import EXACT, ROUGH, SamplerTrust
from tests.bad_input.common import ANSWERS, PROMPTS, refused, same, state, trainer, varied
from tests.tiny import char_tokenizer

MEAN, MAX = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


class Faulty:
    """A sampler around the built-in one, with one fault.

    Args:
        change: takes this, a function that samples as it should, and the parameters; gives the rollout.

    Attributes:
        trainer, inner: the run and a sampler of its policy; set once the run is built.
    """

    reads_live_weights = True
    trainer: Any
    inner: Any

    def __init__(self, change: Any) -> None:
        self.change = change
        self.kept: Any = None

    def sample(self, prompt_ids: Sequence[Sequence[int]], n: int, params: Any, **kwargs: Any) -> Rollout:
        return self.change(self, lambda p=params: self.inner.sample(prompt_ids, n, p, **kwargs), params)


def run(folder: Path, change: Any = None, *, kind: str = "builtin", objective: str = "rloo", **extra: Any) -> Any:
    settings = {"self_checks": False, "max_steps": 4, "beta": 0.1, "learning_rate": 0.05, **extra}
    if change is None:
        return trainer(folder, objective, PROMPTS, reward=varied, **{"sampler": kind, **settings})
    faulty = Faulty(change)
    t = trainer(folder, objective, PROMPTS, reward=varied, sampler=faulty, **settings)
    faulty.trainer, faulty.inner = t, make_sampler(kind, t.policy.hf_model, t.tokenizer)
    return t


def stops(t: Any, *words: str, at: int) -> None:
    states = {0: state(t)}
    t.callbacks.append(lambda event, r, values: states.update({r.step: state(r)}) if event == "step" else None)
    refused(t.train, f"step {at + 1}: the sampler", "sampler_check_bound 0.001", *words, kind=TrainingError)
    assert t.step == at
    assert same(states[at], state(t))  # nothing was trained on what it drew
    assert all(p.grad is None for p in t.policy.parameters())


# -- samplers that are right --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "use_peft": True},
        {"top_p": 0.9, "top_k": 20, "temperature": 1.3},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3, "top_k": 30},
    ],
)
def test_exact_samplers_agree_to_rounding(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Filters included: the policy's log-probs go through the same ones."""
    found = {}
    for kind in ("builtin", "transformers"):
        t = run(tmp_path / kind, kind=kind, objective="agro_off_policy", max_steps=2, **settings)
        t.train()
        found[kind] = [row for row in read_metrics(t.run_dir) if MEAN in row]
    for rows in found.values():
        assert len(rows) == 2
        assert all(0 <= row[MEAN] <= row[MAX] < 1e-4 for row in rows)


def test_when_it_looks(tmp_path: Path) -> None:
    """The first two generations, and every k-th: generations 0, 1, 3, 6."""
    t = run(tmp_path, max_steps=7, sampler_check_steps=3)
    t.train()
    assert [row["step"] for row in read_metrics(t.run_dir) if MEAN in row] == [1, 2, 4, 7]


# -- samplers that are wrong --------------------------------------------------------------------------------------------------
def stale(sampler: Faulty, sample: Any, params: Any) -> Rollout:
    """Weights of before the first update, for ever."""
    named = dict(sampler.trainer.policy.named_parameters())
    if sampler.kept is None:
        sampler.kept = {n: p.detach().clone() for n, p in named.items()}
    live = {n: p.detach().clone() for n, p in named.items()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(sampler.kept[name])
        rollout = sample()
        for name, p in named.items():
            p.copy_(live[name])
    return rollout


def without_adapter(sampler: Faulty, sample: Any, params: Any) -> Rollout:
    with sampler.trainer.policy.hf_model.disable_adapter():
        return sample()


def of_temperature_one(sampler: Faulty, sample: Any, params: Any) -> Rollout:
    return sample(replace(params, temperature=1.0))


def of_another_filter(sampler: Faulty, sample: Any, params: Any) -> Rollout:
    return sample(replace(params, top_k=5))


def test_stale_weights(tmp_path: Path) -> None:
    stops(run(tmp_path, stale), "weights of an earlier step", "sampler: transformers", at=1)


def test_an_adapter_that_never_reached_the_sampler(tmp_path: Path) -> None:
    t = run(tmp_path, without_adapter, use_peft=True)
    stops(t, "those of the model without its adapter: the adapter never reached the sampler", at=1)


def test_another_temperature(tmp_path: Path) -> None:
    stops(run(tmp_path, of_temperature_one, temperature=0.7), "those of temperature 1, and the run's is 0.7", at=0)


def test_another_filter(tmp_path: Path) -> None:
    stops(run(tmp_path, of_another_filter), "another temperature or filter than the run's", at=0)


def test_log_probs_that_are_no_numbers(tmp_path: Path) -> None:
    def nan(sampler: Faulty, sample: Any, params: Any) -> Rollout:
        rollout = sample()
        return replace(rollout, logps=[[float("nan")] * len(row) for row in rollout.logps])

    stops(run(tmp_path, nan), "by nan nats", at=0)


def test_a_bound_of_ones_own_and_the_off_switch(tmp_path: Path) -> None:
    run(tmp_path / "wide", stale, sampler_check_bound=50.0, max_steps=2).train()
    run(tmp_path / "off", stale, sampler_check_steps=0, max_steps=2).train()
    t = run(tmp_path / "tight", of_another_filter, sampler_check_bound=1e-6)
    refused(t.train, "sampler_check_bound 1e-06", kind=TrainingError)


def test_bounds(tmp_path: Path) -> None:
    t = run(tmp_path)

    def bound(*, sampler: Any = t.sampler, **settings: Any) -> float:
        parts = replace(t.parts, config=replace(t.config, **settings), sampler=sampler)
        return SamplerTrust(parts, t.micro_batches).bound

    assert t.sampling.trust.bound == bound() == EXACT == 1e-3
    assert bound(sampler_correction={"cap": 2.0}) == ROUGH == 0.1  # a difference that is known
    assert bound(mixed_precision="bf16") == ROUGH
    assert bound(sampler=object()) == ROUGH == 0.1  # a server, another engine
    assert bound(sampler=object(), sampler_check_bound=0.5) == 0.5


def test_settings_that_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sampler_check_bound does nothing while sampler_check_steps is 0"):
        Config(sampler_check_steps=0, sampler_check_bound=0.1)
    with pytest.raises(ConfigError, match="sampler_check_steps=-1 must be at least 0"):
        Config(sampler_check_steps=-1)
    with pytest.raises(ConfigError, match="sampler_check_bound"):
        Config(sampler_check_bound=0.0)
    with pytest.raises(ConfigError, match="sampler_check_steps=3 does nothing without rewards"):
        trainer(tmp_path, "sft", ANSWERS, sampler_check_steps=3)


def test_the_tokens_that_are_scored_are_those_that_were_sampled(tmp_path: Path) -> None:
    """By hand: the policy's log-probs of a rollout, one row at a time."""
    t = run(tmp_path, temperature=0.8)
    tokenizer = char_tokenizer()
    prompts, answers = [tokenizer("1+1=").input_ids, tokenizer("22+2=").input_ids], [[20, 21, 2], [22]]
    params = replace(sampling_params(t.config), top_k=40)
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = t.policy.hf_model(torch.tensor([[*prompt, *answer]])).logits[0].double() / 0.8
        for place, token in enumerate(answer, len(prompt) - 1):
            row = logits[place]
            kept = row.topk(40).values
            expected.append(row[token] - kept.logsumexp(-1) if row[token] >= kept[-1] else row.new_tensor(-torch.inf))
    got = t.sampling.trust.policy_logps(prompts, answers, params)
    torch.testing.assert_close(got, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    plain = t.sampling.trust.policy_logps(prompts, answers, replace(params, top_k=0))
    exact = torch.cat(
        [
            (t.policy.hf_model(torch.tensor([[*p, *a]])).logits[0, len(p) - 1 : -1].double() / 0.8)
            .log_softmax(-1)
            .gather(-1, torch.tensor(a)[:, None])[:, 0]
            for p, a in zip(prompts, answers, strict=True)
        ]
    )
    torch.testing.assert_close(plain, exact.detach(), rtol=1e-5, atol=1e-5)
