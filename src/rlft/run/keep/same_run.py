"""Is the run that is continued the one that was begun? Its data, its settings and what it is made of are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlft import checkpoint
from rlft._redact import redact
from rlft.config import Config, ConfigError, digest_of
from rlft.run import display
from rlft.run.keep import record as provenance

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["check"]


def check(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Refuse to continue a run that is another one now; say which versions changed.

    What a checkpoint of an older version does not know is not compared.

    Args:
        trainer: about to continue.
        found: where from.

    Raises:
        ConfigError: with every change, and what to do: for some, the setting that lets the run go on.
    """
    record = found.records["trainer"]
    then = record.get("made_of", {})
    _check_data(trainer, record, then, found)
    _check_settings(trainer, found)
    if trainer.is_main:  # the weights are hashed there alone
        _check_parts(trainer, then, found.path)


def _check_data(
    trainer: Trainer, record: Mapping[str, Any], then: Mapping[str, Any], found: checkpoint.Checkpoint
) -> None:
    one, other = then.get("columns", {}), trainer.made_of["columns"]
    changes = [f"column {name!r}: other values" for name in one if name in other and one[name] != other[name]]
    if record["data"] != trainer.train_data.fingerprint:
        before, now = record.get("data_facts", {}), provenance.data_facts(trainer)
        counts = [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        changes += counts or ["as many examples and tokens, but other ones or in another order"]
    if changes and not _accepted(trainer, "data", changes):
        raise ConfigError(
            f"the training data changed since {found.path} was written ({', '.join(changes)}); continuing would mix two runs: "
            f"restore the data, the tokenizer and the limits, or use another output_dir; to go on all the same, set "
            f"accept_changed: [data]"
        )


def _check_settings(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    if found.manifest.config_hash == trainer.config.digest():
        return
    # compared as JSON: a tuple in memory is a list in the file. A setting that came with a newer version had its default.
    stored = json.loads(json.dumps(found.records.get("config", {})))
    then = json.loads(json.dumps(Config().to_dict())) | stored
    now = json.loads(json.dumps(redact(trainer.config.to_dict())))
    deciding = trainer.config.identity()
    changes = [f"  {k}: {then[k]!r} -> {now[k]!r}" for k in deciding if then[k] != now[k]]
    changes += [f"  {k}: {value!r} -> no setting of this version" for k, value in stored.items() if k not in now]
    if not changes and digest_of({k: then[k] for k in deciding}) == trainer.config.digest():
        return
    changes = changes or ["  a value that is not shown, since it looks like a secret"]
    raise ConfigError(
        f"{trainer.run_dir} holds a run with other settings; continuing it would mix two runs:\n"
        + "\n".join(changes)
        + "\nuse the settings it was started with, or another output_dir (resume=never does not overwrite it either)"
    )


def _accepted(trainer: Trainer, kind: str, changes: Iterable[str]) -> bool:
    """Whether the run's settings let it go on with these changes; they are said then."""
    if kind not in trainer.config.accept_changed:
        return False
    display.warn(trainer, f"the run goes on with changed {kind} (accept_changed): {'; '.join(changes)}")
    return True


def _check_parts(trainer: Trainer, then: Mapping[str, Any], where: Path) -> None:
    """Refuse other objectives, rewards, adapters and weights; say which versions changed."""
    if not trainer.is_main:  # the weights are hashed there alone
        return
    now = trainer.made_of
    found = {
        "objective": _changes(then.get("objective"), now["objective"]),
        "rewards": _changes(then.get("rewards"), now["rewards"]),
        "adapters": [f"adapters: {line}" for line in _changes(then.get("adapters"), now["adapters"])],
        "weights": _changed_weights(then, now),
    }
    changed = {kind: lines for kind, lines in found.items() if lines and not _accepted(trainer, kind, lines)}
    if changed:
        raise ConfigError(
            f"{trainer.run_dir} was begun with something else than is given now; continuing {where.name} would mix two "
            "runs:\n"
            + "".join(f"  {line}\n" for lines in changed.values() for line in lines)
            + "give what it was begun with, or "
            f"another output_dir; to go on all the same, set accept_changed: [{', '.join(changed)}]"
        )
    said = _changed_versions(then, now)
    if said:
        display.warn(
            trainer, f"since {where.name} was written: {', '.join(said)}; the run goes on, perhaps not bit for bit"
        )


def _changes(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    if then is None:
        return []
    names = [*then, *(name for name in now if name not in then)]
    return [
        f"{name}: {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _changed_weights(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    one, other = then.get("weights"), now["weights"]
    if one is None:
        return []
    library = [record.get("versions", {}).get("transformers") for record in (then, now)]
    lines = []
    for owner in [*one, *(name for name in other if name not in one)]:
        if owner not in one or owner not in other:
            lines.append(f"{owner}: {'there' if owner in one else 'none'} -> {'there' if owner in other else 'none'}")
            continue
        configs = one[owner]["config"], other[owner]["config"]
        if library[0] != library[1]:  # another version writes other entries; those that both have are compared
            configs = tuple({k: v for k, v in config.items() if all(k in c for c in configs)} for config in configs)
        lines += [f"config of the {owner}: {line}" for line in _changes(*configs)]
        before, after = one[owner]["tensors"], other[owner]["tensors"]
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if names:
            changed = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names]
            more = f", ... {changed[-1]}" if len(names) > 3 else ""
            lines.append(
                f"frozen weights of the {owner}: {len(names)} of {len({**before, **after})} tensors have other values "
                f"({', '.join(changed[:3])}{more})"
            )
    return lines


def _changed_versions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    said = [f"{line.replace(': ', ' ', 1)}" for line in _changes(then.get("versions"), now["versions"])]
    if then.get("chat_template", now["chat_template"]) != now["chat_template"]:
        said.append("the chat template changed")
    before = then.get("sources", {})
    for name, source in now["sources"].items():
        commits = before.get(name, {}).get("revision"), source.get("revision")
        if None not in commits and commits[0] != commits[1]:
            said.append(f"the {name}'s revision {commits[0][:12]} -> {commits[1][:12]}")
    return said
