"""What the sections share: runs that end like their uninterrupted twin, and a list of what did not."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability import forker, runs
from tests.reliability.forker import Ended, Job


@dataclass
class Figures:
    """Outcome of one section.

    Attributes:
        title: what was done.
        wanted: how many cases the section should have had.
        cases: how many it had.
        failures: one text per case that did not hold.
        reached: named instants that runs were killed at.
        notes: measured numbers, name -> value.
    """

    title: str
    wanted: int
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Folders, twins and checks.

    Args:
        root: an empty folder, best in memory.
        seed: of every random choice.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.random = root, random.Random(seed)
        self.paths = runs.write_configs(root)
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.passages: dict[str, dict[str, int]] = {}
        self.figures = Figures("", 0)
        self._count = 0

    def begin(self, title: str, wanted: int) -> Figures:
        """Start a section."""
        self.figures = Figures(title, wanted)
        return self.figures

    def folder(self) -> Path:
        """A new name, in a folder of its own: reference log-probs that are kept lie beside it."""
        self._count += 1
        (self.root / f"run-{self._count}").mkdir()
        return self.root / f"run-{self._count}" / "run"

    def twin(self, name: str) -> None:
        """The uninterrupted run, twice: they must agree, and everything else is compared with them."""
        if name in self.expected:
            return
        digests, seconds = [], []
        for settings in (("dataloader_num_workers=0",), ()):  # workers must change nothing
            folder = self.folder()
            ended = forker.run(Job(self.paths[name], folder, settings))
            if ended.status:
                raise RuntimeError(f"{name} does not run:\n{ended.text}")
            digests.append(runs.digest(folder))
            seconds.append(ended.seconds)
            shutil.rmtree(folder)
        if digests[0] != digests[1]:
            different = [part for part in digests[0] if digests[0][part] != digests[1].get(part)]
            raise RuntimeError(f"two uninterrupted runs of {name} differ in {different}: this machine cannot tell")
        self.expected[name], self.seconds[name] = digests[0], max(seconds)
        folder = self.folder()
        ended, self.passages[name] = forker.passages(Job(self.paths[name], folder, trace=self.root / "trace"))
        shutil.rmtree(folder)

    def fail(self, label: str, what: str) -> None:
        """Note what did not hold; a long section does not keep it to itself."""
        print(f"  {label}: {what}", flush=True)
        self.figures.failures.append(f"{label}: {what}")

    def launch(self, name: str, folder: Path, label: str, *, stop_after: float | None = None,
               number: int = signal.SIGKILL, **job: Any) -> Ended:  # fmt: skip
        """One start of a run; checks that every checkpoint loads and how much work a kill cost."""
        before = runs.newest(folder) if folder.exists() else 0
        ended = forker.run(Job(self.paths[name], folder, **job), stop_after=stop_after, number=number)
        self.notes("starts", 1)
        if folder.exists():
            for bad in runs.unloadable(folder):
                self.fail(label, f"cannot be loaded: {bad}")
            after = runs.newest(folder)
        else:
            after = 0
        if ended.status == -signal.SIGKILL:
            self.notes("kills", 1)
            lost = before + ended.steps - after
            self.figures.notes["steps lost at most"] = max(lost, self.figures.notes.get("steps lost at most", 0))
            if lost > runs.SAVE_STEPS:
                self.fail(label, f"{lost} steps lost, killed after {ended.at}")
        return ended

    def notes(self, key: str, more: int) -> None:
        self.figures.notes[key] = self.figures.notes.get(key, 0) + more

    def finish(self, name: str, folder: Path, label: str, *, stops: float = 0.0, **job: Any) -> None:
        """Start the run until it ends, killing some of the starts too, and compare its end with the twin's."""
        for _ in range(20):
            again = self.random.uniform(0, self.seconds[name]) if self.random.random() < stops else None
            ended = self.launch(name, folder, label, stop_after=again, **job)
            if ended.status == 0:
                break
            if ended.status != -signal.SIGKILL:
                self.fail(label, f"the restart ended with {ended.status}: {ended.text[-600:]}")
                return
        self.compare(name, folder, label)

    def compare(self, name: str, folder: Path, label: str) -> None:
        """The end of a run against its twin's; the folder is removed when all is well."""
        bad = len(self.figures.failures)
        try:
            found, expected = runs.digest(folder), self.expected[name]
            different = sorted(part for part in {*found, *expected} if found.get(part) != expected.get(part))
            if different:
                self.fail(label, f"ended with other bits in {different}")
        except Exception as error:
            self.fail(label, f"the end cannot be read: {error!r}")
        if left := runs.leftovers(folder):
            self.fail(label, f"left behind: {left}")
        if len(self.figures.failures) == bad:
            shutil.rmtree(folder)

    def stages(self, counts: Counter[str]) -> str:
        """Where something happened, in words."""
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())
