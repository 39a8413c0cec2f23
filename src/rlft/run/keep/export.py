"""The trained model in files: beside a checkpoint, and in the run's folder at its end."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rlft._failpoint import instant
from rlft._files import disk_trouble, move, remove_tree, sync_dir, sync_file
from rlft.errors import TrainingError
from rlft.run import display
from rlft.run.step import update as guard

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["export", "exported_bytes", "save_model", "whole_weights", "write_model"]


def save_model(trainer: Trainer, folder: str | Path) -> None:
    """The trained adapters, or the whole model, with the tokenizer. Collective where weights are spread over processes."""
    whole = whole_weights(trainer)
    if trainer.is_main:
        _files_of_model(trainer, Path(folder), whole)


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights that are written, gathered where they are spread over processes; None where they are not. Collective."""
    return trainer.policy.whole_state(keep=trainer.is_main) if guard.sharded(trainer) else None


def write_model(trainer: Trainer, folder: Path, whole: dict[str, Tensor] | None) -> None:
    """The model by the main process alone: the others have given their part of ``whole`` before."""
    if whole is None:
        trainer.save_model(folder)
    else:
        _files_of_model(trainer, folder, whole)


def _files_of_model(trainer: Trainer, folder: Path, whole: dict[str, Tensor] | None) -> None:
    with instant("model.write"), display.quiet_transformers():
        folder.mkdir(parents=True, exist_ok=True)
        trainer.policy.save_pretrained(folder, **({} if whole is None else {"whole": whole}))
        trainer.tokenizer.save_pretrained(folder)


def export(trainer: Trainer, *, again: bool = True) -> None:
    """Leave the trained model in ``<run>/model`` and the report beside it.

    The model is written apart and renamed, so that it is whole or not there.

    Args:
        trainer: a finished run.
        again: False writes only what is not there.

    Raises:
        TrainingError: when the disk refuses; nothing half-written is left.
    """
    whole = whole_weights(trainer)
    if not trainer.is_main:
        return
    final, fresh, old = (trainer.run_dir / name for name in ("model", ".tmp-model", ".old-model"))
    try:
        for left in (fresh, old):
            if left.exists():
                remove_tree("export.stale", left)
        if again or not _same_files(trainer.run_dir / f"checkpoint-{trainer.step}" / "model", final):
            with instant("export.write"):
                write_model(trainer, fresh, whole)
            for path in sorted(fresh.rglob("*")):
                sync_file("export.file.sync", path)
            if final.exists():
                move("export.aside", final, old)
            move("export.rename", fresh, final)
            sync_dir("export.sync", trainer.run_dir)
            if old.exists():
                remove_tree("export.old", old)
    except Exception as error:
        with instant("export.discard"):
            shutil.rmtree(fresh, ignore_errors=True)
        needed = exported_bytes(trainer)
        raise TrainingError(
            f"the trained model was not written to {final}: {disk_trouble(error, trainer.run_dir, needed) or error}; the "
            f"checkpoint of step {trainer.step} holds it: the same command writes it again"
        ) from error
    report = trainer.run_dir / "report.html"
    if trainer.config.report and (again or not report.exists()):
        from rlft.report import write_report

        try:
            write_report(trainer.run_dir, report)
        except OSError as error:
            raise TrainingError(
                f"the report was not written to {report}: {disk_trouble(error, trainer.run_dir, 2**20) or error}; the model is "
                f"in {final}: the same command, or `rlft report {trainer.run_dir}`, writes the report again"
            ) from error


def _same_files(one: Path, two: Path) -> bool:
    """Whether two folders hold the same bytes under the same names."""
    first, second = (
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} for folder in (one, two)
    )
    return first.keys() == second.keys() and all(filecmp.cmp(first[n], second[n], shallow=False) for n in first)


def exported_bytes(trainer: Trainer) -> int:
    """About how large the saved model is: adapters alone, or all weights."""
    weights = trainer.policy.hf_model.parameters()
    return sum(p.numel() * p.element_size() for p in weights if p.requires_grad or not trainer.config.use_peft)
