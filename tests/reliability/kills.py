"""Kills and signals: at random instants, at every named one, during a resume, and of one process of two."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rlft import checkpoint
from rlft._failpoint import failpoints_in_source
from tests.reliability import forker, runs
from tests.reliability.bench import Bench, Figures
from tests.reliability.forker import Job, Running

POINT = "RLFT_FAILPOINT"
INTERRUPTED = 75  # rlft.cli: EX_TEMPFAIL


def _stage(point: str) -> str:
    """Part of the run that a failpoint belongs to."""
    if point.startswith("train."):
        return point.split(".")[1]
    kind = point.split(".")[0] or "start"
    return {"checkpoint": "save", "metrics": "log", "run": "start", "settings": "start"}.get(kind, kind)


def random_kills(bench: Bench, counts: dict[str, int]) -> Figures:
    """SIGKILL at instants drawn uniformly over the run, and again over some restarts."""
    figures = bench.begin("SIGKILL at random instants", sum(counts.values()))
    where: Counter[str] = Counter()
    for name, count in counts.items():
        bench.twin(name)
        killed = 0
        for _ in range(10 * count):  # an instant may lie after the end: times are measured once, and machines are busy
            if killed == count:
                break
            folder, instant = bench.folder(), bench.random.uniform(0, bench.seconds[name])
            label = f"{name}, killed after {instant:.3f} s"
            ended = bench.launch(name, folder, label, stop_after=instant)
            if ended.status == -signal.SIGKILL:
                killed += 1
                where[_stage(ended.at) if ended.at else "start"] += 1
            elif ended.status:
                bench.fail(label, f"ended with {ended.status}: {ended.text[-600:]}")
                continue
            bench.finish(name, folder, label, stops=0.2)
        figures.cases += killed
    figures.notes |= {"runs": counts, "last instant passed before the first kill": bench.stages(where)}
    return figures


#: What happens before the run that is killed: name -> failpoint settings of earlier starts, and of the run itself.
_SIGNAL = "checkpoint.parent.sync.after:1:signal:SIGTERM"  # at the end of the first save: the same step is saved again
SITUATIONS: dict[str, tuple[list[str], str]] = {
    "from the start": ([], ""),
    "restart after a kill in a save": (["checkpoint.manifest.write.before:2"], ""),
    "restart after a kill in the first start": (["run.config.rename.before:1"], ""),
    "restart after a torn line of the log": (["torn"], ""),
    "restart after a kill in the export": (["export.rename.before:1"], ""),
    "stopped by a signal on a saved step": ([], _SIGNAL),
    "restart after a kill while a save replaced another": (
        [f"{_SIGNAL},checkpoint.aside.after:1"], "",
    ),
    "disk full in a save": ([], "checkpoint.manifest.write.before:2:oserror:ENOSPC"),
    "disk full in a save that replaces another": (
        [], f"{_SIGNAL},checkpoint.rename.before:2:oserror:EIO",
    ),
    "disk full at the start": ([], "settings.rename.before:1:oserror:ENOSPC"),
    "disk full at the first start": ([], "run.config.rename.before:1:oserror:ENOSPC"),
    "disk full when reference log-probs are kept": ([], "ref_cache.rename.before:2:oserror:ENOSPC"),
    "disk full when their values are moved": ([], "ref_cache.rename.before:1:oserror:ENOSPC"),
    "resume from an older checkpoint of a finished run": (["finished"], "older"),
    "a folder called model was there": (["model"], ""),
    "disk full in the export": ([], "export.rename.before:1:oserror:ENOSPC"),
    "with the self-checks": ([], "self_checks=true"),
    "with a report": ([], "report=true"),
}  # fmt: skip


def _prepare(bench: Bench, name: str, situation: str) -> tuple[Path, str, tuple[str, ...]]:
    """A folder in that situation; the failpoint settings and settings of the run that comes now."""
    earlier, spec = SITUATIONS[situation]
    template, folder = bench.root / f"{name}-{situation.replace(' ', '-')}", bench.folder()
    if not template.exists():
        template.mkdir()
        for step in earlier:
            if step == "model":
                (template / "model").mkdir()
                (template / "model" / "old").write_text("old")
            elif step == "torn":
                forker.run(Job(bench.paths[name], template, env={POINT: "train.optimizer.before:4"}))
                with (template / "metrics.jsonl").open("a") as log:
                    log.write('{"step": 99, "lo')
            else:
                forker.run(Job(bench.paths[name], template, env={POINT: step} if step != "finished" else {}))
    if any(template.iterdir()):
        shutil.copytree(template, folder)
    if "=" in spec:
        return folder, "", (spec,)
    if spec != "older":
        return folder, spec, ()
    steps = sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    return folder, "", (f"resume={folder}/checkpoint-{steps[0]}",)


def named_kills(
    bench: Bench,
    names: list[str],
    share: Callable[[int], int] = lambda count: count,
    *,
    situations: Sequence[str] = tuple(SITUATIONS),
    only: int | None = None,
) -> Figures:
    """SIGKILL at every failpoint that the trainer passes in one of the situations, at a random passage of it.

    Args:
        bench: of the campaign.
        names: runs; the first is killed at every point that it passes, the others also at points of their own.
        share: how many of the points that an earlier run was killed at the others are killed at too.
        situations: names in SITUATIONS.
        only: points per situation, for a quick look.
    """
    figures = bench.begin("SIGKILL at every named instant", 0)
    in_source, reached, useful = failpoints_in_source(), set[str](), set[str]()
    for name in names:
        bench.twin(name)
        done: set[str] = set()
        for situation in situations:
            folder, spec, settings = _prepare(bench, name, situation)
            env = {POINT: spec} if spec else {}
            _, passed = forker.passages(Job(bench.paths[name], folder, settings, env, trace=bench.root / "trace"))
            shutil.rmtree(folder)
            # the rehearsal of a checkpoint is made of instants that runs are killed at in a real one
            points = [point for point in passed if point not in done and not point.startswith("dry.")]
            useful |= {situation} if points else set()
            done |= set(points)
            again = [point for point in points if point in reached]
            again = bench.random.sample(again, min(len(again), share(len(again)) if again else 0))
            points = [point for point in points if point not in reached] + again
            for point in bench.random.sample(points, min(only or len(points), len(points))):
                passage = bench.random.randint(1, passed[point])
                _kill_at(bench, name, situation, f"{point}:{passage}")
                figures.cases += 1
        reached |= done
    for situation in sorted({*situations} - useful):
        bench.fail(situation, "reaches no instant of its own; drop the situation")
    elsewhere = sorted({point.rpartition(".")[0] for point in in_source - reached})
    figures.wanted = figures.cases
    figures.reached = sorted(reached & in_source)
    figures.notes |= {
        "named instants in the source": len(in_source),
        "killed at here": len(figures.reached),
        "not passed here": elsewhere,
    }
    return figures


def _kill_at(bench: Bench, name: str, situation: str, point: str) -> None:
    folder, spec, settings = _prepare(bench, name, situation)
    label = f"{name}, {situation}, killed at {point}"
    both = ",".join(filter(None, [spec, point]))
    ended = bench.launch(name, folder, label, env={POINT: both}, settings=settings)
    if ended.status != -signal.SIGKILL:
        bench.fail(label, f"was not killed, but ended with {ended.status}: {ended.text[-600:]}")
        return
    bench.finish(name, folder, label)


def resume_kills(bench: Bench, names: list[str], count: int) -> Figures:
    """SIGKILL between the moment a resuming process takes the folder and its first new step."""
    figures = bench.begin("SIGKILL during a resume, before its first new step", count)
    where: Counter[str] = Counter()
    for index in range(3 * count):
        if figures.cases == count:
            break
        name = names[index % len(names)]
        bench.twin(name)
        folder = bench.folder()
        total = bench.passages[name]["train.optimizer.before"]
        stop = bench.random.randint(runs.SAVE_STEPS + 1, total)
        label = f"{name}, resume {index} after a kill in step {stop}"
        bench.launch(name, folder, label, env={POINT: f"train.optimizer.before:{stop}"})
        child = Running(Job(bench.paths[name], folder))
        # Where reading begins is seen in the shared page; the kill comes within what a resume takes from there.
        while not child.poll() and not child.read()[2].startswith(("train.resume", "run.lock")):
            time.sleep(0.0005)
        time.sleep(bench.random.uniform(0, 0.06))
        child.kill()
        ended = child.ended()
        late = ended.steps > 1  # the run was past what this is about; it must end with the same bits all the same
        figures.notes["kills"] = figures.notes.get("kills", 0) + (not late)
        figures.notes["kills that came later"] = figures.notes.get("kills that came later", 0) + late
        where[_stage(ended.at)] += not late
        for bad in runs.unloadable(folder):
            bench.fail(label, f"cannot be loaded: {bad}")
        bench.finish(name, folder, label)
        figures.cases += not late
    figures.notes["last instant passed before the kill"] = bench.stages(where)
    return figures


def signals(bench: Bench, names: list[str], count: int) -> Figures:
    """SIGTERM and SIGUSR1: at random instants, in every stage, and while a reward function is slow."""
    figures = bench.begin("SIGTERM and SIGUSR1", count)
    ends: Counter[str] = Counter()
    slowest = 0.0
    for index in range(count):
        name, word = names[index % len(names)], ("SIGTERM", "SIGUSR1")[index // 2 % 2]
        bench.twin(name)
        folder, online = bench.folder(), "train.sample.before" in bench.passages[name]
        if index % 5 < 2:  # somewhere
            slow = online and index % 4 == 0
            seconds = bench.random.uniform(0.1, bench.seconds[name] + (0.8 if slow else 0.0))
            label = f"{name}, {word} after {seconds:.3f} s{', slow rewards' if slow else ''}"
            env = {runs.FAULT: "slow:0"} if slow else {}
            ended = bench.launch(name, folder, label, stop_after=seconds, number=getattr(signal, word), env=env)
            took = ended.seconds - seconds
        else:
            stages = ["batch", "backward", "optimizer", "evaluate"] + (["sample", "reward"] if online else [])
            point = f"train.{stages[index // 5 % len(stages)]}.before"
            passage = bench.random.randint(1, bench.passages[name][point])
            label = f"{name}, {word} at {point}:{passage}"
            ended = bench.launch(name, folder, label, env={POINT: f"{point}:{passage}:signal:{word}"})
            took = 0.0  # when it came is not known
        figures.cases += 1
        kind = {INTERRUPTED: "saved and left with 75", 0: "had already finished"}.get(ended.status, "before the loop")
        ends[kind] += 1
        if ended.status == INTERRUPTED:
            slowest = max(slowest, took)
            if runs.newest(folder) != ended.steps:
                bench.fail(label, f"{ended.steps} steps were taken, the checkpoint is of step {runs.newest(folder)}")
            if left := runs.leftovers(folder):
                bench.fail(label, f"left behind: {left}")
        elif ended.status not in (0, -getattr(signal, word)) or (ended.status and ended.steps):
            bench.fail(label, f"ended with {ended.status} after {ended.steps} steps: {ended.text[-600:]}")
        bench.finish(name, folder, label)
    figures.notes |= {
        "ends": bench.stages(ends),
        "longest from signal to exit, s": round(slowest, 2),
    }
    return figures


def rank_kills(bench: Bench, name: str, count: int, *, title: str = "", alike: bool = True) -> Figures:
    """SIGKILL of one process of two (gloo); the other must leave by itself within 60 s and say why.

    Args:
        bench: of the campaign.
        name: of the run.
        count: cases; a kill that comes after the end is none.
        title: of the section.
        alike: whether both processes count alike; False: that they do not is checked, since the section is about it.
    """
    figures = bench.begin(title or "SIGKILL of one process of two (gloo)", count)
    digests = []
    seconds = 0.0
    for _ in range(2):
        folder = bench.folder()
        started = time.monotonic()
        ends = [child.ended() for child in _pair(bench, name, folder)]
        seconds = time.monotonic() - started
        if any(ended.status for ended in ends):
            bench.fail(f"{name} on two processes", f"does not run: {[ended.text[-800:] for ended in ends]}")
            return figures
        digests.append(runs.digest(folder))
        own = [checkpoint.load(folder / f"checkpoint-{runs.newest(folder)}", rank=rank).records for rank in range(2)]
        if not alike and own[0]["trainer"]["rollouts"] == own[1]["counters"]["rollouts"]:
            bench.fail(f"{name} on two processes", "both sampled as often: nothing here is of one process alone")
        shutil.rmtree(folder)
    if digests[0] != digests[1]:
        bench.fail(f"{name} on two processes", "two uninterrupted runs differ")
        return figures
    bench.expected[f"{name} x 2"] = digests[0]
    slowest, said = 0.0, 0
    for index in range(3 * count):
        if figures.cases == count:
            break
        folder, victim = bench.folder(), index % 2
        pair = _pair(bench, name, folder)
        # after they have met: before that, the one that is left waits for the other as long as at any start
        while not all(child.poll() or child.read()[1] > 4 for child in pair):
            time.sleep(0.002)
        instant = bench.random.uniform(0, 0.6 * seconds)
        time.sleep(instant)
        label = f"{name} on two processes, rank {victim} killed {instant:.2f} s after the meeting"
        pair[victim].kill()
        killed = time.monotonic()
        survivor, gone = pair[1 - victim].ended(timeout=120), pair[victim].ended()
        took = time.monotonic() - killed
        if gone.status != -signal.SIGKILL:
            _finish_pair(bench, name, folder, label)
            continue
        figures.cases += 1
        slowest = max(slowest, took)
        clear = "lost contact with another" in survivor.text
        said += clear
        if survivor.status != 0 and not clear:
            bench.fail(label, f"the other said: {survivor.text[-500:]}")
        if took > 60 or survivor.status == 124:
            bench.fail(label, f"the other took {took:.1f} s and ended with {survivor.status}")
        for bad in runs.unloadable(folder):
            bench.fail(label, f"cannot be loaded: {bad}")
        _finish_pair(bench, name, folder, label)
    figures.notes |= {"the other left within, s": round(slowest, 1), "with the message": said}
    return figures


def _finish_pair(bench: Bench, name: str, folder: Path, label: str) -> None:
    ends = [child.ended() for child in _pair(bench, name, folder)]
    if any(ended.status for ended in ends):
        bench.fail(label, f"the restart ended with {[(ended.status, ended.text[-500:]) for ended in ends]}")
        return
    bench.compare(f"{name} x 2", folder, label)


def _pair(bench: Bench, name: str, folder: Path) -> list[Running]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        Running(Job(bench.paths[name], folder, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(2)
    ]
