"""Preference pairs: losses that use lengths or a likelihood, and transport. What each is equal to, and where it goes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlft import losses
from rlft.worlds import World
from tests.losses.enumeration import Setting
from tests.proofs import changes as c
from tests.proofs.proof import Equal, Limit, Measured, Row, row
from tests.proofs.rows_pairs import BETA, DPO, B, of_chosen, pair_by_pair
from tests.proofs.scene import Scene, pairs

SMOOTHED = row("dpo", beta=B, label_smoothing=0.1)


def mean_rewards(beta: float) -> Callable[[Scene], Scene]:
    """Scores that are beta times the mean log-prob per token."""
    return lambda s: s.but(scores=beta * s.summed(s.logps) / s.lengths())


def _chosen_lowered(s: Scene) -> Scene:
    return s.but(logps=s.logps - 0.25 * c.is_chosen(s)[:, None])


def _log_odds(s: Scene) -> Scene:
    p = (s.summed(s.logps) / s.lengths()).exp()
    return s.but(scores=(p / (1 - p)).log())


def padded_with_certainty(length: float) -> Callable[[Scene], Scene]:
    """Every answer ``length`` tokens long: one holds all of its log-prob, the others are certain."""

    def change(scene: Scene) -> Scene:
        s, more = c.folded(scene), int(length) - 1

        def wide(t: Tensor) -> Tensor:
            return torch.cat([t, torch.zeros(len(t), more, dtype=t.dtype)], -1)

        some = s.mask.expand(-1, int(length))
        kept = {n: wide(t) for n, t in s.outputs.items() if t.ndim == 2}
        batch = s.batch.replace(
            completion_ids=some.long(), completion_mask=torch.ones_like(some), mask=some, old_logps=wide(s.ref),
            ref_logps=wide(s.ref), advantages=None, values=None, returns=None, extras={},
        )  # fmt: skip
        return Scene(batch, kept, scene.leaves)

    return change


def _wpo_weights(s: Scene) -> Tensor:
    p = (s.summed(s.logps) / s.lengths()).exp().detach()
    return p[0::2] * p[1::2]


def _on_policy_dpo(_: float) -> float:
    """All pairs of answers of one token, each pair once: WPO's weights are the chances that the policy draws the pair."""
    s = Setting(World.bandit(4))
    i, j = s.world.tuples(2).unbind(-1)
    ref, ones, chance = s.world.answer_logps(s.ref), torch.ones(len(i)), (s.policy[i] * s.policy[j]).detach()
    logps = s.world.answer_logps(s.logits)
    found = s.gradient(losses.wpo(logps[i], logps[j], ref[i], ref[j], ones, ones, beta=B).loss.sum())
    logps = s.world.answer_logps(s.logits)
    h = logps[i] - logps[j] - ref[i] + ref[j]
    truth = s.gradient((chance * torch.log(1 + torch.exp(-B * h))).sum())
    return float((found - truth).abs().max() / truth.abs().max())


LENGTHS = [
    Row(
        "simpo",
        [{"beta": 2.0, "gamma": 0.5}, {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal(
                "`bradley_terry` with margin gamma, the rewards beta times the mean log-prob",
                row("bradley_terry", margin=0.5).on(mean_rewards(2.0)),
            ),
            Equal(
                "`dpo_reference_free` on mean log-probs, the chosen lowered by gamma/beta",
                row("dpo_reference_free", beta=2.0, label_smoothing=0.1).on(c.per_token, c.folded, _chosen_lowered),
                row("simpo", beta=2.0, gamma=0.5, label_smoothing=0.1),
                when="both have label_smoothing 0.1",
            ),
        ],
        limits=[
            Limit(
                "gamma → 0",
                "`dpo_reference_free` on mean log-probs",
                lambda x: row("simpo", beta=2.0, gamma=x),
                row("dpo_reference_free", beta=2.0).on(c.per_token),
            )
        ],
    ),
    Row(
        "orpo",
        [{**BETA, "eps": 0.0}, BETA, {"beta": B, "eps": 0.01}],
        pairs,
        equals=[
            Equal(
                "`sft` on the chosen answers, averaged per answer, + beta `bradley_terry` on log odds",
                of_chosen("sequence_mean") + B * row("bradley_terry").on(_log_odds),
            )
        ],
        limits=[
            Limit(
                "beta → 0", "`sft` on the chosen answers", lambda x: row("orpo", beta=x), of_chosen("sequence_mean")
            ),
            Limit("eps → 0", "the paper's odds", lambda x: row("orpo", beta=B, eps=x), row("orpo", beta=B, eps=0.0)),
        ],
    ),
    Row(
        "cpo",
        [BETA, {"beta": B, "nll_weight": 0.4, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal(
                "`dpo_reference_free` + 0.4 `sft` on the chosen answers, averaged per answer",
                row("dpo_reference_free", beta=B, label_smoothing=0.1) + 0.4 * of_chosen("sequence_mean"),
                row("cpo", beta=B, nll_weight=0.4, label_smoothing=0.1),
                when="nll_weight is 0.4 and both have label_smoothing 0.1",
            )
        ],
        limits=[
            Limit(
                "nll_weight → 0",
                "`dpo_reference_free`",
                lambda x: row("cpo", beta=B, nll_weight=x),
                row("dpo_reference_free", beta=B),
            )
        ],
    ),
    Row(
        "rpo",
        [{"beta": B, "alpha": 0.5}],
        pairs,
        equals=[
            Equal(
                "`dpo` + alpha `sft` on the chosen answers, averaged per answer",
                DPO + 0.5 * of_chosen("sequence_mean"),
            )
        ],
        limits=[Limit("alpha → 0", "`dpo`", lambda x: row("rpo", beta=B, alpha=x), DPO)],
    ),
    Row(
        "wpo",
        [BETA, {"beta": B, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal("`dpo` of each pair, times its weight, a constant", pair_by_pair(DPO, _wpo_weights)),
            Equal(
                "the same",
                pair_by_pair(SMOOTHED, _wpo_weights),
                row("wpo", beta=B, label_smoothing=0.1),
                when="both have label_smoothing 0.1",
            ),
        ],
        limits=[
            Limit(
                "1/length → 0, all tokens but one certain",
                "`dpo`",
                lambda x: row("wpo", beta=B).on(padded_with_certainty(1 / x)),
                DPO,
            )
        ],
        expected=[Measured("all pairs of answers of one token", "`dpo` on pairs that the policy draws", _on_policy_dpo)],
        differences=False,
    ),
    Row(
        "ld_dpo",
        [{"beta": B, "ld_alpha": 0.4}, {"beta": B, "ld_alpha": 0.4, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal("`dpo` with the log-probs beyond the shorter answer times ld_alpha", SMOOTHED.on(lambda s: _thinned(s, 0.4)),
                row("ld_dpo", beta=B, ld_alpha=0.4, label_smoothing=0.1),
                when="both have label_smoothing 0.1"),
            Equal("`dpo`", DPO, row("ld_dpo", beta=B, ld_alpha=1.0), when="ld_alpha is 1"),
        ],
        limits=[
            Limit("1 - ld_alpha → 0", "`dpo`", lambda x: row("ld_dpo", beta=B, ld_alpha=1 - x), DPO),
            Limit(
                "ld_alpha at 0",
                "`dpo` on the shared length",
                lambda x: row("ld_dpo", beta=B, ld_alpha=0.0),
                DPO.on(lambda s: _thinned(s, 0.0)),
                at=(0.0,),
                order=None,
            ),
        ],
    ),
]  # fmt: skip


def _thinned(scene: Scene, alpha: float) -> Scene:
    """Log-probs of tokens beyond the length of the pair's shorter answer times alpha, token by token."""
    weights = torch.ones_like(scene.ref)
    for k in range(0, scene.batch.num_rows, 2):
        shared = int(min(scene.mask[k].sum(), scene.mask[k + 1].sum()))
        for i in (k, k + 1):
            counted = scene.mask[i].nonzero().flatten()[shared:]
            weights[i, counted] = alpha
    return scene.but(logps=scene.logps * weights, ref_logps=scene.ref * weights)


# -- transport --------------------------------------------------------------------------------------------------------
def _ranked(values: Tensor, kept: list[int]) -> list[int]:
    numbers = values.tolist()
    return sorted(kept, key=lambda i: numbers[i])


def margins_by_rank(scene: Scene) -> Scene:
    """The k-th smallest reference margin is given to the pair with the k-th smallest policy margin."""
    kept = c.alive(scene).nonzero().flatten().tolist()
    policy, ref = scene.summed(scene.logps).detach(), scene.summed(scene.ref)
    mine, theirs = policy[0::2] - policy[1::2], ref[0::2] - ref[1::2]
    matched = torch.zeros_like(theirs)
    for to, source in zip(_ranked(mine, kept), _ranked(theirs, kept), strict=True):
        matched[to] = theirs[source]
    sides = torch.stack([matched - c.FAR, torch.full_like(matched, -c.FAR)], -1)
    return c.folded(scene).but(ref_logps=sides.reshape(-1, 1))


def rejected_by_rank(scene: Scene) -> Scene:
    """The rejected answer with the k-th smallest implicit reward meets the chosen one of that rank."""
    kept = c.alive(scene).nonzero().flatten().tolist()
    ratios = c.log_ratio(scene).detach()
    order = torch.arange(scene.batch.num_rows)
    for to, source in zip(_ranked(ratios[0::2], kept), _ranked(ratios[1::2], kept), strict=True):
        order[2 * to + 1] = 2 * source + 1
    return scene.take(order).but(group_ids=scene.batch.group_ids)


TRANSPORT = [
    Row(
        name,
        [BETA, {"beta": B, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal(f"`dpo` after {what}", DPO.on(change)),
            Equal(
                "the same",
                SMOOTHED.on(change),
                row(name, beta=B, label_smoothing=0.1),
                when="both have label_smoothing 0.1",
            ),
        ],
        limits=[
            Limit(
                "a batch of one pair",
                "`dpo`",
                lambda x, name=name: row(name, beta=B).on(c.first_pair),
                DPO.on(c.first_pair),
                at=(0.0,),
                order=None,
            )
        ],
    )
    for name, what, change in (
        ("aot", "sorting the reference's margins like the policy's", margins_by_rank),
        ("aot_unpaired", "sorting the rejected implicit rewards like the chosen ones", rejected_by_rank),
    )
]
