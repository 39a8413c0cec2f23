"""Preference pairs: anchored losses. What each is equal to, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from tests.proofs import changes as c
from tests.proofs.proof import Equal, Limit, Row, Value, row
from tests.proofs.rows_pairs import BETA, DPO, HALF_MARGIN, LOG2, B, slope_at_zero
from tests.proofs.scene import Scene, pairs, whole_pairs

#: -h/4, averaged over pairs.
QUARTER_MARGIN = 0.5 * HALF_MARGIN


def reward_binary(scores: Callable[[Scene], Tensor]) -> Value:
    """reward_binary on given scores ``[B]``; the chosen answers are the desirable ones."""
    return row("reward_binary").on(lambda s: s.but(scores=scores(s), labels=c.is_chosen(s)))


ANCHORED = [
    Row(
        "apo_zero",
        [BETA],
        pairs,
        equals=[
            Equal(
                "2 `kto`",
                2 * row("kto", beta=B).on(c.but(kl_baseline=c.everywhere(0.0))),
                when="chosen answers are desirable, the others not, and z0 is 0",
                scene=whole_pairs,
            )
        ],
        limits=[
            Limit(
                "beta → 0",
                "(loss - 1)/beta is -h/4",
                slope_at_zero("apo_zero", 1.0),
                QUARTER_MARGIN,
                order=2.0,
                at=(0.1, 0.03, 0.01),
            )
        ],
    ),
    Row(
        "apo_down",
        [BETA],
        pairs,
        equals=[
            Equal(
                "`apo_zero` with chosen := h and rejected := the chosen log-ratio",
                row("apo_zero", beta=B).on(c.with_ratio_of(c.margin, c.ratio(0))),
            )
        ],
        limits=[
            Limit(
                "beta → 0",
                "(loss - 1)/beta is x_l/4",
                slope_at_zero("apo_down", 1.0),
                Value(c.over_pairs(lambda s: c.ratio(1)(s) / 4)),
                order=2.0,
                at=(0.1, 0.03, 0.01),
            )
        ],
    ),
    Row(
        "anchored_dpo",
        [BETA, {"beta": B, "delta": 0.5}],
        pairs,
        equals=[
            Equal(
                "`dpo` + `dpo` against an answer of implicit reward delta",
                DPO + DPO.on(c.with_ratio_of(rejected=c.constant(0.5 / B))),
                left=row("anchored_dpo", beta=B, delta=0.5),
            )
        ],
        limits=[
            Limit("e^delta → 0", "`dpo`", lambda x: row("anchored_dpo", beta=B, delta=math.log(x)), DPO),
        ],
    ),
    Row(
        "exo_pair",
        [BETA, {"beta": B, "label_smoothing": 0.1}],
        pairs,
        equals=[
            Equal(
                "`reward_aware_rpo` with distance forward_kl",
                row("reward_aware_rpo", beta=B, eta=1.0, distance="forward_kl").on(
                    c.but(margin=c.everywhere(math.log(9)))
                ),
                left=row("exo_pair", beta=B, label_smoothing=0.1),
                when="every margin is log((1 - e)/e)",
            )
        ],
        limits=[
            Limit(
                "1/2 - label_smoothing → 0",
                "swapping the answers changes nothing",
                lambda x: _exo(0.5 - x) - _exo(0.5 - x).on(c.swapped) + DPO,
                DPO,
            )
        ],
    ),
    Row(
        "nca_pair",
        [BETA],
        pairs,
        equals=[
            Equal(
                "1/2 `bco_pair` + 1/2 `bco_pair` of the chosen answer with itself",
                0.5 * row("bco_pair", beta=B) + 0.5 * row("bco_pair", beta=B).on(c.with_ratio_of(rejected=c.ratio(0))),
            )
        ],
        limits=[
            Limit("beta → 0", "(loss - 2 log 2)/beta is -h/4", slope_at_zero("nca_pair", 2 * LOG2), QUARTER_MARGIN),
        ],
    ),
    Row(
        "bco_pair",
        [{"beta": B, "delta": -0.2}, BETA],
        pairs,
        equals=[
            Equal(
                "2 `reward_binary` on the implicit rewards less delta",
                2 * reward_binary(lambda s: B * c.log_ratio(s) + 0.2),
                scene=whole_pairs,
            ),
            Equal(
                "`dpo` of the chosen answer against delta + `dpo` of delta against the rejected one",
                DPO.on(c.with_ratio_of(rejected=c.constant(-0.2 / B)))
                + DPO.on(c.with_ratio_of(chosen=c.constant(-0.2 / B))),
            ),
        ],
        limits=[
            Limit(
                "e^-delta → 0",
                "loss - delta is -beta x_w",
                lambda x: row("bco_pair", beta=B, delta=-math.log(x)) + math.log(x),
                Value(c.over_pairs(lambda s: -B * c.ratio(0)(s))),
            )
        ],
    ),
    Row(
        "sppo_hard",
        [BETA],
        pairs,
        equals=[
            Equal(
                "`ipo` of the chosen answer against the reference's level + `ipo` of that level against the rejected one",
                row("ipo", beta=B).on(c.with_ratio_of(rejected=c.constant(0.0)))
                + row("ipo", beta=B).on(c.with_ratio_of(chosen=c.constant(0.0))),
            )
        ],
        limits=[
            Limit(
                "1/beta → 0",
                "x_w² + x_l²",
                lambda x: row("sppo_hard", beta=1 / x),
                Value(c.over_pairs(lambda s: c.ratio(0)(s).square() + c.ratio(1)(s).square())),
            )
        ],
    ),
]


def _exo(e: float) -> Value:
    return row("exo_pair", beta=B, label_smoothing=e)
