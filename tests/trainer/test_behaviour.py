"""The behaviour policy's next-token expectations: computed by the policy, used by the trainer, right by enumeration."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlft import Trainer, losses
from rlft.config import ConfigError
from rlft.models import Policy, add_lora
from rlft.models.lora import LoraSettings
from rlft.ops import MOMENTS, log_ratio_moments
from rlft.types import Batch
from tests.tiny import EOS_ID, random_batch, tiny_cohere, tiny_gemma2, tiny_llama, tiny_phi
from tests.trainer.common import PAIRS, log_of, resumed_equals_whole, run

V = 6
ANSWERS = [(EOS_ID,)] + [(a, b) for a in range(V) if a != EOS_ID for b in range(V)]
BOTH = list(itertools.product(range(len(ANSWERS)), repeat=2))
EVERYTHING = frozenset({"logps", "ref_logps", *MOMENTS})


def moved(model: nn.Module, seed: int, size: float = 0.1) -> None:
    """Push every trained weight somewhere, as a few updates would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def logits_of(model: Any, batch: Batch, temperature: float) -> Tensor:
    """``[N, V]`` log-probs of every position that predicts a completion token, row by row, from the model itself."""
    found = []
    for row in range(batch.num_rows):
        prompt = batch.prompt_ids[batch.group_ids[row]][batch.prompt_mask[batch.group_ids[row]]]
        answer = batch.completion_ids[row][batch.completion_mask[row]]
        ids = torch.cat([prompt, answer])[None]
        found.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature)
    return torch.cat(found).log_softmax(-1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_phi, tiny_cohere], ids=lambda f: f.__name__)
@pytest.mark.parametrize("remember", [False, True], ids=["fresh", "after updates"])
def test_moments_and_their_gradients_are_the_definition(build: Callable[..., Any], lora: bool, remember: bool) -> None:
    model = build(dtype=torch.float64)
    if lora:
        model = add_lora(model, LoraSettings(r=2, alpha=4.0))
    moved(model, 1)
    policy = Policy(model, reference="copy", chunk_size=(5, 16))
    moved(model, 2)
    batch = random_batch(lengths=(1, 4))
    sampled = logits_of(model, batch, 0.7).detach()
    if remember:
        policy.remember_behaviour()
        moved(model, 3)
    else:
        sampled = logits_of(model, batch, 0.7).detach()
    ref_policy = policy.reference_logps(batch, temperature=0.7)
    mine = logits_of(model, batch, 0.7)
    ref_full = reference_logits(policy, batch, 0.7)
    picked = ref_full.gather(-1, batch.completion_ids[batch.completion_mask][:, None])[:, 0]
    assert torch.allclose(picked, ref_policy[batch.completion_mask], atol=1e-12)
    x = mine - ref_full
    truth = {
        "behaviour_log_ratio": (sampled.exp() * x).sum(-1),
        "behaviour_log_ratio_sq": (sampled.exp() * x.square()).sum(-1),
        "token_log_ratio_sq": (mine.exp() * x.square()).sum(-1),
    }
    outputs = policy(batch, want=EVERYTHING, temperature=0.7)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, expected in truth.items():
        found = outputs[name][batch.completion_mask]
        assert torch.allclose(found, expected, atol=1e-11, rtol=1e-11), name
        weights = torch.linspace(-1, 2, len(found), dtype=torch.float64)
        ours = torch.autograd.grad((found * weights).sum(), parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad((expected * weights).sum(), parameters, retain_graph=True, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            if b is not None:
                assert a is not None
                # Gemma and Cohere normalise in float32, whatever the model's dtype
                tolerance = 1e-10 if build in (tiny_llama, tiny_phi) else 1e-5
                assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm())), name


def reference_logits(policy: Policy, batch: Batch, temperature: float) -> Tensor:
    with policy._reference.active():
        model = policy.model if policy.reference_model is None else policy.reference_model
        return logits_of(model, batch, temperature)


def test_the_policy_is_untouched_by_a_look_at_its_past() -> None:
    policy = Policy(tiny_llama(), reference="copy")
    policy.remember_behaviour()
    moved(policy.model, 1)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    kept = policy.behaviour_state()
    policy(random_batch(), want=EVERYTHING)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in policy.behaviour_state().items())
    with pytest.raises(RuntimeError, match="stop"), policy._behaviour.active():
        raise RuntimeError("stop")
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


def test_under_autocast_each_policy_keeps_its_own_casts() -> None:
    """Autocast remembers casts by parameter, and the behaviour policy borrows the parameters."""
    policy = Policy(tiny_llama(), reference="copy")
    policy.remember_behaviour()
    moved(policy.model, 1)
    batch = random_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = policy(batch, want=frozenset({"logps"}))["logps"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = policy(batch, want=EVERYTHING)
        outputs["logps"].sum().backward()
    assert torch.equal(alone, outputs["logps"])
    exact = policy(batch, want=EVERYTHING)
    for name in MOMENTS:
        assert torch.allclose(outputs[name], exact[name], rtol=0.1, atol=0.1), name
    assert all(p.grad is not None for p in policy.model.model.parameters())


def test_saved_weights_that_do_not_fit_are_refused() -> None:
    policy = Policy(tiny_llama(), reference="none")
    with pytest.raises(ValueError, match="saved behaviour policy does not fit"):
        policy.load_behaviour_state({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="need a reference"):
        policy(random_batch(), want=frozenset({"behaviour_log_ratio"}))


def test_the_op_refuses_what_it_cannot_compute() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="behaviour_log_ratio'\\] need behaviour_logits"):
        log_ratio_moments(logits, logits, want=frozenset({"behaviour_log_ratio"}))
    with pytest.raises(ValueError, match="did you mean 'token_log_ratio_sq'"):
        log_ratio_moments(logits, logits, want=frozenset({"token_log_ratio_square"}))
    with pytest.raises(ValueError, match="ref_logits"):
        log_ratio_moments(logits, logits[:1], want=frozenset({"token_log_ratio_sq"}))


@pytest.mark.parametrize("loss", [losses.agro_off_policy_rb, losses.agro_off_policy_rb2], ids=lambda f: f.__name__)
def test_expected_gradient_is_that_of_the_off_policy_loss(loss: Callable[..., Any]) -> None:
    """All 961 pairs of answers, weighed by the policy that sampled; the stand-in (mu = pi) would be biased."""
    model = tiny_llama(dtype=torch.float64, vocab_size=V)
    policy = Policy(model, reference="copy")
    moved(model, 1)
    batch = every_pair()
    with torch.no_grad():
        prob = policy(batch, want=frozenset({"logps"}))["logps"].sum(-1).exp()
    weight = (prob[0::2] * prob[1::2]).repeat_interleave(2)
    assert float(weight[0::2].sum()) == pytest.approx(1.0, abs=1e-12)

    def gradient(function: Callable[..., Any], *names: str) -> Tensor:
        outputs = policy(batch, want=EVERYTHING)
        assert batch.rewards is not None
        given = [outputs[name] for name in ("logps", "ref_logps", *names)]
        output = function(*given, batch.rewards, batch.group_ids, batch.mask, beta=0.4)
        total = (output.loss.where(batch.mask, 0.0).sum(-1) * weight).sum() / 2
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])

    names = ("behaviour_log_ratio", "behaviour_log_ratio_sq")[: 2 if loss is losses.agro_off_policy_rb else 1]
    standin = None
    for remember in (True, False):
        if remember:
            policy.remember_behaviour()
            moved(model, 2)
        else:
            policy.load_behaviour_state({})
        truth = gradient(losses.agro_off_policy)
        error = float((gradient(loss, *names) - truth).norm() / truth.norm())
        if remember:
            assert error < 1e-9
        else:
            standin = error
    assert standin is not None
    assert standin > 1e-2


def every_pair() -> Batch:
    rows = [ANSWERS[row] for pair in BOTH for row in pair]
    ids, mask = torch.zeros(len(rows), 2, dtype=torch.long), torch.zeros(len(rows), 2, dtype=torch.bool)
    for row, answer in enumerate(rows):
        ids[row, : len(answer)], mask[row, : len(answer)] = torch.tensor(answer), True
    prompts = torch.tensor([[4, 5]]).repeat(len(BOTH), 1)
    rewards = torch.tensor([(3 * a[0] + 5 * a[-1] * len(a)) % 8 / 8 for a in rows], dtype=torch.float64)
    groups = torch.arange(len(BOTH)).repeat_interleave(2)
    return Batch(prompts, torch.ones_like(prompts, dtype=torch.bool), ids, mask, mask, groups, rewards=rewards)


class Watched(Trainer):
    """Compares what the objective was given with the logits of two copies of the weights."""

    def prepare(self, batch: Batch) -> Batch:
        import copy

        self.sampled_from = copy.deepcopy(self.policy.hf_model)
        return super().prepare(batch)

    def compute_loss(self, batch: Batch, denominators: Tensor) -> Tensor:
        with torch.no_grad():
            mine = logits_of(self.policy.hf_model, batch, self.config.temperature)
            ref = logits_of(self.policy.reference_model, batch, self.config.temperature)
            mu = logits_of(self.sampled_from, batch, self.config.temperature)
            outputs = self.forward(batch, self.passes.wanted(batch, self.objective))
        flat = batch.completion_mask
        first = (mu.exp() * (mine - ref)).sum(-1)
        assert torch.allclose(outputs["behaviour_log_ratio"][flat], first, atol=1e-5)
        self.gaps = [*getattr(self, "gaps", []), float((mu - mine).abs().max())]
        if "behaviour_log_ratio_sq" in outputs:
            second = (mu.exp() * (mine - ref).square()).sum(-1)
            assert torch.allclose(outputs["behaviour_log_ratio_sq"][flat], second, atol=1e-5)
        return super().compute_loss(batch, denominators)


@pytest.mark.parametrize("name", ["agro_off_policy_rb", "agro_off_policy_rb2"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_trainer_gives_the_true_tensors(tmp_path: Path, name: str, iterations: int) -> None:
    t = run(tmp_path, name, kind=Watched, beta=0.1, num_iterations=iterations, temperature=0.8, max_steps=6)
    t.train()
    gaps: list[float] = t.gaps  # type: ignore[attr-defined]
    assert len(gaps) == 6
    for index, gap in enumerate(gaps):
        assert (gap > 1e-2) == (index % iterations != 0), "the policy that sampled, not the one of the last step"
    assert bool(t.policy.behaviour_state()) == (iterations > 1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["agro_off_policy_rb", "agro_off_policy_rb2"])
def test_resume_inside_a_generation_is_bit_identical(tmp_path: Path, name: str, lora: bool) -> None:
    extra = {"use_peft": True, "lora_r": 4} if lora else {}
    resumed_equals_whole(tmp_path, name, 2, beta=0.1, num_iterations=3, max_steps=5, **extra)


@pytest.mark.parametrize("name", ["agro_on_policy_lr_moments", "agro_off_policy_rb"])
def test_at_beta_zero_nothing_is_asked_of_a_reference(tmp_path: Path, name: str) -> None:
    if name == "agro_on_policy_lr_moments":
        with pytest.raises(ConfigError, match="beta must be > 0"):
            run(tmp_path, name, beta=0.0)
        return
    t = run(tmp_path, name, beta=0.0, max_steps=2)
    assert t.policy.reference_kind == "none"
    t.train()
    assert all(row["grad_norm"] > 0 for row in log_of(tmp_path))


ON_POLICY = [
    "agro_on_policy", "agro_on_policy_causal", "agro_on_policy_exact_kl", "agro_on_policy_lr_causal",
    "agro_on_policy_lr_token", "agro_on_policy_lr_kl", "agro_on_policy_lr_moments",
]  # fmt: skip
FILTERS: list[dict[str, Any]] = [
    {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"replay_probability": 0.5},
]  # fmt: skip
INNER: list[dict[str, Any]] = [{"num_iterations": 2}, {"steps_per_generation": 2}]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_forms_are_refused_wherever_they_are_biased(tmp_path: Path, name: str) -> None:
    for extra in [*FILTERS, *INNER]:
        ((setting, value),) = extra.items()
        with pytest.raises(ConfigError) as caught:
            run(tmp_path, name, beta=0.1, **extra)
        message = str(caught.value)
        assert f"objective {name!r} is biased" in message
        assert f"{setting}={value!r}" in message
        assert "use agro_off_policy" in message


@pytest.mark.parametrize("name", ["agro_off_policy_rb", "agro_off_policy_rb2", "agro_off_policy_cv"])
def test_forms_that_know_the_policy_of_the_generation_allow_inner_steps_and_no_filter(
    tmp_path: Path, name: str
) -> None:
    for extra in FILTERS:
        ((setting, value),) = extra.items()
        with pytest.raises(ConfigError) as caught:
            run(tmp_path, name, beta=0.1, **extra)
        assert f"{setting}={value!r}" in str(caught.value)
        assert "use agro_off_policy" in str(caught.value)
    for index, extra in enumerate(INNER):
        run(tmp_path / str(index), name, beta=0.1, max_steps=1, **extra).train()


@pytest.mark.parametrize("name", [*ON_POLICY, "agro_off_policy_rb", "agro_off_policy_rb2"])
def test_data_are_no_samples_of_the_policy(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, name, beta=0.1, rows=PAIRS, pair_rewards=[0.5, -0.5])
    assert "data hold such answers; use agro_off_policy" in str(caught.value)


@pytest.mark.parametrize("name", ["agro_on_policy_causal", "agro_on_policy_exact_kl"])
def test_a_temperature_divides_what_samples_and_what_scores(tmp_path: Path, name: str) -> None:
    """So it needs no refusal: the first ratio to the sampler is 1 at any temperature."""
    t = run(tmp_path, name, beta=0.1, temperature=0.6, max_steps=1, sampler_check_steps=1, sampler_check_bound=1e-4)
    t.train()
    assert log_of(tmp_path)[0]["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.parametrize(("name", "args"), [("agro_on_policy", {"lr_coef": 1.0}), ("agro_on_policy_lr_token", {})])
def test_a_likelihood_ratio_term_that_pushes_the_wrong_way_is_told_once(
    tmp_path: Path, name: str, args: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rlft"):
        run(tmp_path / "bad", name, beta=0.01, objective_args=args).train()
    rows = log_of(tmp_path / "bad")
    assert rows[0]["agro/flip_fraction"] > 0.1
    told = [r.getMessage() for r in caplog.records if "likelihood-ratio term" in r.getMessage()]
    assert len(told) == 1
    assert "more than 10%" in told[0]
    assert "lr_coef: 0" in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rlft"):
        run(tmp_path / "calm", name, beta=5.0, objective_args=args, learning_rate=0.0001).train()
        run(tmp_path / "off", "agro_off_policy", beta=0.01).train()
    assert log_of(tmp_path / "calm")[0]["agro/flip_fraction"] == 0.0
    assert "likelihood-ratio term" not in caplog.text
