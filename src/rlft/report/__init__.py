"""Curves and tables of one run or of several, as PNG and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft._files import make_dir, replace_file
from rlft._redact import redact
from rlft.metrics import LOG_NAME, read_metrics
from rlft.report.curves import Rows, draw_groups, draw_run, series
from rlft.report.page import Table, facts, flatten, html_page, make_table, number
from rlft.report.panels import PANELS, Panel, leftover_panels, per_key, present
from rlft.report.shares import draw_shares, share_table

__all__ = ["PANELS", "Panel", "Table", "comparison_table", "demo_report", "plot_curves", "write_report"]

Run = str | Path | Rows

_SEED = re.compile(r"[-_.]?(?:seed)?[-_.]?\d+$", re.IGNORECASE)
_DEMO = ("eval_reward", "reward", "kl", "entropy", "completions/mean_length", "grad_norm")
_LAST = 0.1  # the last tenth of a run is its result
_HEADLINES = ("eval_reward", "reward", "eval_rewards/accuracies", "rewards/accuracies", "eval_accuracy", "accuracy")
_HEADLINES_AFTER = ("eval_loss", "loss", "kl", "entropy", "completions/mean_length", "num_tokens")
_COMPARED = (*_HEADLINES, "kl", "entropy", "completions/mean_length")  # losses of different objectives do not compare


# -- curves -------------------------------------------------------------------------------------------------------


def plot_curves(
    runs: Mapping[str, Sequence[Run]],
    panels: Sequence[Panel | str] | None = None,
    out_png: str | Path = "curves.png",
    title: str = "",
) -> Path:
    """Draw several groups of runs over each other: mean line, and a band from the smallest to the largest seed.

    Args:
        runs: name (an objective, say) -> its runs, one per seed: folders, ``metrics.jsonl`` files or lists of rows.
        panels: what to draw: metric names or :class:`Panel`; default: every known metric that exists.
        out_png: file to write.
        title: above all panels.

    Returns:
        ``out_png``.

    Raises:
        ValueError: when there are no runs, or nothing to draw.
        ImportError: when matplotlib is missing; says what to install.
    """
    groups = _load_groups(runs)
    keys = _keys(rows for seeds in groups.values() for rows in seeds)
    chosen = per_key(present(PANELS, keys)) if panels is None else _chosen(panels, keys)
    out = Path(out_png)
    make_dir("report.mkdir", out.parent, exist_ok=True)
    replace_file("report.picture", out, draw_groups(groups, chosen, title=title))
    return out


def _chosen(panels: Sequence[Panel | str], keys: Sequence[str]) -> list[Panel]:
    known = {key: panel for panel in per_key(present(PANELS, keys)) for key in panel.keys}
    wished = [known.get(p, Panel(p, (p,))) if isinstance(p, str) else p for p in panels]
    found = [one for panel in wished for one in per_key(present([panel], keys))]
    if not found:
        names = [p if isinstance(p, str) else p.title for p in panels]
        raise ValueError(f"none of {names} was logged; logged are: {', '.join(sorted(keys))}")
    return found


def _rows_of(run: Run) -> list[dict[str, Any]]:
    if isinstance(run, (str, Path)):
        try:
            rows = read_metrics(run)
        except FileNotFoundError:
            raise ValueError(f"{run} has no {LOG_NAME}; give the output directory of a run") from None
    else:
        rows = [dict(row) for row in run]
    if not rows:
        raise ValueError(f"{run if isinstance(run, (str, Path)) else 'a run'} has logged nothing yet; wait for a step")
    return rows


def _load_groups(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[list[dict[str, Any]]]]:
    groups = {name: [_rows_of(run) for run in seeds] for name, seeds in runs.items()}
    if not groups or not all(groups.values()):
        raise ValueError(f"expected at least one run per name, got {dict.fromkeys(runs, 0) if runs else 'nothing'}")
    return groups


def _keys(all_rows: Any) -> list[str]:
    """Metrics with at least one number, in the order in which they were first logged."""
    found: dict[str, None] = {}
    for rows in all_rows:
        for row in rows:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    found.setdefault(key)
    return list(found)


# -- tables -------------------------------------------------------------------------------------------------------


def _result(rows: Rows, key: str, last: float = _LAST) -> float:
    """Mean of the last part of a curve; NaN when it was never logged or is not finite there."""
    values = series(rows, key)[1]
    tail = values[-max(1, round(last * len(values))) :] if values else []
    return sum(tail) / len(tail) if tail else math.nan


def comparison_table(
    runs: Mapping[str, Sequence[Run]], keys: Sequence[str] | None = None, *, last: float = _LAST
) -> Table:
    """How several groups of runs ended: mean over seeds, and from the smallest to the largest.

    Args:
        runs: as in :func:`plot_curves`.
        keys: metrics, one column each; default: rewards, accuracies, KL, entropy and length, where logged, else losses.
        last: the part of a run that counts as its end, 0 to 1; every value is a mean over it.

    Returns:
        The table; the best of a column is marked where one direction is better (``*`` in the text).

    Raises:
        ValueError: when there are no runs, or ``last`` is not in (0, 1].
    """
    if not 0 < last <= 1:
        raise ValueError(f"last must be in (0, 1], the part of a run that counts as its end, got {last!r}")
    groups = _load_groups(runs)
    logged = _keys(rows for seeds in groups.values() for rows in seeds)
    columns = list(keys) if keys is not None else [key for key in _COMPARED if key in logged]
    columns = columns or [key for key in ("eval_loss", "loss") if key in logged] or logged[:6]
    means: dict[tuple[str, str], float] = {}
    cells: dict[tuple[str, str], str] = {}
    for name, seeds in groups.items():
        for key in columns:
            ends = [_result(rows, key, last) for rows in seeds]
            mean = sum(ends) / len(ends)
            means[name, key] = mean
            spread = f" ({number(min(ends), 3)} to {number(max(ends), 3)})" if len(ends) > 1 and mean == mean else ""
            cells[name, key] = number(mean, 3) + spread
    best = {key: _best({name: means[name, key] for name in groups}, key) for key in columns}
    body = [
        [name, str(len(seeds)), *((cells[name, key], best[key] == name) for key in columns)]
        for name, seeds in groups.items()
    ]
    return make_table(["", "seeds", *columns], body)


def _best(means: Mapping[str, float], key: str) -> str | None:
    direction = next((panel.better for panel in present(PANELS, [key])), "")
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if len(finite) < 2 or not direction:
        return None
    return (max if direction == "high" else min)(finite, key=lambda name: finite[name])


# -- the page -----------------------------------------------------------------------------------------------------


def write_report(
    runs: str | Path | Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    out: str | Path | None = None,
    *,
    title: str | None = None,
    extra_tables: Mapping[str, Table] | None = None,
) -> Path:
    """Write one HTML page about one run, or about several beside each other, with everything inside it.

    One run: its curves, tables, configuration and data report. Several: curves over each other, by name; runs whose
    folders differ in a final ``-seed3`` or ``-3`` are seeds of one name. Secrets are masked.

    Args:
        runs: a run's folder, several, or name -> folders (one per seed). A folder holds ``metrics.jsonl`` and perhaps
            ``config.json`` and ``summary.json`` (its ``data`` entry is shown as the data report).
        out: the page; a folder gets ``report.html``. Default: in the (first) run's folder. The curves are written
            beside it as PNG, ``report-learning.png`` and so on.
        title: heading; default: from the configuration or the names.
        extra_tables: heading -> table, shown first.

    Returns:
        The page.

    Raises:
        ValueError: when a folder has no metrics.
        ImportError: when matplotlib is missing; says what to install.
    """
    named = _named(runs)
    groups = _load_groups(named)
    folders = [Path(folder) for seeds in named.values() for folder in seeds]
    page = Path(out) if out is not None else folders[0] / "report.html"
    page = page / "report.html" if page.is_dir() or page.suffix != ".html" else page
    make_dir("report.mkdir", page.parent, exist_ok=True)
    single = len(folders) == 1
    configs = {str(folder): _read_json(folder, "config.json") for folder in folders}
    heading = title or _heading(named, configs)
    parts = [f"<h2>{html.escape(name)}</h2>{table.html}" for name, table in (extra_tables or {}).items()]
    only = next(iter(groups.values()))[0]
    parts.append(_tiles(only) if single else "<h2>How they ended</h2>" + comparison_table(named).html)
    parts.append(_remarks(groups))
    for section, folded, picture in _pictures(groups, single):
        replace_file("report.picture", page.with_name(f"{page.stem}-{section.lower().replace(' ', '-')}.png"), picture)
        source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
        image = f'<img alt="{section} curves" src="{source}">'
        parts.append(
            f"<details><summary>{section}</summary>{image}</details>" if folded else f"<h2>{section}</h2>{image}"
        )
    if (picture := draw_shares(groups)) is not None and (shares := share_table(groups)) is not None:
        replace_file("report.picture", page.with_name(f"{page.stem}-time.png"), picture)
        source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
        parts.append(f'<h2>Where the time went</h2><img alt="time per phase" src="{source}">{shares.html}')
    if single:
        parts.append("<h2>Every metric</h2>" + _metric_table(only).html)
    parts += _files(folders, configs)
    steps = max(row["step"] for seeds in groups.values() for rows in seeds for row in rows)
    what = f"{len(folders)} run{'s' * (not single)}, {steps:,} steps"
    # whole or not there: a run that was killed here is a finished one, and its next start writes what is missing
    replace_file("report.page", page, html_page(heading, what, "\n".join(parts)).encode())
    return page


def demo_report(folder: str | Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """The page of a demo: each algorithm's seeds in ``<folder>/<algorithm>-<seed>``, and what they gained.

    Args:
        folder: of the demo; ``report.html`` and ``demo.png`` are written there.
        results: one mapping per run with ``algorithm``, ``seed``, ``before`` and ``after`` (held-out accuracy, 0 to 1).

    Returns:
        The page.
    """
    folder = Path(folder)
    ordered = sorted(results, key=lambda result: result["seed"])
    names = sorted({str(result["algorithm"]) for result in results})
    runs = {n: [folder / f"{n}-{result['seed']}" for result in ordered if result["algorithm"] == n] for n in names}
    body = []
    for name in names:
        mine = [result for result in ordered if result["algorithm"] == name]
        columns = [
            [float(result["before"]) for result in mine],
            [float(result["after"]) for result in mine],
            [100 * (float(result["after"]) - float(result["before"])) for result in mine],
        ]
        cells = [f"{sum(c) / len(c):.3g} ({min(c):.3g} to {max(c):.3g})" for c in columns]
        body.append([name, str(len(mine)), *cells])
    table = make_table(["", "seeds", "before RL", "after RL", "gain in points"], body)
    plot_curves(
        runs,
        _DEMO,
        folder / "demo.png",
        "Demo: held-out accuracy and what goes with it",
    )
    return write_report(runs, folder / "report.html", title="Demo", extra_tables={"Held-out accuracy": table})


def _named(runs: Any) -> dict[str, list[Path]]:
    if isinstance(runs, Mapping):
        return {str(name): [Path(folder) for folder in folders] for name, folders in runs.items()}
    folders = [Path(runs)] if isinstance(runs, (str, Path)) else [Path(folder) for folder in runs]
    names = [folder.resolve().name for folder in folders]
    stems = [_SEED.sub("", name) or name for name in names]
    # a trailing number is a seed only where several runs share what stands before it
    groups: dict[str, list[Path]] = {}
    for folder, name, stem in zip(folders, names, stems, strict=True):
        label = stem if stems.count(stem) > 1 and len(set(names)) == len(names) else name
        groups.setdefault(label if len(set(names)) == len(names) else str(folder), []).append(folder)
    return groups


def _heading(named: Mapping[str, Sequence[Path]], configs: Mapping[str, Any]) -> str:
    if len(configs) > 1:
        *first, last = named
        return f"{', '.join(first)} and {last}" if first else f"{last}, {len(configs)} runs"
    config = redact(next(iter(configs.values())) or {})
    name, objective = config.get("run_name"), config.get("objective")
    return " · ".join(str(part) for part in (name or next(iter(named)), objective) if part)


def _read_json(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {"unreadable": f"{name} is not JSON"}


def _tiles(rows: Rows) -> str:
    """The few numbers that one looks for first, with where they began."""
    keys = _keys([rows])
    chosen = [key for key in (*_HEADLINES, *_HEADLINES_AFTER) if key in keys][:6]
    tiles = []
    for key in chosen:
        values = series(rows, key)[1]
        if key == "num_tokens":
            tiles.append(("tokens", number(values[-1]), ""))
        else:
            tiles.append((key, number(_result(rows, key)), f"began at {number(values[0])}"))
    seconds = sum(v for v in series(rows, "step_time")[1] if math.isfinite(v))
    if seconds:
        tiles.append(("time in steps", _duration(seconds), f"{number(_result(rows, 'step_time'))} s per step"))
    inner = "".join(
        f"<div class=tile><span>{html.escape(name)}</span><b>{html.escape(value)}</b><i>{html.escape(note)}</i></div>"
        for name, value, note in tiles
    )
    return f"<div class=tiles>{inner}</div>"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds % 60:.0f} s"
        if minutes
        else f"{seconds:.1f} s"
    )


_LIMITS = (
    ("completions/clipped_ratio", 0.5, "of the answers end at the length limit, unfinished"),
    ("frac_reward_zero_std", 0.8, "of the groups have equal rewards and teach nothing"),
    ("rewards/unscored_fraction", 0.2, "of the answers have no reward"),
)


def _remarks(groups: Mapping[str, Sequence[Rows]]) -> str:
    """What deserves a look: values that are not finite, and known signs of trouble."""
    remarks = []
    alone = sum(map(len, groups.values())) == 1

    def where(name: str, runs: Sequence[int]) -> str:
        return "" if alone else f"{name}, run{'s' * (len(runs) > 1)} {', '.join(str(run + 1) for run in runs)}: "

    for name, seeds in groups.items():
        for key in _keys(seeds):
            bad = {
                run: [s for s, v in zip(*series(rows, key), strict=True) if v - v != 0]
                for run, rows in enumerate(seeds)
            }
            bad = {run: steps for run, steps in bad.items() if steps}
            if bad:
                count, first = sum(map(len, bad.values())), min(map(min, bad.values()))
                points = f"{count} point{'s' * (count > 1)}"
                remarks.append(f"{where(name, list(bad))}{key} was not finite at {points}, first at step {first}.")
        for key, limit, text in _LIMITS:
            ends = {run: _result(rows, key) for run, rows in enumerate(seeds)}
            over = {run: end for run, end in ends.items() if end > limit}
            if over:
                upto = "up to " * (len(over) > 1)
                remarks.append(f"{where(name, list(over))}{upto}{max(over.values()):.0%} {text} ({key}).")
    if not remarks:
        return ""
    more = f"<li>and {len(remarks) - 12} more</li>" if len(remarks) > 12 else ""
    items = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks[:12])
    return f"<h2>Look at this</h2><ul class=remarks>{items}{more}</ul>"


def _pictures(groups: Mapping[str, Sequence[Rows]], single: bool) -> Iterator[tuple[str, bool, bytes]]:
    """Section, whether it is folded away at first, and its curves as PNG."""
    keys = _keys(rows for seeds in groups.values() for rows in seeds)
    known = present(PANELS, keys)
    # shares and their seconds are a bar of their own
    more = leftover_panels(known, [k for k in keys if not k.startswith("meter/share/") and k != "meter/seconds"])
    for section in dict.fromkeys(panel.section for panel in [*known, *more]):
        panels = [panel for panel in [*known, *more] if panel.section == section]
        if single:
            picture = draw_run(next(iter(groups.values()))[0], panels)
        else:
            picture = draw_groups(groups, per_key(panels))
        yield html.escape(section), bool(known) and panels[0] in more, picture


def _metric_table(rows: Rows) -> Table:
    body = []
    for key in sorted(_keys([rows])):
        steps, values = series(rows, key)
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else ((math.nan, 0), (math.nan, 0))
        ends = [number(values[0]), number(_result(rows, key))]
        body.append([key, *ends, f"{number(low[0])} @ {low[1]}", f"{number(high[0])} @ {high[1]}", str(len(values))])
    return make_table(["metric", "first", "mean of last 10%", "lowest @ step", "highest @ step", "points"], body)


def _files(folders: Sequence[Path], configs: Mapping[str, Any]) -> list[str]:
    """Summary, data report and configuration, of several runs beside each other."""
    summaries = {str(folder): redact(_read_json(folder, "summary.json")) for folder in folders}
    summaries = {name: value for name, value in summaries.items() if isinstance(value, dict)}
    data = {name: value["data"] for name, value in summaries.items() if value.get("data")}
    rest = {name: {k: v for k, v in value.items() if k != "data"} for name, value in summaries.items()}
    known = {name: redact(config) for name, config in configs.items() if config}
    return [
        _beside("Summary", {name: value for name, value in rest.items() if value}),
        _beside("Data", data),
        _beside("Settings", known, folded=True),
    ]


def _beside(title: str, values: Mapping[str, Any], *, folded: bool = False) -> str:
    """Facts that all runs share, once; those that differ, a line per run."""
    flat = {Path(name).name: flatten(value) for name, value in values.items()}
    if not flat:
        return ""
    keys = list(dict.fromkeys(key for one in flat.values() for key in one))
    differing = [key for key in keys if len({repr(one.get(key)) for one in flat.values()}) > 1]
    shared = {key: value for key, value in next(iter(flat.values())).items() if key not in differing}
    parts = []
    if differing:
        rows = [[name, *(number(one[key]) if key in one else "" for key in differing)] for name, one in flat.items()]
        parts.append(
            f"<h2>{title} that differ{'s' * (not title.endswith('s'))}</h2>" + make_table(["", *differing], rows).html
        )
    if shared and folded:
        parts.append(f"<details><summary>{title}{' in common' * bool(differing)}</summary>{facts(shared)}</details>")
    elif shared:
        parts.append(f"<h2>{title}</h2>" + facts(shared))
    return "".join(parts)
