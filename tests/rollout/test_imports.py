"""Importing the packages must not import the heavy libraries behind them."""

from __future__ import annotations

import subprocess
import sys


def test_imports_are_light():
    code = (
        "import sys, rlft.rollout, rlft.rewards\n"
        "heavy = {'transformers', 'peft', 'vllm', 'sympy', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
