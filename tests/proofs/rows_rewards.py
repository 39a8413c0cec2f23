"""Reward models and critics: what each is equal to, and where it goes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.proofs import changes as c
from tests.proofs.proof import Change, Equal, Limit, Row, Value, row
from tests.proofs.scene import F64, Scene, groups, pairs, started, whole_pairs

B = 0.3
BETA = {"beta": B}
LOG2 = math.log(2)


def scores(s: Scene) -> Tensor:
    return s.outputs["scores"]


def as_logps(margin: float = 0.0) -> Change:
    """Answers of one token whose log-prob is the score, far below zero; the chosen ones lowered by a margin."""

    def change(s: Scene) -> Scene:
        wanted = scores(s) - margin * c.is_chosen(s) - c.FAR
        return c.folded(s).but(logps=wanted[:, None])

    return change


def _sums(s: Scene) -> Scene:
    """The chosen answers score the sum of both rewards; their target is 0."""
    both = scores(s)[0::2] + scores(s)[1::2]
    found = torch.stack([both, both], -1).flatten()
    return c.chosen_alone(s).but(scores=found, rewards=torch.zeros_like(s.rewards))


def every_pair(one: Value) -> Value:
    """The mean of a pair loss over all pairs of a prompt that the rewards order, averaged over prompts by their answers."""

    def run(s: Scene) -> Tensor:
        scored = c.scored(s).nonzero().flatten().tolist()
        found: dict[int, list[Tensor]] = {}
        for i in scored:
            for j in scored:
                g = int(s.batch.group_ids[i])
                if g == int(s.batch.group_ids[j]) and s.rewards[i] > s.rewards[j]:
                    found.setdefault(g, []).append(one(s.take([i, j])))
        sizes = {g: sum(int(s.batch.group_ids[i]) == g for i in scored) for g in found}
        return sum(torch.stack(f).mean() * sizes[g] for g, f in found.items()) / len(scored)  # type: ignore[return-value]

    return Value(run)


def _against_zero(s: Scene) -> Scene:
    """Each answer becomes a pair with one of score 0: the desirable ones win it, the others lose."""
    assert s.batch.labels is not None
    keep = s.mask.any(-1).nonzero().flatten()
    taken = s.take(keep.repeat_interleave(2))
    own, first = scores(taken).reshape(-1, 2)[:, 0], s.batch.labels[keep]
    zero = torch.zeros_like(own)
    found = torch.stack([own.where(first, zero), zero.where(first, own)], -1).flatten()
    return taken.but(scores=found).regrouped(torch.arange(len(keep)).repeat_interleave(2))


def _as_tokens(s: Scene) -> Scene:
    """Answers of one token: the scores are the values, the labels and rewards their targets."""
    assert s.batch.labels is not None
    f = c.folded(s)
    labels = s.batch.labels.to(F64)
    f = f.with_outputs(values=scores(s)[:, None])
    return f.but(values=scores(s)[:, None], returns=s.rewards[:, None], step_labels=labels[:, None])


def hard(s: Scene) -> Scene:
    return s.but(step_labels=(s.batch.extras["step_labels"] > 0.5).to(F64))


def softened(x: float) -> Change:
    """Labels ``x`` away from 0 and 1."""
    return lambda s: s.but(step_labels=x + (1 - 2 * x) * (s.batch.extras["step_labels"] > 0.5).to(F64))


def _tokens_as_answers(s: Scene) -> Scene:
    """Every token an answer: its value the score, its label a thumb."""
    good = s.batch.extras["step_labels"] > 0.5
    return c.flattened(s).but(scores=s.outputs["values"].flatten(), labels=good.flatten())


def _against_critic(beta: float) -> Change:
    """Scores ``V + beta S``: what a reward is compared with."""
    return lambda s: s.but(scores=s.outputs["values"][:, 0] + beta * c.log_ratio(s))


def _without_first(s: Scene) -> Scene:
    return s.but(mask=s.mask & (s.batch.group_ids > 0)[:, None])


def _share_without_first(s: Scene) -> Tensor:
    scored = c.scored(s)
    return (scored & (s.batch.group_ids > 0)).sum().to(F64) / scored.sum()


def _scored_mean(s: Scene, numbers: Tensor) -> Tensor:
    return numbers[c.scored(s)].mean()


def _values_as_scores(s: Scene) -> Scene:
    assert s.batch.returns is not None
    return c.flattened(s).but(scores=s.outputs["values"].flatten(), rewards=s.batch.returns.flatten())


def _held_values(eps: float) -> Change:
    """Each value, or the nearest one to it within ``eps`` of the old value where that is further from the return."""

    def change(s: Scene) -> Scene:
        values, old, returns = s.outputs["values"], s.batch.values, s.batch.returns
        assert old is not None
        assert returns is not None
        near = torch.where(values > old + eps, old + eps, torch.where(values < old - eps, old - eps, values))
        further = (near - returns).abs() > (values - returns).abs()
        return s.with_outputs(values=torch.where(further, near, values))

    return change


def _critic_is_mean(s: Scene) -> Scene:
    mean = c.regularised(B)(s).reshape(-1, 2).mean(-1).repeat_interleave(2)
    return s.with_outputs(values=mean[:, None].expand(s.mask.shape))


BT = row("bradley_terry")
REWARD_MODELS = [
    Row(
        "bradley_terry",
        [{}, {"margin": 0.5, "centering": 0.01}],
        pairs,
        equals=[
            Equal(
                "`dpo_reference_free` at beta 1, rewards in place of log-probs",
                row("dpo_reference_free", beta=1.0).on(as_logps(0.5)),
                row("bradley_terry", margin=0.5),
                when="the chosen reward is lowered by the margin",
            ),
            Equal(
                "`bradley_terry` + 2 centering `reward_regression` of the rewards' sum to 0",
                BT + 0.2 * row("reward_regression").on(_sums),
                row("bradley_terry", centering=0.1),
                when="centering is 0.1",
            ),
        ],
        limits=[
            Limit(
                "e^-margin → 0",
                "loss - margin is -(r_w - r_l)",
                lambda x: row("bradley_terry", margin=-math.log(x)) + math.log(x),
                Value(c.over_pairs(lambda s: scores(s)[1::2] - scores(s)[0::2])),
            ),
            Limit("centering → 0", "the plain loss", lambda x: row("bradley_terry", centering=x), BT, within=2e-2),
        ],
    ),
    Row(
        "bradley_terry_margin",
        [{"centering": 0.01}],
        pairs,
        equals=[
            Equal(
                "`bradley_terry` with margin 0.4",
                row("bradley_terry", margin=0.4, centering=0.01),
                row("bradley_terry_margin", centering=0.01).on(c.but(margin=c.everywhere(0.4))),
                when="every margin is 0.4",
            ),
            Equal(
                "`bradley_terry`, the chosen reward lowered by its margin",
                BT.on(lambda s: s.but(scores=scores(s) - s.batch.extras["margin"] * c.is_chosen(s))),
                row("bradley_terry_margin"),
            ),
        ],
        limits=[
            Limit(
                "x → 0 in margins x",
                "`bradley_terry`",
                lambda x: row("bradley_terry_margin").on(lambda s: s.but(margin=x * s.batch.extras["margin"])),
                BT,
            )
        ],
    ),
    Row(
        "reward_ranking",
        [{}],
        groups,
        equals=[
            Equal("`bradley_terry` over every pair that the rewards order, averaged per prompt", every_pair(BT)),
        ],
        limits=[
            Limit(
                "two answers per prompt",
                "`bradley_terry`",
                lambda x: row("reward_ranking").on(c.won_and_lost(1.0)),
                BT,
                at=(0.0,),
                order=None,
                scene=whole_pairs,
            ),
            Limit(
                "ties in one prompt",
                "nothing is learned from it",
                lambda x: row("reward_ranking").on(lambda s: s.but(rewards=s.rewards * (s.batch.group_ids > 0))),
                row("reward_ranking").on(_without_first) * _share_without_first,
                at=(0.0,),
                order=None,
            ),
        ],
    ),
    Row(
        "reward_binary",
        [{}],
        groups,
        equals=[
            Equal("`bradley_terry` of each answer against one of reward 0", BT.on(_against_zero)),
            Equal("`process_reward` on answers of one token", row("process_reward").on(_as_tokens)),
        ],
        limits=[
            Limit(
                "x → 0 in scores x",
                "(loss - log 2)/x is ∓s/2",
                lambda x: (row("reward_binary").on(lambda s: s.but(scores=x * scores(s))) - LOG2) / x,
                Value(c.over_rows(lambda s: -c.sign(s) * scores(s) / 2)),
            )
        ],
    ),
    Row(
        "reward_regression",
        [{}],
        groups,
        equals=[
            Equal("`value_loss` on answers of one token", row("value_loss").on(c.scored_alone, _as_tokens)),
        ],
        limits=[
            Limit(
                "x → 0 in rewards / x",
                "x loss - r²/(2x) is -r s: the scores' policy gradient",
                lambda x: Value(
                    lambda s: (
                        x * row("reward_regression").on(lambda t: t.but(rewards=t.rewards / x))(s)
                        - _scored_mean(s, s.rewards.square()) / (2 * x)
                    )
                ),
                Value(lambda s: _scored_mean(s, -s.rewards * scores(s))),
                within=2e-2,
            )
        ],
    ),
    Row(
        "process_reward",
        [{}],
        groups,
        equals=[
            Equal(
                "`reward_binary` with every token an answer",
                row("reward_binary").on(_tokens_as_answers),
                row("process_reward").on(hard),
                when="labels are 0 or 1",
            )
        ],
        limits=[
            Limit(
                "x → 0, labels x away from 0 and 1",
                "`reward_binary` with every token an answer",
                lambda x: row("process_reward").on(softened(x)),
                row("reward_binary").on(_tokens_as_answers),
            )
        ],
    ),
    Row(
        "value_loss",
        [{}, {"clip_eps": 0.2}],
        groups,
        equals=[
            Equal(
                "`reward_regression` with every token an answer",
                row("reward_regression").on(_values_as_scores),
            ),
            Equal(
                "the same, on the value or the old one moved by at most clip_eps towards it, whichever is further off",
                row("reward_regression").on(_held_values(0.2), _values_as_scores),
                row("value_loss", clip_eps=0.2),
                when="clip_eps is 0.2",
            ),
        ],
        limits=[
            Limit(
                "clip_eps beyond every move",
                "the plain loss",
                lambda x: row("value_loss", clip_eps=x),
                row("value_loss"),
                at=(4.1, 100.0),
                order=None,
            ),
        ],
        trained_by="ppo",
    ),
    Row(
        "dro",
        [BETA],
        started,
        equals=[
            Equal("`reward_regression` of V + beta S to the reward", row("reward_regression").on(_against_critic(B))),
            Equal(
                "half of that",
                0.5 * row("reward_regression").on(_against_critic(B)),
                row("dro", beta=B, value_coef=0.5),
                when="value_coef is 1/2",
            ),
            Equal(
                "beta/2 `agro_off_policy`",
                B / 2 * row("agro_off_policy", beta=B),
                row("dro", beta=B).on(_critic_is_mean),
                when="V is the mean of R over two answers",
                scene=whole_pairs,
            ),
        ],
        limits=[
            Limit(
                "beta → 0",
                "`reward_regression` of V to the reward",
                lambda x: row("dro", beta=x),
                row("reward_regression").on(_against_critic(0.0)),
                within=2e-2,
            )
        ],
    ),
]
