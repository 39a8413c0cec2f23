"""Surrogates with a ratio to the policy that sampled: what each is equal to, and where it goes."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft import losses
from rlft.trust_region import TrustRegion
from tests.proofs import changes as c
from tests.proofs import enumerated as e
from tests.proofs.proof import Change, Equal, Limit, Measured, Row, Value, row
from tests.proofs.rows_online import (
    BETA,
    CLIP,
    EXACT,
    GIVEN,
    OPEN,
    REINFORCE_ROWS,
    REINFORCE_TOKENS,
    TRPO,
    B,
    drift,
    drift_to,
)
from tests.proofs.scene import F64, Scene, fresh, groups, per_row, short, whole_pairs
from tests.test_trust_region import WORLD, Tabular, features


def _held(s: Scene, low: float, high: float, dual: float) -> tuple[Tensor, Tensor]:
    """Tokens whose gradient the clip takes away, and the ratio they count with instead."""
    assert s.batch.advantages is not None
    rho, good = c.ratios(s).detach(), s.batch.advantages > 0
    above, below, far = good & (rho > high), ~good & (rho < low), ~good & (rho > dual)
    bound = torch.full_like(rho, dual).where(~below, low).where(~above, high)
    return above | below | far, bound


def by_clipping(low: float, high: float, dual: float = 1e9) -> Value:
    """trpo on the advantages of tokens that are not clipped, and the constants of the others, token by token."""

    def free(s: Scene) -> Scene:
        held, _ = _held(s, low, high, dual)
        return s.but(advantages=s.batch.advantages.where(~held, 0.0))  # type: ignore[union-attr]

    def constants(s: Scene) -> Tensor:
        held, bound = _held(s, low, high, dual)
        assert bool((held & s.mask).any())
        return (-bound * s.batch.advantages).where(held, 0.0)[s.mask].mean()  # type: ignore[operator]

    return TRPO.on(free) + Value(constants)


def _joint(s: Scene) -> Scene:
    """Advantages of two answers: the clipped product of both ratios, times the reward less the other's."""
    s = c.folded(s)
    product = c.ratios(s).detach().reshape(-1, 2).prod(-1).clamp(0.1, 1.9).repeat_interleave(2)
    return s.but(advantages=product * c.leave_one_out(s))


def clipped_advantages(low: float, high: float) -> Change:
    """Advantages times the clipped ratio, a constant."""
    return lambda s: s.but(advantages=s.batch.advantages * c.ratios(s).detach().clamp(low, high))  # type: ignore[operator]


def one_advantage(number: float) -> Change:
    return c.but(advantages=c.everywhere(number))


def by_kto(temperature: float, *, desirable: bool) -> Value:
    """(4/tau) KTO of rho - 1 in place of the log-ratio, every token an answer."""

    def change(s: Scene) -> Scene:
        f = c.flattened(s)
        moved = f.but(ref_logps=torch.zeros_like(f.ref), logps=(c.ratios(f) - 1).where(f.mask, torch.nan))
        f = c.as_log_ratios(c.log_ratio)(moved)
        labels = torch.full((f.batch.num_rows,), desirable)
        return f.but(labels=labels, kl_baseline=torch.zeros(f.batch.num_rows, dtype=F64))

    return 4 / temperature * row("kto", beta=temperature).on(change)


def one_per_row(s: Scene) -> Scene:
    assert s.batch.advantages is not None
    return s.but(advantages=s.batch.advantages[:, 0])


def _step_kl(s: Scene) -> Tensor:
    rho = c.ratios(s)
    return (rho - 1 - rho.log())[s.mask].mean()


def _natural(delta: float) -> float:
    """How far the KL and the gain of a step are from what the quadratic model of the natural gradient says, relative."""
    weights, logits = features()
    world = Tabular(weights, logits, WORLD.random_rewards(seed=6))
    fine = {"backtrack": 0.9999, "max_backtracks": 2000}
    done = world.step(TrustRegion(max_kl=delta, cg_iters=200, cg_damping=0.0, cg_tolerance=1e-14, **fine))
    assert done.accepted
    return max(abs(done.kl / done.kl_predicted - 1), abs(done.gain / done.gain_predicted - 1))


RATIOS = [
    Row(
        "ppo_clip",
        [CLIP, {**CLIP, "clip_eps_high": 0.28, "dual_clip": 3.0}],
        groups,
        equals=[
            Equal(
                "`ppo_penalty` without the penalty",
                row("ppo_penalty", beta=0.0),
                row("ppo_clip", **OPEN),
                when="nothing is clipped",
            ),
            Equal("`trpo` on tokens that are not clipped, and constants", by_clipping(0.8, 1.2)),
            Equal(
                "the same, constant as well where A < 0 and rho > 3",
                by_clipping(0.8, 1.28, 3.0),
                row("ppo_clip", clip_eps=0.2, clip_eps_high=0.28, dual_clip=3.0),
                when="dual_clip is 3",
            ),
            Equal(
                "`reinforce` averaged over tokens, in gradient",
                REINFORCE_TOKENS,
                when="samples are fresh",
                scene=fresh,
                value=False,
            ),
        ],
        limits=[
            Limit(
                "clip_eps_high beyond every ratio, clip_eps 1",
                "`trpo`",
                lambda x: row("ppo_clip", clip_eps=1.0, clip_eps_high=x),
                TRPO,
                at=(1e3, 1e6),
                order=None,
            ),
            drift_to(REINFORCE_TOKENS, "`reinforce` averaged over tokens", drift("ppo_clip", **CLIP)),
        ],
        expected=[
            e.in_a_bandit(
                e.with_advantages(losses.ppo_clip, **OPEN), e.reward_descent, "-∇E[r]", "a stranger's samples"
            )
        ],
    ),
    Row(
        "ppo_penalty",
        [BETA],
        groups,
        equals=[
            Equal("`trpo`", TRPO, row("ppo_penalty", beta=0.0), when="beta is 0"),
            Equal(
                "`ppo_clip` that clips nothing + beta (rho - 1 - log rho)",
                row("ppo_clip", **OPEN) + Value(lambda s: B * _step_kl(s)),
            ),
        ],
        limits=[Limit("beta → 0", "`trpo`", lambda x: row("ppo_penalty", beta=x), TRPO, within=2e-2)],
        expected=[Measured("the penalty over all tokens of the old policy", "KL(old ‖ policy)", e.step_kl)],
    ),
    Row(
        "trpo",
        [{}, {"kl": "loss", **BETA}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` that clips nothing, with leave-one-out advantages",
                row("ppo_clip", advantage="leave_one_out", **OPEN),
            ),
            Equal(
                "`ppo_clip` that clips nothing, with standardised rewards",
                row("ppo_clip", advantage="group_norm", **OPEN),
                row("trpo", advantage="group_norm"),
                when="advantage is group_norm",
            ),
        ],
        limits=[
            Limit(
                "drift from the sampler → 0",
                "`reinforce` averaged over tokens",
                drift("trpo"),
                row("reinforce", averaging="token_mean"),
                value=False,
                at=(1e-3, 1e-4, 1e-5),
            ),
            Measured(
                "max_kl → 0",
                "the step is the natural gradient's, its KL max_kl",
                _natural,
                at=(1e-4, 1e-6, 1e-8),
                order=0.5,
                within=1e-3,
                settings=frozenset(TrustRegion.__dataclass_fields__),
            ),
        ],
        tests=[
            "tests/test_trust_region.py::test_a_small_radius_is_the_plain_natural_gradient_step",
            "tests/test_trust_step.py::test_one_step_is_the_one_written_out_in_dense_matrices",
        ],
    ),
    Row(
        "cispo",
        [{"clip_eps_high": 0.3}, {"clip_eps_high": 4.0, "clip_eps": 0.5}],
        groups,
        equals=[
            Equal(
                "`reinforce` with advantages times the clipped ratio, averaged over tokens",
                REINFORCE_TOKENS.on(clipped_advantages(0.0, 1.3)),
            ),
            Equal(
                "the same, from below as well",
                REINFORCE_TOKENS.on(clipped_advantages(0.5, 5.0)),
                row("cispo", clip_eps_high=4.0, clip_eps=0.5),
                when="clip_eps is 1/2",
            ),
        ],
        limits=[
            Limit(
                "clip_eps_high beyond every ratio",
                "`trpo`, in gradient",
                lambda x: row("cispo", clip_eps_high=x),
                TRPO,
                at=(1e3, 1e6),
                order=None,
                value=False,
            ),
            drift_to(REINFORCE_TOKENS, "`reinforce` averaged over tokens", drift("cispo", clip_eps_high=0.3)),
        ],
        expected=[
            e.in_a_bandit(
                e.with_advantages(losses.cispo, clip_eps_high=1e9), e.reward_descent, "-∇E[r]", "a stranger's samples"
            )
        ],
        differences=False,
    ),
    Row(
        "sapo",
        [{}, {"temperature_positive": 2.0, "temperature_negative": 3.0}],
        groups,
        equals=[
            Equal(
                "4/tau `kto` of rho - 1 in place of the log-ratio, every token an answer, less 4/tau",
                by_kto(2.0, desirable=True) - 2.0,
                row("sapo", temperature_positive=2.0, averaging="token_mean").on(one_advantage(1.0)),
                when="every advantage is 1, averaged over tokens",
            ),
            Equal(
                "the same for undesirable answers",
                by_kto(3.0, desirable=False),
                row("sapo", temperature_negative=3.0, averaging="token_mean").on(one_advantage(-1.0)),
                when="every advantage is -1, averaged over tokens",
            ),
            Equal(
                "`reinforce` averaged per answer, in gradient",
                REINFORCE_ROWS,
                when="samples are fresh",
                scene=fresh,
                value=False,
            ),
        ],
        limits=[
            Limit(
                "temperatures → 0",
                "`trpo` averaged per answer, in gradient",
                lambda x: row("sapo", temperature_positive=x, temperature_negative=x),
                row("trpo", **GIVEN, averaging="sequence_mean"),
                value=False,
                order=2.0,
                at=(1e-1, 3e-2, 1e-2),
            ),
        ],
    ),
    Row(
        "gspo",
        [CLIP, {**CLIP, "clip_eps_high": 0.3}],
        per_row,
        equals=[
            Equal("`gspo_token`", row("gspo_token", **CLIP), when="advantages are per answer"),
            Equal(
                "`ppo_clip` averaged per answer, on mean log-probs of the answers",
                row("ppo_clip", clip_eps=0.2, clip_eps_high=0.3, averaging="sequence_mean").on(c.per_token, c.folded),
                row("gspo", clip_eps=0.2, clip_eps_high=0.3),
            ),
        ],
        limits=[
            Limit(
                "answers of one token",
                "`ppo_clip`",
                lambda x: row("gspo", **CLIP).on(one_per_row),
                row("ppo_clip", **CLIP).on(one_per_row),
                scene=short,
                **EXACT,
            ),
            drift_to(REINFORCE_ROWS, "`reinforce` averaged per answer", drift("gspo", **CLIP)),
        ],
    ),
    Row(
        "gspo_token",
        [CLIP, {**CLIP, "clip_eps_high": 0.3}],
        groups,
        equals=[
            Equal(
                "`gspo`",
                row("gspo", clip_eps=0.2, clip_eps_high=0.3),
                row("gspo_token", clip_eps=0.2, clip_eps_high=0.3),
                when="advantages are per answer",
                scene=per_row,
            ),
        ],
        limits=[
            Limit(
                "answers of one token",
                "`ppo_clip`",
                lambda x: row("gspo_token", **CLIP),
                row("ppo_clip", **CLIP),
                scene=short,
                **EXACT,
            ),
            drift_to(REINFORCE_ROWS, "`reinforce` averaged per answer", drift("gspo_token", **CLIP)),
        ],
        expected=[
            e.in_a_bandit(
                e.with_advantages(losses.gspo_token, **OPEN), e.reward_descent, "-∇E[r]", "a stranger's samples"
            )
        ],
        differences=False,
    ),
    Row(
        "p3o",
        [{"beta": B, **CLIP}, {"beta": B, "clip_eps": 0.9, "clipping": "joint"}, {"beta": 0.0, **CLIP}],
        groups,
        equals=[
            Equal(
                "`trpo` with leave-one-out advantages, answers taken as one token",
                row("trpo").on(c.folded),
                row("p3o", beta=0.0, **OPEN),
                when="nothing is clipped and beta is 0",
            ),
            Equal(
                "`ppo_clip` with leave-one-out advantages, answers taken as one token",
                row("ppo_clip", advantage="leave_one_out", **CLIP).on(c.folded),
                row("p3o", beta=0.0, **CLIP),
                when="two answers per prompt, beta is 0",
                scene=whole_pairs,
            ),
            Equal(
                "`reinforce` on the clipped product of both ratios times the reward difference, answers taken as one token",
                row("reinforce", advantage="given").on(_joint),
                row("p3o", beta=0.0, clip_eps=0.9, clip_eps_high=0.9, clipping="joint"),
                when="two answers per prompt, clipping is joint and beta 0",
                scene=whole_pairs,
            ),
            *(
                Equal(
                    "`rloo`, in gradient",
                    row("rloo", beta=B),
                    row("p3o", beta=B, clip_eps=0.2, clipping=k),
                    when=f"samples are fresh, clipping {k}",
                    scene=fresh,
                    value=False,
                )
                for k in ("separate", "joint")
            ),
        ],
        limits=[
            Limit(
                "clip_eps_high beyond every ratio, beta 0",
                "`trpo`, answers taken as one token",
                lambda x: row("p3o", beta=0.0, clip_eps=1.0, clip_eps_high=x),
                row("trpo").on(c.folded),
                at=(1e5, 1e9),
                order=None,
            ),
            Limit(
                "drift from the sampler → 0",
                "`rloo`",
                drift("p3o", beta=B, **CLIP),
                row("rloo", beta=B),
                value=False,
                at=(1e-3, 1e-4, 1e-5),
            ),
        ],
        expected=[
            e.expectation(
                e.called(losses.p3o, clipping=k, **OPEN), e.descent, f"-∇(E[r] - beta KL), {k}", over=over, n=n
            )
            for k in ("separate", "joint")
            for over, n in (("fresh samples", 2), ("a stranger's samples", 3))
        ],
        differences=[False, False, True],
    ),
]
