"""What a generation came to on all processes: answers without a score, groups that teach nothing, answers without a token.

Each process notes its own rows while it samples; at the end of the generation they are added up, so that every process
says, and does, the same about them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlft.errors import TrainingError
from rlft.run.step import update as guard

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["EQUAL_STEPS", "Tally", "masks", "scores", "settle", "spreads"]

#: Generations in a row with nothing but equal rewards after which the log says so.
EQUAL_STEPS = 10


@dataclass
class Tally:
    """Counts of one generation.

    Attributes:
        asked: answers, or comparisons of a judge, that were to be scored.
        unscored: those that were not.
        groups: prompts with at least two scored answers.
        equal: those whose answers all earned the same.
        rows: answers.
        masked: those without a token to train on.
    """

    asked: int = 0
    unscored: int = 0
    groups: int = 0
    equal: int = 0
    rows: int = 0
    masked: int = 0


def scores(trainer: Trainer, values: Tensor) -> None:
    """Note rewards, or the answers of a judge, NaN where there was none. Held-out prompts are no steps, and not counted."""
    if not trainer.evaluating:
        trainer.tally.asked += values.numel()
        trainer.tally.unscored += int(values.isnan().sum())


def spreads(trainer: Trainer, equal: Tensor, usable: Tensor) -> None:
    """Note which groups earned equal rewards, of those that can be compared."""
    trainer.tally.groups += int(usable.sum())
    trainer.tally.equal += int((equal & usable).sum())


def masks(trainer: Trainer, mask: Tensor) -> None:
    """Note answers by their masks, ``[B, T]``."""
    trainer.tally.rows += mask.shape[0]
    trainer.tally.masked += int((~mask.any(-1)).sum())


def settle(trainer: Trainer) -> None:
    """Add up over all processes, say once what is odd, and stop a run that has learnt nothing for too long. Collective.

    Raises:
        TrainingError: on every process, when nothing was scored for ``max_unscored_steps`` generations in a row.
    """
    own = torch.tensor(dataclasses.astuple(trainer.tally), dtype=torch.float64, device=trainer.device)
    found = Tally(*(int(count) for count in trainer.accelerator.reduce(own, reduction="sum").tolist()))
    trainer.tally = Tally()
    _masked(trainer, found)
    _equal(trainer, found)
    _unscored(trainer, found)


def _masked(trainer: Trainer, found: Tally) -> None:
    trainer.all_masked = 0 < found.rows == found.masked
    if found.masked:
        guard.told(
            trainer,
            "masked",
            f"step {trainer.step + 1}: {found.masked} of {found.rows} answers have no token to train on "
            f"(no end within max_completion_length={trainer.config.max_completion_length}) and contribute 0; "
            f"completions/clipped_ratio counts them",
        )


def _equal(trainer: Trainer, found: Tally) -> None:
    """Groups whose answers all earn the same have no advantage: said once, and once more when it goes on."""
    trainer.equal_steps = trainer.equal_steps + 1 if 0 < found.groups == found.equal else 0
    if (
        not found.equal or trainer.objective.min_group < 2
    ):  # without a baseline from siblings, equal rewards still teach
        return
    guard.told(
        trainer,
        "equal",
        f"step {trainer.step + 1}: {found.equal} of {found.groups} groups earn equal rewards, so their advantage is 0 "
        f"(frac_reward_zero_std counts them; dynamic_sampling: true draws others)",
    )
    if trainer.equal_steps == EQUAL_STEPS:
        guard.told(
            trainer,
            "all equal",
            f"step {trainer.step + 1}: all groups earned equal rewards for {EQUAL_STEPS} generations in a row, so the rewards "
            f"teach nothing; look at a printed answer (log_completions), use easier or harder prompts, more "
            f"num_generations (now {trainer.config.num_generations}), or dynamic_sampling: true",
        )


def _unscored(trainer: Trainer, found: Tally) -> None:
    if found.asked:
        trainer.unscored_steps = trainer.unscored_steps + 1 if found.asked == found.unscored else 0
    if trainer.unscored_steps < trainer.config.max_unscored_steps:
        return
    if trainer.judge is not None:
        raise TrainingError(
            f"step {trainer.step + 1}: the judge had no answer for {trainer.unscored_steps} steps in a row (it returned None "
            f"for every two answers); call it on two texts by hand"
        )
    raise TrainingError(
        f"step {trainer.step + 1}: no answer was scored for {trainer.unscored_steps} steps in a row "
        f"(every reward was None); check the reward functions on one printed answer (log_completions)"
    )
