"""From a batch to the constants that an objective needs before its forward pass, each in as few passes as can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlft import reduce
from rlft._terms import BEHAVIOUR, MOMENTS, REFERENCE
from rlft.errors import TrainingError
from rlft.run.processes import processes as meeting
from rlft.run.step import kl_control as controllers
from rlft.run.step import micro_batches as micro
from rlft.run.step import old_logps as _old_logps
from rlft.run.step import update as guard
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["fill_constants", "mask_only", "no_grad_outputs", "prepared"]

#: Outputs of a forward pass that come from the reference's trunk.
_OF_REFERENCE = REFERENCE | {"ref_states"}


def prepared(trainer: Trainer, batch: Batch) -> Batch:
    """What must be known before the first forward pass: old and reference log-probs, values, advantages.

    Where advantages come from the rewards alone and rows with advantage 0 are left out of the update, they are computed
    first, and those rows are in no pass at all.
    """
    objective, everyone = trainer.objective, meeting.everyone(trainer)
    before = objective.kl == "reward" and objective.beta > 0
    if before or objective.advantage == "gae" or not micro.drops_zero_advantages(trainer):
        return objective.prepare(fill_constants(trainer, batch), everyone)
    return fill_constants(trainer, objective.prepare(batch, everyone))


def fill_constants(trainer: Trainer, batch: Batch, *, alone: bool = False) -> Batch:
    """Old and reference log-probs, values and the KTO baseline, each only where something needs it before the forward.

    With one optimizer step per generation the policy that sampled is the policy that is trained: old log-probs are the
    forward pass's own, and the reference is scored inside it. No pass is spent twice.

    Args:
        trainer: the run.
        batch: with rewards, where the objective needs some.
        alone: do not wait for other processes, which in an evaluation may have fewer batches.
    """
    objective = trainer.objective
    in_reward = objective.kl == "reward" and objective.beta > 0
    reused = trainer.plan.updates_per_generation > 1
    noted = batch.extras.get("sampler_logps")
    if noted is not None and "sampler_logps" not in objective.needs:
        batch = batch.replace(extras={name: t for name, t in batch.extras.items() if name != "sampler_logps"})
    repeated = trainer.online and trainer.config.num_iterations > 1
    exact = bool(objective.needs & {"token_kl", *MOMENTS})  # of the reference's whole distribution
    want = set()
    # the reference's trunk runs once: before the forward pass, or in it, where its hidden states are needed and not kept
    if "ref_logps" in objective.needs and batch.ref_logps is None and (in_reward or (repeated if exact else reused)):
        want.add("ref_logps")
    if batch.old_logps is None and (in_reward or ("old_logps" in objective.needs and reused)):
        if noted is not None and _old_logps.trusted(trainer):
            batch = batch.replace(old_logps=noted)
        else:
            want.add("logps")
    if exact and batch.ref_states is None and (in_reward or repeated):
        want.add("ref_states")
    if BEHAVIOUR & objective.needs and batch.behaviour_states is None and repeated:
        want.add("states")  # of the policy that sampled, which at this moment is the policy
    if objective.advantage == "gae":
        want.add("values")
    if want:
        compared = "logps" in want and noted is not None and _old_logps.of_sampler(trainer)
        with trainer.meter.phase("reference"):
            outputs = no_grad_outputs(trainer, batch, frozenset(want), everything=compared, alone=alone)
        names = {"logps": "old_logps", "states": "behaviour_states"}
        batch = batch.replace(**{names.get(name, name): values for name, values in outputs.items()})
        if compared:
            assert noted is not None
            if _old_logps.agree(trainer, batch, outputs["logps"], noted):
                batch = batch.replace(old_logps=noted)  # from the first generation on, so that all are made alike
    if in_reward:
        controllers.observe_reward(trainer, batch)
    if reused and BEHAVIOUR & objective.needs:
        trainer.policy.remember_behaviour()
    if "kl_baseline" in objective.needs:
        baseline = _kto_baseline(trainer, batch, alone=alone or trainer.world_size == 1)
        batch = batch.replace(extras={**batch.extras, "kl_baseline": baseline.expand(batch.num_rows).contiguous()})
    return batch


@torch.no_grad()
def no_grad_outputs(
    trainer: Trainer, batch: Batch, want: frozenset[str], *, everything: bool = False, alone: bool = False
) -> dict[str, Tensor]:
    """The model's outputs, in passes no larger than a micro-batch, each ``[B, T]`` (scores ``[B]``), in the batch's order.

    Args:
        trainer: the run.
        batch: any batch.
        want: which outputs, see :class:`rlft.models.Policy`.
        everything: every token of every row. Else tokens outside ``mask`` and rows that nothing reads are left 0.
        alone: no process waits for another, see :func:`rlft.run.step.micro_batches.without_gradient`.
    """
    width = batch.completion_ids.shape[1]
    rows = torch.arange(batch.num_rows) if everything else _read(trainer, batch)
    chosen = batch if len(rows) == batch.num_rows else batch.select(rows)
    wish = frozenset() if everything or "values" in want else mask_only(chosen)
    pieces = micro.without_gradient(trainer, chosen, alone=alone)
    outputs: dict[str, Tensor] = {}
    for turn in range(_turns(trainer, len(pieces), alone=alone)):
        trainer.poll()
        piece = pieces[min(turn, len(pieces) - 1)]
        for name, values in trainer.forward(chosen.select(piece).to(trainer.device), want | wish).items():
            wide = _widened(values, width).to(batch.device)
            if name not in outputs:
                outputs[name] = wide.new_zeros((batch.num_rows, *wide.shape[1:]))
            outputs[name][rows[piece].to(batch.device)] = wide
        of_both = bool(want & _OF_REFERENCE and want - _OF_REFERENCE)
        trainer.meter.passed(trainer.policy.layout_used, passes=1 + of_both)
    return outputs


def _read(trainer: Trainer, batch: Batch) -> Tensor:
    """Rows that something reads; one where there is none, since sharded processes pass through the model together."""
    rows = (~micro.unread(trainer, batch)).nonzero()[:, 0].cpu()
    return rows if len(rows) else batch.completion_mask.sum(-1).argmin()[None].cpu()


def mask_only(batch: Batch) -> frozenset[str]:
    """The wish of :class:`rlft.models.Policy` that keeps tokens outside the mask from the head, where there are some."""
    outside, inside = torch.stack([(batch.completion_mask & ~batch.mask).any(), batch.mask.any()]).tolist()
    return frozenset({"mask_only"}) if outside and inside else frozenset()


def _turns(trainer: Trainer, pieces: int, *, alone: bool) -> int:
    """Passes of this process: as many as any other makes, where they wait for each other."""
    if alone or trainer.world_size == 1 or not guard.sharded(trainer):
        return pieces
    counts = trainer.accelerator.gather(torch.tensor([pieces], device=trainer.device))
    return int(counts.max())


def _widened(values: Tensor, width: int) -> Tensor:
    """``[B]`` as it is, ``[B, T]`` or ``[B, T, D]`` with T made ``width``."""
    if values.ndim == 1:
        return values
    return pad(values, (*(0, 0) * (values.ndim - 2), 0, width - values.shape[1]))


def _kto_baseline(trainer: Trainer, batch: Batch, *, alone: bool) -> Tensor:
    """KTO's z0: mean log-ratio of mismatched pairs (answer i, prompt i+1) of the step, one number for all processes.

    The prompt after the last one is the next process's first: the pairs do not depend on how many processes there are.
    """
    if alone and batch.num_groups < 2:
        raise TrainingError("KTO compares answers with other prompts: give it at least 2 examples per step")
    prompts, masks = (batch.prompt_ids, batch.prompt_mask) if alone else _with_next_prompt(trainer, batch)
    mismatched = batch.replace(
        prompt_ids=prompts, prompt_mask=masks, group_ids=(batch.group_ids + 1) % len(prompts), extras={}
    )
    outputs = no_grad_outputs(trainer, mismatched, frozenset({"logps", "ref_logps"}), alone=alone)
    log_ratio = reduce.sequence_sum(outputs["logps"] - outputs["ref_logps"], batch.mask)
    alive = batch.mask.any(-1)
    both = torch.stack([log_ratio.where(alive, 0.0).sum().double(), alive.sum().double()]).to(trainer.device)
    if not alone:
        both = trainer.accelerator.reduce(both, reduction="sum")
    return (both[0] / both[1].clamp(min=1)).clamp(min=0).to(log_ratio.dtype).to(batch.device)


def _with_next_prompt(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Prompts of this process and the first one of the next process, ``[G + 1, L]`` and its mask."""
    pads = trainer.accelerator.pad_across_processes
    first = torch.stack([batch.prompt_ids[0], batch.prompt_mask[0].long()])[None].to(trainer.device)
    every = trainer.accelerator.gather(pads(first, dim=2)).to(batch.device)
    ids, mask = every[(trainer.rank + 1) % trainer.world_size]
    wider = ids.shape[0] - batch.prompt_ids.shape[1]
    return (
        torch.cat([pad(batch.prompt_ids, (0, wider)), ids[None]]),
        torch.cat([pad(batch.prompt_mask, (0, wider), value=False), mask[None].bool()]),
    )
