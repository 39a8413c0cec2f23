"""Every objective as a pure function: log-probs in, an unreduced loss and its metrics out. Needs torch alone.

``losses.dpo(...).mean().backward()`` is a whole training step's worth of loss. Positional parameters are the tensors a
loss needs, keyword-only ones its hyper-parameters; only the policy's own tensors receive gradient.
"""

from __future__ import annotations

from rlft.losses.agro import agro_off_policy, agro_on_policy, agro_on_policy_causal, agro_on_policy_exact_kl
from rlft.losses.dpo import dpo, dpo_reference_free
from rlft.losses.dro import dro
from rlft.losses.grpo import grpo
from rlft.losses.ipo import ipo, ipo_mean
from rlft.losses.kto import kto
from rlft.losses.ppo import ppo_clip, value_loss
from rlft.losses.reinforce import kl_policy_gradient, kl_policy_gradient_exact, reinforce, rloo
from rlft.losses.reward_model import bradley_terry, bradley_terry_margin
from rlft.losses.sft import sft
from rlft.losses.slic import slic, slic_hf

__all__ = [
    "agro_off_policy",
    "agro_on_policy",
    "agro_on_policy_causal",
    "agro_on_policy_exact_kl",
    "bradley_terry",
    "bradley_terry_margin",
    "dpo",
    "dpo_reference_free",
    "dro",
    "grpo",
    "ipo",
    "ipo_mean",
    "kl_policy_gradient",
    "kl_policy_gradient_exact",
    "kto",
    "ppo_clip",
    "reinforce",
    "rloo",
    "sft",
    "slic",
    "slic_hf",
    "value_loss",
]
