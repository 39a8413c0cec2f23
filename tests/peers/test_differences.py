"""Where rlft computes something else than TRL 1.16, on purpose: one test for each line of docs/differences.md.

Each test shows both sides: what TRL's own code does, and that rlft does what the line says.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from rlft import advantages, losses, recipes, reduce
from rlft.objective import Objective
from rlft.types import Batch
from tests.peers import standin
from tests.peers.compare import ATOL, RTOL, Pairs, Rollouts, assert_agree, differ, gradients

pytestmark = pytest.mark.peers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "differences.md"


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL)


def test_page_and_tests_name_each_other() -> None:
    """Every line of the page points at a test that exists, and no test here is without a line."""
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")} - {"test_page_and_tests_name_each_other"}
    elsewhere = "".join(p.read_text(encoding="utf-8") for p in PAGE.parents[1].glob("tests/test_trl_defects.py"))
    assert here <= named
    assert named <= here | set(re.findall(r"def (test_\w+)", elsewhere))


# -- preference pairs ------------------------------------------------------------------------------------------------
def test_ipo_is_in_sums() -> None:
    pairs = Pairs.make()
    theirs = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type="ipo", beta=0.3)
    assert differ(losses.ipo(*pairs.sums, beta=0.3).mean(), theirs, pairs.logps)
    one_token = Pairs(pairs.logps, pairs.ref_logps, torch.arange(pairs.mask.shape[1])[None] < torch.ones(10, 1))
    theirs = standin.dpo(one_token.logps, one_token.ref_logps, one_token.mask, loss_type="ipo", beta=0.3)
    assert_agree(losses.ipo(*one_token.sums, beta=0.3).mean(), theirs, pairs.logps)


def test_label_smoothing_smooths_dpo() -> None:
    pairs = Pairs.make()
    args: dict[str, Any] = {"loss_type": "sigmoid", "beta": 0.3}
    plain = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, **args)
    _close(standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, label_smoothing=0.2, **args), plain)
    smoothed = losses.dpo(*pairs.sums, beta=0.3, label_smoothing=0.2).mean()
    flipped = standin.dpo(-pairs.logps, -pairs.ref_logps, pairs.mask, **args)
    assert_agree(smoothed, 0.8 * plain + 0.2 * flipped, pairs.logps)


def test_exo_without_smoothing_is_refused() -> None:
    pairs = Pairs.make()
    theirs = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, loss_type="exo_pair", beta=0.3)
    assert theirs.isinf()
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.exo_pair(*pairs.sums, beta=0.3, label_smoothing=0.0)


def test_discopop_far_from_the_reference_is_finite() -> None:
    pairs = Pairs.make()
    far = (pairs.logps.detach() - 300 * torch.tensor([1.0] * 5 + [0.0] * 5)[:, None]).requires_grad_()
    theirs = standin.dpo(far, pairs.ref_logps, pairs.mask, loss_type="discopop", beta=2.0)
    assert gradients(theirs, far)[0].isnan().any()
    moved = Pairs(far, pairs.ref_logps, pairs.mask)
    ours = losses.discopop(*moved.sums, beta=2.0).mean()
    assert ours.isfinite()
    assert gradients(ours, far)[0].isfinite().all()


def test_f_divergence_rewards_are_those_of_the_loss() -> None:
    pairs = Pairs.make()
    logged: dict[str, Any] = {}
    standin.dpo(
        pairs.logps,
        pairs.ref_logps,
        pairs.mask,
        loss_type="sigmoid",
        beta=0.3,
        f_divergence="js_divergence",
        metrics=logged,
    )
    chosen, _, ref_chosen, _ = pairs.sums
    log_ratio = (chosen - ref_chosen).detach()
    assert logged["rewards/chosen"][0] == pytest.approx(0.3 * log_ratio.mean().item(), rel=1e-9)
    ours = losses.f_dpo(*pairs.sums, beta=0.3, divergence="js").metrics["rewards/chosen"]
    _close(ours, 0.3 * torch.nn.functional.logsigmoid(log_ratio))


def test_forward_kl_that_is_infinite_is_refused() -> None:
    pairs = Pairs.make()
    far = (pairs.logps.detach() - 400 * torch.tensor([0.0] * 5 + [1.0] * 5)[:, None]).requires_grad_()
    theirs = standin.dpo(far, pairs.ref_logps, pairs.mask, loss_type="sigmoid", beta=0.3, f_divergence="forward_kl")
    assert not gradients(theirs, far)[0].isfinite().all()
    with pytest.raises(ValueError, match="overflows"):
        losses.f_dpo(*Pairs(far, pairs.ref_logps, pairs.mask).sums, beta=0.3, divergence="forward_kl")


def test_wpo_weights_are_not_aligned() -> None:
    pairs = Pairs.make()
    alignment = torch.full_like(pairs.ref_logps, -0.5).where(pairs.mask, 0.0)
    args: dict[str, Any] = {"loss_type": "sigmoid", "beta": 0.3}
    theirs = standin.dpo(pairs.logps, pairs.ref_logps, pairs.mask, log_sum_sq_probs=alignment, **args)
    ours = losses.wpo(*pairs.sums, *pairs.lengths, beta=0.3).mean()
    # A constant alignment of half a nat per token multiplies both weights of a pair by e^(1/2).
    assert_agree(math.e * ours, theirs, pairs.logps)


def test_likelihood_terms_are_means_over_answers() -> None:
    pairs = Pairs.make()
    theirs = standin.whole_step("cpo", pairs.logps, pairs.mask, beta=0.3)
    ours = losses.cpo(*pairs.sums[:2], *pairs.lengths, beta=0.3).mean()
    assert differ(ours, theirs, pairs.logps)
    chosen_mask = pairs.mask.chunk(2)[0]
    over_tokens = -pairs.logps.chunk(2)[0][chosen_mask].mean()
    assert_agree(ours + pairs.means[0].mean() + over_tokens, theirs, pairs.logps)


def test_orpo_learns_answers_alone() -> None:
    pairs = Pairs.make()
    mask = torch.ones_like(pairs.mask)
    prompt = torch.full((len(mask), 3), -4.0, dtype=torch.float64)
    theirs = standin.whole_step("orpo", pairs.logps, mask, prompt_logps=prompt, beta=0.3)
    even = Pairs(pairs.logps, pairs.ref_logps, mask)
    ours = losses.orpo(*even.sums[:2], *even.lengths, beta=0.3, eps=0.0).mean()
    with_prompt = -torch.cat([prompt[:5], pairs.logps[:5]], dim=1).mean()
    assert differ(ours, theirs, pairs.logps)
    assert_agree(ours + even.means[0].mean() + with_prompt, theirs, pairs.logps)


def test_orpo_survives_certain_answers() -> None:
    certain = torch.tensor([0.0, -0.5], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    theirs = standin.orpo(certain, other, beta=0.3).sum()
    assert not gradients(theirs, certain)[0].isfinite().all()
    ours = losses.orpo(certain, other, torch.ones(2), torch.ones(2), beta=0.3).mean()
    assert ours.isfinite()
    assert gradients(ours, certain)[0].isfinite().all()


def test_simpo_has_no_likelihood_term() -> None:
    from trl.experimental.cpo import CPOConfig

    assert CPOConfig(output_dir="unused", loss_type="simpo", use_cpu=True, bf16=False).cpo_alpha == 1.0
    pairs = Pairs.make()
    hyper: dict[str, Any] = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7}
    ours = losses.simpo(*pairs.sums[:2], *pairs.lengths, beta=2.0, gamma=0.7).mean()
    assert differ(ours, standin.whole_step("cpo", pairs.logps, pairs.mask, **hyper), pairs.logps)
    assert_agree(ours, standin.whole_step("cpo", pairs.logps, pairs.mask, cpo_alpha=0.0, **hyper), pairs.logps)


# -- averaging ---------------------------------------------------------------------------------------------------------
def _halves(r: Rollouts) -> list[slice]:
    half = len(r.mask) // 2
    return [slice(None, half), slice(half, None)]


def test_token_means_do_not_depend_on_micro_batches() -> None:
    r = Rollouts.make()
    whole = standin.grpo(r.logps, r.old_logps, None, r.advantages, r.mask, loss_type="bnpo")
    parts = [
        standin.grpo(r.logps[s], r.old_logps[s], None, r.advantages[s], r.mask[s], loss_type="bnpo") / 2
        for s in _halves(r)
    ]
    assert differ(sum(parts, torch.zeros(())), whole, r.logps)
    count = sum(reduce.denominator(r.mask[s], "token_mean") for s in _halves(r))
    ours = torch.zeros((), dtype=torch.float64)
    for s in _halves(r):
        out = losses.ppo_clip(r.logps[s], r.old_logps[s], r.advantages[s], r.mask[s], clip_eps=0.2)
        ours = ours + reduce.numerator(out.loss, out.counted, "token_mean") / count
    assert_agree(ours, whole, r.logps)


def test_sft_term_does_not_depend_on_micro_batches() -> None:
    pairs = Pairs.make(pairs=4)
    chosen, chosen_mask = pairs.logps[:4], pairs.mask[:4]
    rows = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    parts = [
        standin.dpo(pairs.logps[i], pairs.ref_logps[i], pairs.mask[i], loss_type="sft", beta=0.3) / 2 for i in rows
    ]
    ours = sum(
        reduce.numerator(losses.sft(chosen[i[:2]], chosen_mask[i[:2]]).loss, chosen_mask[i[:2]], "token_mean")
        for i in rows
    ) / reduce.denominator(chosen_mask, "token_mean")
    assert differ(ours, parts[0] + parts[1], pairs.logps)
    _close(ours, losses.sft(chosen, chosen_mask).mean())


def test_dapo_divides_by_the_tokens_of_the_step() -> None:
    """TRL divides by an average step of the generation; two steps with few and many tokens show it."""
    r = Rollouts.make(tokens=5)
    short = r.mask & (torch.arange(5)[None] < 1)
    mask = torch.cat([short[:6], torch.ones_like(short[6:])])
    step = slice(0, 6)
    args = (r.logps[step], r.old_logps[step], None, r.advantages[step], mask[step])
    theirs = standin.grpo(*args, loss_type="dapo", generation_tokens=int(mask.sum()), steps_per_generation=2)
    ours = losses.ppo_clip(r.logps[step], r.old_logps[step], r.advantages[step], mask[step], clip_eps=0.2).mean()
    assert differ(ours, theirs, r.logps)
    average_step = mask.sum() / 2
    assert_agree(ours * mask[step].sum() / average_step, theirs, r.logps)


def test_empty_rows_count_in_no_mean() -> None:
    r = Rollouts.make()
    mask = r.mask.clone()
    mask[:4] = False
    theirs = standin.grpo(r.logps, r.old_logps, None, r.advantages, mask)
    ours = losses.ppo_clip(r.logps, r.old_logps, r.advantages, mask, clip_eps=0.2)
    mean = reduce.average(ours.loss, ours.counted, "sequence_mean")
    assert_agree(mean * 8 / 12, theirs, r.logps)


def test_empty_rows_do_not_make_metrics_nan() -> None:
    r = Rollouts.make(groups=1, group_size=2)
    logged: dict[str, Any] = {}
    mask = torch.zeros_like(r.mask)
    standin.grpo(r.logps, r.old_logps, None, r.advantages, mask, metrics=logged)
    assert math.isnan(logged["clip_ratio/low_min"][0])
    metrics = losses.ppo_clip(r.logps, r.old_logps, r.advantages, mask, clip_eps=0.2).metrics
    assert all(values.isfinite().all() for values in metrics.values())


# -- groups ------------------------------------------------------------------------------------------------------------
def test_cispo_bound_is_one_plus_epsilon() -> None:
    """TRL's default bound of 0.2 is below 1: on fresh samples it scales every gradient to a fifth."""
    r = Rollouts.make(drift=0.0)
    theirs = standin.grpo(r.logps, None, None, r.advantages, r.mask, loss_type="cispo", epsilon_high=0.2)
    ours = losses.cispo(r.logps, r.logps.detach(), r.advantages, r.mask, clip_eps_high=0.2).mean()
    (full,) = gradients(ours, r.logps)
    (fifth,) = gradients(theirs, r.logps)
    _close(fifth, 0.2 * full)
    policy_gradient = losses.reinforce(r.logps, r.advantages, r.mask)
    _close(full, gradients(reduce.average(policy_gradient.loss, r.mask, "token_mean"), r.logps)[0])


def test_rloo_charges_the_kl_of_the_current_policy() -> None:
    r = Rollouts.make(drift=0.3)
    old, ref = r.old_logps.where(r.mask, 0.0), r.ref_logps.where(r.mask, 0.0)
    stored = standin.advantages(r.rewards, group_size=4, loo=True, old_logps=old, ref_logps=ref, beta=0.2)
    theirs = standin.rloo(r.logps, r.old_logps, stored, r.mask)
    ours = losses.rloo(r.logps, r.ref_logps, r.rewards, r.group_ids, r.mask, beta=0.2).mean()
    assert not torch.allclose(gradients(ours, r.logps)[0], gradients(theirs, r.logps)[0], rtol=1e-2)
    # Ours is the gradient of AGRO's off-policy loss on the same stale samples.
    agro = losses.agro_off_policy(r.logps, r.ref_logps, r.rewards, r.group_ids, r.mask, beta=0.2).mean()
    _close(gradients(ours, r.logps)[0], gradients(agro, r.logps)[0])


def test_reverse_kl_gradient_on_stale_samples() -> None:
    """TRL weighs k3 by the ratio to the policy that sampled; ours is the current policy's own, never beyond one."""
    r = Rollouts.make(drift=0.5)
    zero = torch.zeros_like(r.advantages)
    theirs = standin.grpo(r.logps, r.old_logps, r.ref_logps, zero, r.mask, beta=0.3, use_bias_correction_kl=True)
    hyper: dict[str, Any] = {"clip_eps": 0.2, "beta": 0.3, "kl_gradient": "ratio_k3"}
    ours = losses.grpo(r.logps, r.old_logps, r.ref_logps, zero, r.mask, **hyper).mean()
    assert differ(ours, theirs, r.logps)
    fresh = standin.grpo(r.logps, None, r.ref_logps, zero, r.mask, beta=0.3, use_bias_correction_kl=True)
    assert_agree(ours, fresh, r.logps)


def test_truncated_rows_take_no_part_in_the_baseline() -> None:
    r = Rollouts.make(groups=1, group_size=4)
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    mask = r.mask.clone()
    mask[3] = False  # what mask_truncated_completions leaves of a truncated answer
    theirs = standin.advantages(rewards, group_size=4, scale_rewards="none")
    batch = Batch(
        prompt_ids=torch.ones(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        completion_ids=torch.ones_like(mask, dtype=torch.long),
        completion_mask=r.mask,
        mask=mask,
        group_ids=r.group_ids,
        rewards=rewards,
    )
    ours = Objective(losses.reinforce, advantage="group_mean").prepare(batch).advantages
    assert ours is not None
    _close(theirs[:3], torch.tensor([-0.5, -1.5, -1.5], dtype=torch.float64))
    _close(ours[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64))


def test_equal_rewards_give_exactly_no_advantage() -> None:
    rewards = torch.full((7,), 0.1)
    theirs = standin.advantages(rewards, group_size=7)
    assert theirs.abs().max() > 1e-5
    assert not advantages.group_norm(rewards, torch.zeros(7, dtype=torch.long)).any()


def test_k3_that_overflows_is_refused() -> None:
    r = Rollouts.make()
    far = (r.logps.detach() - 800).requires_grad_()
    theirs = standin.grpo(far, None, r.ref_logps, r.advantages, r.mask, beta=0.04)
    assert not theirs.isfinite()
    with pytest.raises(ValueError, match="overflows"):
        losses.grpo(far, far.detach(), r.ref_logps, r.advantages, r.mask, clip_eps=0.2, beta=0.04)


def test_defaults_of_grpo() -> None:
    from trl import GRPOConfig

    theirs = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert (theirs.beta, theirs.loss_type, theirs.epsilon) == (0.0, "dapo", 0.2)
    (term,) = recipes.build("grpo").terms
    assert (term.hyper["beta"], term.reduction, term.hyper["clip_eps"]) == (0.04, "sequence_mean", 0.2)


# -- unpaired ------------------------------------------------------------------------------------------------------------
def test_kto_baseline_is_one_number_per_step() -> None:
    r = Rollouts.make(1)
    labels = torch.arange(12) % 3 == 0
    ref_mismatched = r.old_logps.sum(-1)
    mismatched = ref_mismatched + torch.linspace(-1, 2, 12, dtype=torch.float64)
    parts = [
        standin.kto(r.logps[s], r.ref_logps[s], labels[s], mismatched[s], ref_mismatched[s], r.mask[s], beta=0.3) / 2
        for s in _halves(r)
    ]
    whole = standin.kto(r.logps, r.ref_logps, labels, mismatched, ref_mismatched, r.mask, beta=0.3)
    assert differ(parts[0] + parts[1], whole, r.logps)
    baseline = (mismatched - ref_mismatched).mean().clamp(min=0).expand(12)
    ours = [losses.kto(r.logps[s], r.ref_logps[s], labels[s], baseline[s], r.mask[s], beta=0.3) for s in _halves(r)]
    assert_agree(sum(o.loss.sum() for o in ours) / 12, whole, r.logps)
