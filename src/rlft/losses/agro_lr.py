"""AGRO on-policy: the likelihood-ratio term with less noise, token by token.

All of these are :func:`rlft.losses.agro_off_policy` plus ``lr_coef`` times an unbiased estimate of the likelihood-ratio term
of the on-policy loss, divided by 2 beta as in :func:`rlft.losses.agro_on_policy`. What is taken out of ``A^2 grad l`` has
expectation zero on fresh samples alone, so none of them is right on any other. The warning of ``agro_on_policy`` holds for
all: where A exceeds 2 beta the term lowers the probability of good answers.

Notation: s_t the token's log-ratio, S their sum, P_t the sum before t, F_t the sum from t on, KL_t the exact KL of position t,
K_t its sum after t, M_t the exact mean square of the log-ratio, r~ and S~ against the mean of the others.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check
from rlft.losses import _base
from rlft.losses.agro import LRBaseline, Regularised, from_here_on, likelihood_ratio_weights, regularised
from rlft.types import LossOutput

Square = Literal["h1", "h2"]
Linear = Literal["g1", "g2"]
SquareKL = Literal["h1", "h2", "h3"]
LinearKL = Literal["g1", "g2", "g3", "g3n"]

__all__ = [
    "agro_on_policy_lr_causal",
    "agro_on_policy_lr_kl",
    "agro_on_policy_lr_moments",
    "agro_on_policy_lr_token",
]


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_lr_causal(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    lr_coef: float = 1.0,
) -> LossOutput:
    """The term with what happened before a token taken out: ``sg[A^2 - beta^2 (P_t - P_t of the others)^2] grad logp_t``.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each.
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.
        lr_coef: weight of the likelihood-ratio term, >= 0; 1 is the on-policy gradient.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, a group of one row, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, equation 6, with causal terms removed.
    """
    _coefficients(beta, lr_coef)
    r = regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by="agro_on_policy_lr_causal")
    past = _before(r.log_ratio)
    surplus = past - r.groups.others_mean(past)
    weights = r.advantages.square().unsqueeze(-1) - beta**2 * surplus.square()
    return _with_pathwise(r, weights * r.logps, beta, lr_coef)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_lr_token(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    lr_coef: float = 1.0,
    square: Square = "h2",
    linear: Linear = "g2",
    lr_baseline: Literal["none", "unbiased"] = "none",
) -> LossOutput:
    """The term expanded, ``[r~^2 - 2 beta r~ S~ - c] grad l + beta^2 (H - 2 (S of the others) G)``, from log-ratios alone.

    H estimates ``E[S^2 grad l]``: h1 ``S^2 grad l``, h2 ``(S^2 - P_t^2) grad logp_t``. G estimates ``E[S grad l]``: g1
    ``S grad l``, g2 ``F_t grad logp_t``. Under "unbiased" c is n/(n-1) times the variance of the others' R (n >= 3).

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each, three for "unbiased".
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.
        lr_coef: weight of the likelihood-ratio term, >= 0; 1 is the on-policy gradient.
        square: h1 or h2.
        linear: g1 or g2.
        lr_baseline: none or unbiased.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`.

    Raises:
        ValueError: for wrong shapes or dtypes, groups that are too small, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, section 6 and appendix B.3.
    """
    _coefficients(beta, lr_coef)
    _check.one_of("square", square, get_args(Square))
    _check.one_of("linear", linear, get_args(Linear))
    r = _regularised(logps, ref_logps, rewards, group_ids, mask, beta, lr_baseline, wanted_by="agro_on_policy_lr_token")
    h, g = _square(r, square), _linear(r, linear)
    return _with_pathwise(r, _expanded(r, h, g, beta, lr_baseline), beta, lr_coef)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_lr_kl(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    token_kl: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    lr_coef: float = 1.0,
    square: SquareKL = "h3",
    linear: LinearKL = "g3",
    lr_baseline: Literal["none", "unbiased"] = "none",
) -> LossOutput:
    """:func:`agro_on_policy_lr_token` with exact KLs: h3 ``F_t^2 grad logp_t + 2 P_t (grad KL_t + K_t grad logp_t)``.

    g3 is ``grad KL_t + K_t grad logp_t``, g3n ``(s_t + K_t) grad logp_t``, which needs the KL's value alone.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        token_kl: ``[B, T]`` exact KL(policy || reference) of each position, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each, three for "unbiased".
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.
        lr_coef: weight of the likelihood-ratio term, >= 0; 1 is the on-policy gradient.
        square: h1, h2 or h3.
        linear: g1, g2, g3 or g3n; one of h3, g3, g3n at least, or the KL does nothing.
        lr_baseline: none or unbiased.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`, with ``kl`` the exact KL.

    Raises:
        ValueError: for wrong shapes or dtypes, groups that are too small, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, section 6 and appendix B.3.
    """
    _coefficients(beta, lr_coef)
    _check.one_of("square", square, get_args(SquareKL))
    _check.one_of("linear", linear, get_args(LinearKL))
    if square != "h3" and not linear.startswith("g3"):
        raise ValueError(
            f"square={square!r} with linear={linear!r} does not use token_kl; call agro_on_policy_lr_token instead"
        )
    r = _regularised(logps, ref_logps, rewards, group_ids, mask, beta, lr_baseline, wanted_by="agro_on_policy_lr_kl")
    kl, after = _exact_kl(r, logps, token_kl)
    step = kl + after * r.logps  # the surrogate of g3
    if square == "h3":
        h = from_here_on(r.log_ratio).square() * r.logps + 2 * _before(r.log_ratio) * step
    else:
        h = _square(r, square)
    if linear == "g3":
        g = step
    elif linear == "g3n":
        g = (r.log_ratio + after) * r.logps
    else:
        g = _linear(r, linear)
    return _with_pathwise(r, _expanded(r, h, g, beta, lr_baseline), beta, lr_coef)


@_base.loss_function(reduction="sequence_sum", min_group=2, on_policy_only=True)
def agro_on_policy_lr_moments(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    token_kl: Float[Tensor, "B T"],
    token_log_ratio_sq: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
    lr_coef: float = 1.0,
    lr_baseline: Literal["none", "unbiased"] = "none",
) -> LossOutput:
    """:func:`agro_on_policy_lr_kl` with every next-token expectation taken exactly: h4 and g3.

    h4 is ``[2 s_t K_t + sum after t of M + 2 sum after t of s K] grad logp_t + grad(M_t - 2 KL_t) + 2 P_t (grad KL_t + K_t
    grad logp_t)``.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        token_kl: ``[B, T]`` exact KL(policy || reference) of each position, differentiable.
        token_log_ratio_sq: ``[B, T]`` ``sum_a pi(a) log(pi(a)/ref(a))^2`` of each position, differentiable.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        group_ids: ``[B]`` which prompt a row answers; at least two rows each, three for "unbiased".
        mask: ``[B, T]`` True = a token that counts; a row without any takes no part.
        beta: strength of the pull to the reference, > 0.
        lr_coef: weight of the likelihood-ratio term, >= 0; 1 is the on-policy gradient.
        lr_baseline: none or unbiased.

    Returns:
        loss ``[B, T]``, summed over tokens and averaged over sequences; metrics as
        :func:`rlft.losses.agro_off_policy`, with ``kl`` the exact KL.

    Raises:
        ValueError: for wrong shapes or dtypes, groups that are too small, or hyper-parameters out of range.

    References:
        Tang et al. 2025, arXiv 2503.19612, appendix B.3, every one-step expectation taken.
    """
    _coefficients(beta, lr_coef)
    r = _regularised(
        logps, ref_logps, rewards, group_ids, mask, beta, lr_baseline, wanted_by="agro_on_policy_lr_moments"
    )
    kl, after = _exact_kl(r, logps, token_kl)
    (moment,) = _base.token_values(r.mask, learned=1, like=logps, token_log_ratio_sq=token_log_ratio_sq)
    constant, cross = moment.detach(), r.log_ratio * after
    step = kl + after * r.logps
    weight = 2 * cross + (from_here_on(constant) - constant) + 2 * (from_here_on(cross) - cross)
    h = weight * r.logps + moment - 2 * kl + 2 * _before(r.log_ratio) * step
    return _with_pathwise(r, _expanded(r, h, step, beta, lr_baseline), beta, lr_coef)


def _coefficients(beta: float, lr_coef: float) -> None:
    _check.number("lr_coef", lr_coef, low=0.0)
    _check.number("beta", beta, low=0.0, open_low=True)


def _regularised(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    beta: float,
    lr_baseline: LRBaseline,
    *,
    wanted_by: str,
) -> Regularised:
    _check.one_of("lr_baseline", lr_baseline, ("none", "unbiased"))
    wanted_by = f"{wanted_by} with lr_baseline={lr_baseline!r}"
    min_group = 3 if lr_baseline == "unbiased" else 2
    return regularised(logps, ref_logps, rewards, group_ids, mask, beta, wanted_by=wanted_by, min_group=min_group)


def _before(x: Tensor) -> Tensor:
    """Sum over the tokens before each one."""
    return x.cumsum(-1) - x


def _exact_kl(r: Regularised, logps: Tensor, token_kl: Tensor) -> tuple[Tensor, Tensor]:
    """KL_t, differentiable, and its constant sum over the tokens after t; the metrics show it."""
    (kl,) = _base.token_values(r.mask, learned=1, like=logps, token_kl=token_kl)
    constant = kl.detach()
    r.metrics.update({"kl": constant, "objective/kl": constant.sum(-1)})
    return kl, from_here_on(constant) - constant


def _square(r: Regularised, name: Square | SquareKL) -> Tensor:
    total = r.log_ratio.sum(-1, keepdim=True)
    taken = 0.0 if name == "h1" else _before(r.log_ratio).square()
    return (total.square() - taken) * r.logps


def _linear(r: Regularised, name: Linear | LinearKL) -> Tensor:
    return (r.log_ratio.sum(-1, keepdim=True) if name == "g1" else from_here_on(r.log_ratio)) * r.logps


def _expanded(r: Regularised, h: Tensor, g: Tensor, beta: float, lr_baseline: LRBaseline) -> Tensor:
    total = r.log_ratio.sum(-1)
    reward, ratio = r.groups.against_others(r.rewards), r.groups.against_others(total)
    weights = reward.square() - 2 * beta * reward * ratio
    if lr_baseline == "unbiased":  # n/(n-1) times the variance of the others' R is A^2 minus the unbiased weight
        unbiased = likelihood_ratio_weights(r.advantages, r.groups, "unbiased")
        weights = weights - (r.advantages.square() - unbiased).where(r.groups.count >= 3, 0.0)
    others = r.groups.others_mean(total).unsqueeze(-1)
    return weights.unsqueeze(-1) * r.logps + beta**2 * (h - 2 * others * g)


def _with_pathwise(r: Regularised, term: Tensor, beta: float, lr_coef: float) -> LossOutput:
    term = term.where((r.groups.count > 1).unsqueeze(-1), 0.0)
    return r.output(lr_coef / (2 * beta) * term - r.advantages.unsqueeze(-1) * r.logps)
