"""What a generation came to on all processes: answers without a score, groups that teach nothing, answers without a token.

Each process notes its own rows while it samples; at the end of the generation they are added up, so that every process
says, and does, the same about them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlft.errors import TrainingError
from rlft.run.step.parts import Parts
from rlft.run.step.watchers import Watcher

__all__ = ["EQUAL_STEPS", "FLIP_SHARE", "FlipWatch", "GenerationCounts"]

#: Generations in a row with nothing but equal rewards after which the log says so.
EQUAL_STEPS = 10
#: Share of answers with A > 2 beta above which the likelihood-ratio term is said to push the wrong way.
FLIP_SHARE = 0.1


@dataclass
class _Counts:
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


class GenerationCounts:
    """Owns the counts of the present generation, and of generations in a row that taught nothing.

    Attributes:
        equal_steps: generations in a row whose groups all earned equal rewards.
        unscored_steps: generations in a row without any score.
        all_masked: whether no answer of the last generation has a token to train on.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.processes, self.journal = parts.config, parts.processes, parts.journal
        self.judged = parts.judge is not None
        self.compares = parts.objective.min_group >= 2  # without a baseline from siblings, equal rewards still teach
        self.equal_steps = self.unscored_steps = 0
        self.all_masked = False
        self._now = _Counts()

    # -- while a generation is sampled ------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Around the sampling and scoring of a generation. Collective at its end.

        Raises:
            TrainingError: on every process, when nothing was scored for ``max_unscored_steps`` generations in a row.
        """
        self._now = _Counts()
        with self.processes.together():
            yield
        own = torch.tensor(dataclasses.astuple(self._now), dtype=torch.float64)
        found, self._now = _Counts(*(int(count) for count in self.processes.sum(own).tolist())), _Counts()
        at = f"step {self.processes.progress.step + 1}"
        self._settle_masked(found, at)
        self._settle_equal(found, at)
        self._settle_unscored(found, at)

    def scored(self, values: Tensor) -> None:
        """Note rewards, or the answers of a judge, NaN where there was none."""
        self._now.asked += values.numel()
        self._now.unscored += int(values.isnan().sum())

    def drawn(self, mask: Tensor, equal: Tensor | None = None, usable: Tensor | None = None) -> None:
        """Note sampled answers.

        Args:
            mask: ``[B, T]`` the tokens to train on.
            equal: ``[P]`` which groups earned equal rewards; None where a judge decides.
            usable: ``[P]`` which groups can be compared.
        """
        self._now.rows += mask.shape[0]
        self._now.masked += int((~mask.any(-1)).sum())
        if equal is not None and usable is not None:
            self._now.groups += int(usable.sum())
            self._now.equal += int((equal & usable).sum())

    # -- what it came to --------------------------------------------------------------------------------------------------
    def _settle_masked(self, found: _Counts, at: str) -> None:
        self.all_masked = 0 < found.rows == found.masked
        if found.masked:
            self.journal.warn_once(
                "masked",
                f"{at}: {found.masked} of {found.rows} answers have no token to train on "
                f"(no end within max_completion_length={self.config.max_completion_length}) and contribute 0; "
                f"completions/clipped_ratio counts them",
            )

    def _settle_equal(self, found: _Counts, at: str) -> None:
        """Groups whose answers all earn the same have no advantage: said once, and once more when it goes on."""
        self.equal_steps = self.equal_steps + 1 if 0 < found.groups == found.equal else 0
        if not found.equal or not self.compares:
            return
        self.journal.warn_once(
            "equal",
            f"{at}: {found.equal} of {found.groups} groups earn equal rewards, so their advantage is 0 "
            f"(frac_reward_zero_std counts them; dynamic_sampling: true draws others)",
        )
        if self.equal_steps == EQUAL_STEPS:
            self.journal.warn_once(
                "all equal",
                f"{at}: all groups earned equal rewards for {EQUAL_STEPS} generations in a row, so the rewards "
                f"teach nothing; look at a printed answer (log_completions), use easier or harder prompts, more "
                f"num_generations (now {self.config.num_generations}), or dynamic_sampling: true",
            )

    def _settle_unscored(self, found: _Counts, at: str) -> None:
        if found.asked:
            self.unscored_steps = self.unscored_steps + 1 if found.asked == found.unscored else 0
        if self.unscored_steps < self.config.max_unscored_steps:
            return
        if self.judged:
            raise TrainingError(
                f"{at}: the judge had no answer for {self.unscored_steps} steps in a row (it returned None "
                f"for every two answers); call it on two texts by hand"
            )
        raise TrainingError(
            f"{at}: no answer was scored for {self.unscored_steps} steps in a row "
            f"(every reward was None); check the reward functions on one printed answer (log_completions)"
        )

    def nothing_to_learn(self) -> None:
        """A step has nothing to train on: say so once.

        Raises:
            TrainingError: where all answers of the generation are masked.
        """
        at = f"step {self.processes.progress.step + 1}"
        if self.all_masked:
            raise TrainingError(
                f"{at}: no token of the whole batch is trained on: every answer was masked, as those "
                f"without an end are with mask_truncated_completions. Raise max_completion_length (now "
                f"{self.config.max_completion_length}), or set mask_truncated_completions: false"
            )
        self.journal.warn_once("empty", f"{at}: nothing could be trained on, so the weights stay as they are")

    def state_dict(self) -> dict[str, Any]:
        """Generations in a row that taught nothing."""
        return {"unscored_steps": self.unscored_steps, "equal_steps": self.equal_steps}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
        self.unscored_steps = values.get("unscored_steps", self.unscored_steps)
        self.equal_steps = values.get("equal_steps", self.equal_steps)


class FlipWatch(Watcher):
    """Says once when the likelihood-ratio term of an objective lowers the probability of many good answers."""

    def __init__(self, parts: Parts) -> None:
        self.objective, self.journal = parts.objective, parts.journal

    def logged(self, values: Mapping[str, float]) -> None:
        share = values.get("agro/flip_fraction", 0.0)
        if share > FLIP_SHARE:
            self.journal.warn_once(
                "flips",
                f"step {self.journal.progress.step}: {share:.0%} of the answers have A > 2 beta (agro/flip_fraction, more than "
                f"{FLIP_SHARE:.0%}); there the likelihood-ratio term of {self.objective.name!r} outweighs the rest and lowers the "
                f"probability of good answers. Set lr_coef: 0 (or agro_off_policy), or raise beta (now {self.objective.beta:g})",
            )
