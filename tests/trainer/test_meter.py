"""The meter: every second has one owner, counts are those of the batches, operations are those that torch counts."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlft.metrics import PHASES, comparable, read_metrics
from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.device_limits import Device, ModelCost, device_named, model_cost
from rlft.models.layout import LayoutUsed
from rlft.report.shares import NAMES, draw_shares, phase_seconds, share_table
from rlft.run import display
from rlft.run.measure.journal import Journal
from rlft.run.measure.meter import Meter
from rlft.run.progress import Progress
from tests.test_trainer import PAIRS, PROMPTS, digits_reward, trainer
from tests.tiny import random_batch, tiny_llama

ALONE: Any = SimpleNamespace(world_size=1, is_main=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr("rlft.run.measure.meter.time.perf_counter", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_every_second_has_one_owner(clock: Any) -> None:
    meter = Meter(torch.device("cpu"))
    clock(50.0)
    meter.start(None, tokens_seen=0, mixed_precision="no")  # what was before the start is nobody's
    clock(1.0)
    with meter.phase("forward_backward"):
        clock(2.0)
        with meter.phase("reference"):
            clock(4.0)
        clock(8.0)
    with meter.phase("evaluate"):
        clock(16.0)
        with meter.phase("sample"), meter.phase("reward"):  # an evaluation owns what happens in it
            clock(32.0)
    with contextlib.suppress(KeyError), meter.phase("save"):  # an error ends the phase as well
        clock(64.0)
        raise KeyError
    clock(128.0)
    values = meter.flush(ALONE, tokens_seen=430)
    seconds = {k.removeprefix("meter/share/"): v * 255 for k, v in values.items() if "share/" in k}
    assert seconds == pytest.approx(
        {"other": 129.0, "forward_backward": 10.0, "reference": 4.0, "evaluate": 48.0, "save": 64.0}
    )
    assert values["meter/seconds"] == 255.0
    assert values["meter/trained_tokens_per_second"] == pytest.approx(430 / 143)  # without evaluation and saving
    assert list(meter.shares())[:2] == ["other", "save"]
    clock(5.0)
    again = meter.flush(ALONE, tokens_seen=430)
    assert (again["meter/share/other"], again["meter/seconds"]) == (1.0, 5.0)
    assert again["meter/trained_tokens_per_second"] == 0.0


def test_on_cuda_events_give_the_same_and_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events in place of the clock: no GPU is needed to see that each interval goes to the phase that began it."""
    now, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, later: Any) -> float:
            assert waits, "read before the device was waited for"
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unknown one")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    meter = Meter(torch.device("cuda"))
    meter.start(None, tokens_seen=0, mixed_precision="no")
    for line in (1, 2):
        now[0] += 1.0
        with meter.phase("forward_backward"):
            now[0] += 2.0
            with meter.phase("reference"):
                now[0] += 4.0
        now[0] += 1.0
        values = meter.flush(ALONE, tokens_seen=0)
        assert len(waits) == line
        assert values["meter/seconds"] == pytest.approx(8.0)
        shares = {k: v for k, v in values.items() if "share" in k}
        assert shares == pytest.approx(
            {"meter/share/other": 0.25, "meter/share/forward_backward": 0.25, "meter/share/reference": 0.5}
        )
        assert values["meter/peak_memory_gib"] == 3.0


def test_a_run_is_metered(tmp_path: Path) -> None:
    t = trainer(
        tmp_path, "grpo", PROMPTS, reward=digits_reward, lora=True, beta=0.04, max_steps=4, num_iterations=2, save_steps=2,
        per_device_train_batch_size=16, num_generations=8,
    )  # fmt: skip
    t.train()
    rows = read_metrics(tmp_path)
    for row in rows:
        shares = {k: v for k, v in row.items() if k.startswith("meter/share/")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert row["meter/seconds"] > 0
        assert row["meter/peak_memory_gib"] > 0.05
        assert row["padding_efficiency"] == 1.0  # packed: nothing is padding
        assert row["prompt_sharing"] > 1.15
        assert not [k for k in comparable([row])[0] if k.startswith("meter/")]
    sampled = [("meter/share/sample" in row, "meter/sampled_tokens_per_second" in row) for row in rows]
    assert sampled == [(True, True), (False, False)] * 2
    assert {
        "meter/share/reward",
        "meter/share/reference",
        "meter/share/forward_backward",
        "meter/share/optimizer",
    } <= set(rows[0])
    assert "meter/share/save" in rows[2]
    trained = rows[0]["meter/trained_tokens_per_second"] * rows[0]["meter/seconds"]
    assert trained == pytest.approx(rows[0]["num_tokens"])
    assert sum(phase_seconds(rows).values()) == pytest.approx(sum(row["meter/seconds"] for row in rows))


def test_padding_is_what_the_padded_layout_holds() -> None:
    batch = random_batch(groups=4, per_group=3, prompt_lengths=(2, 9), lengths=(1, 7))
    lengths = batch.prompt_mask.sum(-1)[batch.group_ids] + batch.completion_mask.sum(-1)
    used = {}
    for layout in ("padded", "shared"):
        policy = Policy(tiny_llama(), reference="none", layout=layout)  # type: ignore[arg-type]
        policy(batch, want=frozenset({"logps"}))
        used[layout] = policy.layout_used
    padded, shared = used["padded"], used["shared"]
    assert padded.tokens == padded.repeated == shared.repeated == int(lengths.sum())
    assert padded.computed == 12 * int(lengths.max())
    assert padded.scored == shared.scored == int(batch.completion_mask.sum())
    assert padded.rows == shared.rows == 12
    # each prompt once, and no answer's last token
    assert shared.computed == shared.tokens == int(batch.prompt_mask.sum() + batch.completion_mask.sum()) - 12


def test_it_costs_little(tmp_path: Path) -> None:
    """All that a step calls, over the time of a step of the smallest model there is."""
    t = trainer(tmp_path, "grpo", PROMPTS, reward=digits_reward, beta=0.04, max_steps=4, self_checks=False)
    t.train()
    step = min(row["step_time"] for row in read_metrics(tmp_path))
    meter = t.journal.meter
    started = time.perf_counter()
    for _ in range(200):
        for name in ("sample", "reward", "reference", "forward_backward", "reference", "optimizer"):
            with meter.phase(name):
                pass
        meter.passed(t.policy.layout_used, backward=True)
        meter.sampled([5] * 8)
        meter.flush(t.processes, tokens_seen=t.tokens_seen)
    each = (time.perf_counter() - started) / 200
    assert each < 0.01 * step, (each, step)


# -- operations ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True])
def test_operations_are_those_that_torch_counts(lora: bool) -> None:
    """One row, eager attention (which computes every pair: twice the causal half), a dense head on all answers' tokens."""
    model = tiny_llama(attn_implementation="eager", dtype=torch.float32)
    if lora:
        model = add_lora(model, LoraSettings(r=4))
    policy = Policy(model, reference="none", layout="padded")
    cost = model_cost(policy, mixed_precision="no")
    assert cost is not None
    ids = torch.randint(4, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits = policy.hf_model(input_ids=ids).logits
    assert counter.get_total_flops() == pytest.approx(cost.forward(24, 24, 2 * 24))
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    backward = cost.update(24, 24, 2 * 24) - cost.forward(24, 24, 2 * 24)
    # the first layer's inputs need no gradient, which the estimate leaves out; under LoRA its share of two layers is large
    assert counter.get_total_flops() == pytest.approx(backward, rel=0.02 if not lora else 0.2)


#: Name as the driver gives it -> TFLOP/s of dense bfloat16 (float16 before Ampere) and float32, GB/s: the data sheets.
SHEETS = {
    "NVIDIA H200": (989, 67, 4800), "NVIDIA H200 NVL": (835, 60, 4800), "NVIDIA H100 80GB HBM3": (989, 67, 3350),
    "NVIDIA H100 PCIe": (756, 51, 2000), "NVIDIA H100 NVL": (835, 60, 3900), "NVIDIA GH200 480GB": (990, 67, 4000),
    "NVIDIA B200": (2250, 75, 8000), "NVIDIA A100-SXM4-80GB": (312, 19.5, 2039), "NVIDIA A100-SXM4-40GB": (312, 19.5, 1555),
    "NVIDIA A100-PCIE-40GB": (312, 19.5, 1555), "NVIDIA A100 80GB PCIe": (312, 19.5, 1935), "NVIDIA L4": (121, 30.3, 300),
    "NVIDIA L40S": (362, 91.6, 864), "NVIDIA L40": (181, 90.5, 864), "NVIDIA A10": (125, 31.2, 600),
    "NVIDIA A30": (165, 10.3, 933), "NVIDIA A40": (149.7, 37.4, 696), "NVIDIA GeForce RTX 4090": (165.2, 82.6, 1008),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 936), "NVIDIA RTX A6000": (154.8, 38.7, 768), "Tesla T4": (65, 8.1, 320),
    "NVIDIA RTX 6000 Ada Generation": (364, 91.1, 960), "Tesla V100-SXM2-16GB": (125, 15.7, 900),
}  # fmt: skip


@pytest.mark.parametrize("name", SHEETS)
def test_known_devices_by_their_names(name: str) -> None:
    device = device_named(name)
    assert device is not None
    half, single, bandwidth = SHEETS[name]
    assert (device.half, device.single, device.bandwidth) == pytest.approx(
        (half * 1e12, single * 1e12, bandwidth * 1e9)
    )
    assert device.tf32 == pytest.approx(0.0 if "Tesla" in name else half * 0.5e12)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce GT 1030", "NVIDIA L400", "cpu", "NVIDIA A10G", "NVIDIA A100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "AMD Instinct MI300X"],
)  # fmt: skip
def test_figures_of_other_devices_are_not_invented(name: str) -> None:
    assert device_named(name) is None


def on_a(monkeypatch: pytest.MonkeyPatch, name: str, policy: Any) -> tuple[Journal, list[str]]:
    """The journal of a run that was started on a mocked CUDA device, and the notes of its start."""
    notes: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    seconds = iter(range(1000))

    class Event:  # every phase takes a second
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = float(next(seconds))

        def elapsed_time(self, later: Any) -> float:
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Journal, "note", lambda journal, text: notes.append(text))
    alone: Any = SimpleNamespace(**vars(ALONE), device=torch.device("cuda"))
    journal = Journal(alone, Progress(1), Path("run"), quiet=True)
    journal.start(policy, mixed_precision="bf16")
    return journal, notes


def test_mfu_on_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of forward and backward: operations over 989e12."""
    policy = Policy(tiny_llama(), reference="none", layout="padded")
    journal, notes = on_a(monkeypatch, "NVIDIA H200", policy)
    assert not notes
    used = LayoutUsed(computed=120, tokens=100, repeated=100, scored=40, rows=2)
    with journal.meter.phase("forward_backward"):
        pass
    journal.meter.passed(used, backward=True)
    values = journal.flush()
    cost = model_cost(policy, mixed_precision="bf16")
    assert cost is not None
    assert values["meter/mfu"] == pytest.approx(cost.update(100, 40, 50) / 989e12)
    assert values["meter/fraction_of_floor"] == pytest.approx(
        cost.update(100, 40, 50) / 989e12 / values["meter/seconds"]
    )


def test_an_unknown_device_is_said_and_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_llama(), reference="none", layout="padded")
    journal, notes = on_a(monkeypatch, "NVIDIA A10G", policy)
    assert notes == [
        "meter/mfu and meter/fraction_of_floor are left out: what a 'NVIDIA A10G' can do at most is not in the table "
        "(rlft.models.device_limits.DEVICES)"
    ]
    journal.meter.passed(LayoutUsed(computed=120, tokens=100, repeated=100, scored=40, rows=2), backward=True)
    assert not {"meter/mfu", "meter/fraction_of_floor"} & set(journal.flush())


def test_a_model_whose_operations_are_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlft.run.measure.meter.model_cost", lambda policy, mixed_precision: None)
    journal, notes = on_a(monkeypatch, "NVIDIA H200", Policy(tiny_llama(), reference="none"))
    assert "how many operations this model takes is not known" in notes[0]
    assert "meter/mfu" not in journal.flush()


def test_tf32_is_compared_with_its_own_peak() -> None:
    before = torch.get_float32_matmul_precision()
    policy = Policy(tiny_llama(), reference="none")
    h200, t4 = device_named("NVIDIA H200"), device_named("Tesla T4")
    assert h200 is not None
    assert t4 is not None
    try:
        for precision, peaks in (("highest", (67e12, 8.1e12)), ("high", (494.5e12, 8.1e12))):
            torch.set_float32_matmul_precision(precision)
            cost = model_cost(policy, mixed_precision="no")
            assert cost is not None
            assert (cost.peak(h200), cost.peak(t4)) == pytest.approx(peaks)
    finally:
        torch.set_float32_matmul_precision(before)


def test_mfu_and_the_floor_by_hand(clock: Any) -> None:
    """A device of 1e9 operations and 1e6 bytes per second, a model of 1000 operations a token."""
    meter = Meter(torch.device("cpu"))
    meter._peak = Device(half=2e9, single=1e9, bandwidth=1e6, tf32=0.0)
    meter._cost = ModelCost(trunk=1000, pair=2, head=500, bytes=4000, backward=2, head_backward=2, half=False)
    with meter.phase("sample"):
        clock(1.0)
    meter.sampled([10, 30])
    used = LayoutUsed(computed=120, tokens=100, repeated=100, scored=40, rows=2)
    with meter.phase("forward_backward"):
        clock(0.5)
    meter.passed(used, backward=True, passes=2)
    values = meter.flush(ALONE, tokens_seen=0)
    update = 100 * (3 * 1000 + 3 * 2 * 25) + 40 * 3 * 500
    forward = 100 * (1000 + 2 * 25) + 40 * 500
    decoding = 30 * 4000 / 1e6  # weights are read at each of 30 steps, which is longer than the arithmetic
    assert values["meter/mfu"] == pytest.approx(update / 1e9 / 0.5)
    assert values["meter/fraction_of_floor"] == pytest.approx(((update + forward) / 1e9 + decoding) / 1.5)


# -- the report ---------------------------------------------------------------------------------------------------------
def rows_of(share: float) -> list[dict[str, Any]]:
    return [
        {"step": 1, "meter/seconds": 10.0, "meter/share/sample": share, "meter/share/other": 1 - share},
        {"step": 2, "meter/seconds": 30.0, "meter/share/sample": 0.5, "meter/share/save": 0.5},
        {"step": 2, "eval_reward": 1.0},
    ]


def test_seconds_come_back_from_shares() -> None:
    assert phase_seconds(rows_of(0.2)) == pytest.approx({"sample": 17.0, "save": 15.0, "other": 8.0})
    table = share_table({"run": [rows_of(0.2)]})
    assert table is not None
    assert "17 s (42.5%)" in table.text
    assert "40 s" in table.text
    two = share_table({"a": [rows_of(0.2), rows_of(0.4)], "b": [rows_of(1.0)]})
    assert two is not None
    assert "18 s (45.0%)" in two.text  # the mean of the seeds
    assert share_table({"old": [[{"step": 1, "loss": 1.0}]]}) is None
    assert set(NAMES) == set(PHASES)


def test_the_report_shows_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlft.report import write_report

    assert draw_shares({"old": [[{"step": 1, "loss": 1.0}]]}) is None
    trainer(tmp_path / "run", "dpo", PAIRS, beta=0.1).train()
    page = write_report(tmp_path / "run").read_text()
    assert "Where the time went" in page
    assert "forward and backward" in page
    assert "meter/share/other" not in page.split("Every metric")[0]
    assert (tmp_path / "run" / "report-time.png").read_bytes().startswith(b"\x89PNG")


def test_the_live_line_by_hand() -> None:
    values = {
        "loss": 1.0,
        "meter/share/sample": 0.25,
        "meter/share/forward_backward": 0.6,
        "meter/share/save": 0.001,
        "meter/trained_tokens_per_second": 12345.0,
        "meter/sampled_tokens_per_second": 800.0,
        "meter/peak_memory_gib": 1.5,
        "padding_efficiency": 0.97,
        "prompt_sharing": 2.416,
        "meter/mfu": 0.41,
        "meter/fraction_of_floor": 0.62,
    }
    assert display.meter_line(values) == (
        "forward and backward 60%, sample 25% | 12.3k tok/s trained | 800 sampled | padding efficiency 0.97 | "
        "prompt sharing 2.42x | 1.5 GiB | MFU 41% | 62% of the floor"
    )
    assert display.meter_line({"loss": 1.0, "prompt_sharing": 1.0}) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_shown_while_a_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    run = trainer(tmp_path, "grpo", PROMPTS, reward=digits_reward, max_steps=2, disable_tqdm=False)
    run.train()
    shown = capsys.readouterr()
    text = shown.err if terminal else shown.out
    assert re.search(r"forward and backward \d+%", text)
    assert re.search(r"tok/s trained", text)
    assert re.search(r"padding efficiency \d\.\d\d", text)
    assert re.search(r"[KMG]i?B", text)
