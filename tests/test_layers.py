"""The house keeps its shape: imports point down and never in a circle, the core is light, and nothing runs what it reads.

The table below is the one of docs/design.md; a test holds the two together.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rlft"

#: Layer -> modules and packages of rlft. A module imports from its own layer and from lower ones, never from a higher one.
LAYERS: dict[str, tuple[str, ...]] = {
    "L0": ("_check", "reduce", "errors", "_failpoint", "_json", "_redact", "_files", "_workers", "_words", "_version"),
    "L1": ("types", "kl", "advantages"),
    "L2": ("losses", "ops", "trust_region", "worlds"),
    "L3": ("_advantage", "_terms", "objective", "recipes", "catalogue"),
    "L4": ("models", "data", "rewards", "checkpoint", "_metrics_log", "metrics", "config", "runlock", "schedule", "rules"),
    "L5": ("rollout",),
    "L6": ("run", "report", "doctor", "trainer"),
    "L7": ("cli", "demo"),
}  # fmt: skip
#: The pure core imports these and the standard library, at any depth of a function.
CORE = ("L0", "L1", "L2", "L3")
CORE_PACKAGES = {"torch", "jaxtyping"}
#: What the core may import inside a function that shows a table, and nowhere else.
SHOWS = {"catalogue": {"rich"}}
#: A file of the core that is itself imported on demand, and what it exists to import.
ON_DEMAND = {"ops/kernels.py": {"triton"}}
#: The parts that a script may well want without paying for transformers.
LIGHT = ["rlft", "rlft.config", "rlft.rewards", "rlft.checkpoint", "rlft.metrics", "rlft.cli", "rlft.trainer"]
HEAVY = ("transformers", "peft", "accelerate", "datasets", "matplotlib", "vllm", "trl")

RANK = {unit: int(layer[1:]) for layer, units in LAYERS.items() for unit in units}
FILES = sorted(SOURCE.rglob("*.py"))
INNER = [path for path in FILES if path != SOURCE / "__init__.py"]  # the package's own front door is above the layers


def unit_of(path: Path) -> str:
    """The module or package of rlft that a file belongs to."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(source: str) -> Iterator[tuple[str, int, bool]]:
    """Every imported module (``rlft.x`` for ``from rlft import x``), its line, and whether it is at module level."""
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer; write it out"
            names = [node.module or ""] if node.module != "rlft" else [f"rlft.{alias.name}" for alias in node.names]
            for name in names:
                yield name, node.lineno, id(node) not in lazy


def own(name: str) -> str | None:
    """The unit behind an imported name of rlft; the package itself counts as none."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlft" and len(parts) > 1 and parts[1] in RANK else None


def upward(path: Path, source: str) -> list[str]:
    unit = unit_of(path)
    return [
        f"{unit} (L{RANK[unit]}), line {line}: imports {name} (L{RANK[target]})"
        for name, line, _ in imports(source)
        if (target := own(name)) is not None and RANK[target] > RANK[unit]
    ]


def test_every_module_has_a_layer() -> None:
    present = {unit_of(path) for path in FILES} - {"__init__"}
    assert present == set(RANK), "put the new module into LAYERS above and into docs/design.md"


def test_imports_point_down() -> None:
    assert not [found for path in INNER for found in upward(path, text_of(path))]


def test_an_upward_import_is_seen() -> None:
    for line in ("from rlft.trainer import Trainer", "import rlft.trainer", "def f():\n    from rlft import trainer"):
        assert upward(SOURCE / "losses" / "dpo.py", line)
    assert not upward(SOURCE / "trainer.py", "from rlft.losses import dpo")
    assert not upward(SOURCE / "run/display.py", "if TYPE_CHECKING:\n    from rlft.cli import main")


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """At module level; a function may look back within its layer."""
    edges: dict[str, set[str]] = {unit: set() for unit in RANK}
    for path in INNER:
        unit = unit_of(path)
        for name, _, at_top in imports(text_of(path)):
            target = own(name)
            if at_top and target is not None and target != unit:
                edges[unit].add(target)
    done: set[str] = set()

    def visit(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, " -> ".join([*path[path.index(unit) :], unit])
        if unit not in done:
            for target in sorted(edges[unit]):
                visit(target, (*path, unit))
            done.add(unit)

    for unit in edges:
        visit(unit, ())


# -- the same from file to file, where an import for types or inside a function counts too ---------------------------
#: Rooms and files of run/, in the order of a run: each imports from its own place and from those before it.
ROOMS = (
    ("progress", "processes"), ("measure",), ("step",), ("keep",), ("checks", "callbacks"), ("setup",), ("evaluate", "display"),
    ("wiring",),
)  # fmt: skip
#: Functions of run/ that take the whole trainer, and why.
TAKES_THE_TRAINER = {"callbacks.py CallbackHandler.__init__": "callbacks are called with it"}
#: Functions above 90 lines, and why each is not split.
LONG: dict[str, str] = {}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def file_imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of ``sources`` that its file names in an import, at any depth and for any purpose.

    ``from rlft.a import b`` names the file ``rlft.a.b`` where there is one, else the package's own ``__init__``.
    """
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}, line {node.lineno}: a relative import; write it out"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in sources else str(node.module) for name in names}
        edges[module] = found & sources.keys()
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules in which each one reaches every other, and a module that imports itself."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += edges[module]
        return seen

    reach = {module: reached(module) for module in edges}
    found = {frozenset(m for m in reach[module] if module in reach[m]) for module in edges if module in reach[module]}
    return sorted(sorted(circle) for circle in found)


def test_no_file_imports_itself_in_a_circle() -> None:
    """Two files that need each other are one, or need a third; an import inside a function only hides it."""
    found = circles(file_imports({module_of(path): text_of(path) for path in FILES}))
    assert not found, "files import each other in a circle: " + "; ".join(", ".join(circle) for circle in found)


# -- the rooms of a run ----------------------------------------------------------------------------------------------------
def against_the_order(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a room of run/ to one that comes later."""
    place = {name: index for index, names in enumerate(ROOMS) for name in names}

    def room(module: str) -> int | None:
        parts = module.split(".")
        return place[parts[2]] if parts[:2] == ["rlft", "run"] and len(parts) > 2 else None

    pairs = [(one, other) for one, others in edges.items() for other in sorted(others)]
    return [
        f"{one} imports {other}"
        for one, other in pairs
        if (mine := room(one)) is not None and (theirs := room(other)) is not None and theirs > mine
    ]


def test_rooms_stand_in_the_order_of_a_run() -> None:
    found = {path.name.removesuffix(".py") for path in (SOURCE / "run").iterdir()} - {"__init__", "__pycache__"}
    assert found == {name for names in ROOMS for name in names}
    edges = file_imports({module_of(path): text_of(path) for path in FILES})
    assert sum(len(others) for one, others in edges.items() if one.startswith("rlft.run.")) > 100
    assert against_the_order(edges) == []
    assert against_the_order({"rlft.run.step.update": {"rlft.run.keep.record"}})
    assert against_the_order({"rlft.run.progress": {"rlft.run.measure.meter"}})
    assert not against_the_order(
        {"rlft.run.keep.record": {"rlft.run.step.update", "rlft.run.keep.export", "rlft.types"}}
    )


def takes_the_trainer(name: str, source: str) -> list[str]:
    """Functions with a parameter that is the whole trainer, by name or by type."""
    found = []

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                given = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                label = f"{inside}{getattr(child, 'name', 'lambda')}"
                typed = [ast.unparse(p.annotation) for p in given if p.annotation is not None]
                if any(p.arg in ("trainer", "run") for p in given) or any("Trainer" in words for words in typed):
                    found.append(f"{name} {label}")
            visit(child, f"{inside}{child.name}." if isinstance(child, ast.ClassDef) else inside)

    visit(ast.parse(source), "")
    return found


def test_nothing_in_a_run_takes_the_whole_trainer() -> None:
    """What a function takes is what it may touch: the objects and facts that it names."""
    files = sorted((SOURCE / "run").rglob("*.py"))
    found = [
        one for path in files for one in takes_the_trainer(path.relative_to(SOURCE / "run").as_posix(), text_of(path))
    ]
    assert found == list(TAKES_THE_TRAINER)
    assert len(TAKES_THE_TRAINER) <= 5
    sources = (
        "def f(trainer): ...",
        "class A:\n    def f(self, x: 'Trainer'): ...",
        "f = lambda trainer: 1",
        "def f(*, trainer=None): ...",
    )
    assert all(takes_the_trainer("a.py", source) for source in sources)
    assert not takes_the_trainer("a.py", "def f(training, parts): ...")


def too_long(name: str, source: str) -> list[str]:
    """The file where it has more than 450 lines, and its functions of more than 90."""
    found = [name] if len(source.splitlines()) > 450 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno >= 90:
            found.append(f"{name} {node.name}")
    return found


def test_no_file_is_longer_than_one_sitting() -> None:
    """450 lines, and no function above 90, signature and docstring included."""
    found = [one for path in FILES for one in too_long(path.relative_to(SOURCE).as_posix(), text_of(path))]
    assert found == list(LONG), "split it at a seam, or say in LONG why it cannot be"
    assert too_long("a.py", "x = 1\n" * 451) == ["a.py"]
    assert too_long("a.py", "x = 1\n" * 450) == []
    assert too_long("a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 90) == ["a.py f"]
    assert too_long("a.py", "async def f():\n" + "    x = 1\n" * 89) == []


def test_no_public_function_is_called_only_check() -> None:
    """A name says what is checked. ``Config.check`` is public, and stays."""
    found = [
        f"{path.relative_to(SOURCE)}"
        for path in FILES
        for node in ast.parse(text_of(path)).body
        if isinstance(node, ast.FunctionDef) and node.name == "check"
    ]
    assert found == []


@pytest.mark.parametrize(
    "back",
    ["import rlft.a.top", "import rlft.a.top as top", "from rlft.a import top", "from rlft.a import other, top",
     "from rlft.a.top import f", "if TYPE_CHECKING:\n    from rlft.a.top import f", "def f():\n    import rlft.a.top",
     "def f():\n    from rlft.a import top", "class A:\n    def f(self):\n        from rlft.a.top import f",
     "if typing.TYPE_CHECKING:\n    import rlft.a.top", "try:\n    from rlft.a import top\nexcept ImportError:\n    pass"],
)  # fmt: skip
def test_a_circle_of_files_is_seen(back: str) -> None:
    sources = {
        "rlft": "", "rlft.a": "", "rlft.a.top": "from rlft.a import middle", "rlft.a.middle": "import rlft.b",
        "rlft.b": back, "rlft.c": "from rlft.a import top\nimport torch", "rlft.a.other": "from rlft.b import g",
    }  # fmt: skip
    circle = ["rlft.a.middle", "rlft.a.top", "rlft.b"]
    expected = sorted([*circle, "rlft.a.other"]) if "other" in back else circle
    assert circles(file_imports(sources)) == [expected]
    assert circles(file_imports({**sources, "rlft.b": "import torch"})) == []


def test_a_package_is_a_file_too() -> None:
    sources = {"rlft": "", "rlft.a": "from rlft.a.b import f", "rlft.a.b": "from rlft.a import c", "rlft.a.c": ""}
    assert circles(file_imports(sources)) == []  # rlft.a.c is meant, not the package
    sources["rlft.a.b"] = "from rlft.a import name_of_the_package"
    assert circles(file_imports(sources)) == [["rlft.a", "rlft.a.b"]]
    two = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"e"}, "f": {"a"}}
    assert circles(two) == [["a", "b"], ["c", "d"], ["e"]]


def heavy_in_core(path: Path, source: str) -> list[str]:
    unit = unit_of(path)
    if f"L{RANK[unit]}" not in CORE:
        return []
    allowed = CORE_PACKAGES | {"rlft"} | set(sys.stdlib_module_names)
    allowed |= ON_DEMAND.get(path.relative_to(SOURCE).as_posix(), set())
    found = []
    for name, line, at_top in imports(source):
        package = name.split(".")[0]
        if package not in allowed and (at_top or package not in SHOWS.get(unit, set())):
            found.append(f"{path.name}, line {line}: {name}; the core imports torch and jaxtyping alone")
    return found


def test_the_core_needs_torch_alone() -> None:
    assert not [found for path in INNER for found in heavy_in_core(path, text_of(path))]
    assert heavy_in_core(SOURCE / "losses" / "dpo.py", "def f():\n    import transformers")
    assert heavy_in_core(SOURCE / "catalogue.py", "import rich")
    assert not heavy_in_core(SOURCE / "catalogue.py", "def show():\n    import rich")
    assert heavy_in_core(SOURCE / "ops" / "head.py", "import triton")


def test_files_imported_on_demand_are_imported_inside_functions() -> None:
    on_demand = {"rlft." + name.removesuffix(".py").replace("/", ".") for name in ON_DEMAND}
    for path in INNER:
        for node in ast.parse(text_of(path)).body:
            if isinstance(node, ast.ImportFrom):
                found = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                assert not found & on_demand, f"{path.name}, line {node.lineno}"


def test_importing_rlft_loads_no_heavy_package() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    loaded = [package for package in {HEAVY!r} if package in sys.modules]
    assert not loaded, f"{{name}} loads {{loaded}}"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


# -- what the source must not hold ---------------------------------------------------------------------------------
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> list[str]:
    """Ways to run what a file, a model or a config says: unpickling, eval, code from a repository."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"calls {node.func.id}")
        called = ast.unparse(node.func)
        if called in {"torch.load", "torch.save", "os.system"} or called.endswith((".read_pickle", ".unsafe_load")):
            found.append(f"calls {called}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in {
                ("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True), ("shell", True),
            }:  # fmt: skip
                found.append(f"passes {keyword.arg}={value}")
    return found


def test_nothing_runs_what_it_reads() -> None:
    assert not [f"{path.relative_to(SOURCE)} {what}" for path in FILES for what in dangers(text_of(path))]


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load(f)", "eval(x)", "exec(x)", "f(weights_only=False)",
     "load(x, trust_remote_code=True)", "numpy.load(f, allow_pickle=True)", "run(x, shell=True)", "__import__(x)"],
)  # fmt: skip
def test_the_scan_sees(line: str) -> None:
    assert dangers(line)


def test_the_scan_lets_be() -> None:
    assert not dangers("model.eval()\nre.compile(x)\nload(x, trust_remote_code=config.trust_remote_code)\n'eval(x)'")


# -- the same table for people ---------------------------------------------------------------------------------------
def test_the_page_on_design_holds_the_same_table() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (L\d) \|[^|]*\|([^|]*)\|", text, re.M)
    assert {layer: tuple(re.findall(r"`(\w+)`", cells)) for layer, cells in rows} == LAYERS
