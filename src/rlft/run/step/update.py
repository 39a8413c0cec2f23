"""What stands between one bad step and the weights: errors that name the step, updates that are taken back."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlft.errors import Interrupted, TrainingError, out_of_memory
from rlft.rewards import RewardError
from rlft.run.processes import processes as meeting
from rlft.run.step import out_of_memory as memory
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = [
    "BadBatchError",
    "Undo",
    "agree",
    "explained",
    "lost_peer",
    "not_finite",
    "poisoned",
    "raw_outputs",
    "raw_row",
    "saves",
    "sharded",
    "skips",
    "together",
    "told",
    "undo_for",
    "with_gradient",
]

logger = logging.getLogger("rlft")

#: How gloo and NCCL say that a peer is gone.
_GONE = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "timed out waiting", "gloo", "nccl")

#: Updates below this cannot carry a sane float32 weight to infinity.
_REACH = 1e20


class BadBatchError(TrainingError, ValueError):
    """A batch that the objective refuses, in the middle of a run."""


def told(trainer: Trainer, key: str, text: str) -> None:
    """One line in the log of ``rlft``, from the main process, once per run and key."""
    if trainer.is_main and key not in trainer.told:
        trainer.told.add(key)
        logger.warning(text)


def agree(trainer: Trainer, failure: str | None) -> None:
    """Stop every process for what one of them found: one that stops alone leaves the others waiting. Collective.

    Args:
        trainer: the run.
        failure: what this process found, or None.

    Raises:
        TrainingError: on all processes, where any found something.
    """
    try:
        with together(trainer):
            if failure is not None:
                raise TrainingError(failure)
    except TrainingError:
        trainer.optimizer.zero_grad(set_to_none=True)
        raise


@contextlib.contextmanager
def together(trainer: Trainer, kind: type[Exception] = TrainingError) -> Iterator[None]:
    """Work that each process of a run does for itself: where it fails on one, all stop. See :func:`meeting.together`.

    Args:
        trainer: the run; its ``failures`` say what there was.
        kind: of error on the processes whose own work went well.

    Raises:
        Interrupted: on all processes, where a signal came to any of them and nothing else went wrong.
    """
    try:
        with (
            meeting.together(trainer.accelerator, kind, at=f"step {trainer.step + 1}: ", found=trainer.failures),
            trainer.signals.for_itself(),
        ):
            yield
    except kind as error:
        if set(trainer.failures.kinds) == {"Interrupted"} and not isinstance(error, Interrupted):
            raise Interrupted(trainer.step) from None
        raise


def saves(trainer: Trainer, error: Exception) -> bool:
    """Whether the last finished step is saved as the run stops; the same answer on all processes, as saving takes all.

    It is where a signal, rewards or data stopped the run, and nothing else on any process.
    """
    if trainer.world_size == 1 and isinstance(error, Interrupted):
        return True
    kinds = set(trainer.failures.kinds)
    known = isinstance(error, (Interrupted, RewardError, TrainingError))
    return bool(kinds) and kinds <= {"RewardError", "DataError", "Interrupted"} and known


def sharded(trainer: Trainer) -> bool:
    """Whether weights and gradients are spread over processes (FSDP, DeepSpeed), so that none sees them whole."""
    return str(trainer.accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED", "MEGATRON_LM")


@contextlib.contextmanager
def explained(trainer: Trainer, stage: memory.Stage = "step") -> Iterator[None]:
    """Turn what goes wrong inside a step into an error that names the step and the remedy; the gradient is dropped.

    Args:
        trainer: the run.
        stage: of the run, which decides what helps when memory ends.

    Raises:
        TrainingError: out of memory, or trained tensors without a gradient on several processes.
        BadBatchError: tensors that the objective refuses.
    """
    try:
        yield
    except Exception as error:
        trainer.optimizer.zero_grad(set_to_none=True)
        own = type(error).__module__.startswith("rlft.")
        if isinstance(error, ValueError) and not own and stage not in ("self_checks", "ref_cache"):  # before any batch
            raise BadBatchError(f"step {trainer.step + 1}: {error} ({memory.state_of(trainer, stage)})") from error
        if "finished reduction in the prior iteration" in str(error):  # DistributedDataParallel's
            raise TrainingError(
                f"step {trainer.step + 1}: trained tensors got no gradient, and the processes of a run wait for every one. Freeze "
                f"what the forward pass does not use before the Trainer is built (requires_grad_(False)), or set self_checks: "
                f"{{gradients: false}}, which lets them be; with that check on, a run names them at its first step"
            ) from error
        if out_of_memory(error) and not own:
            raise TrainingError(memory.message(trainer, stage, error)) from error
        raise


def lost_peer(trainer: Trainer, error: BaseException) -> None:
    """Say it plainly when a collective failed because another process is gone.

    Raises:
        TrainingError: when that is what happened.
    """
    words, cause = "", error
    while cause is not None:
        words += f"{cause} " if isinstance(cause, RuntimeError) else ""  # torch's; others are of a server or a file
        cause = cause.__cause__
    own = isinstance(error, (TrainingError, RewardError))
    if trainer.world_size > 1 and not own and any(sign in words.lower() for sign in _GONE):
        raise TrainingError(
            f"step {trainer.step + 1}: process {trainer.rank} of {trainer.world_size} lost contact with another one, which "
            f"was killed or failed: look for its own error. The newest checkpoint in {trainer.run_dir} is intact: the same "
            f"command on {trainer.world_size} processes resumes from it"
        ) from error


# -- steps that are not finite --------------------------------------------------------------------------------------------
def skips(trainer: Trainer, what: str, *, allowed: bool = True, **raw: float) -> bool:
    """Whether a step that is not finite is left out and the run goes on; counted over the whole run, stops included.

    Args:
        trainer: the run.
        what: was found.
        allowed: False where the weights could not be put back.
        raw: the step's numbers as they are. They are in the log at once, where the step's own row will not have them.
    """
    if not allowed or trainer.nonfinite_steps >= trainer.config.max_nonfinite_steps:
        raw_row(trainer, raw)
        return False
    if (trainer.step + 1) % trainer.config.logging_steps and trainer.step + 1 != trainer.plan.total_steps:
        raw_row(trainer, {**raw, "nonfinite_steps": trainer.nonfinite_steps + 1.0})
    trainer.nonfinite_steps += 1
    if trainer.is_main:
        logger.warning(
            f"step {trainer.step + 1}: {what}; the step was not applied ({trainer.nonfinite_steps} of "
            f"max_nonfinite_steps={trainer.config.max_nonfinite_steps} skipped)"
        )
    return True


def raw_row(trainer: Trainer, values: Mapping[str, float]) -> None:
    """A row of the step that is being made, in metrics.jsonl and the trackers."""
    if trainer.is_main:
        trainer.metrics_log.write(trainer.step + 1, values)
    trainer.accelerator.log(dict(values), step=trainer.step + 1)


@contextlib.contextmanager
def raw_outputs(trainer: Trainer, outputs: Mapping[str, Tensor], batch: Batch) -> Iterator[None]:
    """Around an objective that refuses outputs which are not finite: the row says so before the run stops."""
    try:
        yield
    except ValueError:
        if not _all_finite(outputs, batch):
            raw_row(trainer, {"loss": math.nan})
        raise


def _all_finite(outputs: Mapping[str, Tensor], batch: Batch) -> bool:
    mask = batch.mask
    used = [t[mask] if t.shape == mask.shape else t for t in outputs.values() if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in used)


def poisoned(trainer: Trainer, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor | None:
    """A loss of NaN where the model's outputs hold NaN or infinity; None where they are finite, or nobody must wait.

    Objectives refuse such outputs with an error. Where steps may be skipped, or other processes wait in the backward
    pass for this one, the step goes through with a loss that says what it is, and every process sees the same.
    """
    if trainer.config.max_nonfinite_steps == 0 and trainer.world_size == 1:
        return None
    if _all_finite(outputs, batch):
        return None
    grown = [t for t in outputs.values() if t.requires_grad]
    return torch.stack([t.sum() for t in grown]).sum() * float("nan")


def with_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    """The loss as it is.

    Raises:
        TrainingError: when it does not depend on the policy at all.
    """
    if not loss.requires_grad:
        raise TrainingError(
            f"step {trainer.step + 1}: the loss of objective {trainer.objective.name!r} has no gradient, so nothing can be "
            f"learnt from it; likely causes: .detach() or torch.no_grad() around the policy's log-probs in an objective of "
            f"your own, or a callback or reward function that switched gradients off"
        )
    return loss


# -- updates --------------------------------------------------------------------------------------------------------------
class Undo:
    """A copy of what an optimizer step changes.

    Args:
        optimizer: about to take a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self.state = {p: {name: _copied(value) for name, value in s.items()} for p, s in optimizer.state.items()}

    @torch.no_grad()
    def back(self) -> None:
        """Put weights and moments back, bit for bit."""
        for parameter, before in self.weights:
            parameter.copy_(before)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def undo_for(optimizer: torch.optim.Optimizer, norm: float) -> Undo | None:
    """A copy to go back to, where the update might overflow; None where arithmetic says that it cannot.

    Adam moves a weight by a few learning rates at most, and SGD by learning rate times gradient: with finite gradients
    and ordinary settings no copy is spent. An optimizer that is not known is not trusted.

    Args:
        optimizer: about to take a step.
        norm: of the gradient, finite.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        return Undo(optimizer)
    for group in optimizer.param_groups:
        reach = float(group["lr"]) * (1.0 + float(group["weight_decay"])) * max(1.0, norm)
        if not reach / max(1e-6, 1.0 - float(group.get("momentum", 0.0))) < _REACH or group.get("eps", 1.0) <= 0:
            return Undo(optimizer)
    return None


def not_finite(module: nn.Module, accelerator: Any) -> str | None:
    """The name of a trained tensor that holds NaN or infinity, on any process; None when all are finite."""
    trained: list[tuple[str, Any]] = [(name, p.detach()) for name, p in module.named_parameters() if p.requires_grad]
    # of sharded ones each process looks at its own part, which may be empty: that has no largest entry
    trained = [(name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained]
    parts = [p for _, p in trained if p.numel()]
    largest = nn.utils.get_total_norm(parts, float("inf")) if parts else torch.zeros((), device=accelerator.device)
    bad = (~torch.isfinite(largest)).float().reshape(1)
    if float(accelerator.reduce(bad, reduction="sum")) == 0:  # one process must not stop alone
        return None
    return next((name for name, p in trained if not bool(torch.isfinite(p).all())), "a weight of another process")
