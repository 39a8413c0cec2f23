"""Callbacks of a run: functions of rlft and ``transformers.TrainerCallback`` objects, and what they ask for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rlft.config import ConfigError
from rlft.run.step.parts import Parts
from rlft.run.step.watchers import Watcher

__all__ = ["Arguments", "CallbackHandler", "Control", "is_of_transformers"]

logger = logging.getLogger("rlft")

#: Events that functions are called for.
FUNCTION_EVENTS = ("step", "evaluate", "save", "end")
#: Event -> method of a ``TrainerCallback``, and the name under which it wants the values.
_METHODS = {
    "init": ("on_init_end", None),
    "begin": ("on_train_begin", None),
    "epoch_begin": ("on_epoch_begin", None),
    "epoch_end": ("on_epoch_end", None),
    "step_begin": ("on_step_begin", None),
    "before_update": ("on_pre_optimizer_step", None),
    "after_update": ("on_optimizer_step", None),
    "step_end": ("on_step_end", None),
    "log": ("on_log", "logs"),
    "evaluate": ("on_evaluate", "metrics"),
    "save": ("on_save", None),
    "end": ("on_train_end", None),
}


@dataclass
class Control:
    """What callbacks ask of the loop; the names are those of ``transformers.TrainerControl``.

    Attributes:
        should_training_stop: end the run in good order after this step: evaluated, saved, exported.
        should_save: write a checkpoint after this step.
        should_evaluate: evaluate after this step.
        should_log: write a row of metrics for this step.
        should_epoch_stop: not heeded: a run has steps, and no loop over epochs that could be cut short.
    """

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    should_epoch_stop: bool = False

    def set(self, wishes: Iterable[bool]) -> None:
        """Take in what was wished for, one value per field."""
        for wish, value in zip(fields(self), wishes, strict=True):
            setattr(self, wish.name, value)


class Arguments:
    """The settings of a run under the names that callbacks of transformers read.

    Args:
        parts: of the run.
    """

    load_best_model_at_end = False
    logging_strategy = "steps"
    logging_first_step = False
    eval_delay = 0

    def __init__(self, parts: Parts) -> None:
        self._config = config = parts.config
        self.max_steps, self.device = parts.sizes.total_steps, parts.processes.device
        self.world_size, self.process_index = parts.processes.world_size, parts.processes.rank
        self.eval_strategy = "steps" if config.eval_steps else "no"
        self.save_strategy = "steps" if config.save_steps else "no"
        metric, greater = config.metric_for_best_model, config.greater_is_better
        self.greater_is_better = not (metric or "").endswith("loss") if greater is None else greater

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(self._config, name):
            raise AttributeError(f"a callback reads args.{name}, and a run of rlft has no such setting")
        return getattr(self._config, name)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return self._config.to_dict()


def is_of_transformers(callback: Any) -> bool:
    """Whether this is a ``TrainerCallback``, or a class of such."""
    return hasattr(callback, "on_train_begin") and hasattr(callback, "on_step_end")


class CallbackHandler(Watcher):
    """Calls the callbacks of a run in order, on every process, and owns what they asked for.

    Args:
        trainer: whose ``callbacks`` they are: functions ``(event, trainer, values)``, and ``TrainerCallback`` objects.
        parts: of the run.
    """

    def __init__(self, trainer: Any, parts: Parts) -> None:
        self.trainer, self.parts = trainer, parts
        self.processes, self.progress = parts.processes, parts.processes.progress
        self.control, self.args = Control(), Arguments(parts)

    @property
    def listed(self) -> list[Any]:
        """The callbacks of now: a script may add some."""
        return self.trainer.callbacks

    @property
    def sees_updates(self) -> bool:
        """Whether any callback is called around the optimizer's update."""
        return any(is_of_transformers(one) for one in self.listed)

    def call(self, event: str, values: Mapping[str, Any]) -> None:
        """Call all that want an event."""
        for one in self.listed:
            self._call_one(one, event, values)

    def _call_one(self, one: Any, event: str, values: Mapping[str, Any]) -> None:
        if is_of_transformers(one):
            if event in _METHODS:
                self._call_method(one, event, values)
        elif event in FUNCTION_EVENTS:
            one(event, self.trainer, values)

    def _call_method(self, one: Any, event: str, values: Mapping[str, Any]) -> None:
        method, name = _METHODS[event]
        answer = getattr(one, method)(
            self.args,
            self.progress,
            self.control,
            model=self.parts.model,
            processing_class=self.parts.tokenizer,
            optimizer=self.parts.optimizer,
            lr_scheduler=None,
            train_dataloader=None,
            eval_dataloader=None,
            **({} if name is None else {name: dict(values)}),
        )
        if answer is not None and answer is not self.control:  # a control of its own
            self.control.set(bool(getattr(answer, wish.name)) for wish in fields(Control))

    def step_begins(self) -> None:
        """Forget what was asked for the last step, and say that the next one begins."""
        if not self.listed:
            return
        self.control.set([self.control.should_training_stop, False, False, False, False])
        per_epoch, step = self.progress.steps_per_epoch, self.progress.step
        if per_epoch and step % per_epoch == 0:
            self.call("epoch_begin", {})
        self.call("step_begin", {})

    def step_ended(self, values: Mapping[str, float]) -> None:
        """Say so, with the step's metrics; and where it was the last of an epoch."""
        if not self.listed:
            return
        self.call("step_end", {})
        self.call("step", values)
        per_epoch = self.progress.steps_per_epoch
        if per_epoch and self.progress.step % per_epoch == 0:
            self.call("epoch_end", {})

    def before_update(self, loss: float) -> None:
        self.call("before_update", {})

    def after_update(self, *, moved: bool) -> Mapping[str, float]:
        self.call("after_update", {})
        return {}

    def saved(self, folder: Path, stopping: bool) -> None:
        """A checkpoint was written. While a run stops for a reason of its own, a callback that raises must not replace it."""
        for one in self.listed:
            try:
                self._call_one(one, "save", {"path": str(folder)})
            except Exception as error:
                if not stopping:
                    raise
                logger.warning(
                    f"a callback raised {type(error).__name__}: {error} at 'save'; the run was saved and stops"
                )

    def evaluated(self, values: Mapping[str, float]) -> bool:
        """Held-out data were measured. Callbacks compare with the best before; then the best is noted.

        Returns:
            Whether ``metric_for_best_model`` is better than ever.
        """
        self.call("evaluate", values)
        metric = self.args.metric_for_best_model
        if metric is None:
            return False
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        if name not in values:
            close = ", ".join(sorted(values)[:12])
            self.parts.journal.warn_once(
                "best metric",
                f"metric_for_best_model={metric!r} is not measured, so no step is the best; there are: {close}",
            )
        return self.progress.better(values, name, greater=self.args.greater_is_better)

    # -- requests -------------------------------------------------------------------------------------------------------------
    def asked(self) -> Control:
        """What was asked for on any process, so that all do the same. Collective where there are callbacks."""
        if self.listed and self.processes.world_size > 1:
            own = torch.tensor([float(wish) for wish in astuple(self.control)])
            self.control.set(bool(count) for count in self.processes.sum(own).tolist())
        if self.control.should_epoch_stop:
            self.parts.journal.warn_once(
                "epoch stop",
                "a callback asked to end the epoch (should_epoch_stop), which is not heeded; should_training_stop ends the run",
            )
        return self.control

    def state_dict(self) -> dict[str, Any]:
        """The state of every callback that has one: ``state_dict()``, or ``state()`` as transformers' have it.

        Raises:
            ConfigError: for a state that is not made of plain values, which a checkpoint could not hold.
        """
        found = {}
        for name, one in self._named():
            state = one.state_dict() if hasattr(one, "state_dict") else _exported(one)
            if state is not None:
                found[name] = state
        try:
            return json.loads(json.dumps(found)) if found else found
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the state of the callbacks {', '.join(found)} must be made of numbers, texts, lists and mappings, which a "
                f"checkpoint can hold: {error}"
            ) from error

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back; a callback that is not among them begins anew."""
        for name, one in self._named():
            if name not in values:
                continue
            if hasattr(one, "load_state_dict"):
                one.load_state_dict(values[name])
            else:
                for attribute, value in values[name].items():
                    setattr(one, attribute, value)

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Each callback under its kind and its place among those of one kind."""
        seen: dict[str, int] = {}
        for one in self.listed:
            kind = getattr(one, "__name__", type(one).__name__)
            seen[kind] = seen.get(kind, -1) + 1
            yield f"{kind}/{seen[kind]}", one


def _exported(callback: Any) -> dict[str, Any] | None:
    """What changes in a callback of transformers; None where it keeps nothing."""
    if not is_of_transformers(callback) or not callable(getattr(callback, "state", None)):
        return None
    return callback.state()["attributes"]
