"""What the README and the manual show is true: code runs, commands parse, names exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from rlft import cli, losses, recipes, rules
from rlft.config import Config, load_config
from rlft.data import detect_format
from rlft.rewards import BUILTIN_REWARDS
from rlft.run.setup.build import objective_for

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
#: A comment right above a block that says why it does not run here.
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\s*$")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    runs: bool


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Every fenced block, indented ones too."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for match in re.finditer(r"^([ ]*)```(\w*)([^\n]*)\n(.*?)^\1```[ ]*$", text, re.M | re.S):
        title = re.search(r'title="([^"]*)"', match[3])
        found.append(
            Block(
                page,
                text[: match.start()].count("\n") + 1,
                match[2],
                title[1] if title else None,
                textwrap.dedent(match[4]),
                NOT_RUN.search(text[: match.start()]) is None,
            )
        )
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_language(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


# -- code ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace, in an empty folder; a run takes two steps of its own."""
    whole = Config.__post_init__

    def two_steps(config: Config) -> None:
        config.max_steps = min(2, config.max_steps or 2)
        whole(config)

    monkeypatch.setattr(Config, "__post_init__", two_steps)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compile(block.text, f"{name(page)}:{block.line}", "exec")
        if block.runs:
            exec(code, namespace)
            ran += 1
    assert ran, "no block of this page runs; drop the marks"


def test_every_example_in_the_readme_runs() -> None:
    assert all(block.runs for block in blocks(ROOT / "README.md"))


def test_a_block_that_is_wrong_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (block,) = blocks(page, "text\n\n```python\nprint(losses.dop)\n```\n")
    assert (block.language, block.line, block.runs) == ("python", 3, True)
    assert not blocks(page, "<!-- not run: needs a hub -->\n```python\nx\n```\n")[0].runs


# -- commands -------------------------------------------------------------------------------------------------------------
def commands() -> list[tuple[Block, str]]:
    found = []
    for block in with_language("bash", "console"):
        for line in block.text.splitlines():
            line = line.partition("#")[0].strip()
            if block.language == "console":
                line = line.removeprefix("$ ") if line.startswith("$ ") else ""
            found += [(block, part.strip()) for part in line.split("&&") if part.strip()]
    return found


def in_text() -> list[tuple[Path, str]]:
    """Commands inside sentences: ``rlft train x.yaml``."""
    return [
        (page, code)
        for page in PAGES
        for code in re.findall(r"(?<!`)`(rlft [a-z][^`\n]*|make [a-z-]+|python examples/[^`]*)`", prose(page))
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^([ ]*)```.*?^\1```[ ]*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def check_command(text: str, files: dict[str, str], folder: Path) -> None:
    words = shlex.split(text)
    if words[:2] == ["accelerate", "launch"]:
        start = words.index("rlft.cli") + 1
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), text
        words = ["rlft", *words[start:]]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]!r}"
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), text
    elif words[0] == "rlft":
        args = cli._parser().parse_args(words[1:])
        if words[1:2] == ["train"] and args.config is not None:
            settings = list(args.settings)
            path: Path | None = ROOT / args.config
            if "=" in args.config:
                path, settings = None, [args.config, *settings]
            elif args.config in files:
                path = folder / args.config
                path.write_text(files[args.config])
            load_config(path, settings)
        if words[1:2] == ["objectives"] and args.name:
            assert args.name in recipes.names()


def test_commands_parse(tmp_path: Path) -> None:
    shown = 0
    for block, text in commands():
        files = {b.title: b.text for b in blocks(block.page) if b.language == "yaml" and b.title}
        if block.language == "console":  # shows a refusal: what it says must be what is said
            said = block.text.partition(text)[2].strip().splitlines()[0]
            with pytest.raises(ValueError) as refused:
                check_command(text, files, tmp_path)
            assert f"rlft: {refused.value}" == said
        else:
            check_command(text, files, tmp_path)
        shown += text.startswith("rlft")
    assert shown >= 8
    for _, text in in_text():
        check_command(text, {}, tmp_path)


def test_a_wrong_command_is_seen(tmp_path: Path) -> None:
    for text in ("make nothing", "rlft train configs/none.yaml", "rlft objectives dop", "python examples/none.py",
                 "rlft train configs/polite_pairs/sft.yaml max_step=3"):  # fmt: skip
        with pytest.raises((AssertionError, ValueError)):
            check_command(text, {}, tmp_path)
    with pytest.raises(SystemExit):
        check_command("rlft trian", {}, tmp_path)


# -- settings, names, data --------------------------------------------------------------------------------------------
def test_yaml_is_a_configuration(tmp_path: Path) -> None:
    shown = 0
    for block in with_language("yaml"):
        assert block.title, f"{name(block.page)}:{block.line}: give the file a title"
        path = tmp_path / block.title
        path.write_text(block.text)
        config = load_config(path)
        objective = objective_for(config, None)
        rules.check_settings(config, objective, online=bool(config.rewards))
        shown += 1
    assert shown >= 4


def test_rows_are_of_the_format_they_stand_under() -> None:
    kinds = set()
    for block in with_language("json"):
        assert detect_format(json.loads(block.text)) == block.title, f"{name(block.page)}:{block.line}"
        kinds.add(block.title)
    assert kinds == {"prompt", "prompt_completion", "preference", "unpaired", "ranked", "text"}


def backticked(text: str) -> set[str]:
    return set(re.findall(r"`([a-z][a-z0-9_]+)`", text))


def section(page: Path, title: str) -> str:
    """The part of a page under a heading, up to the next of the same level."""
    text = page.read_text(encoding="utf-8")
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.M | re.S)
    assert match, f"{name(page)} has no heading {title!r}"
    return match[2]


KNOWN = {
    *recipes.names(), *(f for f in Config.__dataclass_fields__), *BUILTIN_REWARDS,
    "label_smoothing", "group_norm", "group_mean", "leave_one_out", "gae", "batch_norm", "group_mean_batch_norm", "reward_to_go",
    "sequence_sum", "sequence_mean", "token_mean", "fixed_length", "lr_coef", "lr_baseline", "objective_args",
}  # fmt: skip


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("README.md", "Objectives"),
        ("docs/objectives.md", "Which one for which data"),
        ("docs/objectives.md", "Four axes of an online algorithm"),
        ("docs/agro.md", "Which estimator when"),
    ],
)
def test_objectives_that_are_named_exist(page: str, title: str) -> None:
    named = backticked(section(ROOT / page, title))
    assert len(named) > 5
    assert named <= KNOWN, sorted(named - KNOWN)


def test_tests_that_are_named_exist() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = {word for page in PAGES for word in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert len(named) > 15
    missing = sorted(word for word in named if not re.search(rf"^def {word}\(", code, re.M))
    assert not missing


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:src|tests|docs|configs|examples|benchmarks)/[\w./-]*)`", prose(page)):
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_dotted_names_exist() -> None:
    """``rlft.losses.dpo`` and the like, wherever they are written."""
    for page in PAGES:
        for dotted in set(re.findall(r"\brlft(?:\.[a-zA-Z_]\w*)+", page.read_text(encoding="utf-8"))):
            if dotted.endswith((".readthedocs", ".json", ".yaml")):
                continue
            assert resolves(dotted), f"{name(page)} names {dotted}"


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


# -- links ----------------------------------------------------------------------------------------------------------------
def slug(heading: str) -> str:
    """The anchor of a heading, as the site makes it."""
    plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading)
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain.lower())).strip("-")


def anchors(page: Path) -> set[str]:
    return {slug(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.M)}


def test_links_lead_somewhere() -> None:
    followed = 0
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", prose(page))
        for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{name(page)}: {link}"
            if anchor and target.suffix == ".md":
                known = anchors(target)
                assert anchor in known or resolves(anchor), f"{name(page)}: {link}; there are {sorted(known)}"
            followed += 1
    assert followed > 30


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs.yml holds no tags."""

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def pages(nav: list[Any]) -> list[str]:
        return [p for e in nav for v in e.values() for p in (pages(v) if isinstance(v, list) else [v])]

    listed = pages(config["nav"])
    assert len(listed) == len(set(listed))
    missing = sorted({str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} - set(listed))
    assert not missing, f"add to mkdocs.yml: {missing}"


# -- what the site takes from the code -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_hold_everything(hooks: ModuleType) -> None:
    table = hooks.objectives("")
    assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.M)) == set(recipes.names())
    settings = hooks.settings("")
    assert set(re.findall(r"^\| `(\w+)` \|", settings, re.M)) == set(Config.__dataclass_fields__)
    assert all(f"`{reward}`" in hooks.rewards("") for reward in BUILTIN_REWARDS)
    assert all(f"{getattr(losses, loss).__module__}.{loss}\n" in hooks.every_loss("") for loss in losses.__all__)
    for made in (table, settings, hooks.rewards("")):
        plain = re.sub(r"`[^`]*`", "", made)  # a bar in code splits no cell
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in plain.splitlines() if row.startswith("|")}
        assert len(widths) <= 2, "a cell holds a bare |"
        assert ":func:" not in made


def test_every_mark_is_filled(hooks: ModuleType) -> None:
    marks = {mark for page in PAGES for mark in re.findall(r"<!-- (\w+) -->", page.read_text(encoding="utf-8"))}
    assert marks == set(hooks._FILLS)


def test_roles_of_docstrings_find_their_target(hooks: ModuleType) -> None:
    assert hooks.target("~rlft.losses.dpo") == "rlft.losses.dpo"
    assert hooks.target("leave_one_out") == "rlft.advantages.leave_one_out"
    assert hooks.target("rlft.types.Batch.split") == "rlft.types.Batch"
    assert hooks.anchor("rlft.losses.dpo") == "#rlft.losses.dpo.dpo"
    assert hooks.target("nothing_of_ours") is None
    for modules in hooks.API.values():
        for module in modules:
            assert inspect.ismodule(importlib.import_module(module))
