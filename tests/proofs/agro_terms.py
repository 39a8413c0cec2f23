"""What AGRO's on-policy estimators multiply each log-prob with, written out from the formulas, term by term.

Notation: s_t the token's log-ratio, S their sum, P_t the sum before t, F_t the sum from t on, KL_t the exact KL of a position,
K_t its sum after t; r~ and S~ are against the mean of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.proofs import changes as c
from tests.proofs.proof import Value, row
from tests.proofs.rows_agro import B
from tests.proofs.scene import Scene


def carried(slopes: Callable[[Tensor], Tensor]) -> Callable[[Scene], tuple[Tensor, Tensor]]:
    """The log-ratio of each token as a constant, and a carrier whose gradient is a multiple of the log-prob's."""

    def parts(s: Scene) -> tuple[Tensor, Tensor]:
        ratio = (s.logps - s.ref).detach().where(s.mask, 0.0)
        weighted = slopes(ratio) * s.logps.where(s.mask, 0.0)
        return ratio, weighted - weighted.detach()

    return parts


def one_token_moments(s: Scene) -> Scene:
    """KL_t is the sampled token's log-ratio s, with gradient s grad logp; M_t is s^2 with gradient (s^2 + 2 s) grad logp."""
    ratio, slope = carried(lambda x: x)(s)
    _, square_slope = carried(lambda x: x.square() + 2 * x)(s)
    return s.but(token_kl=ratio + slope, token_log_ratio_sq=ratio.square() + square_slope)


def at_the_reference(s: Scene) -> Scene:
    return s.but(ref_logps=s.logps)


def others_squared(s: Scene) -> Tensor:
    """beta/2 times the square of the others' mean log-ratio."""
    return B / 2 * c.others_mean(s, c.log_ratio(s)).square()


def advantage_squared(s: Scene) -> Tensor:
    """``-A^2 / (2 beta)``: what the likelihood-ratio term is to REINFORCE."""
    return -c.leave_one_out(s, c.regularised(B)(s)).square() / (2 * B)


def reinforce(advantages: Callable[[Scene], Tensor]) -> Value:
    return row("reinforce", advantage="given").on(c.advantages_are(advantages))


def plain_weight(s: Scene, baseline: str) -> Tensor:
    """``-W/(2 beta)``: A^2 less the others' mean of it, and rescaled to be unbiased where that is asked for."""
    squared = c.leave_one_out(s, c.regularised(B)(s)).square()
    n = c.group_sizes(s)
    factor = (n - 1) ** 2 / (n * (n - 2)) if baseline == "unbiased" else torch.ones_like(n)
    return -factor * c.leave_one_out(s, squared) / (2 * B)


def others_variance(s: Scene) -> Tensor:
    """``n/(n-1) var(R of the others) / (2 beta)``, by a loop."""
    r, scored = c.regularised(B)(s), c.scored(s)
    found = torch.zeros_like(r)
    for i in scored.nonzero().flatten().tolist():
        others = scored & (s.batch.group_ids == s.batch.group_ids[i])
        n = int(others.sum())
        others[i] = False
        found[i] = r[others].var() * n / (n - 1) / (2 * B)
    return found


def token_ratios(s: Scene) -> Tensor:
    return (s.logps - s.ref).detach().where(s.mask & c.scored(s)[:, None], 0.0)


def before(x: Tensor) -> Tensor:
    return x.cumsum(-1) - x


def from_here(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True) - before(x)


def against_position(s: Scene, x: Tensor) -> Tensor:
    """``[B, T]`` less the others' mean at the same position."""
    return torch.stack([c.leave_one_out(s, column) for column in x.unbind(-1)], -1)


def surplus_squared(s: Scene) -> Tensor:
    """``beta/2 (P_t - P_t of the others)^2``, per token."""
    return B / 2 * against_position(s, before(token_ratios(s))).square()


def by_position(s: Scene) -> Tensor:
    """``r - r of the others - beta (F_t - F_t of the others)``, per token."""
    return c.leave_one_out(s)[:, None] - B * against_position(s, from_here(token_ratios(s)))


def by_position_exact(s: Scene) -> Tensor:
    """The same with the exact KL of the tokens after t in place of the log-ratio from t on."""
    return c.leave_one_out(s)[:, None] - B * against_position(s, exact_kl(s)[1])


def exact_kl(s: Scene) -> tuple[Tensor, Tensor]:
    """KL_t of each token and its sum over the tokens after it, constants."""
    exact = s.outputs["token_kl"].detach().where(s.mask & c.scored(s)[:, None], 0.0)
    return exact, from_here(exact) - exact


def others_ratio(s: Scene) -> Tensor:
    """``[B, 1]`` S of the others."""
    return c.others_mean(s, c.log_ratio(s)).where(c.scored(s), 0.0)[:, None]


def expanded(s: Scene, square: Tensor, linear: Tensor) -> Tensor:
    """``-(r~² - 2 beta r~ S~ + beta² (H - 2 S_others G))/(2 beta)``, H and G what multiplies each token's log-prob."""
    reward, ratio = c.leave_one_out(s)[:, None], c.leave_one_out(s, c.log_ratio(s))[:, None]
    term = reward.square() - 2 * B * reward * ratio + B**2 * (square - 2 * others_ratio(s) * linear)
    return -term / (2 * B)


def by_kl_value(s: Scene) -> Tensor:
    """Square h1, linear g3n."""
    ratio, (_, after) = token_ratios(s), exact_kl(s)
    return expanded(s, ratio.sum(-1, keepdim=True).square(), ratio + after)


def by_kl(s: Scene) -> Tensor:
    """Square h3, linear g3."""
    ratio, (_, after) = token_ratios(s), exact_kl(s)
    return expanded(s, from_here(ratio).square() + 2 * before(ratio) * after, after)


def by_moments(s: Scene) -> Tensor:
    """Square h4, linear g3."""
    ratio, (_, after) = token_ratios(s), exact_kl(s)
    moment = s.outputs["token_log_ratio_sq"].detach().where(s.mask & c.scored(s)[:, None], 0.0)
    cross = ratio * after
    later = [from_here(x) - x for x in (moment, cross)]
    return expanded(s, 2 * cross + later[0] + 2 * later[1] + 2 * before(ratio) * after, after)


def through(number: Callable[[Scene], Tensor]) -> Value:
    """What goes through the exact moments: beta times a number per token, by the loss that adds one to a policy gradient."""
    return row("kl_policy_gradient_exact", beta=B).on(flat_rewards, lambda s: s.but(token_kl=number(s)))


def moved_kl(s: Scene) -> Tensor:
    return (before(token_ratios(s)) - others_ratio(s)) * s.outputs["token_kl"]


def moved_moments(s: Scene) -> Tensor:
    return moved_kl(s) - s.outputs["token_kl"] + s.outputs["token_log_ratio_sq"] / 2


def flat_rewards(s: Scene) -> Scene:
    return s.but(rewards=torch.zeros_like(s.rewards).where(~s.rewards.isnan(), torch.nan))
