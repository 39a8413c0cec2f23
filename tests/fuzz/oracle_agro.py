"""AGRO's formulas over lists: R against the others, token by token. Also RLOO and the KL-regularised policy gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tests.fuzz.arithmetic import Answer, Refused, checked_exp
from tests.fuzz.generate import Case


@dataclass
class World:
    """The rows that take part, their siblings, and sums over their tokens."""

    case: Case
    beta: float
    member: list[bool]
    others: list[list[int]]
    s: list[list[float]]  # log-ratios, zero where a token does not count
    S: list[float]
    r: list[float]
    n: list[int]
    on: list[list[bool]]

    @property
    def width(self) -> int:
        return len(self.on[0])

    def gap(self, x: list[float], i: int) -> float:
        """x_i minus the mean of the others' x; zero for a row without siblings."""
        return math.fsum([x[i], *(-x[j] / len(self.others[i]) for j in self.others[i])]) if self.others[i] else 0.0

    def of_others(self, x: list[float], i: int) -> float:
        return math.fsum(x[j] for j in self.others[i]) / len(self.others[i]) if self.others[i] else 0.0


def grouped(case: Case, at_least: int) -> tuple[list[bool], list[list[int]], list[list[bool]]]:
    """Who takes part, who are a row's siblings that do, and which tokens count; a refusal for groups too small."""
    t = case.tensors
    ids, mask, rewards = t["group_ids"], t["mask"], t["rewards"]
    if min(ids.count(g) for g in ids) < at_least:
        raise Refused("needs groups of at least")
    member = [any(mask[i]) and not math.isnan(rewards[i]) for i in range(len(ids))]
    others = [
        [j for j in range(len(ids)) if j != i and ids[j] == ids[i] and member[j]] if member[i] else []
        for i in range(len(ids))
    ]
    return member, others, [[m and member[i] for m in row] for i, row in enumerate(mask)]


def world(case: Case, at_least: int = 2) -> World:
    t = case.tensors
    member, others, on = grouped(case, at_least)
    rows, width = range(len(on)), range(len(on[0]))
    reference = t.get("ref_logps", t["logps"])
    s = [[t["logps"][i][k] - reference[i][k] if on[i][k] else 0.0 for k in width] for i in rows]
    r = [t["rewards"][i] if member[i] else 0.0 for i in rows]
    n = [1 + len(others[i]) if member[i] else 0 for i in rows]
    return World(case, case.hyper.get("beta", 0.0), member, others, s, [math.fsum(row) for row in s], r, n, on)


def before(x: list[float], k: int) -> float:
    return math.fsum(x[:k])


def after(x: list[float], k: int) -> float:
    return math.fsum(x[k + 1 :])


def from_here(x: list[float], k: int) -> float:
    return math.fsum(x[k:])


def tokens(w: World, name: str) -> list[list[float]]:
    given = w.case.tensors[name]
    return [[v if on else 0.0 for v, on in zip(*pair, strict=True)] for pair in zip(given, w.on, strict=True)]


def likelihood_weight(w: World, A: list[float], i: int, baseline: str) -> float:
    n = w.n[i]
    if baseline == "none" or n < 2:
        return A[i] ** 2 if baseline == "none" else 0.0
    spread = A[i] ** 2 - w.of_others([a * a for a in A], i)
    if baseline == "leave_one_out":
        return spread
    return spread * (n - 1) ** 2 / (n * (n - 2)) if n >= 3 else 0.0


def others_variance(w: World, R: list[float], i: int) -> float:
    """n/(n-1) times the sample variance of the others' R: what "unbiased" takes away."""
    if w.n[i] < 3:
        return 0.0
    mean = w.of_others(R, i)
    return w.n[i] / (w.n[i] - 1) * math.fsum((R[j] - mean) ** 2 for j in w.others[i]) / (w.n[i] - 2)


def agro(case: Case) -> Answer:
    """Value: half the sample variance of R over beta, a row's share spread over its tokens; slopes by estimator."""
    t, hyper, name = case.tensors, case.hyper, case.name
    unbiased = hyper.get("lr_baseline") == "unbiased"
    if hyper.get("lr_coef", 0.0) == 0.0 and name == "agro_on_policy":
        hyper = {**hyper, "lr_coef": 0.0}
    w = world(case, 3 if unbiased else 2)
    beta, rows, width = w.beta, range(case.rows), range(w.width)
    count = [max(1, sum(row)) for row in w.on]
    S = [w.S[i] / count[i] for i in rows] if name == "agro_off_policy_per_token" else w.S
    R = [w.r[i] - beta * S[i] for i in rows]
    A = [w.gap(R, i) for i in rows]
    size = [abs(w.r[i]) + beta * sum(map(abs, w.s[i])) for i in rows]
    weights = t.get("weights")

    value = []
    for i in rows:
        v = 0.0
        if weights is not None:
            v = math.fsum(
                weights[i] * weights[j] * (R[i] - R[j]) ** 2 / (4 * beta * len(w.others[i])) for j in w.others[i]
            )
        elif beta > 0:
            v = math.fsum((R[i] - R[j]) for j in w.others[i]) / max(1, w.n[i]) * A[i] / (2 * beta)
        elif w.others[i]:
            v = -w.gap(w.r, i) * w.gap(w.S, i) * (w.n[i] - 1) / w.n[i]
        value.append(v)
    answer = Answer(
        [[value[i] / count[i] if on else 0.0 for on in w.on[i]] for i in rows],
        w.on,
        {"logps": [[0.0] * w.width for _ in rows]},
    )
    for learned in ("token_kl", "token_log_ratio_sq", "behaviour_log_ratio", "behaviour_log_ratio_sq"):
        if learned in t:
            answer.slopes[learned] = [[0.0] * w.width for _ in rows]
    kls = tokens(w, "token_kl") if "token_kl" in t else []
    squares = tokens(w, "token_log_ratio_sq") if "token_log_ratio_sq" in t else []
    d = tokens(w, "behaviour_log_ratio") if "behaviour_log_ratio" in t else []
    q = tokens(w, "behaviour_log_ratio_sq") if "behaviour_log_ratio_sq" in t else []
    largest_ratio = 1.0
    for i in rows:
        if not w.member[i]:
            continue
        for k in width:
            if not w.on[i][k]:
                continue
            slope, extra, ratio = _slope(w, hyper, R, A, S, kls, squares, d, weights, i, k)
            largest_ratio = max(largest_ratio, ratio)
            answer.slopes["logps"][i][k] = slope
            for learned, number in extra.items():
                answer.slopes[learned][i][k] = number
    whole = max([1.0, *size]) + beta * max([0.0, *(sum(map(abs, row)) for x in (kls, d) for row in x)])
    heavy = max([1.0, *(x for i, x in enumerate(weights or []) if w.member[i])]) ** 2
    answer.scale = heavy * (whole**2 / beta if beta > 0 else whole * (1 + max(sum(map(abs, row)) for row in w.s)))
    answer.slope_scale = heavy * whole * (1 + largest_ratio)
    if hyper.get("lr_coef"):
        more = max([0.0, *(sum(map(abs, row)) for row in squares + q)])
        answer.slope_scale += 4 * whole**2 / beta + 2 * beta * more
    return answer


def _slope(
    w: World, hyper: dict[str, Any], R: list[float], A: list[float], S: list[float], kls: list[list[float]],
    squares: list[list[float]], d: list[list[float]], weights: list[float] | None, i: int, k: int,
) -> tuple[float, dict[str, float], float]:  # fmt: skip
    """Of token k of row i: the slope in its log-prob, in the other learned numbers, and the size of a ratio."""
    name, beta, others, s = w.case.name, w.beta, w.others[i], w.s[i]
    alone = not others
    if name == "agro_off_policy":
        return -A[i], {}, 0.0
    if name == "agro_off_policy_per_token":
        return -A[i] / sum(w.on[i]), {}, 0.0
    if weights is not None:
        return -math.fsum(weights[i] * weights[j] * (R[i] - R[j]) for j in others) / max(1, len(others)), {}, 0.0
    if name == "agro_on_policy":
        coef = hyper["lr_coef"]
        term = coef / (2 * beta) * likelihood_weight(w, A, i, hyper["lr_baseline"]) if coef else 0.0
        return term - A[i], {}, 0.0
    if name == "agro_off_policy_cv":
        log_ratio = w.case.tensors["logps"][i][k] - w.case.tensors["old_logps"][i][k]
        ratio = checked_exp(log_ratio, w.case.limit)
        push = 0.0 if alone else beta * ratio * before(s, k)
        return -(A[i] + push), {}, beta * ratio * (1 + abs(log_ratio)) * (1 + sum(map(abs, s)))
    if alone:
        return 0.0, {}, 0.0
    gain = w.gap(w.r, i)
    if name == "agro_on_policy_causal":
        base = {
            "none": 0.0,
            "sequence": w.of_others(w.S, i),
            "position": w.of_others([from_here(row, k) for row in w.s], i),
        }[hyper["baseline"]]
        return -(gain - beta * (from_here(s, k) - base)), {}, 0.0
    if name == "agro_on_policy_exact_kl":
        base = {
            "none": 0.0,
            "sequence": w.of_others([math.fsum(row) for row in kls], i),
            "position": w.of_others([after(row, k) for row in kls], i),
        }[hyper["baseline"]]
        return -(gain - beta * (after(kls[i], k) - base)), {"token_kl": beta}, 0.0
    if name == "agro_off_policy_rb":
        D = w.of_others([math.fsum(row) for row in d], i)
        extra = {"behaviour_log_ratio": beta * (before(s, k) - D), "behaviour_log_ratio_sq": beta / 2}
        return -gain + beta * after(d[i], k), extra, 0.0
    if name == "agro_off_policy_rb2":
        charge = from_here(s, k) - w.of_others(w.S, i)
        return -gain + beta * charge, {"behaviour_log_ratio": beta * before(s, k)}, 0.0

    factor = hyper["lr_coef"] / (2 * beta)
    if name == "agro_on_policy_lr_causal":
        surplus = before(s, k) - w.of_others([before(row, k) for row in w.s], i)
        return factor * (A[i] ** 2 - beta**2 * surplus**2) - A[i], {}, 0.0
    # E[(r~ - beta (S - S_others))^2 grad l], opened up; each power of S has an estimator of its own
    head = gain**2 - 2 * beta * gain * w.gap(w.S, i)
    if hyper["lr_baseline"] == "unbiased":
        head -= others_variance(w, R, i)
    P, F, K = before(s, k), from_here(s, k), after(kls[i], k) if kls else 0.0
    quadratic = {
        "h1": (w.S[i] ** 2, 0.0, 0.0),
        "h2": (w.S[i] ** 2 - P**2, 0.0, 0.0),
        "h3": (F**2 + 2 * P * K, 2 * P, 0.0),
    }
    if squares:
        later = [s[u] * after(kls[i], u) for u in range(k + 1, w.width)]
        quadratic["h4"] = (2 * s[k] * K + after(squares[i], k) + 2 * math.fsum(later) + 2 * P * K, 2 * P - 2, 1.0)
    linear = {"g1": (w.S[i], 0.0), "g2": (F, 0.0), "g3": (K, 1.0), "g3n": (s[k] + K, 0.0)}
    h, hk, hm = quadratic[hyper.get("square", "h4")]
    g, gk = linear[hyper.get("linear", "g3")]
    mean = w.of_others(w.S, i)
    extra = {}
    if kls:
        extra["token_kl"] = factor * beta**2 * (hk - 2 * mean * gk)
    if squares:
        extra["token_log_ratio_sq"] = factor * beta**2 * hm
    return factor * (head + beta**2 * (h - 2 * mean * g)) - A[i], extra, 0.0


def policy_gradient(case: Case) -> Answer:
    """RLOO, and the reward baseline with the KL as a term."""
    t, hyper = case.tensors, case.hyper
    w = world(case)
    rows, beta = range(case.rows), w.beta
    answer = Answer([], w.on, {"logps": []})
    exact = case.name == "kl_policy_gradient_exact"
    if exact:
        answer.slopes["token_kl"] = []
    R = [w.r[i] - beta * w.S[i] for i in rows] if case.name == "rloo" else w.r
    for i in rows:
        gain = w.gap(R, i)
        entries, slopes, kl_slopes = [], [], []
        for k, on in enumerate(w.on[i]):
            v = d = 0.0
            if on:
                v, d = -gain * t["logps"][i][k], -gain
                if exact:
                    v += beta * t["token_kl"][i][k]
                elif case.name == "kl_policy_gradient":
                    kl, dkl, size = kl_term(w.s[i][k], hyper["kl_value"], hyper["kl_gradient"], case.limit)
                    v, d = v + beta * kl, d + beta * dkl
                    answer.scale = max(answer.scale, beta * size)
                    answer.slope_scale = max(answer.slope_scale, beta * size)
            entries.append(v)
            slopes.append(d)
            kl_slopes.append(beta if on else 0.0)
            if on:
                whole = max(abs(r) for r in w.r) + beta * max(sum(map(abs, row)) for row in w.s)
                answer.scale = max(answer.scale, whole * abs(t["logps"][i][k]))
                answer.slope_scale = max(answer.slope_scale, whole)
        answer.loss.append(entries)
        answer.slopes["logps"].append(slopes)
        if exact:
            answer.slopes["token_kl"].append(kl_slopes)
    return answer


def kl_term(x: float, value: str, gradient: str, limit: float) -> tuple[float, float, float]:
    """Estimate of the KL from a log-ratio, the slope it is asked to carry, and the size of the terms."""
    if value == "k3" or gradient in ("k3", "ratio_k3"):
        checked_exp(-x, limit)
    number = {"k1": lambda: x, "k2": lambda: x * x / 2, "k3": lambda: math.expm1(-x) + x}[value]()
    slope = {
        "none": lambda: 0.0,
        "k1": lambda: 1.0,
        "k2": lambda: x,
        "k3": lambda: -math.expm1(-x),
        "ratio_k3": lambda: x,  # k3 + (1 - e^-x): the reverse KL's own
    }[gradient]()
    inside = math.exp(-x) * (1 + abs(x)) if value == "k3" or gradient in ("k3", "ratio_k3") else 0.0
    return number, slope, 1 + x * x + inside
