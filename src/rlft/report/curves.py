"""How curves are smoothed, and how panels of them are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from rlft.report.panels import Panel, labels_of

__all__ = ["Rows", "Series", "draw_groups", "draw_run", "series", "smooth"]

Rows = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]

# Okabe and Ito's colours, told apart by every kind of eyesight; the order is fixed so that a name keeps its colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288")
_INK, _FAINT = "#24292f", "#d9dde3"
# In inches: a panel with its labels, what of it the labels take (left, bottom, right, top), and a title.
_CELL, _MARGINS, _TITLE = (4.1, 2.6), (0.78, 0.5, 0.12, 0.32), 0.36
DPI = 130
_TICK, _WIDEST = 8.0, 6  # size of tick labels, and the characters of that size that leave room for the axis's own label
_TITLE_SIZE, _LONGEST = 10.0, 34  # of titles, likewise, where a panel ends
_ROUND = (1, 2, 2.5, 5, 10)
_SMOOTH_FROM = 30  # shorter curves are shown as they are, with a dot per point
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": "#57606a",
    "axes.edgecolor": "#a8b0ba",
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": _TITLE_SIZE,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "xtick.labelsize": 8,
    "ytick.labelsize": _TICK,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def series(rows: Rows, key: str) -> Series:
    """Steps and values of one metric, NaN and infinities included; the last row wins where a step has several."""
    found: dict[int, float] = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[row["step"]] = float(value)
    return list(found), list(found.values())


def smooth(values: Sequence[float]) -> list[float]:
    """A centred Gaussian average, without lag; as it is when shorter than 30 points. NaN and infinities are left out."""
    count = len(values)
    if count < _SMOOTH_FROM:
        return list(values)
    import numpy as np

    sigma = min(max(count / 35, 1.0), 40.0)
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    total = np.convolve(np.where(finite, array, 0.0), kernel)[reach : reach + count]
    weight = np.convolve(finite.astype(np.float64), kernel)[reach : reach + count]
    return np.divide(total, weight, out=np.full(count, np.nan), where=weight > 1e-9).tolist()


# -- drawing ------------------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(
            "curves are drawn with matplotlib, which is not installed: pip install rlft[report]"
        ) from error
    return matplotlib


def _figure(count: int, *, title: str, above: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels; ``above`` inches are left between the title and the panels."""
    matplotlib = _matplotlib()
    columns = _columns(count)
    lines = math.ceil(count / columns)
    width, height = _CELL[0] * columns, _CELL[1] * lines + _TITLE * bool(title) + above
    figure = matplotlib.figure.Figure(figsize=(width, height))
    # Placed by hand, in inches: an automatic layout draws everything twice, and panels of two figures do not line up.
    left, bottom, right, top = _MARGINS
    size = ((_CELL[0] - left - right) / width, (_CELL[1] - bottom - top) / height)
    axes = []
    for index in range(count):
        x, y = _CELL[0] * (index % columns) + left, _CELL[1] * (lines - 1 - index // columns) + bottom
        axes.append(figure.add_axes((x / width, y / height, *size)))
    if title:
        figure.text(0.09 / width, 1 - 0.09 / height, title, fontsize=13, fontweight="bold", va="top")
    return figure, axes


def _columns(count: int) -> int:
    return 2 if count == 4 else min(3, max(count, 1))


def _dress(axis: Any, panel: Panel, last_line: bool, steps: tuple[int, int]) -> None:
    """Title, labels and ticks; all panels of a picture go from the first of ``steps`` to the last."""
    ticker = _matplotlib().ticker
    aside = 0.04 * (steps[1] - steps[0]) or 0.5
    axis.set_xlim(steps[0] - aside, steps[1] + aside)
    axis.set_title(panel.title, pad=6, fontsize=_TITLE_SIZE * min(1.0, _LONGEST / max(1, len(panel.title))))
    if panel.unit:
        axis.set_ylabel(panel.unit)
        axis.yaxis.set_label_coords(-0.185, 0.5)
    if last_line:
        axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_ROUND))
    low, high = axis.get_ylim()
    lines = [y for line in axis.lines for y in line.get_ydata() if math.isfinite(y)]
    if panel.log and lines and min(lines) > 0 and max(lines) > 20 * min(lines):
        axis.set_yscale("log")
        return
    axis.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=_ROUND))
    constant = bool(lines) and max(lines) - min(lines) < 1e-9 * max(1e-3, abs(max(lines)))
    if lines and panel.unit == "fraction":
        axis.set_ylim(*((-0.04, 1.04) if constant else (max(low, -0.04), min(high, 1.04))))
    elif panel.zero and lines and min(lines) >= 0 < max(lines):
        axis.set_ylim(0, 1.15 * max(lines))
    elif constant:
        half = 0.5 * (abs(lines[0]) or 1)
        axis.set_ylim(lines[0] - half, lines[0] + half)
    low, high = axis.get_ylim()
    if lines and max(abs(low), abs(high)) < 1e-2:
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(_small))
    elif lines and max(abs(low), abs(high)) >= 1e4:
        axis.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
    widest = max((len(label.get_text()) for label in axis.get_yticklabels()), default=0)
    if widest > _WIDEST:
        axis.tick_params(axis="y", labelsize=_TICK * _WIDEST / widest)


def _small(value: float, position: int | None = None) -> str:
    """2.5e-6 rather than 2.5e-06, and no factor above the axis."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _mark_lost(axis: Any, steps: Sequence[int]) -> None:
    """A red tick on the axis where a value was NaN or infinite."""
    if steps:
        where = axis.get_xaxis_transform()
        axis.plot(steps, [0.015] * len(steps), "|", color="#cf222e", ms=8, mew=1.2, transform=where, clip_on=False)


def _line(axis: Any, data: Series, colour: str, label: str, *, plain: bool, dashed: bool) -> list[int]:
    steps, values = data
    finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    few = len(values) < _SMOOTH_FROM
    if not few and not plain:
        axis.plot([s for s, _ in finite], [v for _, v in finite], color=colour, alpha=0.22, lw=0.8)
    shown = [v if math.isfinite(v) else math.nan for v in (values if plain else smooth(values))]
    axis.plot(steps, shown, color=colour, lw=1.7, label=label, ls="--" if dashed else "-", **_marks(few))
    return [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]


def _marks(few: bool) -> dict[str, Any]:
    return {"marker": "o", "ms": 3.3, "mec": "white", "mew": 0.5} if few else {}


def _first_and_last(runs: Sequence[Rows], panels: Sequence[Panel]) -> tuple[int, int]:
    """The smallest and the largest step with a metric of these panels."""
    keys = {key for panel in panels for key in panel.keys}
    steps = [row["step"] for rows in runs for row in rows if not keys.isdisjoint(row)]
    return min(steps, default=0), max(steps, default=1)


def draw_run(rows: Rows, panels: Sequence[Panel], *, title: str = "") -> bytes:
    """PNG of one run: every panel's metrics as a smoothed line over the faint raw one."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(len(panels), title=title)
        steps = _first_and_last([rows], panels)
        for index, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            lost: list[int] = []
            if panel.band:
                low, high = (dict(zip(*series(rows, key), strict=True)) for key in panel.band)
                both = sorted(low.keys() & high.keys())
                area = ([low[step] for step in both], [high[step] for step in both])
                axis.fill_between(both, *area, color=COLOURS[0], alpha=0.12, lw=0, label="shortest to longest")
            for position, (key, label) in enumerate(zip(panel.keys, labels_of(panel.keys), strict=True)):
                colour, dashed = COLOURS[position % len(COLOURS)], position >= len(COLOURS)
                lost += _line(axis, series(rows, key), colour, label, plain=panel.plain, dashed=dashed)
            _dress(axis, panel, index + _columns(len(panels)) >= len(panels), steps)
            _mark_lost(axis, sorted(set(lost)))
            if len(panel.keys) > 1 or panel.band:
                axis.legend(loc="best", handlelength=1.4, borderaxespad=0.2)
        return _png(figure)


#: Later groups have gaps, so that curves which coincide are all seen.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2.5)), (0, (1.2, 1.8)), (0, (6, 2, 1.5, 2)))


def draw_groups(groups: Mapping[str, Sequence[Rows]], panels: Sequence[Panel], *, title: str = "") -> bytes:
    """PNG of several groups of runs: mean over a group's seeds as a line, smallest to largest seed as a band.

    Args:
        groups: name -> one list of rows per seed; a name keeps its colour through all panels.
        panels: what to draw; the first metric of each.
        title: above all panels.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(len(panels), title=title, above=0.3)
        handles: dict[str, Any] = {}
        every = _first_and_last([rows for seeds in groups.values() for rows in seeds], panels)
        for index, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            lost: list[int] = []
            for position, (name, seeds) in enumerate(groups.items()):
                colour, style = (
                    COLOURS[position % len(COLOURS)],
                    _DASHES[(position + position // len(COLOURS)) % len(_DASHES)],
                )
                drawn, bad = _spread(seeds, panel.keys[0], plain=panel.plain)
                lost += bad
                if drawn is None:
                    continue
                steps, mean, low, high = drawn
                if len(seeds) > 1:
                    axis.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0)
                marks = _marks(len(steps) < _SMOOTH_FROM)
                (handles[name],) = axis.plot(steps, mean, color=colour, lw=1.8, ls=style, **marks)
            _dress(axis, panel, index + _columns(len(panels)) >= len(panels), every)
            _mark_lost(axis, sorted(set(lost)))
        width, height = figure.get_size_inches()
        top = 1 - (_TITLE * bool(title)) / height
        place = {"loc": "upper left", "bbox_to_anchor": (0.02 / width, top), "borderaxespad": 0.0}
        figure.legend([*handles.values()], [*handles], ncols=8, handlelength=1.6, fontsize=9, **place)
        if any(len(seeds) > 1 for seeds in groups.values()):
            note = "line: mean of the seeds, band: smallest to largest"
            figure.text(1 - 0.09 / width, 1 - 0.1 / height, note, ha="right", va="top", fontsize=8, color="#57606a")
        return _png(figure)


_Spread = tuple[list[int], list[float], list[float], list[float]]


def _spread(seeds: Sequence[Rows], key: str, *, plain: bool) -> tuple[_Spread | None, list[int]]:
    """Steps, mean, smallest and largest over seeds that have the step; and the steps with a NaN or infinity."""
    at: dict[int, list[float]] = {}
    lost: list[int] = []
    for rows in seeds:
        steps, values = series(rows, key)
        lost += [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        for step, value in zip(steps, values if plain else smooth(values), strict=True):
            if math.isfinite(value):
                at.setdefault(step, []).append(value)
    steps = sorted(at)
    if not steps:
        return None, lost
    mean = [sum(at[step]) / len(at[step]) for step in steps]
    return (steps, mean, [min(at[step]) for step in steps], [max(at[step]) for step in steps]), lost


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
