"""One, two and three processes, any accumulation, every averaging: one gradient, groups and tokens uneven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import _many_processes as many
from tests import _two_processes as job
from tests.launch import launch


@pytest.fixture(scope="module", params=[2, 3])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One launch per number of processes for all cases."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    launch("tests._many_processes", folder, request.param, timeout=500)
    return request.param, folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", many.CASES)
def test_processes_and_micro_batches_give_one_gradient(
    written: tuple[int, Path], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, folder = written
    monkeypatch.setattr(job, "CASES", many.CASES)
    alone = many.two_steps(tmp_path, case, 1, 1)
    assert alone.step == 2
    start = {f"model.{n}": p.detach() for n, p in job.tiny_llama(dtype=torch.float64).named_parameters()}
    found = {
        n: load_file(folder / f"{case}-{n}.safetensors") for n in many.ACCUMULATIONS if many.STEP % (processes * n) == 0
    }
    assert len(found) == (3 if processes == 3 else 2)
    for name, value in job.trainables(alone).items():
        assert not torch.equal(value, start[name]) or "embed" in name
    for accumulation, weights in found.items():
        held(f"{case}, {processes} processes, {accumulation} micro-batches", weights, job.trainables(alone))
    if processes == 2:  # once
        for accumulation in (2, 4):
            weights = job.trainables(many.two_steps(tmp_path / "one", case, 1, accumulation))
            held(f"{case}, 1 process, {accumulation} micro-batches", weights, job.trainables(alone))


def held(label: str, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The weights are the expected ones; `pytest -s` shows how far apart they are."""
    worst = max((weights[name] - value).abs().max().item() for name, value in expected.items())
    print(f"largest difference {worst:.2e}: {label}")
    assert worst <= 1e-12, f"{label}: {worst:.3g}"


def test_the_last_step_is_uneven() -> None:
    """8 rows are left for it: 3 processes get 2, 3 and 3 of them, and groups are of two to five answers."""
    from rlft.data import EpochSampler

    shares = []
    for rank in range(3):
        sampler = EpochSampler(many.ROWS, batch_size=many.STEP // 3, seed=1, rank=rank, world_size=3, last="keep")
        shares.append([len(next(sampler)) for _ in range(2)][1])
    assert sorted(shares) == [2, 3, 3]
    assert {len(row["completions"]) for row in many.RAGGED} == {2, 3, 4, 5}
