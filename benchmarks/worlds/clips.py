"""Descent where clipped ratios make the expected gradient jump: the policy slides along the jump, and may rest on it.

A clipped ratio pushes the policy on one side of its bound and leaves it alone (or pushes it back) on the other. Where both sides lead
to the bound, the policy stays on it and moves along it, with a share of both gradients that keeps it there (Filippov's
solution). The jump is a multiple of the gradient of that log-ratio, so the share is a Lagrange multiplier: implicit Euler steps
become steps of Newton's method with equality constraints, and ratios join and leave them as the multipliers say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.worlds.field import Field
from benchmarks.worlds.problem import F64

__all__ = ["slide"]

#: Steps of the finite differences, and by how much a ratio is put past its bound while they are taken.
_STEP, _MARGIN = 1e-7, 1e-6
#: Below this a difference over two margins is no jump.
_NO_JUMP = 1e-5
#: A ratio that moves by less nats in a step does not.
_STILL = 1e-9


@dataclass(frozen=True)
class _Units:
    """The log-ratios that an objective clips.

    Attributes:
        parts: ``[U, S V]`` each as a sum over cells of ``log pi - log mu``.
        spread: ``[U, N, T]`` what to add to the log-ratios of tokens to raise that of the unit by one.
        low: lower bound, nats.
        high: upper bound, nats.
    """

    parts: Tensor
    spread: Tensor
    low: float
    high: float

    @staticmethod
    def of(flow: Field) -> _Units:
        """Tokens, or answers by the sum or the mean of theirs, as the row says."""
        world, hyper = flow.problem.world, flow.objective.terms[0].hyper
        above = hyper.get("clip_eps_high")
        high = torch.tensor(1 + (hyper["clip_eps"] if above is None else above), dtype=F64).log().item()
        low = torch.tensor(1 - hyper["clip_eps"], dtype=F64).log().item()
        cells = torch.nn.functional.one_hot(world.states * world.vocab + world.tokens, flow.cells).to(F64)
        cells = cells.where(world.mask[..., None], 0.0)  # [N, T, S V]
        if flow.row.clip == "token":
            return _Units(torch.eye(flow.cells, dtype=F64), cells.permute(2, 0, 1), low, high)
        length = world.mask.sum(-1).to(F64)[:, None]
        mine = torch.eye(world.num_answers, dtype=F64)[:, :, None] * world.mask
        if flow.row.clip == "sum":
            return _Units(cells.sum(1), mine / length, low, high)
        return _Units(cells.sum(1) / length, mine, low, high)

    def at(self, logits: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor]:
        """Log-ratio ``[U]`` of every unit, and its derivative in the logits ``[U, S V]``."""
        logp = logits.log_softmax(-1)
        per_state = self.parts.reshape(len(self.parts), *logits.shape).sum(-1, keepdim=True)
        slopes = self.parts - (per_state * logp.exp()).flatten(1)
        return self.parts @ (logp - behaviour.log_softmax(-1)).flatten(), slopes

    def bend(self, logits: Tensor, forces: Tensor) -> Tensor:
        """Second derivative ``[S V, S V]`` of ``sum_u forces_u log-ratio_u``."""
        p = logits.softmax(-1)
        mass = (forces @ self.parts).reshape(logits.shape).sum(-1)
        return torch.block_diag(*(-m * (row.diag() - row.outer(row)) for m, row in zip(mass, p, strict=True)))

    def project(self, logits: Tensor, behaviour: Tensor, held: dict[int, int]) -> Tensor:
        """The nearest logits at which the held ratios are at their bounds."""
        names = list(held)
        bounds = torch.tensor([self.high if held[u] > 0 else self.low for u in names], dtype=F64)
        for _ in range(5):
            ratios, slopes = self.at(logits, behaviour)
            logits = logits - (torch.linalg.pinv(slopes[names]) @ (ratios[names] - bounds)).reshape(logits.shape)
        return logits

    def nudge(self, ratios: Tensor, side: Tensor) -> Tensor:
        """``[U]`` what puts each log-ratio on its side, past the bound by a margin: -1 below, 0 between, 1 above."""
        low = torch.full_like(ratios, self.low + _MARGIN).where(side == 0, -torch.inf)
        low = torch.full_like(ratios, self.high + _MARGIN).where(side == 1, low)
        high = torch.full_like(ratios, self.high - _MARGIN).where(side == 0, torch.inf)
        high = torch.full_like(ratios, self.low - _MARGIN).where(side == -1, high)
        return ratios.clamp(low, high) - ratios


def slide(flow: Field, limit: float, steps: int) -> tuple[Tensor, Tensor, bool, str]:
    """Follow the expected gradient downhill from the reference, along the bounds of ratios where it meets them.

    Args:
        flow: the field; answers come from a policy that stays.
        limit: logits that differ by more nats run off.
        steps: at most so many.

    Returns:
        The state, what is left of the gradient there, whether every direction along the bounds contracts, and
        ``"rest"``, ``"clip"``, ``"runs off"`` or ``"unsettled"``.
    """
    behaviour = flow.behaviour
    assert behaviour is not None
    units, x, dt = _Units.of(flow), flow.start(flow.problem.ref), 1.0
    ratios, _ = units.at(flow.table(x), behaviour)
    side = (ratios > units.high).long() - (ratios < units.low).long()
    held: dict[int, int] = {}  # unit -> the bound it is held at, -1 or 1; its side is then 0
    origin: dict[int, int] = {}  # unit -> the side it came from
    forces = torch.zeros(len(ratios), dtype=F64)
    eye, free, zeros = torch.eye(x.numel(), dtype=F64), flow.free(), torch.zeros(x.numel() - flow.cells, dtype=F64)
    moves = flow.directions()
    how, left, matrix, rows = "unsettled", x, eye, torch.zeros(0, x.numel(), dtype=F64)
    for _ in range(steps):
        ratios, slopes = units.at(flow.table(x), behaviour)
        slopes = torch.cat([slopes, zeros.expand(len(slopes), -1)], -1)
        names = list(held)
        over = torch.zeros(len(names), len(ratios), dtype=torch.long)
        for k, unit in enumerate(names):
            over[k, unit] = held[unit]
        sides = torch.cat([side.expand(1 + len(moves), -1), side + over])
        places = torch.cat([x[None], x + _STEP * moves, x.expand(len(names), -1)])
        nudges = torch.stack([units.nudge(ratios, one) for one in (sides[0], *sides[1 + len(moves) :])])
        nudges = torch.cat([nudges[:1].expand(1 + len(moves), -1), nudges[1:]])
        found = flow(places, -torch.einsum("ku,unt->knt", nudges, units.spread))
        slope, matrix = found[0], flow.whole((found[1 : 1 + len(moves)] - found[0]).T / _STEP)
        matrix[: flow.cells, : flow.cells] += units.bend(flow.table(x), forces)
        rows = slopes[names]
        jumps = ((found[1 + len(moves) :] - slope) * rows).sum(-1) / rows.square().sum(-1)
        left = slope + forces @ slopes
        if left.abs().max() < 1e-8:
            how = "clip" if names else "rest"
            break
        move, pull = _newton(matrix + free, rows, slope, dt)
        longest = 0.1 if left.abs().max() > 1e-5 else 0.5  # what moves last goes to infinity
        while move.abs().max() > longest:
            dt /= 2
            move, pull = _newton(matrix + free, rows, slope, dt)
        released = _released(pull, jumps)
        if released is not None:
            k, outward = released
            bound = held.pop(names[k])
            across = 0 if origin[names[k]] else bound
            side[names[k]] = across if outward is None else bound if outward else 0
            forces[names[k]] = 0.0
            continue
        forces = torch.zeros_like(forces).index_copy(0, torch.tensor(names, dtype=torch.long), pull)
        fraction, unit, bound = _first_met(ratios, slopes @ move, side, held, units)
        if fraction < 1e-9:  # to and fro at a bound: the step is too long for the two sides to agree
            dt /= 4
        x = x + fraction * move
        if unit is not None:
            held[unit], origin[unit], side[unit] = bound, int(side[unit]), 0
        else:
            dt = min(2 * dt, 1e12)
        x = torch.cat([units.project(flow.table(x), behaviour, held).flatten(), x[flow.cells :]])
        if (flow.table(x).amax(-1) - flow.table(x).amin(-1)).max() > limit:
            how = "runs off"
            break
    along = torch.linalg.svd(rows, full_matrices=True)[2][len(rows) :] if len(rows) else eye
    stable = torch.linalg.eigvals(along @ (matrix + free) @ along.T).real.min().item() > -1e-6
    return x, left, stable, how


def _newton(matrix: Tensor, rows: Tensor, slope: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """The move that solves ``(1 / dt + matrix) move + rows' pull = -slope`` with ``rows move = 0``, and the pull."""
    count, size = len(rows), len(slope)
    system = torch.zeros(size + count, size + count, dtype=F64)
    scale = min(dt, 1.0)  # keeps both halves of one size, or the least squares drop one
    system[:size, :size] = scale * (torch.eye(size, dtype=F64) / dt + matrix)
    system[:size, size:], system[size:, :size] = rows.T, rows
    right = torch.cat([-scale * slope, torch.zeros(count, dtype=F64)])
    solved = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0]
    return solved[:size], solved[size:] / scale


def _released(pull: Tensor, jumps: Tensor) -> tuple[int, bool | None] | None:
    """The ratio that its bound holds least, and whether it leaves outward; None where all are held.

    Outward is None where nothing jumps, and the ratio goes on the way it came.
    """
    if not len(pull):
        return None
    smooth = jumps.abs() < _NO_JUMP
    share = pull / jumps.where(~smooth, 1.0)  # 0: the inner gradient alone, 1: the outer
    excess = torch.maximum(share - 1, -share).where(~smooth, torch.inf)
    k = int(excess.argmax())
    if excess[k] < 1e-6:
        return None
    return k, None if smooth[k] else bool(share[k] > 1)


def _first_met(
    ratios: Tensor, speeds: Tensor, side: Tensor, held: dict[int, int], units: _Units
) -> tuple[float, int | None, int]:
    """How much of a move can be made until a ratio meets a bound, which ratio, and which bound."""
    first: tuple[float, int | None, int] = (1.0, None, 0)
    for bound, place in ((1, units.high), (-1, units.low)):
        inside_out = (side == 0) & (bound * speeds > _STILL)
        outside_in = (side == bound) & (bound * speeds < -_STILL)
        for unit in (inside_out | outside_in).nonzero()[:, 0].tolist():
            if unit in held:
                continue
            fraction = max(0.0, ((place - ratios[unit]) / speeds[unit]).item())
            if fraction < first[0]:
                first = (fraction, unit, bound)
    return first
