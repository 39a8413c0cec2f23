"""What goes wrong inside a step, in words: which step it was, what became of the weights, and what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlft.errors import TrainingError, out_of_memory
from rlft.run.step.parts import Parts

__all__ = ["BadBatchError", "Stage", "StepErrors"]

#: Where a run is: what it holds in memory, and so what helps, differs.
Stage = Literal["step", "prepare", "sample", "evaluate", "self_checks", "ref_logps", "optimizer", "undone"]

_DOING: dict[Stage, str] = {
    "step": "",
    "prepare": " while scoring what a step needs beforehand",
    "sample": " while sampling",
    "evaluate": " in an evaluation",
    "self_checks": " in the self-checks",
    "ref_logps": " while scoring the data under the reference",
    "optimizer": " in the optimizer's update",
    "undone": " in the optimizer's update",
}


class BadBatchError(TrainingError, ValueError):
    """A batch that the objective refuses, in the middle of a run."""


@dataclass(frozen=True)
class _Advice:
    """Which size filled the memory, as "name=value", and ways to need less."""

    size: str
    ways: list[str]


class StepErrors:
    """Turns errors of a step into words; it holds nothing of its own."""

    def __init__(self, parts: Parts) -> None:
        self.config, self.sizes, self.progress = parts.config, parts.sizes, parts.processes.progress
        self.optimizer, self.sampler, self.device = parts.optimizer, parts.sampler, parts.processes.device

    @contextlib.contextmanager
    def explained(self, stage: Stage = "step") -> Iterator[None]:
        """Turn what goes wrong inside into an error that names the step and the remedy; the gradient is dropped.

        Args:
            stage: of the run, which decides what helps when memory ends.

        Raises:
            TrainingError: out of memory, or trained tensors without a gradient on several processes.
            BadBatchError: tensors that the objective refuses.
        """
        try:
            yield
        except Exception as error:
            self.optimizer.zero_grad(set_to_none=True)
            own, step = type(error).__module__.startswith("rlft."), self.progress.step + 1
            if (
                isinstance(error, ValueError) and not own and stage not in ("self_checks", "ref_logps")
            ):  # before any batch
                raise BadBatchError(f"step {step}: {error} ({self._state_after(stage)})") from error
            if "finished reduction in the prior iteration" in str(error):  # DistributedDataParallel's
                raise TrainingError(
                    f"step {step}: trained tensors got no gradient, and the processes of a run wait for every one. Freeze "
                    f"what the forward pass does not use before the Trainer is built (requires_grad_(False)), or set self_checks: "
                    f"{{gradients: false}}, which lets them be; with that check on, a run names them at its first step"
                ) from error
            if out_of_memory(error) and not own:
                raise TrainingError(self.out_of_memory(stage, error)) from error
            raise

    def without_gradient(self, name: str) -> TrainingError:
        """The loss of an objective does not depend on the policy at all."""
        return TrainingError(
            f"step {self.progress.step + 1}: the loss of objective {name!r} has no gradient, so nothing can be "
            f"learnt from it; likely causes: .detach() or torch.no_grad() around the policy's log-probs in an objective of "
            f"your own, or a callback or reward function that switched gradients off"
        )

    def out_of_memory(self, stage: Stage, error: BaseException) -> str:
        """The end of memory in words.

        Args:
            stage: where it happened.
            error: what torch or Python said.
        """
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        advice = self._advice(stage)
        return (
            f"step {self.progress.step + 1}: out of memory{_DOING[stage]} with {advice.size} on {self.device} ({said}); "
            f"{self._state_after(stage)}. {', or '.join(advice.ways)}. The newest checkpoint is intact: the same command resumes "
            f"from it"
        )

    def _state_after(self, stage: Stage) -> str:
        """What became of the weights, as far as is known."""
        if stage == "optimizer":
            return (
                "the step may be applied to a part of the weights in memory, and no checkpoint was written from them: end this "
                "process"
            )
        return f"the step was not applied, and the weights are those of step {self.progress.step}"

    def _advice(self, stage: Stage) -> _Advice:
        c = self.config
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
            return self._advice_on_sampling(shorter, narrow)
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
        if stage == "ref_logps":
            return _Advice(by_tokens.size, [*by_tokens.ways, *narrow, shorter])
        if stage in ("optimizer", "undone"):
            trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            # gradients and moments: as large with any batch
            return _Advice(
                f"{trained:,} trained weights (it does not depend on {rows})",
                [*_capital([*adapters, *one_critic, *narrow]), "use an optimizer with smaller moments (optimizers=)"],
            )
        if stage == "prepare":  # without gradient
            return _Advice(by_tokens.size, [*by_tokens.ways, *one_critic, *narrow, shorter])
        return _Advice(by_tokens.size, [*by_tokens.ways, *recompute, *adapters, *one_critic, shorter])

    def _advice_on_sampling(self, shorter: str, narrow: list[str]) -> _Advice:
        """A generation keeps its size when accumulation makes up for the batch; a sampler may decode it in pieces."""
        c = self.config
        answers = self.sizes.draws * c.num_generations
        pieces = getattr(self.sampler, "max_batch", None)
        ways = [
            "Make a generation smaller: lower per_device_train_batch_size alone (with more gradient_accumulation_steps it is as "
            "large as before), gradient_accumulation_steps or steps_per_generation"
        ]
        if isinstance(pieces, int):
            kind = type(self.sampler).__name__
            ways += [f"decode fewer at once: sampler={kind}(..., max_batch={max(1, min(pieces, answers) // 2)})"]
        return _Advice(
            f"{answers if not isinstance(pieces, int) else min(pieces, answers)} answers at once "
            f"(per_device_train_batch_size={c.per_device_train_batch_size})",
            [*ways, *narrow, shorter],
        )


def _capital(ways: list[str]) -> list[str]:
    return [ways[0][0].upper() + ways[0][1:], *ways[1:]] if ways else []
