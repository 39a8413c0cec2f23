"""``rlft doctor RUN_DIR``: what a run folder holds, and whether it can be resumed."""

from __future__ import annotations

from pathlib import Path

from rlft import checkpoint

__all__ = ["main"]


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

    console = Console(highlight=False)
    found = checkpoint.inspect(run_dir)
    table = Table(title=str(run_dir), title_justify="left", box=box.ROUNDED)
    for head in ("step", "state", "size", "written", "processes"):
        table.add_column(head)
    for info in found:
        state = "[green]sound[/]" + (", best" if info.best else "") if info.ok else f"[red]{info.problem}[/]"
        table.add_row(str(info.step), state, f"{info.bytes / 2**20:.1f} MiB", info.created, str(info.world_size or "-"))
    if found:
        console.print(table)
    log = run_dir / "metrics.jsonl"
    if log.exists():
        from rlft.metrics import read_metrics

        rows = read_metrics(log)
        console.print(f"metrics.jsonl: {len(rows)} lines" + (f", last step {rows[-1].get('step')}" if rows else ""))
    sound = [info for info in found if info.ok]
    if sound:
        console.print(f"the same command continues from step {max(info.step for info in sound)}")
        return 0
    console.print(
        "no sound checkpoint: the same command starts from the beginning"
        if not found
        else "no checkpoint verifies; move the folder away to start again"
    )
    return 1
