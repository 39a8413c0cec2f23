"""AGRO off-policy: what each estimator is equal to, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlft import losses
from tests.proofs import changes as c
from tests.proofs import enumerated as e
from tests.proofs.proof import Equal, Limit, Row, Value, row
from tests.proofs.scene import Scene, even, fresh, groups, short, tree, whole_pairs

B = 0.3
BETA = {"beta": B}
OFF = row("agro_off_policy", beta=B)
PLAIN = row("agro_off_policy", beta=0.0)
LR = {"beta": B, "lr_coef": 1.0}


def variance_of_rewards(s: Scene) -> Tensor:
    """The mean over answers of r against the others times r centred: the sample variance of the rewards, per prompt."""
    return (c.leave_one_out(s) * s.rewards)[c.scored(s)].mean()


def without_constant(name: str, **hyper: Any) -> Callable[[float], Value]:
    """The loss less var(r)/(2 beta), which holds no gradient, as a function of beta."""
    return lambda x: row(name, beta=x, **hyper) - Value(lambda s: variance_of_rewards(s) / (2 * x))


def towards_zero(name: str, **hyper: Any) -> Limit:
    return Limit(
        "beta → 0",
        "loss - var(r)/(2 beta) is `agro_off_policy` at beta 0",
        without_constant(name, **hyper),
        PLAIN,
        within=2e-2,
    )


def silent(name: str, **hyper: Any) -> Limit:
    """At R = constant value and gradient vanish: the gradient with the distance, which is what is measured."""
    return Limit(
        "distance x from R = constant → 0",
        "loss and gradient are 0",
        lambda x: row("sft") + row(name, beta=B, **hyper).on(c.rewards_near_the_optimum(x, B)),
        row("sft"),
        at=(1e-3, 1e-4, 1e-5),
        within=1e-2,
    )


def pair_by_pair(s: Scene) -> Tensor:
    """Every two answers of a prompt as a group of two, weighted by ``2 w_i w_j / (n (n-1))``, prompts by their answers."""
    kept, ids, w = c.scored(s).nonzero().flatten().tolist(), s.batch.group_ids, s.batch.extras["weights"]
    n = c.group_sizes(s)
    parts = [
        2 * w[i] * w[j] / (n[i] - 1) * OFF(s.take([i, j])) for i in kept for j in kept if i < j and ids[i] == ids[j]
    ]
    return torch.stack(parts).sum() / len(kept)


def ones(s: Scene) -> Scene:
    return s.but(weights=torch.ones_like(s.rewards))


OFF_POLICY = [
    Row(
        "agro_off_policy",
        [BETA, {"beta": 0.0}],
        groups,
        equals=[
            Equal(
                "beta/4 `ipo`",
                B / 4 * row("ipo", beta=B),
                OFF.on(c.won_and_lost(0.5)),
                when="two answers per prompt, rewards ±1/4",
                scene=whole_pairs,
            ),
            Equal(
                "beta/4 `ipo` at beta/(2 D)",
                B / 4 * row("ipo", beta=B / 3.0),
                OFF.on(c.won_and_lost(1.5)),
                when="two answers per prompt, rewards D = 1.5 apart",
                scene=whole_pairs,
            ),
            Equal("`rloo`, in gradient", row("rloo", beta=B), value=False),
        ],
        limits=[towards_zero("agro_off_policy"), silent("agro_off_policy")],
        expected=[*e.off_policy(losses.agro_off_policy), *e.on_policy(losses.agro_off_policy)],
    ),
    Row(
        "agro_off_policy_weighted",
        [BETA],
        groups,
        equals=[
            Equal("`agro_off_policy`", OFF, row("agro_off_policy_weighted", beta=B).on(ones), when="weights are 1"),
            Equal("`agro_off_policy` of every two answers, times their weights", Value(pair_by_pair)),
        ],
        limits=[
            Limit(
                "x → 0 in weights^x",
                "`agro_off_policy`",
                lambda x: row("agro_off_policy_weighted", beta=B).on(
                    lambda s: s.but(weights=s.batch.extras["weights"] ** x)
                ),
                OFF,
                within=2e-2,
            )
        ],
        tests=["tests/losses/test_agro_more.py::test_weighted_pairs_are_the_loss_of_the_reweighted_policy"],
    ),
    Row(
        "agro_off_policy_per_token",
        [BETA],
        groups,
        equals=[
            Equal("`agro_off_policy` on mean log-probs", OFF.on(c.per_token)),
            Equal(
                "1/4 `agro_off_policy` at beta/4",
                row("agro_off_policy", beta=B / 4) / 4,
                when="every answer has 4 tokens",
                scene=even,
            ),
        ],
        limits=[
            Limit(
                "beta → 0",
                "loss - var(r)/(2 beta) is `agro_off_policy` at beta 0 on mean log-probs",
                without_constant("agro_off_policy_per_token"),
                PLAIN.on(c.per_token),
                within=2e-2,
            )
        ],
    ),
    Row(
        "agro_off_policy_cv",
        [BETA],
        groups,
        equals=[
            Equal(
                "`agro_on_policy_causal` with baseline sequence",
                row("agro_on_policy_causal", beta=B, baseline="sequence"),
                when="samples are fresh",
                scene=fresh,
            ),
            Equal("`agro_off_policy`", OFF, when="answers have one token", scene=short),
        ],
        limits=[
            Limit(
                "drift from the sampler → 0",
                "`agro_on_policy_causal` with baseline sequence",
                lambda x: row("agro_off_policy_cv", beta=B).on(c.drifted(x)),
                row("agro_on_policy_causal", beta=B, baseline="sequence"),
            ),
            towards_zero("agro_off_policy_cv"),
        ],
        expected=e.off_policy(losses.agro_off_policy_cv),
        differences=False,
    ),
    Row(
        "agro_off_policy_rb",
        [BETA],
        groups,
        equals=[
            Equal(
                "`agro_on_policy_exact_kl` with baseline none, in the logits",
                row("agro_on_policy_exact_kl", beta=B, baseline="none"),
                when="the policy itself sampled",
                scene=tree,
            ),
        ],
        limits=[towards_zero("agro_off_policy_rb")],
        expected=e.off_policy(losses.agro_off_policy_rb),
        differences=False,
    ),
    Row(
        "agro_off_policy_rb2",
        [BETA],
        groups,
        equals=[
            Equal("`agro_off_policy`", OFF, when="answers have one token", scene=short),
            Equal(
                "`agro_on_policy_causal` with baseline sequence, in the logits",
                row("agro_on_policy_causal", beta=B, baseline="sequence"),
                when="the policy itself sampled",
                scene=tree,
            ),
        ],
        limits=[towards_zero("agro_off_policy_rb2")],
        expected=e.off_policy(losses.agro_off_policy_rb2),
        differences=False,
    ),
]
