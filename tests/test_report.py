"""Reports: what is drawn is what was logged, nothing secret or foreign gets into the page."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft.report import Panel, comparison_table, curves, demo_report, panels, plot_curves, write_report
from rlft.report.page import flatten, number

pytest.importorskip("matplotlib", reason="reports need the extra `report`")


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures with fewer dots: what is tested is what is in them."""
    monkeypatch.setattr(curves, "DPI", 40)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Keeps the figures that are drawn, instead of turning them into PNG."""
    kept: list = []
    monkeypatch.setattr(curves, "_png", lambda figure: kept.append(figure) or b"\x89PNG")
    return kept


def _rows(offset: float = 0.0, steps: int = 12) -> list[dict]:
    rows = [
        {"step": step, "reward": 0.1 * step + offset, "kl": 0.01 * step, "loss": 1 / step, "step_time": 2.0}
        for step in range(1, steps + 1)
    ]
    return [*rows, {"step": steps, "eval_reward": 0.5 + offset}]


def _run(folder: Path, rows: list[dict] | None = None, config: dict | None = None, summary: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    rows = _rows() if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def _size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


# -- the page -----------------------------------------------------------------------------------------------------


def test_one_run(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "run",
        config={"objective": "dpo", "run_name": "first try", "lora": {"r": 16}, "none": None},
        summary={"data": {"rows": 1234, "skipped": {"empty": 7}}, "accuracy": 0.5},
    )
    page = write_report(run)
    assert page == run / "report.html"
    for section in ("learning", "policy", "optimisation"):
        assert base64.b64encode((run / f"report-{section}.png").read_bytes()).decode() in page.read_text()
    parsed = _Page(page.read_text())
    assert parsed.open == []
    for words in (
        "first try · dpo",
        "1 run, 12 steps",
        "lora.r",
        "16",
        "1,234",
        "skipped.empty",
        "7",
        "24.0 s",
        "2 s per step",
    ):
        assert words in parsed.text, words
    for key in ("reward", "kl", "loss", "eval_reward", "step_time"):
        assert key in parsed.words, key
    assert "Look at this" not in parsed.text


def test_the_page_needs_and_runs_nothing(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"><img src=https://x.invalid/a>'
    rows = [{**row, f"odd {evil}": 1.0} for row in _rows()]
    run = _run(tmp_path / "r <b>", rows, config={"note": evil, evil: 1}, summary={evil: evil, "data": evil})
    text = write_report(run, tmp_path / "out.html", title=evil).read_text()
    parsed = _Page(text)
    assert {tag for tag, _ in parsed.tags} <= set(
        "html head meta title style body h1 h2 p div span b i table thead tbody tr th td img ul li details summary".split()
    )
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        assert _size(base64.b64decode(source.split(",")[1]))[0] >= 164
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in parsed.tags
    ]
    assert "http" not in re.sub(r"https://x\.invalid/a", "", parsed.text.lower())
    assert evil in parsed.text


def test_secrets_reach_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = [
        "hf_" + "CanaryCanary0123456789",
        "plain-canary-in-a-key",
        "environment-canary-99",
        "sk-" + "Canary0123456789abcd",
    ]
    monkeypatch.setenv("WANDB_API_KEY", canaries[2])
    config = {
        "model": f"x {canaries[0]}",
        "hub": {"api_key": canaries[1]},
        "run_name": f"run {canaries[2]}",
        "objective": canaries[3],
    }
    summary = {"token": canaries[1], "note": canaries[2], "data": {"url": f"https://user:{canaries[1]}@host/x"}}
    one, two = (_run(tmp_path / name, config={**config, "n": name}, summary={**summary, "n": name}) for name in "ab")
    write_report(one)
    write_report([one, two], tmp_path / "both.html")
    outputs = [one / "report.html", tmp_path / "both.html", *tmp_path.rglob("*.png")]
    assert len(outputs) == 8
    for path in outputs:
        for canary in canaries:
            assert canary.encode() not in path.read_bytes(), (path, canary)
    assert "[redacted]" in outputs[0].read_text()


def test_several_runs_are_grouped_by_seed(tmp_path: Path, figures: list) -> None:
    runs = [
        _run(
            tmp_path / f"{name}-seed{seed}",
            _rows(offset + seed / 100),
            config={"objective": name, "seed": seed, "same": "kept"},
        )
        for name, offset in (("agro", 0.3), ("rloo", 0.0))
        for seed in (0, 1)
    ]
    parsed = _Page(write_report(runs, tmp_path).read_text())
    assert (tmp_path / "report.html").exists()
    for words in (
        "agro and rloo",
        "4 runs, 12 steps",
        "Settings that differ",
        "agro-seed1",
        "Settings in common",
        "kept",
    ):
        assert words in parsed.text, words
    assert "0.805 (0.8 to 0.81)" in parsed.words  # eval_reward of agro
    assert parsed.words.count("kept") == 1


def test_names_that_end_in_numbers_without_siblings_stay(tmp_path: Path, figures: list) -> None:
    runs = [_run(tmp_path / name) for name in ("gpt2", "lr-1e-5")]
    assert "gpt2 and lr-1e-5" in _Page(write_report(runs, tmp_path / "x.html").read_text()).text
    same = [_run(tmp_path / name / "run") for name in ("a", "b")]
    text = _Page(write_report(same, tmp_path / "y.html").read_text()).text
    assert str(tmp_path / "a" / "run") in text
    named = write_report({"left": [same[0]], "right": [same[1]]}, tmp_path / "z.html")
    assert "left and right" in _Page(named.read_text()).text


def test_trouble_is_pointed_out(tmp_path: Path, figures: list) -> None:
    rows = [
        {
            **row,
            "completions/clipped_ratio": 0.75,
            "frac_reward_zero_std": 0.9,
            "rewards/unscored_fraction": 0.5,
            "entropy": 1.0,
        }
        for row in _rows()
    ]
    rows[2]["kl"] = "nan"
    rows[5]["kl"] = "inf"
    text = _Page(write_report(_run(tmp_path / "r", rows)).read_text()).text
    for words in (
        "kl was not finite at 2 points, first at step 3.",
        "75% of the answers end at the length limit, unfinished (completions/clipped_ratio).",
        "90% of the groups have equal rewards and teach nothing",
        "50% of the answers have no reward",
    ):
        assert words in text, words
    two = [tmp_path / "r", _run(tmp_path / "s", rows)]
    assert "r, run 1: kl was not finite" in _Page(write_report(two, tmp_path / "x.html").read_text()).text


def test_a_metric_that_was_never_finite(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": "nan", "kl": "inf"} for step in range(1, 40)]
    page = write_report(_run(tmp_path / "r", rows))
    assert "loss was not finite at 39 points" in _Page(page.read_text()).text
    write_report([tmp_path / "r", _run(tmp_path / "s", rows)], tmp_path / "x.html")


def test_what_is_missing_is_said(tmp_path: Path, figures: list) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no metrics\.jsonl; give the output directory of a run"):
        write_report(tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has logged nothing yet"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one run"):
        plot_curves({"a": []}, None, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_curves({}, None, tmp_path / "x.png")
    with pytest.raises(
        ValueError, match=r"none of \['kll'\] was logged; logged are: eval_reward, kl, loss, reward, step_time"
    ):
        plot_curves({"a": [_rows()]}, ["kll"], tmp_path / "x.png")
    broken = _run(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "config.json is not JSON" in write_report(broken).read_text()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install rlft\[report\]"):
        plot_curves({"a": [_rows()]}, ["kl"], tmp_path / "x.png")
    assert comparison_table({"a": [_rows()]}).text


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_curves({"a": [_rows()]}, ["kl"], tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before


# -- curves -------------------------------------------------------------------------------------------------------


def test_mean_line_and_band_over_seeds(tmp_path: Path, figures: list) -> None:
    runs = {"agro": [_rows(0.0), _rows(0.2), _rows(0.7)], "rloo": [_rows(-0.5)]}
    plot_curves(runs, ["reward", "eval_reward"], tmp_path / "x.png", "Title")
    (figure,) = figures
    reward, held_out = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Reward", "Held-out reward"]
    mean, other = reward.lines
    assert list(mean.get_xdata()) == list(range(1, 13))
    assert list(mean.get_ydata()) == pytest.approx([0.1 * step + 0.3 for step in range(1, 13)], rel=1e-12)
    assert list(other.get_ydata()) == pytest.approx([0.1 * step - 0.5 for step in range(1, 13)], rel=1e-12)
    (band,) = reward.collections  # one run alone has no band
    edges = band.get_paths()[0].vertices
    at_three = sorted({round(float(y), 9) for x, y in edges if x == 3})
    assert at_three == [0.3, 1.0]
    assert mean.get_color() == held_out.lines[0].get_color() != other.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["agro", "rloo"]
    assert "Title" in [text.get_text() for text in figure.texts]
    assert reward.get_xlabel() == held_out.get_xlabel() == "optimizer step"


def test_a_nan_is_marked_and_not_drawn(tmp_path: Path, figures: list) -> None:
    rows = _rows()
    rows[4]["kl"] = math.nan
    plot_curves({"a": [rows], "b": [_rows()]}, ["kl"], tmp_path / "x.png")
    first, second, mark = figures[0].axes[0].lines
    assert list(first.get_xdata()) == [step for step in range(1, 13) if step != 5]
    assert len(second.get_xdata()) == 12
    assert list(mark.get_xdata()) == [5]


def test_one_run_shows_raw_and_smoothed(figures: list) -> None:
    rows = [{"step": s, "kl": float(s % 2), "learning_rate": 1e-6 * (s % 2), "entropy": 1.0} for s in range(1, 101)]
    shown = panels.present(panels.PANELS, ["kl", "learning_rate", "entropy"])
    curves.draw_run(rows, shown)
    kl, entropy, rate = figures[0].axes
    raw, smoothed = kl.lines
    assert list(raw.get_ydata()) == [row["kl"] for row in rows]
    assert raw.get_alpha() < 0.5
    assert max(abs(y - 0.5) for y in smoothed.get_ydata()[10:-10]) < 0.05
    (plain,) = rate.lines  # a schedule has no noise to remove
    assert list(plain.get_ydata()) == [row["learning_rate"] for row in rows]
    assert [rate.yaxis.get_major_formatter()(value, None) for value in (2.5e-6, 0.0, -1e-6)] == ["2.5e-6", "0", "-1e-6"]
    low, high = entropy.get_ylim()
    assert low < 1.0 < high


def test_smoothing() -> None:
    assert curves.smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    assert curves.smooth([3.0] * 100) == pytest.approx([3.0] * 100, rel=1e-12)
    line = [0.5 * i for i in range(200)]
    assert curves.smooth(line)[30:-30] == pytest.approx(line[30:-30], rel=1e-9)  # centred: no lag
    holes = [math.nan if i in (50, 51) else 2.0 for i in range(100)]
    assert curves.smooth(holes) == pytest.approx([2.0] * 100, rel=1e-12)
    assert all(math.isnan(value) for value in curves.smooth([math.inf] * 40))


def test_series_takes_numbers_alone_and_the_last_row_of_a_step() -> None:
    rows = [
        {"step": 1, "x": 1},
        {"step": 2, "x": None},
        {"step": 3, "x": "text"},
        {"step": 4, "x": True},
        {"step": 1, "x": 2.5},
    ]
    assert curves.series(rows, "x") == ([1], [2.5])


def test_panels_show_every_metric_once() -> None:
    keys = ["rewards/exact/mean", "rewards/length/mean", "rewards/exact/std", "reward", "completions/mean_length"]
    keys += ["completions/min_length", "completions/max_length", "clip_ratio/low", "mine/own", "eval_loss", "loss"]
    known = panels.present(panels.PANELS, keys)
    shown = [key for panel in known for key in (*panel.keys, *(panel.band or ()))]
    more = panels.leftover_panels(known, [*keys, "step"])
    assert [panel.keys for panel in more] == [("mine/own",)]
    assert sorted([*shown, "mine/own"]) == sorted(keys)
    titles = [panel.title for panel in panels.per_key(known)]
    assert "Reward by function: exact" in titles
    assert "Loss" in titles
    assert "Loss: held out" in titles
    no_band = panels.present(panels.PANELS, ["completions/mean_length", "completions/min_length"])
    assert no_band[0].band is None


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["loss", "eval_loss"], ["training", "held out"]),
        (["rewards/chosen", "rewards/rejected"], ["chosen", "rejected"]),
        (["rewards/exact_match/mean", "rewards/format/mean"], ["exact match", "format"]),
        (["reward", "objective/scores"], ["reward", "objective/scores"]),
        (["kl"], ["kl"]),
        (["accuracy", "eval_mean_token_accuracy"], ["accuracy", "mean token accuracy, held out"]),
    ],
)
def test_labels(keys: list[str], labels: list[str]) -> None:
    assert panels.labels_of(keys) == labels


def test_own_panels_can_be_given(tmp_path: Path, figures: list) -> None:
    plot_curves({"a": [_rows()]}, [Panel("Mine", ("kl", "reward"), "units")], tmp_path / "x.png")
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["Mine", "Mine: reward"]
    assert figures[0].axes[0].get_ylabel() == "units"


@pytest.mark.parametrize(
    "values",
    [
        [0.43124, 0.43162, 0.43174, 0.43197], [1.1e-6, 1.6e-6, 1.9e-6, 4e-7], [-0.000123, -0.000125, -0.000124, -0.000129],
        [123456.7, 123456.9, 123456.8, 123456.75], [9.9e8, 1.2e9, 1.1e9, 1e9], [100.00012, 100.00018, 100.00015, 100.0001],
        [1e-12, 2e-9, 5e-5, 1e4], [0.0, 0.0, 0.0, 0.0], [-3.25, 700.0, 12.0, 80.0],
    ],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("kind", [{}, {"log": True}, {"zero": True}], ids=["plain", "log", "zero"])
def test_labels_of_an_axis_do_not_touch(figures: list, values: list[float], kind: dict[str, Any]) -> None:
    """Also where numbers differ in their last digits: tick labels, the axis's own label and the figure's edge."""
    rows = [{"step": step, "x": value} for step, value in enumerate(values, 1)]
    curves.draw_run(rows, [Panel("Left", ("x",), "nats per token", **kind), Panel("Right", ("x",), "GiB", **kind)])
    figure = figures[0]
    for axis in figure.axes:
        label = axis.yaxis.label.get_window_extent()
        low, high = axis.get_ylim()
        ticks = [t for t in axis.yaxis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
        assert ticks or kind == {"log": True}
        for tick in ticks:
            assert tick.label1.get_window_extent().x0 > label.x1 + 1, (tick.label1.get_text(), values)
        assert label.x0 > 2
    left, right = figure.axes
    assert right.yaxis.label.get_window_extent().x0 > left.get_window_extent().x1


@pytest.mark.parametrize("title", ["Tokens per second: sampled tokens per second", "eval_" + "long/" * 12, "x"])
def test_a_long_title_ends_with_its_panel(figures: list, title: str) -> None:
    curves.draw_run([{"step": 1, "x": 1.0}], [Panel(title, ("x",))])
    (axis,) = figures[0].axes
    shown = axis.title if axis.title.get_text() else axis._left_title
    assert shown.get_text() == title
    assert shown.get_window_extent().x1 <= figures[0].bbox.x1


def test_panels_of_a_picture_share_their_steps(figures: list) -> None:
    rows: list[dict[str, float]] = [{"step": step, "x": float(step)} for step in range(1, 41)]
    rows += [{"step": step, "y": 1.0} for step in (20, 40)]
    curves.draw_run(rows, [Panel("Training", ("x",)), Panel("Held out", ("y",))])
    training, held_out = figures[0].axes
    assert training.get_xlim() == held_out.get_xlim()
    assert training.get_xlim()[0] < 1 < 40 < training.get_xlim()[1]
    assert {int(tick) for tick in training.get_xticks() if 1 <= tick <= 40} == {10, 20, 30, 40}


def test_memory_is_drawn_from_zero_and_held_out_metrics_have_the_unit_of_their_training(figures: list) -> None:
    rows = [{"step": step, "meter/peak_memory_gib": 0.43 + 1e-4 * step} for step in range(1, 6)]
    curves.draw_run(rows, panels.present(panels.PANELS, ["meter/peak_memory_gib"]))
    assert figures[0].axes[0].get_ylim()[0] == 0
    known = panels.present(panels.PANELS, ["completions/clipped_ratio", "completions/mean_length"])
    more = panels.leftover_panels(known, ["eval_completions/clipped_ratio", "eval_completions/mean_length", "eval_own"])
    assert [panel.unit for panel in more] == ["fraction", "tokens", ""]


def test_more_groups_than_colours_stay_apart(tmp_path: Path, figures: list) -> None:
    plot_curves({f"g{index}": [_rows(index)] for index in range(12)}, ["kl"], tmp_path / "x.png")
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in figures[0].axes[0].lines}
    assert len(looks) == 12


# -- tables -------------------------------------------------------------------------------------------------------


def test_comparison_by_hand() -> None:
    runs = {"agro": [_rows(0.2), _rows(0.4)], "rloo": [_rows(0.0), _rows(0.1)]}
    table = comparison_table(runs, ["reward", "kl", "absent"], last=0.25)
    # the last quarter of 12 points: steps 10, 11 and 12, mean reward 1.1
    assert table.text.splitlines() == [
        "      seeds              reward                   kl  absent",
        "----  -----  ------------------  -------------------  ------",
        "agro      2  1.4 (1.3 to 1.5) *  0.11 (0.11 to 0.11)     nan",
        "rloo      2   1.15 (1.1 to 1.2)  0.11 (0.11 to 0.11)     nan",
    ]
    assert str(table) == table.text
    assert "<td class=best>1.4 (1.3 to 1.5)</td>" in table.html
    assert table.html.count("class=best") == 1  # kl has no better direction
    assert _Page(table.html).open == []


def test_comparison_defaults_to_what_compares() -> None:
    head = comparison_table({"a": [_rows()], "b": [_rows()]}).text.splitlines()[0].split()
    assert head == ["seeds", "eval_reward", "reward", "kl"]
    assert comparison_table({"a": [[{"step": 1, "loss": 2.0}]]}).text.splitlines()[0].split() == ["seeds", "loss"]
    for last in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=r"last must be in \(0, 1\]"):
            comparison_table({"a": [_rows()]}, last=last)


def test_a_seed_that_diverged_is_not_averaged_away() -> None:
    bad = _rows()
    bad[11]["reward"] = math.nan
    table = comparison_table({"a": [_rows(), bad], "b": [_rows(-9.0)]}, ["reward"], last=0.1)
    assert table.text.splitlines()[2].split() == ["a", "2", "nan"]
    assert "*" not in table.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (1234567, "1,234,567"), (1234.567, "1,235"), (2.0, "2"), (1e-7, "1e-07"), (math.nan, "nan"),
        (-math.inf, "-inf"), (True, "True"), ("x", "x"), (None, ""), (1e20, "1e+20"), (0.0, "0"), (-0.5, "-0.5"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": {}}) == {"a.b.c": 1, "d": "[1, 2]", "e": "{}"}


# -- the demo -----------------------------------------------------------------------------------------------------


def test_demo_report(tmp_path: Path) -> None:
    results = []
    for name, gain in (("rloo", 0.2), ("agro_off_policy", 0.3)):
        for seed in (1, 0):
            _run(tmp_path / f"{name}-{seed}", _rows(gain))
            results.append(
                {"algorithm": name, "seed": seed, "before": 0.5, "after": 0.5 + gain + seed / 10, "seconds": 1.0}
            )
    page = demo_report(tmp_path, results)
    assert page == tmp_path / "report.html"
    assert _size((tmp_path / "demo.png").read_bytes())[0] == 3 * 164
    parsed = _Page(page.read_text())
    for words in ("Held-out accuracy", "agro_off_policy", "0.85 (0.8 to 0.9)", "35 (30 to 40)", "25 (20 to 30)"):
        assert words in parsed.words, words
