"""Which objectives are measured, with what settings, and where theory says they come to rest at the optimum.

``reaches`` has a letter for each way to sample, in the bandit and then with answers of several tokens: ``y`` where descent
from the reference ends at the target, ``-`` where it does not. The measurement must agree with it, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlft import recipes
from rlft.objective import Objective

__all__ = ["ROWS", "Row", "Target"]

Target = Literal["optimum", "preference", "nash", "per_token"]


@dataclass(frozen=True, eq=False)
class Row:
    """One objective with the settings it is measured under.

    Attributes:
        objective: what :func:`rlft.recipes.build` knows it by.
        hyper: its settings, all but beta.
        n: answers per group.
        pairs: groups are (chosen, rejected), labelled by Bradley and Terry from the rewards.
        target: what it is meant to find.
        mixture: share of the reference in the rival of the preference games, a geometric mixture with the policy.
        reaches: see the module.
        kinked: with fixed samples the field jumps where a ratio is clipped, and is followed by plain small steps.
    """

    objective: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    n: int = 2
    pairs: bool = False
    target: Target = "optimum"
    mixture: float = 0.0
    reaches: str = "yyy yyy"
    kinked: bool = False

    @property
    def name(self) -> str:
        """Objective and settings, as one would write them in YAML."""
        settings = {**self.hyper, **({"mixture": self.mixture} if self.mixture else {})}
        return self.objective + (" (" + ", ".join(f"{k}: {v}" for k, v in settings.items()) + ")" if settings else "")

    def build(self, beta: float) -> Objective:
        """The objective, as a run would make it."""
        return recipes.build(self.objective, beta=beta, **self.hyper)


_R = Row
_FRESH, _ONE_TOKEN, _NEVER = "y-- y--", "y-- ---", "--- ---"
_IN_LOSS = {"advantage": "leave_one_out", "kl": "loss"}
_IN_REWARD = {"advantage": "leave_one_out", "kl": "reward"}
_CLIP = {**_IN_REWARD, "kl_value": "k1"}
_BY_GRADIENT = {"k1": _NEVER, "k2": _ONE_TOKEN, "k3": _NEVER, "ratio_k3": _ONE_TOKEN}
ROWS: dict[str, tuple[Row, ...]] = {
    "AGRO, for any samples": (
        _R("agro_off_policy"),
        _R("agro_off_policy_cv"),
        _R("agro_off_policy_rb"),
        _R("agro_off_policy_rb2"),
        _R("agro_off_policy_weighted"),
        _R("agro_off_policy_per_token", target="per_token"),
        _R("rloo"),
        _R("dro", n=1),
    ),
    "AGRO, for fresh samples": (
        _R("agro_on_policy", {"lr_coef": 0.0}),
        _R("agro_on_policy", {"lr_coef": 1.0}, reaches="yyy y--"),
        _R("agro_on_policy", {"lr_coef": 1.0, "lr_baseline": "leave_one_out"}, n=3),
        _R("agro_on_policy", {"lr_coef": 1.0, "lr_baseline": "unbiased"}, n=3, reaches="yyy yy-"),
        _R("agro_on_policy_causal", {"baseline": "none"}, reaches=_FRESH),
        *(_R("agro_on_policy_causal", {"baseline": b}, reaches="yyy y--") for b in ("sequence", "position")),
        *(_R("agro_on_policy_exact_kl", {"baseline": b}, reaches=_FRESH) for b in ("none", "sequence", "position")),
        _R("agro_on_policy_lr_causal", reaches="yyy y--"),
        _R("agro_on_policy_lr_token", {"square": "h1", "linear": "g1"}, reaches=_FRESH),
        _R("agro_on_policy_lr_token", {"square": "h2", "linear": "g2"}, reaches=_FRESH),
        _R("agro_on_policy_lr_kl", {"square": "h3", "linear": "g3"}, reaches=_FRESH),
        _R("agro_on_policy_lr_moments", reaches=_FRESH),
    ),
    "Policy gradient, KL in the loss": (
        _R("kl_policy_gradient_exact", reaches=_ONE_TOKEN),
        *(_R("kl_policy_gradient", {"kl_gradient": g}, reaches=r) for g, r in _BY_GRADIENT.items()),
        *(_R("reinforce", {**_IN_LOSS, "kl_value": v}, reaches=_BY_GRADIENT[v]) for v in ("k1", "k2", "k3")),
        _R("reinforce", {**_IN_LOSS, "kl_value": "k3", "kl_gradient": "ratio_k3"}, reaches=_ONE_TOKEN),
        _R("reinforce", {**_IN_LOSS, "kl_value": "exact"}, reaches=_ONE_TOKEN),
        _R("grpo", {"advantage": "group_norm"}, n=3, reaches=_NEVER, kinked=True),
        _R("grpo", {"advantage": "group_mean"}, reaches=_NEVER, kinked=True),
        _R("grpo", {"advantage": "group_mean", "kl_gradient": "ratio_k3"}, reaches=_NEVER, kinked=True),
        _R("grpo", {"advantage": "leave_one_out", "kl_gradient": "ratio_k3"}, reaches=_ONE_TOKEN, kinked=True),
        _R("dr_grpo", {"length": 3}, reaches=_NEVER, kinked=True),
    ),
    "Policy gradient, KL in the reward": (
        _R("reinforce", {**_IN_REWARD, "kl_value": "k1"}, reaches=_FRESH),
        *(_R("reinforce", {**_IN_REWARD, "kl_value": v}, reaches=_NEVER) for v in ("k2", "k3")),
        _R("ppo_clip", {**_CLIP, "clip_eps": 0.2}, reaches=_FRESH, kinked=True),
        _R("gspo", {**_CLIP, "clip_eps": 0.2}, reaches=_FRESH, kinked=True),
        _R("cispo", {**_CLIP, "clip_eps_high": 0.2}, reaches=_FRESH, kinked=True),
    ),
    "Preferences": (
        _R("dpo", pairs=True),
        _R("ipo", pairs=True, target="preference"),
        _R("ipo_md", target="preference"),
        _R("nash_md_pg", n=1, target="nash", reaches=_FRESH),
        _R("nash_md_pg", n=1, target="nash", mixture=0.125, reaches=_NEVER),
    ),
}
