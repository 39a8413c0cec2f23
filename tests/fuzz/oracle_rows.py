"""Formulas of the losses per token and per row, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.fuzz.arithmetic import Answer, checked_exp, near, sig, softplus
from tests.fuzz.generate import Case
from tests.fuzz.oracle_agro import grouped, kl_term

#: (value, slope in the first learned number, slopes in other learned numbers, size of the terms, is it a corner)
Token = tuple[float, float, dict[str, float], float, bool]


def _plain(v: float, d: float, size: float, kink: bool = False, **more: float) -> Token:
    return v, d, more, size, kink


def _clipped(ratio: float, A: float, low: float, high: float, dual: float | None = None) -> tuple[float, float, bool]:
    """-min(ratio A, clip(ratio) A), bounded by dual A for A < 0; value, slope in log ratio, is it a corner."""
    if A == 0:
        return 0.0, 0.0, False
    stuck = ratio > high if A > 0 else ratio < low
    gain = (high if A > 0 else low) * A if stuck else ratio * A
    corner = near(ratio, high if A > 0 else low)
    if dual is not None and A < 0:
        corner = corner or near(gain, dual * A)
        if gain < dual * A:
            return -dual * A, 0.0, corner
    return -gain, 0.0 if stuck else -ratio * A, corner


def _range(h: dict[str, Any]) -> tuple[float, float]:
    high = h.get("clip_eps_high")
    return 1 - h["clip_eps"], 1 + (h["clip_eps"] if high is None else high)


def _ratio(x: dict[str, float], limit: float) -> tuple[float, float]:
    log_ratio = x["logps"] - x["old_logps"]
    ratio = checked_exp(log_ratio, limit)
    return ratio, 1 + ratio * (1 + abs(x["logps"]) + abs(x["old_logps"]))


def sft(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    return _plain(-x["logps"], -1.0, abs(x["logps"]))


def distillation(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    a = h["soft_weight"]
    return _plain(a * x["teacher_kl"] - (1 - a) * x["logps"], a - 1, x["teacher_kl"] - x["logps"], teacher_kl=a)


def reinforce(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    return _plain(-x["advantages"] * x["logps"], -x["advantages"], abs(x["advantages"] * x["logps"]))


def trpo(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    ratio, size = _ratio(x, limit)
    return _plain(-ratio * x["advantages"], -ratio * x["advantages"], size * abs(x["advantages"]))


def ppo_penalty(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    ratio, size = _ratio(x, limit)
    A, beta, gap = x["advantages"], h["beta"], x["logps"] - x["old_logps"]
    value = beta * (math.expm1(gap) - gap) - ratio * A
    return _plain(value, beta * math.expm1(gap) - ratio * A, (size + abs(gap)) * (beta + abs(A)))


def ppo_clip(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    ratio, size = _ratio(x, limit)
    v, d, corner = _clipped(ratio, x["advantages"], *_range(h), h.get("dual_clip"))
    return _plain(v, d, size * abs(x["advantages"]), corner)


def grpo(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    v, d, _, size, corner = ppo_clip(x, h, limit)
    kl, dkl, more = kl_term(x["logps"] - x["ref_logps"], "k3", h["kl_gradient"], limit)
    return _plain(v + h["beta"] * kl, d + h["beta"] * dkl, size + h["beta"] * more, corner)


def cispo(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    ratio, _ = _ratio(x, limit)
    low, high = _range(h)
    weight = min(max(ratio, low), high)
    size = (1 + weight) * abs(x["advantages"]) * (1 + abs(x["logps"])) * (1 + abs(x["logps"]) + abs(x["old_logps"]))
    return _plain(-weight * x["advantages"] * x["logps"], -weight * x["advantages"], size)


def sapo(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    ratio, size = _ratio(x, limit)
    A = x["advantages"]
    tau = h["temperature_positive" if A > 0 else "temperature_negative"]
    z = tau * (ratio - 1)
    # the exponent is as unsure as the ratio; the sigmoid damps it
    unsure = (1 + tau * size * sig(z) * sig(-z)) * (1 + ratio * sig(-z)) * abs(A) * 4 * max(1.0, 1 / tau)
    return _plain(-4 / tau * sig(z) * A, -4 * sig(z) * sig(-z) * ratio * A, unsure * (1 + size * sig(-z)))


def value_loss(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    v, old, target, eps = x["values"], x["old_values"], x["returns"], h["clip_eps"]
    size = (abs(v) + abs(old) + abs(target)) ** 2
    if eps is None or abs(v - old) <= eps:
        return _plain((v - target) ** 2 / 2, v - target, size, eps is not None and near(abs(v - old), eps))
    held = old + math.copysign(eps, v - old)
    stuck = (held - target) ** 2 > (v - target) ** 2
    corner = near(abs(held - target), abs(v - target)) or near(abs(v - old), eps)
    return _plain(max((held - target) ** 2, (v - target) ** 2) / 2, 0.0 if stuck else v - target, size, corner)


def process_reward(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    v, y = x["values"], x["step_labels"]
    return _plain(y * softplus(-v) + (1 - y) * softplus(v), sig(v) - y, 1 + abs(v))


def unlikelihood(x: dict[str, float], h: dict[str, Any], limit: float) -> Token:
    lp = x["logps"]
    if x["labels"]:
        return _plain(-lp, -1.0, abs(lp))
    left = h["eps"] - (1 - h["eps"]) * math.expm1(lp)  # 1 - (1 - eps) p
    push = h["weight"] * (1 - left) / left
    return _plain(-h["weight"] * math.log(left), push, (1 + push) * (1 + abs(lp)))


TOKENS: dict[str, Callable[..., Token]] = {
    f.__name__: f
    for f in (
        sft, distillation, reinforce, trpo, ppo_penalty, ppo_clip, grpo, cispo, sapo, value_loss, process_reward, unlikelihood,
    )
}  # fmt: skip


def _blank(case: Case, fill: float = 0.0) -> list[list[float]]:
    return [[fill] * len(row) for row in case.tensors["mask"]]


def by_tokens(case: Case) -> Answer:
    """A loss whose tokens have nothing to do with each other."""
    t = case.tensors
    first = "values" if "values" in t else "logps"
    extra = [n for n in ("teacher_kl",) if n in t]
    sizes = _blank(case, 1.0)
    answer = Answer(_blank(case), t["mask"], {n: _blank(case) for n in (first, *extra)}, sizes, sizes)
    for i, row in enumerate(t["mask"]):
        for k, on in enumerate(row):
            if not on:
                continue
            x = {n: v[i][k] if isinstance(v[i], list) else v[i] for n, v in t.items()}
            v, d, more, size, kink = TOKENS[case.name](x, case.hyper, case.limit)
            answer.loss[i][k], answer.slopes[first][i][k] = v, d
            for n in extra:
                answer.slopes[n][i][k] = more[n]
            sizes[i][k] = max(1.0, size)
            answer.kink |= kink
    return answer


def sequence_ratio(case: Case) -> Answer:
    """GSPO and its variant per token: one ratio per row, the geometric mean of its tokens'."""
    t = case.tensors
    sizes = _blank(case, 1.0)
    answer = Answer(_blank(case), t["mask"], {"logps": _blank(case)}, sizes, sizes)
    low, high = _range(case.hyper)
    for i, row in enumerate(t["mask"]):
        at = [k for k, on in enumerate(row) if on]
        if not at:
            continue
        total = math.fsum(t["logps"][i][k] - t["old_logps"][i][k] for k in at)
        ratio = checked_exp(total / len(at), case.limit)
        length = sum(abs(t["logps"][i][k]) + abs(t["old_logps"][i][k]) for k in at) / len(at)
        for k in at:
            A = t["advantages"][i] if not isinstance(t["advantages"][i], list) else t["advantages"][i][k]
            answer.loss[i][k], answer.slopes["logps"][i][k], corner = _clipped(ratio, A, low, high)
            answer.kink |= corner
            sizes[i][k] = 1 + (1 + ratio) * abs(A) * (1 + length)
    return answer


def kto(case: Case) -> Answer:
    t, h = case.tensors, case.hyper
    member = [any(row) for row in t["mask"]]
    answer = Answer([0.0] * case.rows, member, {"logps": _blank(case)})
    for i, row in enumerate(t["mask"]):
        at = [k for k, on in enumerate(row) if on]
        if not at:
            continue
        S = math.fsum(t["logps"][i][k] - t["ref_logps"][i][k] for k in at)
        sign = 1 if t["labels"][i] else -1
        weight = h["desirable_weight" if t["labels"][i] else "undesirable_weight"]
        z = sign * h["beta"] * (S - t["kl_baseline"][i])
        answer.loss[i] = weight * (1 - sig(z)) if z < 0 else weight * sig(-z)
        for k in at:
            answer.slopes["logps"][i][k] = -weight * sign * h["beta"] * sig(z) * sig(-z)
        size = 1 + h["beta"] * sum(abs(t["logps"][i][k]) + abs(t["ref_logps"][i][k]) for k in at)
        answer.scale = max(answer.scale, weight * (1 + size * sig(z) * sig(-z)))
        answer.slope_scale = max(answer.slope_scale, weight * max(1, h["beta"]) * (1 + size * sig(z) * sig(-z)))
    return answer


def dro(case: Case) -> Answer:
    t, beta = case.tensors, case.hyper["beta"]
    member = [any(row) and not math.isnan(r) for row, r in zip(t["mask"], t["rewards"], strict=True)]
    answer = Answer([0.0] * case.rows, member, {"logps": _blank(case), "values": [0.0] * case.rows})
    for i, row in enumerate(t["mask"]):
        if not member[i]:
            continue
        at = [k for k, on in enumerate(row) if on]
        S = math.fsum(t["logps"][i][k] - t["ref_logps"][i][k] for k in at)
        error = t["rewards"][i] - t["values"][i] - beta * S
        answer.loss[i], answer.slopes["values"][i] = error * error / 2, -error
        for k in at:
            answer.slopes["logps"][i][k] = -beta * error
        size = 1 + abs(t["rewards"][i]) + abs(t["values"][i])
        size += beta * sum(abs(t["logps"][i][k]) + abs(t["ref_logps"][i][k]) for k in at)
        answer.scale, answer.slope_scale = max(answer.scale, size**2), max(answer.slope_scale, size * max(1, beta))
    return answer


def nash_md_pg(case: Case) -> Answer:
    t, beta = case.tensors, case.hyper["beta"]
    on = [[m and not math.isnan(p) for m in row] for row, p in zip(t["mask"], t["win_rates"], strict=True)]
    answer = Answer(_blank(case), on, {"logps": _blank(case)})
    for i, row in enumerate(on):
        at = [k for k, counts in enumerate(row) if counts]
        if not at:
            continue
        S = math.fsum(t["logps"][i][k] - t["ref_logps"][i][k] for k in at)
        A = t["win_rates"][i] - 0.5 - beta * S
        size = 1 + beta * sum(abs(t["logps"][i][k]) + abs(t["ref_logps"][i][k]) for k in at)
        for k in at:
            answer.loss[i][k], answer.slopes["logps"][i][k] = -A * t["logps"][i][k], -A
            answer.scale = max(answer.scale, size * abs(t["logps"][i][k]))
        answer.slope_scale = max(answer.slope_scale, size)
    return answer


def reward_rows(case: Case) -> Answer:
    """Regression and classification of a reward model's scores."""
    t = case.tensors
    target = t.get("rewards", [0.0] * case.rows)
    member = [any(row) and not math.isnan(r) for row, r in zip(t["mask"], target, strict=True)]
    answer = Answer([0.0] * case.rows, member, {"scores": [0.0] * case.rows})
    for i in range(case.rows):
        if not member[i]:
            continue
        s = t["scores"][i]
        if case.name == "reward_regression":
            answer.loss[i], answer.slopes["scores"][i] = (s - target[i]) ** 2 / 2, s - target[i]
            size = 1 + abs(s) + abs(target[i])
            answer.scale, answer.slope_scale = max(answer.scale, size**2), max(answer.slope_scale, size)
        else:
            sign = 1 if t["labels"][i] else -1
            answer.loss[i], answer.slopes["scores"][i] = softplus(-sign * s), -sign * sig(-sign * s)
            answer.scale = max(answer.scale, 1 + abs(s))
    return answer


def reward_ranking(case: Case) -> Answer:
    t = case.tensors
    member, others, _ = grouped(case, 2)
    s, r = t["scores"], t["rewards"]
    answer = Answer([0.0] * case.rows, member, {"scores": [0.0] * case.rows})
    for i in range(case.rows):
        if not member[i]:
            continue
        group = [i, *others[i]]
        pairs = sum(r[a] > r[b] for a in group for b in group)
        for j in others[i]:
            if r[i] > r[j]:
                share = len(group) / pairs
                answer.loss[i] += share * softplus(s[j] - s[i])
                answer.slopes["scores"][i] -= share * sig(s[j] - s[i])
                answer.slopes["scores"][j] += share * sig(s[j] - s[i])
                answer.scale = max(answer.scale, len(group) * (1 + abs(s[i]) + abs(s[j])))
    answer.slope_scale = answer.scale
    return answer


def rrhf(case: Case) -> Answer:
    t, weight = case.tensors, case.hyper["nll_weight"]
    member, others, on = grouped(case, 2)
    r = t["rewards"]
    answer = Answer([0.0] * case.rows, member, {"logps": _blank(case)})
    total = [math.fsum(x for x, m in zip(*pair, strict=True) if m) for pair in zip(t["logps"], on, strict=True)]
    length = [max(1, sum(row)) for row in on]
    slope = [0.0] * case.rows
    for i in range(case.rows):
        if not others[i]:
            continue
        group = [i, *others[i]]
        top = max(r[j] for j in group)
        for j in others[i]:
            lead = total[i] / length[i] - total[j] / length[j]
            if r[i] < r[j]:
                answer.kink |= near(lead, 0.0)
                if lead > 0:
                    answer.loss[i] += len(group) * lead
                    slope[i] += len(group) / length[i]
                    slope[j] -= len(group) / length[j]
        if r[i] == top:
            share = len(group) * weight / sum(r[j] == top for j in group)
            answer.loss[i] -= share * total[i]
            slope[i] -= share
        answer.scale = max(answer.scale, len(group) ** 2 * (1 + weight) * (1 + abs(total[i])))
    answer.slopes["logps"] = [[slope[i] if m else 0.0 for m in row] for i, row in enumerate(on)]
    answer.slope_scale = 30.0
    return answer


def ld_dpo(case: Case) -> Answer:
    t, h = case.tensors, case.hyper
    ids, mask, beta, e = t["group_ids"], t["mask"], h["beta"], h["label_smoothing"]
    answer = Answer([0.0] * case.rows, [False] * case.rows, {"logps": _blank(case)})
    for g in set(ids):
        pair = [i for i in range(case.rows) if ids[i] == g]
        places = [[k for k, on in enumerate(mask[i]) if on] for i in pair]
        if not all(places):
            continue
        shared = min(map(len, places))
        reward, size = [0.0, 0.0], 1.0
        for side, (i, at) in enumerate(zip(pair, places, strict=True)):
            weights = [1.0 if k < shared else h["ld_alpha"] for k in range(len(at))]
            reward[side] = beta * math.fsum(
                w * (t["logps"][i][k] - t["ref_logps"][i][k]) for w, k in zip(weights, at, strict=True)
            )
            size += beta * sum(abs(t["logps"][i][k]) + abs(t["ref_logps"][i][k]) for k in at)
        m = reward[0] - reward[1]
        v = (1 - e) * softplus(-m) + e * softplus(m)
        for side, (i, at) in enumerate(zip(pair, places, strict=True)):
            answer.loss[i], answer.counted[i] = v, True
            for nth, k in enumerate(at):
                push = 2 * (sig(m) - (1 - e)) * beta * (1.0 if nth < shared else h["ld_alpha"])
                answer.slopes["logps"][i][k] = push if side == 0 else -push
        answer.scale = max(answer.scale, size)
        answer.slope_scale = max(answer.slope_scale, (1 + beta) * (1 + size * sig(m) * sig(-m)))
    return answer


def p3o(case: Case) -> Answer:
    t, h = case.tensors, case.hyper
    member, others, on = grouped(case, 2)
    low, high = _range(h)
    rows = range(case.rows)

    def whole(name: str, i: int) -> float:
        return math.fsum(x for x, m in zip(t[name][i], on[i], strict=True) if m)

    def bulk(name: str, i: int) -> float:
        return sum(abs(x) for x, m in zip(t[name][i], on[i], strict=True) if m)

    answer_sum = [whole("logps", i) for i in rows]
    log_w = [answer_sum[i] - whole("old_logps", i) for i in rows]
    R = [(t["rewards"][i] if member[i] else 0.0) - h["beta"] * (answer_sum[i] - whole("ref_logps", i)) for i in rows]
    size = [
        abs(t["rewards"][i]) + h["beta"] * (bulk("logps", i) + bulk("ref_logps", i)) if member[i] else 0.0 for i in rows
    ]
    sizes = [1.0] * case.rows
    answer = Answer([0.0] * case.rows, member, {"logps": _blank(case)}, sizes)
    if h["clipping"] == "separate":
        ratio = [checked_exp(x, case.limit) for x in log_w]
    for i in rows:
        slope = 0.0
        for j in others[i]:
            D, share = R[i] - R[j], 1 / len(others[i])
            if h["clipping"] == "separate":
                v, d, corner = _clipped(ratio[i], D, low, high)
                answer.kink |= corner
                reach, far = ratio[i] + 1, bulk("logps", i) + bulk("old_logps", i)
            else:
                weight = min(max(checked_exp(log_w[i] + log_w[j], case.limit), low), high)
                v, d = -weight * D * answer_sum[i], -weight * D
                reach = (1 + weight) * (1 + abs(answer_sum[i]))
                far = sum(bulk(n, k) for n in ("logps", "old_logps") for k in (i, j))
            answer.loss[i] += share * v
            slope += share * d
            sizes[i] = max(sizes[i], (1 + far) * reach * (size[i] + size[j]))
        answer.slopes["logps"][i] = [slope if m else 0.0 for m in on[i]]
    answer.slope_scale = [[x] * len(on[0]) for x in sizes]
    return answer
