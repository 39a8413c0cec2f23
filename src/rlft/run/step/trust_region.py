"""The step of an objective with a trust region: it moves the policy's weights in place of the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlft import trust_region
from rlft.config import ConfigError
from rlft.models import fisher
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["TrustStep"]


class TrustStep:
    """Natural-gradient steps of the policy's trainable weights; a critic is left to the optimizer.

    Sums run over all micro-batches and processes, so the split changes nothing. Between steps it holds nothing, and so
    has no place in a checkpoint.

    Args:
        trainer: the run; its objective has a trust region.

    Raises:
        ConfigError: for a policy that cannot be differentiated twice, or weights that are sharded.
    """

    def __init__(self, trainer: Trainer) -> None:
        from accelerate.utils import DistributedType

        region = trainer.objective.trust_region
        assert region is not None
        name = trainer.objective.name
        if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ConfigError(
                f"objective {name!r} needs whole weights on every process; launch without FSDP and DeepSpeed "
                f"(configs/accelerate/ddp.yaml)"
            )
        if why := fisher.why_not(trainer.policy):
            raise ConfigError(f"objective {name!r} cannot take its step: {why}")
        self.trainer, self.region = trainer, region
        critic = trainer.policy.critic
        self.of_critic = [] if critic is None else [p for p in critic.parameters() if p.requires_grad]
        others = {id(p) for p in self.of_critic}
        self.weights = [p for p in trainer.policy.parameters() if p.requires_grad and id(p) not in others]
        self.batches: list[Batch] = []
        self.old: list[fisher.Remembered] = []

    # -- before the gradient ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def begin(self, micro_batches: list[Batch]) -> list[Batch]:
        """Note the policy that the step starts from; its log-probs go into the batches, where they are not yet.

        Args:
            micro_batches: of this step, on the device.
        """
        trainer = self.trainer
        self.objective = trainer.objective.without_values()  # of this step: a controller may have moved beta
        logps = [None if b.old_logps is not None else trainer.forward(b, frozenset({"logps"})) for b in micro_batches]
        self.batches = [
            b if new is None else b.replace(old_logps=new["logps"]) for b, new in zip(micro_batches, logps, strict=True)
        ]
        counts = torch.stack([self.objective.denominators(b) for b in self.batches]).sum(0)
        tokens = torch.tensor([float(sum(int(b.mask.sum()) for b in self.batches))], dtype=torch.float64)
        both = self._over_processes(torch.cat([counts.cpu().double(), tokens]).to(trainer.device)).cpu()
        self.counts, self.tokens = both[:-1], float(both[-1])
        self.old = fisher.remember(trainer.policy, self.batches)
        self.before = self._loss()
        return self.batches

    # -- after it -------------------------------------------------------------------------------------------------------
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
            self.trainer.metrics.add(f"trust_region/{name}", float(value))
        for p in self.weights:
            p.grad = None
        limit = self.trainer.config.max_grad_norm
        if self.of_critic and limit is not None:
            nn.utils.clip_grad_norm_(self.of_critic, limit)
        self.batches, self.old = [], []

    def _fisher(self) -> trust_region.Product:
        """``v -> F v``. The graph of a single micro-batch is kept for all products; several are built anew each time."""
        temperature = self.trainer.scoring_temperature

        def linearised(batch: Batch) -> fisher.PolicyFisher:
            return fisher.PolicyFisher(self.trainer.policy, batch, self.weights, temperature=temperature)

        kept = linearised(self.batches[0]) if len(self.batches) == 1 else None

        def product(vector: Tensor) -> Tensor:
            tangents = trust_region.unflatten(vector, self.weights)
            total = torch.zeros_like(vector)
            for batch in self.batches:
                total += trust_region.flatten((kept or linearised(batch))(tangents))
            return self._over_processes(total) / self.tokens

        return product

    # -- what is measured -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _kl(self) -> float:
        """Mean exact KL(old || new) per token that counts."""
        trainer = self.trainer
        total = torch.zeros((), dtype=torch.float64, device=trainer.device)
        for old, batch in zip(self.old, self.batches, strict=True):
            kl = fisher.kl_from(old, trainer.policy, batch, temperature=trainer.scoring_temperature)
            total += kl.where(batch.mask, 0.0).double().sum()
        return float(self._over_processes(total)) / self.tokens

    @torch.no_grad()
    def _loss(self) -> float:
        """The policy's part of the loss; infinite where a ratio overflows."""
        total = torch.zeros((), dtype=torch.float64, device=self.trainer.device)
        for batch in self.batches:
            wanted = self.objective.forward_needs - ({"ref_logps"} if batch.ref_logps is not None else set())
            outputs = self.trainer.forward(batch, wanted)  # a collective where processes share buffers: never skipped
            try:
                total += self.objective.compute(outputs, batch, self.counts)[0].double()
            except ValueError:
                total += float("inf")
        return float(self._over_processes(total))

    def _over_processes(self, values: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(values, reduction="sum")
