"""Runs checkpoint scenarios in forked children that are killed, or whose disk fails, at a named instant.

Started as a script: imports torch once, then forks per job, so that a kill costs milliseconds. Jobs come as JSON on
stdin, ``{"folder", "scenario", "spec", "file_limit", "trace"}``; each is answered by one line, ``{"status"}`` or, when
traced, ``{"passages"}``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from rlft import _failpoint, checkpoint

ERROR = 3  # exit status of a child that saw a CheckpointError
HEX = "0123456789abcdef" * 2


def content(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.randn(7, generator=generator, dtype=torch.float64),
        },
        "optimizer": {"m": torch.randn(4, 4, generator=generator).bfloat16()},
    }


def _extra(seed: int):
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights.txt").write_text(f"seed {seed}")

    return write


def put(run_dir: Path, step: int, seed: int, **options) -> Path:
    return checkpoint.save(
        run_dir,
        step,
        tensors=content(seed),
        records={"trainer": {"seed": seed, "betas": (0.9, 0.999)}},
        config_hash="hash",
        extra_writer=_extra(seed),
        **options,
    )


def prepare(scenario: str, run_dir: Path) -> None:
    """What lies in the folder before the scenario acts."""
    if scenario == "first":
        return
    put(run_dir, 1, 1)
    put(run_dir, 2, 2)
    if scenario in ("new", "ranks"):
        leftover = run_dir / f".tmp-3-{HEX}"
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    if scenario == "stale":
        put(run_dir, 3, 3)
        (run_dir / "checkpoint-3").rename(run_dir / f".old-3-{HEX}")
        for name in (f".tmp-5-{HEX}", f".del-4-{HEX}"):
            (run_dir / name / "adapter").mkdir(parents=True)
            (run_dir / name / "adapter" / "weights.txt").write_bytes(b"half")
            (run_dir / name / "trainer.json").write_bytes(b"{")


def act(scenario: str, run_dir: Path) -> None:
    """What is interrupted."""
    if scenario in ("new", "full"):
        put(run_dir, 3, 3, keep=2)
    elif scenario == "replace":
        put(run_dir, 2, 22, keep=2)
    elif scenario == "first":
        put(run_dir, 1, 1, keep=2)
    elif scenario == "stale":
        checkpoint.remove_stale(run_dir)
        checkpoint.discard_newer(run_dir, 2)
    elif scenario == "ranks":
        in_ranks(run_dir, 3, 2, keep=2)
    else:
        raise ValueError(scenario)


def in_ranks(run_dir: Path, step: int, world_size: int, *, each=None, **options) -> list[BaseException | Path]:
    """Save as several processes would, each a thread; what every rank returned or raised."""
    barrier = threading.Barrier(world_size, timeout=30)
    results: list[BaseException | Path] = [RuntimeError("did not run")] * world_size

    def one(rank: int) -> None:
        given = {
            "tensors": content(step) if rank == 0 else {"rng": {"state": torch.full((3,), rank)}},
            "records": {"rng": {"rank": rank}},
            **(each(rank) if each else {}),
        }
        try:
            results[rank] = checkpoint.save(
                run_dir,
                step,
                config_hash="hash",
                rank=rank,
                world_size=world_size,
                barrier=barrier.wait,
                **given,
                **options,
            )
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def _child(job: dict) -> int:
    warnings.simplefilter("ignore")
    if job.get("spec"):
        os.environ[_failpoint.VARIABLE] = job["spec"]
    if job.get("file_limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    try:
        act(job["scenario"], Path(job["folder"]))
    except checkpoint.CheckpointError as error:
        if job.get("file_limit") is None:
            Path(job["folder"]).with_suffix(".error").write_text(str(error))
        return ERROR
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _trace(job: dict) -> dict[str, int]:
    seen: Counter[str] = Counter()
    original, _failpoint.failpoint = _failpoint.failpoint, lambda point: seen.update([point])
    if job.get("spec"):
        os.environ[_failpoint.VARIABLE] = job["spec"]
        _failpoint.failpoint = lambda point: (seen.update([point]), original(point))[1]
    try:
        act(job["scenario"], Path(job["folder"]))
    except checkpoint.CheckpointError:
        pass
    finally:
        _failpoint.failpoint = original
        _failpoint._passages.clear()
        os.environ.pop(_failpoint.VARIABLE, None)
    return seen


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    templates: dict[str, Path] = {}
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        if job["scenario"] not in templates:
            template = folder.with_name(f"template-{job['scenario']}")
            if not template.exists():
                prepare(job["scenario"], template)
            templates[job["scenario"]] = template
        if templates[job["scenario"]].exists():
            shutil.copytree(templates[job["scenario"]], folder, symlinks=True)
        if job.get("trace"):
            print(json.dumps({"passages": _trace(job)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(_child(job))
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
