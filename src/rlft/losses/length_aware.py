"""Preference losses that use the answers' lengths: averages per token, or a likelihood term."""

from __future__ import annotations

import math

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlft import _check
from rlft.losses import _base
from rlft.types import LossOutput

__all__ = ["cpo", "orpo", "rpo", "simpo", "wpo"]


@_base.loss_function(reduction="mean")
def simpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    rejected_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """``-logsigmoid(beta l_w / T_w - beta l_l / T_l - gamma)``: mean log-probs with a margin, no reference.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        rejected_lengths: ``[P]`` tokens of the rejected answer, at least 1.
        beta: scale of the mean log-probs, > 0; 2 to 2.5 in the paper.
        gamma: the margin asked for, >= 0; 0.5 to 1.5 in the paper.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; beta times the mean log-probs as implicit rewards.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, or hyper-parameters out of range.

    References:
        Meng et al. 2024, arXiv 2405.14734, equation 6.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("gamma", gamma, low=0.0)
    _base.smoothing(label_smoothing)
    chosen, rejected = _base.pair_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    mean_chosen, mean_rejected = _per_token(chosen, rejected, chosen_lengths, rejected_lengths)
    margin = beta * (mean_chosen - mean_rejected) - gamma
    return LossOutput(
        loss=_base.smoothed_logistic(margin, label_smoothing),
        metrics=_metrics(beta, chosen, rejected, mean_chosen, mean_rejected),
        reduction="mean",
    )


@_base.loss_function(reduction="mean")
def orpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    rejected_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
    eps: float = 1e-7,
) -> LossOutput:
    """``-m_w - beta logsigmoid(log odds_w - log odds_l)``, m mean log-probs, ``log odds = m - log(1 - e^m)``.

    The first term is the negative log-likelihood per token of the chosen answer. No reference. The odds of an answer of
    probability one are infinite, and rounding makes such answers: ``eps`` replaces e^m by (1 - eps) e^m in the odds.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        rejected_lengths: ``[P]`` tokens of the rejected answer, at least 1.
        beta: weight of the odds-ratio term (the paper's lambda), > 0.
        eps: in [0, 0.5]; bounds the log odds by -log eps and their slope by 1/eps. 0 is the paper's formula.

    Returns:
        loss ``[P]``, averaged over pairs; beta times the mean log-probs as implicit rewards, nll_loss, log_odds_ratio
        and log_odds_chosen.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, hyper-parameters out of range, or at ``eps`` 0 an
            answer of probability one.

    References:
        Hong et al. 2024, arXiv 2403.07691, equations 5 to 7.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("eps", eps, low=0.0, high=0.5)
    chosen, rejected = _base.pair_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    mean_chosen, mean_rejected = _per_token(chosen, rejected, chosen_lengths, rejected_lengths)
    log_odds = _log_odds("chosen_logps", mean_chosen, eps) - _log_odds("rejected_logps", mean_rejected, eps)
    odds_ratio = logsigmoid(log_odds)
    metrics = _metrics(beta, chosen, rejected, mean_chosen, mean_rejected)
    metrics["nll_loss"] = -mean_chosen.detach()
    metrics["log_odds_ratio"] = odds_ratio.detach()
    metrics["log_odds_chosen"] = log_odds.detach()
    return LossOutput(loss=-mean_chosen - beta * odds_ratio, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def cpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    rejected_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """``-logsigmoid(beta (l_w - l_l)) - nll_weight l_w / T_w``: sums in the preference term, likelihood per token.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        rejected_lengths: ``[P]`` tokens of the rejected answer, at least 1; used by a metric alone.
        beta: scale of the margin, > 0.
        nll_weight: weight of the likelihood term, >= 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs; beta times the log-probs as implicit rewards, and nll_loss.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, or hyper-parameters out of range.

    References:
        Xu et al. 2024, arXiv 2401.08417, equation 5.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("nll_weight", nll_weight, low=0.0)
    _base.smoothing(label_smoothing)
    chosen, rejected = _base.pair_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    mean_chosen, mean_rejected = _per_token(chosen, rejected, chosen_lengths, rejected_lengths)
    metrics = {
        **_metrics(beta, chosen, rejected, mean_chosen, mean_rejected),
        **_base.pair_metrics(beta, chosen, rejected),
        "nll_loss": -mean_chosen.detach(),
    }
    loss = _base.smoothed_logistic(beta * (chosen - rejected), label_smoothing) - nll_weight * mean_chosen
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def rpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
    alpha: float,
) -> LossOutput:
    """``-logsigmoid(beta h) - alpha l_w / T_w``: DPO plus the likelihood per token of the chosen answer.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        beta: strength of the pull to the reference, > 0.
        alpha: weight of the likelihood term, >= 0; 1 in the paper.

    Returns:
        loss ``[P]``, averaged over pairs; implicit rewards as metrics, and nll_loss.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, or hyper-parameters out of range.

    References:
        Pang et al. 2024, arXiv 2404.19733, equation 1; Liu et al. 2024, arXiv 2405.16436.
    """
    _check.number("beta", beta, low=0.0, open_low=True)
    _check.number("alpha", alpha, low=0.0)
    chosen, rejected, ref_chosen, ref_rejected = _base.pair_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    (length,) = _base.lengths(chosen, chosen_lengths=chosen_lengths)
    nll = -chosen / length
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    metrics = {**_base.pair_metrics(beta, chosen, rejected, ref_chosen, ref_rejected), "nll_loss": nll.detach()}
    return LossOutput(loss=-logsigmoid(margin) + alpha * nll, metrics=metrics, reduction="mean")


@_base.loss_function(reduction="mean")
def wpo(
    chosen_logps: Float[Tensor, " P"],
    rejected_logps: Float[Tensor, " P"],
    ref_chosen_logps: Float[Tensor, " P"],
    ref_rejected_logps: Float[Tensor, " P"],
    chosen_lengths: Shaped[Tensor, " P"],
    rejected_lengths: Shaped[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """``sg[e^(l_w / T_w) e^(l_l / T_l)]`` times DPO: pairs that the policy could have sampled weigh more.

    The weights are geometric mean probabilities per token, without the paper's optional alignment of their scale.

    Args:
        chosen_logps: ``[P]`` log-prob of the chosen answer, summed over its tokens.
        rejected_logps: ``[P]`` the same of the rejected answer.
        ref_chosen_logps: ``[P]`` under the reference.
        ref_rejected_logps: ``[P]`` under the reference.
        chosen_lengths: ``[P]`` tokens of the chosen answer, at least 1.
        rejected_lengths: ``[P]`` tokens of the rejected answer, at least 1.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        loss ``[P]``, averaged over pairs (not over weights); implicit rewards as metrics, and the weights.

    Raises:
        ValueError: for wrong shapes or dtypes, a length below 1, or hyper-parameters out of range.

    References:
        Zhou et al. 2024, arXiv 2406.11827, equation 4.
    """
    _base.smoothing(label_smoothing)
    chosen, rejected, metrics = _base.implicit_rewards(
        beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    constants = _base.detached(chosen_logps), _base.detached(rejected_logps)
    mean_chosen, mean_rejected = _per_token(*constants, chosen_lengths, rejected_lengths)
    weights = (mean_chosen + mean_rejected).exp()
    metrics["weights"] = weights
    loss = weights * _base.smoothed_logistic(chosen - rejected, label_smoothing)
    return LossOutput(loss=loss, metrics=metrics, reduction="mean")


def _log_odds(name: str, mean: Tensor, eps: float) -> Tensor:
    shrunk = mean.clamp(max=0.0) + math.log1p(-eps)  # rounding can leave a mean log-prob slightly above zero
    if eps == 0 and bool((shrunk >= 0).any()):
        where = int((shrunk.detach() >= 0).nonzero()[0])
        raise ValueError(
            f"{name} is {mean[where].item():.3g} at [{where}]: the odds of an answer of probability one overflow "
            f"{mean.dtype}; set eps to 1e-7, or drop that pair"
        )
    return shrunk - _base.log1mexp(shrunk)


def _per_token(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    n_chosen, n_rejected = _base.lengths(chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return chosen / n_chosen, rejected / n_rejected


def _metrics(
    beta: float, chosen: Tensor, rejected: Tensor, mean_chosen: Tensor, mean_rejected: Tensor
) -> dict[str, Tensor]:
    """Implicit rewards from mean log-probs; log-probs in sums, and per token beside them."""
    return {
        **_base.pair_metrics(beta, mean_chosen, mean_rejected),
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
        "logps/chosen_per_token": mean_chosen.detach(),
        "logps/rejected_per_token": mean_rejected.detach(),
    }
