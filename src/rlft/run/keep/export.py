"""The trained model in files: beside a checkpoint, and in the run's folder at its end."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from torch import Tensor

from rlft._failpoint import instant
from rlft._files import disk_trouble, move, remove_tree, sync_dir, sync_file
from rlft.errors import TrainingError
from rlft.run.measure.journal import quiet_transformers
from rlft.run.step.parts import Parts

__all__ = ["Export"]


class Export:
    """Writes the trained adapters, or the whole model, with the tokenizer. It holds nothing of its own.

    Args:
        parts: of the run; the main process writes.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.run_dir, self.processes = parts.config, parts.run_dir, parts.processes
        self.policy, self.tokenizer, self.stages = parts.policy, parts.tokenizer, parts.stages

    def save_model(self, folder: Path) -> None:
        """The model into any folder. Collective where weights are spread over processes."""
        whole = self.whole_weights()
        if self.processes.is_main:
            self._write_files(folder, whole)

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The weights that are written, gathered where they are spread over processes; None where they are not. Collective."""
        return self.policy.whole_state(keep=self.processes.is_main) if self.processes.sharded else None

    def write(self, folder: Path, whole: dict[str, Tensor] | None) -> None:
        """The model by the main process alone: the others have given their part of ``whole`` before."""
        if whole is None:
            self.stages.save_model(folder)
        else:
            self._write_files(folder, whole)

    def _write_files(self, folder: Path, whole: dict[str, Tensor] | None) -> None:
        with instant("model.write"), quiet_transformers():
            folder.mkdir(parents=True, exist_ok=True)
            self.policy.save_pretrained(folder, **({} if whole is None else {"whole": whole}))
            self.tokenizer.save_pretrained(folder)

    def size(self) -> int:
        """About how many bytes the saved model has: adapters alone, or all weights."""
        weights = self.policy.hf_model.parameters()
        return sum(p.numel() * p.element_size() for p in weights if p.requires_grad or not self.config.use_peft)

    def finish(self, *, again: bool = True) -> None:
        """Leave the trained model in ``<run>/model`` and the report beside it.

        The model is written apart and renamed, so that it is whole or not there.

        Args:
            again: False writes only what is not there.

        Raises:
            TrainingError: when the disk refuses; nothing half-written is left.
        """
        whole = self.whole_weights()
        if not self.processes.is_main:
            return
        run_dir, step = self.run_dir, self.processes.progress.step
        final, fresh, old = (run_dir / name for name in ("model", ".tmp-model", ".old-model"))
        try:
            for left in (fresh, old):
                if left.exists():
                    remove_tree("export.stale", left)
            if again or not _same_files(run_dir / f"checkpoint-{step}" / "model", final):
                with instant("export.write"):
                    self.write(fresh, whole)
                for path in sorted(fresh.rglob("*")):
                    sync_file("export.file.sync", path)
                if final.exists():
                    move("export.aside", final, old)
                move("export.rename", fresh, final)
                sync_dir("export.sync", run_dir)
                if old.exists():
                    remove_tree("export.old", old)
        except Exception as error:
            with instant("export.discard"):
                shutil.rmtree(fresh, ignore_errors=True)
            raise TrainingError(
                f"the trained model was not written to {final}: {disk_trouble(error, run_dir, self.size()) or error}; the "
                f"checkpoint of step {step} holds it: the same command writes it again"
            ) from error
        report = run_dir / "report.html"
        if self.config.report and (again or not report.exists()):
            self._write_report(report, final)

    def _write_report(self, report: Path, final: Path) -> None:
        from rlft.report import write_report

        try:
            write_report(self.run_dir, report)
        except OSError as error:
            raise TrainingError(
                f"the report was not written to {report}: {disk_trouble(error, self.run_dir, 2**20) or error}; the model is "
                f"in {final}: the same command, or `rlft report {self.run_dir}`, writes the report again"
            ) from error


def _same_files(one: Path, two: Path) -> bool:
    """Whether two folders hold the same bytes under the same names."""
    first, second = (
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} for folder in (one, two)
    )
    return first.keys() == second.keys() and all(filecmp.cmp(first[n], second[n], shallow=False) for n in first)
