"""Preference losses that differ from DPO in the function of the margin."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

ConvexFunction = Literal["logistic", "square", "hinge", "exp"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Distance = Literal["square", "backward_kl", "forward_kl"]

__all__ = ["discopop", "f_dpo", "generalised_po", "reward_aware_rpo"]


@_base.loss_function(reduction="mean")
def generalised_po(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    f: ConvexFunction,
) -> LossOutput:
    """``f(beta h)`` for a convex f: logistic ``log(1 + e^-x)``, square ``(x - 1)^2``, hinge ``max(0, 1 - x)``, exp ``e^-x``.

    The umbrella over DPO (logistic), IPO (square: beta^2 times IPO at beta/2) and SLiC (hinge).

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        f: logistic, square, hinge or exp.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or an exponential that overflows.

    References:
        Tang et al. 2024, arXiv 2402.05749, table 1.
    """
    _check.one_of("f", f, get_args(ConvexFunction))
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = chosen - rejected
    if f == "logistic":
        loss = -logsigmoid(margin)  # softplus is linear from 20 on: 2e-9 off in float64
    elif f == "square":
        loss = (margin - 1).square()
    elif f == "hinge":
        loss = (1 - margin).relu()
    else:
        _check.exponent("minus the margin", -margin, remedy="lower beta, or use f='logistic'")
        loss = (-margin).exp()
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def f_dpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    divergence: Divergence,
    alpha: float = 0.5,
) -> LossOutput:
    """``-logsigmoid(beta (g(x_w) - g(x_l)))``: DPO when the pull to the reference is another f-divergence.

    x is an answer's log-ratio and ``g(x) = f'(e^x)`` up to a constant: reverse_kl ``x`` (DPO), forward_kl ``-e^-x``,
    js ``logsigmoid(x)``, alpha ``(1 - e^(-alpha x)) / alpha`` (reverse KL as alpha -> 0, forward KL at 1).

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        divergence: reverse_kl, forward_kl, js or alpha.
        alpha: of the alpha divergence, in (0, 1]; unused by the others.

    Returns:
        loss ``[P]``, averaged over pairs; ``beta g`` as implicit rewards.

    Raises:
        ValueError: for wrong shapes or dtypes, hyper-parameters out of range, or an exponential that overflows: a
            log-ratio of a whole answer far below zero has no finite forward KL.

    References:
        Wang et al. 2023, arXiv 2309.16240, equation 8 and table 1.
    """
    _check.one_of("divergence", divergence, get_args(Divergence))
    _check.number("alpha", alpha, low=0.0, high=1.0, open_low=True)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    chosen, rejected = (beta * _link(reward / beta, divergence, alpha) for reward in (chosen, rejected))
    high, low = chosen.detach(), rejected.detach()
    metrics.update(
        {
            "rewards/chosen": high,
            "rewards/rejected": low,
            "rewards/margins": high - low,
            "rewards/accuracies": (high > low).to(high.dtype),
        }
    )
    return LossOutput(loss=-logsigmoid(chosen - rejected), metrics=metrics, reduction="mean")


def _link(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return logsigmoid(log_ratio)
    power = 1.0 if divergence == "forward_kl" else alpha
    exponent = -power * log_ratio
    _check.exponent(
        "minus the log-ratio",
        exponent,
        remedy="this divergence is infinite there: use reverse_kl or js, or a smaller alpha",
    )
    return -exponent.exp() if divergence == "forward_kl" else -exponent.expm1() / alpha


@_base.loss_function(reduction="mean")
def discopop(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    *,
    beta: float,
    temperature: float = 0.05,
) -> LossOutput:
    """``(1 - s) log(1 + e^-x) + s e^-x`` with ``x = beta h`` and ``s = sigmoid(x / temperature)``: DiscoPOP.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        beta: strength of the pull to the reference, > 0.
        temperature: of the blend, in (0, 1]; the paper found 0.05.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, or hyper-parameters out of range.

    References:
        Lu et al. 2024, arXiv 2406.08414, the log-ratio modulated loss.
    """
    _check.number("temperature", temperature, low=0.0, high=1.0, open_low=True)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = chosen - rejected
    # s e^-x in one exponential: for x far below zero s vanishes faster than e^-x grows.
    exponential = (logsigmoid(margin / temperature) - margin).exp()
    loss = exponential - (-margin / temperature).sigmoid() * logsigmoid(margin)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def reward_aware_rpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    margins: Float[Tensor, " P"],
    *,
    beta: float,
    eta: float,
    distance: Distance = "backward_kl",
) -> LossOutput:
    """``D(beta h, eta margin)``: the implicit reward margin regressed onto the given one (Nemotron's RPO).

    D is "square" ``(a - b)^2 / 2``, "backward_kl" the KL of Bernoulli(sigmoid b) from Bernoulli(sigmoid a), or
    "forward_kl" the same with a and b exchanged. As the margin grows, backward_kl becomes DPO.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        margins: ``[P]`` reward of the chosen minus reward of the rejected answer.
        beta: strength of the pull to the reference, > 0.
        eta: scale of the given rewards, > 0.
        distance: square, backward_kl or forward_kl.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics.

    Raises:
        ValueError: for wrong shapes or dtypes, margins that are not finite, or hyper-parameters out of range.

    References:
        Adler et al. 2024 (Nemotron-4 340B), arXiv 2406.11704, section 3.3.3; Sun et al. 2025, arXiv 2502.00203.
    """
    _check.number("eta", eta, low=0.0, open_low=True)
    _check.one_of("distance", distance, get_args(Distance))
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    _check.vector(chosen_logps=chosen_logps, margins=margins)
    _check.finite(margins=margins)
    (target,) = _check.detach(margins)
    model, target = chosen - rejected, eta * target
    if distance == "square":
        loss = 0.5 * (model - target).square()
    elif distance == "backward_kl":
        loss = _bernoulli_kl(target, model)
    else:
        loss = _bernoulli_kl(model, target)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid a) || Bernoulli(sigmoid b))."""
    p = a.sigmoid()
    return p * (logsigmoid(a) - logsigmoid(b)) + (-a).sigmoid() * (logsigmoid(-a) - logsigmoid(-b))
