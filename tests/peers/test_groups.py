"""Policy-gradient losses and advantages against TRL's GRPO and RLOO trainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from rlft import advantages, losses, reduce
from tests.peers import standin
from tests.peers.compare import ATOL, RTOL, Rollouts, assert_agree, gradients

pytestmark = pytest.mark.peers

CLIPS = [(0.2, 0.2), (0.2, 0.28)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("low", "high"), CLIPS)
def test_grpo(low: float, high: float, beta: float, seed: int) -> None:
    r = Rollouts.make(seed)
    ours = losses.grpo(
        r.logps, r.old_logps, r.ref_logps, r.advantages, r.mask, clip_eps=low, clip_eps_high=high, beta=beta
    )
    theirs = standin.grpo(
        r.logps, r.old_logps, r.ref_logps, r.advantages, r.mask, epsilon=low, epsilon_high=high, beta=beta
    )
    assert_agree(ours.mean(), theirs, r.logps)


def test_grpo_without_old_logps_is_on_policy() -> None:
    r = Rollouts.make()
    ours = losses.grpo(r.logps, r.logps.detach(), r.ref_logps, r.advantages, r.mask, clip_eps=0.2, beta=0.04)
    theirs = standin.grpo(r.logps, None, r.ref_logps, r.advantages, r.mask, beta=0.04)
    assert_agree(ours.mean(), theirs, r.logps)


def test_grpo_advantages_per_token() -> None:
    r = Rollouts.make()
    per_token = r.advantages[:, None] * torch.linspace(0.5, 1.5, r.mask.shape[1], dtype=torch.float64)
    ours = losses.grpo(r.logps, r.old_logps, r.ref_logps, per_token, r.mask, clip_eps=0.2, beta=0.04)
    theirs = standin.grpo(r.logps, r.old_logps, r.ref_logps, per_token, r.mask, beta=0.04)
    assert_agree(ours.mean(), theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss_type", "averaging", "length"),
    [
        ("grpo", "sequence_mean", None),
        ("bnpo", "token_mean", None),
        ("dapo", "token_mean", None),
        ("dr_grpo", "fixed_length", 10),
        ("luspo", "sequence_sum", None),
    ],
)
def test_one_surrogate_five_averagings(loss_type: str, averaging: Any, length: int | None, seed: int) -> None:
    r = Rollouts.make(seed)
    ours = losses.ppo_clip(r.logps, r.old_logps, r.advantages, r.mask, clip_eps=0.2, clip_eps_high=0.28)
    theirs = standin.grpo(
        r.logps,
        r.old_logps,
        None,
        r.advantages,
        r.mask,
        loss_type=loss_type,
        epsilon_high=0.28,
        max_completion_length=10,
    )
    assert_agree(reduce.average(ours.loss, ours.mask, averaging, length=length), theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss_type", "averaging", "length"),
    [
        ("grpo", "sequence_mean", None),
        ("dapo", "token_mean", None),
        ("dr_grpo", "fixed_length", 10),
        ("luspo", "sequence_sum", None),
    ],
)
def test_sequence_ratio_is_gspo(loss_type: str, averaging: Any, length: int | None, seed: int) -> None:
    r = Rollouts.make(seed)
    theirs = standin.grpo(
        r.logps,
        r.old_logps,
        None,
        r.advantages,
        r.mask,
        loss_type=loss_type,
        level="sequence",
        epsilon=0.03,
        epsilon_high=0.04,
        max_completion_length=10,
    )
    ours = losses.gspo(r.logps, r.old_logps, r.advantages, r.mask, clip_eps=0.03, clip_eps_high=0.04)
    assert_agree(reduce.average(ours.loss, ours.mask, averaging, length=length), theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
def test_gspo_token_has_gspo_gradients(seed: int) -> None:
    r = Rollouts.make(seed)
    ours = losses.gspo_token(r.logps, r.old_logps, r.advantages, r.mask, clip_eps=0.03, clip_eps_high=0.04).mean()
    theirs = standin.grpo(
        r.logps, r.old_logps, None, r.advantages, r.mask, level="sequence", epsilon=0.03, epsilon_high=0.04
    )
    assert_agree(ours, theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_with_the_bound_written_as_one_plus_epsilon(seed: int) -> None:
    r = Rollouts.make(seed)
    ours = losses.cispo(r.logps, r.old_logps, r.advantages, r.mask, clip_eps_high=0.2).mean()
    theirs = standin.grpo(r.logps, r.old_logps, None, r.advantages, r.mask, loss_type="cispo", epsilon_high=1.2)
    assert (r.logps - r.old_logps).exp()[r.mask].max() > 1.2
    assert_agree(ours, theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperatures", [(1.0, 1.05), (0.5, 2.0)])
def test_sapo(temperatures: tuple[float, float], seed: int) -> None:
    r = Rollouts.make(seed)
    ours = losses.sapo(
        r.logps,
        r.old_logps,
        r.advantages,
        r.mask,
        temperature_positive=temperatures[0],
        temperature_negative=temperatures[1],
    ).mean()
    theirs = standin.grpo(
        r.logps, r.old_logps, None, r.advantages, r.mask, loss_type="sapo", sapo_temperatures=temperatures
    )
    assert_agree(ours, theirs, r.logps)


@pytest.mark.parametrize("seed", range(3))
def test_two_sided_clipping_is_dual_clip(seed: int) -> None:
    """INTELLECT-2's delta bounds the ratio, dual clip the loss: for delta above 1 + epsilon they are the same thing."""
    r = Rollouts.make(seed, drift=1.0)
    assert ((r.logps - r.old_logps).exp() > 1.5)[r.mask & (r.advantages < 0)[:, None]].any()
    ours = losses.ppo_clip(r.logps, r.old_logps, r.advantages, r.mask, clip_eps=0.2, dual_clip=1.5)
    theirs = standin.grpo(r.logps, r.old_logps, None, r.advantages, r.mask, loss_type="bnpo", delta=1.5)
    assert_agree(ours.mean(), theirs, r.logps)


def test_kl_with_bias_correction_is_ratio_k3_on_fresh_samples() -> None:
    r = Rollouts.make()
    ours = losses.grpo(
        r.logps, r.logps.detach(), r.ref_logps, r.advantages, r.mask, clip_eps=0.2, beta=0.3, kl_gradient="ratio_k3"
    )
    theirs = standin.grpo(r.logps, None, r.ref_logps, r.advantages, r.mask, beta=0.3, use_bias_correction_kl=True)
    assert_agree(ours.mean(), theirs, r.logps)


def test_clip_metrics() -> None:
    r = Rollouts.make()
    theirs: dict[str, Any] = {}
    standin.grpo(r.logps, r.old_logps, r.ref_logps, r.advantages, r.mask, beta=0.04, epsilon_high=0.28, metrics=theirs)
    ours = losses.grpo(
        r.logps, r.old_logps, r.ref_logps, r.advantages, r.mask, clip_eps=0.2, clip_eps_high=0.28, beta=0.04
    ).metrics
    for name in ("clip_ratio/low", "clip_ratio/high", "clip_ratio/region"):
        assert 0 < theirs[f"{name}_mean"][0] < 1
        assert ours[name][r.mask].mean().item() == pytest.approx(theirs[f"{name}_mean"][0], rel=1e-6)
    assert ours["kl"][r.mask].mean().item() == pytest.approx(theirs["kl"][0], rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_on_fresh_samples(seed: int) -> None:
    """The gradient on fresh samples; ours works out the advantages itself, so TRL's must be the same ones."""
    r = Rollouts.make(seed, drift=0.0)
    fresh = r.logps.detach().where(r.mask, 0.0)
    beta = 0.1
    scored = standin.advantages(
        r.rewards, group_size=4, loo=True, old_logps=fresh, ref_logps=r.ref_logps.where(r.mask, 0.0), beta=beta
    )
    theirs = standin.rloo(r.logps, fresh, scored, r.mask)
    ours = losses.rloo(r.logps, r.ref_logps, r.rewards, r.group_ids, r.mask, beta=beta).mean()
    (mine,), (peers,) = gradients(ours, r.logps), gradients(theirs, r.logps)
    assert peers.abs().max() > 1e-3
    torch.testing.assert_close(mine, peers, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_with_clipping_is_the_sequence_level_surrogate(seed: int) -> None:
    """TRL's RLOO clips the ratio of whole answers; with stored advantages that is PPO on sums."""
    r = Rollouts.make(seed, drift=0.2)
    sums = [x.where(r.mask, 0.0).sum(-1, keepdim=True) for x in (r.logps, r.old_logps)]
    whole = torch.ones_like(r.mask[:, :1])
    ours = losses.ppo_clip(*sums, r.advantages, whole, clip_eps=0.2).mean()
    assert_agree(ours, standin.rloo(r.logps, r.old_logps, r.advantages, r.mask), r.logps)


REWARDS = torch.tensor([1.0, 0, 0, 1, 0.5, 1, 2, 3, 1, 1, 1, 1], dtype=torch.float64)
UNSCORED = REWARDS.clone().index_fill_(0, torch.tensor([1, 4, 8, 9, 10]), torch.nan)
GROUPS = torch.arange(3).repeat_interleave(4)


@pytest.mark.parametrize("rewards", [REWARDS, UNSCORED], ids=["all scored", "some unscored"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda r: advantages.group_norm(r, GROUPS), {"scale_rewards": "group"}),
        (lambda r: advantages.group_mean(r, GROUPS), {"scale_rewards": "none"}),
        (lambda r: advantages.leave_one_out(r, GROUPS), {"loo": True}),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_group_advantages(ours: Any, theirs: dict[str, Any], rewards: torch.Tensor) -> None:
    expected = standin.advantages(rewards, group_size=4, **theirs)
    assert expected.abs().max() > 0.4
    torch.testing.assert_close(ours(rewards), expected, rtol=RTOL, atol=ATOL)
