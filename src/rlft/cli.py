"""``rlft``: train, demo, objectives, report, doctor. Errors are one line; a traceback only with ``--traceback``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: Exit codes: 0 finished, 1 failed while running, 2 refused before running, 75 interrupted and saved (EX_TEMPFAIL).
FAILED, REFUSED, INTERRUPTED = 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``rlft`` command. Returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback:
            _show_traceback()
        return _explain(error)


def _show_traceback() -> None:
    import traceback

    from rlft._redact import redact

    print(redact(traceback.format_exc()), file=sys.stderr)


def _explain(error: Exception) -> int:
    from rlft._redact import redact
    from rlft.errors import Interrupted, TrainingError

    print(f"rlft: {redact(str(error))}", file=sys.stderr)
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, (ValueError, ImportError)) and not isinstance(error, TrainingError):
        return REFUSED  # an extra that is not installed says how to get it
    if not type(error).__module__.startswith("rlft"):
        print(f"({type(error).__name__}; --traceback shows where)", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser = argparse.ArgumentParser(prog="rlft", description="RL fine-tuning of language models.", parents=[common])
    parser.set_defaults(traceback=False)
    from rlft._version import __version__

    parser.add_argument("--version", action="version", version=f"rlft {__version__}")
    commands = parser.add_subparsers(title="commands")

    train = commands.add_parser("train", parents=[common], help="run a configuration", description=_TRAIN)
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("settings", nargs="*", help="key=value, overriding the file")
    train.add_argument("--fields", action="store_true", help="list every setting and stop")
    train.add_argument("--dry-run", action="store_true", help="check, show the table of the run, and stop")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", parents=[common], help="train a tiny model by RL, with a report at the end")
    demo.add_argument("--output", default="runs/demo", help="folder of the report (default: runs/demo)")
    demo.add_argument("--seeds", type=int, default=3, help="seeds per algorithm (default: 3)")
    demo.add_argument("--steps", type=int, default=None, help="RL steps (default: the demo's own)")
    demo.add_argument("--workers", type=int, default=None, help="runs at a time (default: one per core, at most 6)")
    demo.set_defaults(run=_demo)

    objectives = commands.add_parser("objectives", parents=[common], help="every objective, from the code itself")
    objectives.add_argument("name", nargs="?", help="show one in full")
    objectives.add_argument("--markdown", action="store_true", help="as a Markdown table")
    objectives.set_defaults(run=_objectives)

    report = commands.add_parser("report", parents=[common], help="curves and tables of one run or several")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--output", default=None, help="HTML file (default: report.html in the first folder)")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", parents=[common], help="what is in a run folder, and can it be resumed")
    doctor.add_argument("folder")
    doctor.set_defaults(run=_doctor)
    return parser


_TRAIN = "Run a configuration. Settings after the file override it: rlft train dpo.yaml beta=0.05 max_steps=100"


def _train(args: argparse.Namespace) -> int:
    from rlft.config import load_config

    if args.fields:
        _print_fields()
        return 0
    path, settings = args.config, list(args.settings)
    if path is not None and "=" in path:
        path, settings = None, [path, *settings]
    config = load_config(path, settings)
    from rlft.trainer import Trainer

    trainer = Trainer(args=config)
    if args.dry_run:
        trainer.show()
        return 0
    trainer.train()
    return 0


def _print_fields() -> None:
    from rich.console import Console
    from rich.table import Table

    from rlft.config import Config

    console, defaults = Console(highlight=False), Config()
    for group, fields in Config.groups().items():
        table = Table(title=group, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for field in fields:
            table.add_row(f"[cyan]{field.name}[/]", repr(getattr(defaults, field.name)), field.metadata["doc"])
        console.print(table)


def _demo(args: argparse.Namespace) -> int:
    from rlft import demo

    for name in ("seeds", "steps", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1; change it, or leave it out")
    return demo.main(args.output, seeds=args.seeds, steps=args.steps, workers=args.workers)


def _objectives(args: argparse.Namespace) -> int:
    from rlft import catalogue

    if args.name:
        print(catalogue.detail(args.name))
    elif args.markdown:
        print(catalogue.markdown())
    else:
        catalogue.show()
    return 0


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rlft.report import write_report

    output = Path(args.output) if args.output else Path(args.runs[0]) / "report.html"
    print(write_report([Path(run) for run in args.runs], output))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from rlft import doctor

    return doctor.main(args.folder)


if __name__ == "__main__":
    sys.exit(main())
