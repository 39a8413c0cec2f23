"""Batch sizes and step counts: the arithmetic of a run."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.rules.comparisons import groups_per_prompt, wants_pairs

logger = logging.getLogger("rlft")

__all__ = ["BatchSizes", "batch_sizes"]


@dataclass(frozen=True)
class BatchSizes:
    """The arithmetic of a run, per process unless it says otherwise.

    Attributes:
        total_steps: optimizer steps.
        draws: examples (offline) or prompts (online) drawn at once.
        micro_batch_rows: completions per micro-batch.
        micro_batch_groups: groups per micro-batch, where groups stay whole.
        groups_per_step: examples (offline) or prompts (online) per optimizer step.
        updates_per_generation: optimizer steps fed by one generation, all iterations counted; 1 offline.
        steps_per_epoch: optimizer steps that one pass over the data takes; None for a stream.
    """

    total_steps: int
    draws: int
    micro_batch_rows: int
    micro_batch_groups: int
    groups_per_step: int
    updates_per_generation: int
    steps_per_epoch: int | None


def batch_sizes(
    config: Config, objective: Objective, examples: int | None, rows_per_example: int, world: int, *, online: bool
) -> BatchSizes:
    """Batch sizes and step counts. Online, per_device_train_batch_size counts completions, as in TRL."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if online:
        n = config.num_generations
        steps = config.updates_per_pass
        draws = micro * steps * accumulation // n
        updates = steps * config.num_iterations
        groups, rows, micro_groups = micro * accumulation // n, micro, max(1, micro // n)
        if wants_pairs(objective):
            # a pair is two rows; losses that compare all pairs of a step take them in one micro-batch
            every = groups * groups_per_prompt(config, objective)
            micro_groups = every if objective.couples_rows else max(1, micro // 2)
    else:
        draws = groups = micro * accumulation
        updates, rows, micro_groups = 1, micro * rows_per_example, micro
    if examples is None:  # a stream
        assert config.max_steps is not None
        return BatchSizes(config.max_steps, draws, rows, micro_groups, groups, updates, None)
    if examples < draws * world:
        raise ConfigError(
            f"{examples} training examples are fewer than one step takes ({draws} on each of {world} processes); lower "
            f"per_device_train_batch_size or gradient_accumulation_steps, or add data"
        )
    left = examples % (draws * world)
    if left:
        what = "are drawn in a later epoch" if online else "make a smaller last step, averaged over its own rows"
        logger.warning(
            f"{examples} training examples do not divide into steps of {draws * world}: the last {left} of an epoch {what}"
        )
    draws_per_epoch = examples // (draws * world) if online else math.ceil(examples / (draws * world))
    per_epoch = draws_per_epoch * updates
    total = config.max_steps if config.max_steps is not None else max(1, math.ceil(per_epoch * config.num_train_epochs))
    if config.warmup_steps > total:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} is more than the {total} steps of this run; lower warmup_steps"
        )
    return BatchSizes(total, draws, rows, micro_groups, groups, updates, per_epoch)
