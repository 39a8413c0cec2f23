"""Trust-region steps on exact gradients: where they lead. Their length does not shrink, so they may go on for ever."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.worlds.field import Field
from rlft.trust_region import softmax_fisher, trust_region_step

__all__ = ["step_on"]


def step_on(flow: Field, limit: float, *, steps: int = 250, last: int = 50) -> tuple[Tensor, Tensor, bool, str]:
    """Steps of :func:`rlft.trust_region.trust_region_step` from the reference, each on the expected gradient.

    Args:
        flow: the field of an objective with a trust region.
        limit: logits that differ by more nats run off.
        steps: at most so many.
        last: of so many steps at the end, the policy farthest from the optimum is returned.

    Returns:
        The state, its gradient, True, and ``"runs off"``, ``"no step"`` (the line search finds none that is better) or
        ``"steps on"``.
    """
    region, world, behaviour = flow.objective.trust_region, flow.problem.world, flow.behaviour
    assert region is not None
    logits = flow.problem.ref.clone()
    slope = torch.zeros(flow.cells)
    passed: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        old = logits.clone()
        flow.behaviour = old if behaviour is None else behaviour
        slope = flow(old.flatten()[None])[0]
        visits = torch.zeros(world.num_states, dtype=old.dtype)
        chances = world.answer_logps(flow.behaviour).exp()[:, None].expand_as(world.mask)
        visits = visits.index_add(0, world.states[world.mask], chances[world.mask])
        visits = visits / visits.sum()  # the share of tokens that each prefix gets

        def kl(old: Tensor = old, visits: Tensor = visits) -> float:
            before = old.log_softmax(-1)
            return (visits * (before.exp() * (before - logits.log_softmax(-1))).sum(-1)).sum().item()

        def loss() -> float:
            x = logits.flatten()[None]
            weights = flow.weights(x)
            return (weights * flow.losses(x, weights)).sum().item()

        def product(v: Tensor, old: Tensor = old, visits: Tensor = visits) -> Tensor:
            return softmax_fisher(old, v.reshape(old.shape), visits).flatten()

        done = trust_region_step([logits], slope, product, kl=kl, loss=loss, before=loss(), region=region)
        if (logits.amax(-1) - logits.amin(-1)).max() > limit:
            return logits.flatten(), slope, True, "runs off"
        if not done.accepted:
            return logits.flatten(), slope, True, "no step"
        passed.append((logits.clone(), slope))
    found, slope = max(passed[-last:], key=lambda one: world.kl(one[0], flow.problem.best).item())
    return found.flatten(), slope, True, "steps on"
