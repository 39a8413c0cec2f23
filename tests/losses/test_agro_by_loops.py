"""AGRO's token-level estimators, token by token in plain Python from the formulas of their docstrings.

Their expectations agree with one another, so enumeration alone cannot tell which of them was computed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft import losses
from rlft.types import LossOutput

F64 = torch.float64
BETA, COEF = 0.4, 0.7
TIGHT = {"rtol": 1e-12, "atol": 1e-14}

g = torch.Generator().manual_seed(11)
LOGPS, REF, KL, MOMENT = (torch.rand(4, 3, generator=g, dtype=F64) + 0.1 for _ in range(4))
LOGPS, REF = -LOGPS, -REF
#: Answers of 3, 2 and 3 tokens with a gap, and an empty one.
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
REWARDS, IDS = torch.tensor([1.0, -0.5, 0.25, 9.0], dtype=F64), torch.zeros(4).long()
MEMBERS = (0, 1, 2)


def others(values: list[float], i: int) -> float:
    return sum(values[j] for j in MEMBERS if j != i) / (len(MEMBERS) - 1)


class Rows:
    """What the docstrings name: s_t, S, P_t before t, F_t from t on, K_t the KL after t; zero where masked."""

    def __init__(self) -> None:
        self.s = (LOGPS - REF).where(MASK, 0.0).tolist()
        self.kl = KL.where(MASK, 0.0).tolist()
        self.moment = MOMENT.where(MASK, 0.0).tolist()
        self.S = [sum(row) for row in self.s]
        self.P = [[sum(row[:t]) for t in range(3)] for row in self.s]
        self.F = [[sum(row[t:]) for t in range(3)] for row in self.s]
        self.K = [[sum(row[t + 1 :]) for t in range(3)] for row in self.kl]
        self.R = [r - BETA * s for r, s in zip(REWARDS.tolist(), self.S, strict=True)]
        self.A = [self.R[i] - others(self.R, i) for i in MEMBERS]


def check(found: LossOutput, leaves: dict[str, Tensor], expected: dict[str, list[list[float]]]) -> None:
    """The gradient of the sum over tokens is these coefficients, one per row and token."""
    grads = torch.autograd.grad(found.loss.sum(), list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        table = torch.zeros_like(leaf)
        for i in MEMBERS:
            for t in range(3):
                if MASK[i, t] and name in expected:
                    table[i, t] = expected[name][i][t]
        torch.testing.assert_close(torch.zeros_like(leaf) if grad is None else grad, table, **TIGHT)


def leaves(*names: str) -> dict[str, Tensor]:
    of = {"logps": LOGPS, "token_kl": KL, "token_log_ratio_sq": MOMENT}
    return {name: of[name].clone().requires_grad_() for name in names}


@pytest.mark.parametrize("baseline", ["none", "sequence", "position"])
def test_causal(baseline: str) -> None:
    x, r = leaves("logps"), Rows()
    rewards = REWARDS.tolist()

    def coefficient(i: int, t: int) -> float:
        b = {"none": 0.0, "sequence": others(r.S, i), "position": others([row[t] for row in r.F], i)}[baseline]
        return -(rewards[i] - others(rewards, i) - BETA * (r.F[i][t] - b))

    found = losses.agro_on_policy_causal(x["logps"], REF, REWARDS, IDS, MASK, beta=BETA, baseline=baseline)
    check(found, x, {"logps": [[coefficient(i, t) for t in range(3)] for i in MEMBERS]})


@pytest.mark.parametrize("baseline", ["none", "sequence", "position"])
def test_exact_kl(baseline: str) -> None:
    x, r = leaves("logps", "token_kl"), Rows()
    rewards, whole = REWARDS.tolist(), [sum(row) for row in r.kl]

    def coefficient(i: int, t: int) -> float:
        b = {"none": 0.0, "sequence": others(whole, i), "position": others([row[t] for row in r.K], i)}[baseline]
        return -(rewards[i] - others(rewards, i) - BETA * (r.K[i][t] - b))

    found = losses.agro_on_policy_exact_kl(
        x["logps"], REF, x["token_kl"], REWARDS, IDS, MASK, beta=BETA, baseline=baseline
    )
    expected = {"logps": [[coefficient(i, t) for t in range(3)] for i in MEMBERS], "token_kl": [[BETA] * 3] * 3}
    check(found, x, expected)
    assert found.metrics["objective/kl"].tolist() == pytest.approx([*whole], rel=1e-13)


def unbiased_offset(r: Rows, i: int) -> float:
    """n/(n-1) times the variance of the others' R."""
    rest = [r.R[j] for j in MEMBERS if j != i]
    mean = sum(rest) / len(rest)
    return len(MEMBERS) / (len(MEMBERS) - 1) * sum((x - mean) ** 2 for x in rest) / (len(rest) - 1)


def expanded(r: Rows, h: dict[str, list], g: dict[str, list], lr_baseline: str) -> dict[str, list[list[float]]]:
    """``COEF/(2 beta) * ([r~^2 - 2 beta r~ S~ - c] + beta^2 (H - 2 (S of the others) G)) - A`` as coefficients."""
    rewards = REWARDS.tolist()
    scale = COEF / (2 * BETA)
    table: dict[str, list[list[float]]] = {}
    for name in h:
        table[name] = [[0.0] * 3 for _ in MEMBERS]
        for i in MEMBERS:
            reward, ratio = rewards[i] - others(rewards, i), r.S[i] - others(r.S, i)
            shared = reward**2 - 2 * BETA * reward * ratio
            shared -= unbiased_offset(r, i) if lr_baseline == "unbiased" else 0.0
            for t in range(3):
                inner = BETA**2 * (h[name][i][t] - 2 * others(r.S, i) * g[name][i][t])
                table[name][i][t] = scale * (inner + (shared if name == "logps" else 0.0))
                table[name][i][t] -= r.A[i] if name == "logps" else 0.0
    return table


def every(formula) -> list[list[float]]:
    return [[formula(i, t) for t in range(3)] for i in MEMBERS]


def squares(r: Rows) -> dict[str, dict[str, list]]:
    zero = every(lambda i, t: 0.0)
    return {
        "h1": {"logps": every(lambda i, t: r.S[i] ** 2), "token_kl": zero},
        "h2": {"logps": every(lambda i, t: r.S[i] ** 2 - r.P[i][t] ** 2), "token_kl": zero},
        "h3": {
            "logps": every(lambda i, t: r.F[i][t] ** 2 + 2 * r.P[i][t] * r.K[i][t]),
            "token_kl": every(lambda i, t: 2 * r.P[i][t]),
        },
    }


def linears(r: Rows) -> dict[str, dict[str, list]]:
    zero = every(lambda i, t: 0.0)
    return {
        "g1": {"logps": every(lambda i, t: r.S[i]), "token_kl": zero},
        "g2": {"logps": every(lambda i, t: r.F[i][t]), "token_kl": zero},
        "g3": {"logps": every(lambda i, t: r.K[i][t]), "token_kl": every(lambda i, t: 1.0)},
        "g3n": {"logps": every(lambda i, t: r.s[i][t] + r.K[i][t]), "token_kl": zero},
    }


@pytest.mark.parametrize("lr_baseline", ["none", "unbiased"])
@pytest.mark.parametrize("linear", ["g1", "g2"])
@pytest.mark.parametrize("square", ["h1", "h2"])
def test_lr_token(square: str, linear: str, lr_baseline: str) -> None:
    x, r = leaves("logps"), Rows()
    hyper = {"beta": BETA, "lr_coef": COEF, "square": square, "linear": linear, "lr_baseline": lr_baseline}
    found = losses.agro_on_policy_lr_token(x["logps"], REF, REWARDS, IDS, MASK, **hyper)
    check(found, x, expanded(r, squares(r)[square], linears(r)[linear], lr_baseline))


@pytest.mark.parametrize("lr_baseline", ["none", "unbiased"])
@pytest.mark.parametrize("linear", ["g1", "g2", "g3", "g3n"])
@pytest.mark.parametrize("square", ["h1", "h2", "h3"])
def test_lr_kl(square: str, linear: str, lr_baseline: str) -> None:
    x, r = leaves("logps", "token_kl"), Rows()
    hyper = {"beta": BETA, "lr_coef": COEF, "square": square, "linear": linear, "lr_baseline": lr_baseline}
    call = (x["logps"], REF, x["token_kl"], REWARDS, IDS, MASK)
    if square != "h3" and not linear.startswith("g3"):
        with pytest.raises(ValueError, match="does not use token_kl; call agro_on_policy_lr_token"):
            losses.agro_on_policy_lr_kl(*call, **hyper)
        return
    found = losses.agro_on_policy_lr_kl(*call, **hyper)
    check(found, x, expanded(r, squares(r)[square], linears(r)[linear], lr_baseline))


@pytest.mark.parametrize("lr_baseline", ["none", "unbiased"])
def test_lr_moments(lr_baseline: str) -> None:
    x, r = leaves("logps", "token_kl", "token_log_ratio_sq"), Rows()
    hyper = {"beta": BETA, "lr_coef": COEF, "lr_baseline": lr_baseline}
    call = (x["logps"], REF, x["token_kl"], x["token_log_ratio_sq"], REWARDS, IDS, MASK)
    found = losses.agro_on_policy_lr_moments(*call, **hyper)

    def weight(i: int, t: int) -> float:
        after = range(t + 1, 3)
        own = (
            2 * r.s[i][t] * r.K[i][t]
            + sum(r.moment[i][u] for u in after)
            + 2 * sum(r.s[i][u] * r.K[i][u] for u in after)
        )
        return own + 2 * r.P[i][t] * r.K[i][t]

    h4 = {
        "logps": every(weight),
        "token_kl": every(lambda i, t: -2 + 2 * r.P[i][t]),
        "token_log_ratio_sq": every(lambda i, t: 1.0),
    }
    g3 = {**linears(r)["g3"], "token_log_ratio_sq": every(lambda i, t: 0.0)}
    check(found, x, expanded(r, h4, g3, lr_baseline))


def test_lr_causal() -> None:
    x, r = leaves("logps"), Rows()
    found = losses.agro_on_policy_lr_causal(x["logps"], REF, REWARDS, IDS, MASK, beta=BETA, lr_coef=COEF)

    def coefficient(i: int, t: int) -> float:
        surplus = r.P[i][t] - others([row[t] for row in r.P], i)
        return COEF / (2 * BETA) * (r.A[i] ** 2 - BETA**2 * surplus**2) - r.A[i]

    check(found, x, {"logps": every(coefficient)})
