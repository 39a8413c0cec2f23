"""``make mutants``: is every line of the mathematics held by a test?

Each mutant is one small fault in a loss, an advantage, a KL or an averaging. A mutant that no test sees is a hole in the
tests, unless it means the same as the original; those are listed, with the reason, in ``equivalent.toml``.

Writes ``results.jsonl`` (one line per mutant as it is judged; a run goes on from what still holds there), ``report.json`` and
``report.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.mutation import mutators, warm

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
TARGETS = ["src/rlft/losses/*.py", "src/rlft/advantages.py", "src/rlft/kl.py", "src/rlft/reduce.py"]
TESTS = [
    "tests/losses",
    "tests/test_advantages.py",
    "tests/test_kl.py",
    "tests/test_reduce.py",
    "tests/test_types.py",
    "tests/test_objective.py",
    "tests/test_public_api.py::test_the_public_names_stay",
]
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
GOAL = 0.95
#: Tests tried on one mutant. What is called by more than these is called by the same tests with other losses.
MOST = 600
#: Marks and defaults of a loss are read by tests that need not call it.
READ = ("decorator_list", "defaults", "kw_defaults")
READERS = (
    "tests/test_public_api.py",
    "tests/losses/test_marks.py",
    "tests/losses/test_contract.py::test_signature",
    "tests/test_kl.py::test_controllers_share_one_interface",
)
#: What runs while modules are imported: the modules that call it run again under its mutants.
AT_IMPORT = {"src/rlft/losses/_base.py::loss_function": "src/rlft/losses/*.py"}


def target_files() -> list[str]:
    """The files under test, relative to the repository."""
    found = {path.relative_to(ROOT).as_posix() for pattern in TARGETS for path in ROOT.glob(pattern)}
    return sorted(found - {"src/rlft/losses/__init__.py"})


def equivalents() -> dict[str, str]:
    """``file::key`` -> why no test can see it."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", [])
    return {f"{e['file']}::{e['function']}: {e['before']}  ->  {e['after']}": e["reason"] for e in entries}


def digest(*paths: Path) -> str:
    """Of the contents of files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def everything() -> list[Path]:
    """All that the verdict on a survivor depends on: sources and tests."""
    folders = [SOURCE / "rlft" / "losses", ROOT / "tests" / "losses"]
    files = {p for folder in folders for p in folder.rglob("*.py")} | {
        ROOT / t.split("::")[0] for t in TESTS if ".py" in t
    }
    return sorted(files | set((SOURCE / "rlft").glob("*.py")))


class Run:
    """A pytest plugin that, in place of the tests, runs the mutants."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output
        self.results: list[dict[str, Any]] = []
        self.partial = bool(options.only or options.sample)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """All of it; the session's own tests run in children alone."""
        started = time.monotonic()
        tests = warm.Tests(session)
        names = {str(ROOT / file): file for file in target_files()}
        todo = self.chosen()
        self.output.mkdir(parents=True, exist_ok=True)
        trace = self.traced(tests, names)
        done = self.earlier()
        known: dict[str, str] = {"": digest(*everything())}
        kills: dict[str, Counter[int]] = defaultdict(Counter)
        index_of = {name: i for i, name in enumerate(tests.names)}
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as log:
            for number, (file, mutant) in enumerate(todo, 1):
                key = f"{file}::{mutant.key}"
                scope = f"{file}::{mutant.function}"
                result = done.get(key)
                if result is None:
                    order = self.ordered(tests, trace, scope, [kills[scope], kills[file], kills[""]])
                    result = self.judge(tests, file, mutant, order, trace)
                    result["stamp"] = self.stamp(key, result["by"], known) if result["how"] else known[""]
                    log.write(json.dumps(result) + "\n")
                    log.flush()
                self.results.append(result)
                if result["by"] in index_of:
                    for counter in (kills[scope], kills[file], kills[""]):
                        counter[index_of[result["by"]]] += 1
                if not result["how"]:
                    say(f"  {'equivalent' if key in equivalents() else 'SURVIVED'}: {file}:{mutant.line} {mutant.key}")
                if number % 50 == 0 or number == len(todo):
                    lived = sum(not r["how"] for r in self.results)
                    spent = time.monotonic() - started
                    say(f"{number}/{len(todo)} in {spent:.0f} s, {lived} not killed, at {file}")
        return True

    def traced(self, tests: warm.Tests, names: dict[str, str]) -> warm.Trace:
        """Which tests call what; kept on disk while sources and tests are the same."""
        kept, now = self.output / "trace.json", digest(*everything()) + str(len(tests.names))
        if kept.exists() and (data := json.loads(kept.read_text(encoding="utf-8")))["of"] == now:
            return warm.Trace({k: set(v) for k, v in data["callers"].items()}, data["seconds"])
        trace = tests.trace(names)
        say(f"{len(tests.items)} tests pass unmutated, {sum(trace.seconds):.0f} s of CPU")
        callers = {name: sorted(found) for name, found in trace.callers.items()}
        kept.write_text(json.dumps({"of": now, "callers": callers, "seconds": trace.seconds}), encoding="utf-8")
        return trace

    def ordered(self, tests: warm.Tests, trace: warm.Trace, scope: str, kills: list[Counter[int]]) -> list[int]:
        """What has killed neighbours first, then one test of each kind, then a second of each ..."""
        concerned = self.concerned(scope, trace, len(tests.items))
        kind: Counter[str] = Counter()
        turn = {}
        for i in concerned:
            name = tests.names[i].split("[")[0]
            turn[i] = kind[name]
            kind[name] += 1
        of_function, of_file, of_all = kills
        key = {i: (-of_function[i], -of_file[i], trace.seconds[i] > 0.3, turn[i], -of_all[i], i) for i in concerned}
        return sorted(concerned, key=key.__getitem__)[:MOST]

    def concerned(self, scope: str, trace: warm.Trace, count: int) -> list[int]:
        """The tests that call a function; for what runs at import, and for a loss's marks, all of them."""
        function = scope.split("::")[1]
        if function == mutators.MODULE or scope in AT_IMPORT:
            return list(range(count))
        found = {i for name, tests in trace.callers.items() if name == scope for i in tests}
        return sorted(found) or list(range(count))

    def judge(
        self, tests: warm.Tests, file: str, mutant: mutators.Mutant, order: list[int], trace: warm.Trace
    ) -> dict[str, Any]:
        """The verdict as a line of results.jsonl."""
        scope = f"{file}::{mutant.function}"
        if any(field in READ for field, _ in mutant.path):
            known = set(order)
            readers = [i for i, name in enumerate(tests.names) if name.startswith(READERS) and i not in known]
            order = readers + order
        pattern = AT_IMPORT.get(scope)
        dependents = [module_of(p.relative_to(ROOT).as_posix()) for p in sorted(ROOT.glob(pattern))] if pattern else []
        dependents = [name for name in dependents if name not in ("rlft.losses", module_of(file))]
        limit = 15 + 3 * sum(trace.seconds[i] for i in order)
        outcome = tests.judge(ROOT / file, module_of(file), mutant, order, dependents, limit)
        return {
            "key": f"{file}::{mutant.key}",
            "operator": mutant.operator,
            "line": mutant.line,
            "by": outcome.killed_by,
            "how": outcome.how,
            "tests": outcome.tests,
            "seconds": round(outcome.seconds, 3),
        }

    def chosen(self) -> list[tuple[str, mutators.Mutant]]:
        """The mutants to judge, in the order of files and lines."""
        files = [f for f in target_files() if not self.options.only or any(o in f for o in self.options.only)]
        found = [(f, m) for f in files for m in mutators.mutants((ROOT / f).read_text(encoding="utf-8"))]
        if self.options.sample:
            picked = random.Random(self.options.seed).sample(range(len(found)), min(self.options.sample, len(found)))
            found = [found[i] for i in sorted(picked)]
        return found

    def earlier(self) -> dict[str, dict[str, Any]]:
        """Verdicts of the last run that still hold.

        A kill holds while the mutated file and the file of the test that killed are what they were; a survivor has to
        face every new test.
        """
        log = self.output / "results.jsonl"
        if self.options.fresh or not log.exists():
            log.unlink(missing_ok=True)
            return {}
        known: dict[str, str] = {}
        done = {}
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the run was interrupted
            if self.holds(result, known):
                done[result["key"]] = result
        log.write_text("".join(json.dumps(result) + "\n" for result in done.values()), encoding="utf-8")
        say(f"{len(done)} verdicts of the last run still hold; --fresh forgets them")
        return done

    def stamp(self, key: str, by: str, known: dict[str, str]) -> str:
        """What a verdict depends on."""
        files = [key.split("::")[0], *([by.split("::")[0]] if "::" in by else [])]
        for file in files:
            if file not in known:
                path = ROOT / file
                known[file] = digest(path) if path.exists() else "gone"
        return " ".join(known[file] for file in files)

    def holds(self, result: dict[str, Any], known: dict[str, str]) -> bool:
        if not result["how"]:
            known.setdefault("", digest(*everything()))
            return result["stamp"] == known[""]
        return result["stamp"] == self.stamp(result["key"], result["by"], known)

    def report(self) -> int:
        """Write the report; the exit status is 1 below the goal, or where the list of equivalents is wrong."""
        known = equivalents()
        survived = [r["key"] for r in self.results if not r["how"]]
        equivalent = [key for key in survived if key in known]
        unseen = [key for key in survived if key not in known]
        wrong = [key for key in known if key in {r["key"] for r in self.results} and key not in survived]
        if not self.partial:
            wrong += [key for key in known if key not in {r["key"] for r in self.results}]
        total, killed = len(self.results), len(self.results) - len(survived)
        rate = killed / max(total - len(equivalent), 1)
        rows = []
        for file in sorted({r["key"].split("::")[0] for r in self.results}):
            here = [r for r in self.results if r["key"].startswith(file + "::")]
            dead = sum(bool(r["how"]) for r in here)
            same = sum(key.startswith(file + "::") for key in equivalent)
            rows.append((file, len(here), dead, len(here) - dead - same, same))
        how = Counter(
            r["how"] if r["how"] in ("import", "timeout or crash") else "test" for r in self.results if r["how"]
        )
        asserted = sum(r["how"] in ("AssertionError", "assert", "Failed") for r in self.results)
        lines = [f"{'file':44}{'mutants':>9}{'killed':>9}{'survived':>10}{'equivalent':>12}"]
        lines += [f"{f:44}{n:>9}{d:>9}{s:>10}{e:>12}" for f, n, d, s, e in rows]
        lines += [
            f"{'all':44}{total:>9}{killed:>9}{len(unseen):>10}{len(equivalent):>12}",
            "",
            f"killed {killed / max(total, 1):.2%} of all, {rate:.2%} without the equivalent ones",
            f"by how: {dict(how)}; {asserted} by an assertion, the others by an error that the fault raised",
        ]
        lines += ["", "survived:", *unseen] if unseen else []
        lines += ["", "listed as equivalent, but killed or gone:", *wrong] if wrong else []
        text = "\n".join(lines) + "\n"
        data = {
            "mutants": total, "killed": killed, "survived": unseen, "equivalent": equivalent, "wrong": wrong,
            "killed_share": killed / max(total, 1), "killed_share_without_equivalent": rate,
            "files": [dict(zip(("file", "mutants", "killed", "survived", "equivalent"), r, strict=True)) for r in rows],
            "mutants_by_operator": Counter(r["operator"] for r in self.results),
        }  # fmt: skip
        name = "report-part" if self.partial else "report"
        (self.output / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (self.output / f"{name}.txt").write_text(text, encoding="utf-8")
        say(text)
        return int(rate < GOAL or bool(wrong) or not total)


def module_of(file: str) -> str:
    """The import name of a file under src."""
    return Path(file).relative_to("src").with_suffix("").as_posix().replace("/", ".")


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", action="append", help="part of a file's path; may be given again")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--fresh", action="store_true", help="judge every mutant again")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mutants")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    run = Run(options)
    settings = [
        "-q",
        "-s",
        "--tb=native",
        "--assert=plain",
        "--no-header",
        "--no-summary",
        "-p",
        "no:cacheprovider",
        "--ignore",
        "tests/losses/test_imports.py",
    ]
    status = pytest.main([*settings, "-o", "timeout=0", *TESTS], plugins=[run])
    if status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED) or not run.results:
        say(f"pytest ended with {status!r}")
        return 2
    return run.report()


if __name__ == "__main__":
    sys.exit(main())
