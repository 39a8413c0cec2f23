"""Which checkpoint a run goes on from, and whether the run that is continued is the one that was begun."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlft import checkpoint
from rlft._redact import redact
from rlft.config import Config, ConfigError, digest_of
from rlft.run.keep.record import data_facts
from rlft.run.step.parts import Parts

__all__ = ["Resume"]


class Resume:
    """Finds the checkpoint, and compares data, settings and parts with those it was written with.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.run_dir, self.data, self.made_of = (
            parts.config,
            parts.run_dir,
            parts.train_data,
            parts.made_of,
        )
        self.processes, self.journal, self.replays = parts.processes, parts.journal, parts.replay is not None

    def wish(self, given: str | bool | None) -> str | Path:
        """``auto``, ``never`` or a checkpoint's folder."""
        wanted = self.config.resume if given is None else {True: "auto", False: "never"}.get(given, given)  # type: ignore[call-overload]
        if not isinstance(wanted, (str, Path)):
            raise ConfigError(f"resume must be True, False or a checkpoint's folder, got {wanted!r}")
        return wanted

    def find(self, wish: str | Path) -> tuple[checkpoint.Checkpoint | None, dict[str, str] | None]:
        """The checkpoint to go on from, compared with this run; and what to note of one that was asked for.

        Raises:
            ConfigError: where it belongs to another run.
        """
        found, taken = None, None
        if wish == "auto":
            found = checkpoint.load_latest(self.run_dir, rank=self.processes.rank)
        elif wish != "never":
            found, taken = self._asked_for(wish)
        if found is not None:
            self._compare(found)
        return found, taken

    def _asked_for(self, folder: str | Path) -> tuple[checkpoint.Checkpoint, dict[str, str] | None]:
        """The checkpoint that was asked for, and what to note of it; or the newest of a run that began from it, and None.

        The one that was asked for may be gone by then: newer ones took its place among those that are kept.
        """
        path, rank = Path(folder), self.processes.rank
        asked = checkpoint.load(path, rank=rank) if path.is_dir() else None
        newest = None
        with contextlib.suppress(
            checkpoint.CheckpointError
        ):  # where none can be read, the one that was asked for decides
            newest = checkpoint.load_latest(self.run_dir, rank=rank)
        noted = None if newest is None else newest.records["trainer"].get("resumed_from")
        if newest is not None and noted is not None:
            same = noted["id"] == asked.manifest.id if asked is not None else noted["path"] == str(path.resolve())
            if same:
                self.journal.say(
                    f"the run went on from {path} before and goes on from {newest.path.name} now; to begin from there "
                    f"again, move the newer checkpoints out of {self.run_dir}",
                )
                return newest, None
        if asked is None:
            raise ConfigError(
                f"resume={str(folder)!r} is no folder; give 'auto', 'never', or a checkpoint such as {self.run_dir}/checkpoint-100"
            )
        return asked, {"id": asked.manifest.id, "path": str(path.resolve())}

    def place(self, found: checkpoint.Checkpoint) -> dict[str, Any]:
        """Where this process goes on in the data.

        Processes may stand at different places, each with its own share of the rows. Another number of them has other
        shares: then all go on at the first one's place.
        """
        if found.manifest.world_size == self.processes.world_size:
            return found.records["source"]
        return checkpoint.load(found.path, only=["source"]).records["source"]

    def warn_of_others(self, found: checkpoint.Checkpoint, source: Mapping[str, Any]) -> None:
        """Say what another number of processes changes."""
        before, now = found.manifest.world_size, self.processes.world_size
        said = [
            f"the checkpoint was written by {before} process{'es' if before > 1 else ''} and {now} resume it: the run goes on "
            f"from step {self.processes.progress.step}, but not bit for bit, and a step is of {now} x "
            f"per_device_train_batch_size x gradient_accumulation_steps rows (it was {before} x)"
        ]
        if source.get("queued"):
            said.append(
                f"what was still to be trained on of the last generation (steps: {source['queued']}) is left out: a new one is "
                f"sampled"
            )
        if self.replays:
            said.append(
                f"the answers that processes {now} to {before - 1} kept for replay are left out"
                if now < before
                else "new processes begin with the answers that process 0 kept for replay"
            )
        self.journal.warn("; ".join(said))

    # -- is it the same run? ------------------------------------------------------------------------------------------------
    def _compare(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue a run that is another one now; say which versions changed.

        What a checkpoint of an older version does not know is not compared.

        Raises:
            ConfigError: with every change, and what to do: for some, the setting that lets the run go on.
        """
        record = found.records["trainer"]
        then = record.get("made_of", {})
        self._compare_data(record, then, found)
        self._compare_settings(found)
        if self.processes.is_main:  # the weights are hashed there alone
            self._compare_parts(then, found.path)

    def _compare_data(self, record: Mapping[str, Any], then: Mapping[str, Any], found: checkpoint.Checkpoint) -> None:
        one, other = then.get("columns", {}), self.made_of["columns"]
        changes = [f"column {name!r}: other values" for name in one if name in other and one[name] != other[name]]
        if record["data"] != self.data.fingerprint:
            before, now = record.get("data_facts", {}), data_facts(self.data)
            counts = [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
            changes += counts or ["as many examples and tokens, but other ones or in another order"]
        if changes and not self._accepted("data", changes):
            raise ConfigError(
                f"the training data changed since {found.path} was written ({', '.join(changes)}); continuing would mix two runs: "
                f"restore the data, the tokenizer and the limits, or use another output_dir; to go on all the same, set "
                f"accept_changed: [data]"
            )

    def _compare_settings(self, found: checkpoint.Checkpoint) -> None:
        if found.manifest.config_hash == self.config.digest():
            return
        # compared as JSON: a tuple in memory is a list in the file. A setting that came with a newer version had its default.
        stored = json.loads(json.dumps(found.records.get("config", {})))
        then = json.loads(json.dumps(Config().to_dict())) | stored
        now = json.loads(json.dumps(redact(self.config.to_dict())))
        deciding = self.config.identity()
        changes = [f"  {k}: {then[k]!r} -> {now[k]!r}" for k in deciding if then[k] != now[k]]
        changes += [f"  {k}: {value!r} -> no setting of this version" for k, value in stored.items() if k not in now]
        if not changes and digest_of({k: then[k] for k in deciding}) == self.config.digest():
            return
        changes = changes or ["  a value that is not shown, since it looks like a secret"]
        raise ConfigError(
            f"{self.run_dir} holds a run with other settings; continuing it would mix two runs:\n"
            + "\n".join(changes)
            + "\nuse the settings it was started with, or another output_dir (resume=never does not overwrite it either)"
        )

    def _accepted(self, kind: str, changes: Iterable[str]) -> bool:
        """Whether the run's settings let it go on with these changes; they are said then."""
        if kind not in self.config.accept_changed:
            return False
        self.journal.warn(f"the run goes on with changed {kind} (accept_changed): {'; '.join(changes)}")
        return True

    def _compare_parts(self, then: Mapping[str, Any], where: Path) -> None:
        """Refuse other objectives, rewards, adapters and weights; say which versions changed."""
        now = self.made_of
        found = {
            "objective": _changes(then.get("objective"), now["objective"]),
            "rewards": _changes(then.get("rewards"), now["rewards"]),
            "adapters": [f"adapters: {line}" for line in _changes(then.get("adapters"), now["adapters"])],
            "weights": _changed_weights(then, now),
        }
        changed = {kind: lines for kind, lines in found.items() if lines and not self._accepted(kind, lines)}
        if changed:
            raise ConfigError(
                f"{self.run_dir} was begun with something else than is given now; continuing {where.name} would mix two "
                "runs:\n"
                + "".join(f"  {line}\n" for lines in changed.values() for line in lines)
                + "give what it was begun with, or "
                f"another output_dir; to go on all the same, set accept_changed: [{', '.join(changed)}]"
            )
        said = _changed_versions(then, now)
        if said:
            self.journal.warn(
                f"since {where.name} was written: {', '.join(said)}; the run goes on, perhaps not bit for bit"
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
