"""Names that users write down stay: functions, parameter names and their order, settings. And every one is explained.

``public_api.json`` holds them as of the version it names. Something new may appear at any time; what is recorded may not
go, move or change its default. With a new version: ``python -m tests.test_public_api`` records anew, and the diff is what
the CHANGELOG must say.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlft

RECORD = Path(__file__).with_name("public_api.json")
#: Modules whose ``__all__`` is the public contract.
MODULES = (
    "rlft.losses", "rlft.advantages", "rlft.kl", "rlft.reduce", "rlft.types", "rlft.ops", "rlft.objective", "rlft.recipes",
    "rlft.catalogue", "rlft.config", "rlft.data", "rlft.rewards", "rlft.rollout", "rlft.models", "rlft.checkpoint",
    "rlft.trainer", "rlft.errors",
)  # fmt: skip
#: Classes whose public methods belong to it as well.
OPEN = {"rlft.trainer.Trainer", "rlft.objective.Objective", "rlft.types.Batch", "rlft.types.LossOutput",
        "rlft.config.Config", "rlft.models.Policy", "rlft.rollout.Sampler", "rlft.rewards.RewardSet"}  # fmt: skip


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, class and open method, by the path a user writes."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            path = f"{module_name}.{name}"
            if not callable(thing) or not hasattr(thing, "__module__") or not str(thing.__module__).startswith("rlft"):
                continue  # constants and type aliases
            yield path, thing
            if path in OPEN:
                for method, value in vars(thing).items():
                    if not method.startswith("_") and callable(getattr(thing, method)):
                        yield f"{path}.{method}", getattr(value, "__func__", value)


def parameters(thing: Any) -> list[str]:
    """``["logps", "mask", "*", "beta", "eps=0.2"]``."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return []
    # settings are given by name: their order is that of the documentation
    words, star = (["*"], True) if thing is rlft.Config else ([], False)
    for p in signature.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        star = star or p.kind is p.VAR_POSITIONAL
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(mark + p.name + ("" if p.default is p.empty else f"={_default(p.default)}"))
    return words


def _default(value: Any) -> str:
    if dataclasses.is_dataclass(type(value)):
        return type(value).__name__
    return re.sub(r"<(function|class) ?'?([\w.]+).*", r"\2", repr(value))


def changes(old: list[str], new: list[str]) -> list[str]:
    """What a caller of ``old`` would notice: gone, moved, renamed, another default, or a new one that is required."""
    freed = {word.partition("=")[0]: word for word in new}  # what had to be given may get a default
    old = [freed.get(word, word) if "=" not in word else word for word in old]
    before, after = (p[: p.index("*")] if "*" in p else p for p in (old, new))
    found = [f"{word} is gone or changed" for word in old if word not in new]
    kept = [word for word in after if word in before]
    found += ["the order changed"] if kept != [word for word in before if word in kept] else []
    found += [f"{word} is no longer positional" for word in before if word in new and word not in after]
    added = [word for word in new if word not in old]
    found += [f"{word} is new and required" for word in added if "=" not in word and not word.startswith("*")]
    if after[: len(kept)] != kept:
        found.append("a new parameter stands before old ones")
    return found


def snapshot() -> dict[str, list[str]]:
    return {path: parameters(thing) for path, thing in public()}


def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write() -> None:
    lines = [f"    {json.dumps(path)}: {json.dumps(words)}" for path, words in sorted(snapshot().items())]
    text = f'{{\n  "version": "{rlft.__version__}",\n  "api": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    RECORD.write_text(text, encoding="utf-8")


def test_the_public_names_stay() -> None:
    now, then = snapshot(), record()["api"]
    gone = sorted(set(then) - set(now))
    assert not gone, f"public names are gone: {gone}"
    found = {path: what for path, words in then.items() if (what := changes(words, now[path]))}
    assert not found, found


def test_the_record_is_that_of_this_version() -> None:
    assert record()["version"] == rlft.__version__, "run: python -m tests.test_public_api, and read the diff"


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (["a", "b", "*", "c", "d=1"], None),
        (["a", "b", "*", "c", "d=1", "e=2"], None),
        (["a", "b=0", "*", "c=0", "d=1"], None),
        (["a", "b", "*", "e=2", "c", "d=1"], None),
        (["b", "a", "*", "c", "d=1"], "order"),
        (["a", "*", "c", "d=1"], "b is gone"),
        (["a", "x", "*", "c", "d=1"], "x is new and required"),
        (["a", "b", "*", "c", "d=2"], "d=1 is gone or changed"),
        (["a", "b", "*", "c", "d"], "d=1 is gone or changed"),
        (["a", "*", "b", "c", "d=1"], "no longer positional"),
        (["a", "b", "*", "c", "d=1", "e"], "e is new and required"),
        (["a", "x=1", "b", "*", "c", "d=1"], "before old ones"),
    ],
)
def test_a_change_is_seen(new: list[str], said: str | None) -> None:
    found = changes(["a", "b", "*", "c", "d=1"], new)
    assert not found if said is None else any(said in text for text in found)


def test_the_contract_is_there() -> None:
    """The names that the project promised from the first day."""
    api = record()["api"]
    assert len([path for path in api if path.startswith("rlft.losses.")]) >= 60
    assert api["rlft.losses.ppo_clip"][:4] == ["logps", "old_logps", "advantages", "mask"]
    assert api["rlft.losses.dpo"][:4] == ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    assert api["rlft.losses.agro_off_policy"] == ["logps", "ref_logps", "rewards", "group_ids", "mask", "*", "beta"]
    for method in ("train", "rollout", "score", "prepare", "compute_loss", "optimizer_step", "evaluate", "save_model"):
        assert f"rlft.trainer.Trainer.{method}" in api


# -- words ------------------------------------------------------------------------------------------------------------
#: A protocol has no arguments of its own, and every setting of Config is explained in its field.
ELSEWHERE = {"rlft.rollout.Sampler", "rlft.config.Config"}


def unexplained(thing: Any) -> str | None:
    """What is missing from a docstring: its first line, or ``Args:`` where there is something to pass."""
    doc = inspect.getdoc(thing)
    if not doc or not doc.splitlines()[0].strip():
        return "has no docstring"
    if inspect.isclass(thing) and doc.startswith(f"{thing.__name__}("):
        return "has the docstring that dataclass made"
    given = [word for word in parameters(thing) if word != "*"]
    if isinstance(thing, type) and issubclass(thing, Exception):
        return None
    if len(given) > 1 and not re.search(r"^(Args|Attributes):", doc, re.M):
        return "has no Args"
    return None


def test_every_public_thing_is_explained() -> None:
    missing = {path: what for path, thing in public() if path not in ELSEWHERE and (what := unexplained(thing))}
    assert not missing, missing


def test_every_argument_of_a_loss_is_explained() -> None:
    for path, thing in public():
        if not path.startswith(("rlft.losses.", "rlft.advantages.", "rlft.kl.")) or inspect.isclass(thing):
            continue
        doc = inspect.getdoc(thing) or ""
        for word in parameters(thing):
            name = word.lstrip("*").partition("=")[0]
            assert not name or re.search(rf"^    (\w+, )*{name}(, \w+)*:", doc, re.M), f"{path}: {name}"


def test_every_setting_is_explained() -> None:
    for field in dataclasses.fields(rlft.Config):
        assert len(field.metadata["doc"]) > 5, field.name
        assert field.metadata["doc"].endswith("."), field.name


if __name__ == "__main__":
    write()
    print(f"{len(snapshot())} names recorded in {RECORD.name}")
