"""The step of an objective with a trust region: it moves the policy's weights in place of the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlft import trust_region
from rlft.config import ConfigError
from rlft.models import fisher
from rlft.objective import Objective
from rlft.run.step.parts import Parts
from rlft.types import Batch

__all__ = ["TrustRegion"]


class TrustRegion:
    """Natural-gradient steps of the policy's trainable weights; a critic is left to the optimizer.

    Sums run over all micro-batches and processes, so the split changes nothing. Between steps it holds nothing, and so
    has no place in a checkpoint.

    Args:
        parts: of a run whose objective has a trust region.

    Raises:
        ConfigError: for a policy that cannot be differentiated twice, or weights that are sharded.
    """

    def __init__(self, parts: Parts) -> None:
        region, name, policy, processes = (
            parts.objective.trust_region,
            parts.objective.name,
            parts.policy,
            parts.processes,
        )
        assert region is not None
        if processes.sharded:
            raise ConfigError(
                f"objective {name!r} needs whole weights on every process; launch without FSDP and DeepSpeed "
                f"(configs/accelerate/ddp.yaml)"
            )
        if why := fisher.why_not(policy):
            raise ConfigError(f"objective {name!r} cannot take its step: {why}")
        self.policy, self.region, self.processes, self.journal = policy, region, processes, parts.journal
        self.stages, self.temperature, self.max_grad_norm = parts.stages, parts.temperature, parts.config.max_grad_norm
        critic = policy.critic
        self.of_critic = [] if critic is None else [p for p in critic.parameters() if p.requires_grad]
        others = {id(p) for p in self.of_critic}
        self.weights = [p for p in policy.parameters() if p.requires_grad and id(p) not in others]
        self.batches: list[Batch] = []
        self.old: list[fisher.Remembered] = []

    @torch.no_grad()
    def begin(self, micro_batches: list[Batch], objective: Objective) -> list[Batch]:
        """Note the policy that the step starts from; its log-probs go into the batches, where they are not yet.

        Args:
            micro_batches: of this step, on the device.
            objective: of this step: a controller may have moved beta.
        """
        self.objective = objective.without_values()
        logps = [
            None if b.old_logps is not None else self.stages.forward(b, frozenset({"logps"})) for b in micro_batches
        ]
        self.batches = [
            b if new is None else b.replace(old_logps=new["logps"]) for b, new in zip(micro_batches, logps, strict=True)
        ]
        counts = torch.stack([self.objective.denominators(b) for b in self.batches]).sum(0)
        tokens = torch.tensor([float(sum(int(b.mask.sum()) for b in self.batches))], dtype=torch.float64)
        both = self.processes.sum(torch.cat([counts.cpu().double(), tokens])).cpu()
        self.counts, self.tokens = both[:-1], float(both[-1])
        self.old = fisher.remember(self.policy, self.batches)
        self.before = self._loss()
        return self.batches

    def apply(self) -> None:
        """Take the step with the gradient that the backward passes left; only the critic's is left to the optimizer."""
        gradient = trust_region.flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights])
        done = trust_region.trust_region_step(
            self.weights,
            gradient,
            self._fisher(),
            kl=self._kl,
            loss=self._loss,
            before=self.before,
            region=self.region,
        )
        for name, value in done._asdict().items():
            self.journal.metrics.add(f"trust_region/{name}", float(value))
        for p in self.weights:
            p.grad = None
        if self.of_critic and self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.of_critic, self.max_grad_norm)
        self.batches, self.old = [], []

    def _fisher(self) -> trust_region.Product:
        """``v -> F v``. The graph of a single micro-batch is kept for all products; several are built anew each time."""

        def linearised(batch: Batch) -> fisher.PolicyFisher:
            return fisher.PolicyFisher(self.policy, batch, self.weights, temperature=self.temperature)

        kept = linearised(self.batches[0]) if len(self.batches) == 1 else None

        def product(vector: Tensor) -> Tensor:
            tangents = trust_region.unflatten(vector, self.weights)
            total = torch.zeros_like(vector)
            for batch in self.batches:
                total += trust_region.flatten((kept or linearised(batch))(tangents))
            return self.processes.sum(total) / self.tokens

        return product

    # -- what is measured -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _kl(self) -> float:
        """Mean exact KL(old || new) per token that counts."""
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for old, batch in zip(self.old, self.batches, strict=True):
            kl = fisher.kl_from(old, self.policy, batch, temperature=self.temperature)
            total += kl.where(batch.mask, 0.0).double().sum()
        return float(self.processes.sum(total)) / self.tokens

    @torch.no_grad()
    def _loss(self) -> float:
        """The policy's part of the loss; infinite where a ratio overflows."""
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for batch in self.batches:
            wanted = self.objective.forward_needs - ({"ref_logps"} if batch.ref_logps is not None else set())
            outputs = self.stages.forward(batch, wanted)  # a collective where processes share buffers: never skipped
            try:
                total += self.objective.compute(outputs, batch, self.counts)[0].double()
            except ValueError:
                total += float("inf")
        return float(self.processes.sum(total))
