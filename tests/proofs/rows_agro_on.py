"""AGRO on-policy: what each estimator is equal to, and where it goes.

Token by token identities use what a forward pass would return if the exact moments of a position were those of its one
sampled token: then the estimators that know moments are those that know log-ratios alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlft import losses
from tests.proofs import agro_terms as t
from tests.proofs import enumerated as e
from tests.proofs.proof import Equal, Limit, Row, row
from tests.proofs.rows_agro import BETA, LR, OFF, B, silent, towards_zero
from tests.proofs.scene import fresh, groups, large, short, whole_pairs


def without_the_term(name: str, **hyper: Any) -> Limit:
    return Limit("lr_coef → 0", "`agro_off_policy`", lambda x: row(name, beta=B, lr_coef=x, **hyper), OFF, within=5e-2)


TOKEN_TERMS = [("h1", "g1"), ("h1", "g2"), ("h2", "g1"), ("h2", "g2")]
KL_TERMS = [("h3", "g1"), ("h3", "g2"), ("h3", "g3"), ("h3", "g3n"), ("h1", "g3"), ("h2", "g3n")]


def _terms(names: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{**LR, "square": h, "linear": g} for h, g in names]


ON_POLICY = [
    Row(
        "agro_on_policy",
        [BETA, LR, {**LR, "lr_baseline": "leave_one_out"}],
        groups,
        equals=[
            Equal("`agro_off_policy`", OFF, when="lr_coef is 0"),
            Equal(
                "`agro_off_policy`",
                OFF,
                row("agro_on_policy", **LR, lr_baseline="leave_one_out"),
                when="two answers per prompt, lr_coef 1 with the paper's baseline: the term is nothing",
                scene=whole_pairs,
            ),
            Equal(
                "`agro_off_policy` + `reinforce` with advantages -A²/(2 beta), in gradient",
                OFF + t.reinforce(t.advantage_squared),
                row("agro_on_policy", **LR),
                when="lr_coef is 1",
                value=False,
            ),
            *(
                Equal(
                    "`agro_off_policy` + `reinforce` with advantages -W/(2 beta), in gradient",
                    OFF + t.reinforce(lambda s, b=b: t.plain_weight(s, b)),
                    row("agro_on_policy", **LR, lr_baseline=b),
                    when=f"lr_baseline is {b}",
                    scene=large,
                    value=False,
                )
                for b in ("leave_one_out", "unbiased")
            ),
        ],
        limits=[without_the_term("agro_on_policy"), silent("agro_on_policy", lr_coef=1.0)],
        expected=[
            *e.on_policy(losses.agro_on_policy),
            *e.likelihood_ratio(losses.agro_on_policy),
            *e.likelihood_ratio(losses.agro_on_policy, lr_baseline="unbiased"),
        ],
        differences=[True, False, False],
    ),
    Row(
        "agro_on_policy_causal",
        [{**BETA, "baseline": b} for b in ("position", "sequence", "none")],
        groups,
        equals=[
            Equal(
                "`agro_off_policy`",
                OFF,
                row("agro_on_policy_causal", beta=B, baseline="sequence"),
                when="answers have one token",
                scene=short,
            ),
            Equal(
                "`reinforce` with reward-to-go, kl: reward, in gradient",
                row("reinforce", advantage="reward_to_go", kl="reward", beta=B),
                row("agro_on_policy_causal", beta=B, baseline="none"),
                when="samples are fresh, baseline none",
                scene=fresh,
                value=False,
            ),
            Equal(
                "`reinforce` with r and F_t against the others', in gradient",
                t.reinforce(t.by_position),
                row("agro_on_policy_causal", beta=B, baseline="position"),
                when="baseline is position",
                value=False,
            ),
        ],
        limits=[towards_zero("agro_on_policy_causal")],
        expected=[
            m for b in ("none", "sequence", "position") for m in e.on_policy(losses.agro_on_policy_causal, baseline=b)
        ],
        differences=False,
    ),
    Row(
        "agro_on_policy_exact_kl",
        [{**BETA, "baseline": b} for b in ("position", "sequence", "none")],
        groups,
        equals=[
            *(
                Equal(
                    f"`agro_on_policy_causal` with baseline {b}",
                    row("agro_on_policy_causal", beta=B, baseline=b),
                    row("agro_on_policy_exact_kl", beta=B, baseline=b).on(t.one_token_moments),
                    when="the KL of a position is its token's log-ratio",
                )
                for b in ("none", "sequence")
            ),
            Equal(
                "`kl_policy_gradient_exact`, in gradient",
                row("kl_policy_gradient_exact", beta=B),
                row("agro_on_policy_exact_kl", beta=B, baseline="none"),
                when="answers have one token",
                scene=short,
                value=False,
            ),
            Equal(
                "`reinforce` with r and K_t against the others' + `kl_policy_gradient_exact` without rewards, in gradient",
                t.reinforce(t.by_position_exact) + row("kl_policy_gradient_exact", beta=B).on(t.flat_rewards),
                row("agro_on_policy_exact_kl", beta=B, baseline="position"),
                when="baseline is position",
                value=False,
            ),
        ],
        limits=[towards_zero("agro_on_policy_exact_kl")],
        expected=[
            m for b in ("none", "sequence", "position") for m in e.on_policy(losses.agro_on_policy_exact_kl, baseline=b)
        ],
        differences=False,
    ),
    Row(
        "agro_on_policy_lr_causal",
        [BETA],
        groups,
        equals=[
            Equal(
                "`agro_on_policy` with lr_coef 1",
                row("agro_on_policy", **LR),
                when="answers have one token",
                scene=short,
            ),
            Equal("`agro_off_policy`", OFF, row("agro_on_policy_lr_causal", beta=B, lr_coef=0.0), when="lr_coef is 0"),
            Equal(
                "`agro_on_policy` with lr_coef 1 + `reinforce` on beta/2 (P_t against the others')², in gradient",
                row("agro_on_policy", **LR) + t.reinforce(t.surplus_squared),
                row("agro_on_policy_lr_causal", beta=B),
                value=False,
            ),
        ],
        limits=[without_the_term("agro_on_policy_lr_causal")],
        expected=e.likelihood_ratio(losses.agro_on_policy_lr_causal),
        differences=False,
    ),
    Row(
        "agro_on_policy_lr_token",
        [BETA, *_terms(TOKEN_TERMS[:3])],
        groups,
        equals=[
            Equal(
                "`agro_on_policy` with lr_coef 1",
                row("agro_on_policy", **LR).on(t.at_the_reference),
                row("agro_on_policy_lr_token", beta=B).on(t.at_the_reference),
                when="the policy is the reference",
            ),
            Equal(
                "`agro_on_policy` with lr_coef 1 + `reinforce` on beta/2 (S of the others)², in gradient",
                row("agro_on_policy", **LR) + t.reinforce(t.others_squared),
                row("agro_on_policy_lr_token", **LR, square="h1", linear="g1"),
                when="square h1, linear g1",
                value=False,
            ),
            Equal(
                "itself with lr_baseline none + `reinforce` on n/(n-1) var(R of the others)/(2 beta), in gradient",
                row("agro_on_policy_lr_token", beta=B) + t.reinforce(t.others_variance),
                row("agro_on_policy_lr_token", beta=B, lr_baseline="unbiased"),
                when="lr_baseline is unbiased",
                scene=large,
                value=False,
            ),
        ],
        limits=[without_the_term("agro_on_policy_lr_token")],
        expected=[
            m for h, g in TOKEN_TERMS for m in e.likelihood_ratio(losses.agro_on_policy_lr_token, square=h, linear=g)
        ]
        + e.likelihood_ratio(losses.agro_on_policy_lr_token, lr_baseline="unbiased"),
        differences=False,
    ),
    Row(
        "agro_on_policy_lr_kl",
        [BETA, *_terms(KL_TERMS)],
        groups,
        equals=[
            *(
                Equal(
                    f"`agro_on_policy_lr_token` with square {H}, linear {G}",
                    row("agro_on_policy_lr_token", **LR, square=H, linear=G),
                    row("agro_on_policy_lr_kl", **LR, square=h, linear=g).on(t.one_token_moments),
                    when=f"the KL of a position is its token's log-ratio; square {h}, linear {g}",
                )
                for h, g, H, G in (("h3", "g3", "h2", "g2"), ("h3", "g1", "h2", "g1"), ("h1", "g3n", "h1", "g2"))
            ),
            Equal(
                "itself with lr_baseline none + `reinforce` on n/(n-1) var(R of the others)/(2 beta), in gradient",
                row("agro_on_policy_lr_kl", beta=B) + t.reinforce(t.others_variance),
                row("agro_on_policy_lr_kl", beta=B, lr_baseline="unbiased"),
                when="lr_baseline is unbiased",
                scene=large,
                value=False,
            ),
            Equal(
                "`agro_off_policy` + `reinforce` on the expanded term, in gradient",
                OFF + t.reinforce(t.by_kl_value),
                row("agro_on_policy_lr_kl", **LR, square="h1", linear="g3n"),
                when="square h1, linear g3n",
                value=False,
            ),
            Equal(
                "the same + `kl_policy_gradient_exact` of (P_t - S of the others) KL_t, in gradient",
                OFF + t.reinforce(t.by_kl) + t.through(t.moved_kl),
                row("agro_on_policy_lr_kl", beta=B),
                when="square h3, linear g3",
                value=False,
            ),
        ],
        limits=[without_the_term("agro_on_policy_lr_kl")],
        expected=[m for h, g in KL_TERMS for m in e.likelihood_ratio(losses.agro_on_policy_lr_kl, square=h, linear=g)]
        + e.likelihood_ratio(losses.agro_on_policy_lr_kl, lr_baseline="unbiased"),
        differences=False,
    ),
    Row(
        "agro_on_policy_lr_moments",
        [BETA, {"beta": B, "lr_coef": 0.5}],
        groups,
        equals=[
            Equal(
                "`agro_on_policy_lr_token` with square h2, linear g2",
                row("agro_on_policy_lr_token", **LR),
                row("agro_on_policy_lr_moments", **LR).on(t.one_token_moments),
                when="the moments of a position are those of its one token",
            ),
            Equal(
                "itself with lr_baseline none + `reinforce` on n/(n-1) var(R of the others)/(2 beta), in gradient",
                row("agro_on_policy_lr_moments", beta=B) + t.reinforce(t.others_variance),
                row("agro_on_policy_lr_moments", beta=B, lr_baseline="unbiased"),
                when="lr_baseline is unbiased",
                scene=large,
                value=False,
            ),
            Equal(
                "`agro_off_policy` + `reinforce` on the expanded term + `kl_policy_gradient_exact` of its moments, in gradient",
                OFF + t.reinforce(t.by_moments) + t.through(t.moved_moments),
                row("agro_on_policy_lr_moments", beta=B),
                value=False,
            ),
        ],
        limits=[without_the_term("agro_on_policy_lr_moments")],
        expected=[
            *e.likelihood_ratio(losses.agro_on_policy_lr_moments),
            *e.likelihood_ratio(losses.agro_on_policy_lr_moments, lr_baseline="unbiased"),
        ],
        differences=False,
    ),
]
