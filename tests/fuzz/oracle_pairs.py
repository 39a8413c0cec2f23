"""The preference pairs' formulas, one pair at a time: value and slope in each of the policy's two numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.fuzz.arithmetic import Answer, Refused, checked_exp, near, sig, softplus
from tests.fuzz.generate import Case

#: (value, slope in the first number, slope in the second, scale of the value, scale of the slopes)
Point = tuple[float, float, float, float, float]
Pair = dict[str, float]


def logistic(m: float, e: float) -> tuple[float, float]:
    """Binary cross-entropy of a margin under labels flipped with probability e, and its slope."""
    return (1 - e) * softplus(-m) + e * softplus(m), sig(m) - (1 - e)


def of_margin(v: float, dm: float, beta: float, m: float = 0.0) -> Point:
    return v, beta * dm, -beta * dm, 1 + abs(v) + abs(m), max(1.0, beta) * (1 + abs(dm))


def square(x: float, target: float, weight: float = 1.0) -> tuple[float, float, float]:
    """(x - target)^2, its slope, and the size of what is subtracted."""
    return weight * (x - target) ** 2, 2 * weight * (x - target), abs(x) + abs(target)


def h_of(p: Pair) -> float:
    return math.fsum((p["chosen_logps"], -p["ref_chosen_logps"], -p["rejected_logps"], p["ref_rejected_logps"]))


def ab(p: Pair, beta: float) -> tuple[float, float]:
    return beta * (p["chosen_logps"] - p["ref_chosen_logps"]), beta * (p["rejected_logps"] - p["ref_rejected_logps"])


def dpo(p: Pair, limit: float, *, beta: float, label_smoothing: float = 0.0) -> Point:
    m = beta * h_of(p)
    return of_margin(*logistic(m, label_smoothing), beta, m)


def robust_dpo(p: Pair, limit: float, *, beta: float, label_smoothing: float) -> Point:
    m, e = beta * h_of(p), label_smoothing
    v = ((1 - e) * softplus(-m) - e * softplus(m)) / (1 - 2 * e)
    dm = (-(1 - e) * sig(-m) - e * sig(m)) / (1 - 2 * e)
    return of_margin(v, dm, beta, m / (1 - 2 * e))


def dpo_reference_free(p: Pair, limit: float, *, beta: float, label_smoothing: float) -> Point:
    m = beta * (p["chosen_logps"] - p["rejected_logps"])
    return of_margin(*logistic(m, label_smoothing), beta, m)


def ipo(p: Pair, limit: float, *, beta: float) -> Point:
    v, d, size = square(h_of(p), 1 / (2 * beta))
    size += sum(map(abs, p.values()))
    return v, d, -d, size**2, 2 * size


def ipo_mean(p: Pair, limit: float, *, beta: float) -> Point:
    n, k = p["chosen_lengths"], p["rejected_lengths"]
    x = (p["chosen_logps"] - p["ref_chosen_logps"]) / n - (p["rejected_logps"] - p["ref_rejected_logps"]) / k
    v, d, size = square(x, 1 / (2 * beta))
    size += sum(map(abs, p.values()))
    return v, d / n, -d / k, size**2, 2 * size


def ipo_md(p: Pair, limit: float, *, beta: float) -> Point:
    v, d, size = square(h_of(p), (p["chosen_win_rates"] - 0.5) / beta)
    size += sum(map(abs, p.values()))
    return v, d, -d, size**2, 2 * size


def sppo_hard(p: Pair, limit: float, *, beta: float) -> Point:
    half = 0.5 / beta
    v, d, size = square(p["chosen_logps"] - p["ref_chosen_logps"], half)
    w, e, other = square(p["rejected_logps"] - p["ref_rejected_logps"], -half)
    size += other + sum(map(abs, p.values()))
    return v + w, d, e, size**2, 2 * size


def slic(p: Pair, limit: float, *, beta: float, delta: float) -> Point:
    m = beta * h_of(p)
    if near(m, delta):
        p["kink"] = 1.0
    return of_margin(max(0.0, delta - m), -1.0 if m < delta else 0.0, beta, m)


def slic_hf(p: Pair, limit: float, *, delta: float, nll_weight: float) -> Point:
    c, r = p["chosen_logps"], p["rejected_logps"]
    if near(c - r, delta):
        p["kink"] = 1.0
    on = 1.0 if c - r < delta else 0.0
    return max(0.0, delta - c + r) - nll_weight * c, -on - nll_weight, on, 1 + (1 + nll_weight) * abs(c) + abs(r), 3.0


def generalised_po(p: Pair, limit: float, *, beta: float, f: str) -> Point:
    x = beta * h_of(p)
    if f == "logistic":
        return of_margin(*logistic(x, 0.0), beta, x)
    if f == "square":
        v, d, size = square(x, 1.0)
        size += beta * sum(map(abs, p.values()))
        return v, beta * d, -beta * d, size**2, 2 * size * max(1, beta)
    if f == "hinge":
        if near(x, 1.0):
            p["kink"] = 1.0
        return of_margin(max(0.0, 1 - x), -1.0 if x < 1 else 0.0, beta, x)
    v = checked_exp(-x, limit)
    return v, -beta * v, beta * v, 1 + v * (1 + abs(x)), max(1.0, beta) * (1 + v * (1 + abs(x)))


def f_dpo(p: Pair, limit: float, *, beta: float, divergence: str, alpha: float) -> Point:
    def link(x: float) -> tuple[float, float]:
        if divergence == "reverse_kl":
            return x, 1.0
        if divergence == "js":  # of Jensen-Shannon: log(2u/(1+u)), up to log 2
            return -softplus(-x), sig(-x)
        a = 1.0 if divergence == "forward_kl" else alpha
        u = checked_exp(-a * x, limit)
        return ((1 - u) / a if divergence == "alpha" else -u), a * u if divergence == "forward_kl" else u

    (g, dg), (k, dk) = (link(x / beta) for x in ab(p, beta))
    m = beta * (g - k)
    v, dm = logistic(m, 0.0)
    big = beta * (abs(g) + abs(k) + 1)
    steep = 1 + beta * (dg + dk) * (1 + sum(map(abs, p.values())))
    # the slope of a logistic is as unsure as its argument
    return v, beta * dm * dg, -beta * dm * dk, 1 + big, steep * (1 + min(1.0, sig(m) * sig(-m) * big))


def discopop(p: Pair, limit: float, *, beta: float, temperature: float) -> Point:
    x = beta * h_of(p)
    z = x / temperature
    # s e^-x for both signs without an exponential that overflows
    blend = sig(z) * math.exp(-x) if x > 0 else math.exp(z - x) / (1 + math.exp(z))
    v = sig(-z) * softplus(-x) + blend
    dm = -sig(z) * sig(-z) / temperature * softplus(-x) - sig(-z) * sig(-x) + blend * (sig(-z) / temperature - 1)
    return v, beta * dm, -beta * dm, 1 + abs(x) / temperature, (1 + abs(x)) * max(1, beta) / temperature**2


def reward_aware_rpo(p: Pair, limit: float, *, beta: float, eta: float, distance: str) -> Point:
    a, b = beta * h_of(p), eta * p["margins"]

    def bernoulli(u: float, w: float) -> float:
        return sig(u) * (softplus(-w) - softplus(-u)) + sig(-u) * (softplus(w) - softplus(u))

    size = 1 + abs(b) + beta * sum(map(abs, p.values()))
    if distance == "square":
        v, d, _ = square(a, b, 0.5)
        return v, beta * d, -beta * d, size**2, size * max(1, beta)
    if distance == "backward_kl":
        v, dm = bernoulli(b, a), sig(a) - sig(b)
    else:
        v, dm = bernoulli(a, b), sig(a) * sig(-a) * (a - b)
    return v, beta * dm, -beta * dm, size, size * max(1, beta)


def apo_zero(p: Pair, limit: float, *, beta: float) -> Point:
    a, b = ab(p, beta)
    return 1 - sig(a) + sig(b), -beta * sig(a) * sig(-a), beta * sig(b) * sig(-b), 1 + abs(a) + abs(b), max(1, beta)


def apo_down(p: Pair, limit: float, *, beta: float) -> Point:
    a, b = ab(p, beta)
    rise, gap = sig(a) * sig(-a), sig(a - b) * sig(b - a)
    return sig(a) + 1 - sig(a - b), beta * (rise - gap), beta * gap, 1 + abs(a) + abs(b), max(1, beta)


def anchored_dpo(p: Pair, limit: float, *, beta: float, delta: float) -> Point:
    a, b = ab(p, beta)
    v = softplus(b - a) + softplus(delta - a)
    return v, -beta * (sig(b - a) + sig(delta - a)), beta * sig(b - a), 1 + abs(a) + abs(b), 2 * max(1, beta)


def exo_pair(p: Pair, limit: float, *, beta: float, label_smoothing: float) -> Point:
    m, e = beta * h_of(p), label_smoothing
    win, lose = sig(m), sig(-m)
    v = win * (-softplus(-m) - math.log1p(-e)) + lose * (-softplus(m) - math.log(e))
    return of_margin(v, win * lose * (m - math.log1p(-e) + math.log(e)), beta, m)


def nca_pair(p: Pair, limit: float, *, beta: float) -> Point:
    a, b = ab(p, beta)
    v = softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b)
    return v, beta * (0.5 * sig(a) - sig(-a)), beta * 0.5 * sig(b), 1 + abs(a) + abs(b), 2 * max(1, beta)


def bco_pair(p: Pair, limit: float, *, beta: float, delta: float) -> Point:
    a, b = ab(p, beta)
    v = softplus(delta - a) + softplus(b - delta)
    return v, -beta * sig(delta - a), beta * sig(b - delta), 1 + abs(a) + abs(b), 2 * max(1, beta)


def rpo(p: Pair, limit: float, *, beta: float, alpha: float) -> Point:
    m, n = beta * h_of(p), p["chosen_lengths"]
    v, dm = logistic(m, 0.0)
    nll = -p["chosen_logps"] / n
    return v + alpha * nll, beta * dm - alpha / n, -beta * dm, 1 + abs(m) + alpha * nll, beta + alpha + 1


def simpo(p: Pair, limit: float, *, beta: float, gamma: float, label_smoothing: float) -> Point:
    n, k = p["chosen_lengths"], p["rejected_lengths"]
    m = beta * (p["chosen_logps"] / n - p["rejected_logps"] / k) - gamma
    v, dm = logistic(m, label_smoothing)
    return v, beta * dm / n, -beta * dm / k, 1 + abs(m) + gamma, 1 + beta


def orpo(p: Pair, limit: float, *, beta: float, eps: float) -> Point:
    def log_odds(m: float) -> tuple[float, float, float]:
        prob = (1 - eps) * math.exp(m)
        left = eps - (1 - eps) * math.expm1(m)  # 1 - prob, whatever m
        if left <= 0 or (eps == 0 and m >= 0):
            raise Refused("overflow")
        return m + math.log1p(-eps) - math.log(left), 1 / left, prob

    n, k = p["chosen_lengths"], p["rejected_lengths"]
    mw, ml = p["chosen_logps"] / n, p["rejected_logps"] / k
    (a, da, _), (b, db, _) = log_odds(mw), log_odds(ml)
    v, dm = logistic(a - b, 0.0)
    grad = (1 + beta) * (1 + da + db) * (1 + abs(a - b))
    return -mw + beta * v, -1 / n + beta * dm * da / n, -beta * dm * db / k, 1 - mw + beta * (1 + abs(a) + abs(b)), grad


def cpo(p: Pair, limit: float, *, beta: float, nll_weight: float, label_smoothing: float) -> Point:
    n, m = p["chosen_lengths"], beta * (p["chosen_logps"] - p["rejected_logps"])
    v, dm = logistic(m, label_smoothing)
    nll = -p["chosen_logps"] / n
    return (
        v + nll_weight * nll,
        beta * dm - nll_weight / n,
        -beta * dm,
        1 + abs(m) + nll_weight * nll,
        1 + beta + nll_weight,
    )


def wpo(p: Pair, limit: float, *, beta: float, label_smoothing: float) -> Point:
    weight = math.exp(p["chosen_logps"] / p["chosen_lengths"]) * math.exp(p["rejected_logps"] / p["rejected_lengths"])
    m = beta * h_of(p)
    v, dm = logistic(m, label_smoothing)
    return of_margin(weight * v, weight * dm, beta, m)


def _bradley_terry(p: Pair, margin: float, centering: float) -> Point:
    c, r = p["chosen_rewards"], p["rejected_rewards"]
    v, dm = logistic(c - r - margin, 0.0)
    both, size = c + r, 1 + abs(c) + abs(r)
    pull = 2 * centering * both
    return v + centering * both**2, dm + pull, -dm + pull, (1 + centering * size) * size, (1 + centering) * size


def bradley_terry(p: Pair, limit: float, *, margin: float, centering: float) -> Point:
    return _bradley_terry(p, margin, centering)


def bradley_terry_margin(p: Pair, limit: float, *, centering: float) -> Point:
    return _bradley_terry(p, p["margins"], centering)


POINTS: dict[str, Callable[..., Point]] = {
    f.__name__: f
    for f in (
        dpo, robust_dpo, dpo_reference_free, ipo, ipo_mean, ipo_md, sppo_hard, slic, slic_hf, generalised_po, f_dpo,
        discopop, reward_aware_rpo, apo_zero, apo_down, anchored_dpo, exo_pair, nca_pair, bco_pair, rpo, simpo, orpo,
        cpo, wpo, bradley_terry, bradley_terry_margin,
    )
}  # fmt: skip


def by_pairs(case: Case) -> Answer:
    """A loss whose pairs have nothing to do with each other."""
    names = list(case.tensors)
    first, second = names[0], names[1]
    size = len(case.tensors[first])
    scales: list[float] = []
    steep: list[float] = []
    answer = Answer([], [True] * size, {first: [], second: []}, scales, steep)
    for i in range(size):
        pair = {name: case.tensors[name][i] for name in names}
        v, d, e, scale, slope_scale = POINTS[case.name](pair, case.limit, **case.hyper)
        answer.loss.append(v)
        answer.slopes[first].append(d)
        answer.slopes[second].append(e)
        scales.append(scale)
        steep.append(slope_scale)
        answer.kink |= "kink" in pair
    return answer


def by_rank(case: Case) -> Answer:
    """Optimal transport: the pairs are made by sorting."""
    t: dict[str, Any] = case.tensors
    beta, e = case.hyper["beta"], case.hyper["label_smoothing"]
    size = len(t["chosen_logps"])
    if case.name == "aot":
        left = [t["chosen_logps"][i] - t["rejected_logps"][i] for i in range(size)]
        right = [t["ref_chosen_logps"][i] - t["ref_rejected_logps"][i] for i in range(size)]
    else:
        left = [t["chosen_logps"][i] - t["ref_chosen_logps"][i] for i in range(size)]
        right = [t["rejected_logps"][i] - t["ref_rejected_logps"][i] for i in range(size)]
    up, across = sorted(range(size), key=left.__getitem__), sorted(range(size), key=right.__getitem__)
    scales = [1.0] * size
    answer = Answer([0.0] * size, [True] * size, {"chosen_logps": [0.0] * size, "rejected_logps": [0.0] * size}, scales)
    for i, j in zip(up, across, strict=True):
        m = beta * (left[i] - right[j])
        answer.loss[i], dm = logistic(m, e)
        answer.slopes["chosen_logps"][i] += beta * dm
        answer.slopes["rejected_logps"][i if case.name == "aot" else j] -= beta * dm
        scales[i] = 1 + beta * (abs(left[i]) + abs(right[j]))
    answer.slope_scale = 1 + beta
    # equal in exact arithmetic may differ by a rounding, and then the order is not determined
    answer.kink = any(near(a[i], a[j]) for a in (left, right) for i in range(size) for j in range(i))
    return answer
