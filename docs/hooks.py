"""What the pages take from the code when the site is built: tables of objectives and settings, links of docstrings.

Used by mkdocs (``hooks`` in mkdocs.yml). ``<!-- objectives -->``, ``<!-- settings -->``, ``<!-- rewards -->`` and
``<!-- losses -->`` in a page become tables and entries, and a role such as ``:func:`` in a docstring becomes a link to where
its target is documented.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

#: Page under api/ -> the modules it documents.
API = {
    "losses": ["rlft.losses"],
    "pieces": ["rlft.advantages", "rlft.kl", "rlft.reduce", "rlft.types", "rlft.ops"],
    "objective": ["rlft.objective", "rlft.recipes", "rlft.catalogue"],
    "trainer": ["rlft.trainer", "rlft.config"],
    "data": ["rlft.data"],
    "rewards": ["rlft.rewards"],
    "rollout": ["rlft.rollout"],
    "models": ["rlft.models"],
    "checkpoint": ["rlft.checkpoint", "rlft.errors"],
}
_KIND = r":(?:func|class|mod|meth|data|attr|exc):"
_ROLE = re.compile(rf"{_KIND}<code>([^<]*)</code>|{_KIND}`([^`]*)`")
_KINDS = {
    "prompt-completion": "Supervised: prompts with one answer",
    "preference": "Preference pairs",
    "preference (reward model)": "Reward models",
    "unpaired": "Answers with a thumb up or down",
    "groups with rewards": "Groups with rewards: sampled online, or ranked rows",
    "own loop": "For your own loop",
}
_OWN_LOOP = (
    "These need tensors that the trainer does not make: a judge's win rates, a teacher's KL, moments under the policy that "
    "sampled. Call them yourself, or fill `Batch.extras` in `Trainer.prepare`."
)


def _where() -> dict[str, str]:
    """Documented name -> page: ``rlft.losses.dpo`` -> ``losses``."""
    found = {}
    for page, modules in API.items():
        for name in modules:
            found[name] = page
            for member in importlib.import_module(name).__all__:
                found[f"{name}.{member}"] = page
    return found


WHERE = _where()
#: Short name -> documented name, where only one thing is called so.
_SHORT: dict[str, list[str]] = {}
for _full in WHERE:
    _SHORT.setdefault(_full.rpartition(".")[2], []).append(_full)


def anchor(name: str) -> str:
    """The anchor of a documented name on its page; a module is the page itself.

    A loss is found where it is defined: ``rlft.losses.dpo`` is a file as well as a function.
    """
    module, _, member = name.rpartition(".")
    if module == "rlft.losses":
        return f"#{getattr(importlib.import_module(module), member).__module__}.{member}"
    return "" if name in {m for modules in API.values() for m in modules} else f"#{name}"


def target(role: str) -> str | None:
    """The documented name that a role means: full, or short where that is clear; methods go to their class."""
    name = role.removeprefix("~").removesuffix("()")
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in WHERE:
            return candidate
        if len(found := _SHORT.get(candidate, [])) == 1:
            return found[0]
    return None


def _plain(text: str) -> str:
    """A docstring's line as Markdown: code instead of roles and double backticks."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text).replace("``", "`")
    parts = text.split("`")  # a bar splits a cell, unless it stands in code
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts)).strip()


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _kind(entry: Any) -> str:
    """The kind of data an objective is listed under."""
    from rlft import _terms
    from rlft.types import Batch

    made = {
        *_terms.FORWARD,
        *_terms.PAIR,
        *Batch.__dataclass_fields__,
        "scores",
        "kl_baseline",
        "old_values",
        "start_values",
    }
    if set(entry.tensors) - made:
        return "own loop"
    return "preference" if entry.data == "prompt-completion" and "group_ids" in entry.tensors else entry.data


def objectives(prefix: str) -> str:
    """One table per kind of data, from rlft.catalogue."""
    from rlft import catalogue, losses

    parts = []
    every = catalogue.entries()
    for kind in dict.fromkeys([*_KINDS, *(e.data for e in every)]):
        rows = []
        for e in every:
            if _kind(e) != kind:
                continue
            where = (
                f"losses.md{anchor(f'rlft.losses.{e.name}')}"
                if e.name in losses.__all__
                else f"objective.md#rlft.recipes.{e.name}"
            )
            hyper = "<br>".join(f"`{word}`" for word in e.hyper.split(", ") if word)
            link = f"[`{e.name}`]({prefix}api/{where})"
            paper = f"<br><small>{_plain(e.paper)}</small>" if e.paper else ""
            rows.append([link, _plain(e.formula) + paper, hyper, e.policy, e.averaging])
        if rows:
            head = ["objective", "what it computes", "settings", "samples", "averaging"]
            note = f"{_OWN_LOOP}\n\n" if kind == "own loop" else ""
            parts.append(f"### {_KINDS.get(kind, kind)}\n\n{note}{_table(head, rows)}")
    return "\n\n".join(parts)


def settings(prefix: str) -> str:
    """One table per group of settings, from Config.groups()."""
    from rlft.config import Config
    from rlft.config.values import type_name

    titles = {
        "objective": "What is optimised",
        "model": "Models",
        "data": "Data",
        "sampling": "Sampling",
        "rewards": "Rewards",
        "steps": "Steps",
        "output": "Watching and saving",
    }
    defaults, hints, parts = Config(), typing.get_type_hints(Config), []
    for group, fields in Config.groups().items():
        rows = []
        for field in fields:
            default = getattr(defaults, field.name)
            free = " *(free)*" if field.metadata.get("free") else ""
            words = [
                type_name(hints[field.name]),
                "" if default is None else f"`{default!r}`",
                _plain(field.metadata["doc"]) + free,
            ]
            rows.append([f"`{field.name}`", *words])
        parts.append(f"### {titles.get(group, group)}\n\n" + _table(["setting", "value", "default", ""], rows))
    return "\n\n".join(parts)


def rewards(prefix: str) -> str:
    """The built-in rewards: name, class, options, first line."""
    from rlft.rewards import BUILTIN_REWARDS

    rows = []
    for name, made in sorted(BUILTIN_REWARDS.items()):
        options = [p for p in inspect.signature(made).parameters.values() if p.name != "name"]
        words = "<br>".join(f"`{p.name}`" if p.default is p.empty else f"`{p.name}={p.default!r}`" for p in options)
        first = (inspect.getdoc(made) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(
            [
                f"`{name}`",
                _plain(first),
                words,
                f"[`{made.__name__}`]({prefix}api/rewards.md#rlft.rewards.{made.__name__})",
            ]
        )
    return _table(["name", "what it pays", "options", "class"], rows)


_ONE = "{heading_level: 3, show_root_heading: true, show_root_toc_entry: true, show_root_full_path: false}"


def every_loss(prefix: str) -> str:
    """The losses file by file, in the order of their names."""
    from rlft import losses

    files: dict[str, list[str]] = {}
    for name in losses.__all__:
        files.setdefault(getattr(losses, name).__module__, []).append(name)
    parts = []
    for module, names in sorted(files.items()):
        first = (inspect.getdoc(importlib.import_module(module)) or module).split("\n\n")[0].replace("\n", " ")
        title, _, rest = first.rstrip(".").partition(": ")
        parts.append(f"## {title}\n\n{rest[:1].upper() + rest[1:] + '.' if rest else ''}")
        parts += [f"::: {module}.{name}\n    options: {_ONE}" for name in names]
    return "\n\n".join(parts)


_FILLS: dict[str, Callable[[str], str]] = {
    "objectives": objectives,
    "settings": settings,
    "rewards": rewards,
    "losses": every_loss,
}


# -- mkdocs calls these ----------------------------------------------------------------------------------------------
def on_config(config: Any) -> Any:
    """Pages that others write are in the navigation only when they are there."""
    import pathlib

    docs = pathlib.Path(config["docs_dir"])
    config["nav"] = _present(config["nav"], docs)
    return config


def _present(nav: list[Any], docs: Any) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        (title, value), *_ = entry.items() if isinstance(entry, dict) else [(None, entry)]
        if isinstance(value, list):
            if inner := _present(value, docs):
                kept.append({title: inner})
        elif (docs / value).exists():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the tables; drop list items and rows that link to a page which is not there."""
    prefix = "../" * page.file.src_uri.count("/")
    for name, fill in _FILLS.items():
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, fill(prefix))
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of docstrings become links; the double colon before an example becomes one."""
    from mkdocs.utils import get_relative_url

    def link(match: re.Match[str]) -> str:
        role = match[1] or match[2]
        name = role.removeprefix("~")
        shown = f"<code>{name.rpartition('.')[2] if role.startswith('~') or '.' in name else name}</code>"
        found = target(role)
        if found is None:
            return shown
        url = get_relative_url(f"api/{WHERE[found]}/", page.url)
        return f'<a href="{url}{anchor(found)}">{shown}</a>'

    return _ROLE.sub(link, html).replace("::</p>", ":</p>")
