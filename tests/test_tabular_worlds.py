"""The page of the exact worlds: objectives rest where it says, noise vanishes where it says, and the page is current."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.worlds import __main__ as command
from benchmarks.worlds import figure, variance
from benchmarks.worlds.field import Field
from benchmarks.worlds.page import REACHED, rest_line, variance_cell
from benchmarks.worlds.problem import Problem
from benchmarks.worlds.rest import rest
from benchmarks.worlds.rows import ROWS, WITHOUT, Row

from rlft import catalogue, recipes
from rlft.worlds import World, expected_loss
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
    "reinforce (advantage: reward_to_go, kl: reward, kl_value: k1)",
    "ppo_penalty (advantage: leave_one_out)",
    "sapo (advantage: leave_one_out, kl: reward, kl_value: k1)",
    "reinforce_plus_plus_baseline",
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
        assert one.how == "rest" or letter != "y"
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


# -- what clips -------------------------------------------------------------------------------------------------------


def best_within_clips(
    problem: Problem, behaviour: torch.Tensor, low: float, high: float
) -> tuple[float, Callable[[torch.Tensor], float]]:
    """The largest clipped surrogate in a bandit, by filling the steepest pieces first, and the surrogate as a function.

    ``min(rho A, clip(rho) A)`` summed over rivals is piecewise linear and concave in rho, with kinks at both bounds.
    """
    mu = problem.world.answer_logps(behaviour).exp()
    regularised = problem.rewards - problem.beta * (mu.log() - problem.world.answer_logps(problem.ref))
    apart = regularised[:, None] - regularised[None, :]
    up, down = apart.clamp(min=0) @ mu, (-apart).clamp(min=0) @ mu

    def worth(p: torch.Tensor) -> float:
        ratio = p / mu
        return (mu * (up * ratio.clamp(max=high) - down * ratio.clamp(min=low))).sum().item()

    pieces = [(up, low), (up - down, high - low), (-down, 1e9)]
    slopes = [(slope[i].item(), (mu[i] * width).item(), i) for slope, width in pieces for i in range(len(mu))]
    p, left = torch.zeros_like(mu), 1.0
    for _, room, i in sorted(slopes, reverse=True):
        p[i] += min(room, left)
        left -= min(room, left)
    return worth(p), worth


@pytest.mark.parametrize("sampler", ["from the reference", "from a stranger"])
def test_a_clipped_policy_rests_where_the_surrogate_is_largest(sampler: str) -> None:
    problem = command.bandit()
    behaviour = command.samplers(problem)[sampler]
    assert behaviour is not None
    row = next(row for row in ALL.values() if row.objective == "ppo_clip")
    found = rest(problem, row, behaviour)
    assert found.how == "clip"
    assert found.residual < 1e-8
    largest, worth = best_within_clips(problem, behaviour, 0.8, 1.2)
    p = problem.world.answer_logps(found.logits).exp()
    assert worth(p) == pytest.approx(largest, abs=1e-6)
    assert worth(problem.world.answer_logps(problem.ref).exp()) < largest - 1e-2


def test_p3o_reaches_the_optimum_from_any_samples_unless_each_answer_is_clipped() -> None:
    problem = command.bandit()
    for hyper, arrives in (
        ({"clip_eps": 0.2, "clipping": "joint"}, True),
        ({"clip_eps": 1.0, "clip_eps_high": 10**6}, True),
        ({"clip_eps": 0.2}, False),
    ):
        found = rest(problem, Row("p3o", hyper, clip="" if arrives else "sum"), problem.ref)
        assert (found.kl < REACHED) == arrives


# -- critics, steps and normalised advantages -------------------------------------------------------------------------


def test_ppo_finds_the_optimum_and_its_value_and_is_silent_there() -> None:
    row = Row("ppo")
    found = rest(TOKENS, row, None)
    assert found.kl < REACHED
    first = TOKENS.world.optimal_value(TOKENS.ref, TOKENS.rewards, TOKENS.beta)
    torch.testing.assert_close(found.values[0], first, rtol=0, atol=1e-8)
    gradients, weights = Field(TOKENS, row, None).per_group(found.logits, found.values)
    assert (weights * gradients.square().sum(-1)).sum().item() < 1e-16


def test_a_critic_that_cannot_tell_prefixes_apart_is_harmless_at_lambda_one_alone() -> None:
    assert rest(TOKENS, Row("ppo", {"lam": 1.0}, one_value=True), None).kl < REACHED
    assert rest(TOKENS, Row("ppo", one_value=True), None).kl > 1e-3


def test_trust_region_steps_go_round_the_optimum_at_a_distance_set_by_their_length() -> None:
    hyper = {"advantage": "leave_one_out", "kl": "reward", "kl_value": "k1"}
    problem = command.bandit()
    start = problem.world.kl(problem.ref, problem.best).item()
    for length in (1e-3, 1e-4):
        found = rest(problem, Row("trpo", {**hyper, "max_kl": length}), None)
        assert found.how == "steps on"
        assert length / 100 < found.kl * start < length
    field = Field(problem, Row("trpo", hyper), None)
    assert field(problem.best.flatten()[None]).abs().max() < 1e-12  # what keeps it away is the step


def test_normalised_advantages_are_those_of_a_step_that_holds_every_group() -> None:
    """A uniform sampler draws every pair alike, so that one batch of all pairs is the step without end."""
    world = World.bandit(4)
    ref, rewards = world.random_logits(seed=1), world.random_rewards(seed=2)
    problem = Problem("uniform", world, ref, rewards, 1.0)
    row = Row("reinforce_plus_plus_baseline", pairs=False)
    field = Field(problem, row, torch.zeros(1, 4, dtype=torch.float64))
    field.groups, field.orders = world.tuples(2), torch.ones(16, dtype=torch.float64)
    weights = field.weights(field.start(ref)[None])
    batch = field._fixed(1)
    found = field._prepare(batch, weights).advantages
    expected = field.objective.prepare(batch).advantages
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found * (31 / 32) ** 0.5, expected, rtol=1e-6, atol=1e-9)  # n - 1 there, n here


# -- the catalogue ----------------------------------------------------------------------------------------------------


def test_every_online_objective_with_a_kl_is_measured() -> None:
    online = {
        entry.name
        for entry in catalogue.entries()
        if entry.data in ("groups with rewards", "prompts with a judge or rewards") or entry.name.startswith("agro")
    }
    measured = {row.objective for row in ALL.values()}
    assert online - measured == set(WITHOUT)
    assert not measured & set(WITHOUT)
    assert measured - online == {"dpo", "ipo"}
    for name in measured:
        assert f"`{name}`" in PAGE


def test_what_has_no_row_takes_no_kl_to_the_reference() -> None:
    for name in WITHOUT:
        assert "beta" not in recipes.parameters(name)
        assert not recipes.build(name).needs_reference


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
