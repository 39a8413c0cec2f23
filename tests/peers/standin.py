"""TRL's own loss methods, called without a trainer: each gets a stand-in for ``self`` that holds what it reads.

Nothing of the formulas is repeated here. Tests import this after ``pytest.importorskip("trl")``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import FusedCausalLMOutput


class Loose(SimpleNamespace):
    """A namespace in which everything that was not given is off (None)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class KeepsPrecision(Tensor):
    """A float64 tensor whose ``.float()`` does nothing, so that peers which round to float32 can be compared tightly."""

    def float(self) -> KeepsPrecision:  # type: ignore[override]
        return self if self.is_floating_point() else super().float()


@contextmanager
def double() -> Iterator[None]:
    """float64 for the constants that peers make on the way (``torch.tensor(label_smoothing)``)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def accelerator() -> SimpleNamespace:
    """One process."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )


def logger() -> dict[str, Any]:
    """The books of metrics a trainer keeps."""
    return {"train": defaultdict(list), "eval": defaultdict(list)}


def trainer(**given: Any) -> Loose:
    """A stand-in for a trainer in training mode, on one process."""
    common = {"accelerator": accelerator(), "model": SimpleNamespace(training=True), "_metrics": logger()}
    return Loose(**{**common, "_total_train_tokens": 0, "_tp_size": 1, "aux_loss_enabled": False, **given})


class Recorded(nn.Module):
    """A model whose forward returns log-probs that were given, as TRL's fused head does."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        self.logps, self.log_sum_sq_probs = logps, log_sum_sq_probs

    def forward(self, **_: Any) -> FusedCausalLMOutput:
        zeros = torch.zeros_like(self.logps.detach())
        return FusedCausalLMOutput(
            log_probs=self.logps,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros if self.log_sum_sq_probs is None else self.log_sum_sq_probs,
        )


def sequence_inputs(mask: Tensor) -> dict[str, Tensor]:
    """Inputs one token longer than ``mask``: the first token is a prompt, and position t predicts token t + 1."""
    rows, length = mask.shape
    return {
        "input_ids": torch.ones(rows, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, length + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(rows, 1), mask], dim=1).long(),
    }


def dpo(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    loss_type: str | list[str],
    beta: float,
    weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    log_sum_sq_probs: Tensor | None = None,
    metrics: dict[str, Any] | None = None,
) -> Tensor:
    """``DPOTrainer._compute_loss``; token log-probs ``[2P, T]``, all chosen rows before all rejected ones."""
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    me = trainer(
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=f_alpha,
        ld_alpha=ld_alpha,
        use_weighting=log_sum_sq_probs is not None,
        precompute_ref_logps=False,
        model=Recorded(logps),
        ref_model=Recorded(ref_logps.where(mask, 0.0)),
        args=SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None),
    )
    policy = Recorded(logps.where(mask, 0.0), log_sum_sq_probs)
    with double():
        loss = DPOTrainer._compute_loss(me, policy, sequence_inputs(mask), False)
    if metrics is not None:
        metrics.update(me._metrics["train"])
    return loss


def grpo(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "grpo",
    level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    max_completion_length: int = 10,
    use_bias_correction_kl: bool = False,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    generation_tokens: int | None = None,
    steps_per_generation: int = 1,
    metrics: dict[str, Any] | None = None,
) -> Tensor:
    """``GRPOTrainer._compute_loss`` without gradient accumulation."""
    args = SimpleNamespace(
        delta=delta,
        use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperatures[0],
        sapo_temperature_neg=sapo_temperatures[1],
        steps_per_generation=steps_per_generation,
    )
    entropy = torch.zeros_like(logps.detach())
    me = trainer(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        args=args,
        max_completion_length=max_completion_length,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps.where(mask, 0.0), entropy, None),
    )
    tokens = mask.sum() if generation_tokens is None else torch.tensor(generation_tokens)
    inputs = _rollout_inputs(mask) | {"advantages": advantages, "num_items_in_batch": tokens}
    if old_logps is not None:
        inputs["old_per_token_logps"] = old_logps.where(mask, 0.0)
    if ref_logps is not None:
        inputs["ref_per_token_logps"] = ref_logps.where(mask, 0.0)
    with double():
        loss = GRPOTrainer._compute_loss(me, None, inputs)
    if metrics is not None:
        metrics.update(me._metrics["train"])
    return loss


def rloo(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """``RLOOTrainer._compute_loss``."""
    entropy = torch.zeros_like(logps.detach())
    me = trainer(
        epsilon_low=epsilon,
        epsilon_high=epsilon,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps.where(mask, 0.0), entropy, None),
    )
    inputs = _rollout_inputs(mask) | {"advantages": advantages, "old_logps": old_logps.where(mask, 0.0).sum(-1)}
    return RLOOTrainer._compute_loss(me, None, inputs)


def _rollout_inputs(mask: Tensor) -> dict[str, Tensor]:
    rows, length = mask.shape
    return {
        "prompt_ids": torch.ones(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.ones(rows, length, dtype=torch.long),
        "completion_mask": mask.long(),
    }


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl_logps: Tensor,
    ref_kl_logps: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "kto",
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``KTOTrainer._compute_loss``; ``kl_logps [B]`` score the mismatched answers."""
    me = trainer(
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: kl_logps,
    )
    inputs = sequence_inputs(mask) | {
        "label": labels,
        "ref_logps": ref_logps.where(mask, 0.0).sum(-1),
        "ref_KL_logps": ref_kl_logps,
    }
    return KTOTrainer._compute_loss(me, Recorded(logps.where(mask, 0.0)), inputs, False)


def advantages(
    rewards: Tensor,
    *,
    group_size: int,
    scale_rewards: str = "group",
    loo: bool = False,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """The advantages that TRL's trainers work out of ``rewards [B]`` (NaN = unscored), groups in order.

    Args:
        rewards: one per completion.
        group_size: completions per prompt.
        scale_rewards: GRPO's division: group, batch or none.
        loo: True = ``RLOOTrainer``, with its KL in the reward; False = ``GRPOTrainer``.
        old_logps: ``[B, T]`` of the policy that sampled (RLOO).
        ref_logps: ``[B, T]`` of the reference (RLOO with beta > 0).
        beta: RLOO's weight of the KL.
    """
    rows = len(rewards)
    ids = [[5] * (1 if old_logps is None else old_logps.shape[1])] * rows
    zeros = torch.zeros(rows, len(ids[0]), dtype=rewards.dtype)
    scores = {"policy": zeros if old_logps is None else old_logps, "reference": ref_logps}

    def score(model: Any, *_: Any, **__: Any) -> tuple[Tensor | None, None, None]:
        return scores[model.name], None, None

    policy = SimpleNamespace(training=True, is_gradient_checkpointing=False, name="policy")
    sampled = ([[1]] * rows, ids, [None] * rows)
    me = trainer(
        model=policy,
        ref_model=SimpleNamespace(name="reference"),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        beta=beta,
        num_iterations=1,
        num_generations=group_size,
        reward_weights=torch.ones(1, dtype=rewards.dtype),
        reward_funcs=[None],
        reward_func_names=["reward"],
        scale_rewards=scale_rewards,
        multi_objective_aggregation="sum_then_normalize",
        chat_template_kwargs={},
        _logs=defaultdict(lambda: defaultdict(list)) | {"prompt": [], "completion": [], "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
        _get_per_token_logps_and_entropies=score,
        _calculate_rewards=lambda *_: rewards.unsqueeze(1),
        _generate=lambda prompts: sampled if loo else (*sampled[:2], None, sampled[2], None, {}, None, None),
    )
    owner = RLOOTrainer if loo else GRPOTrainer
    with double():
        return owner._generate_and_score_completions(me, [{"prompt": "p"}] * rows)["advantages"]


def reward_model(
    chosen: Tensor, rejected: Tensor, *, margins: Tensor | None = None, centering: float | None = None
) -> Tensor:
    """``RewardTrainer.compute_loss``."""
    me = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2 * len(chosen), 1)}
    if margins is not None:
        inputs["margin"] = margins
    logits = torch.cat([chosen, rejected]).unsqueeze(-1)
    return RewardTrainer.compute_loss(me, lambda **_: SimpleNamespace(logits=logits), inputs)


def cpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss_type: str,
    beta: float,
    simpo_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """``CPOTrainer.cpo_loss``, per pair; for ipo and simpo the trainer passes mean log-probs, otherwise sums."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    me = trainer(loss_type=loss_type, beta=beta, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing, alpha=alpha)
    return CPOTrainer.cpo_loss(me, chosen, rejected)[0]


def orpo(mean_chosen: Tensor, mean_rejected: Tensor, *, beta: float) -> Tensor:
    """``ORPOTrainer.odds_ratio_loss``, per pair: beta logsigmoid(log odds ratio), which the trainer subtracts."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected = mean_chosen.as_subclass(KeepsPrecision), mean_rejected.as_subclass(KeepsPrecision)
    return ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0].as_subclass(Tensor)


def whole_step(kind: str, logps: Tensor, mask: Tensor, *, prompt_logps: Tensor | None = None, **hyper: Any) -> Tensor:
    """``get_batch_loss_metrics`` of the CPO or ORPO trainer, its forward pass and likelihood term included.

    Args:
        kind: "cpo" or "orpo".
        logps: ``[2P, T]`` log-probs of the answers' tokens, chosen rows first.
        mask: ``[2P, T]`` True = a token of the answer.
        prompt_logps: ``[2P, L]`` log-probs of the prompts' tokens but the first; default: prompts of one token.
        **hyper: of the trainer.
    """
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    owner = {"cpo": CPOTrainer, "orpo": ORPOTrainer}[kind]
    before = logps.new_zeros(len(logps), 0) if prompt_logps is None else prompt_logps
    scored = torch.cat([before, logps.where(mask, -1.0)], dim=1)
    # Two words, of which the first one is always said: its log-softmax is the log-prob that was given.
    logits = torch.stack([scored, (-scored.exp()).log1p()], dim=-1)
    logits = torch.cat([logits, logits.new_zeros(len(logits), 1, 2)], dim=1)
    answer = torch.cat([torch.zeros(len(mask), 1 + before.shape[1], dtype=torch.bool), mask], dim=1)
    exists = answer.clone()
    exists[:, : 1 + before.shape[1]] = True
    fields = {
        "input_ids": torch.zeros_like(answer, dtype=torch.long),
        "attention_mask": exists.long(),
        "labels": torch.zeros_like(answer, dtype=torch.long).masked_fill(~answer, -100),
    }
    batch = {
        f"{side}_{k}": v for k, x in fields.items() for side, v in zip(("chosen", "rejected"), x.chunk(2), strict=True)
    }
    me = trainer(
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=owner.concatenated_inputs,
        get_batch_logps=owner.get_batch_logps,
        **{"loss_type": "sigmoid", "simpo_gamma": 0.0, "label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 1.0, **hyper},
    )

    def keep(*args: Tensor) -> tuple[Tensor, ...]:
        found = ORPOTrainer.odds_ratio_loss(me, *(x.as_subclass(KeepsPrecision) for x in args))
        return tuple(x.as_subclass(Tensor) for x in found)

    me.concatenated_forward = lambda model, given: owner.concatenated_forward(me, model, given)
    me.cpo_loss, me.odds_ratio_loss = lambda *args: CPOTrainer.cpo_loss(me, *args), keep
    return owner.get_batch_loss_metrics(me, lambda *_, **__: SimpleNamespace(logits=logits), batch)[0].as_subclass(
        Tensor
    )
