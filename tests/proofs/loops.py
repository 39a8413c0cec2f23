"""Loops round the objectives: what picks the answers, the opponents, the reference and the weights.

They have no gradient of their own. Each is held by a truth (a test), an identity with another loop, a limit, and a run. Names
are those of "Loops on sampled answers" in docs/objectives.md; the last ones are not in that table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.proofs import loop_measures as m
from tests.proofs.proof import Measured, check_errors


@dataclass(frozen=True)
class Loop:
    """What proves a loop.

    Attributes:
        name: as in docs/objectives.md.
        settings: what turns it on.
        truth: tests that hold it to its definition, as node ids.
        equals: identities: measured, or node ids with what they say.
        limits: limiting cases: measured, or node ids with what they say.
        trained_by: tests that run it, as node ids.
        documented: whether the name is a row of the table in docs/objectives.md.
    """

    name: str
    settings: Sequence[str]
    truth: Sequence[str]
    equals: Sequence[Measured | tuple[str, str]]
    limits: Sequence[Measured | tuple[str, str]]
    trained_by: Sequence[str]
    documented: bool = True


GAME, SELECT, OPPONENTS = (
    "tests/losses/test_nash_game.py",
    "tests/rollout/test_select.py",
    "tests/rollout/test_opponents.py",
)
PAIRWISE, ONLINE = (
    "tests/test_pairwise.py",
    "tests/test_every_objective.py::test_pair_objectives_train_online_from_yaml",
)
PLAY = "tests/test_every_objective.py::test_trains_from_yaml[nash_md_pg]"
KEPT = f"{PAIRWISE}::test_supervised_training_on_the_answers_that_are_kept"

LOOPS = [
    Loop(
        "online or iterative DPO, IPO, SLiC, ...",
        ("pair_selection",),
        (f"{SELECT}::test_pairs_are_those_of_a_loop", f"{PAIRWISE}::test_pairs_are_what_the_answers_earn"),
        [Measured("two answers per prompt", "`pair_selection: all`", m.two_answers)],
        [Measured("equal rewards", "no pair is trained on", m.ties)],
        (ONLINE,),
    ),
    Loop(
        "RS-DPO: all pairs with a clear winner",
        ("pair_selection", "pair_min_gap"),
        (f"{SELECT}::test_pairs_are_those_of_a_loop",),
        [Measured("a gap just below the widest", "`pair_selection: best_worst`", m.widest_gap)],
        [Measured("pair_min_gap → 0", "every pair but ties", m.no_gap)],
        (f"{PAIRWISE}::test_a_gap_that_is_asked_for_thins_out_pairs", ONLINE),
    ),
    Loop(
        "BPO: stay close to the policy that sampled",
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        ("tests/trainer/test_references.py::test_reference_after_every_step",),
        [Measured("`dpo` right after a move", "beta `reinforce` with ±1, in gradient", m.fresh_reference)],
        [
            (
                "a move at every step: every KL is 0",
                "tests/trainer/test_references.py::test_a_reference_that_moves_inside_a_generation_is_the_one_compared_with",
            )
        ],
        (f"{PAIRWISE}::test_resume_is_bit_identical",),
    ),
    Loop(
        "preferences that no reward explains",
        ("judge",),
        (f"{SELECT}::test_all_pairs_of_a_judge_follow_each_comparison_and_not_the_mean",),
        [Measured("a judge that follows Bradley-Terry on rewards", "the pairs of the rewards", m.judged_like_rewards)],
        [Measured("rewards / x, x → 0", "a judge that is always sure", m.sure_judge, at=(1e-7, 1e-9))],
        (f"{PAIRWISE}::test_pairs_are_what_the_answers_earn",),
    ),
    Loop(
        "Nash-MD",
        ("mixture_coef",),
        (
            f"{GAME}::test_expected_gradient_of_the_loss_is_the_enumerated_one",
            f"{OPPONENTS}::test_logps_are_those_of_the_normalised_mixture",
        ),
        [
            (
                "mixture_coef 0 draws the policy's answers, 1 the reference's",
                f"{OPPONENTS}::test_at_its_ends_the_mixture_is_the_policy_and_the_reference",
            )
        ],
        [
            (
                "mixture_coef → 0: it rests ever nearer to the equilibrium of self-play",
                f"{GAME}::test_a_mixture_rests_at_the_best_answer_to_itself_mixed_and_nears_the_equilibrium",
            ),
            (
                "mixture_coef 1: the best answer to the reference, in closed form",
                f"{GAME}::test_the_reference_as_opponent_gives_the_best_answer_to_it",
            ),
        ],
        (PLAY, f"{PAIRWISE}::test_a_step_of_nash_md_is_that_of_its_loss"),
    ),
    Loop(
        "Nash-EMA",
        ("opponent_ema_decay",),
        (f"{OPPONENTS}::test_the_average_samples_like_a_model_with_its_weights",),
        [("it rests where self-play rests", f"{GAME}::test_a_moving_average_as_opponent_rests_there_as_well")],
        [
            Measured(
                "decay → 0",
                "the opponent is the policy: self-play",
                m.average,
                at=(1e-2, 1e-3, 1e-4),
                order=1.0,
                within=1e-3,
            )
        ],
        (f"{PAIRWISE}::test_the_average_moves_by_its_decay_and_plays",),
    ),
    Loop(
        "self-play",
        ("mixture_coef",),
        (f"{GAME}::test_self_play_rests_at_the_regularised_nash_equilibrium",),
        [("beta/4 online IPO, in expected gradient", f"{GAME}::test_online_ipo_has_the_gradient_of_self_play")],
        [("mixture_coef at 0", f"{OPPONENTS}::test_at_its_ends_the_mixture_is_the_policy_and_the_reference")],
        (PLAY,),
    ),
    Loop(
        "online IPO with soft labels, IPO-MD",
        ("mixture_coef",),
        ("tests/losses/test_online_family.py::test_ipo_md_rests_at_the_best_answer_to_the_mixture",),
        [("4/beta self-play, in expected gradient", f"{GAME}::test_online_ipo_has_the_gradient_of_self_play")],
        [
            (
                "sure labels: IPO",
                "tests/losses/test_preference_family.py::test_ipo_md_with_certain_wins_is_ipo_and_swapping_is_symmetric",
            )
        ],
        (f"{ONLINE}[ipo_md]", f"{PAIRWISE}::test_a_step_is_that_of_the_loss_on_all_pairs_however_it_is_cut"),
    ),
    Loop(
        "best of n",
        ("keep",),
        (f"{SELECT}::test_filters_by_a_loop",),
        [Measured("one answer per prompt", "`sft` on all answers", m.sft_on_one)],
        [Measured("n = 1", "nothing is left out", m.one_answer)],
        (KEPT,),
    ),
    Loop(
        "ReST, expert iteration",
        ("keep", "keep_threshold"),
        (f"{SELECT}::test_filters_by_a_loop",),
        [Measured("the threshold at a prompt's best reward", "best of n", m.top_threshold)],
        [Measured("threshold → -∞", "nothing is left out", m.low_threshold, at=(-1e3, -math.inf))],
        (KEPT,),
    ),
    Loop(
        "RSO",
        ("keep", "keep_beta"),
        (
            f"{SELECT}::test_rejection_keeps_with_the_probability_of_its_formula",
            f"{SELECT}::test_rejection_with_the_true_maximum_draws_from_the_tilted_policy",
        ),
        [Measured("keep_beta → 0", "best of n", m.cold, at=(1e-6, 1e-9))],
        [Measured("keep_beta → ∞", "nothing is left out", m.hot, at=(1e9, 1e12))],
        (KEPT, f"{PAIRWISE}::test_rejection_thins_out_pairs"),
    ),
    Loop(
        "replay",
        ("replay_probability", "replay_capacity"),
        ("tests/rollout/test_replay.py::test_the_share_and_the_choice_are_uniform",),
        [
            (
                "mixed with fresh answers AGRO still rests at the optimum",
                "tests/losses/test_agro.py::test_members_of_a_group_may_come_from_different_policies",
            )
        ],
        [
            (
                "probability 0: fresh answers alone",
                "tests/rollout/test_replay.py::test_nothing_stored_or_probability_zero_changes_nothing",
            )
        ],
        ("tests/test_trainer.py::test_online_objectives_train_with_lora",),
        documented=False,
    ),
    Loop(
        "importance weights for a foreign sampler",
        ("sampler_correction",),
        (
            "tests/trainer/test_sampler_correction.py::test_corrected_gradient_is_the_on_policy_one",
            "tests/losses/test_online_family.py::test_importance_weights_by_hand",
        ),
        [Measured("the policy itself sampled", "the loss without weights", m.own_samples)],
        [
            Measured("cap beyond every weight, per token", "the ratio", m.weights, at=(1e2, 1e9), within=1e-11),
            Measured(
                "cap beyond every weight, per answer",
                "the product of the ratios",
                lambda x: m.weights(x, "sequence"),
                at=(1e9,),
                within=1e-11,
            ),
        ],
        ("tests/trainer/test_sampler_correction.py::test_metrics_and_weights_of_a_foreign_sampler",),
        documented=False,
    ),
    Loop(
        "KL controllers",
        ("kl_controller",),
        ("tests/test_kl.py::test_proportional_by_hand", "tests/test_kl.py::test_halve_double_by_hand"),
        [Measured("a KL between target/1.5 and 1.5 target", "halve/double is fixed", m.inside)],
        [Measured("1/horizon → 0", "proportional is fixed", m.horizon, at=(1e-3, 1e-4, 1e-5), order=1.0, within=1e-3)],
        ("tests/trainer/test_kl_controllers.py::test_beta_follows_the_logged_kl_wherever_it_sits",),
        documented=False,
    ),
    Loop(
        "sums of objectives",
        ("objective",),
        ("tests/test_objective.py::test_objectives_add_up_with_their_own_denominators",),
        [Measured("`dpo` + 0.7 `sft`, averaged per answer", "`rpo` with alpha 0.7", m.sum_is_rpo)],
        [
            Measured(
                "the second weight → 0",
                "the first objective",
                m.second_weight,
                at=(1e-2, 1e-3, 1e-4),
                order=1.0,
                within=1e-2,
            )
        ],
        ("tests/test_every_objective.py::test_trains_from_yaml[ppo]",),
        documented=False,
    ),
    Loop(
        "KL terms k1, k2, k3, ratio_k3, exact",
        ("objective_args",),
        (
            "tests/test_kl.py::test_expected_gradients_by_enumeration",
            "tests/test_kl.py::test_expected_values_by_enumeration",
        ),
        [("`grpo` is `ppo_clip` + k3 on the axes", "tests/test_objective.py::test_grpo_is_clip_plus_k3_on_the_axes")],
        [("near the reference k3 keeps its digits", "tests/test_kl.py::test_k3_is_exact_near_zero_and_never_negative")],
        ("tests/test_every_objective.py::test_trains_from_yaml[kl_policy_gradient]",),
        documented=False,
    ),
]


def node_ids() -> list[str]:
    """Every test that a loop refers to."""
    found: set[str] = set()
    for loop in LOOPS:
        told = [p[1] for p in (*loop.equals, *loop.limits) if isinstance(p, tuple)]
        found |= {*loop.truth, *loop.trained_by, *told}
    return sorted(found)


def check(loop: Loop, proof: Measured) -> list[float]:
    """The errors of a measured proof of a loop."""
    return check_errors(
        f"{loop.name}, {proof.parameter}: {proof.to}", proof, [proof.errors(x) for x in proof.at]
    ).errors
