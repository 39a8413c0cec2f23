"""One table of every public loss: which hyper-parameters to try it with, and inputs made from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlft import losses
from rlft.types import LossOutput

# Rows 0..8 belong to prompts 4 and 1, interleaved; row 3 is fully masked; row 8 is unscored where rewards are taken.
GROUP_IDS = torch.tensor([4, 1, 4, 1, 1, 4, 1, 4, 4])
MASK = torch.tensor(
    [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 0, 1, 0],  # a gap: a tool spoke
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],  # a gap at the start
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]
).bool()
ROWS, TOKENS = MASK.shape
PAIRS = 6
POLICY = frozenset({"logps", "chosen_logps", "rejected_logps"})


@dataclass(frozen=True)
class Case:
    """A loss, its hyper-parameters, and what is special about it."""

    name: str
    hyper: dict[str, Any] = field(default_factory=dict)
    learned: frozenset[str] = POLICY  # names that receive gradient
    row_shaped: frozenset[str] = frozenset()  # names that are [B] here though usually [B, T]
    exact_gradient: bool = True  # the gradient is that of the value (gradcheck applies)
    layout: str = "groups"  # "groups" or "pairs": how rows share prompts
    signed: frozenset[str] = frozenset()  # hyper-parameters that may be negative

    @property
    def fn(self) -> Callable[..., LossOutput]:
        return getattr(losses, self.name)

    @property
    def id(self) -> str:
        extra = [f"{k}={v}" for k, v in self.hyper.items()] + [f"{n}[B]" for n in sorted(self.row_shaped)]
        return "-".join([self.name, *extra])

    @property
    def tensor_names(self) -> list[str]:
        parameters = inspect.signature(self.fn).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @property
    def log_prob_names(self) -> list[str]:
        return [name for name in self.tensor_names if name.endswith("logps")]

    @property
    def per_pair(self) -> bool:
        return "mask" not in self.tensor_names

    def inputs(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Tensors by parameter name, in the order of the signature."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, low: float, high: float) -> Tensor:
            unit = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * unit).to(dtype)

        made: dict[str, Tensor] = {}
        for name in self.tensor_names:
            rows = (ROWS,) if name in self.row_shaped else (ROWS, TOKENS)
            if name in ("mask",):
                made[name] = MASK.clone()
            elif name == "group_ids":
                made[name] = GROUP_IDS.clone()
            elif name == "labels":
                made[name] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
            elif name == "kl_baseline":
                made[name] = torch.full((ROWS,), 0.3, dtype=dtype)
            elif name in ("win_rates", "weights"):
                made[name] = uniform(ROWS, low=0, high=1)
            elif name == "chosen_win_rates":
                made[name] = uniform(PAIRS, low=0, high=1)
            elif name == "scores":
                made[name] = uniform(ROWS, low=-2, high=2)
            elif name == "rewards":
                made[name] = uniform(ROWS, low=-1, high=1)
                made[name][8] = torch.nan
            elif name in ("chosen_lengths", "rejected_lengths"):
                made[name] = torch.randint(1, 9, (PAIRS,), generator=generator)
            elif name in ("chosen_rewards", "rejected_rewards"):
                made[name] = uniform(PAIRS, low=-2, high=2)
            elif name == "margins":
                made[name] = uniform(PAIRS, low=0, high=1)
            elif self.per_pair:
                made[name] = uniform(PAIRS, low=-9, high=-1)
            elif name in ("token_kl", "teacher_kl", "token_log_ratio_sq", "behaviour_log_ratio_sq"):
                made[name] = uniform(*rows, low=0.01, high=0.5)
            elif name == "behaviour_log_ratio":
                made[name] = uniform(*rows, low=-0.5, high=0.5)
            elif name == "step_labels":
                made[name] = uniform(*rows, low=0, high=1)
            elif name in ("advantages", "values", "old_values", "returns"):
                made[name] = uniform(*rows, low=-2, high=2)
            else:
                made[name] = uniform(*rows, low=-2.5, high=-0.1)
        if self.layout == "pairs":  # eight rows in twos, chosen first; the second pair has an empty row
            made = {name: tensor[:8].clone() for name, tensor in made.items()}
            made["group_ids"] = torch.tensor([3, 3, 1, 1, 0, 0, 7, 7])
        return made

    def __call__(self, tensors: dict[str, Tensor]) -> LossOutput:
        return self.fn(*tensors.values(), **self.hyper)

    def gradients(
        self, tensors: dict[str, Tensor], *, length: int | None = None
    ) -> tuple[LossOutput, dict[str, Tensor]]:
        """The loss and the gradient of its mean with respect to the learned tensors."""
        leaves = {n: t.detach().clone().requires_grad_(n in self.learned) for n, t in tensors.items()}
        output = self(leaves)
        output.mean(length=length).backward()
        return output, {n: t.grad for n, t in leaves.items() if n in self.learned}


def _advantages(name: str, *, exact_gradient: bool = True, **hyper: Any) -> list[Case]:
    per_row = frozenset({"advantages"})
    return [Case(name, hyper, row_shaped=rows, exact_gradient=exact_gradient) for rows in (frozenset(), per_row)]


BETA = {"beta": 0.3}
REWARDS = frozenset({"chosen_rewards", "rejected_rewards"})
LOGPS = frozenset({"logps"})
LOGPS_AND_KL = frozenset({"logps", "token_kl"})

CASES = [
    Case("sft"),
    Case("dpo", BETA),
    Case("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    Case("dpo_reference_free", BETA),
    Case("dpo_reference_free", {"beta": 0.3, "label_smoothing": 0.2}),
    Case("ipo", BETA),
    Case("ipo_mean", BETA),
    Case("slic", BETA),
    Case("slic", {"beta": 0.3, "delta": 2.5}),
    Case("slic_hf", {"nll_weight": 0.2}),
    Case("kto", BETA),
    Case("kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
    *_advantages("reinforce"),
    Case("rloo", BETA, exact_gradient=False),
    Case("rloo", {"beta": 0.0}),
    Case("kl_policy_gradient", BETA, exact_gradient=False),
    Case("kl_policy_gradient", {"beta": 0.3, "kl_gradient": "k3"}),
    Case("kl_policy_gradient_exact", BETA, learned=LOGPS_AND_KL),
    *_advantages("ppo_clip", clip_eps=0.2),
    Case("ppo_clip", {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}),
    *_advantages("trpo"),
    Case("value_loss", learned=frozenset({"values"})),
    Case("value_loss", {"clip_eps": 0.2}, learned=frozenset({"values"})),
    *_advantages("grpo", clip_eps=0.2, beta=0.04),
    Case("grpo", {"clip_eps": 0.2, "clip_eps_high": 0.28, "beta": 0.04, "kl_gradient": "k2"}, exact_gradient=False),
    Case("agro_off_policy", BETA),
    Case("agro_off_policy", {"beta": 0.0}),
    Case("agro_on_policy", BETA),
    Case("agro_on_policy", {"beta": 0.3, "lr_coef": 1.0}, exact_gradient=False),
    Case("agro_on_policy", {"beta": 0.3, "lr_coef": 0.5, "lr_baseline": "leave_one_out"}, exact_gradient=False),
    Case("agro_on_policy", {"beta": 0.3, "lr_coef": 1.0, "lr_baseline": "unbiased"}, exact_gradient=False),
    *[
        Case("agro_on_policy_causal", {"beta": 0.3, "baseline": b}, exact_gradient=False)
        for b in ("none", "sequence", "position")
    ],
    *[
        Case("agro_on_policy_exact_kl", {"beta": 0.3, "baseline": b}, learned=LOGPS_AND_KL, exact_gradient=False)
        for b in ("none", "sequence", "position")
    ],
    Case("dro", BETA, learned=frozenset({"logps", "values"}), row_shaped=frozenset({"values"})),
    Case("bradley_terry", learned=REWARDS),
    Case("bradley_terry", {"margin": 0.5, "centering": 0.01}, learned=REWARDS),
    Case("bradley_terry_margin", {"centering": 0.01}, learned=REWARDS),
    # preference pairs
    Case("robust_dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    *[Case("generalised_po", {"beta": 0.3, "f": f}) for f in ("logistic", "square", "hinge", "exp")],
    *[Case("f_dpo", {"beta": 0.3, "divergence": d}) for d in ("reverse_kl", "forward_kl", "js", "alpha")],
    Case("discopop", BETA),
    *[
        Case("reward_aware_rpo", {"beta": 0.3, "eta": 0.7, "distance": d})
        for d in ("square", "backward_kl", "forward_kl")
    ],
    Case("apo_zero", BETA),
    Case("apo_down", BETA),
    Case("anchored_dpo", BETA, signed=frozenset({"delta"})),
    Case("anchored_dpo", {"beta": 0.3, "delta": 0.5}, signed=frozenset({"delta"})),
    Case("exo_pair", BETA),
    Case("nca_pair", BETA),
    Case("bco_pair", {"beta": 0.3, "delta": -0.2}, signed=frozenset({"delta"})),
    Case("sppo_hard", BETA),
    Case("aot", {"beta": 0.3, "label_smoothing": 0.1}),
    Case("aot_unpaired", BETA),
    Case("rpo", {"beta": 0.3, "alpha": 0.5}),
    Case("simpo", {"beta": 2.0, "gamma": 0.5}),
    Case("simpo", {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1}),
    Case("orpo", BETA),
    Case("orpo", {"beta": 0.3, "eps": 0.01}),
    Case("cpo", BETA),
    Case("wpo", BETA, exact_gradient=False),
    Case("ipo_md", BETA),
    # preferences by rows
    Case("ld_dpo", {"beta": 0.3, "ld_alpha": 0.4}, layout="pairs"),
    Case("rrhf", {"nll_weight": 0.5}),
    Case("unlikelihood", {"weight": 0.5}),
    # online
    *_advantages("ppo_penalty", beta=0.3),
    Case("gspo", {"clip_eps": 0.2}, row_shaped=frozenset({"advantages"})),
    *_advantages("gspo_token", exact_gradient=False, clip_eps=0.2, clip_eps_high=0.3),
    *_advantages("cispo", exact_gradient=False, clip_eps_high=0.3),
    Case("cispo", {"clip_eps_high": 4.0, "clip_eps": 0.5}, exact_gradient=False),
    *_advantages("sapo"),
    Case("p3o", {"beta": 0.3, "clip_eps": 0.2}, exact_gradient=False),
    Case("p3o", {"beta": 0.0, "clip_eps": 0.2}),
    Case("p3o", {"beta": 0.3, "clip_eps": 0.9, "clipping": "joint"}, exact_gradient=False),
    Case("nash_md_pg", BETA, exact_gradient=False),
    Case("nash_md_pg", {"beta": 0.0}),
    # more of AGRO
    Case(
        "agro_off_policy_rb",
        BETA,
        learned=LOGPS | {"behaviour_log_ratio", "behaviour_log_ratio_sq"},
        exact_gradient=False,
    ),
    Case("agro_off_policy_rb2", BETA, learned=LOGPS | {"behaviour_log_ratio"}, exact_gradient=False),
    Case("agro_off_policy_cv", BETA, exact_gradient=False),
    Case("agro_off_policy_weighted", BETA),
    Case("agro_off_policy_per_token", BETA),
    Case("agro_on_policy_lr_causal", BETA, exact_gradient=False),
    *[
        Case("agro_on_policy_lr_token", {"beta": 0.3, "square": h, "linear": g, "lr_baseline": b}, exact_gradient=False)
        for h, g, b in (("h1", "g1", "none"), ("h2", "g2", "none"), ("h2", "g1", "unbiased"))
    ],
    *[
        Case(
            "agro_on_policy_lr_kl",
            {"beta": 0.3, "square": h, "linear": g, "lr_baseline": b},
            learned=LOGPS_AND_KL if (h, g) != ("h1", "g3n") else LOGPS,
            exact_gradient=False,
        )
        for h, g, b in (("h3", "g3", "none"), ("h3", "g1", "unbiased"), ("h1", "g3n", "none"), ("h2", "g3", "none"))
    ],
    *[
        Case(
            "agro_on_policy_lr_moments",
            {"beta": 0.3, "lr_coef": 0.5, "lr_baseline": b},
            learned=LOGPS_AND_KL | {"token_log_ratio_sq"},
            exact_gradient=False,
        )
        for b in ("none", "unbiased")
    ],
    # supervised and reward models
    Case("distillation", {"soft_weight": 0.7}, learned=frozenset({"logps", "teacher_kl"})),
    Case("reward_ranking", learned=frozenset({"scores"})),
    Case("reward_regression", learned=frozenset({"scores"})),
    Case("reward_binary", learned=frozenset({"scores"})),
    Case("process_reward", learned=frozenset({"values"})),
]
