"""Every objective as a pure function: log-probs in, an unreduced loss and its metrics out. Needs torch alone.

``losses.dpo(...).mean().backward()`` is a whole training step's worth of loss. Positional parameters are the tensors a
loss needs, keyword-only ones its hyper-parameters; only the policy's own tensors receive gradient.
"""

from __future__ import annotations

from rlft.losses.agro import agro_off_policy, agro_on_policy, agro_on_policy_causal, agro_on_policy_exact_kl
from rlft.losses.agro_lr import (
    agro_on_policy_lr_causal,
    agro_on_policy_lr_kl,
    agro_on_policy_lr_moments,
    agro_on_policy_lr_token,
)
from rlft.losses.agro_off import (
    agro_off_policy_cv,
    agro_off_policy_per_token,
    agro_off_policy_rb,
    agro_off_policy_rb2,
    agro_off_policy_weighted,
)
from rlft.losses.anchored import anchored_dpo, apo_down, apo_zero, bco_pair, exo_pair, nca_pair, sppo_hard
from rlft.losses.dpo import dpo, dpo_reference_free, robust_dpo
from rlft.losses.dro import dro
from rlft.losses.general import discopop, f_dpo, generalised_po, reward_aware_rpo
from rlft.losses.grpo import grpo
from rlft.losses.ipo import ipo, ipo_mean
from rlft.losses.kto import kto
from rlft.losses.length_aware import cpo, orpo, rpo, simpo, wpo
from rlft.losses.nash import ipo_md, nash_md_pg
from rlft.losses.p3o import p3o
from rlft.losses.ppo import ppo_clip, value_loss
from rlft.losses.ratios import cispo, gspo, gspo_token, ppo_penalty, sapo
from rlft.losses.reinforce import kl_policy_gradient, kl_policy_gradient_exact, reinforce, rloo
from rlft.losses.reward_model import bradley_terry, bradley_terry_margin
from rlft.losses.reward_rows import process_reward, reward_binary, reward_ranking, reward_regression
from rlft.losses.sft import distillation, sft
from rlft.losses.slic import slic, slic_hf
from rlft.losses.token_preferences import ld_dpo, rrhf, unlikelihood
from rlft.losses.transport import aot, aot_unpaired
from rlft.losses.trpo import trpo

__all__ = [
    "agro_off_policy",
    "agro_off_policy_cv",
    "agro_off_policy_per_token",
    "agro_off_policy_rb",
    "agro_off_policy_rb2",
    "agro_off_policy_weighted",
    "agro_on_policy",
    "agro_on_policy_causal",
    "agro_on_policy_exact_kl",
    "agro_on_policy_lr_causal",
    "agro_on_policy_lr_kl",
    "agro_on_policy_lr_moments",
    "agro_on_policy_lr_token",
    "anchored_dpo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "bradley_terry",
    "bradley_terry_margin",
    "cispo",
    "cpo",
    "discopop",
    "distillation",
    "dpo",
    "dpo_reference_free",
    "dro",
    "exo_pair",
    "f_dpo",
    "generalised_po",
    "grpo",
    "gspo",
    "gspo_token",
    "ipo",
    "ipo_md",
    "ipo_mean",
    "kl_policy_gradient",
    "kl_policy_gradient_exact",
    "kto",
    "ld_dpo",
    "nash_md_pg",
    "nca_pair",
    "orpo",
    "p3o",
    "ppo_clip",
    "ppo_penalty",
    "process_reward",
    "reinforce",
    "reward_aware_rpo",
    "reward_binary",
    "reward_ranking",
    "reward_regression",
    "rloo",
    "robust_dpo",
    "rpo",
    "rrhf",
    "sapo",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
    "sppo_hard",
    "trpo",
    "unlikelihood",
    "value_loss",
    "wpo",
]
