"""Averages are exact under any cut of a batch; the log after a resume is the log of a run that never stopped."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import rlft
from rlft._failpoint import failpoints_in_source
from rlft.metrics import MetricsLog, MetricSums, comparable, read_metrics, redact
from rlft.types import LossOutput


def _random(seed: int, rows: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return values, torch.rand(rows, width, generator=generator) < 0.6


# -- sums ---------------------------------------------------------------------------------------------------------


def test_hand_worked() -> None:
    sums = MetricSums()
    sums.add("kl", torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[True, False], [True, True]]))
    sums.add("kl", torch.tensor([[3.0]]), torch.tensor([[True]]))
    sums.add("reward", torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([True, False, True]))
    sums.add("flag", torch.tensor([True, True, False, False]))
    sums.add("lr", 0.5)
    sums.add("lr", 1.0, weight=3.0)
    sums.add("count", torch.tensor(7))
    sums.add_min("shortest", torch.tensor([5, 3, 9]))
    sums.add_min("shortest", torch.tensor([4, 1]), torch.tensor([True, False]))
    sums.add_max("longest", torch.tensor([[5.0, 30.0]]), torch.tensor([[True, False]]))
    assert sums.means() == {
        "count": 7.0,
        "flag": 0.5,
        "kl": (1 + 4 + 8 + 3) / 4,
        "longest": 5.0,
        "lr": (0.5 + 3.0) / 4,
        "reward": 0.5,
        "shortest": 3.0,
    }
    assert list(sums.means()) == sorted(sums.means())
    assert len(sums) == 7


@pytest.mark.parametrize("cut", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1], [3, 0, 3]])
def test_any_cut_gives_the_same_average(cut: list[int]) -> None:
    values, mask = _random(0)
    mask[3] = False  # a row with nothing
    whole, parts = MetricSums(), MetricSums()
    for sums, pieces in ((whole, [6]), (parts, cut)):
        start = 0
        for size in pieces:
            piece, seen = values[start : start + size], mask[start : start + size]
            one = MetricSums()
            one.add("x", piece, seen)
            one.add_min("low", piece, seen)
            one.add_max("high", piece, seen)
            sums.merge(one)
            start += size
    exact = values[mask]
    for found in (whole.means(), parts.means()):
        assert found["x"] == pytest.approx(math.fsum(exact.tolist()) / len(exact), rel=1e-14)
        assert found["low"] == exact.min()
        assert found["high"] == exact.max()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_masked_garbage_changes_nothing(garbage: float) -> None:
    values, mask = _random(1)
    results = []
    for fill in (0.0, garbage):
        sums = MetricSums()
        spoiled = values.where(mask, fill)
        sums.add("x", spoiled, mask)
        sums.add_min("low", spoiled, mask)
        sums.add_max("high", spoiled, mask)
        results.append(sums.means())
    assert results[0] == results[1]


def test_a_nan_that_counts_is_shown() -> None:
    sums = MetricSums()
    sums.add("x", torch.tensor([1.0, float("nan")]))
    sums.add("x", torch.tensor([1.0]))
    sums.add_max("high", torch.tensor([1.0, float("nan")]))
    assert math.isnan(sums.means()["x"])
    assert math.isnan(sums.means()["high"])


def test_nothing_counted_is_nan_not_zero() -> None:
    sums = MetricSums()
    sums.add("x", torch.tensor([5.0]), torch.tensor([False]))
    sums.add_min("low", torch.tensor([5.0]), torch.tensor([False]))
    sums.add_max("high", torch.zeros(0))
    assert all(math.isnan(value) for value in sums.means().values())
    assert MetricSums().means() == {}
    sums.add("x", 2.0)
    assert sums.means()["x"] == 2.0


def test_sums_are_float64_and_hold_no_graph() -> None:
    sums = MetricSums()
    sums.add("x", torch.full((1000,), 0.1, dtype=torch.bfloat16))
    sums.add("y", torch.tensor([16777216.0, 1.0, 1.0]))  # float32 would lose the ones
    sums.add("z", torch.ones(2, requires_grad=True))
    assert sums.means()["x"] == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)), rel=1e-15)
    assert sums.means()["y"] == 16777218.0 / 3
    assert not sums.as_tensor().requires_grad
    assert sums.as_tensor().dtype == torch.float64


def test_wrong_masks_and_kinds_are_refused() -> None:
    sums = MetricSums()
    values = torch.ones(2, 3)
    for mask in (torch.ones(2, 1, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="the mask of 'x'"):
            sums.add("x", values, mask)
    sums.add("x", 1.0)
    with pytest.raises(ValueError, match="'x' is a mean already and cannot be a max too"):
        sums.add_max("x", torch.ones(1))
    with pytest.raises(ValueError, match="weight must be"):
        sums.add("x", 1.0, weight=-1.0)
    with pytest.raises(ValueError, match="weight must be"):
        sums.add("x", 1.0, weight=math.nan)


def test_output_of_a_loss_under_its_own_masks() -> None:
    token_mask = torch.tensor([[True, True, False], [False, False, False]])
    token_loss = LossOutput(
        torch.zeros(2, 3),
        {
            "tokens": torch.tensor([[1.0, 2.0, 99.0], [99.0] * 3]),
            "rows": torch.tensor([4.0, 99.0]),
            "one": torch.tensor(5.0),
        },
        "token_mean",
        token_mask,
    )
    row_loss = LossOutput(
        torch.zeros(2),
        {"rows": torch.tensor([99.0, 7.0]), "tokens": torch.ones(2, 3)},
        "mean",
        torch.tensor([False, True]),
    )
    pair_loss = LossOutput(torch.zeros(1), {"pairs": torch.tensor([3.0])}, "mean")
    sums = MetricSums()
    sums.add_output(token_loss, token_mask, prefix="a/")
    sums.add_output(row_loss, token_mask, prefix="b/")
    sums.add_output(pair_loss, token_mask)
    expected = {"a/tokens": 1.5, "a/rows": 4.0, "a/one": 5.0, "b/rows": 7.0, "b/tokens": 1.0, "pairs": 3.0}
    assert sums.means() == dict(sorted(expected.items()))
    with pytest.raises(
        ValueError, match=r"metric 'g' has shape \[4\], which fits neither the loss \[1\] nor the batch \[2, 3\]"
    ):
        sums.add_output(LossOutput(torch.zeros(1), {"g": torch.ones(4)}, "mean"), token_mask)


# -- over processes -----------------------------------------------------------------------------------------------


def _sums(seed: int) -> MetricSums:
    sums = MetricSums()
    values, mask = _random(seed)
    sums.add("both", values, mask)
    sums.add_min("low", values, mask)
    if seed % 2:
        sums.add("only/odd:key", values, mask)
        sums.add_max("high", values, mask)
    return sums


def _merged(seeds: list[int]) -> dict[str, float]:
    merged = MetricSums()
    for seed in seeds:
        merged.merge(_sums(seed))
    return merged.means()


def test_common_layout() -> None:
    parts = [_sums(seed) for seed in (0, 1, 2)]
    layout = sorted({entry for part in parts for entry in part.layout()})
    assert layout == ["max:high", "mean:both", "mean:only/odd:key", "min:low"]
    stacked = torch.stack([part.as_tensor(layout) for part in parts])
    assert stacked.shape == (3, 4, 2)
    assert MetricSums.from_tensors(layout, stacked).means() == pytest.approx(_merged([0, 1, 2]), rel=1e-15)
    with pytest.raises(ValueError, match="the layout lacks 'max:high'"):
        parts[1].as_tensor(["mean:both"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_reduce_over_ranks_with_different_metrics(world_size: int) -> None:
    barrier = threading.Barrier(world_size, timeout=30)
    slots: list[torch.Tensor] = [torch.empty(0)] * world_size
    results: list[dict[str, float]] = [{}] * world_size
    calls = [0] * world_size

    def work(rank: int) -> None:
        def gather(tensor: torch.Tensor) -> torch.Tensor:
            calls[rank] += 1
            slots[rank] = tensor
            barrier.wait()
            whole = torch.cat(list(slots))
            barrier.wait()
            return whole

        results[rank] = _sums(rank).reduce(gather).means()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(_merged(list(range(world_size))), rel=1e-15)
    assert calls == [3] * world_size


def test_reduce_of_nothing() -> None:
    assert MetricSums().reduce(lambda tensor: tensor).means() == {}


def test_state_round_trip() -> None:
    sums = _sums(1)
    sums.add("nothing", torch.ones(1), torch.tensor([False]))
    sums.add_min("never", torch.zeros(0))
    state = sums.state_dict()
    back = MetricSums.from_state(state)
    assert torch.equal(back.as_tensor(), sums.as_tensor())
    assert back.layout() == sums.layout()
    back.merge(_sums(3))
    sums.merge(_sums(3))
    assert torch.equal(back.as_tensor(), sums.as_tensor())
    with pytest.raises(ValueError, match="kind 'median'"):
        MetricSums.from_state({"x": ["median", 1.0, 1.0]})


@pytest.mark.gpu
def test_devices_mix() -> None:
    sums = MetricSums()
    sums.add("x", torch.ones(2, device="cuda"))
    sums.add("x", torch.zeros(2))
    sums.add("y", torch.ones(2, device="cuda"))
    assert sums.means() == {"x": 0.5, "y": 1.0}


# -- the log ------------------------------------------------------------------------------------------------------


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {
        "loss": 0.1 + 0.2,
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "count": 3,
        "flag": True,
        "none": None,
        "text": "é\n",
        "list": [1.0, math.nan, (2,)],
        "map": {"x": math.inf},
        "tensor": torch.tensor(2.5),
        "numpy": np.float32(0.5),
        "int64": np.int64(4),
    }
    with MetricsLog(path) as log:
        log.write(1, row)
        assert path.read_bytes().endswith(b"\n")  # flushed at once
        log.write(1, {"step": 1, "eval_loss": 1.0})
    (first, second) = read_metrics(path)
    assert repr(first) == repr(
        {"step": 1, **row, "list": [1.0, math.nan, [2]], "tensor": 2.5, "numpy": 0.5, "int64": 4}
    )
    assert second == {"step": 1, "eval_loss": 1.0}
    assert repr(read_metrics(tmp_path)) == repr([first, second])
    for line in path.read_text().splitlines():  # strict JSON: no bare NaN
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.write(5, {})
        for bad, message in [
            ({"x": torch.ones(2)}, r"metric 'x' has shape \[2\]"),
            ({"x": {"y": [object()]}}, r"metric 'x.y\[0\]' is a object"),
            ({"step": 4}, "values hold step 4 but the row is of step 5"),
        ]:
            with pytest.raises(ValueError, match=message):
                log.write(5, bad)
        with pytest.raises(ValueError, match=r"step 4 comes after step 5 .* truncate_to\(4\)"):
            log.write(4, {})
        assert len(read_metrics(tmp_path / "m")) == 1


def _run(path: Path, start: int, stop: int) -> int:
    """A stretch of training: a row per step, an evaluation every third; where the log stood at the last step."""
    with MetricsLog(path) as log:
        for step in range(start, stop):
            log.write(step, {"loss": 1 / step})
            if step % 3 == 0:
                log.write(step, {"eval_loss": 2 / step})
        return log.offset


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("saved_at", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("partial", [b"", b'{"step": 9, "lo', b'{"step": 9'])
def test_the_log_after_a_resume_is_that_of_an_uninterrupted_run(
    tmp_path: Path, saved_at: int, with_offset: bool, partial: bytes
) -> None:
    _run(tmp_path / "whole", 1, 11)
    offset = _run(tmp_path / "broken", 1, saved_at + 1)
    _run(tmp_path / "broken", saved_at + 1, 9)
    with open(tmp_path / "broken", "ab") as file:
        file.write(partial)  # killed in the middle of a line
    with MetricsLog(tmp_path / "broken") as log:
        log.truncate_to(saved_at, offset if with_offset else None)
        assert log.offset == offset
    _run(tmp_path / "broken", saved_at + 1, 11)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()


def test_half_a_line_is_removed_when_the_log_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    with MetricsLog(path) as log:
        log.write(2, {"loss": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
    path.write_bytes(b"half" * 50_000)  # longer than one block of the search for its beginning
    with MetricsLog(path) as log:
        assert log.offset == 0


def test_offset_forgets_rows_of_the_same_step_written_later(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.write(1, {"loss": 1.0})
        offset = log.offset
        log.write(1, {"eval_loss": 2.0})
        log.truncate_to(1, offset)
        assert read_metrics(tmp_path / "m") == [{"step": 1, "loss": 1.0}]
        log.write(1, {"eval_loss": 3.0})
    assert read_metrics(tmp_path / "m")[1] == {"step": 1, "eval_loss": 3.0}


def test_an_offset_of_another_log_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 1.0})
        size = log.offset
        for offset in (1, size - 1, size, -1):
            with pytest.raises(ValueError, match="is not the end of a row of step 1 or before"):
                log.truncate_to(1, offset)
        with pytest.warns(UserWarning, match="rows were lost"):
            log.truncate_to(1, size + 10)
        assert read_metrics(tmp_path / "m") == [{"step": 1, "loss": 1.0}]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for text in ('{"step": 1}\nnot json\n{"step": 2}\n', '{"step": 1}\n{"loss": 1}\n', '{"step": 1}\n{"step": true}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="m:2 is not a row of metrics"):
            read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "missing")


def test_a_disabled_log_touches_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m", enabled=False) as log:
        log.write(3, {"loss": 1.0})
        log.truncate_to(1, 5)
        log.sync()
        assert log.offset == 0
    assert not (tmp_path / "m").exists()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.write(1, {"loss": 1.0})
        for when in ("before", "after"):
            with monkeypatch.context() as patch:
                patch.setenv("RLFT_FAILPOINT", f"metrics.line.write.{when}:1:oserror:ENOSPC")
                patch.setattr("rlft._failpoint._passages", __import__("collections").Counter())
                with pytest.raises(OSError, match="metrics not written, No space left on device") as caught:
                    log.write(2, {"loss": 2.0})
                assert str(tmp_path / "m") in str(caught.value)
            assert read_metrics(tmp_path / "m") == [{"step": 1, "loss": 1.0}]
        log.write(2, {"loss": 2.0})
    assert len(read_metrics(tmp_path / "m")) == 2


KILLED = """
import os, sys
from pathlib import Path
from rlft.metrics import MetricsLog, read_metrics
names = sys.argv[2].split(",")
for index, name in enumerate(names):
    path = Path(sys.argv[1]) / f"log-{index}"
    pid = os.fork()
    if pid == 0:
        with MetricsLog(path) as log:
            for step in (1, 2, 3):
                log.write(step, {"loss": step})
        with open(path, "ab") as file:
            file.write(b'{"step": 4')
        os.environ["RLFT_FAILPOINT"] = name + ":1"
        with MetricsLog(path) as log:
            log.write(4, {"loss": 4})
            log.sync()
            log.truncate_to(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9, name
    with MetricsLog(path) as log:
        log.truncate_to(2)
    assert read_metrics(path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}], name
print("done", len(names))
"""


def test_kill_at_every_instant_of_the_log(tmp_path: Path) -> None:
    names = sorted(name for name in failpoints_in_source() if name.startswith("metrics."))
    assert len(names) >= 10
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), ",".join(names)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(rlft.__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"done {len(names)}\n"


def test_comparable_drops_the_clock_alone() -> None:
    row = {
        "step": 1,
        "loss": math.nan,
        "step_time": 3.0,
        "update_time": 1.0,
        "tokens_per_second": 9.0,
        "time": 5,
        "timely": 2,
    }
    assert comparable([row]) == [{"step": 1, "loss": "nan", "timely": 2}]
    assert comparable([row]) == comparable([{**row, "step_time": 4.0}])


# -- secrets ------------------------------------------------------------------------------------------------------

CANARIES = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "hf_" + "CANARY99",
    "sk-" + "proj-Ab12Cd34Ef56Gh78",
    "ghp_" + "A" * 36,
    "github_pat_" + "11ABCDEFG0abcdefghij_klmnop",
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "xoxb-" + "1234567890-abcdef",
    "AIza" + "a" * 35,
    "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("canary", CANARIES)
def test_tokens_are_masked_wherever_they_are(canary: str) -> None:
    for text in (canary, f"loading with {canary}, then", f'{{"x": "{canary}"}}', f"({canary})"):
        assert canary not in redact(text)
        assert "[redacted]" in redact(text)
    nested = {"a": [{"b": (canary, 1)}], canary: 2}
    assert canary not in repr(redact(nested))


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "password",
        "db-password",
        "client_secret",
        "Authorization",
    ],
)
def test_values_under_secret_names_are_masked(key: str) -> None:
    assert redact({key: "plain-words"}) == {key: "[redacted]"}
    assert redact({key: ["plain", "words"]}) == {key: "[redacted]"}
    assert redact({key: 12345}) == {key: "[redacted]"}
    assert redact({key: None, "x": {key: ""}}) == {key: None, "x": {key: ""}}
    assert "plain-words" not in redact(f"{key}=plain-words") or key == "Authorization"


def test_logins_and_bearers_in_text() -> None:
    assert redact("https://user:pa55word@host/path?x=1") == "https://[redacted]@host/path?x=1"
    assert redact("Authorization: Bearer abcdefgh.ijkl") == "Authorization: Bearer [redacted]"
    assert redact("password: hunter22, next") == "password: [redacted], next"


def test_what_is_no_secret_stays() -> None:
    config = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "num_tokens": 5,
        "max_new_tokens": 64,
        "token_kl": 0.1,
        "stop_token_ids": (1, 2),
        "tokenizer": "hf_datasets/sk-learn",
        "reduction": "token_mean",
        "model": "org/Model-7B",
        "revision": "a" * 40,
        "text": "risk-averse task-specific hf_transfer_enabled",
        "push_to_hub": False,
        "lr": 1e-5,
        "url": "https://host:8000/path",
    }
    assert redact(config) == config
    assert redact(3.5) == 3.5


def test_secrets_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact(["uses correct-horse-battery here", "abc"]) == ["uses [redacted] here", "abc"]


@pytest.mark.parametrize(
    "point", ["metrics.sync", "metrics.resume.sync", "metrics.resume.truncate", "metrics.partial.sync"]
)
def test_a_full_disk_names_the_log_wherever_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2):
            log.write(step, {"loss": 1.0})
    if "partial" in point:
        with path.open("a") as torn:
            torn.write('{"st')
    monkeypatch.setenv("RLFT_FAILPOINT", f"{point}.before:1:oserror:ENOSPC")
    monkeypatch.setattr("rlft._failpoint._passages", Counter())
    with pytest.raises(OSError, match=r"metrics not written, No space left on device, about .* bytes needed") as caught:  # noqa: PT012
        with MetricsLog(path) as log:
            log.sync()
            log.truncate_to(1)
    assert caught.value.filename == str(path)
