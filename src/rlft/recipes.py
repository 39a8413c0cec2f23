"""Named algorithms: each one line or two that picks from the four axes.

A recipe is a function of its hyper-parameters that returns an :class:`~rlft.objective.Objective`; every loss of
:mod:`rlft.losses` without a recipe of its own is reachable by its name. :func:`build` is what the configuration calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rlft import _check, losses
from rlft.objective import Objective, entropy_bonus
from rlft.trust_region import TrustRegion

__all__ = ["RECIPES", "build", "names", "parameters", "recipe"]

RECIPES: dict[str, Callable[..., Objective]] = {}


def recipe(function: Callable[..., Objective]) -> Callable[..., Objective]:
    """Register a named algorithm under the function's own name."""
    RECIPES[function.__name__] = function
    return function


@recipe
def reinforce(*, advantage: str = "leave_one_out", kl: str | None = None, **hyper: Any) -> Objective:
    """REINFORCE with a baseline: ``-A log pi``. KL to the reference in the reward, in the loss, or none."""
    return Objective(losses.reinforce, advantage=advantage, kl=kl, **hyper)


@recipe
def reinforce_plus_plus(*, beta: float = 0.01, clip_eps: float = 0.2, kl_value: str = "k1", **hyper: Any) -> Objective:
    """REINFORCE++: clipped ratio, reward and KL from each token on, normalised over all tokens of the step (Hu et al. 2025)."""
    hyper = {"advantage": "reward_to_go", "baseline": "none", "whiten": True, **hyper}
    return Objective(losses.ppo_clip, kl="reward", kl_value=kl_value, beta=beta, clip_eps=clip_eps, **hyper)


@recipe
def reinforce_plus_plus_baseline(*, beta: float = 0.01, clip_eps: float = 0.2, **hyper: Any) -> Objective:
    """REINFORCE++-baseline: reward minus the group's mean, normalised over the step; k2 in the loss (Hu et al. 2025)."""
    hyper = {"advantage": "group_mean_batch_norm", "kl": "loss", "kl_value": "k2", **hyper}
    return Objective(losses.ppo_clip, beta=beta, clip_eps=clip_eps, **hyper)


@recipe
def grpo(*, beta: float = 0.04, clip_eps: float = 0.2, advantage: str = "group_norm", **hyper: Any) -> Objective:
    """GRPO: group mean and standard deviation, clipped ratio, k3 in the loss, mean per sequence (DeepSeekMath)."""
    return Objective(losses.grpo, advantage=advantage, beta=beta, clip_eps=clip_eps, **hyper)


@recipe
def dr_grpo(*, length: int, clip_eps: float = 0.2, beta: float = 0.0, **hyper: Any) -> Objective:
    """Dr. GRPO: group mean without the standard deviation, sum over tokens / constant length."""
    hyper = {"advantage": "group_mean", "averaging": "fixed_length", **hyper}
    return Objective(losses.grpo, beta=beta, clip_eps=clip_eps, length=length, **hyper)


@recipe
def dapo(*, clip_eps: float = 0.2, clip_eps_high: float = 0.28, beta: float = 0.0, **hyper: Any) -> Objective:
    """DAPO's loss: clip higher, no KL, mean over all tokens of the step (Yu et al. 2025)."""
    hyper = {"advantage": "group_norm", "averaging": "token_mean", **hyper}
    return Objective(losses.grpo, beta=beta, clip_eps=clip_eps, clip_eps_high=clip_eps_high, **hyper)


@recipe
def grpo_plus(*, clip_eps: float = 0.2, clip_eps_high: float = 0.28, **hyper: Any) -> Objective:
    """GRPO+: clip higher, no KL, no entropy bonus; use with ``mask_truncated_completions`` (DeepCoder)."""
    hyper = {"advantage": "group_norm", **hyper}
    return Objective(losses.grpo, beta=0.0, clip_eps=clip_eps, clip_eps_high=clip_eps_high, **hyper)


@recipe
def ppo(
    *,
    beta: float = 0.02,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_coef: float = 0.1,
    value_clip_eps: float | None = 0.2,
    entropy_coef: float = 0.0,
    **hyper: Any,
) -> Objective:
    """PPO with a critic: GAE, k1 in the reward, clipped policy and value losses, optional entropy bonus."""
    policy = Objective(
        losses.ppo_clip,
        advantage="gae",
        kl="reward" if beta > 0 else None,
        kl_value="k1" if beta > 0 else None,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
        gamma=gamma,
        lam=lam,
        **({"beta": beta} if beta > 0 else {}),
        **hyper,
    )
    total = policy + value_coef * Objective(losses.value_loss, clip_eps=value_clip_eps)
    if entropy_coef:
        total = total + entropy_coef * Objective(entropy_bonus)
    return total


@recipe
def trpo(
    *,
    max_kl: float = 0.001,
    cg_iters: int = 10,
    cg_damping: float = 0.1,
    cg_tolerance: float = 1e-4,
    backtrack: float = 0.8,
    max_backtracks: int = 10,
    advantage: str = "leave_one_out",
    **hyper: Any,
) -> Objective:
    """TRPO: ``max E[rho A]`` with ``mean KL(old || new) <= max_kl``: natural gradient by conjugate gradient, line search.

    With ``advantage="gae"`` a critic, a model of its own, learns by AdamW beside it.
    """
    region = TrustRegion(max_kl, cg_iters, cg_damping, cg_tolerance, backtrack, max_backtracks)
    if advantage != "gae":
        return Objective(losses.trpo, advantage=advantage, trust_region=region, **hyper)
    policy = Objective(losses.trpo, advantage="gae", trust_region=region, **{"gamma": 1.0, "lam": 0.95, **hyper})
    return policy + Objective(losses.value_loss)


@recipe
def dro(*, beta: float, value_coef: float = 1.0) -> Objective:
    """DRO: 1/2 (r - V(x) - beta log-ratio)^2 with a learned V(x); AGRO for one answer per prompt."""
    _check.number("value_coef", value_coef, low=0.0)
    return value_coef * Objective(losses.dro, beta=beta, rename={"values": "start_values"})


def names() -> list[str]:
    """Every objective reachable by name."""
    return sorted({*RECIPES, *losses.__all__})


def parameters(name: str) -> list[str]:
    """The hyper-parameters that an objective of that name takes; none for an unknown name."""
    function = RECIPES.get(name) or getattr(losses, name if name in losses.__all__ else "", None)
    found = inspect.signature(inspect.unwrap(function)).parameters.values() if function else ()
    return [p.name for p in found if p.kind is p.KEYWORD_ONLY]


def build(name: str, **hyper: Any) -> Objective:
    """The objective of that name.

    Args:
        name: a recipe or a loss, see :func:`names`.
        **hyper: its hyper-parameters, and the axes ``advantage``, ``kl``, ``kl_value``, ``kl_gradient``, ``averaging``,
            ``length`` where they apply.

    Raises:
        ValueError: for an unknown name (with the list), a missing or an unused hyper-parameter.
    """
    if name in RECIPES:
        function = RECIPES[name]
        parameters = inspect.signature(function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            known = [p.name for p in parameters]
            for word in hyper:
                if word not in known:
                    raise ValueError(
                        f"objective {name!r} does not use {word}={hyper[word]!r}{_check.suggestion(word, known)}"
                    )
        missing = [
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in hyper
        ]
        if missing:
            raise ValueError(f"objective {name!r} needs {', '.join(missing)}; give a number for each")
        return function(**hyper).renamed(name)
    if name in losses.__all__:
        return Objective(getattr(losses, name), name=name, **hyper)
    hint = _check.suggestion(name, names())
    every = "" if "known:" in hint else f" Known: {', '.join(names())}"
    raise ValueError(f"objective {name!r} is unknown{hint}{every}")
