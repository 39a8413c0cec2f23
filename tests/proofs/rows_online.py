"""Policy gradients: what each objective is equal to, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlft import losses
from tests.proofs import changes as c
from tests.proofs import enumerated as e
from tests.proofs.proof import Equal, Limit, Measured, Row, Value, row
from tests.proofs.scene import fresh, groups

B = 0.3
BETA = {"beta": B}
CLIP = {"clip_eps": 0.2}
#: A clip range that no ratio reaches.
OPEN = {"clip_eps": 1.0, "clip_eps_high": 1e9}
REINFORCE = row("reinforce", advantage="leave_one_out")
GIVEN = {"advantage": "given"}
TRPO = row("trpo", advantage="given")
EXACT = {"at": (0.0,), "order": None}


def drift(name: str, **hyper: Any) -> Callable[[float], Value]:
    """A row on samples of a policy that is x times as far as the scene's."""
    return lambda x: row(name, **hyper).on(c.drifted(x))


def drift_to(right: Value, to: str, left: Callable[[float], Value]) -> Limit:
    """On samples that become fresh the gradient becomes REINFORCE's; the value of a surrogate means nothing."""
    return Limit("drift from the sampler → 0", to, left, right, value=False, at=(1e-3, 1e-4, 1e-5))


REINFORCE_TOKENS = row("reinforce", **GIVEN, averaging="token_mean")
REINFORCE_ROWS = row("reinforce", **GIVEN, averaging="sequence_mean")


POLICY_GRADIENTS = [
    Row(
        "reinforce",
        [{}, {"kl": "reward", **BETA}, {"kl": "loss", "kl_value": "k2", **BETA}, {"advantage": "group_norm"}],
        groups,
        equals=[
            Equal("`rloo` at beta 0", row("rloo", beta=0.0)),
            Equal(
                "`trpo` on rewards whitened over the step, in sums, in gradient",
                row("trpo", **GIVEN, averaging="sequence_sum").on(c.advantages_are(c.whitened_rewards)),
                row("reinforce", advantage="batch_norm"),
                when="advantage is batch_norm, on fresh samples",
                scene=fresh,
                value=False,
            ),
            Equal(
                "`rloo`",
                row("rloo", beta=B),
                row("reinforce", kl="reward", beta=B),
                when="kl: reward, on fresh samples",
                scene=fresh,
            ),
        ],
        limits=[
            Limit(
                "beta → 0, kl: reward", "no KL", lambda x: row("reinforce", kl="reward", beta=x), REINFORCE, within=2e-2
            ),
            Limit("beta → 0, kl: loss", "no KL", lambda x: row("reinforce", kl="loss", beta=x), REINFORCE, within=2e-2),
        ],
        expected=[e.expectation(e.with_advantages(losses.reinforce), e.reward_descent, "-∇E[r]", n=n) for n in (2, 3)],
    ),
    Row(
        "rloo",
        [BETA, {"beta": 0.0}],
        groups,
        equals=[
            Equal(
                "`reinforce` with leave-one-out advantages of R = r - beta S",
                row("reinforce", **GIVEN).on(c.advantages_are(lambda s: c.leave_one_out(s, c.regularised(B)(s)))),
            ),
            Equal("`agro_off_policy`, in gradient", row("agro_off_policy", beta=B), value=False),
        ],
        limits=[Limit("beta → 0", "`reinforce`", lambda x: row("rloo", beta=x), REINFORCE, within=2e-2)],
        expected=[*e.on_policy(losses.rloo), *e.off_policy(losses.rloo)],
        differences=[False, True],
    ),
    Row(
        "kl_policy_gradient",
        [BETA, {"beta": B, "kl_gradient": "k3"}, {"beta": B, "kl_value": "k1", "kl_gradient": "ratio_k3"}],
        groups,
        equals=[
            Equal(
                f"`reinforce` with {v} in the loss, its gradient that of {g}",
                row("reinforce", kl="loss", kl_value=v, kl_gradient=g, beta=B),
                row("kl_policy_gradient", beta=B, kl_value=v, kl_gradient=g),
            )
            for v, g in (("k3", "k2"), ("k3", "k3"), ("k1", "ratio_k3"))
        ],
        limits=[Limit("beta → 0", "`reinforce`", lambda x: row("kl_policy_gradient", beta=x), REINFORCE, within=2e-2)],
        expected=[
            e.in_a_bandit(e.called(losses.kl_policy_gradient, kl_gradient=g), e.descent, f"-∇(E[r] - beta KL), by {g}")
            for g in ("k2", "ratio_k3")
        ],
        differences=[False, True, False],
    ),
    Row(
        "kl_policy_gradient_exact",
        [BETA],
        groups,
        equals=[
            Equal(
                "`reinforce` with the exact KL in the loss",
                row("reinforce", kl="loss", kl_value="exact", beta=B),
            )
        ],
        limits=[
            Limit("beta → 0", "`reinforce`", lambda x: row("kl_policy_gradient_exact", beta=x), REINFORCE, within=2e-2)
        ],
        expected=[e.in_a_bandit(e.called(losses.kl_policy_gradient_exact), e.descent, "-∇(E[r] - beta KL)")],
    ),
    Row(
        "nash_md_pg",
        [BETA, {"beta": 0.0}],
        groups,
        equals=[
            Equal(
                "`reinforce` on the win rate less 1/2, kl: reward, no baseline",
                row("reinforce", advantage="reward", kl="reward", beta=B).on(
                    lambda s: s.but(rewards=s.batch.extras["win_rates"] - 0.5)
                ),
                when="samples are fresh",
                scene=fresh,
            )
        ],
        limits=[
            Limit(
                "beta → 0",
                "`reinforce` on the win rate less 1/2",
                lambda x: row("nash_md_pg", beta=x),
                row("reinforce", **GIVEN).on(lambda s: s.but(advantages=s.batch.extras["win_rates"] - 0.5)),
                within=2e-2,
            )
        ],
        expected=[Measured("all meetings with a fixed opponent", "-∇(P(policy wins) - beta KL)", e.nash)],
        differences=[False, True],
    ),
]
