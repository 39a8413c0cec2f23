"""``make fuzz``: 10,000 cases of everything, and the table of docs/reliability.md.

python -m tests.fuzz                       # all of it
python -m tests.fuzz losses --share 0.1    # a tenth of one part
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz figures: written by make fuzz -->", "<!-- end of fuzz figures -->"
#: How the 10,000 mutated files are shared out.
FILES = {"safetensors": 2500, "manifests": 2500, "adapters": 1200, "models": 500, "data": 3000, "logs": 300}

Row = tuple[str, str, str]


def of_losses(share: float) -> list[Row]:
    """Every loss against its oracle."""
    from rlft import losses
    from tests.fuzz.losses import series

    count, found = int(10_000 * share), []
    for name in losses.__all__:
        found.append(series(name, count))
        print(name, found[-1].worst, flush=True)
    worst = {key: max(f.worst[key] for f in found) for key in found[0].worst}
    total = {key: sum(getattr(f, key) for f in found) for key in ("cases", "gradients", "refused", "corners", "narrow")}
    return [
        (
            f"Losses against a float64 oracle, {len(found)} losses",
            f"{count:,} cases each, {total['gradients']:,} gradients, {total['refused']:,} refusals",
            f"largest relative error {worst['value']:.1e}, of gradients {worst['gradient']:.1e}",
        ),
        (
            "The same in float32",
            f"{total['narrow']:,} of those cases",
            f"largest relative error {worst['value32']:.1e}, of gradients {worst['gradient32']:.1e}",
        ),
    ]


def _row(what: str, tally: object) -> Row:
    from tests.fuzz.bounds import Tally

    assert isinstance(tally, Tally)
    tally.check()
    refused = sum(tally.refused.values())
    print(what, tally.cases, tally.refused, flush=True)
    return (
        what,
        f"{tally.cases:,} cases, {refused:,} refused, {tally.accepted:,} still sound",
        f"no other error; slowest {tally.slowest:.2f} s, most memory {tally.grown / 2**20:.0f} MiB",
    )


def of_configs(share: float) -> list[Row]:
    """Mutated settings, loaded and given to the command."""
    from tests.fuzz import configs

    printed = io.StringIO()

    def said() -> str:
        text = printed.getvalue()
        printed.seek(0)
        printed.truncate()
        return text

    with tempfile.TemporaryDirectory() as folder:
        loaded = configs.series(int(10_000 * share), Path(folder))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run = configs.commands(int(2_000 * share), Path(folder), said)
    return [_row("Mutated configurations, loaded", loaded), _row("Mutated settings, `rlft train --dry-run`", run)]


def of_files(share: float) -> list[Row]:
    """Mutated files of every kind."""
    from tests.fuzz import files

    rows = []
    for kind, count in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(f"Mutated files: {kind}", files.SERIES[kind](int(count * share), Path(folder))))
    return rows


PARTS = {"losses": of_losses, "configs": of_configs, "files": of_files}


def write(rows: list[Row]) -> None:
    """Put the table where the page has room for it."""
    table = ["| Input | Cases | Found |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN)
        PAGE.write_text(head + "\n".join([BEGIN, *table, END]) + rest.split(END)[1], encoding="utf-8")
    print("\n".join(table))


def main(argv: list[str]) -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases to run")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    for name in args.parts or PARTS:
        start = time.process_time()
        rows += PARTS[name](args.share)
        print(f"{name}: {time.process_time() - start:.0f} s of processor time", flush=True)
    if args.share == 1.0 and not args.parts:
        write(rows)
    else:
        print("\n".join(" | ".join(row) for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
