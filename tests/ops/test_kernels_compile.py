"""The Triton kernels compile for real GPUs, which the interpreter cannot tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the package triton (Linux)")

ROOT = Path(__file__).resolve().parents[2]


def compiled(cache: Path, *arguments: str) -> list[str]:
    """Lines of :mod:`tests.ops.compile_kernels`; in a process without Triton's interpreter, and without a cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_common_kernels_compile(tmp_path: Path) -> None:
    lines = compiled(tmp_path)
    assert {(line.split()[0], line.split()[1]) for line in lines} == {("sm_90", "fold"), ("sm_90", "d_logits")}
    assert all(int(line.split()[-2]) > 1000 for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_kernel_compiles_for_every_generation(tmp_path: Path) -> None:
    lines = compiled(tmp_path, "--all")
    assert {line.split()[0] for line in lines} == {"sm_80", "sm_89", "sm_90"}
    assert len(lines) == 3 * 3 * 10  # three generations, three kernels of each of ten kinds
