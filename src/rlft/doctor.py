"""``rlft doctor RUN_DIR``: what a run folder holds, and what the next start will do with it. It changes nothing.

It looks as a start does: folders that a killed save set aside are put back first, then the newest checkpoint that verifies
is taken, a newer format stops the search, and the log is cut to where that checkpoint left it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlft._json import loads
from rlft._metrics_log import LOG_NAME, MetricsLog, read_metrics
from rlft._redact import redact
from rlft.checkpoint import CheckpointError, CheckpointVersionError
from rlft.checkpoint._manifest import Manifest, files_in
from rlft.checkpoint._read import checkpoint_name, numbered, verify_in_run
from rlft.checkpoint._remove import PASSING
from rlft.config import Config
from rlft.runlock import RUN_NAME, RunLockError, holder, stored_config_hash

__all__ = ["Found", "Verdict", "diagnose", "main", "survey"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: What else a killed run may leave, and the next start clears.
_LEFT = re.compile(r"\.(tmp|old)-model|\.tmp-.*\.json-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint as the next start sees it.

    Attributes:
        step: from its name.
        path: its folder now.
        state: ``sound``, ``damaged`` or ``newer`` (of a format that this version cannot read).
        problem: what is wrong, else "".
        aside: a killed save set it aside; the next start gives it its name again.
        manifest: of a sound one.
    """

    step: int
    path: Path
    state: str
    problem: str = ""
    aside: bool = False
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the next start does.

    Attributes:
        kind: ``complete``, ``continues``, ``begins`` (afresh) or ``refused``.
        text: in words, with what to do.
        step: that it goes on from, or is complete at; None otherwise.
    """

    kind: str
    text: str
    step: int | None = None

    @property
    def code(self) -> int:
        """0 when the run is complete or goes on, 1 otherwise."""
        return 0 if self.kind in ("complete", "continues") else 1


def main(folder: str | Path) -> int:
    """Print a diagnosis. Returns 0 when the run can be resumed or is complete, 1 otherwise.

    Raises:
        ValueError: when the folder is not there.
    """
    run_dir = Path(folder)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder; give the output_dir of a run")
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    found = survey(run_dir)
    table = Table(title=Text(_shown(run_dir)), title_justify="left", box=box.ROUNDED)
    for head in ("step", "state", "size", "written", "processes"):
        table.add_column(head)
    for item in found:
        style = "green" if item.state == "sound" else "red"
        best = ", best" if item.manifest and item.manifest.best else ""
        state = item.problem or "sound" + best + (", set aside by a killed save" if item.aside else "")
        size, written, processes = _size(item.path), "", "-"
        if item.manifest is not None:
            written, processes = item.manifest.created, str(item.manifest.world_size)
        table.add_row(str(item.step), Text(_shown(state), style), size, _shown(written), processes)
    if found:
        console.print(table)
    for line in _facts(run_dir, _chosen(found)):
        console.print(_shown(line), markup=False)
    verdict = diagnose(run_dir, found)
    console.print(_shown(verdict.text), markup=False)
    return verdict.code


def survey(run_dir: str | Path) -> list[Found]:
    """Every checkpoint that the next start will see, newest first, each verified to the last byte."""
    run_dir = Path(run_dir)
    places = {step: (path, False) for step, path in numbered(run_dir)}
    for name in sorted(path.name for path in run_dir.iterdir() if PASSING.fullmatch(path.name)):
        kind, step = name[1:].split("-")[:2]
        if kind == "old" and not (run_dir / checkpoint_name(int(step))).exists():
            places.setdefault(int(step), (run_dir / name, True))
    found = []
    for step, (path, aside) in sorted(places.items(), reverse=True):
        try:
            manifest = verify_in_run(path)
            if manifest.step != step:
                raise CheckpointError(f"{path} holds step {manifest.step}; it was renamed or copied over another")
        except CheckpointVersionError as error:
            found.append(Found(step, path, "newer", str(error), aside))
        except CheckpointError as error:
            found.append(Found(step, path, "damaged", str(error), aside))
        else:
            found.append(Found(step, path, "sound", "", aside, manifest))
    return found


def diagnose(run_dir: str | Path, found: list[Found] | None = None) -> Verdict:
    """What the same command does when it is given now.

    Args:
        run_dir: folder of a run.
        found: of :func:`survey`, where it is known.
    """
    run_dir = Path(run_dir)
    found = survey(run_dir) if found is None else found
    owner = holder(run_dir)
    if owner is not None:
        then = _without_owner(run_dir, found).text
        return Verdict(
            "refused", f"the folder is in use by {owner}: a second start is refused until it ends; then: {then}"
        )
    return _without_owner(run_dir, found)


def _without_owner(run_dir: Path, found: list[Found]) -> Verdict:
    try:
        stored_config_hash(run_dir)
    except RunLockError as error:
        return Verdict("refused", str(error))
    for item in found:
        if item.state == "newer":
            return Verdict("refused", f"the same command is refused: {item.problem}")
        if item.state == "sound":
            return _go_on(run_dir, item)
    if found:
        return Verdict(
            "refused",
            "the same command is refused: no checkpoint verifies; restore one, or move the folder away to start again",
        )
    return Verdict("begins", "no sound checkpoint: the same command starts from the beginning")


def _go_on(run_dir: Path, item: Found) -> Verdict:
    try:
        record, config = _record(item, "trainer"), _record(item, "config")
    except (ValueError, OSError) as error:
        return Verdict(
            "refused", f"{item.path} verifies, but was not written by a run ({error}); a start cannot use it"
        )
    resume = config.get("resume", "auto")
    if resume == "never":
        return Verdict(
            "refused",
            f"the run's settings say resume: never, so the same command is refused; with resume: auto it "
            f"{'is complete at' if record.get('finished') else 'continues from'} step {item.step}",
        )
    if record.get("finished"):
        model = "" if (run_dir / "model").is_dir() else ", but writes the trained model, which is not there"
        return Verdict(
            "complete", f"complete ({item.step} steps): the same command does no further step{model}", item.step
        )
    if (trouble := _log_trouble(run_dir, item.step, record.get("log_offset"))) is not None:
        return Verdict("refused", f"the same command would fail at the log: {trouble}")
    place = "" if resume == "auto" else f" (unless it begins anew from resume: {resume})"
    return Verdict("continues", f"the same command continues from step {item.step}{place}", item.step)


def _log_trouble(run_dir: Path, step: int, offset: Any) -> str | None:
    """What a resume would say of the log, tried on a copy; None when it can be cut to its place."""
    log = run_dir / LOG_NAME
    if not log.is_file():
        return None
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are missing are no hindrance
        copy = Path(place) / LOG_NAME
        try:
            shutil.copyfile(log, copy)
            with MetricsLog(copy) as opened:
                opened.truncate_to(step, offset)
        except (ValueError, OSError) as error:
            return str(error).replace(str(copy), str(log))
    return None


def _chosen(found: list[Found]) -> Found | None:
    """The checkpoint that a start would take."""
    item = next((item for item in found if item.state != "damaged"), None)
    return item if item is not None and item.state == "sound" else None


def _record(item: Found, stem: str) -> dict[str, Any]:
    """A JSON record of a checkpoint that was verified.

    Raises:
        ValueError: there is none, or it is no mapping.
    """
    path = item.path / f"{stem}.json"
    if item.manifest is None or path.name not in item.manifest.files:
        raise ValueError(f"it has no {path.name}")
    value = loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"its {path.name} is no mapping")
    return value


# -- facts beside the verdict ------------------------------------------------------------------------------------------
def _facts(run_dir: Path, item: Found | None) -> list[str]:
    lines = [_log_line(run_dir)]
    if item is not None:
        try:
            record, config = _record(item, "trainer"), _record(item, "config")
        except (ValueError, OSError):
            record, config = {}, {}
        lines += [_settings_line(config), *_origin_lines(record.get("made_of", {}))]
        lines += _digest_lines(run_dir, item)
    model = run_dir / "model"
    lines.append(f"model: {_size(model)} in {model}" if model.is_dir() else "model: not exported yet")
    left = sorted(p.name for p in run_dir.iterdir() if PASSING.fullmatch(p.name) or _LEFT.fullmatch(p.name))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        lines.append(f"left by a killed run, cleared or put back at the next start: {', '.join(left[:3])}{more}")
    return [line for line in lines if line]


def _log_line(run_dir: Path) -> str:
    log = run_dir / LOG_NAME
    if not log.is_file():
        return f"{LOG_NAME}: not there"
    try:
        rows = read_metrics(log)
    except (ValueError, OSError) as error:
        return f"{LOG_NAME}: {error}"
    return f"{LOG_NAME}: {len(rows)} lines" + (f", last step {rows[-1].get('step')}" if rows else "")


def _settings_line(config: Mapping[str, Any]) -> str:
    """The settings that are not the default ones."""
    default = Config().to_dict()
    shown = [
        f"{k}={v!r}"
        for k, v in redact(dict(config)).items()
        if k not in default or list(_flat(v)) != list(_flat(default[k]))
    ]
    return f"settings: {', '.join(shown)}" if shown else ""


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _origin_lines(made_of: Mapping[str, Any]) -> list[str]:
    """What computed, and where models came from; what is installed now, where that is something else."""
    import torch

    from rlft.run.keep.record import versions

    lines = []
    then = made_of.get("versions", {})
    if then:
        now = versions(torch.device("cpu")) | {"device": then.get("device")}
        changed = [f"{name} {then[name]} -> {now[name]}" for name in then if name in now and now[name] != then[name]]
        lines.append("written with: " + ", ".join(f"{name} {value}" for name, value in then.items()))
        lines += [f"installed now: {', '.join(changed)}; a resume goes on, perhaps not bit for bit"] if changed else []
    for name, source in made_of.get("sources", {}).items():
        revision = source.get("revision")
        lines.append(f"{name}: {source.get('name')}" + (f" at revision {revision}" if revision else ""))
    if (template := made_of.get("chat_template", "none")) != "none":
        lines.append(f"chat template: {template}")
    return lines


def _digest_lines(run_dir: Path, item: Found) -> list[str]:
    try:
        stored = stored_config_hash(run_dir)
    except RunLockError:
        return []
    if stored is None or item.manifest is None or stored == item.manifest.config_hash:
        return []
    return [f"{RUN_NAME} was written with other settings, or by another version, than checkpoint-{item.step}"]


def _size(path: Path) -> str:
    try:
        size = sum(files_in(path).values()) if path.is_dir() and not path.is_symlink() else 0
    except (CheckpointError, OSError):
        return "-"
    return f"{size / 2**20:.1f} MiB"


def _shown(text: Any) -> str:
    """As a terminal may have it: what came from files steers nothing and tells no secret."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", redact(str(text)))
