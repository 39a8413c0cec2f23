"""The picture: how far each way to learn is from pi* as it goes on, with exact expected gradients."""

from __future__ import annotations

from io import BytesIO

import torch
from torch import Tensor

from benchmarks.worlds.field import Field
from benchmarks.worlds.problem import F64, Problem
from benchmarks.worlds.rows import Row
from rlft.report import curves as _curves

__all__ = ["COMPARED", "TIMES", "curve", "draw"]

#: What is compared: label -> objective. The policy gradient charges the exact KL of every position, or k3 of the samples.
COMPARED: dict[str, Row] = {
    "AGRO, off-policy": Row("agro_off_policy"),
    "policy gradient, exact KL in the loss": Row("kl_policy_gradient_exact"),
    "policy gradient, k3 in the loss": Row("kl_policy_gradient", {"kl_gradient": "k3"}),
}
FLOOR = 1e-13
#: Learning rate times updates at which the distance is taken, evenly in the logarithm.
TIMES = tuple(0.1 * 1.15**k for k in range(100))


def curve(problem: Problem, row: Row, behaviour: Tensor | None, times: tuple[float, ...] = TIMES) -> dict[float, float]:
    """KL(pi || pi*) over its start, along gradient descent with small steps (gradient flow) from the reference.

    Each step solves the flow exactly for the field linearised where the step begins.
    """
    flow = Field(problem, row, behaviour)
    x, now, found = flow.start(problem.ref), 0.0, {}
    start = problem.world.kl(problem.ref, problem.best)
    for time in times:
        slope, matrix = flow.linearise(x)
        linear = torch.zeros(x.numel() + 1, x.numel() + 1, dtype=F64)
        linear[:-1, :-1], linear[:-1, -1] = matrix + flow.free(), slope
        x, now = x + torch.linalg.matrix_exp(-(time - now) * linear)[:-1, -1], time
        found[time] = (problem.world.kl(flow.table(x), problem.best) / start).abs().item()
    return found


def _above_rounding(points: dict[float, float]) -> dict[float, float]:
    """A curve until it meets the floor: what follows is rounding error, and a flat line would look like a rest."""
    shown = {}
    for time, value in points.items():
        shown[time] = max(value, FLOOR)
        if value <= FLOOR:
            break
    return shown


def draw(panels: dict[str, dict[str, dict[float, float]]]) -> bytes:
    """PNG of one panel for each way to sample: a line per objective.

    Args:
        panels: title -> label -> curve.
    """
    matplotlib = _curves._matplotlib()
    with matplotlib.rc_context(_curves._STYLE):
        columns, width, height = 3, 10.2, 6.0
        figure = matplotlib.figure.Figure(figsize=(width, height))
        lines = -(-len(panels) // columns)
        handles = {}
        for index, (title, curves) in enumerate(panels.items()):
            row, column = divmod(index, columns)
            left, bottom = 0.075 + column * 0.312, 0.085 + (lines - 1 - row) * 0.455
            axis = figure.add_axes((left, bottom, 0.285, 0.34))
            for place, (label, points) in enumerate(curves.items()):
                shown = _above_rounding(points)
                (handles[label],) = axis.plot(
                    list(shown),
                    list(shown.values()),
                    color=_curves.COLOURS[place],
                    ls=_curves._DASHES[place],
                    lw=1.8,
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(FLOOR, 20)
            axis.set_xlim(min(TIMES), max(TIMES))
            axis.set_xticks([1, 1e2, 1e4])
            axis.set_yticks([1e-12, 1e-8, 1e-4, 1])
            axis.axhline(1e-8, color="#8c959f", lw=0.8, ls=(0, (2, 2)))
            axis.set_title(title, pad=6)
            if column:
                axis.set_yticklabels([])
            else:
                axis.set_ylabel("KL(π‖π*) / its start")
            if row == lines - 1:
                axis.set_xlabel("learning rate × updates")
            axis.minorticks_off()
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="upper left",
            bbox_to_anchor=(0.065, 0.998),
            ncols=3,
            fontsize=9,
            handlelength=2.6,
        )
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=_curves.DPI, metadata={"Software": None})
        return buffer.getvalue()
