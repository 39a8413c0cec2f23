"""KL to the reference, estimated token by token; the value and its gradient are named separately.

With ``x = logp_ref - logp`` of a token sampled from the policy::

    k1 = -x                unbiased value, can be negative
    k2 = x^2 / 2           biased value, small variance
    k3 = exp(x) - x - 1    unbiased value, never negative

What gradient descent on each does, when the tokens were sampled from the current policy (both facts are tested by
enumeration):

======================  ==========================================================================================
gradient of             is, in expectation, per token
======================  ==========================================================================================
``k1``                  zero: as a loss it does nothing
``k2``                  the gradient of KL(policy || reference), the usual regulariser
``k3``                  the gradient of the *forward* KL(reference || policy)
``ratio_k3``            the gradient of KL(policy || reference), from k3 weighted by policy / sg[policy]
======================  ==========================================================================================

Per token means: the effect of a token on the KL of *later* tokens is left out by all of them. :func:`rlft.losses.rloo`
and the AGRO losses, which see whole sequences, keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from rlft import _check

KLValue = Literal["k1", "k2", "k3"]
KLGradient = Literal["none", "k1", "k2", "k3", "ratio_k3"]

__all__ = [
    "FixedKL",
    "HalveDoubleKL",
    "KLController",
    "KLGradient",
    "KLValue",
    "ProportionalKL",
    "controller_from_state_dict",
    "exact",
    "k1",
    "k2",
    "k3",
    "penalty",
]


def _difference(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """``logps - ref_logps``, zero where masked; gradient to ``logps`` alone."""
    _check.matrix(logps=logps, ref_logps=ref_logps)
    _check.bool_mask(mask, logps)
    _check.log_probs(mask, logps=logps, ref_logps=ref_logps)
    (ref_logps,) = _check.detach(ref_logps)
    return (_check.upcast(logps) - ref_logps).where(mask, 0.0)


def _k3(log_ratio: Tensor) -> Tensor:
    _check.exponent(
        "ref_logps - logps", -log_ratio, remedy="k3 is not defined that far from the reference: use k1, k2 or exact"
    )
    return (-log_ratio).expm1() + log_ratio


def k1(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The log-ratio ``logps - ref_logps``: unbiased, but its own gradient is zero in expectation.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        ``[B, T]`` nats per token, zero where masked; differentiable in ``logps``.

    Raises:
        ValueError: for wrong shapes or dtypes, or log-probs that are not finite.
    """
    return _difference(logps, ref_logps, mask)


def k2(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Half the squared log-ratio: its gradient is the reverse-KL gradient on tokens from the policy.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        ``[B, T]`` per token, zero where masked; differentiable in ``logps``.

    Raises:
        ValueError: for wrong shapes or dtypes, or log-probs that are not finite.

    References:
        Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * _difference(logps, ref_logps, mask).square()


def k3(logps: Float[Tensor, "B T"], ref_logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``exp(x) - x - 1`` with ``x = ref_logps - logps``: unbiased and never negative; descends the forward KL.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        ``[B, T]`` per token, zero where masked; differentiable in ``logps``.

    Raises:
        ValueError: for wrong shapes or dtypes, log-probs that are not finite, or an ``x`` whose exponential overflows.

    References:
        Schulman 2020, "Approximating KL divergence".
    """
    return _k3(_difference(logps, ref_logps, mask))


def exact(token_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Exact per-token KL, computed where the logits were at hand: checked, masked and passed through.

    Args:
        token_kl: ``[B, T]`` ``sum_a pi(a) log pi(a)/ref(a)`` at each position, differentiable.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        ``[B, T]`` nats per token, zero where masked; differentiable in ``token_kl``.

    Raises:
        ValueError: for wrong shapes or dtypes, or entries that are not finite.
    """
    _check.matrix(token_kl=token_kl)
    _check.bool_mask(mask, token_kl, like_name="token_kl")
    _check.finite(mask, token_kl=token_kl)
    return _check.upcast(token_kl).where(mask, 0.0)


def penalty(
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    value: KLValue,
    gradient: KLGradient,
) -> Float[Tensor, "B T"]:
    """A KL term whose reported number and whose gradient are chosen separately, by name.

    Args:
        logps: ``[B, T]`` log-probs under the policy, nats.
        ref_logps: ``[B, T]`` log-probs under the reference.
        mask: ``[B, T]`` True = a token that counts.
        value: which estimator the number is: k1, k2 or k3.
        gradient: whose gradient it carries: none, k1, k2, k3 or ratio_k3 (see the table of this module).

    Returns:
        ``[B, T]`` per token, zero where masked; differentiable in ``logps`` unless ``gradient`` is "none".

    Raises:
        ValueError: for an unknown name, wrong shapes or dtypes, or an exponential that overflows.
    """
    _check.one_of("value", value, get_args(KLValue))
    _check.one_of("gradient", gradient, get_args(KLGradient))
    log_ratio = _difference(logps, ref_logps, mask)

    def estimator(name: str) -> Tensor:
        if name == "k1":
            return log_ratio
        return 0.5 * log_ratio.square() if name == "k2" else _k3(log_ratio)

    number = estimator(value)
    if gradient == value:
        return number
    number = number.detach()
    if gradient == "none":
        return number
    if gradient == "ratio_k3":
        # d(ratio k3) at ratio = 1 is k3 dlogp + dk3; the first term is what turns forward into reverse.
        k3_value = _k3(log_ratio)
        carrier = k3_value.detach() * log_ratio + k3_value
    else:
        carrier = estimator(gradient)
    return number + (carrier - carrier.detach())


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A weight of the KL that stays.

    Attributes:
        beta: the weight, >= 0.
    """

    beta: float

    def __post_init__(self) -> None:
        _check.number("beta", self.beta, low=0.0)

    def update(self, observed: float, *, samples: int = 1) -> FixedKL:
        """The same controller, whatever KL was observed."""
        return self

    def state_dict(self) -> dict[str, float | str]:
        """Plain numbers and the kind, for a checkpoint."""
        return {"kind": "fixed", **asdict(self)}


@dataclass(frozen=True, slots=True)
class ProportionalKL:
    """``beta <- beta (1 + clip(observed / target - 1, -limit, limit) samples / horizon)``.

    Attributes:
        beta: the weight now, > 0.
        target: the KL aimed at, in the unit of what is observed (nats per answer, or per token), > 0.
        horizon: in samples; the larger, the slower.
        limit: bound on the relative error.

    References:
        Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """

    beta: float
    target: float
    horizon: float = 10_000.0
    limit: float = 0.2

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon", "limit"):
            _check.number(name, getattr(self, name), low=0.0, open_low=True)

    def update(self, observed: float, *, samples: int = 1) -> ProportionalKL:
        """The controller after a step of ``samples`` answers whose mean KL was ``observed``."""
        _check.number("observed", observed)
        _check.number("samples", samples, low=0.0)
        error = min(max(observed / self.target - 1, -self.limit), self.limit)
        factor = 1 + error * samples / self.horizon
        if factor <= 0:
            raise ValueError(
                f"{samples} samples against a horizon of {self.horizon:g} would turn beta negative; raise horizon"
            )
        return replace(self, beta=self.beta * factor)

    def state_dict(self) -> dict[str, float | str]:
        """Plain numbers and the kind, for a checkpoint."""
        return {"kind": "proportional", **asdict(self)}


@dataclass(frozen=True, slots=True)
class HalveDoubleKL:
    """Halve beta when the observed KL is below ``target / 1.5``, double it above ``target * 1.5``.

    Attributes:
        beta: the weight now, > 0.
        target: the KL aimed at, in the unit of what is observed, > 0.

    References:
        Schulman et al. 2017, arXiv 1707.06347, section 4.
    """

    beta: float
    target: float

    def __post_init__(self) -> None:
        for name in ("beta", "target"):
            _check.number(name, getattr(self, name), low=0.0, open_low=True)

    def update(self, observed: float, *, samples: int = 1) -> HalveDoubleKL:
        """The controller after a step whose mean KL was ``observed``."""
        _check.number("observed", observed)
        if observed < self.target / 1.5:
            return replace(self, beta=self.beta / 2)
        return replace(self, beta=self.beta * 2) if observed > self.target * 1.5 else self

    def state_dict(self) -> dict[str, float | str]:
        """Plain numbers and the kind, for a checkpoint."""
        return {"kind": "halve_double", **asdict(self)}


KLController = FixedKL | ProportionalKL | HalveDoubleKL
_CONTROLLERS = {"fixed": FixedKL, "proportional": ProportionalKL, "halve_double": HalveDoubleKL}


def controller_from_state_dict(state: Mapping[str, float | str]) -> KLController:
    """The controller whose ``state_dict()`` this is.

    Args:
        state: what ``state_dict()`` returned, or a configuration: ``kind`` and that controller's fields.

    Returns:
        an equal controller.

    Raises:
        ValueError: for an unknown kind, or missing, unknown or wrong fields.
    """
    numbers = dict(state)
    kind = str(numbers.pop("kind", None))
    _check.one_of("kind", kind, tuple(_CONTROLLERS))
    try:
        return _CONTROLLERS[kind](**numbers)  # type: ignore[arg-type]
    except TypeError as error:
        fields = ", ".join(_CONTROLLERS[kind].__dataclass_fields__)
        raise ValueError(
            f"a {kind} KL controller has the fields {fields}, got {', '.join(map(str, numbers))}"
        ) from error
