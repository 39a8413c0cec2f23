"""Importance corrections from YAML: exact by enumeration, and end to end with a sampler that is not the policy."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Objective, Trainer, losses
from rlft.config import ConfigError
from rlft.losses.importance import importance_weights
from rlft.models import Policy
from rlft.models.vocabulary import train_tokenizer
from rlft.rollout import FastSampler, Rollout, SamplingParams
from rlft.types import Batch, LossOutput
from tests.tiny import EOS_ID, char_tokenizer, tiny_llama
from tests.trainer.common import PAIRS, facts, log_of, resumed_equals_whole, run

V = 6
#: Every answer of at most two tokens over six: 1 + 5 * 6 = 31, and every pair of them.
ANSWERS = [(EOS_ID,)] + [(a, b) for a in range(V) if a != EOS_ID for b in range(V)]
BOTH = list(itertools.product(range(len(ANSWERS)), repeat=2))
PROMPT = "ab"
UNBOUNDED = {"level": "sequence", "mode": "truncate", "cap": 1e30}


def eighths(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that float32 holds exactly."""
    return [(3 * ids[0] + 5 * ids[-1] * len(ids)) % 8 / 8 for ids in completion_ids]


def model_of(seed: int, *, noise: float = 0.0) -> Any:
    """A float64 model over the six tokens; ``noise`` moves its head, and so its logits."""
    model = tiny_llama(seed=seed, dtype=torch.float64, vocab_size=V)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.lm_head.weight.add_(noise * torch.randn_like(model.lm_head.weight))
    return model


def answer_batch(tokenizer: Any) -> Batch:
    ids = torch.zeros(len(ANSWERS), 2, dtype=torch.long)
    mask = torch.zeros(len(ANSWERS), 2, dtype=torch.bool)
    for row, answer in enumerate(ANSWERS):
        ids[row, : len(answer)], mask[row, : len(answer)] = torch.tensor(answer), True
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    groups = torch.zeros(len(ANSWERS), dtype=torch.long)
    return Batch(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, mask, mask, groups)


def token_logps(model: Any, tokenizer: Any) -> Tensor:
    """``[31, 2]`` log-probs of every answer's tokens."""
    return Policy(model, reference="none")(answer_batch(tokenizer), want=frozenset({"logps"}))["logps"]


class EveryPair:
    """Gives the k-th prompt the k-th pair of answers, with the log-probs of some model."""

    def __init__(self, logps: Tensor) -> None:
        self.logps = logps.detach()

    def sample(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams, **more: Any) -> Rollout:
        rows = [answer for pair in BOTH for answer in pair]
        assert (len(prompt_ids), n) == (len(BOTH), 2)
        logps = [self.logps[row, : len(ANSWERS[row])].tolist() for row in rows]
        return Rollout([list(ANSWERS[row]) for row in rows], logps, [ANSWERS[row][-1] == EOS_ID for row in rows])


class Exact(Trainer):
    """Weighs each pair by its probability under the sampler, and keeps the gradient instead of taking a step."""

    def prepare(self, batch: Batch) -> Batch:
        answers = self.sampler.logps.sum(-1).exp()
        pairs = torch.tensor(BOTH)
        weight = (answers[pairs[:, 0]] * answers[pairs[:, 1]] * len(BOTH)).repeat_interleave(2)
        return super().prepare(batch.replace(extras={**batch.extras, "prob": weight}))

    def optimizer_step(self, *args: Any, **more: Any) -> float:
        self.gradient = torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return 0.0


def rloo(logps, ref_logps, rewards, group_ids, mask, prob, *, beta):
    return times(losses.rloo(logps, ref_logps, rewards, group_ids, mask, beta=beta), prob)


def agro(logps, ref_logps, rewards, group_ids, mask, prob, *, beta):
    return times(losses.agro_off_policy(logps, ref_logps, rewards, group_ids, mask, beta=beta), prob)


def causal(logps, ref_logps, rewards, group_ids, mask, prob, *, beta):
    return times(losses.agro_on_policy_causal(logps, ref_logps, rewards, group_ids, mask, beta=beta), prob)


def exact_kl(logps, ref_logps, token_kl, rewards, group_ids, mask, prob, *, beta):
    output = losses.agro_on_policy_exact_kl(logps, ref_logps, token_kl, rewards, group_ids, mask, beta=beta)
    return times(output, prob)


def times(output: LossOutput, prob: Tensor) -> LossOutput:
    return replace(output, loss=output.loss * prob[:, None])


def expected_gradient(
    folder: Path, loss: Callable[..., Any], *, noise: float, correction: dict[str, Any] | None, temperature: float
) -> Tensor:
    """What the trainer's gradient is on average over all pairs that the sampler may draw."""
    rows = [{"prompt": PROMPT} for _ in BOTH]
    tokenizer = train_tokenizer(rows, kind="char")
    assert len(tokenizer) == V
    policy, sampler = model_of(0), EveryPair(tempered(model_of(0, noise=noise), tokenizer, temperature))
    settings = {
        "output_dir": str(folder / "run"), "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2 * len(BOTH),
        "max_completion_length": 2, "temperature": temperature, "disable_tqdm": True, "report_to": [], "self_checks": False,
        "sampler_check_steps": 0, "sampler_correction": correction, "max_grad_norm": None,
    }  # fmt: skip
    t = Exact(
        policy, settings, objective=Objective(loss, beta=0.3), train_dataset=rows, processing_class=tokenizer,
        reward_funcs=eighths, sampler=sampler, ref_model=model_of(1).requires_grad_(False),
    )  # fmt: skip
    t.train()
    return t.gradient


def tempered(model: Any, tokenizer: Any, temperature: float) -> Tensor:
    policy = Policy(model, reference="none")
    return policy(answer_batch(tokenizer), want=frozenset({"logps"}), temperature=temperature)["logps"]


def true_gradient(temperature: float) -> Tensor:
    """``-grad (E[r] - beta KL(pi || ref))``, from the probabilities of all 31 answers."""
    tokenizer = train_tokenizer([PROMPT], kind="char")
    policy = model_of(0)
    logp = tempered(policy, tokenizer, temperature).sum(-1)
    ref = tempered(model_of(1), tokenizer, temperature).sum(-1).detach()
    assert float(logp.detach().exp().sum()) == pytest.approx(1.0, abs=1e-12)
    rewards = torch.tensor(eighths([list(answer) for answer in ANSWERS]), dtype=torch.float64)
    objective = (logp.exp() * (rewards - 0.3 * (logp - ref))).sum()
    (-objective).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:960 of 961 rows repeat an earlier one")
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("loss", [rloo, agro, causal, exact_kl], ids=lambda f: f.__name__)
def test_corrected_gradient_is_the_on_policy_one(
    tmp_path: Path, loss: Callable[..., Any], temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the whole trainer, over all 961 pairs of answers, with a sampler whose logits differ."""
    truth = true_gradient(temperature)
    size = float(truth.norm())

    def error(folder: str, noise: float, correction: dict[str, Any] | None) -> float:
        found = expected_gradient(tmp_path / folder, loss, noise=noise, correction=correction, temperature=temperature)
        return float((found - truth).norm()) / size

    assert error("on", 0.0, None) < 1e-9
    assert error("corrected", 0.3, UNBOUNDED) < 1e-9
    assert error("plain", 0.3, None) > 1e-2


class Noisy(FastSampler):
    """The built-in sampler over a copy of the policy whose head was moved: another engine, or stale weights."""

    reads_live_weights = False

    def __init__(self, model: Any, noise: float = 0.05) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            other.lm_head.weight.add_(noise * torch.randn_like(other.lm_head.weight))
        super().__init__(other, char_tokenizer())


class Kept(Trainer):
    """Keeps what each micro-batch was trained on."""

    kept: list[tuple[Batch, Tensor, float, float]]

    def compute_loss(self, batch: Batch, denominators: Tensor) -> Tensor:
        loss = super().compute_loss(batch, denominators)
        old = batch.old_logps if batch.old_logps is not None else self.forward(batch, frozenset({"logps"}))["logps"]
        self.kept = [*getattr(self, "kept", []), (batch, old.detach(), float(loss.detach()), float(denominators[0]))]
        return loss


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_metrics_and_weights_of_a_foreign_sampler(tmp_path: Path, level: str, mode: str, iterations: int) -> None:
    options = {"level": level, "mode": mode, "cap": 1.2, "floor": 0.8}
    model = tiny_llama()
    t = run(
        tmp_path, "reinforce", kind=Kept, model=model, sampler=Noisy(model), num_iterations=iterations, sampler_check_steps=0,
        sampler_correction=options, max_steps=2, objective_args={"averaging": "token_mean"},
    )  # fmt: skip
    t.train()
    for row, (batch, old, loss, count) in zip(log_of(tmp_path), t.kept, strict=True):  # type: ignore[attr-defined]
        mask, sampler = batch.mask, batch.extras["sampler_logps"]
        gap = (old - sampler).double()
        weights = importance_weights(old, sampler, mask, **options)  # type: ignore[arg-type]
        per = gap[mask] if level == "token" else gap.where(mask, 0.0).sum(-1)
        bounded = (per.exp() > 1.2) | (per.exp() < 0.8)
        raw = per.exp().clamp(0.8, 1.2) if mode == "truncate" else per.exp().where(~bounded, 0.0)
        assert bounded.any()
        assert not bounded.all()
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(raw.mean()), abs=1e-6)
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(float(raw.max()), abs=1e-6)
        share = row["sampling/truncated_fraction" if mode == "truncate" else "sampling/masked_fraction"]
        assert share == pytest.approx(float(bounded.double().mean()), abs=1e-9)
        assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(float(gap[mask].abs().mean()), abs=1e-6)
        assert row["sampling/sampling_logp_difference/max"] == pytest.approx(float(gap[mask].abs().max()), abs=1e-6)
        assert row["sampling/kl"] == pytest.approx(float((gap[mask].expm1() - gap[mask]).mean()), abs=1e-6)
        assert 0.001 < row["sampling/kl"] < 1.0
        assert batch.advantages is not None
        if batch is t.kept[0][0]:  # type: ignore[attr-defined]
            by_hand = (-batch.advantages[:, None] * old * weights)[mask].sum() / count
            assert loss == pytest.approx(float(by_hand), rel=1e-5)
    if iterations == 2:
        (first, *_), (second, *_) = t.kept  # type: ignore[attr-defined]
        assert first.old_logps is not None
        assert torch.equal(first.old_logps, second.old_logps), "the policy at generation time, at every inner step"


def test_the_untruncated_weight_has_mean_one(tmp_path: Path) -> None:
    model = tiny_llama()
    t = run(
        tmp_path, "reinforce", model=model, sampler=Noisy(model), sampler_check_steps=0, num_generations=64,
        per_device_train_batch_size=512, max_steps=1, sampler_correction={"level": "token", "cap": 1e9}, num_iterations=1,
    )  # fmt: skip
    t.train()
    (row,) = log_of(tmp_path)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    assert row["sampling/truncated_fraction"] == 0.0


@pytest.mark.parametrize("objective", ["ppo", "grpo", "dapo", "rloo"])
def test_corrected_runs_train_and_resume_bit_for_bit(tmp_path: Path, objective: str) -> None:
    """Every term of a sum is weighed; the sampler's log-probs wait with the queue of a generation."""
    extra = {"num_iterations": 2, "max_steps": 5, "sampler_correction": {"level": "token", "mode": "mask", "cap": 2.0}}
    if objective in ("rloo", "grpo"):
        extra |= {"beta": 0.05, "kl_controller": {"type": "proportional", "target": 0.05, "horizon": 100.0}}
    t = resumed_equals_whole(tmp_path, objective, 3, **extra)
    assert facts(t)["sampler correction"] == "level token, mode mask, cap 2.0, floor 0.0"


def test_own_sampler_gives_weights_of_one_and_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlft"):
        t = run(tmp_path, "rloo", beta=0.05, sampler_correction={})
    assert sum("next to nothing to do" in r.getMessage() for r in caplog.records) == 1
    t.train()
    row = log_of(tmp_path)[0]
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert row["sampling/kl"] < 1e-8


def test_filters_are_told_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlft"):
        run(tmp_path, "rloo", beta=0.05, sampler_correction={}, top_p=0.9)
    assert sum("cannot bring back tokens that top_p=0.9" in r.getMessage() for r in caplog.records) == 1


def test_a_foreign_sampler_under_an_on_policy_estimator_is_told_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    with caplog.at_level(logging.WARNING, logger="rlft"):
        run(tmp_path, "agro_on_policy_causal", beta=0.05, model=model, sampler=Noisy(model))
        assert sum("Noisy may differ" in r.getMessage() for r in caplog.records) == 1
        assert "use agro_off_policy" in caplog.text
        assert "sampler_correction: {level: sequence}" in caplog.text
        caplog.clear()
        run(tmp_path, "agro_on_policy_causal", beta=0.05, model=model)
        run(tmp_path, "agro_off_policy", beta=0.05, model=model, sampler=Noisy(model))
        assert "may differ" not in caplog.text


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("dpo", {"rows": PAIRS, "beta": 0.1, "sampler_correction": {}}, ("sampler_correction={}", "does nothing without rewards")),
    ("rloo", {"beta": 0.1, "sampler_correction": {"levl": "token"}}, ("no 'levl'", "did you mean 'level'?")),
    ("rloo", {"beta": 0.1, "sampler_correction": {"level": "row"}}, ("sampler_correction: level", "'row'")),
    ("rloo", {"beta": 0.1, "sampler_correction": {"mode": "clip"}}, ("sampler_correction: mode", "'clip'")),
    ("rloo", {"beta": 0.1, "sampler_correction": {"cap": 0.0}}, ("cap must be > 0",)),
    ("rloo", {"beta": 0.1, "sampler_correction": {"cap": math.inf}}, ("cap",)),
    ("rloo", {"beta": 0.1, "sampler_correction": {"floor": 3.0}}, ("floor", "3.0")),
    ("rloo", {"beta": 0.1, "sampler_correction": "token"}, ("sampler_correction must be",)),
    ("dro", {"objective_args": {"beta": 0.1}, "num_generations": 1, "sampler_correction": {}}, ("is per answer",)),
    ("agro_on_policy", {"beta": 0.1, "objective_args": {"lr_coef": 1.0}, "sampler_correction": {"level": "sequence"}},
     ("likelihood-ratio term", "lr_coef: 0")),
    ("agro_on_policy_lr_token", {"beta": 0.1, "sampler_correction": {"level": "sequence"}}, ("likelihood-ratio term",)),
    ("agro_on_policy_causal", {"beta": 0.1, "sampler_correction": {}}, ("sampler_correction.level: sequence",)),
    ("agro_off_policy_rb", {"beta": 0.1, "sampler_correction": {}}, ("right for any policy that sampled", "drop it")),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "extra", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path: Path, objective: str, extra: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, objective, **extra)
    for word in words:
        assert word in str(caught.value)
