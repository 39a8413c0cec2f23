"""The page of the exact worlds: objectives rest where it says, noise vanishes where it says, and the page is current."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.worlds import __main__ as command
from benchmarks.worlds import figure, variance
from benchmarks.worlds.field import Field, rest
from benchmarks.worlds.page import REACHED, rest_line, variance_cell
from benchmarks.worlds.rows import ROWS, Row

from rlft.worlds import expected_loss
from tests.losses.enumeration import Setting

PAGE = (Path(__file__).parents[1] / "docs" / "worlds.md").read_text(encoding="utf-8")
ALL = {row.name: row for rows in ROWS.values() for row in rows}
TOKENS = command.tokens()
#: Cheap rows that hold the main claims in every run of the suite; the others are held by a slow test.
MAIN = [
    "agro_off_policy",
    "agro_off_policy_cv",
    "agro_off_policy_rb",
    "rloo",
    "dro",
    "agro_on_policy_causal (baseline: position)",
    "agro_on_policy_lr_token (square: h2, linear: g2)",
    "kl_policy_gradient (kl_gradient: k2)",
    "reinforce (advantage: leave_one_out, kl: loss, kl_value: k3)",
    "dpo",
]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- where objectives rest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAIN)
def test_main_resting_points_are_those_of_the_page(name: str) -> None:
    row = ALL[name]
    found = command.rests(row)  # refuses what theory does not say
    for one, letter in zip(found, row.reaches.replace(" ", ""), strict=True):
        assert one.kl < REACHED if letter == "y" else one.kl > 2e-3
        assert one.how == "rest" or letter == "-"
        assert one.stable or one.how == "runs off"
    assert line(rest_line(row, found)) in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in MAIN])
def test_every_other_resting_point_is_that_of_the_page(name: str) -> None:
    assert line(rest_line(ALL[name], command.rests(ALL[name]))) in PAGE


def test_off_policy_agro_arrives_where_the_kl_policy_gradient_stalls() -> None:
    """Figure 1, both ends of it: below 1e-8 of the start, and above 1e-2."""
    for problem in (command.bandit(), TOKENS):
        for behaviour in (problem.ref, problem.stranger()):
            assert rest(problem, Row("agro_off_policy"), behaviour).kl < 1e-8
            assert rest(problem, Row("kl_policy_gradient_exact"), behaviour).kl > 1e-2
    assert rest(command.bandit(), Row("kl_policy_gradient_exact"), None).kl < 1e-8
    assert rest(TOKENS, Row("kl_policy_gradient_exact"), None).kl > 1e-2


def test_a_claim_that_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected yyy yyy, measured y-----; one of the two is wrong"):
        command.rests(replace(ALL["kl_policy_gradient (kl_gradient: k2)"], reaches="yyy yyy"))


def test_the_field_is_the_expected_gradient_of_the_loss() -> None:
    """Built through Objective and Batch, it is what the proofs of the losses enumerate."""
    s = Setting(TOKENS.world, beta=1.0)
    s.ref, s.rewards = TOKENS.ref, TOKENS.rewards
    for name in ("agro_off_policy", "agro_on_policy_exact_kl", "agro_off_policy_rb"):
        row = ALL.get(name) or Row(name)
        flow = Field(TOKENS, row, s.behaviour_logits)
        found = flow(flow.start(s.logits.detach())[None])[0]
        more = {}
        if name.endswith("rb"):
            ratio, mu = s.world.log_ratio_table(s.logits, s.ref), s.behaviour_logits
            for key, table in (("behaviour_log_ratio", ratio), ("behaviour_log_ratio_sq", ratio.square())):
                more[key] = s.world.token_expectation(table, mu)
        function = flow.objective.terms[0].function

        def loss(i, g, function=function, more=more):
            return s.call(function, i, g, **{k: v[i] for k, v in more.items()})

        truth = s.gradient(expected_loss(s.world, 2, s.behaviour, loss))
        torch.testing.assert_close(flow.table(found), truth, rtol=1e-10, atol=1e-13)


def test_the_likelihood_ratio_term_misses_the_optimum_when_beta_is_small() -> None:
    _, without, _, with_it, wrong, _ = command.collapses(0.2, worlds=3)
    assert without == "3/3"
    assert with_it in ("0/3", "1/3")
    assert wrong != "0/3"


# -- variances --------------------------------------------------------------------------------------------------------


def test_plain_estimators_are_silent_at_the_optimum_and_no_other_is() -> None:
    best = TOKENS.best
    for row in (Row("agro_off_policy"), Row("agro_on_policy", {"lr_coef": 1.0}), Row("rloo")):
        for behaviour in (None, TOKENS.ref, TOKENS.stranger()):
            assert variance.spread(TOKENS, row, best, behaviour).variance < 1e-25
    for row in (row for rows in variance.FRESH.values() for row in rows[1:]):
        assert variance.spread(TOKENS, row, best, None).variance > 1e-2, row.name
    for row in (row for rows in variance.OTHER.values() for row in rows[1:]):
        assert variance.spread(TOKENS, row, best, TOKENS.ref).variance > 1e-2, row.name


def test_variance_is_that_of_the_groups_drawn() -> None:
    """Against samples: 4000 groups, five standard errors."""
    logits = variance.places(TOKENS)["half way"]
    flow = Field(TOKENS, Row("agro_off_policy"), TOKENS.ref)
    gradients, weights = flow.per_group(logits)
    assert weights.sum().item() == pytest.approx(1, rel=1e-12)
    drawn = gradients[torch.multinomial(weights, 4000, replacement=True, generator=torch.Generator().manual_seed(0))]
    squares = (drawn - weights @ gradients).square().sum(-1)
    exact = variance.spread(TOKENS, Row("agro_off_policy"), logits, TOKENS.ref).variance
    assert abs(squares.mean().item() - exact) < 5 * squares.std().item() / 4000**0.5


def test_variances_are_those_of_the_page() -> None:
    row = variance.FRESH["Policy gradient of reward minus beta KL"][-1]
    cells = [variance_cell(variance.spread(TOKENS, row, x, None).variance) for x in variance.places(TOKENS).values()]
    assert line([f"`{row.objective}`{row.name.removeprefix(row.objective)}", *cells]) in PAGE


# -- the picture ------------------------------------------------------------------------------------------------------


def test_curves_follow_plain_gradient_descent() -> None:
    """The exact steps of the picture against 400 small updates."""
    problem, row = command.bandit(), Row("kl_policy_gradient_exact")
    times = tuple(t for t in figure.TIMES if t < 10)
    fast = figure.curve(problem, row, problem.ref, times)[times[-1]]
    flow = Field(problem, row, problem.ref)
    x = flow.start(problem.ref)
    for _ in range(400):
        x = x - times[-1] / 400 * flow(x[None])[0]
    slow = (problem.world.kl(flow.table(x), problem.best) / problem.world.kl(problem.ref, problem.best)).item()
    assert fast == pytest.approx(slow, rel=0.02)


def test_the_picture_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    curves = {label: {0.1: 1.0, 10.0: 10.0**-power} for power, label in enumerate(figure.COMPARED)}
    assert figure.draw({f"panel {i}": curves for i in range(6)}).startswith(b"\x89PNG")
