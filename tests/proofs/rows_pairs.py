"""Preference pairs: DPO, IPO, SLiC and the losses made of them. What each is equal to, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.proofs import changes as c
from tests.proofs.proof import Equal, Limit, Row, Value, row
from tests.proofs.scene import Scene, pairs, whole_pairs

B = 0.3
BETA = {"beta": B}
LOG2 = math.log(2)
DPO = row("dpo", beta=B)
#: -h/2 and h^2, averaged over pairs; h is the chosen log-ratio minus the rejected one.
HALF_MARGIN = Value(c.over_pairs(lambda s: -c.margin(s) / 2))
MARGIN_SQUARED = Value(c.over_pairs(lambda s: c.margin(s).square()))


def slope_at_zero(name: str, start: float, **hyper: Any) -> Callable[[float], Value]:
    """``(loss - loss at no margin) / beta``, a function of beta."""
    return lambda x: (row(name, beta=x, **hyper) - start) / x


def pair_by_pair(one: Value, weight: Callable[[Scene], Tensor]) -> Value:
    """A loss of each pair by itself, times its weight, averaged over the pairs that count."""

    def run(s: Scene) -> Tensor:
        weights = weight(s)
        kept = c.alive(s).nonzero().flatten().tolist()
        return torch.stack([weights[k] * one.on(c.one_pair(k))(s) for k in kept]).mean()

    return Value(run)


def of_chosen(averaging: str) -> Value:
    """The negative log-likelihood of the chosen answers, by sft."""
    return row("sft", averaging=averaging).on(c.chosen_alone)


def _smoothed(e: float) -> Value:
    return row("dpo", beta=B, label_smoothing=e)


def _blend(s: Scene, temperature: float) -> Tensor:
    return 1 / (1 + torch.exp(-B * c.margin(s) / temperature))


CORE = [
    Row(
        "dpo",
        [BETA, {"beta": B, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal("`generalised_po` with f logistic", row("generalised_po", beta=B, f="logistic")),
            Equal(
                "0.9 `robust_dpo` + 0.1 `robust_dpo` with the answers swapped, both at label_smoothing 0",
                0.9 * row("robust_dpo", beta=B, label_smoothing=0.0)
                + 0.1 * row("robust_dpo", beta=B, label_smoothing=0.0).on(c.swapped),
                left=row("dpo", beta=B, label_smoothing=0.1),
                when="label_smoothing is 0.1 (cDPO)",
            ),
        ],
        limits=[
            Limit("beta → 0", "(loss - log 2)/beta is -h/2", slope_at_zero("dpo", LOG2), HALF_MARGIN),
            Limit(
                "1/2 - label_smoothing → 0",
                "swapping the answers changes nothing",
                lambda x: _smoothed(0.5 - x) - _smoothed(0.5 - x).on(c.swapped) + DPO,
                DPO,
            ),
        ],
    ),
    Row(
        "robust_dpo",
        [{"beta": B, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal("(0.9 `dpo` - 0.1 `dpo` with the answers swapped)/0.8", (0.9 * DPO - 0.1 * DPO.on(c.swapped)) / 0.8),
        ],
        limits=[
            Limit("label_smoothing → 0", "`dpo`", lambda x: row("robust_dpo", beta=B, label_smoothing=x), DPO),
        ],
    ),
    Row(
        "dpo_reference_free",
        [BETA, {"beta": B, "label_smoothing": 0.2}],
        pairs,
        equals=[
            Equal("`dpo`", DPO.on(c.no_reference), when="the reference is uniform"),
            Equal(
                "`dpo`",
                _smoothed(0.2).on(c.no_reference),
                row("dpo_reference_free", beta=B, label_smoothing=0.2),
                when="the reference is uniform, both with label_smoothing 0.2",
            ),
            Equal("`cpo`", row("cpo", beta=B, nll_weight=0.0), when="`cpo` has no likelihood term"),
        ],
        limits=[
            Limit(
                "x → 0 in reference^x",
                "`dpo` becomes it",
                lambda x: DPO.on(lambda s: s.but(ref_logps=x * s.ref)),
                row("dpo_reference_free", beta=B),
            )
        ],
    ),
    Row(
        "ipo",
        [BETA],
        pairs,
        equals=[
            Equal("`generalised_po` with f square at 0.6, /0.6²", row("generalised_po", beta=2 * B, f="square") / 0.36),
            Equal("`ipo_md`", row("ipo_md", beta=B).on(c.but(win_rates=c.everywhere(1.0))), when="every win is sure"),
            Equal(
                "4/beta times `agro_off_policy`",
                4 / B * row("agro_off_policy", beta=B).on(c.won_and_lost(0.5)),
                when="pairs are groups of two with rewards ±1/4",
                scene=whole_pairs,
            ),
        ],
        limits=[Limit("1/beta → 0", "h²", lambda x: row("ipo", beta=1 / x), MARGIN_SQUARED)],
    ),
    Row(
        "ipo_mean",
        [BETA],
        pairs,
        equals=[Equal("`ipo`", row("ipo", beta=B).on(c.per_token), when="log-probs are divided by the lengths before")],
        limits=[
            Limit(
                "1/beta → 0", "h², h in means", lambda x: row("ipo_mean", beta=1 / x), MARGIN_SQUARED.on(c.per_token)
            ),
            Limit(
                "answers of one token",
                "`ipo`",
                lambda x: row("ipo_mean", beta=B).on(c.folded),
                row("ipo", beta=B).on(c.folded),
                at=(0.0,),
                order=None,
            ),
        ],
    ),
    Row(
        "slic",
        [BETA, {"beta": B, "delta": 2.5}],
        pairs,
        equals=[
            Equal("`generalised_po` with f hinge", row("generalised_po", beta=B, f="hinge")),
            Equal(
                "`slic_hf` without the likelihood term",
                row("slic_hf", nll_weight=0.0),
                left=row("slic", beta=1.0).on(c.no_reference),
                when="beta is 1 and the reference uniform",
            ),
        ],
        limits=[
            Limit(
                "delta beyond every margin",
                "loss - delta is -beta h",
                lambda x: row("slic", beta=B, delta=x) - x,
                2 * B * HALF_MARGIN,
                at=(30.0, 300.0),
                order=None,
            )
        ],
    ),
    Row(
        "slic_hf",
        [{"nll_weight": 0.2}],
        pairs,
        equals=[
            Equal(
                "`slic` with a uniform reference + 0.2 `sft` on the chosen answers, in sums",
                row("slic", beta=1.0, delta=2.5).on(c.no_reference) + 0.2 * of_chosen("sequence_sum"),
                left=row("slic_hf", nll_weight=0.2, delta=2.5),
            )
        ],
        limits=[
            Limit(
                "nll_weight → 0",
                "`slic` with a uniform reference",
                lambda x: row("slic_hf", nll_weight=x),
                row("slic", beta=1.0).on(c.no_reference),
            )
        ],
    ),
    Row(
        "generalised_po",
        [{"beta": B, "f": f} for f in ("logistic", "square", "hinge", "exp")],
        pairs,
        equals=[
            Equal("`dpo`", DPO, when="f is logistic"),
            Equal(
                "beta² `ipo` at beta/2",
                B**2 * row("ipo", beta=B / 2),
                row("generalised_po", beta=B, f="square"),
                when="f is square",
            ),
            Equal("`slic`", row("slic", beta=B), row("generalised_po", beta=B, f="hinge"), when="f is hinge"),
        ],
        limits=[
            Limit(
                f"beta → 0, f {f}",
                f"(loss - f(0))/beta is {slope}",
                slope_at_zero("generalised_po", start, f=f),
                factor * HALF_MARGIN,
            )
            for f, start, slope, factor in (
                ("logistic", LOG2, "-h/2", 1.0),
                ("square", 1.0, "-2h", 4.0),
                ("exp", 1.0, "-h", 2.0),
            )
        ],
    ),
    Row(
        "discopop",
        [BETA],
        pairs,
        equals=[
            Equal(
                "(1 - s) `generalised_po` logistic + s `generalised_po` exp, s = sigmoid(beta h / 0.05), pair by pair",
                pair_by_pair(row("generalised_po", beta=B, f="logistic"), lambda s: 1 - _blend(s, 0.05))
                + pair_by_pair(row("generalised_po", beta=B, f="exp"), lambda s: _blend(s, 0.05)),
            )
        ],
        limits=[
            Limit(
                "temperature towards 0 (2e-4)",
                "`generalised_po` logistic below h = 0, exp above",
                lambda x: row("discopop", beta=B, temperature=2e-4),
                pair_by_pair(row("generalised_po", beta=B, f="logistic"), lambda s: (c.margin(s) < 0).double())
                + pair_by_pair(row("generalised_po", beta=B, f="exp"), lambda s: (c.margin(s) > 0).double()),
                at=(0.0,),
                order=None,
            )
        ],
    ),
    Row(
        "f_dpo",
        [
            *({"beta": B, "divergence": d} for d in ("reverse_kl", "forward_kl", "js", "alpha")),
            {"beta": B, "divergence": "alpha", "alpha": 0.2},
        ],
        pairs,
        equals=[
            Equal("`dpo`", DPO, when="the divergence is reverse_kl"),
            *(
                Equal(
                    f"`dpo` on {what} in place of the log-ratio x",
                    DPO.on(c.as_log_ratios(lambda s, g=g: g(c.log_ratio(s)))),
                    row("f_dpo", beta=B, divergence=d, alpha=0.2),
                    when=f"the divergence is {d}",
                )
                for d, what, g in (
                    ("js", "log sigmoid(x)", lambda x: -torch.log(1 + torch.exp(-x))),
                    ("forward_kl", "-exp(-x)", lambda x: -torch.exp(-x)),
                    ("alpha", "(1 - exp(-x/5))/0.2", lambda x: (1 - torch.exp(-0.2 * x)) / 0.2),
                )
            ),
        ],
        limits=[
            Limit("alpha → 0", "`dpo`", lambda x: row("f_dpo", beta=B, divergence="alpha", alpha=x), DPO),
            Limit(
                "alpha at 1",
                "the divergence forward_kl",
                lambda x: row("f_dpo", beta=B, divergence="alpha", alpha=1.0),
                row("f_dpo", beta=B, divergence="forward_kl"),
                at=(0.0,),
                order=None,
            ),
        ],
    ),
    Row(
        "reward_aware_rpo",
        [{"beta": B, "eta": 0.7, "distance": d} for d in ("backward_kl", "square", "forward_kl")],
        pairs,
        equals=[
            Equal(
                "`dpo` with label_smoothing 0.1, less the entropy of (0.1, 0.9)",
                _smoothed(0.1) + (0.1 * math.log(0.1) + 0.9 * math.log(0.9)),
                row("reward_aware_rpo", beta=B, eta=1.0).on(c.but(margin=c.everywhere(math.log(9)))),
                when="every margin is log 9",
            ),
            Equal(
                "beta²/2 `ipo_md`, the win rates 1/2 + the margins",
                B**2 / 2 * row("ipo_md", beta=B).on(lambda s: s.but(win_rates=0.5 + s.batch.extras["margin"] / 2)),
                row("reward_aware_rpo", beta=B, eta=0.5, distance="square"),
                when="the distance is square and eta 1/2",
            ),
            Equal(
                "`exo_pair`",
                row("exo_pair", beta=B, label_smoothing=0.1),
                row("reward_aware_rpo", beta=B, eta=1.0, distance="forward_kl").on(
                    c.but(margin=c.everywhere(math.log(9)))
                ),
                when="the distance is forward_kl and every margin log 9",
            ),
        ],
        limits=[
            Limit(
                "e^-margin → 0",
                "`dpo`, but for a logarithm",
                lambda x: row("reward_aware_rpo", beta=B, eta=1.0).on(c.but(margin=c.everywhere(-math.log(x)))),
                DPO,
                slack=0.25,  # x log x
            )
        ],
    ),
    Row(
        "ipo_md",
        [BETA],
        pairs,
        equals=[
            Equal(
                "`ipo`",
                row("ipo", beta=B),
                row("ipo_md", beta=B).on(c.but(win_rates=c.everywhere(1.0))),
                when="every win is sure",
            ),
            Equal(
                "`ipo` with the answers swapped",
                row("ipo", beta=B).on(c.swapped),
                row("ipo_md", beta=B).on(c.but(win_rates=c.everywhere(0.0))),
                when="every loss is sure",
            ),
        ],
        limits=[
            Limit(
                "1 - win rate → 0",
                "`ipo`",
                lambda x: row("ipo_md", beta=B).on(c.but(win_rates=c.everywhere(1 - x))),
                row("ipo", beta=B),
            )
        ],
        tests=["tests/losses/test_nash_game.py::test_online_ipo_has_the_gradient_of_self_play"],
    ),
]
