"""What holds for every objective whatever its formula: masked slots change nothing, and neither does a split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.objective import Objective
from rlft.types import Batch, LossOutput
from tests.proofs.proof import Row, build
from tests.proofs.scene import Scene

#: What is put where nothing counts: numbers, and what no sum survives.
GARBAGE = ("random", 1e4, math.inf, -math.inf, math.nan)


def _graded(
    objective: Objective, batch: Batch, outputs: dict[str, Tensor]
) -> tuple[Tensor, list[LossOutput], dict[str, Tensor]]:
    """Loss, every term's output, and the gradient of every output of the forward pass."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in outputs.items()}
    prepared = objective.prepare(batch)
    loss, results = objective.compute(leaves, prepared, objective.denominators(prepared))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = {n: torch.zeros_like(t) for n, t in leaves.items()}
    return loss.detach(), results, {n: zeros[n] if g is None else g for n, g in zip(leaves, found, strict=True)}


def _unused(objective: Objective, batch: Batch) -> Tensor:
    """``[B, T]`` slots that do not count: masked ones, and all of a row that has no reward where one is needed."""
    unused = ~batch.mask
    if objective.needs_rewards and batch.rewards is not None:
        unused = unused | batch.rewards.isnan()[:, None]
    return unused


def garbled(objective: Objective, scene: Scene, garbage: float | str) -> tuple[Batch, dict[str, Tensor]]:
    """The scene with garbage wherever nothing counts: tokens, and the numbers of blank rows."""
    b, unused = scene.batch, _unused(objective, scene.batch)
    blank = ~b.mask.any(-1)
    generator = torch.Generator().manual_seed(7)
    #: V(x) is the value before the first token, whether or not that token counts.
    starts = any("start_values" in term.sources for term in objective.terms)

    def change(name: str, t: Tensor) -> Tensor:
        if name == "labels":
            return t ^ blank
        if not t.is_floating_point() or t.shape not in (unused.shape, blank.shape):
            return t
        where = (unused if t.shape == unused.shape else blank).clone()
        if name == "values" and starts:
            where[:, 0] = blank
        noise = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        return torch.where(where, noise if garbage == "random" else torch.full_like(t, float(garbage)), t)

    fields = {
        n: t for n, t in b.tensors().items() if not n.startswith(("prompt", "extras.", "completion", "mask", "group"))
    }
    batch = replace(
        b, **{n: change(n, t) for n, t in fields.items()}, extras={n: change(n, t) for n, t in b.extras.items()}
    )
    return batch, {n: change(n, t.detach()) for n, t in scene.outputs.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def check_masks(proved: Row, hyper: dict[str, Any]) -> int:
    """Garbage changes no bit of loss, metrics and gradient, and has no gradient; returns how many kinds were tried."""
    objective, scene = build(proved.name, **hyper), proved.scene(0)
    unused = _unused(objective, scene.batch)
    assert bool(unused.any()), "the scene has no slot that does not count"
    clean: tuple[Tensor, list[LossOutput], dict[str, Tensor]] | None = None
    for garbage in (-1.0, *GARBAGE):
        found = _graded(objective, *garbled(objective, scene, garbage))
        clean = clean or found
        where = f"{proved.name} {hyper} with {garbage} where nothing counts"
        assert _same(found[0], clean[0]), f"{where}: the loss is {found[0]}, not {clean[0]}"
        for term, mine, other in zip(objective.terms, found[1], clean[1], strict=True):
            assert term.per_pair or bool((mine.loss[~mine.counted] == 0).all()), f"{where}: a masked entry has a loss"
            assert _same(mine.loss.detach(), other.loss.detach()), f"{where}: an entry of the loss moves"
            assert mine.metrics.keys() == other.metrics.keys()
            for name in mine.metrics:
                assert _same(mine.metrics[name], other.metrics[name]), f"{where}: metric {name} moves"
        for name, slope in found[2].items():
            assert _same(slope, clean[2][name]), f"{where}: the gradient of {name} moves"
            assert bool(slope.isfinite().all()), f"{where}: the gradient of {name} is not finite"
            if slope.shape == unused.shape and name != "values":
                assert bool((slope[unused] == 0).all()), f"{where}: {name} has a gradient there"
    return len(GARBAGE)


def check_blank_rows(proved: Row, hyper: dict[str, Any]) -> float:
    """A batch without the rows that count nowhere is the same batch; returns how far it is off, relative."""
    objective, scene = build(proved.name, **hyper), proved.scene(0)
    counts = objective.prepare(scene.batch).mask.any(-1)
    if objective.needs_pairs:
        counts = counts.reshape(-1, 2).all(-1).repeat_interleave(2)
    _, group_ids = torch.unique(scene.batch.group_ids[counts], return_inverse=True)
    fewer = scene.take(counts.nonzero().flatten()).regrouped(group_ids)
    whole, _, slopes = _graded(objective, scene.batch, dict(scene.outputs))
    value, _, found = _graded(objective, fewer.batch, dict(fewer.outputs))
    scale = max(float(g.abs().max()) for g in slopes.values())
    gradient = max(float((found[n] - slopes[n][counts]).abs().max()) for n in slopes) / scale
    error = max(gradient, abs(float(value - whole)) / max(1.0, abs(float(whole))))
    where = f"{proved.name} {hyper}"
    assert all(not bool(g[~counts].any()) for g in slopes.values()), (
        f"{where}: a row that counts nowhere has a gradient"
    )
    assert error <= 1e-13, f"{where}: rows that count nowhere move it by {error:.3g}"
    return error


# -- splits -----------------------------------------------------------------------------------------------------------
def splits(scene: Scene) -> list[list[Tensor]]:
    """Ways to cut a step into micro-batches of whole groups: each alone, backwards, two unequal parts."""
    ids = scene.batch.group_ids
    members = [(ids == g).nonzero().flatten() for g in ids.unique()]
    return [members, members[::-1], [torch.cat(members[1:]), members[0]]]


def _pieces(objective: Objective, scene: Scene, parts: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and gradient, a micro-batch at a time, over the counts of all of them."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in scene.outputs.items()}
    prepared = objective.prepare(scene.batch)
    batches = [prepared.select(rows) for rows in parts]
    counts = torch.stack([objective.denominators(batch) for batch in batches]).sum(0)
    total = 0.0
    for rows, batch in zip(parts, batches, strict=True):
        width = batch.completion_ids.shape[1]
        mine = {n: t[rows][:, :width] if t.ndim > 1 else t[rows] for n, t in leaves.items()}
        loss, _ = objective.compute(mine, batch, counts)
        total += float(loss.detach())
        if loss.requires_grad:
            loss.backward()
    return total, {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def split_error(proved: Row, hyper: dict[str, Any]) -> float:
    """How far a split moves value and gradient, relative; over a few splits."""
    objective, scene = build(proved.name, **hyper), proved.scene(0)
    whole, slopes = _pieces(objective, scene, [torch.arange(scene.batch.num_rows)])
    scale = max(float(g.abs().max()) for g in slopes.values())
    assert scale > 1e-4
    worst = 0.0
    for parts in splits(scene):
        value, found = _pieces(objective, scene, parts)
        gradient = max(float((found[n] - slopes[n]).abs().max()) for n in slopes) / scale
        worst = max(worst, gradient, abs(value - whole) / max(1.0, abs(whole)))
    return worst


def check_split(proved: Row, hyper: dict[str, Any]) -> float | None:
    """No split moves anything; or the objective says that it couples rows, and a split does (then None)."""
    error = split_error(proved, hyper)
    if build(proved.name, **hyper).couples_rows:
        assert error > 1e-3, f"{proved.name} says that it couples rows, and a split changes nothing"
        return None
    assert error <= 1e-12, f"{proved.name} {hyper}: a split into micro-batches moves it by {error:.3g}"
    return error
