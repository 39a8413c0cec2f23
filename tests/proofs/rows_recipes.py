"""Named algorithms and ranked answers: what each is equal to, and where it goes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlft import kl, losses
from tests.proofs import changes as c
from tests.proofs import enumerated as e
from tests.proofs.proof import Equal, Limit, Row, Value, row
from tests.proofs.rows_online import CLIP, EXACT, GIVEN, drift
from tests.proofs.scene import F64, Scene, even, groups, whole_pairs


def no_critic(s: Scene) -> Scene:
    """A critic that says 0 everywhere."""
    return s.but(values=torch.zeros(s.mask.shape, dtype=F64))


#: Other clip ranges than anybody's default.
WIDE = {"clip_eps": 0.1, "clip_eps_high": 0.35}


def centred_by_group(s: Scene) -> Tensor:
    """``[B]`` r minus the mean of its group, itself included: (n-1)/n of leave-one-out."""
    scored = c.scored(s)
    sizes = torch.tensor([int((scored & (s.batch.group_ids == g)).sum()) for g in s.batch.group_ids], dtype=F64)
    return c.leave_one_out(s) * (sizes - 1) / sizes


def standardised(s: Scene) -> Tensor:
    """``[B]`` reward less the group's mean, over its standard deviation + 1e-4."""
    scored = c.scored(s)
    found = torch.zeros(s.batch.num_rows, dtype=F64)
    for i in scored.nonzero().flatten().tolist():
        own = s.rewards[scored & (s.batch.group_ids == s.batch.group_ids[i])]
        found[i] = (s.rewards[i] - own.mean()) / (own.std() + 1e-4)
    return found


def normalised_over_the_step(s: Scene) -> Tensor:
    """``[B]`` centred by group, then mean 0 and variance 1 over the step."""
    scored = c.scored(s)
    centred, found = centred_by_group(s), torch.zeros(s.batch.num_rows, dtype=F64)
    found[scored] = c.whitened(centred[scored])
    return found


def to_go(beta: float, estimator: Callable[..., Tensor] = kl.k1, gamma: float = 1.0) -> Callable[[Scene], Tensor]:
    """``[B, T]`` the reward, and what the KL takes off it, from each token on, whitened over the tokens of the step."""

    def found(s: Scene) -> Tensor:
        s = c.scored_alone(s)
        assert s.batch.old_logps is not None
        charge = -beta * estimator(s.batch.old_logps, s.ref, s.mask)
        ahead = torch.zeros(s.mask.shape, dtype=F64)
        for i, counts in enumerate(s.mask):
            rest = s.rewards[i]
            for t in reversed(counts.nonzero().flatten().tolist()):
                rest = charge[i, t] + (rest if t == int(counts.nonzero()[-1]) else gamma * rest)
                ahead[i, t] = rest
        ahead[s.mask] = c.whitened(ahead[s.mask])
        return ahead

    return found


def _lowered(s: Scene) -> Scene:
    """The rejected log-prob one nat lower: a hinge that asks for 1 then asks for nothing."""
    return s.but(logps=s.logps - torch.where(c.is_chosen(s), 0.0, 1.0)[:, None])


def _hinges(s: Scene) -> Tensor:
    """Per prompt the sum of ``max(0, p_i - p_j)`` over ``r_i < r_j``, averaged over prompts by their answers."""
    scored = c.scored(s).nonzero().flatten().tolist()
    means, ids = s.summed(s.logps) / s.lengths(), s.batch.group_ids.tolist()
    sizes = {g: sum(ids[i] == g for i in scored) for g in ids}
    hinges = [
        sizes[ids[i]] * (means[i] - means[j]).relu()
        for i in scored
        for j in scored
        if ids[i] == ids[j] and s.rewards[i] < s.rewards[j]
    ]
    return torch.stack(hinges).sum() / len(scored)


RECIPES = [
    Row(
        "grpo",
        [{}, {"kl_gradient": "k2"}, {"advantage": "group_mean", "clip_eps_high": 0.28}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` with `group_norm`, k3 in the loss, averaged per answer",
                row(
                    "ppo_clip",
                    advantage="group_norm",
                    kl="loss",
                    kl_value="k3",
                    beta=0.04,
                    averaging="sequence_mean",
                    **CLIP,
                ),
            ),
            Equal(
                "the same on rewards less the mean of their group, with other settings and the gradient of k2",
                row(
                    "ppo_clip", **WIDE, kl="loss", kl_value="k3", kl_gradient="k2", beta=0.3, averaging="sequence_mean"
                ).on(c.advantages_are(centred_by_group)),
                row("grpo", **WIDE, beta=0.3, advantage="group_mean", kl_gradient="k2"),
                when="advantage is group_mean and kl_gradient k2",
            ),
        ],
        limits=[
            Limit(
                "beta → 0",
                "`grpo_plus` with one clip range",
                lambda x: row("grpo", beta=x),
                row("grpo_plus", clip_eps_high=0.2),
            ),
        ],
        expected=[
            e.in_a_bandit(
                e.with_advantages(losses.grpo, clip_eps=0.2, kl_gradient=k), e.descent, f"-∇(E[r] - beta KL), by {k}"
            )
            for k in ("k2", "ratio_k3")
        ],
        differences=[True, False, True],
    ),
    Row(
        "dr_grpo",
        [{"length": 7}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` on the reward less the mean of its group, averaged over a fixed length",
                row("ppo_clip", averaging="fixed_length", length=7, **CLIP).on(c.advantages_are(centred_by_group)),
            ),
            Equal(
                "the same + 0.3 k3",
                row(
                    "ppo_clip", averaging="fixed_length", length=7, kl="loss", kl_value="k3", beta=0.3, clip_eps=0.1
                ).on(c.advantages_are(centred_by_group)),
                row("dr_grpo", length=7, clip_eps=0.1, beta=0.3),
                when="beta is 0.3",
            ),
        ],
        limits=[
            Limit(
                "answers of one length, which is length",
                "`grpo` without KL, advantage: group_mean",
                lambda x: row("dr_grpo", length=4),
                row("grpo", beta=0.0, advantage="group_mean"),
                scene=even,
                **EXACT,
            ),
        ],
    ),
    Row(
        "dapo",
        [{}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` on the standardised reward",
                row("ppo_clip", clip_eps=0.2, clip_eps_high=0.28).on(c.advantages_are(standardised)),
            ),
            Equal(
                "the same + 0.3 k3",
                row("ppo_clip", **WIDE, kl="loss", kl_value="k3", beta=0.3).on(c.advantages_are(standardised)),
                row("dapo", **WIDE, beta=0.3),
                when="beta is 0.3",
            ),
        ],
        limits=[
            Limit("answers of one length", "`grpo_plus`", lambda x: row("dapo"), row("grpo_plus"), scene=even, **EXACT),
            Limit(
                "clip_eps_high → clip_eps",
                "`grpo` without KL, averaged over tokens",
                lambda x: row("dapo", clip_eps_high=0.2 + x),
                row("grpo", beta=0.0, averaging="token_mean"),
            ),
        ],
    ),
    Row(
        "grpo_plus",
        [{}],
        groups,
        equals=[
            Equal("`grpo` without KL, clipped higher", row("grpo", beta=0.0, clip_eps_high=0.28)),
            Equal(
                "`ppo_clip` on the standardised reward, averaged per answer",
                row("ppo_clip", clip_eps=0.2, clip_eps_high=0.28, averaging="sequence_mean").on(
                    c.advantages_are(standardised)
                ),
            ),
            Equal(
                "`grpo` without KL",
                row("grpo", beta=0.0, **WIDE),
                row("grpo_plus", **WIDE),
                when="clip ranges are given",
            ),
        ],
        limits=[
            Limit(
                "clip_eps_high → clip_eps",
                "`grpo` without KL",
                lambda x: row("grpo_plus", clip_eps_high=0.2 + x),
                row("grpo", beta=0.0),
            ),
        ],
    ),
    Row(
        "reinforce_plus_plus",
        [{}, {"kl_value": "k3", "gamma": 0.9}],
        groups,
        equals=[
            Equal("`ppo_clip` on the whitened reward-to-go", row("ppo_clip", **CLIP).on(c.advantages_are(to_go(0.01)))),
            Equal(
                "`ppo` with lam 1 and no value loss",
                row("ppo", beta=0.01, lam=1.0, value_coef=0.0).on(no_critic),
                row("reinforce_plus_plus", whiten=False),
                when="nothing is whitened and the critic says 0",
            ),
            Equal(
                "`ppo_clip` on the whitened discounted reward-to-go, with k3",
                row("ppo_clip", clip_eps=0.1).on(c.advantages_are(to_go(0.3, kl.k3, 0.9))),
                row("reinforce_plus_plus", beta=0.3, clip_eps=0.1, kl_value="k3", gamma=0.9),
                when="kl_value is k3 and gamma 0.9",
            ),
        ],
        limits=[
            Limit(
                "drift from the sampler → 0",
                "`reinforce` on the whitened reward-to-go, averaged over tokens",
                drift("reinforce_plus_plus"),
                row("reinforce", averaging="token_mean", **GIVEN).on(c.sampled_fresh, c.advantages_are(to_go(0.01))),
                value=False,
                at=(1e-3, 1e-4, 1e-5),
            ),
        ],
    ),
    Row(
        "reinforce_plus_plus_baseline",
        [{}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` on rewards centred by group and normalised over the step, k2 in the loss",
                row("ppo_clip", kl="loss", kl_value="k2", beta=0.01, **CLIP).on(
                    c.advantages_are(normalised_over_the_step)
                ),
            ),
            Equal(
                "the same",
                row("ppo_clip", kl="loss", kl_value="k2", beta=0.3, clip_eps=0.1).on(
                    c.advantages_are(normalised_over_the_step)
                ),
                row("reinforce_plus_plus_baseline", beta=0.3, clip_eps=0.1),
                when="settings are not the defaults",
            ),
        ],
        limits=[
            Limit(
                "beta → 0",
                "`grpo` without KL, advantage: group_mean_batch_norm, averaged over tokens",
                lambda x: row("reinforce_plus_plus_baseline", beta=x),
                row("grpo", beta=0.0, advantage="group_mean_batch_norm", averaging="token_mean"),
                within=2e-2,
            ),
        ],
    ),
    Row(
        "ppo",
        [{}, {"beta": 0.0}, {"entropy_coef": 0.01}, {"gamma": 0.9, "lam": 0.5, "value_clip_eps": None}],
        groups,
        equals=[
            Equal(
                "`ppo_clip` on GAE's advantages + 0.1 `value_loss` to its returns",
                (row("ppo_clip", **CLIP) + 0.1 * row("value_loss", clip_eps=0.2)).on(c.with_gae(1.0, 0.95, 0.02)),
            ),
            Equal(
                "the same, less 0.01 of the entropy",
                (row("ppo_clip", **WIDE) + 0.5 * row("value_loss", clip_eps=0.3)).on(c.with_gae(0.9, 0.5, 0.3))
                + Value(lambda s: -0.01 * s.outputs["entropy"][c.scored_alone(s).mask].mean()),
                row("ppo", **WIDE, beta=0.3, gamma=0.9, lam=0.5, value_coef=0.5, value_clip_eps=0.3, entropy_coef=0.01),
                when="entropy_coef is 0.01 and no setting is the default",
            ),
        ],
        limits=[
            Limit(
                "value_coef → 0",
                "`ppo_clip` on GAE's advantages",
                lambda x: row("ppo", value_coef=x),
                row("ppo_clip", **CLIP).on(c.with_gae(1.0, 0.95, 0.02)),
                within=2e-2,
            ),
            Limit(
                "1 - lam → 0, a critic that says 0",
                "`reinforce_plus_plus` without whitening",
                lambda x: row("ppo", beta=0.01, lam=1 - x, value_coef=0.0).on(no_critic),
                row("reinforce_plus_plus", whiten=False),
            ),
        ],
    ),
    Row(
        "rrhf",
        [{"nll_weight": 0.5}, {}],
        groups,
        equals=[
            Equal(
                "`slic_hf` on mean log-probs, the rejected lowered by delta, + nll_weight `sft` on the best answers, in sums",
                row("slic_hf", nll_weight=0.0).on(c.per_token, c.folded, _lowered)
                + 0.5 * row("sft", averaging="sequence_sum").on(c.chosen_alone),
                row("rrhf", nll_weight=0.5).on(c.won_and_lost(1.0)),
                when="two answers per prompt",
                scene=whole_pairs,
            ),
        ],
        limits=[
            Limit(
                "nll_weight → 0",
                "the hinge over all pairs that the rewards order",
                lambda x: row("rrhf", nll_weight=x),
                Value(_hinges),
                within=2e-2,
            ),
        ],
    ),
]
