"""Where the time of runs went, from their logs: shares per phase as bars and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlft.metrics import PHASES
from rlft.report.curves import _STYLE, COLOURS, Rows, _matplotlib, _png
from rlft.report.page import Table, make_table, number

__all__ = ["NAMES", "draw_shares", "phase_seconds", "share_table"]

_PREFIX = "meter/share/"
#: What a person reads for each phase.
NAMES = {
    "sample": "sampling",
    "reward": "rewards",
    "reference": "reference and old log-probs",
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
    "evaluate": "evaluation",
    "save": "saving",
    "other": "other",
}
_COLOUR = dict(zip(PHASES, (*COLOURS[:6], COLOURS[7], "#c9ced6"), strict=True))


def phase_seconds(rows: Rows) -> dict[str, float]:
    """Seconds of each phase over a run, from its logged shares; only phases that took any, in the order of a step."""
    spent = dict.fromkeys(PHASES, 0.0)
    for row in rows:
        seconds = row.get("meter/seconds")
        if isinstance(seconds, (int, float)) and math.isfinite(seconds):
            for name in PHASES:
                spent[name] += seconds * float(row.get(_PREFIX + name) or 0.0)
    return {name: value for name, value in spent.items() if value > 0}


def mean_seconds(seeds: Sequence[Rows]) -> dict[str, float]:
    """Mean over the seeds of a name."""
    each = [phase_seconds(rows) for rows in seeds]
    return {n: sum(one.get(n, 0.0) for one in each) / len(each) for n in PHASES if any(one.get(n) for one in each)}


def _spent(groups: Mapping[str, Sequence[Rows]]) -> dict[str, dict[str, float]]:
    """Mean seconds by phase of every name that logged any."""
    every = {name: mean_seconds(seeds) for name, seeds in groups.items()}
    return {name: seconds for name, seconds in every.items() if seconds}


def share_table(groups: Mapping[str, Sequence[Rows]]) -> Table | None:
    """Seconds and share of every phase, a column for each name; None when nothing was logged."""
    spent = _spent(groups)
    if not spent:
        return None
    phases = [phase for phase in PHASES if any(phase in seconds for seconds in spent.values())]
    body = [
        [NAMES[phase], *(_cell(seconds.get(phase, 0.0), sum(seconds.values())) for seconds in spent.values())]
        for phase in phases
    ]
    body.append(["together", *(f"{number(sum(seconds.values()), 3)} s" for seconds in spent.values())])
    return make_table(["", *(spent if len(spent) > 1 else ["time"])], body)


def _cell(seconds: float, together: float) -> str:
    return f"{number(seconds, 3)} s ({seconds / together:.1%})"


def draw_shares(groups: Mapping[str, Sequence[Rows]]) -> bytes | None:
    """PNG with one bar per name, cut into the shares of its phases; None when nothing was logged."""
    spent = _spent(groups)
    if not spent:
        return None
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        several = len(spent) > 1
        label = min(2.6, 0.25 + 0.075 * max(map(len, spent))) if several else 0.12
        bars = 0.4 * len(spent)
        width, height = 12.3, bars + 0.78
        figure: Any = matplotlib.figure.Figure(figsize=(width, height))
        axis = figure.add_axes((label / width, 0.42 / height, (width - label - 0.25) / width, bars / height))
        handles: dict[str, Any] = {}
        for place, seconds in enumerate(spent.values()):
            together, left = sum(seconds.values()), 0.0
            for phase, value in seconds.items():
                share = value / together
                bar = axis.barh(place, share, left=left, height=0.72, color=_COLOUR[phase], edgecolor="white", lw=0.8)
                handles.setdefault(phase, bar)
                if share >= 0.035:
                    ink = "white" if phase in ("sample", "reward", "reference", "save") else _STYLE["text.color"]
                    axis.text(
                        left + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=8.5
                    )
                left += share
        _dress(axis, list(spent) if several else [])
        phases = [phase for phase in PHASES if phase in handles]
        figure.legend(
            [handles[phase] for phase in phases], [NAMES[phase] for phase in phases], ncols=8, loc="upper left",
            bbox_to_anchor=(label / width, 1.0), borderaxespad=0.1, handlelength=1.0, handleheight=0.9, columnspacing=1.4,
            fontsize=9,
        )  # fmt: skip
        return _png(figure)


def _dress(axis: Any, names: Sequence[str]) -> None:
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.set_xlabel("share of the time from the first step to the last logged line")
    axis.grid(False)
    axis.tick_params(axis="y", length=0)
    for side in ("left", "top", "right"):
        axis.spines[side].set_visible(False)
