"""Which objectives are measured, with what settings, and where theory says they come to rest.

``reaches`` has a letter for each way to sample, in the bandit and then with answers of several tokens: ``y`` where descent
from the reference ends at the target, ``d`` to ``i`` where it ends at another policy that is known (see
:meth:`benchmarks.worlds.problem.Problem.landing`), ``-`` where it ends at neither. The measurement must agree with it, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlft import recipes
from rlft.objective import Objective

__all__ = ["ROWS", "WITHOUT", "Row", "Target"]

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
        one_value: the critic has one number for all prefixes; otherwise one for each.
        reaches: see the module.
        within: how near it must come to count as there, as a share of the start's KL; more for steps of fixed length.
        pull: what multiplies beta in the policy that a letter of ``reaches`` names.
        clip: with fixed samples the field jumps where a ratio is clipped: that of a ``token``, or an answer's ``sum`` or ``mean``.
    """

    objective: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    n: int = 2
    pairs: bool = False
    target: Target = "optimum"
    mixture: float = 0.0
    one_value: bool = False
    reaches: str = "yyy yyy"
    within: float = 1e-8
    pull: float = 1.0
    clip: Literal["", "token", "sum", "mean"] = ""

    @property
    def name(self) -> str:
        """Objective and settings, as one would write them in YAML."""
        more = {"mixture": self.mixture} if self.mixture else {"critic": "one number"} if self.one_value else {}
        settings = {**self.hyper, **more}
        return self.objective + (" (" + ", ".join(f"{k}: {v}" for k, v in settings.items()) + ")" if settings else "")

    def build(self, beta: float) -> Objective:
        """The objective, as a run would make it."""
        return recipes.build(self.objective, beta=beta, **self.hyper)


_R = Row
_FRESH, _NEVER = "y-- y--", "--- ---"
_OWN_KL = "y-- d--"  # each token is charged its own KL: in a bandit, that is all there is
_IN_LOSS = {"advantage": "leave_one_out", "kl": "loss"}
_IN_REWARD = {"advantage": "leave_one_out", "kl": "reward"}
_K1 = {**_IN_REWARD, "kl_value": "k1"}
_TO_GO = {**_K1, "advantage": "reward_to_go"}
_BY_GRADIENT = {"k1": _NEVER, "k2": _OWN_KL, "k3": "e-- e--", "ratio_k3": _OWN_KL}
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
        _R("kl_policy_gradient_exact", reaches=_OWN_KL),
        *(_R("kl_policy_gradient", {"kl_gradient": g}, reaches=r) for g, r in _BY_GRADIENT.items()),
        *(_R("reinforce", {**_IN_LOSS, "kl_value": v}, reaches=_BY_GRADIENT[v]) for v in ("k1", "k2", "k3")),
        _R("reinforce", {**_IN_LOSS, "kl_value": "k3", "kl_gradient": "ratio_k3"}, reaches=_OWN_KL),
        _R("reinforce", {**_IN_LOSS, "kl_value": "exact"}, reaches=_OWN_KL),
        _R("grpo", {"advantage": "group_norm"}, n=3, reaches=_NEVER, clip="token"),
        _R("grpo", {"advantage": "group_mean"}, reaches="e-- ---", pull=2, clip="token"),
        _R("grpo", {"advantage": "group_mean", "kl_gradient": "ratio_k3"}, reaches="d-- ---", pull=2, clip="token"),
        _R("grpo", {"advantage": "leave_one_out", "kl_gradient": "ratio_k3"}, reaches="y-- ---", clip="token"),
        _R("dr_grpo", {"length": 3}, reaches="e-- e--", pull=2, clip="token"),
        _R("dapo", n=3, reaches=_NEVER, clip="token"),
        _R("reinforce_plus_plus_baseline", reaches="g-- g--", clip="token"),
        _R("trpo", {**_IN_LOSS, "kl_value": "exact"}, reaches="yyy dii", within=1e-3),
    ),
    "Policy gradient, KL in the reward": (
        _R("reinforce", _K1, reaches=_FRESH),
        _R("reinforce", _TO_GO, reaches=_FRESH),
        *(_R("reinforce", {**_IN_REWARD, "kl_value": v}, reaches=_NEVER) for v in ("k2", "k3")),
        _R("ppo_clip", {**_K1, "clip_eps": 0.2}, reaches=_FRESH, clip="token"),
        _R("reinforce_plus_plus", reaches=_FRESH, clip="token"),
        _R("gspo", {**_K1, "clip_eps": 0.2}, reaches=_FRESH, clip="mean"),
        _R("gspo_token", {**_K1, "clip_eps": 0.2}, reaches=_FRESH, clip="mean"),
        _R("cispo", {**_K1, "clip_eps_high": 0.2}, reaches=_FRESH),
        _R("sapo", _K1, reaches=_FRESH),
        _R("p3o", {"clip_eps": 0.2}, reaches=_FRESH, clip="sum"),
        _R("p3o", {"clip_eps": 1.0, "clip_eps_high": 10**6}),
        _R("p3o", {"clip_eps": 0.2, "clipping": "joint"}),
        _R("trpo", _K1, reaches=_FRESH, within=1e-2),
        _R("trpo", {**_K1, "max_kl": 1e-4}, reaches=_FRESH, within=1e-3),
    ),
    "Policy gradient with a critic, KL in the reward": (
        _R("ppo", reaches=_FRESH, clip="token"),
        _R("ppo", {"lam": 1.0}, one_value=True, reaches=_FRESH, clip="token"),
        _R("ppo", one_value=True, reaches="y-- ---", clip="token"),
    ),
    "Policy gradient, KL to the sampler in the loss": (
        _R("ppo_penalty", {"advantage": "leave_one_out"}, reaches="-ff -ff"),
    ),
    "Preferences": (
        _R("dpo", pairs=True),
        _R("ipo", pairs=True, target="preference"),
        _R("ipo_md", target="preference"),
        _R("nash_md_pg", n=1, target="nash", reaches=_FRESH),
        _R("nash_md_pg", n=1, target="nash", mixture=0.125, reaches="h-- h--"),
    ),
}

#: Objectives that train on rewards and have no KL to hold, and why.
WITHOUT: dict[str, str] = {
    "grpo_plus": "no KL, by definition; with one it is `grpo`",
    "rrhf": "ranks answers by their mean log-prob and imitates the best",
    "value_loss": "trains a critic",
}
