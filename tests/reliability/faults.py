"""Disks that refuse, files that change, rewards that fail, and runs that go on for long."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

from rlft import checkpoint
from tests.reliability import forker, runs
from tests.reliability.bench import Bench, Figures
from tests.reliability.forker import Job
from tests.reliability.kills import POINT

NOBODY = 65534
#: Instants of the disk: what a full or broken one can refuse.
_DISK = ("run.", "settings.", "metrics.line", "metrics.sync", "checkpoint.", "export.")
# Deleting what is no longer needed may fail: that is a warning, and the run goes on.
_HARMLESS = ("checkpoint.rotate", "checkpoint.stale")


def _check_refusal(bench: Bench, name: str, folder: Path, label: str, ended: forker.Ended, *, full: bool) -> None:
    """After a refusal: the message names path, needed and free; nothing half-written; then the run goes on exactly."""
    if ended.status not in (1, 2):
        bench.fail(label, f"ended with {ended.status}: {ended.text[-600:]}")
    words = [str(folder), *(["bytes needed", "bytes free"] if full else [])]
    if "MiB free and one checkpoint takes about" in ended.text:  # refused before the start, in other words
        words = [str(folder)]
    missing = [word for word in words if word not in ended.text]
    if missing:
        bench.fail(label, f"the message lacks {missing}: {ended.text[-600:]}")
    if folder.exists() and (left := runs.leftovers(folder)):
        bench.fail(label, f"left behind: {left}")


def disk_budgets(bench: Bench, names: list[str], count: int) -> Figures:
    """Disks of 40 sizes: a tmpfs where this process may mount one, else a limit on the size of files."""
    figures = bench.begin("Disk full at byte budgets", count)
    kinds: Counter[str] = Counter()
    place = bench.root / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["umount", place], check=True)
    for index in range(count):
        name = names[index % len(names)]
        bench.twin(name)
        step = index // len(names) // 2  # both kinds of limit at each step of the way
        share = (step + 0.5) / max(1, -(-count // len(names) // 2))
        if mounted and index // len(names) % 2 == 0:
            figures.cases += _small_disk(bench, name, place, share, kinds)
        else:
            figures.cases += _file_limit(bench, name, share, kinds)
    figures.notes |= {"kinds": bench.stages(kinds)}
    return figures


@functools.cache
def _size(bench: Bench, name: str) -> tuple[int, int]:
    """Bytes of a finished run's folder in pages, and of its largest file."""
    folder = bench.folder()
    forker.run(Job(bench.paths[name], folder))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    pages = sum(-(-size // 4096) * 4096 for size in sizes)
    shutil.rmtree(folder)
    return pages, max(sizes)


def _small_disk(bench: Bench, name: str, place: Path, share: float, kinds: Counter[str]) -> int:
    whole = 1.5 * _size(bench, name)[0]  # a third checkpoint is there while the new one is being written
    # The file system must offer what the start asks for, so the room is taken by ballast once the run has begun.
    size = int(whole * share) // 4096 * 4096
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={64 << 20}", "tmpfs", place], check=True)
    try:
        folder, label = place / "run", f"{name}, disk of {size:,} bytes"
        forker.run(Job(bench.paths[name], folder, env={POINT: "train.batch.before:1"}))  # killed at the first step
        subprocess.run(["mount", "-o", f"remount,size={max(size, 4096)}", place], capture_output=True, check=False)
        ended = bench.launch(name, folder, label)
        if ended.status == 0:
            kinds["large enough"] += 1
            bench.compare(name, folder, label)
            return 1
        kinds["tmpfs"] += 1
        _check_refusal(bench, name, folder, label, ended, full=True)
        subprocess.run(["mount", "-o", f"remount,size={64 << 20}", place], check=True)
        bench.finish(name, folder, label)
    finally:
        subprocess.run(["umount", place], check=True)
    return 1


def _file_limit(bench: Bench, name: str, share: float, kinds: Counter[str]) -> int:
    limit = int(_size(bench, name)[1] * share)
    folder, label = bench.folder(), f"{name}, files of at most {limit:,} bytes"
    ended = bench.launch(name, folder, label, file_limit=limit)
    kinds["RLIMIT_FSIZE"] += 1
    if ended.status == 0:
        bench.fail(label, "nothing was refused")
    _check_refusal(bench, name, folder, label, ended, full=True)
    bench.finish(name, folder, label)
    return 1


def disk_errors(bench: Bench, names: list[str], count: int) -> Figures:
    """ENOSPC, EIO and EACCES at random instants of the disk, each point's first or last passage."""
    figures = bench.begin("ENOSPC, EIO and EACCES injected at a write, fsync, rename or delete", 0)
    for name in names:
        bench.twin(name)
        passed = bench.passages[name]
        points = [point for point in passed if point.startswith(_DISK) and point.endswith(".before")]
        cases = [
            (point, passage, kind)
            for point in points
            for passage in sorted({1, passed[point]})
            for kind in ("ENOSPC", "EIO", "EACCES")
        ]
        for point, passage, kind in bench.random.sample(cases, min(count, len(cases))):
            folder, label = bench.folder(), f"{name}, {kind} at {point}:{passage}"
            ended = bench.launch(name, folder, label, env={POINT: f"{point}:{passage}:oserror:{kind}"})
            figures.cases += 1
            if ended.status == 0 and "could not be kept in" in ended.text:
                pass  # reference log-probs that are not kept are computed again: a warning, not an error
            elif point.startswith(_HARMLESS):
                if ended.status:
                    bench.fail(label, f"deleting may fail, but this ended with {ended.status}: {ended.text[-600:]}")
            else:
                _check_refusal(bench, name, folder, label, ended, full=kind == "ENOSPC")
            bench.finish(name, folder, label)
    figures.wanted = figures.cases
    return figures


def read_only(bench: Bench, names: list[str]) -> Figures:
    """A folder that may not be written, before the start and from the middle of a run; a disk mounted read-only."""
    figures = bench.begin("Folder that may not be written, as another user", 2 * len(names))
    for name in names:
        bench.twin(name)
        for begun in (False, True):
            folder, label = bench.folder(), f"{name}, read-only folder, {'resumed' if begun else 'new'}"
            folder.mkdir()
            if begun:
                forker.run(Job(bench.paths[name], folder, env={POINT: f"train.batch.before:{runs.SAVE_STEPS + 2}"}))
            subprocess.run(["chmod", "-R", "a-w", folder], check=True)
            before = runs.newest(folder)
            ended = bench.launch(name, folder, label, user=NOBODY)
            figures.cases += 1
            _check_refusal(bench, name, folder, label, ended, full=False) if not begun else None
            if ended.status not in (1, 2) or str(folder) not in ended.text or runs.newest(folder) != before:
                bench.fail(label, f"ended with {ended.status}: {ended.text[-600:]}")
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)
            bench.finish(name, folder, label)
    return figures


def corruptions(bench: Bench, name: str, count: int, resumed: int) -> Figures:
    """Bits flipped, files cut short, removed or grown, over every file of a run's newest checkpoint."""
    figures = bench.begin("Damaged checkpoints", count)
    bench.twin(name)
    folder = bench.folder()
    forker.run(Job(bench.paths[name], folder, env={POINT: f"train.batch.before:{2 * runs.SAVE_STEPS + 1}"}))
    last = folder / f"checkpoint-{runs.newest(folder)}"
    files = sorted(path.relative_to(last) for path in last.rglob("*") if path.is_file())
    through = set(bench.random.sample(range(count), resumed))
    kinds: Counter[str] = Counter()
    for index in range(count):
        path, kind = last / files[index % len(files)], ("bit flipped", "cut short", "removed", "bit flipped")[index % 4]
        label = f"{path.relative_to(last)}: {kind}, case {index}"
        kept = path.read_bytes()
        _damage(path, kind, kept, bench.random)
        try:
            checkpoint.load(last)
            bench.fail(label, "was loaded")
        except checkpoint.CheckpointError:
            pass
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = checkpoint.load_latest(folder)
        if found is None or found.path == last or not any("falling back" in str(w.message) for w in seen):
            bench.fail(label, "no fall-back with a warning")
        if index in through:
            copy = bench.folder()
            shutil.copytree(folder, copy)
            ended = forker.run(Job(bench.paths[name], copy))
            if ended.status or "falling back" not in ended.text:
                bench.fail(label, f"the run ended with {ended.status} and said {ended.text[-600:]}")
            bench.compare(name, copy, label)
        path.write_bytes(kept)
        kinds[kind] += 1
        figures.cases += 1
    figures.notes |= {
        "kinds": bench.stages(kinds),
        "files": len(files),
        "of which the whole run was resumed to its end": resumed,
    }
    return figures


def _damage(path: Path, kind: str, data: bytes, source: random.Random) -> None:
    if kind == "removed" or not data:
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(data[: source.randrange(len(data))])
    else:
        bit = source.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))


def rewards(bench: Bench, names: list[str], count: int) -> Figures:
    """A reward function that raises, hangs or returns NaN at a random call, those of evaluations among them."""
    figures = bench.begin("Rewards that raise, hang or are NaN", count)
    kinds: Counter[str] = Counter()
    said = {"raise": "raised KeyError", "hang": "did not return within", "nan": "returned nan for row 1"}
    for index in range(count):
        name, kind = names[index % len(names)], ("raise", "nan", "raise", "nan", "hang")[index % 5]
        bench.twin(name)
        call = bench.random.randint(1, bench.passages[name]["train.reward.before"])
        folder, label = bench.folder(), f"{name}, {kind} at call {call}"
        ended = bench.launch(name, folder, label, env={runs.FAULT: f"{kind}:{call}"})
        figures.cases += 1
        kinds[kind] += 1
        at = (f"at step {ended.steps + 1}", f"after step {ended.steps}, in evaluation")
        for words in ((f"reward function 'digits' {said[kind]}",), at):
            if ended.status != 1 or not any(text in ended.text for text in words):
                bench.fail(label, f"ended with {ended.status}, without {' or '.join(words)}: {ended.text[-600:]}")
        if runs.newest(folder) != ended.steps or not (folder / f"checkpoint-{ended.steps}").exists():
            bench.fail(label, f"{ended.steps} steps were taken, the checkpoint is of step {runs.newest(folder)}")
        if left := runs.leftovers(folder):
            bench.fail(label, f"left behind: {left}")
        bench.finish(name, folder, label)
    figures.notes["kinds"] = bench.stages(kinds)
    return figures


def soak(bench: Bench, names: list[str], steps: int) -> Figures:
    """A long run: resident memory and open descriptors, from the 400th step to the last."""
    figures = bench.begin(f"{steps:,}-step run", len(names))
    for name in names:
        folder, probe = bench.folder(), bench.root / f"probe-{name}"
        ended = forker.run(Job(bench.paths[name], folder, (f"max_steps={steps}",), probe=probe), timeout=1800)
        figures.cases += 1
        if ended.status:
            bench.fail(name, f"ended with {ended.status}: {ended.text[-600:]}")
            continue
        rows = [tuple(map(int, line.split())) for line in probe.read_text().splitlines()]
        begin = next(row for row in rows if row[0] >= min(400, steps // 2))
        growth = 100 * (rows[-1][1] / begin[1] - 1)
        opened = rows[-1][2] - begin[2]
        key = name.removeprefix("soak_")
        figures.notes[f"{key}: memory"] = f"{begin[1] / 2**20:.1f} -> {rows[-1][1] / 2**20:.1f} MiB ({growth:+.2f} %)"
        figures.notes[f"{key}: descriptors"] = f"{begin[2]} -> {rows[-1][2]}"
        if growth >= 2 or opened > 0:
            bench.fail(name, f"memory {growth:+.2f} %, descriptors {opened:+d}")
        shutil.rmtree(folder)
    return figures
