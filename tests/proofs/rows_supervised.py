"""Supervised learning and thumbs: what each is equal to, and where it goes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.proofs import changes as c
from tests.proofs.proof import Change, Equal, Limit, Row, Value, row
from tests.proofs.scene import F64, Scene, groups, whole_pairs

B = 0.3
BETA = {"beta": B}
SFT = row("sft")


def flat_rewards(s: Scene) -> Scene:
    """Every answer earns the same: no advantage."""
    return s.but(rewards=torch.zeros_like(s.rewards))


def teacher_alone(s: Scene) -> Scene:
    return flat_rewards(s).but(token_kl=s.outputs["teacher_kl"])


def complement(eps: float) -> Change:
    """The log-probs of undesirable tokens replaced by those of anything else, ``log(1 - (1 - eps) p)``."""

    def change(s: Scene) -> Scene:
        assert s.batch.labels is not None
        against = torch.log(1 - (1 - eps) * s.logps.where(s.mask, -1.0).exp())
        return s.but(logps=torch.where(s.batch.labels[:, None], s.logps, against))

    return change


def _good_share(s: Scene) -> Tensor:
    assert s.batch.labels is not None
    return (s.mask & s.batch.labels[:, None]).sum().to(F64) / s.mask.sum()


def _all_good(s: Scene) -> Scene:
    return s.but(labels=torch.ones_like(s.mask[:, 0]))


def _kto_by_apo(s: Scene) -> Tensor:
    """Half of 1.5 (1 - sigmoid(beta (S_w - z0))) + 0.5 sigmoid(beta (S_l - z0)); apo_zero against z0 itself gives each alone."""
    moved = {side: (lambda t, k=k: c.ratio(k)(t) - 0.3) for k, side in enumerate(("chosen", "rejected"))}
    level = {"chosen": c.constant(0.0), "rejected": c.constant(0.0)}
    apo = row("apo_zero", beta=B)
    good = apo.on(c.with_ratio_of(**{**level, "chosen": moved["chosen"]})) - 0.5
    bad = apo.on(c.with_ratio_of(**{**level, "rejected": moved["rejected"]})) - 0.5
    return 0.5 * (1.5 * good + 0.5 * bad)(s)


SUPERVISED = [
    Row(
        "sft",
        [{}],
        groups,
        equals=[
            Equal("`distillation` without the soft term", row("distillation", soft_weight=0.0)),
            Equal(
                "`reinforce` with advantage 1, averaged over tokens",
                row("reinforce", advantage="given", averaging="token_mean").on(c.but(advantages=c.everywhere(1.0))),
            ),
        ],
        limits=[
            Limit(
                "soft_weight → 0",
                "`distillation` becomes it",
                lambda x: row("distillation", soft_weight=x),
                SFT,
            ),
            Limit(
                "no undesirable answer",
                "`unlikelihood` is it",
                lambda x: row("unlikelihood").on(lambda s: s.but(labels=torch.ones_like(s.mask[:, 0]))),
                SFT,
                at=(0.0,),
                order=None,
            ),
        ],
    ),
    Row(
        "distillation",
        [{"soft_weight": 0.7}],
        groups,
        equals=[
            Equal(
                "0.3 `sft` + 0.7 `kl_policy_gradient_exact` at beta 1 without rewards, averaged over tokens",
                0.3 * SFT + 0.7 * row("kl_policy_gradient_exact", beta=1.0, averaging="token_mean").on(teacher_alone),
            )
        ],
        limits=[
            Limit("soft_weight → 0", "`sft`", lambda x: row("distillation", soft_weight=x), SFT),
            Limit(
                "1 - soft_weight → 0",
                "the teacher's KL alone",
                lambda x: row("distillation", soft_weight=1 - x),
                Value(lambda s: s.outputs["teacher_kl"][s.mask].mean()),
            ),
        ],
    ),
    Row(
        "unlikelihood",
        [{"weight": 0.5}, {"eps": 0.01}],
        groups,
        equals=[
            Equal(
                "`sft` with 1 - (1 - eps) p in place of p in undesirable answers",
                SFT.on(complement(0.01)),
                row("unlikelihood", eps=0.01),
                when="weight is 1",
            )
        ],
        limits=[
            Limit(
                "weight → 0",
                "`sft` on desirable answers, times their share of the tokens",
                lambda x: row("unlikelihood", weight=x),
                SFT.on(c.desirable_alone) * _good_share,
            ),
            Limit("eps → 0", "the paper's -log(1 - p)", lambda x: row("unlikelihood", eps=x), SFT.on(complement(0.0))),
        ],
    ),
    Row(
        "kto",
        [BETA, {"beta": B, "desirable_weight": 1.5, "undesirable_weight": 0.5}],
        groups,
        equals=[
            Equal(
                "1/2 `apo_zero`",
                0.5 * row("apo_zero", beta=B),
                row("kto", beta=B).on(c.but(kl_baseline=c.everywhere(0.0))),
                when="every prompt has one desirable and one undesirable answer, and z0 is 0",
                scene=whole_pairs,
            ),
            Equal(
                "`apo_zero` of log-ratios less z0, weighted",
                Value(_kto_by_apo),
                row("kto", beta=B, desirable_weight=1.5, undesirable_weight=0.5),
                when="weights are 1.5 and 0.5 and z0 is 0.3",
                scene=whole_pairs,
            ),
        ],
        limits=[
            Limit(
                "beta → 0",
                "(loss - 1/2)/beta is ∓(S - z0)/4",
                lambda x: (row("kto", beta=x) - 0.5) / x,
                Value(c.over_rows(lambda s: c.sign(s) * -(c.log_ratio(s) - 0.3) / 4)),
                order=2.0,
                at=(0.1, 0.03, 0.01),
            ),
            Limit(
                "no undesirable answer",
                "its weight does nothing",
                lambda x: row("kto", beta=B, undesirable_weight=x).on(_all_good),
                row("kto", beta=B).on(_all_good),
                at=(0.0, 7.0),
                order=None,
            ),
        ],
    ),
]
