"""Curves and tables of one run or of several, as PNG and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft._curves import PANELS, Panel, Rows, draw_groups, draw_run, leftover_panels, per_key, present, series
from rlft._page import Table, facts, flatten, html_page, make_table, number
from rlft._redact import redact
from rlft.metrics import LOG_NAME, read_metrics

__all__ = ["PANELS", "Panel", "Table", "comparison_table", "demo_report", "plot_curves", "write_report"]

Run = str | Path | Rows

_SEED = re.compile(r"[-_.]?(?:seed)?[-_.]?\d+$", re.IGNORECASE)
_DEMO = ("eval_reward", "reward", "kl", "entropy", "completions/mean_length", "grad_norm")
_LAST = 0.1  # the last tenth of a run is its result
_HEADLINES = ("eval_reward", "reward", "eval_rewards/accuracies", "rewards/accuracies", "eval_accuracy", "accuracy")
_HEADLINES_AFTER = ("eval_loss", "loss", "kl", "entropy", "completions/mean_length", "num_tokens")


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
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(draw_groups(groups, chosen, title=title))
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
        keys: metrics, one column each; default: rewards, accuracies, loss, KL, entropy and length, where logged.
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
    wished = [*_HEADLINES, *_HEADLINES_AFTER[:-1]] if keys is None else keys
    columns = [key for key in wished if key in logged or keys is not None]
    means: dict[tuple[str, str], float] = {}
    cells: dict[tuple[str, str], str] = {}
    for name, seeds in groups.items():
        for key in columns:
            ends = [_result(rows, key, last) for rows in seeds]
            mean = sum(ends) / len(ends)
            means[name, key] = mean
            spread = f" ({number(min(ends))} to {number(max(ends))})" if len(ends) > 1 and mean == mean else ""
            cells[name, key] = number(mean) + spread
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
            beside it as PNG, under the same name.
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
    page.parent.mkdir(parents=True, exist_ok=True)
    single = len(folders) == 1
    configs = {str(folder): _read_json(folder, "config.json") for folder in folders}
    heading = title or _heading(named, configs)
    parts = [f"<h2>{html.escape(name)}</h2>{table.html}" for name, table in (extra_tables or {}).items()]
    only = next(iter(groups.values()))[0]
    parts.append(_tiles(only) if single else "<h2>How they ended</h2>" + comparison_table(named).html)
    parts.append(_remarks(groups))
    images, picture = _images(groups, single, heading)
    page.with_suffix(".png").write_bytes(picture)
    parts += images
    if single:
        parts.append("<h2>Every metric</h2>" + _metric_table(only).html)
    parts += _summaries(folders)
    parts.append(_configs(configs))
    steps = max(row["step"] for seeds in groups.values() for rows in seeds for row in rows)
    what = f"{len(folders)} run{'s' * (not single)}, {steps:,} steps"
    page.write_text(html_page(heading, what, "\n".join(parts)), encoding="utf-8")
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


def _remarks(groups: Mapping[str, Sequence[Rows]]) -> str:
    """What deserves a look: values that are not finite, and known signs of trouble."""
    remarks = []
    for name, seeds in groups.items():
        for index, rows in enumerate(seeds):
            where = "" if len(groups) == 1 and len(seeds) == 1 else f"{name}, run {index + 1}: "
            for key in _keys([rows]):
                steps, values = series(rows, key)
                bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
                if bad:
                    remarks.append(
                        f"{where}{key} was not finite at {len(bad)} of {len(steps)} points, first at step {bad[0]}."
                    )
            for key, limit, text in (
                ("completions/clipped_ratio", 0.5, "of the answers end at the length limit, unfinished"),
                ("frac_reward_zero_std", 0.8, "of the groups have equal rewards and teach nothing"),
                ("rewards/unscored_fraction", 0.2, "of the answers have no reward"),
            ):
                end = _result(rows, key)
                if end > limit:
                    remarks.append(f"{where}{end:.0%} {text} ({key}).")
    if not remarks:
        return ""
    more = f"<li>and {len(remarks) - 12} more</li>" if len(remarks) > 12 else ""
    return (
        "<h2>Look at this</h2><ul class=remarks>"
        + "".join(f"<li>{html.escape(r)}</li>" for r in remarks[:12])
        + more
        + "</ul>"
    )


def _images(groups: Mapping[str, Sequence[Rows]], single: bool, heading: str) -> tuple[list[str], bytes]:
    """The curves, a section each, as tags; and all known ones in one PNG."""
    keys = _keys(rows for seeds in groups.values() for rows in seeds)
    known = present(PANELS, keys)
    more = leftover_panels(known, keys)
    only = next(iter(groups.values()))[0]

    def draw(panels: Sequence[Panel], title: str = "") -> bytes:
        return draw_run(only, panels, title=title) if single else draw_groups(groups, per_key(panels), title=title)

    tags = []
    for section in dict.fromkeys(panel.section for panel in [*known, *more]):
        picture = base64.b64encode(draw([p for p in [*known, *more] if p.section == section])).decode("ascii")
        name = html.escape(section)
        image = f'<img alt="{name} curves" src="data:image/png;base64,{picture}">'
        rare = bool(more) and section == more[0].section
        tags.append(f"<details><summary>{name}</summary>{image}</details>" if rare else f"<h2>{name}</h2>{image}")
    return tags, draw(known or more, heading)


def _metric_table(rows: Rows) -> Table:
    body = []
    for key in sorted(_keys([rows])):
        steps, values = series(rows, key)
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else ((math.nan, 0), (math.nan, 0))
        ends = [number(values[0]), number(_result(rows, key))]
        body.append([key, *ends, f"{number(low[0])} @ {low[1]}", f"{number(high[0])} @ {high[1]}", str(len(values))])
    return make_table(["metric", "first", "mean of last 10%", "lowest @ step", "highest @ step", "points"], body)


def _summaries(folders: Sequence[Path]) -> list[str]:
    parts = []
    for folder in folders:
        summary = redact(_read_json(folder, "summary.json"))
        if not isinstance(summary, dict) or not summary:
            continue
        of = "" if len(folders) == 1 else f" of {html.escape(folder.name)}"
        data = summary.pop("data", None)
        if summary:
            parts.append(f"<h2>Summary{of}</h2>" + facts(summary))
        if data:
            parts.append(f"<h2>Data{of}</h2>" + facts(data if isinstance(data, Mapping) else {"report": data}))
    return parts


def _configs(configs: Mapping[str, Any]) -> str:
    """The configuration; of several runs, what differs first."""
    flat = {name: flatten(redact(config)) for name, config in configs.items() if config is not None}
    if not flat:
        return ""
    keys = sorted({key for one in flat.values() for key in one})
    if len(flat) == 1:
        (one,) = flat.values()
        return "<details><summary>Configuration</summary>" + facts(one) + "</details>"
    differing = [key for key in keys if len({one.get(key, "") for one in flat.values()}) > 1]
    names = [Path(name).name for name in flat]
    rows = [[key, *(one.get(key, "") for one in flat.values())] for key in differing]
    common = {key: next(iter(flat.values())).get(key, "") for key in keys if key not in differing}
    differs = "<h2>Settings that differ</h2>" + make_table(["", *names], rows).html if differing else ""
    return differs + "<details><summary>Settings in common</summary>" + facts(common) + "</details>"
