"""Passes without gradient: what an objective needs to know before its forward pass, each in as few passes as can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlft import reduce
from rlft._terms import BEHAVIOUR, MOMENTS, REFERENCE
from rlft.errors import TrainingError
from rlft.objective import Objective
from rlft.rules.kl_weight import REFERENCE_KL
from rlft.run.step.kl_control import KLControl
from rlft.run.step.micro_batches import MicroBatches
from rlft.run.step.parts import Parts
from rlft.run.step.sampler_trust import SamplerTrust
from rlft.types import Batch

__all__ = ["Passes", "mask_only"]

#: Outputs of a forward pass that come from the reference's trunk.
_OF_REFERENCE = REFERENCE | {"ref_states"}


class Passes:
    """Fills in old and reference log-probs, values and baselines. It holds nothing of its own.

    Args:
        parts: of the run.
        micro_batches: how many rows a pass takes.
        trust: of the sampler of an online run, else None.
        kl_control: takes in the KL that is taken off the rewards, or None.
    """

    def __init__(
        self,
        parts: Parts,
        micro_batches: MicroBatches,
        *,
        trust: SamplerTrust | None,
        kl_control: KLControl | None,
    ) -> None:
        self.policy, self.processes, self.journal, self.online = (
            parts.policy,
            parts.processes,
            parts.journal,
            parts.online,
        )
        self.micro_batches, self.stages, self.trust, self.kl_control = micro_batches, parts.stages, trust, kl_control
        #: Whether a generation is trained on after the policy that sampled it has moved, and whether more than once.
        self.reused = parts.sizes.updates_per_generation > 1
        self.repeated = parts.online and parts.config.num_iterations > 1

    def prepared(self, batch: Batch, objective: Objective) -> Batch:
        """What must be known before the first forward pass: old and reference log-probs, values, advantages.

        Where advantages come from the rewards alone and rows with advantage 0 are left out of the update, they are computed
        first, and those rows are in no pass at all.
        """
        everyone = self.processes.everyone()
        before = objective.kl == "reward" and objective.beta > 0
        if before or objective.advantage == "gae" or not self.micro_batches.drops_zero_advantages:
            return objective.prepare(self.filled(batch, objective), everyone)
        return self.filled(objective.prepare(batch, everyone), objective)

    def filled(self, batch: Batch, objective: Objective, *, alone: bool = False) -> Batch:
        """Old and reference log-probs, values and the KTO baseline, each only where something needs it before the forward.

        With one optimizer step per generation the policy that sampled is the policy that is trained: old log-probs are the
        forward pass's own, and the reference is scored inside it. No pass is spent twice.

        Args:
            batch: with rewards, where the objective needs some.
            objective: of this step.
            alone: do not wait for other processes, which in an evaluation may have fewer batches.
        """
        in_reward = objective.kl == "reward" and objective.beta > 0
        noted = batch.extras.get("sampler_logps")
        if noted is not None and "sampler_logps" not in objective.needs:
            batch = batch.replace(extras={name: t for name, t in batch.extras.items() if name != "sampler_logps"})
        want = self._lacking(batch, objective, in_reward=in_reward)
        if "logps" in want and noted is not None and self.trust is not None and self.trust.trusted:
            batch, want = batch.replace(old_logps=noted), want - {"logps"}
        if want:
            compared = noted if "logps" in want and self.trust is not None and self.trust.usable else None
            with self.journal.meter.phase("reference"):
                outputs = self.outputs(batch, frozenset(want), everything=compared is not None, alone=alone)
            names = {"logps": "old_logps", "states": "behaviour_states"}
            batch = batch.replace(**{names.get(name, name): values for name, values in outputs.items()})
            if compared is not None and self.trust is not None:
                if self.trust.compare(batch, outputs["logps"], compared):
                    batch = batch.replace(
                        old_logps=compared
                    )  # from the first generation on, so that all are made alike
        if in_reward:
            self._measure_reward_kl(batch)
        if self.reused and BEHAVIOUR & objective.needs:
            self.policy.remember_behaviour()
        if "kl_baseline" in objective.needs:
            baseline = self._kto_baseline(batch, alone=alone or self.processes.world_size == 1)
            batch = batch.replace(extras={**batch.extras, "kl_baseline": baseline.expand(batch.num_rows).contiguous()})
        return batch

    def _lacking(self, batch: Batch, objective: Objective, *, in_reward: bool) -> set[str]:
        """Outputs that a batch lacks and that no forward pass with gradient will give in time."""
        exact = bool(objective.needs & {"token_kl", *MOMENTS})  # of the reference's whole distribution
        want = set()
        # the reference's trunk runs once: before the forward pass, or in it, where its hidden states are needed and not kept
        early = in_reward or (self.repeated if exact else self.reused)
        if "ref_logps" in objective.needs and batch.ref_logps is None and early:
            want.add("ref_logps")
        if batch.old_logps is None and (in_reward or ("old_logps" in objective.needs and self.reused)):
            want.add("logps")
        if exact and batch.ref_states is None and (in_reward or self.repeated):
            want.add("ref_states")
        if BEHAVIOUR & objective.needs and batch.behaviour_states is None and self.repeated:
            want.add("states")  # of the policy that sampled, which at this moment is the policy
        if objective.advantage == "gae":
            want.add("values")
        return want

    def wanted(self, batch: Batch, objective: Objective) -> frozenset[str]:
        """Outputs of the forward pass with gradient."""
        wanted = set(objective.forward_needs)
        if batch.ref_logps is not None:
            wanted -= {"ref_logps"}
        if self.online:
            wanted |= {"entropy"}
        # a value is also read at the answer's start, which may be masked
        return frozenset(wanted if {"values", "scores"} & objective.needs else wanted | mask_only(batch))

    @torch.no_grad()
    def outputs(
        self, batch: Batch, want: frozenset[str], *, everything: bool = False, alone: bool = False
    ) -> dict[str, Tensor]:
        """The model's outputs, in passes no larger than a micro-batch, each ``[B, T]`` (scores ``[B]``), in the batch's order.

        Args:
            batch: any batch.
            want: which outputs, see :class:`rlft.models.Policy`.
            everything: every token of every row. Else tokens outside ``mask`` and rows that nothing reads are left 0.
            alone: no process waits for another, see :meth:`MicroBatches.without_gradient`.
        """
        width = batch.completion_ids.shape[1]
        rows = torch.arange(batch.num_rows) if everything else self._read_rows(batch)
        chosen = batch if len(rows) == batch.num_rows else batch.select(rows)
        wish = frozenset() if everything or "values" in want else mask_only(chosen)
        pieces = self.micro_batches.without_gradient(chosen, alone=alone)
        # as many passes as any other process makes, where they wait for each other
        turns = len(pieces) if alone or not self.processes.sharded else self.processes.most(len(pieces))
        outputs: dict[str, Tensor] = {}
        for turn in range(turns):
            self.processes.poll()
            piece = pieces[min(turn, len(pieces) - 1)]
            for name, values in self.stages.forward(
                chosen.select(piece).to(self.processes.device), want | wish
            ).items():
                wide = _widened(values, width).to(batch.device)
                if name not in outputs:
                    outputs[name] = wide.new_zeros((batch.num_rows, *wide.shape[1:]))
                outputs[name][rows[piece].to(batch.device)] = wide
            of_both = bool(want & _OF_REFERENCE and want - _OF_REFERENCE)
            self.journal.meter.passed(self.policy.layout_used, passes=1 + of_both)
        return outputs

    def _read_rows(self, batch: Batch) -> Tensor:
        """Rows that something reads; one where there is none, since sharded processes pass through the model together."""
        rows = (~self.micro_batches.unread(batch)).nonzero()[:, 0].cpu()
        return rows if len(rows) else batch.completion_mask.sum(-1).argmin()[None].cpu()

    # -- what is measured ---------------------------------------------------------------------------------------------------
    def _measure_reward_kl(self, batch: Batch) -> None:
        """Log the KL that is about to be taken off the rewards, and let the KL controller see it."""
        assert batch.old_logps is not None
        assert batch.ref_logps is not None
        rows = batch.mask.any(-1)
        values = reduce.sequence_sum((batch.old_logps - batch.ref_logps).where(batch.mask, 0.0), batch.mask)
        self.journal.metrics.add(REFERENCE_KL, values, rows)
        if self.kl_control is not None:
            self.kl_control.saw_reward_kl(values, rows)

    def _kto_baseline(self, batch: Batch, *, alone: bool) -> Tensor:
        """KTO's z0: mean log-ratio of mismatched pairs (answer i, prompt i+1) of the step, one number for all processes.

        The prompt after the last one is the next process's first: the pairs do not depend on how many processes there are.
        """
        if alone and batch.num_groups < 2:
            raise TrainingError("KTO compares answers with other prompts: give it at least 2 examples per step")
        prompts, masks = (batch.prompt_ids, batch.prompt_mask) if alone else self._with_next_prompt(batch)
        mismatched = batch.replace(
            prompt_ids=prompts, prompt_mask=masks, group_ids=(batch.group_ids + 1) % len(prompts), extras={}
        )
        outputs = self.outputs(mismatched, frozenset({"logps", "ref_logps"}), alone=alone)
        log_ratio = reduce.sequence_sum(outputs["logps"] - outputs["ref_logps"], batch.mask)
        alive = batch.mask.any(-1)
        both = torch.stack([log_ratio.where(alive, 0.0).sum().double(), alive.sum().double()])
        both = both.to(self.processes.device) if alone else self.processes.sum(both)
        return (both[0] / both[1].clamp(min=1)).clamp(min=0).to(log_ratio.dtype).to(batch.device)

    def _with_next_prompt(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompts of this process and the first one of the next process, ``[G + 1, L]`` and its mask."""
        pads = self.processes.accelerator.pad_across_processes
        first = torch.stack([batch.prompt_ids[0], batch.prompt_mask[0].long()])[None].to(self.processes.device)
        every = self.processes.gather(pads(first, dim=2)).to(batch.device)
        ids, mask = every[(self.processes.rank + 1) % self.processes.world_size]
        wider = ids.shape[0] - batch.prompt_ids.shape[1]
        return (
            torch.cat([pad(batch.prompt_ids, (0, wider)), ids[None]]),
            torch.cat([pad(batch.prompt_mask, (0, wider), value=False), mask[None].bool()]),
        )


def mask_only(batch: Batch) -> frozenset[str]:
    """The wish of :class:`rlft.models.Policy` that keeps tokens outside the mask from the head, where there are some."""
    outside, inside = torch.stack([(batch.completion_mask & ~batch.mask).any(), batch.mask.any()]).tolist()
    return frozenset({"mask_only"}) if outside and inside else frozenset()


def _widened(values: Tensor, width: int) -> Tensor:
    """``[B]`` as it is, ``[B, T]`` or ``[B, T, D]`` with T made ``width``."""
    if values.ndim == 1:
        return values
    return pad(values, (*(0, 0) * (values.ndim - 2), 0, width - values.shape[1]))
