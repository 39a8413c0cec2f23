"""The models of a run from its settings: policy, reference, critic, rewards, judge, and what optimises."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.run.setup.data import trusting

__all__ = ["adamw", "check_trust", "judge_for", "lora_settings", "policy_for", "policy_model", "rewards_for"]


def rewards_for(config: Config, specs: list[Any], device: torch.device, tokenizer: Any) -> Any:
    from rlft import models
    from rlft.rewards import RewardSet, load_reward

    functions = []
    for spec in specs:
        if isinstance(spec, (str, Path)) and Path(spec).is_dir():
            with trusting("reward"):
                scorer = models.ModelReward(spec, trust_remote_code=config.trusts("reward"))
            scorer.scorer.to(device)
            functions.append(scorer)
        else:
            functions.append(load_reward(str(spec) if isinstance(spec, Path) else spec))
        if isinstance(functions[-1], models.ModelReward) and _other_tokens(functions[-1].tokenizer, tokenizer):
            warnings.warn(
                f"reward model {functions[-1].__name__!r} has another tokenizer than the policy: answers are decoded, and "
                f"their text is encoded again for it, so both read the same text but not the same tokens",
                stacklevel=5,
            )
    _limit_tokens(config, [f for f in functions if isinstance(f, models.ModelReward)])
    return RewardSet(functions, weights=config.reward_weights, timeout=config.reward_timeout)


def _limit_tokens(config: Config, reward_models: list[Any]) -> None:
    """Reward models score as many tokens at a time as the run says, unless they were made with a limit of their own."""
    free = [model for model in reward_models if model.max_tokens is None]
    if config.max_tokens_per_reward_batch is not None and not free:
        why = "every reward model has max_tokens of its own" if reward_models else "no reward is a reward model"
        raise ConfigError(
            f"max_tokens_per_reward_batch={config.max_tokens_per_reward_batch} does nothing: {why}; drop it"
        )
    for model in free:
        model.tokens_of_run = config.max_tokens_per_reward_batch or config.max_tokens_per_micro_batch


def judge_for(config: Config, given: Any) -> Any:
    """The judge, called and checked like a reward function."""
    from rlft.rewards import RewardSet, load_reward

    if isinstance(given, str) and ":" not in given:
        raise ConfigError(
            f"judge={given!r} must read module:function or path/to/file.py:function; rewards have names, judges none"
        )
    judge = load_reward(given)
    try:
        parameters = inspect.signature(judge).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        parameters = None
    if parameters is not None and not any(p.name == "opponents" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigError(
            f"judge {given!r} takes no `opponents`, so it cannot compare; a judge is a reward function that also takes opponents, "
            f"one other answer for each completion, and returns probabilities. Give a function of the rewards as `rewards`"
        )
    return RewardSet(judge, timeout=config.reward_timeout)


def _other_tokens(one: Any, other: Any) -> bool:
    return one is not other and one.get_vocab() != other.get_vocab()


def policy_model(config: Config, source: Any, tokenizer: Any, objective: Objective) -> Any:
    from rlft import models

    if isinstance(source, Mapping):
        source = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
                  "bos_token_id": tokenizer.bos_token_id, **source}  # fmt: skip
    load = models.load_sequence_classifier if "scores" in objective.needs else models.load_causal_lm
    try:
        with trusting("policy"):
            return load(
                source,
                dtype=config.dtype,
                revision=config.model_revision,
                trust_remote_code=config.trusts("policy"),
                attn_implementation=config.attn_implementation,
                seed=config.seed,
                load_in_4bit=config.load_in_4bit,
                load_in_8bit=config.load_in_8bit,
            )
    except ImportError as error:
        if config.attn_implementation is None or config.load_in_4bit or config.load_in_8bit:
            raise
        raise ConfigError(
            f"attn_implementation={config.attn_implementation!r} cannot be used here: {str(error).rstrip('.')}; install it, or "
            f"drop attn_implementation"
        ) from error


def check_trust(
    config: Config, objective: Objective, *, source: Any, tokenizer: Any, reference: Any, specs: list[Any]
) -> None:
    """Refuse ``trust_remote_code`` for a model that is not loaded from a folder or a hub.

    Raises:
        ConfigError: naming the model.
    """
    from_files = {
        "policy": isinstance(source, (str, Path))
        or (not isinstance(tokenizer, Mapping) and not hasattr(tokenizer, "encode")),
        "reference": isinstance(reference, (str, Path)) and objective.needs_reference,
        "critic": config.critic not in (None, "shared") and objective.needs_critic,
        "reward": any(isinstance(spec, (str, Path)) and Path(spec).is_dir() for spec in specs),
    }
    for model, loaded in from_files.items():
        if config.trusts(model) and not loaded:
            raise ConfigError(
                f"trust_remote_code={config.trust_remote_code!r} does nothing for the {model}: none is loaded from a folder or "
                f"a hub; drop it"
            )


def policy_for(config: Config, objective: Objective, loaded: Any, peft_config: Any, ref_model: Any) -> Any:
    """The module that is trained: adapters, reference and critic as the settings say."""
    from rlft import models

    base = loaded
    if peft_config is not None or config.use_peft:
        base = models.add_lora(loaded, lora_settings(config, peft_config))
    if "scores" in objective.needs:
        policy: Any = models.RewardScorer(base)
    else:
        policy = models.Policy(
            base,
            reference=reference_for(config, ref_model, objective),
            critic=critic_for(config, objective),
            dropout=not config.disable_dropout,
        )
        freeze_unused_head(base, objective)
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    models.check_trainable(policy)
    return policy


def lora_settings(config: Config, given: Any) -> Any:
    from rlft.models import LoraSettings

    if given is not None:
        return LoraSettings(**given) if isinstance(given, Mapping) else given
    return LoraSettings(
        r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=config.lora_target_modules
    )


def reference_for(config: Config, given: Any, objective: Objective) -> Any:
    if not objective.needs_reference:
        return "none"
    target = given if given is not None else config.ref_model
    if target is None:
        return "copy" if config.sync_ref_model else "auto"
    from rlft.models import load_causal_lm

    if not isinstance(target, (str, Path)):
        return target
    with trusting("reference"):
        trusted = config.trusts("reference")
        return load_causal_lm(target, dtype=config.dtype, trust_remote_code=trusted).requires_grad_(False)


def critic_for(config: Config, objective: Objective) -> Any:
    if not objective.needs_critic:
        return "none"
    if config.critic in (None, "shared"):
        return "shared"
    from rlft.models import load_causal_lm

    with trusting("critic"):
        return load_causal_lm(config.critic, dtype=config.dtype, trust_remote_code=config.trusts("critic"))


def freeze_unused_head(model: Any, objective: Objective) -> None:
    """Where a loss reads values alone, the language model's head gets no gradient: it is not trained then.

    A trainable tensor without gradient would stop the run under DDP, and count as trained everywhere.
    """
    head = model.get_output_embeddings()
    if objective.forward_needs <= {"values"} and head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        if not tied:
            head.requires_grad_(False)


def adamw(config: Config, policy: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable weights; vectors (norms, biases) are not decayed."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
