"""docs/worlds.md: the tables, the picture, and what to conclude."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.worlds.rest import Rest
from benchmarks.worlds.rows import ROWS, WITHOUT, Row

__all__ = ["REACHED", "page", "rest_cell", "rest_line", "table", "variance_cell"]

#: Below this share of the start a policy counts as arrived.
REACHED = 1e-8
SAMPLES = ("fresh", "from the reference", "from a stranger")
_TARGETS = {"preference": "a", "nash": "b", "per_token": "c"}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left and the others right."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *rows])


def rest_cell(found: Rest, letter: str = "-") -> str:
    """``reached``, or how far from the target the policy ends, and the letter of the policy it ends at."""
    if found.kl < REACHED:
        return "**reached**"
    mark = {"runs off": "†", "clip": "‡", "steps on": "§", "no step": "§"}.get(found.how, "")
    return f"{found.kl:.2g}{mark}{'' if letter in 'y-' else f' ({letter})'}"


def rest_line(row: Row, found: Sequence[Rest]) -> list[str]:
    """The table's line of one objective."""
    target = f" ({_TARGETS[row.target]})" if row.target in _TARGETS else ""
    settings = row.name.removeprefix(row.objective)
    cells = (rest_cell(one, letter) for one, letter in zip(found, row.reaches.replace(" ", ""), strict=True))
    return [f"`{row.objective}`{settings}{target}", *cells]


def variance_cell(value: float) -> str:
    return "**0**" if value < 1e-25 else f"{value:.3g}"


def page(
    rests: Mapping[Row, Sequence[Rest]],
    collapses: Sequence[Sequence[str]],
    variances: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> str:
    """The whole page.

    Args:
        rests: for each objective where it ends, bandit first, in the order of ``SAMPLES``.
        collapses: lines of the table on the likelihood-ratio term.
        variances: heading -> the table's head and lines.
    """
    parts = [_HEAD]
    head = ["objective", *(f"bandit, {s}" for s in SAMPLES), *(f"tokens, {s}" for s in SAMPLES)]
    for family, rows in ROWS.items():
        parts.append(
            f"### {family}\n\n{table(head, (rest_line(row, rests[row]) for row in rows))}\n\n{_NOTES[family]}\n"
        )
    parts.append(_LEGEND)
    parts.append(
        "Trained on rewards, with no KL to hold: " + "; ".join(f"`{k}` ({v})" for k, v in WITHOUT.items()) + ".\n"
    )
    parts.append(_COLLAPSE.format(table=table(_COLLAPSE_HEAD, collapses)))
    parts.append(_VARIANCE)
    parts += [f"### {heading}\n\n{table(*lines)}\n" for heading, lines in variances.items()]
    parts.append(_END)
    return "\n".join(parts)


_HEAD = """\
# Exact worlds

Two small worlds in which every answer can be enumerated, so that the optimum pi\\* = ref exp(r/beta)/Z is known, expectations are
sums, and nothing is sampled. Every objective below is built as a run builds it, from its name and settings; advantages, KL
and pairs included. This page and its picture are written by one command, in float64, the same each time; edit
`benchmarks/worlds/`, not the page:

```
python -m benchmarks.worlds
```

- **bandit**: ten answers of one token. **tokens**: three tokens of which one ends the answer, at most three of them: 15
  answers, 7 prefixes. Rewards and the reference's logits are standard normal, beta is 1, and the reference is the start.
- **fresh**: answers drawn from the policy itself. **from the reference**, **from a stranger**: from a policy that stays fixed,
  the reference or a random one, both with full support; `old_logps` are those of that policy.

## The picture

AGRO reaches pi\\* from any samples. A policy gradient with the KL as a term of the loss stops elsewhere unless its samples
are fresh; and with answers of several tokens even then, as each token is charged its own KL and not the KL
that follows from it. This is Figure 1 of Tang et al. 2025 ([arXiv 2503.19612](https://arxiv.org/abs/2503.19612)) with settings of
our own: exact expected gradients on a table of logits, small learning rate, beta 1. The dotted line is 1e-8; lines
end at 1e-13, where rounding begins.

![KL to the optimum as learning goes on: AGRO falls to rounding error in all six panels, the policy gradients level off off-policy](assets/worlds.png)

## Where each objective comes to rest

Descent along the exact expected gradient from the reference, followed to its end. Cells are KL(pi || target) there over its
start; **reached** means below 1e-8 (most are below 1e-15). The target is pi\\* unless a letter says otherwise.
"""

_NOTES = {
    "AGRO, for any samples": """\
All reach their target whoever samples. The weights of `agro_off_policy_weighted` are importance weights cut at 1: they
change the path, not the end. `rloo` recomputes its log-ratio, so it is AGRO. `dro` learns its value along.""",
    "AGRO, for fresh samples": """\
All reach pi\\* from fresh samples. From others the causal and exact-KL forms do not; in the bandit, with one token, the causal
form with a baseline *is* the plain one. The plain likelihood-ratio term (in the bandit also `agro_on_policy_lr_causal`, where
it is the same) vanishes at pi\\* whoever samples, so pi\\* stays a resting point, and the row is about whether the way from
the reference leads there: it may, and it may diverge. `leave_one_out` is three quarters of the term (n = 3).""",
    "Policy gradient, KL in the loss": """\
From samples of another policy only TRPO gets to pi\\*, in the bandit and to 1e-5, where its line search ends: its ratio is
not clipped, so the reward is expected under the policy itself, and its KL is exact. From fresh samples k2, the exact KL and
ratio·k3 (whose gradient is k2's, sample by sample) do in the bandit. With several tokens none does, as a term per token
leaves out how an early token changes the KL of later ones: (d) is where they end. k1 in the loss has no expected gradient,
so reward alone is maximised. k3 as such descends the forward KL, and ends at (e). `group_mean` makes the advantages
(n - 1)/n of what they were and leaves the KL term, so (d) and (e) are those of n/(n - 1) times beta; `group_norm` (n = 3, also in
`dapo`) changes the rewards as well; GRPO also divides by the answer's length. `reinforce_plus_plus_baseline` divides rewards
by their deviation, which falls as the policy sharpens (g). `dapo` and `dr_grpo` have no KL by default, `trpo` and
`reinforce` none of their own; here they are given one.""",
    "Policy gradient, KL in the reward": """\
Of these only `p3o` has a KL of its own; the others are given the customary one. With k1 in the reward fresh samples lead to
pi\\*, clipped or not, with reward-to-go, and with advantages normalised over a step, which only changes the pace. With k2 or k3 they do not,
as the reward then lacks the estimator's own gradient. From a fixed policy's samples the log-ratio is that of sampling time,
and says nothing of the policy: what clips stops at its clip, what does not runs off. `p3o` takes the log-ratio anew, so
unclipped, or with the weight of a pair clipped (`joint`), it reaches pi\\* from any samples; clipped answer by answer it stops
where the ratio does. `trpo` goes round pi\\*: its steps keep their length, and the distance is that of `max_kl`.""",
    "Policy gradient with a critic, KL in the reward": """\
The critic is a value for every prefix, or one number for all, fitted at the start to the answers that are drawn, and learned along.
With a value for every prefix, fresh samples lead to pi\\*, and there the advantage of every token is zero: no noise.
With one number they do at lambda 1, where a value is only a baseline, and not at 0.95 with several tokens.""",
    "Policy gradient, KL to the sampler in the loss": """\
`ppo_penalty` holds the policy to the one that sampled, and has no KL to the reference. On fresh samples the penalty has no gradient, and reward
alone is maximised; from samples of a fixed policy it ends at (f).""",
    "Preferences": """\
DPO finds pi\\* when preferences follow the rewards by Bradley and Terry, whoever draws the pairs. IPO's optimum is that of
the reward P(y beats the samples). `nash_md_pg` against itself finds the equilibrium from fresh samples; against a mixture
with the reference (an eighth of it in the exponent) it finds another policy, near it.""",
}

_LEGEND = """\
† no resting point: a probability goes to zero, and the figure is the KL when two logits differ by 25 nats, which is not yet its
limit. ‡ held where ratios are clipped: the field jumps there, and what both sides leave of it is below 1e-8. Where the KL is not
in the loss, every policy beyond the clip is at rest, and the figure, of the first that is met, is good to 1 %. § steps within a
trust region: the farthest policy of the last 50 of 250 steps, or where the line search finds no better step.

Targets: (a) the optimum for the reward P(y beats an answer of the sampler), which for fresh samples is (b); (b) the
equilibrium of the preference game, pi = ref exp(P(y beats pi)/beta)/Z; (c) ref exp(T (r - c)/beta), T the answer's length,
which is not pi\\*. A letter in a cell is the policy that is found instead, to 1e-8 (to 1e-3 for §). With Q(s, a) the plain reward expected
after token a, without the KL of later tokens: (d) pi(a|s) = ref exp(Q/beta)/Z; (e) pi(a|s) = beta ref/(c - Q), the same for the forward KL; (f)
as (e) with the sampler in place of the reference, which also goes on after a; (g) as (d) with beta times sqrt(n/(n - 1)) and the
deviation of the reward under the policy itself; (h) the best reply to the policy's mixture with the reference; (i) as (d)
with the sampler going on after a.

Groups have two answers, three where n = 3 is said. A mean over tokens, and a deviation over a step, are those of a step without
end. Every point without † or § attracts, along the bounds of the ratios that are held.
"""

_COLLAPSE_HEAD = [
    "beta",
    "without: pi\\* reached",
    "wrong best answer",
    "with: pi\\* reached",
    "wrong best answer",
    "worse than the reference",
]
_COLLAPSE = """\
## The likelihood-ratio term when beta is small

`agro_on_policy` with `lr_coef: 0` and `lr_coef: 1`, fresh samples, on 10 random bandits of ten answers, from the reference. Its minimum
is pi\\*, but it is not the only place where the variance vanishes: a policy that gives one answer only has none either.

{table}

With beta at twice the spread of rewards (whose standard deviation is 1) the term does no harm. The smaller beta, the more often
it misses pi\\*, and the objective J may end below that of the reference. It is off by default.
"""

_VARIANCE = """\
## Variances

Total variance of the gradient from one group of two answers (trace of the covariance; groups weighted by their probability; the
library's scale, divided by beta), in the world of several tokens. Within a table all estimators have the same mean, which is checked
to 1e-10. Columns are policies: pi\\*, on the way to it from the reference, the reference itself, and half way with random logits of
scale 2 added, a drift that has nothing to do with reward.
"""

_END = """\
## What to conclude

- With samples that are not fresh, use `agro_off_policy` (or `rloo` as it is here, `dro`, `p3o` with `clipping: joint`, or pairs with DPO).
  A KL term in the loss moves the optimum.
- With fresh samples and a KL penalty, put k1 in the reward, or use AGRO. k3 in the loss, GRPO's, has another optimum.
- Of AGRO's estimators the plain one is the only one without noise at pi\\*, from any samples; with the likelihood-ratio term the plain form is,
  too. Every reduction gives that up. What some lower is the variance away from the optimum: the likelihood-ratio forms half way,
  `agro_off_policy_rb` where the policy has drifted under samples of a stranger. The causal and exact-KL forms lower it at none of these policies.
- Clipping each ratio is for samples that are nearly fresh: on those of a fixed policy it holds the policy near that one.
- Pair objectives on sampled answers are represented by DPO and IPO. Objectives without a KL term are not measured.
- These worlds are small, and rewards are random by answer. They show what an objective aims at, not how fast a large model gets there.
"""
