"""The metrics of every loss with their numbers, row by row in plain Python from what their names mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.losses.cases import CASES, Case

NAN = math.nan
Table = dict[str, list]


class Given:
    """A case's tensors as lists; tokens that are masked are left out of a row."""

    def __init__(self, case: Case) -> None:
        self.case, self.tensors = case, case.inputs()
        self.hyper = case.hyper
        self.mask = self.tensors["mask"].tolist() if "mask" in self.tensors else []
        self.alive = [any(row) for row in self.mask]
        if "rewards" in self.tensors and not case.per_pair:
            scored = (~self.tensors["rewards"].isnan()).tolist()
            self.alive = [a and s for a, s in zip(self.alive, scored, strict=True)]
            self.mask = [[m and a for m in row] for row, a in zip(self.mask, self.alive, strict=True)]

    def __getitem__(self, name: str) -> list:
        return self.tensors[name].tolist()

    def tokens(self, formula: Callable[..., float], *names: str) -> list[list[float]]:
        """``formula`` of the named tensors at every token that counts, 0 elsewhere."""
        wide = [self[n] if self.tensors[n].ndim == 2 else [[x] * len(self.mask[0]) for x in self[n]] for n in names]
        return [
            [formula(*(table[i][t] for table in wide)) if counts else 0.0 for t, counts in enumerate(row)]
            for i, row in enumerate(self.mask)
        ]

    def rows(self, formula: Callable[[int], float], *, dead: float = 0.0) -> list[float]:
        return [formula(i) if alive else dead for i, alive in enumerate(self.alive)]


def log_ratio(given: Given) -> list[list[float]]:
    return given.tokens(lambda a, b: a - b, "logps", "ref_logps")


# -- pairs ------------------------------------------------------------------------------------------------------------


def implicit(given: Given, scale: float | None = None) -> Table:
    """Implicit rewards: beta times the log-ratio, or times the log-prob where there is no reference."""
    beta = given.hyper["beta"] if scale is None else scale
    chosen, rejected = given["chosen_logps"], given["rejected_logps"]
    zero = [0.0] * len(chosen)
    ref_chosen = given["ref_chosen_logps"] if "ref_chosen_logps" in given.tensors else zero
    ref_rejected = given["ref_rejected_logps"] if "ref_rejected_logps" in given.tensors else zero
    high = [beta * (a - b) for a, b in zip(chosen, ref_chosen, strict=True)]
    low = [beta * (a - b) for a, b in zip(rejected, ref_rejected, strict=True)]
    return {**compared(high, low), "logps/chosen": chosen, "logps/rejected": rejected}


def compared(high: list[float], low: list[float]) -> Table:
    return {
        "rewards/chosen": high,
        "rewards/rejected": low,
        "rewards/margins": [a - b for a, b in zip(high, low, strict=True)],
        "rewards/accuracies": [float(a > b) for a, b in zip(high, low, strict=True)],
    }


def per_token(given: Given) -> tuple[list[float], list[float]]:
    pairs = (("chosen_logps", "chosen_lengths"), ("rejected_logps", "rejected_lengths"))
    first, second = ([x / n for x, n in zip(given[a], given[b], strict=True)] for a, b in pairs)
    return first, second


def ipo_mean(given: Given) -> Table:
    chosen, rejected = per_token(given)
    ref_chosen = [x / n for x, n in zip(given["ref_chosen_logps"], given["chosen_lengths"], strict=True)]
    ref_rejected = [x / n for x, n in zip(given["ref_rejected_logps"], given["rejected_lengths"], strict=True)]
    high = [0.3 * (a - b) for a, b in zip(chosen, ref_chosen, strict=True)]
    low = [0.3 * (a - b) for a, b in zip(rejected, ref_rejected, strict=True)]
    return {**compared(high, low), "logps/chosen": chosen, "logps/rejected": rejected}


def simpo(given: Given) -> Table:
    chosen, rejected = per_token(given)
    beta = given.hyper["beta"]
    return {
        **compared([beta * x for x in chosen], [beta * x for x in rejected]),
        "logps/chosen": given["chosen_logps"],
        "logps/rejected": given["rejected_logps"],
        "logps/chosen_per_token": chosen,
        "logps/rejected_per_token": rejected,
    }


def orpo(given: Given) -> Table:
    chosen, rejected = per_token(given)
    shrink = 1 - given.hyper.get("eps", 1e-7)

    def log_odds(mean: float) -> float:
        p = shrink * math.exp(mean)
        return math.log(p / (1 - p))

    odds = [log_odds(a) - log_odds(b) for a, b in zip(chosen, rejected, strict=True)]
    return {
        **simpo(given),
        "nll_loss": [-x for x in chosen],
        "log_odds_chosen": odds,
        "log_odds_ratio": [-math.log1p(math.exp(-x)) for x in odds],
    }


def cpo(given: Given) -> Table:
    return {**simpo(given), **implicit(given), "nll_loss": [-x for x in per_token(given)[0]]}


def rpo(given: Given) -> Table:
    nll = [-x / n for x, n in zip(given["chosen_logps"], given["chosen_lengths"], strict=True)]
    return {**implicit(given), "nll_loss": nll}


def wpo(given: Given) -> Table:
    return {**implicit(given), "weights": [math.exp(a + b) for a, b in zip(*per_token(given), strict=True)]}


def f_dpo(given: Given) -> Table:
    alpha = given.hyper.get("alpha", 0.5)
    g = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: -math.exp(-x),
        "js": lambda x: -math.log1p(math.exp(-x)),
        "alpha": lambda x: (1 - math.exp(-alpha * x)) / alpha,
    }[given.hyper["divergence"]]
    plain = implicit(given, 1.0)
    high = [0.3 * g(x) for x in plain["rewards/chosen"]]
    low = [0.3 * g(x) for x in plain["rewards/rejected"]]
    return {**plain, **compared(high, low)}


def bradley_terry(given: Given) -> Table:
    pairs = list(zip(given["chosen_rewards"], given["rejected_rewards"], strict=True))
    return {
        "accuracy": [float(a > b) for a, b in pairs],
        "margin": [a - b for a, b in pairs],
        "mean_reward": [(a + b) / 2 for a, b in pairs],
        "min_reward": [min(pair) for pair in pairs],
        "max_reward": [max(pair) for pair in pairs],
    }


# -- rows and tokens --------------------------------------------------------------------------------------------------


def regularised(given: Given) -> Table:
    kl = log_ratio(given)
    rewards = given.rows(lambda i: given["rewards"][i] - given.hyper["beta"] * sum(kl[i]))
    return {"kl": kl, "objective/kl": [sum(row) for row in kl], "objective/rlhf_reward": rewards}


def kl_policy_gradient(given: Given) -> Table:
    kl = given.tokens(lambda a, b: math.exp(b - a) - 1 - (b - a), "logps", "ref_logps")
    return {"kl": kl, "objective/kl": [sum(row) for row in kl]}


def kl_policy_gradient_exact(given: Given) -> Table:
    kl = given.tokens(lambda x: x, "token_kl")
    return {"kl": kl, "objective/kl": [sum(row) for row in kl]}


def clip_metrics(given: Given, ratio: list[list[float]], *, signed: bool) -> Table:
    """Ratios outside the range; with ``signed``, only where clipping takes the gradient away."""
    low = 1 - given.hyper.get("clip_eps", 1.0)
    high = 1 + (given.hyper.get("clip_eps_high") or given.hyper["clip_eps"])
    advantages = given.tokens(lambda a: a, "advantages")
    below, above = ([[0.0] * len(row) for row in ratio] for _ in range(2))
    for i, row in enumerate(given.mask):
        for t, counts in enumerate(row):
            if counts:
                below[i][t] = float(ratio[i][t] < low and (advantages[i][t] < 0 or not signed))
                above[i][t] = float(ratio[i][t] > high and (advantages[i][t] > 0 or not signed))
    both = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(below, above, strict=True)]
    return {"clip_ratio/low": below, "clip_ratio/high": above, "clip_ratio/region": both}


def step_kl(given: Given) -> list[list[float]]:
    return given.tokens(lambda a, b: (a - b) ** 2 / 2, "logps", "old_logps")


def ppo_clip(given: Given) -> Table:
    ratio = given.tokens(lambda a, b: math.exp(a - b), "logps", "old_logps")
    return {**clip_metrics(given, ratio, signed=True), "policy/approxkl": step_kl(given)}


def grpo(given: Given) -> Table:
    return {**ppo_clip(given), "kl": kl_policy_gradient(given)["kl"]}


def gspo(given: Given) -> Table:
    token = given.tokens(lambda a, b: a - b, "logps", "old_logps")
    mean = [sum(row) / max(sum(counts), 1) for row, counts in zip(token, given.mask, strict=True)]
    wide = [[m if c else 0.0 for c in row] for m, row in zip(mean, given.mask, strict=True)]
    ratio = [[math.exp(x) for x in row] for row in wide]
    return {**clip_metrics(given, ratio, signed=True), "policy/approxkl": [[x * x / 2 for x in row] for row in wide]}


def cispo(given: Given) -> Table:
    ratio = given.tokens(lambda a, b: math.exp(a - b), "logps", "old_logps")
    return {**clip_metrics(given, ratio, signed=False), "policy/approxkl": step_kl(given)}


def ppo_penalty(given: Given) -> Table:
    return {"policy/approxkl": given.tokens(lambda a, b: math.exp(a - b) - 1 - (a - b), "logps", "old_logps")}


def value_loss(given: Given) -> Table:
    found = {"val/error": given.tokens(lambda v, r: v - r, "values", "returns")}
    eps = given.hyper.get("clip_eps")

    def is_clipped(v: float, old: float, r: float) -> float:
        near = old + min(max(v - old, -eps), eps)
        return float((near - r) ** 2 > (v - r) ** 2)

    return (
        found if eps is None else {**found, "val/clipfrac": given.tokens(is_clipped, "values", "old_values", "returns")}
    )


def dro(given: Given) -> Table:
    kl = log_ratio(given)
    sums = [sum(row) for row in kl]
    error = given.rows(lambda i: given["rewards"][i] - given["values"][i] - 0.3 * sums[i])
    return {"kl": kl, "objective/kl": sums, "val/error": error}


def nash(given: Given) -> Table:
    kl = log_ratio(given)
    return {"kl": kl, "objective/kl": [sum(r) for r in kl], "win_rate": given.rows(lambda i: given["win_rates"][i])}


def p3o(given: Given) -> Table:
    """The share of an answer's pairs whose weight was cut."""
    ids, ratio = given["group_ids"], given.tokens(lambda a, b: a - b, "logps", "old_logps")
    sums, kl = [sum(row) for row in ratio], [sum(row) for row in log_ratio(given)]
    rewards = given.rows(lambda i: given["rewards"][i] - given.hyper["beta"] * kl[i])
    low, high = 1 - given.hyper["clip_eps"], 1 + given.hyper["clip_eps"]

    def share(i: int) -> float:
        rest = [j for j in range(len(ids)) if j != i and ids[j] == ids[i] and given.alive[j]]
        cut = 0
        for j in rest:
            if given.hyper.get("clipping") == "joint":
                cut += not low <= math.exp(sums[i] + sums[j]) <= high
            else:
                w, gap = math.exp(sums[i]), rewards[i] - rewards[j]
                cut += min(max(w, low), high) * gap < w * gap
        return cut / len(rest)

    return {"objective/kl": kl, "objective/rlhf_reward": rewards, "clip_ratio/region": given.rows(share)}


def kto(given: Given) -> Table:
    sums, own = [sum(row) for row in log_ratio(given)], [sum(row) for row in given.tokens(lambda a: a, "logps")]
    good = given["labels"]
    return {
        "rewards/chosen": given.rows(lambda i: 0.3 * sums[i] if good[i] else NAN, dead=NAN),
        "rewards/rejected": given.rows(lambda i: NAN if good[i] else 0.3 * sums[i], dead=NAN),
        "logps/chosen": given.rows(lambda i: own[i] if good[i] else NAN, dead=NAN),
        "logps/rejected": given.rows(lambda i: NAN if good[i] else own[i], dead=NAN),
        "kl": given.rows(lambda i: given["kl_baseline"][i], dead=NAN),
    }


def sft(given: Given) -> Table:
    return {"nll_loss": given.tokens(lambda a: -a, "logps")}


def distillation(given: Given) -> Table:
    return {**sft(given), "teacher_kl": given.tokens(lambda x: x, "teacher_kl")}


def unlikelihood(given: Given) -> Table:
    def split(good: bool, formula: Callable[[float], float]) -> list[list[float]]:
        table = given.tokens(formula, "logps")
        for i, label in enumerate(given["labels"]):
            table[i] = [
                x if label == good else (NAN if c else 0.0) for x, c in zip(table[i], given.mask[i], strict=True)
            ]
        return table

    against = split(False, lambda a: -math.log(1 - (1 - 1e-4) * math.exp(a)))
    return {"nll_loss": split(True, lambda a: -a), "unlikelihood": against}


def reward_regression(given: Given) -> Table:
    error = given.rows(lambda i: given["scores"][i] - given["rewards"][i], dead=NAN)
    return {"error": error, "mean_reward": given.rows(lambda i: given["scores"][i], dead=NAN)}


def reward_binary(given: Given) -> Table:
    right = given.rows(lambda i: float(given["labels"][i] == (given["scores"][i] > 0)), dead=NAN)
    return {"accuracy": right, "mean_reward": given.rows(lambda i: given["scores"][i], dead=NAN)}


def reward_ranking(given: Given) -> Table:
    """The share of worse answers of the same prompt that score lower; NaN for an answer that none is worse than."""
    ids, rewards, scores = given["group_ids"], given["rewards"], given["scores"]

    def share(i: int) -> float:
        worse = [j for j in range(len(ids)) if ids[j] == ids[i] and given.alive[j] and rewards[j] < rewards[i]]
        return sum(scores[i] > scores[j] for j in worse) / len(worse) if worse else NAN

    return {"accuracy": given.rows(share, dead=NAN), "mean_reward": given.rows(lambda i: scores[i], dead=NAN)}


def process_reward(given: Given) -> Table:
    return {"accuracy": given.tokens(lambda v, label: float((v > 0) == (label > 0.5)), "values", "step_labels")}


def rrhf(given: Given) -> Table:
    sums = [sum(row) for row in given.tokens(lambda a: a, "logps")]
    ids, rewards = given["group_ids"], given["rewards"]

    def best(i: int) -> float:
        top = max(rewards[j] for j in range(len(ids)) if ids[j] == ids[i] and given.alive[j])
        return -sums[i] if rewards[i] == top else NAN

    mean = given.rows(lambda i: sums[i] / sum(given.mask[i]))
    return {"logps/mean": mean, "nll_loss": given.rows(best, dead=NAN)}


def slic_hf(given: Given) -> Table:
    return {**implicit(given, 1.0), "nll_loss": [-x for x in given["chosen_logps"]]}


def nothing(given: Given) -> Table:
    return {}


MEANING: dict[str, Callable[[Given], Table]] = {
    **dict.fromkeys(
        ("dpo", "dpo_reference_free", "ipo", "slic", "robust_dpo", "generalised_po", "discopop", "reward_aware_rpo",
         "apo_zero", "apo_down", "anchored_dpo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
         "ipo_md"),
        implicit,
    ),
    "ipo_mean": ipo_mean, "simpo": simpo, "orpo": orpo, "cpo": cpo, "rpo": rpo, "wpo": wpo, "f_dpo": f_dpo,
    "slic_hf": slic_hf, "bradley_terry": bradley_terry, "bradley_terry_margin": bradley_terry,
    "sft": sft, "distillation": distillation, "unlikelihood": unlikelihood, "rrhf": rrhf, "kto": kto, "dro": dro,
    "reinforce": nothing, "rloo": regularised, "kl_policy_gradient": kl_policy_gradient,
    "kl_policy_gradient_exact": kl_policy_gradient_exact, "ppo_clip": ppo_clip, "grpo": grpo, "gspo": gspo,
    "gspo_token": gspo, "cispo": cispo, "ppo_penalty": ppo_penalty, "value_loss": value_loss, "nash_md_pg": nash,
    "p3o": p3o, "reward_ranking": reward_ranking, "reward_regression": reward_regression, "reward_binary": reward_binary,
    "process_reward": process_reward,
}  # fmt: skip


def sapo(given: Given) -> Table:
    return {"policy/approxkl": step_kl(given)}


MEANING["sapo"] = sapo


def ld_dpo(given: Given) -> Table:
    """Rows in twos, chosen first; tokens past the length of the partner count ld_alpha; a pair with an empty row is none."""
    ratio, own = log_ratio(given), given.tokens(lambda a: a, "logps")
    alive = [given.alive[i] and given.alive[i ^ 1] for i in range(8)]

    def reward(i: int) -> float:
        kept = [x for x, counts in zip(ratio[i], given.mask[i], strict=True) if counts]
        shared = min(sum(given.mask[i]), sum(given.mask[i ^ 1]))
        return 0.3 * (sum(kept[:shared]) + 0.4 * sum(kept[shared:]))

    def of(side: int, formula: Callable[[int], float]) -> list[float]:
        return [formula(i) if alive[i] and side in (i % 2, 2) else NAN for i in range(8)]

    def margin(i: int) -> float:
        return reward(i - i % 2) - reward(i - i % 2 + 1)

    return {
        "rewards/chosen": of(0, reward),
        "rewards/rejected": of(1, reward),
        "rewards/margins": of(2, margin),
        "rewards/accuracies": of(2, lambda i: float(margin(i) > 0)),
        "logps/chosen": of(0, lambda i: sum(own[i])),
        "logps/rejected": of(1, lambda i: sum(own[i])),
    }


MEANING["ld_dpo"] = ld_dpo


@pytest.mark.parametrize("case", [case for case in CASES if case.name in MEANING], ids=lambda case: case.id)
def test_metrics_are_what_their_names_say(case: Case) -> None:
    expected, found = MEANING[case.name](Given(case)), case(case.inputs()).metrics
    assert set(found) == set(expected)
    for name, values in expected.items():
        truth: Tensor = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(
            found[name], truth, rtol=1e-11, atol=1e-12, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


CLIPPED = [case for case in CASES if {"clip_eps", "clip_eps_high"} & set(case.hyper) and case.name != "value_loss"]


@pytest.mark.parametrize("case", CLIPPED, ids=lambda case: case.id)
def test_a_ratio_at_the_bound_is_not_clipped(case: Case) -> None:
    """On fresh samples every ratio is 1, and with a range of nothing both bounds are 1 as well."""
    tensors = {**case.inputs(), "old_logps": case.inputs()["logps"]}
    narrow = dict.fromkeys(("clip_eps", "clip_eps_high"), 1e-17)
    metrics = case.fn(*tensors.values(), **{**case.hyper, **narrow}).metrics
    for name in metrics:
        if name.startswith("clip_ratio"):
            assert metrics[name].eq(0).all(), name


@pytest.mark.parametrize("case", [case for case in CASES if case.per_pair], ids=lambda case: case.id)
def test_a_tie_is_not_a_win(case: Case) -> None:
    tensors = case.inputs()
    for name in tensors:
        if "rejected" in name:
            tensors[name] = tensors[name.replace("rejected", "chosen")]
    metrics = case(tensors).metrics
    assert metrics["accuracy" if "accuracy" in metrics else "rewards/accuracies"].eq(0).all()


def test_a_tie_of_rows_is_not_a_win() -> None:
    case = next(case for case in CASES if case.name == "ld_dpo")
    tensors = case.inputs()
    for name in ("logps", "ref_logps", "mask"):
        tensors[name][1::2] = tensors[name][0::2]
    accuracies = case(tensors).metrics["rewards/accuracies"]
    assert accuracies[tensors["mask"].any(-1)].eq(0).all()
