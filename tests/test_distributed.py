"""Two processes (gloo) do what one does: gradients, sampling, checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import _two_processes as job
from tests.test_trust_step import two_steps

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all tests of this file: starting two processes is most of the cost."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    logs = [(folder / f"log{rank}.txt").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests._two_processes", str(folder)],
            cwd=ROOT, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=logs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [-1]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    if codes != [0, 0]:
        tails = "\n".join((folder / f"log{rank}.txt").read_text()[-2500:] for rank in range(2))
        pytest.fail(f"exit codes {codes}\n{tails}")
    return folder


@pytest.mark.parametrize("case", job.CASES)
def test_any_split_over_micro_batches_and_processes_gives_one_gradient(two: Path, tmp_path: Path, case: str) -> None:
    """SGD steps in float64 are gradients: 1e-10 and below, for every averaging."""
    start = {f"model.{n}": p.detach() for n, p in job.tiny_llama(dtype=torch.float64).named_parameters()}
    results = [load_file(two / f"{case}-{accumulation}.safetensors") for accumulation in (1, 2)]
    for accumulation in (1, 2, 4):
        t = job.one_step(tmp_path / str(accumulation), case, rows_each=8 // accumulation, accumulation=accumulation)
        results.append(job.trainables(t))
    for name, value in results[0].items():
        assert not torch.equal(value, start[name]) or "embed" in name
        for other in results[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


def test_trust_region_steps_of_two_processes_are_those_of_one(two: Path, tmp_path: Path) -> None:
    """Gradient, Fisher-vector products, KL and surrogate are sums over all: after two steps the weights agree."""
    one = job.trainables(two_steps(tmp_path / "one", rows_each=32, accumulation=1))
    for accumulation in (1, 2):
        for name, value in load_file(two / f"trust-{accumulation}.safetensors").items():
            torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["uneven", "sequence_mean", "agro", "dropped"])
def test_micro_batches_by_tokens_may_differ_in_number(two: Path, tmp_path: Path, case: str) -> None:
    alone = job.trainables(job.one_step(tmp_path, case, rows_each=8, accumulation=1))
    both = load_file(two / f"{case}-tokens.safetensors")
    start = {f"model.{n}": p.detach() for n, p in job.tiny_llama(dtype=torch.float64).named_parameters()}
    assert any(not torch.equal(value, start[name]) for name, value in both.items())
    for name, value in both.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-10, atol=1e-12)


def test_they_do_differ_in_number(two: Path) -> None:
    zero, one = (json.loads((two / f"rank{rank}.json").read_text())["micro_batches"] for rank in range(2))
    for case in zero:
        assert len(zero[case]) == len(one[case]), "sharded forward passes wait for each other"
    own = [sum(rows > 0 for rows in counts["uneven"]) for counts in (zero, one)]
    assert own[0] != own[1]
    assert sum(zero["uneven"]) == sum(one["uneven"]) == 8
    assert 0 < sum(zero["dropped"]) + sum(one["dropped"]) < 24


def test_two_processes_share_one_cache_of_reference_log_probs(two: Path) -> None:
    assert len(list((two / "ref").glob("*.json"))) == 1
    live = load_file(two / "pairs-1.safetensors")
    for run in ("computed", "read"):
        for name, value in load_file(two / f"pairs-{run}.safetensors").items():
            torch.testing.assert_close(value, live[name], rtol=1e-10, atol=1e-12)


def test_ranks_sample_different_answers_and_end_with_the_same_weights(two: Path) -> None:
    zero, one = (json.loads((two / f"rank{rank}.json").read_text()) for rank in range(2))
    assert (zero["world"], one["world"], zero["step"], one["step"]) == (2, 2, 3, 3)
    assert zero["weights"] == one["weights"]
    pairs = list(zip(zero["samples"], one["samples"], strict=True))
    assert sum(a == b for a, b in pairs) < 0.2 * len(pairs), "the same seed on every rank draws duplicates"


def test_a_kl_controller_counts_the_answers_of_both_processes(two: Path) -> None:
    rows = [json.loads(line) for line in (two / "online" / "metrics.jsonl").read_text().splitlines()]
    beta = 0.1
    for row in rows:
        assert row["kl/beta"] == pytest.approx(beta, rel=1e-9)
        beta *= 1 + (row["objective/kl"] - 1.0) * 16 / 1000
    assert rows[-1]["objective/kl"] > 1e-3


def test_a_finished_run_of_two_resumes_as_finished(two: Path) -> None:
    assert json.loads((two / "report.json").read_text()) == {"resumed": 3}
    assert (two / "online" / "checkpoint-3" / "rng.rank1.json").exists()


def test_a_step_that_one_process_finds_not_finite_is_skipped_by_both(two: Path) -> None:
    zero, one = (json.loads((two / f"skipped{rank}.json").read_text()) for rank in range(2))
    assert zero["sums"] == one["sums"]
    assert (zero["skipped"], one["skipped"], zero["step"], one["step"]) == (2, 2, 4, 4)
    first, second, third, fourth = zero["sums"]
    assert first == second == third != fourth
    rows = [json.loads(line) for line in (two / "skipped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows[1:3]] == ["nan", "nan"]


def test_a_self_check_that_one_process_fails_stops_both(two: Path) -> None:
    zero, one = (json.loads((two / f"skipped{rank}.json").read_text())["said"] for rank in range(2))
    assert "another process stopped the run" in zero
    assert "self-check trainable: no parameter is trainable" in one


def test_whole_step_advantages_of_an_evaluation_do_not_depend_on_the_number_of_processes(
    two: Path, tmp_path: Path
) -> None:
    alone, both = job.evaluated(tmp_path), json.loads((two / "evaluated.json").read_text())
    for case, values in alone.items():
        for one, other in zip(values, both[case], strict=True):
            assert other == pytest.approx(one, rel=1e-9, abs=1e-11), case
        assert abs(values[0]["eval_loss"]) > 1e-3


def test_weights_without_a_gradient_stop_both_processes_or_are_let_be_by_both(two: Path, tmp_path: Path) -> None:
    zero, one = (json.loads((two / f"unused{rank}.json").read_text()) for rank in range(2))
    for said in (zero, one):
        assert "self-check gradients: every trained tensor" in said["checked"]
        assert "model.spare (2 tensors)" in said["checked"]
        assert said["unchecked"].startswith("step 2: trained tensors got no gradient")
        assert "self_checks: {gradients: false}" in said["unchecked"]
    alone = job.unused(tmp_path)
    assert zero["allowed"] == one["allowed"] == pytest.approx(alone["allowed"], rel=1e-10)
    assert alone["unchecked"] == alone["allowed"]
