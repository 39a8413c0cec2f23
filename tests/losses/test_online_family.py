"""The wider online family: ratios, pairs of rollouts, preference oracles, importance weights, reward models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import advantages, losses
from rlft.losses.importance import importance_weights, reweight
from rlft.worlds import World, expected_loss
from tests.losses.enumeration import Setting, early_eos, small
from tests.losses.test_online import tokens

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-12}
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def gradient(output: losses.LossOutput, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(output.loss.sum(), leaf)[0]


def one_token(ratio: float, loss, advantage: float = 1.0, **hyper) -> tuple[float, float]:
    """Loss and slope in logp for one token of the given ratio."""
    leaf = torch.tensor([[-1.0]], dtype=F64, requires_grad=True)
    old = leaf.detach() - math.log(ratio)
    output = loss(leaf, old, torch.tensor([advantage], dtype=F64), torch.ones(1, 1).bool(), **hyper)
    return output.loss.item(), gradient(output, leaf).item()


FRESH = [
    (losses.trpo, {}),
    (losses.ppo_penalty, {"beta": 0.5}),
    (losses.gspo_token, {"clip_eps": 0.2}),
    (losses.cispo, {"clip_eps_high": 0.2}),
    (losses.sapo, {}),
]


@pytest.mark.parametrize(("loss", "hyper"), FRESH, ids=lambda v: getattr(v, "__name__", ""))
def test_on_fresh_samples_the_gradient_is_reinforce(loss, hyper: dict) -> None:
    logps, _, _, a, mask = tokens()
    found = gradient(loss(logps, logps.detach(), a, mask, **hyper), logps)
    torch.testing.assert_close(found, gradient(losses.reinforce(logps, a, mask), logps), **TIGHT)


def test_ppo_penalty_by_hand_and_its_step_kl() -> None:
    value, slope = one_token(1.5, losses.ppo_penalty, beta=0.4)
    assert value == pytest.approx(-1.5 + 0.4 * (0.5 - math.log(1.5)), rel=1e-12)
    assert slope == pytest.approx(-1.5 + 0.4 * 0.5, rel=1e-12)
    # Expected over tokens of the old policy, value and gradient of the penalty are those of KL(old || pi).
    s = Setting(World.bandit(5))
    old, zero = s.world.token_logps(s.behaviour_logits), torch.zeros(5, dtype=F64)
    output = losses.ppo_penalty(s.logps, old, zero, s.world.mask, beta=1.0)
    mean, kl = (s.behaviour * output.loss.sum(-1)).sum(), s.world.kl(s.behaviour_logits, s.logits)
    torch.testing.assert_close(mean, kl, **EXACT)
    torch.testing.assert_close(s.gradient(mean), s.gradient(kl), **EXACT)


def test_gspo_by_hand() -> None:
    """Row 0: log-ratios .3 and -.1, mean .1; row 1: one token, ratio 2, clipped."""
    logps = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], dtype=F64, requires_grad=True)
    old = torch.tensor([[-1.3, -0.9], [-1.0 - math.log(2), 0.0]], dtype=F64)
    mask, a = torch.tensor([[1, 1], [1, 0]]).bool(), torch.tensor([2.0, 1.0], dtype=F64)
    output = losses.gspo(logps, old, a, mask, clip_eps=0.2)
    s = math.exp(0.1)
    torch.testing.assert_close(output.loss.detach(), torch.tensor([[-2 * s, -2 * s], [-1.2, 0]], dtype=F64), **TIGHT)
    assert output.mean().item() == pytest.approx((-2 * s - 1.2) / 2, rel=1e-13)
    output.mean().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-s / 2, -s / 2], [0, 0]], dtype=F64), **TIGHT)
    assert output.metrics["clip_ratio/high"].tolist() == [[0, 0], [1, 0]]
    with pytest.raises(ValueError, match="advantages must have one entry per row"):
        losses.gspo(logps, old, a[:, None].expand(2, 2), mask, clip_eps=0.2)


@pytest.mark.parametrize("eps", [0.2, 1e-3])
def test_gspo_token_has_the_gradient_of_gspo(eps: float) -> None:
    logps, old, _, a, mask = tokens()
    both = [loss(logps, old, a, mask, clip_eps=eps) for loss in (losses.gspo, losses.gspo_token)]
    torch.testing.assert_close(both[0].loss, both[1].loss, **TIGHT)
    grads = [torch.autograd.grad(o.mean(), logps)[0] for o in both]
    torch.testing.assert_close(grads[0], grads[1], **TIGHT)
    one = [x[:, :1] for x in (logps, old)]  # with one token both are PPO
    plain = losses.ppo_clip(*one, a, mask[:, :1], clip_eps=eps).loss
    torch.testing.assert_close(losses.gspo(*one, a, mask[:, :1], clip_eps=eps).loss, plain, **TIGHT)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (0.9, 0.9), (1.5, 1.3), (2.5, 1.3)])
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_cispo_keeps_every_gradient(ratio: float, weight: float, advantage: float) -> None:
    value, slope = one_token(ratio, losses.cispo, advantage, clip_eps_high=0.3)
    assert slope == pytest.approx(-weight * advantage, rel=1e-12)
    assert value == pytest.approx(weight * advantage, rel=1e-12)  # logp is -1
    _, slope = one_token(ratio, losses.cispo, advantage, clip_eps_high=0.3, clip_eps=0.2)
    assert slope == pytest.approx(-max(weight, 0.8) * advantage, rel=1e-12)


def test_cispo_at_ratio_one_is_not_scaled_down() -> None:
    """The bound is 1 + clip_eps_high: read as the weight itself, 0.2 would leave a fifth of the gradient."""
    assert one_token(1.0, losses.cispo, clip_eps_high=0.2)[1] == pytest.approx(-1.0, rel=1e-12)


def test_sapo_by_hand() -> None:
    for advantage, tau in ((1.5, 2.0), (-1.5, 3.0)):
        value, slope = one_token(1.4, losses.sapo, advantage, temperature_positive=2.0, temperature_negative=3.0)
        gate = 1 / (1 + math.exp(-tau * 0.4))
        assert value == pytest.approx(-4 / tau * gate * advantage, rel=1e-12)
        assert slope == pytest.approx(-4 * gate * (1 - gate) * 1.4 * advantage, rel=1e-12)


def test_sapo_becomes_importance_weighting_as_tau_vanishes() -> None:
    _, slope = one_token(1.4, losses.sapo, temperature_positive=1e-5)
    assert slope == pytest.approx(-1.4, rel=1e-9)


# -- p3o --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clipping", "make", "n"),
    [("separate", early_eos, 2), ("joint", early_eos, 2), ("separate", small, 3), ("joint", small, 3)],
)
def test_p3o_unclipped_is_unbiased_whoever_sampled(clipping: str, make, n: int) -> None:
    s = make()
    hyper = {"clip_eps": 1.0, "clip_eps_high": 1e9, "clipping": clipping}
    for mu_logits in (s.behaviour_logits, s.logits.detach()):
        mu, old = s.world.answer_logps(mu_logits).exp(), s.world.token_logps(mu_logits).detach()
        found = s.gradient(
            expected_loss(s.world, n, mu, lambda i, g, o=old: s.call(losses.p3o, i, g, old_logps=o[i], **hyper))
        )
        torch.testing.assert_close(found, -s.objective_gradient(), **EXACT)


def test_p3o_joint_averages_pairs() -> None:
    s = early_eos()
    hyper = {"clip_eps": 0.2, "clipping": "joint"}
    answers = torch.tensor([0, 5, 9])
    whole = s.gradient(s.call(losses.p3o, answers, torch.zeros(3).long(), **hyper).mean())
    pairs = [
        s.gradient(s.call(losses.p3o, answers[[i, j]], torch.zeros(2).long(), **hyper).mean())
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(whole, sum(pairs) / 3, **TIGHT)


def test_p3o_by_hand() -> None:
    """R = 1 and 0, ratios 1.5 and 1.1: separately the first is clipped away; jointly the weight 1.65 becomes 1.2."""
    logps = torch.tensor([[-1.0], [-1.0]], dtype=F64, requires_grad=True)
    old = logps.detach() - torch.tensor([[1.5], [1.1]], dtype=F64).log()
    r, ids, mask = torch.tensor([1.0, 0.0], dtype=F64), torch.zeros(2).long(), torch.ones(2, 1).bool()
    common = (logps, old, old, r, ids, mask)
    separate = losses.p3o(*common, beta=0.0, clip_eps=0.2)
    assert separate.loss.tolist() == pytest.approx([-1.2, 1.1], rel=1e-12)
    assert torch.autograd.grad(separate.mean(), logps)[0].flatten().tolist() == pytest.approx([0, 0.55], rel=1e-12)
    assert separate.metrics["clip_ratio/region"].tolist() == [1, 0]
    joint = losses.p3o(*common, beta=0.0, clip_eps=0.2, clipping="joint")
    assert torch.autograd.grad(joint.mean(), logps)[0].flatten().tolist() == pytest.approx([-0.6, 0.6], rel=1e-12)
    assert joint.metrics["clip_ratio/region"].tolist() == [1, 1]


def test_p3o_products_of_strangers_do_not_matter() -> None:
    """Joint weights are of pairs alone: answers to different prompts may multiply to more than the dtype holds."""
    logps = torch.full((4, 1), -1.0)
    old = torch.tensor([[-31.0], [-1.0], [-31.0], [-1.0]])
    ids, r = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    output = losses.p3o(logps, old, logps, r, ids, torch.ones(4, 1).bool(), beta=0.0, clip_eps=0.2, clipping="joint")
    assert output.loss.isfinite().all()


def test_p3o_on_fresh_samples_is_rloo() -> None:
    logps, _, ref, r, mask = tokens()
    ids = torch.tensor([0, 1, 0, 1])
    rloo = torch.autograd.grad(losses.rloo(logps, ref, r, ids, mask, beta=0.3).mean(), logps)[0]
    for clipping in ("separate", "joint"):
        output = losses.p3o(logps, logps.detach(), ref, r, ids, mask, beta=0.3, clip_eps=0.2, clipping=clipping)
        torch.testing.assert_close(torch.autograd.grad(output.mean(), logps)[0], rloo, **TIGHT)


# -- nash -------------------------------------------------------------------------------------------------------------


def preference(s: Setting) -> Tensor:
    """P(i beats j), not from any reward: cycles are possible."""
    g = torch.Generator().manual_seed(3)
    raw = torch.rand(s.world.num_answers, s.world.num_answers, generator=g, dtype=F64)
    return (raw + 1 - raw.T) / 2


def test_nash_md_ascends_the_regularised_win_rate() -> None:
    """y from the policy, y' from any fixed opponent: the gradient of P(pi beats opponent) - beta KL(pi || ref)."""
    s = early_eos()
    table = preference(s)
    opponent = s.behaviour
    i = torch.arange(s.world.num_answers).repeat_interleave(s.world.num_answers)
    j = torch.arange(s.world.num_answers).repeat(s.world.num_answers)
    output = losses.nash_md_pg(s.logps[i], s.ref_logps[i], table[i, j], s.world.mask[i], beta=s.beta)
    weights = s.policy.detach()[i] * opponent[j]
    target = s.world.expected(table @ opponent, s.logits) - s.beta * s.world.kl(s.logits, s.ref)
    torch.testing.assert_close(s.gradient((weights * output.loss.sum(-1)).sum()), -s.gradient(target), **EXACT)


def test_nash_md_rests_at_the_best_answer_to_the_opponent() -> None:
    s = early_eos()
    wins = preference(s) @ s.behaviour
    s.logits = s.world.optimal_logits(s.ref, wins, s.beta).requires_grad_()
    output = losses.nash_md_pg(s.logps, s.ref_logps, wins, s.world.mask, beta=s.beta)
    assert s.gradient((s.policy.detach() * output.loss.sum(-1)).sum()).abs().max() < 1e-13


def test_nash_md_even_matches_at_the_reference_are_silent_and_unanswered_ones_no_members() -> None:
    logps, _, _, _, mask = tokens()
    rates = torch.tensor([0.5, 0.5, math.nan, 0.9], dtype=F64)
    output = losses.nash_md_pg(logps, logps.detach(), rates, mask, beta=0.3)
    assert output.loss[:3].eq(0).all()
    assert not output.counted[2].any()
    assert output.counted[3].any()
    with pytest.raises(ValueError, match=r"win_rates must lie in \[0, 1\], got -0\.5"):
        losses.nash_md_pg(logps, logps.detach(), rates - 1, mask, beta=0.3)


def test_ipo_md_rests_at_the_best_answer_to_the_mixture() -> None:
    """Both answers drawn from one distribution: the minimiser is pi* of the win rate against it."""
    s = early_eos()
    table = preference(s)
    i, j = s.world.tuples(2).unbind(-1)
    weights = s.behaviour[i] * s.behaviour[j]
    s.logits = s.world.optimal_logits(s.ref, table @ s.behaviour, s.beta).requires_grad_()
    logps, ref = s.world.answer_logps(s.logits), s.world.answer_logps(s.ref)
    loss = losses.ipo_md(logps[i], logps[j], ref[i], ref[j], table[i, j], beta=s.beta).loss
    assert s.gradient((weights * loss).sum()).abs().max() < 1e-13


# -- importance weights -----------------------------------------------------------------------------------------------


def test_importance_weights_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, math.nan]], dtype=F64)
    ratio = torch.tensor([[0.5, 1.5, 4.0], [1.2, 1.25, 1.0]], dtype=F64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    common = {"mask": mask, "cap": 2.0}

    def weights(**hyper) -> Tensor:
        return importance_weights(old, old - ratio.log(), **common, **hyper)

    close = torch.testing.assert_close
    table = torch.tensor([[0.5, 1.5, 2.0], [1.2, 1.25, 0]], dtype=F64)
    close(weights(level="token", mode="truncate"), table, **TIGHT)
    close(weights(level="token", mode="truncate", floor=0.8), table.clamp(min=0.8) * mask, **TIGHT)
    table = torch.tensor([[0.5, 1.5, 0], [1.2, 1.25, 0]], dtype=F64)
    close(weights(level="token", mode="mask"), table, **TIGHT)
    close(weights(level="token", mode="mask", floor=0.8), table.where(table > 0.8, 0.0), **TIGHT)
    table = torch.tensor([[2, 2, 2], [1.5, 1.5, 0]], dtype=F64)
    close(weights(level="sequence", mode="truncate"), table, **TIGHT)
    close(weights(level="sequence", mode="mask"), table.where(table < 2, 0.0), **TIGHT)


def test_importance_weights_never_overflow_and_are_constants() -> None:
    far, near, mask = torch.full((1, 2), -1e4), torch.full((1, 2), -0.1, requires_grad=True), torch.ones(1, 2).bool()
    for mode, value in (("truncate", 3.0), ("mask", 0.0)):
        found = importance_weights(near, far, mask, level="sequence", mode=mode, cap=3.0)
        torch.testing.assert_close(found, torch.full((1, 2), value), rtol=1e-6, atol=0)
        assert not found.requires_grad
    with pytest.raises(ValueError, match="level must be one of token, sequence"):
        importance_weights(near, far, mask, level="row", mode="mask", cap=3.0)
    with pytest.raises(ValueError, match="floor must be >= 0 and <= 3"):
        importance_weights(near, far, mask, level="token", mode="mask", cap=3.0, floor=4.0)


def test_sequence_weights_make_reinforce_unbiased() -> None:
    """Answers from another policy, weighted by the whole ratio: the policy gradient, exactly."""
    s = early_eos()
    old = s.world.token_logps(s.behaviour_logits)
    weights = importance_weights(s.logps, old, s.world.mask, level="sequence", mode="truncate", cap=1e9)
    output = reweight(losses.reinforce(s.logps, s.rewards, s.world.mask), weights)
    found = s.gradient((s.behaviour * output.loss.sum(-1)).sum())
    torch.testing.assert_close(found, -s.gradient(s.world.expected(s.rewards, s.logits)), **EXACT)
    assert torch.equal(output.metrics["sampling/importance_sampling_ratio"], weights)
    with pytest.raises(ValueError, match="weights must have the shape of loss"):
        reweight(losses.reinforce(s.logps, s.rewards, s.world.mask), weights[:, :1])


# -- reinforce++ ------------------------------------------------------------------------------------------------------


def test_batch_normalised_advantages() -> None:
    r, ids = torch.tensor([1.0, 0.0, math.nan, 5.0, 3.0], dtype=F64), torch.tensor([0, 0, 0, 1, 1])
    kept = r[[0, 1, 3, 4]]
    found = advantages.batch_norm(r, ids, eps=0.0)
    torch.testing.assert_close(found[[0, 1, 3, 4]], (kept - kept.mean()) / kept.std(), **TIGHT)
    assert found[2] == 0
    centred = torch.tensor([0.5, -0.5, 1.0, -1.0], dtype=F64)
    found = advantages.group_mean_batch_norm(r, ids, eps=0.0)
    torch.testing.assert_close(found[[0, 1, 3, 4]], centred / centred.std(), **TIGHT)
    for advantage in (advantages.batch_norm, advantages.group_mean_batch_norm):
        assert advantage(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])).eq(0).all()
        huge = advantage(torch.tensor([1e30, -1e30, 0.0, 0.0]), torch.zeros(4).long())
        assert huge.isfinite().all()
        assert huge[0] > 1


# -- supervised and reward models -------------------------------------------------------------------------------------


def test_distillation_mixes_soft_and_hard() -> None:
    s = early_eos()
    teacher = s.behaviour_logits
    log_ratio = s.world.log_ratio_table(teacher, s.logits)
    teacher_kl = s.world.token_expectation(log_ratio, teacher)
    output = losses.distillation(s.logps, teacher_kl, s.world.mask, soft_weight=0.7)
    torch.testing.assert_close(output.loss, 0.7 * teacher_kl - 0.3 * s.logps, **TIGHT)
    hard = losses.distillation(s.logps, teacher_kl, s.world.mask, soft_weight=0.0)
    torch.testing.assert_close(hard.loss, losses.sft(s.logps, s.world.mask).loss, **TIGHT)
    soft = losses.distillation(s.logps, teacher_kl, s.world.mask, soft_weight=1.0)
    torch.testing.assert_close(
        (s.behaviour * soft.loss.sum(-1)).sum(), s.world.kl(teacher, s.logits), **EXACT
    )  # along the teacher's own answers the token KLs add up to the KL
    s.logits = teacher.clone().requires_grad_()
    kl = s.world.token_expectation(s.world.log_ratio_table(teacher, s.logits), teacher)
    assert s.gradient(losses.distillation(s.logps, kl, s.world.mask, soft_weight=1.0).mean()).abs().max() < 1e-15


def test_reward_ranking_is_bradley_terry_over_pairs() -> None:
    scores = torch.tensor([0.3, 1.2, -0.5, 2.0, 1.0], dtype=F64, requires_grad=True)
    rewards, ids = torch.tensor([2.0, 1.0, 0.0, 5.0, 7.0], dtype=F64), torch.tensor([0, 0, 0, 1, 1])
    mask = torch.ones(5, 2).bool()
    output = losses.reward_ranking(scores, rewards, ids, mask)
    first = losses.bradley_terry(scores[[0, 0, 1]], scores[[1, 2, 2]]).mean()
    second = losses.bradley_terry(scores[[4]], scores[[3]]).mean()
    torch.testing.assert_close(output.loss[:3].mean(), first, **TIGHT)
    torch.testing.assert_close(output.loss[3:].mean(), second, **TIGHT)
    a = torch.autograd.grad(output.loss[:3].mean(), scores, retain_graph=True)[0]
    torch.testing.assert_close(a, torch.autograd.grad(first, scores)[0], **TIGHT)
    torch.testing.assert_close(
        output.metrics["accuracy"], torch.tensor([0.5, 1, math.nan, math.nan, 0], dtype=F64), equal_nan=True
    )
    tied = losses.reward_ranking(scores, torch.ones(5, dtype=F64), ids, mask)
    assert tied.loss.eq(0).all()


def test_reward_regression_and_labels_by_hand() -> None:
    scores, mask = torch.tensor([0.5, -1.0, 2.0], dtype=F64), torch.tensor([[1], [1], [0]]).bool()
    output = losses.reward_regression(scores, torch.tensor([1.0, math.nan, 0.0], dtype=F64), mask)
    assert output.loss.tolist() == [0.125, 0, 0]
    assert output.counted.tolist() == [True, False, False]
    assert output.metrics["error"][0] == -0.5
    output = losses.reward_binary(scores, torch.tensor([True, True, False]), mask)
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.0)), 0]
    assert output.loss.tolist() == pytest.approx(expected, rel=1e-13)
    assert output.metrics["accuracy"][:2].tolist() == [1, 0]
    values = torch.tensor([[0.5, -1.0]], dtype=F64)
    output = losses.process_reward(values, torch.tensor([[1.0, 0.25]], dtype=F64), torch.ones(1, 2).bool())
    soft = 0.25 * math.log1p(math.exp(1.0)) + 0.75 * math.log1p(math.exp(-1.0))
    assert output.loss.flatten().tolist() == pytest.approx([math.log1p(math.exp(-0.5)), soft], rel=1e-13)
    assert output.metrics["accuracy"].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"step_labels must lie in \[0, 1\], got 3"):
        losses.process_reward(values, torch.tensor([[1.0, 3.0]], dtype=F64), torch.ones(1, 2).bool())


def test_importance_weights_at_their_bounds() -> None:
    old, mask = torch.zeros(1, 4, dtype=F64), torch.ones(1, 4).bool()
    ratio = torch.tensor([[2.0, 2.5, 1.0, 0.5]], dtype=F64)
    sampler = -torch.tensor([[math.log(r) for r in ratio[0].tolist()]], dtype=F64).abs()
    old[0, 3] = sampler[0, 3]  # the last token has the ratio 1/2
    sampler[0, 3] = 0.0
    common = {"level": "token", "mode": "mask"}
    kept = importance_weights(old, sampler, mask, cap=2.0, floor=1.0, **common)
    torch.testing.assert_close(kept, torch.tensor([[2.0, 0, 1, 0]], dtype=F64), **TIGHT)  # both bounds are inside
    small = importance_weights(old, sampler, mask, cap=0.5, **common)
    torch.testing.assert_close(small, torch.tensor([[0, 0, 0, 0.5]], dtype=F64), **TIGHT)
    for cap in (0.0, -1.0):
        with pytest.raises(ValueError, match="cap must be > 0"):
            importance_weights(old, sampler, mask, cap=cap, floor=0.0, **common)
    with pytest.raises(ValueError, match="mode must be one of truncate, mask"):
        importance_weights(old, sampler, mask, cap=1.0, level="token", mode="cut")


def test_nash_md_takes_certain_wins_and_leaves_unanswered_rows_out_of_the_metrics() -> None:
    logps, _, ref, _, mask = tokens()
    rates = torch.tensor([0.0, 1.0, math.nan, 0.5], dtype=F64)
    metrics = losses.nash_md_pg(logps, ref, rates, mask, beta=0.3).metrics
    assert metrics["win_rate"].tolist() == [0, 1, 0, 0.5]
    assert metrics["kl"][2].eq(0).all()
    assert metrics["objective/kl"][2] == 0
    assert metrics["kl"][1].abs().sum() > 0


def test_one_negative_baseline_is_enough_to_refuse() -> None:
    logps, _, ref, _, mask = tokens()
    baseline, labels = torch.tensor([0.1, -0.1, 0.2, 0.3], dtype=F64), torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match=r"kl_baseline must be >= 0, got -0\.1"):
        losses.kto(logps, ref, labels, baseline, mask, beta=0.1)
    for edge in (torch.zeros(4, dtype=F64), baseline.abs()):
        losses.kto(logps, ref, labels, edge, mask, beta=0.1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (5.0, -0.5, 1.5, 0.0),  # bounded by 3 A
        (2.0, -0.5, 1.0, 1.0),  # below that bound, and never clipped from above
        (5.0, 0.5, -0.6, 0.0),  # the bound is for A < 0 alone
        (1.1, 0.5, -0.55, -0.55),
        (5.0, -3.0, 9.0, 0.0),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, value: float, slope: float) -> None:
    found = one_token(ratio, losses.ppo_clip, advantage, clip_eps=0.2, dual_clip=3.0)
    assert found == pytest.approx((value, slope), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_token_without_advantage_is_not_clipped(ratio: float) -> None:
    leaf, mask = torch.full((1, 1), -1.0, dtype=F64), torch.ones(1, 1).bool()
    for dual_clip in (None, 3.0):
        output = losses.ppo_clip(
            leaf, leaf - math.log(ratio), torch.zeros(1, dtype=F64), mask, clip_eps=0.2, dual_clip=dual_clip
        )
        for name in ("low", "high", "region"):
            assert output.metrics[f"clip_ratio/{name}"].item() == 0


def test_reward_ranking_row_by_row() -> None:
    """Row 0 beats 1 and 2, row 1 beats 2: each carries its own wins, times 3 answers over 3 pairs; ties are not right."""
    scores, rewards = torch.tensor([0.5, 0.5, -1.0], dtype=F64), torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    output = losses.reward_ranking(scores, rewards, torch.zeros(3).long(), torch.ones(3, 1).bool())
    far = math.log1p(math.exp(-1.5))
    assert output.loss.tolist() == pytest.approx([math.log(2) + far, far, 0], rel=1e-13)
    assert output.metrics["accuracy"][:2].tolist() == [0.5, 1]
    assert output.metrics["accuracy"][2].isnan()


def test_reward_binary_and_process_reward_by_hand() -> None:
    """Scores 0.5, -1, 0, 0 for labels good, bad, good, bad: a score of zero says bad."""
    scores, labels = torch.tensor([0.5, -1.0, 0.0, 0.0], dtype=F64), torch.tensor([True, False, True, False])
    loss = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(-1.0)), math.log(2), math.log(2)]
    binary = losses.reward_binary(scores, labels, torch.ones(4, 2).bool())
    assert binary.loss.tolist() == pytest.approx(loss, rel=1e-13)
    assert binary.metrics["accuracy"].tolist() == [1, 1, 0, 1]
    wide, mask = scores[None], torch.ones(1, 4).bool()
    steps = losses.process_reward(wide, labels[None].double(), mask)
    assert steps.loss[0].tolist() == pytest.approx(loss, rel=1e-13)
    half = losses.process_reward(wide, torch.full((1, 4), 0.5, dtype=F64), mask)  # a label of one half says bad
    assert half.metrics["accuracy"].tolist() == [[0, 1, 1, 1]]
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"step_labels must lie in \[0, 1\]"):
            losses.process_reward(wide, torch.tensor([[0.5, bad, 0.0, 1.0]], dtype=F64), mask)
