"""Whole optimizer steps: rlft's trainer against TRL's, on the same folder, rows, micro-batches and optimizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.harness import Case, Variant
from benchmarks.worker import Tick

__all__ = ["cases"]

HERE = "benchmarks.steps"
STEPS = 1000  # more than is ever measured: the parent stops the run
LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
# GRPO's surrogate, advantage and averaging; `grpo` itself carries a k3 term.
EXACT = {
    "advantage": "group_norm",
    "averaging": "sequence_mean",
    "clip_eps": 0.2,
    "kl": "loss",
    "kl_value": "exact",
}


def _vocab(shape: dict[str, Any]) -> int:
    return shape["model"]["vocab"]


def _pairs(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """As many as a batch: every step sees the same rows, so that losses can be compared step by step."""
    return workload.pairs(shape["pairs"], prompt_length=shape["prompt"], lengths=shape["lengths"], vocab=_vocab(shape))


def _prompts(shape: dict[str, Any]) -> list[dict[str, Any]]:
    return workload.prompts(shape["prompts"] * 8, length=shape["prompt"], vocab=_vocab(shape))


def _turn(tick: Tick, loss: float) -> None:
    tick(loss=loss, tokens=workload.sampled_tokens())


# -- rlft -----------------------------------------------------------------------------------------------------------
def _run_rlft(tick: Tick, folder: str, shape: dict[str, Any], settings: dict[str, Any], **arguments: Any) -> None:
    from rlft import Trainer

    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            folder,
            {
                "max_steps": STEPS,
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant",
                "adam_beta2": 0.999,
                "use_peft": shape["lora"],
                "report_to": [],
                "disable_tqdm": True,
                "output_dir": output,
                **settings,
            },
            callbacks=[lambda event, _, values: _turn(tick, values["loss"]) if event == "step" else None],
            **arguments,
        )
        tick()
        trainer.train()


def rlft_dpo(tick: Tick, folder: str, **shape: Any) -> None:
    settings = {
        "objective": "dpo",
        "beta": 0.1,
        "per_device_train_batch_size": shape["pairs"],
        "max_prompt_length": shape["prompt"],
        "max_completion_length": max(shape["lengths"]),
    }
    _run_rlft(tick, folder, shape, settings, train_dataset=_pairs(shape))


def rlft_online(
    tick: Tick, folder: str, *, objective: str, sampler: str = "auto", axes: dict[str, Any] | None = None, **shape: Any
) -> None:
    settings = {
        "objective": objective,
        "objective_args": axes or {},
        "beta": shape["beta"],
        "num_generations": shape["group"],
        "per_device_train_batch_size": shape["prompts"] * shape["group"],
        "max_prompt_length": shape["prompt"],
        "max_completion_length": shape["answer"],
        "sampler": sampler,
    }
    rewards = [workload.even_tokens]
    _run_rlft(tick, folder, shape, settings, train_dataset=_prompts(shape), reward_funcs=rewards)


# -- TRL --------------------------------------------------------------------------------------------------------------
def _run_trl(
    tick: Tick, trainer_class: Any, folder: str, config: Any, shape: dict[str, Any], rows: Any, **more: Any
) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    losses = [0.0]

    class Turns(TrainerCallback):
        """Hands the turn over between optimizer steps."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _turn(tick, losses[-1])

    trainer = trainer_class(
        model=folder,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if shape["lora"] else None,
        callbacks=[Turns()],
        **more,
    )
    assert next(trainer.model.parameters()).dtype == torch.float32
    compute_loss = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        losses[:] = [float(loss)]
        return loss

    trainer.compute_loss = recorded
    trainer.train()


def _trl_settings(output: str) -> dict[str, Any]:
    return {
        "output_dir": output,
        "max_steps": STEPS,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_accumulation_steps": 1,
        "model_init_kwargs": {"dtype": "float32"},
    }


def trl_dpo(tick: Tick, folder: str, **shape: Any) -> None:
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            **_trl_settings(output),
            beta=0.1,
            per_device_train_batch_size=shape["pairs"],
            max_length=shape["prompt"] + max(shape["lengths"]),
        )
        _run_trl(tick, DPOTrainer, folder, config, shape, _pairs(shape))


def trl_online(tick: Tick, folder: str, *, trainer: str, **shape: Any) -> None:
    import trl

    extra = {"loss_type": "grpo"} if trainer == "GRPO" else {}
    with tempfile.TemporaryDirectory() as output:
        config = getattr(trl, f"{trainer}Config")(
            **_trl_settings(output),
            **extra,
            beta=shape["beta"],
            num_generations=shape["group"],
            per_device_train_batch_size=shape["prompts"] * shape["group"],
            max_completion_length=shape["answer"],
            temperature=1.0,
        )
        rows, rewards = _prompts(shape), workload.even_tokens
        _run_trl(tick, getattr(trl, f"{trainer}Trainer"), folder, config, shape, rows, reward_funcs=rewards)


# -- cases --------------------------------------------------------------------------------------------------------------
def cases(folder: Path, *, quick: bool = False) -> list[Case]:
    """The steps' cases; models are written below ``folder``."""
    model = {"hidden": 64, "layers": 2, "vocab": 2000} if quick else {"hidden": 256, "layers": 4, "vocab": 32000}
    name = "-".join(f"{k}{v}" for k, v in model.items())
    path = folder / name
    workload.make_model(path, **model)
    offline = {"model": model, "pairs": 4, "prompt": 24 if quick else 128, "lora": True}
    offline["lengths"] = [16, 12, 8, 4] if quick else [64, 48, 32, 16, 64, 24, 40, 56]
    online = {"model": model, "prompts": 2, "group": 4 if quick else 8, "lora": True, "beta": 0.04}
    online |= {"prompt": 24, "answer": 8} if quick else {"prompt": 128, "answer": 64}
    where = {"folder": str(path)}
    rounds = 1 if quick else 5

    def ours(objective: str, **more: Any) -> dict[str, Any]:
        return {**online, **where, "objective": objective, **more}

    def dpo(name: str, what: str, shape: dict[str, Any], **more: Any) -> Case:
        variants = [
            Variant("rlft dpo", f"{HERE}:rlft_dpo", {**shape, **where}),
            Variant("TRL DPOTrainer", f"{HERE}:trl_dpo", {**shape, **where}, ("trl",)),
        ]
        return Case(name, what, shape, variants, rounds=rounds, **more)

    everything = {**offline, "lora": False}
    # From the same weights on the same rows, the losses of later steps agree only if every step did the same.
    same_steps = dpo("DPO step, all weights", "one optimizer step on preference pairs", everything, same=("loss",))
    in_loss = Case(
        "GRPO step, LoRA",
        "sample, score and one optimizer step; KL to the reference in the loss",
        online,
        [
            Variant("rlft grpo", f"{HERE}:rlft_online", ours("grpo")),
            Variant("rlft grpo, transformers generate", f"{HERE}:rlft_online", ours("grpo", sampler="transformers")),
            Variant("TRL GRPOTrainer", f"{HERE}:trl_online", {**online, **where, "trainer": "GRPO"}, ("trl",)),
        ],
        rounds=rounds,
        same=("tokens",),
        tolerance=0.1,
    )
    exact = Case(
        "GRPO step, exact KL, LoRA",
        "sample, score and one optimizer step; KL to the reference in the loss, exact here and k3 there",
        online,
        [
            Variant("rlft grpo, exact KL", f"{HERE}:rlft_online", ours("ppo_clip", axes=EXACT)),
            Variant("TRL GRPOTrainer, k3", f"{HERE}:trl_online", {**online, **where, "trainer": "GRPO"}, ("trl",)),
        ],
        rounds=rounds,
        same=("tokens",),
        tolerance=0.1,
    )
    if quick:
        return [same_steps, in_loss, exact]
    in_advantage = Case(
        "AGRO step against RLOO, LoRA",
        "sample, score and one optimizer step; KL to the reference in the advantage",
        online,
        [
            Variant("rlft agro_off_policy", f"{HERE}:rlft_online", ours("agro_off_policy")),
            Variant("rlft rloo", f"{HERE}:rlft_online", ours("rloo")),
            Variant("TRL RLOOTrainer", f"{HERE}:trl_online", {**online, **where, "trainer": "RLOO"}, ("trl",)),
        ],
        rounds=rounds,
        same=("tokens",),
        tolerance=0.1,
    )
    return [dpo("DPO step, LoRA", same_steps.what, offline), same_steps, in_loss, exact, in_advantage]
