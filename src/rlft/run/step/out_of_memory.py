"""What to say when memory ends: which batch size filled it, and what helps at that stage of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["Stage", "message", "state_of"]

#: Where a run is: what it holds in memory, and so what helps, differs.
Stage = Literal["step", "constants", "sample", "evaluate", "self_checks", "ref_cache", "optimizer", "undone"]


@dataclass(frozen=True)
class _Advice:
    """Which size filled the memory, as "name=value", and ways to need less."""

    size: str
    ways: list[str]


def message(trainer: Trainer, stage: Stage, error: BaseException) -> str:
    """The error in words.

    Args:
        trainer: the run.
        stage: where it happened.
        error: what torch or Python said.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    advice = _advice(trainer, stage)
    return (
        f"step {trainer.step + 1}: out of memory{_DOING[stage]} with {advice.size} on {trainer.device} ({said}); "
        f"{state_of(trainer, stage)}. {', or '.join(advice.ways)}. The newest checkpoint is intact: the same command resumes from it"
    )


_DOING: dict[Stage, str] = {
    "step": "",
    "constants": " while scoring what a step needs beforehand",
    "sample": " while sampling",
    "evaluate": " in an evaluation",
    "self_checks": " in the self-checks",
    "ref_cache": " while scoring the data under the reference",
    "optimizer": " in the optimizer's update",
    "undone": " in the optimizer's update",
}


def state_of(trainer: Trainer, stage: Stage) -> str:
    """What became of the weights, as far as is known."""
    if stage == "optimizer":
        return (
            "the step may be applied to a part of the weights in memory, and no checkpoint was written from them: end this "
            "process"
        )
    return f"the step was not applied, and the weights are those of step {trainer.step}"


def _advice(trainer: Trainer, stage: Stage) -> _Advice:
    c = trainer.config
    shorter = f"shorten max_completion_length (now {c.max_completion_length})"
    recompute = [] if c.gradient_checkpointing else ["set gradient_checkpointing: true"]
    adapters = [] if c.use_peft else ["set use_peft: true"]
    narrow = [] if c.dtype in ("bfloat16", "float16") else ["set dtype: bfloat16"]
    one_critic = ["set critic: shared"] if c.critic not in (None, "shared") else []
    rows = f"per_device_train_batch_size={c.per_device_train_batch_size}"
    fewer_rows = "Lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor (the step stays the same)"
    budget = c.max_tokens_per_micro_batch
    tokens, fewer_tokens = (
        f"max_tokens_per_micro_batch={budget}",
        "Lower max_tokens_per_micro_batch (the step stays the same)",
    )
    by_tokens = _Advice(tokens, [fewer_tokens]) if budget is not None else _Advice(rows, [fewer_rows])
    if stage == "sample":
        return _sampling(trainer, shorter, narrow)
    if stage == "evaluate":
        return _Advice(
            f"per_device_eval_batch_size={c.per_device_eval_batch_size}",
            ["Lower per_device_eval_batch_size", *narrow, shorter],
        )
    if stage == "self_checks":  # which look at one or two rows of the data, without gradient
        return _Advice(
            f"one or two rows (per_device_train_batch_size={c.per_device_train_batch_size} would need more)",
            [
                *_capital(narrow),
                *one_critic,
                "load_in_4bit: true with use_peft: true",
                f"shorten max_prompt_length and {shorter}",
            ],
        )
    if stage == "ref_cache":
        return _Advice(by_tokens.size, [*by_tokens.ways, *narrow, shorter])
    if stage in ("optimizer", "undone"):  # gradients and moments: as large with any batch
        return _Advice(
            f"{_trained(trainer):,} trained weights (it does not depend on {rows})",
            [*_capital([*adapters, *one_critic, *narrow]), "use an optimizer with smaller moments (optimizers=)"],
        )
    if stage == "constants":  # without gradient
        return _Advice(by_tokens.size, [*by_tokens.ways, *one_critic, *narrow, shorter])
    return _Advice(by_tokens.size, [*by_tokens.ways, *recompute, *adapters, *one_critic, shorter])


def _sampling(trainer: Trainer, shorter: str, narrow: list[str]) -> _Advice:
    """A generation keeps its size when accumulation makes up for the batch; a sampler may decode it in pieces."""
    c = trainer.config
    answers = trainer.plan.draws * c.num_generations
    pieces = getattr(trainer.sampler, "max_batch", None)
    ways = [
        "Make a generation smaller: lower per_device_train_batch_size alone (with more gradient_accumulation_steps it is as "
        "large as before), gradient_accumulation_steps or steps_per_generation"
    ]
    if isinstance(pieces, int):
        kind = type(trainer.sampler).__name__
        ways += [f"decode fewer at once: sampler={kind}(..., max_batch={max(1, min(pieces, answers) // 2)})"]
    return _Advice(
        f"{answers if not isinstance(pieces, int) else min(pieces, answers)} answers at once "
        f"(per_device_train_batch_size={c.per_device_train_batch_size})",
        [*ways, *narrow, shorter],
    )


def _capital(ways: list[str]) -> list[str]:
    return [ways[0][0].upper() + ways[0][1:], *ways[1:]] if ways else []


def _trained(trainer: Trainer) -> int:
    return sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
