"""The table of objectives, read off the code: signatures, marks and docstrings. Nothing is written twice."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from rlft import _check, losses, recipes
from rlft.objective import Objective

__all__ = ["Entry", "detail", "entries", "markdown", "show"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One objective.

    Attributes:
        name: what a configuration calls it.
        formula: first line of its docstring.
        data: what it trains on.
        tensors: quantities it needs.
        hyper: hyper-parameters with defaults (``beta`` without one must be given).
        averaging: of its paper.
        policy: which samples it is right for.
        paper: references.
        recipe: whether it is a named choice of axes rather than a loss function.
    """

    name: str
    formula: str
    data: str
    tensors: tuple[str, ...]
    hyper: str
    averaging: str
    policy: str
    paper: str
    recipe: bool


def entries() -> list[Entry]:
    """Every objective that a configuration can name."""
    return [_entry(name) for name in recipes.names()]


def _entry(name: str) -> Entry:
    loss = getattr(losses, name) if name in losses.__all__ else None
    function: Any = recipes.RECIPES.get(name) or loss
    doc = inspect.getdoc(function) or ""
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    objective = recipes.build(name, **{p.name: _EXAMPLE.get(p.name, 0.5) for p in keywords if p.default is p.empty})
    return Entry(
        name=name,
        formula=" ".join(doc.split("\n\n")[0].split()),
        data=_data(objective),
        tensors=tuple(dict.fromkeys(t for term in objective.terms for t in term.tensors)),
        hyper=", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in keywords),
        averaging=", ".join(dict.fromkeys(term.reduction for term in objective.terms)),
        policy=_policy(objective),
        paper=_paper(doc) or (_paper(inspect.getdoc(loss) or "") if loss is not None else ""),
        recipe=name in recipes.RECIPES,
    )


#: Hyper-parameters without a default, to build each objective once and read its needs.
_EXAMPLE = {
    "length": 8,
    "clip_eps": 0.2,
    "nll_weight": 1.0,
    "divergence": "js",
    "f": "logistic",
    "label_smoothing": 0.1,
}


def _data(objective: Objective) -> str:
    needs = objective.needs
    if "win_rates" in needs:
        return "prompts with a judge or rewards"
    if objective.columns:
        return "own columns or tensors"
    if "scores" in needs:
        return "preference (reward model)"
    if objective.needs_pairs:
        return "preference"
    if "labels" in needs:
        return "unpaired"
    if {"rewards", "advantages", "returns"} & needs:
        return "groups with rewards"
    if objective.needs_groups:
        return "preference"
    return "prompt-completion"


def _policy(objective: Objective) -> str:
    """Which samples the estimator is right for."""
    needs = objective.needs
    if objective.on_policy_only:
        return "on-policy"
    if "old_logps" in needs and not objective.name.startswith("agro"):
        return "near on-policy (ratio)"
    if objective.name.startswith(("reinforce", "kl_policy_gradient")):
        return "on-policy"
    return "any"


def _paper(doc: str) -> str:
    match = re.search(r"References:\n(.*?)(?:\n\n|\Z)", doc, re.S)
    return " ".join(match[1].split()) if match else ""


def detail(name: str) -> str:
    """One objective in full: signature and docstring."""
    if name not in recipes.names():
        raise ValueError(f"objective {name!r} is unknown{_check.suggestion(name, recipes.names())}")
    function: Any = recipes.RECIPES.get(name)
    text = ""
    if function is not None:
        text = f"recipe {name}{_plain(function)}\n\n{inspect.getdoc(function)}\n\n"
    loss = getattr(losses, name) if name in losses.__all__ else None
    if loss is not None:
        text += f"losses.{name}{_plain(loss)}\n\n{inspect.getdoc(loss)}\n"
    return text.rstrip()


def _plain(function: Any) -> str:
    parts, star = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        prefix = "**" if p.kind is p.VAR_KEYWORD else ""
        parts.append(prefix + p.name + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"({', '.join(parts)})"


def markdown() -> str:
    """The table for the documentation."""
    lines = [
        "| objective | formula | data | samples | hyper-parameters | averaging | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in entries():
        cells = [f"`{e.name}`", e.formula, e.data, e.policy, f"`{e.hyper}`" if e.hyper else "", e.averaging, e.paper]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def show() -> None:
    """The table on the terminal, by kind of data."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, 120)
    rows = entries()
    for data in dict.fromkeys(e.data for e in rows):
        table = Table(title=data, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for head in ("objective", "samples", "averaging", "hyper-parameters"):
            table.add_column(head, style="cyan" if head == "objective" else None, no_wrap=head != "hyper-parameters")
        for e in rows:
            if e.data == data:
                table.add_row(e.name, e.policy, e.averaging, e.hyper)
        console.print(table)
        console.print()
    console.print("rlft objectives NAME shows formula, tensors and paper.")
