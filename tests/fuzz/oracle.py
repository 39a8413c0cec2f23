"""Which oracle answers for which loss. It shares no code with the library: lists, loops and math, from the formulas."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import oracle_rows as rows
from tests.fuzz.arithmetic import Answer, Refused
from tests.fuzz.generate import Case
from tests.fuzz.oracle_agro import agro, policy_gradient
from tests.fuzz.oracle_pairs import POINTS, by_pairs, by_rank

__all__ = ["ORACLE", "Refused", "averaged"]

ORACLE: dict[str, Callable[[Case], Answer]] = {
    **dict.fromkeys(POINTS, by_pairs),
    **dict.fromkeys(("aot", "aot_unpaired"), by_rank),
    **dict.fromkeys(rows.TOKENS, rows.by_tokens),
    **dict.fromkeys(("gspo", "gspo_token"), rows.sequence_ratio),
    **dict.fromkeys(("reward_regression", "reward_binary"), rows.reward_rows),
    **{f.__name__: f for f in (rows.kto, rows.dro, rows.nash_md_pg, rows.reward_ranking, rows.rrhf, rows.ld_dpo, rows.p3o)},
    **dict.fromkeys(("rloo", "kl_policy_gradient", "kl_policy_gradient_exact"), policy_gradient),
    **dict.fromkeys(
        (
            "agro_off_policy", "agro_on_policy", "agro_on_policy_causal", "agro_on_policy_exact_kl", "agro_off_policy_rb",
            "agro_off_policy_rb2", "agro_off_policy_cv", "agro_off_policy_weighted", "agro_off_policy_per_token",
            "agro_on_policy_lr_causal", "agro_on_policy_lr_token", "agro_on_policy_lr_kl", "agro_on_policy_lr_moments",
        ),
        agro,
    ),
}  # fmt: skip

#: The averaging of each loss, as the papers have it; what is not named is a mean over pairs or rows.
AVERAGING = {
    **dict.fromkeys(
        "sft distillation ppo_clip ppo_penalty trpo value_loss cispo process_reward unlikelihood".split(), "token_mean"
    ),
    **dict.fromkeys("grpo gspo gspo_token sapo".split(), "sequence_mean"),
    **dict.fromkeys("reinforce rloo kl_policy_gradient kl_policy_gradient_exact nash_md_pg".split(), "sequence_sum"),
    **dict.fromkeys([name for name, oracle in ORACLE.items() if oracle is agro], "sequence_sum"),
}


def averaged(name: str, answer: Answer) -> tuple[float, dict[str, list]]:
    """The mean that is trained on, and its gradient."""
    kind, counted = AVERAGING.get(name, "mean"), answer.counted
    if kind == "mean":
        divisor = max(1, sum(counted))
        total = sum(v for v, c in zip(answer.loss, counted, strict=True) if c)
        row = [1.0] * len(counted)
    else:
        sizes = [max(1, sum(r)) for r in counted]
        divisor = max(1, sum(map(sum, counted)) if kind == "token_mean" else sum(map(any, counted)))
        row = [1 / n if kind == "sequence_mean" else 1.0 for n in sizes]
        total = sum(w * sum(r) for w, r in zip(row, answer.loss, strict=True))
    grads = {}
    for key, slopes in answer.slopes.items():
        grads[key] = [
            [x * w / divisor for x in s] if isinstance(s, list) else s * w / divisor
            for s, w in zip(slopes, row, strict=True)
        ]
    return total / divisor, grads
