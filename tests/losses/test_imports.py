"""The pure core needs torch and jaxtyping alone, and its type annotations are true."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

BLOCKED = ("transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy.testing", "matplotlib")
CORE = ["rlft.types", "rlft.reduce", "rlft.kl", "rlft.advantages", "rlft.worlds", "rlft.losses", "rlft.objective"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


def test_the_core_imports_without_the_heavy_packages() -> None:
    result = run(f"""
        import importlib, sys
        for name in {BLOCKED!r}:
            sys.modules[name] = None  # importing it now raises ImportError
        for module in {CORE!r}:
            importlib.import_module(module)
        loaded = [name for name in {BLOCKED!r} if sys.modules.get(name) is not None]
        assert not loaded, loaded
    """)
    assert result.returncode == 0, result.stderr


def test_the_block_works() -> None:
    assert run("import sys; sys.modules['transformers'] = None; import transformers").returncode != 0


def test_annotated_shapes_hold_for_every_loss() -> None:
    """Every loss runs under runtime type checking: the shapes in the signatures are those of the tensors."""
    pytest.importorskip("beartype")
    result = run("""
        import warnings
        warnings.simplefilter("ignore")
        from jaxtyping import TypeCheckError, install_import_hook
        with install_import_hook(["rlft.losses", "rlft.kl", "rlft.advantages", "rlft.reduce"], "beartype.beartype"):
            import rlft.losses
        from tests.losses.cases import CASES
        for case in CASES:
            case.gradients(case.inputs())
        case = CASES[1]
        tensors = case.inputs()
        name = next(iter(tensors))
        tensors[name] = tensors[name][:-1]
        try:
            case(tensors)
        except TypeCheckError:
            print("checked", len(CASES))
    """)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("checked")
