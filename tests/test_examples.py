"""Every example runs, and does what its first lines say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    (path,) = EXAMPLES.glob(f"{name}_*.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_loop_reaches_the_optimum() -> None:
    module = load("01")
    assert module.train() < 1e-3
    code = (EXAMPLES / "01_loss_in_a_custom_loop.py").read_text()
    imports = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import torch", "from rlft import losses"]
    body = code[code.index("def train") : code.index("if __name__")]
    assert len(body.strip().splitlines()) < 40


@pytest.mark.parametrize("number", ["02", "03", "04"])
def test_trainer_examples_run(number: str) -> None:
    values = load(number).main(steps=2)
    assert values["grad_norm"] > 0


def test_the_reward_of_example_four_climbs() -> None:
    module = load("04")
    assert module.main(steps=2)["reward"] + 0.2 < module.main(steps=30)["reward"]


def test_every_example_is_tested() -> None:
    numbers = sorted(path.name[:2] for path in EXAMPLES.glob("*.py"))
    assert numbers == ["01", "02", "03", "04"], "add the new example above"
