"""What a run is made of beyond its settings: recorded in every checkpoint, and in the files of its folder.

Settings name things; they do not hold them. A column that a reward reads, an objective or an adapter given as an object, the
weights under an adapter and those of a reference or a reward model can all change while every setting stays as it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlft._files import disk_trouble, replace_file
from rlft._redact import redact
from rlft._words import one_line
from rlft.errors import TrainingError
from rlft.metrics import MetricsLog, read_metrics
from rlft.models.tensor_hashes import sampled_hash
from rlft.objective import Objective
from rlft.run.step.parts import Parts

__all__ = ["RunFiles", "columns", "data_facts", "made_of", "versions", "weights"]

#: Entries of a model's config that say where it came from or how it is run.
_NO_PART = {
    "_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype", "id2label", "label2id",
}  # fmt: skip
#: The same of an adapter's.
_NO_PART_OF_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
_PACKAGES = ("transformers", "peft", "accelerate")


def made_of(
    policy: Any,
    tokenizer: Any,
    objective: Objective,
    rewards: Any,
    judge: Any,
    *,
    device: torch.device,
    hashes: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a run, as plain values.

    Args:
        policy: the module that is trained, unwrapped.
        tokenizer: of the policy.
        objective: as it was given, before any correction.
        rewards: a :class:`~rlft.rewards.RewardSet`, or None.
        judge: the same.
        device: that computes.
        hashes: ``columns`` of :func:`columns` and ``weights`` of :func:`weights`.
    """
    return {
        "versions": versions(device),
        "chat_template": _template(tokenizer),
        "sources": _sources(policy, rewards),
        "objective": {name: one_line(text) for name, text in objective.describe().items()},
        "rewards": _rewards(rewards, judge),
        "adapters": _adapters(policy),
        **hashes,
    }


def data_facts(data: Any) -> dict[str, Any]:
    """What a person can compare when the data of a run has changed."""
    return {
        "format": data.format,
        "examples": len(data.examples),
        "prompt tokens": sum(len(e.prompt_ids) for e in data.examples),
        "trained tokens": data.report.trained_tokens,
    }


def versions(device: torch.device) -> dict[str, str]:
    """What computes: packages, the interpreter and the device."""
    from rlft._version import __version__

    return {
        "rlft": __version__,
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def columns(data: Any, objective: Objective, rewards: Any, judge: Any) -> dict[str, str]:
    """A hash of every column that the objective or a reward function reads.

    Args:
        data: training data.
        objective: names numeric columns.
        rewards: a :class:`~rlft.rewards.RewardSet`, or None.
        judge: the same.
    """
    there = {name for example in data.examples for name in example.columns} | {"prompt"}
    read = set(objective.columns)
    for function in [f for functions in (rewards, judge) if functions is not None for f in functions.funcs]:
        read |= _reads(function, there)
    return {name: data.column_fingerprint(name) for name in sorted(read & there)}


def _reads(function: Any, there: set[str]) -> set[str]:
    """The columns that a reward function is given: those it names, or all where it takes whatever there is."""
    data = there - {"completion", "completions", "completion_ids", "trainer_state", "prompts"}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return data
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return data
    return {"prompt" if p.name == "prompts" else p.name for p in parameters} & data


def weights(policy: Any, rewards: Any) -> dict[str, Any]:
    """Configs, and a hash of every tensor that no checkpoint holds: by model, then by name.

    These are the base under an adapter, a reference and a critic of their own, and reward models. A hash reads at most a
    mebibyte of a tensor, see :func:`rlft.models.tensor_hashes.sampled_hash`.

    Args:
        policy: the module that will be trained, not yet sharded.
        rewards: a :class:`~rlft.rewards.RewardSet`, or None.
    """
    found: dict[str, Any] = {"policy": _model(policy.hf_model, {})}
    for name, tensor in policy.unsaved_state().items():
        part, _, rest = name.partition(".")
        owner = {"reference_model": "reference", "critic": "critic"}.get(part, "policy")
        if owner not in found:
            found[owner] = _model(getattr(policy, part), {})
        found[owner]["tensors"][rest] = sampled_hash(tensor)
    for name, function in zip(rewards.names, rewards.funcs, strict=True) if rewards is not None else ():
        if (scorer := getattr(function, "scorer", None)) is not None and hasattr(scorer, "hf_model"):
            found[f"reward {name}"] = _model(scorer.hf_model, scorer.unsaved_state())
    return found


def _model(module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    inner = getattr(module, "model", module) if not hasattr(module, "config") else module
    config = getattr(inner, "config", None)
    plain = json.loads(json.dumps(config.to_dict(), default=str)) if config is not None else {}
    return {
        "config": {name: value for name, value in plain.items() if name not in _NO_PART},
        "tensors": {name: sampled_hash(tensor) for name, tensor in tensors.items()},
    }


def _template(tokenizer: Any) -> str:
    """A hash of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    return hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _sources(policy: Any, rewards: Any) -> dict[str, dict[str, str]]:
    """Model -> where it came from, and the commit of the hub that its name stood for."""
    models = {"policy": policy.hf_model}
    for name, part in (("reference", "reference_model"), ("critic", "critic")):
        if (held := getattr(policy, part, None)) is not None:
            models[name] = getattr(held, "model", held) if not hasattr(held, "config") else held
    functions = zip(rewards.names, rewards.funcs, strict=True) if rewards is not None else ()
    models |= {f"reward {name}": f.scorer.hf_model for name, f in functions if hasattr(f, "scorer")}
    found = {}
    for name, model in models.items():
        config = getattr(model, "config", None)
        revision = getattr(config, "_commit_hash", None)
        found[name] = {"name": str(getattr(config, "_name_or_path", "") or "in memory")}
        found[name] |= {"revision": str(revision)} if revision else {}
    return found


def _rewards(rewards: Any, judge: Any) -> dict[str, str]:
    found = {}
    if rewards is not None:
        pairs = zip(rewards.names, rewards.weights, strict=True)
        found["reward functions"] = ", ".join(f"{name} (weight {weight:g})" for name, weight in pairs)
    if judge is not None:
        found["judge"] = ", ".join(judge.names)
    return found


def _adapters(policy: Any) -> dict[str, str]:
    """The settings of the adapter that is trained, by name."""
    from rlft.models import adapters

    model = policy.hf_model
    if not adapters.is_peft(model):
        return {}
    settings = model.peft_config[adapters.active_adapter(model)].to_dict()
    return {name: _said(value) for name, value in settings.items() if name not in _NO_PART_OF_ADAPTER}


def _said(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return one_line(value)


# -- files of the run's folder -------------------------------------------------------------------------------------------
class RunFiles:
    """Writes ``config.json`` and ``summary.json``, and opens ``metrics.jsonl``.

    Args:
        parts: of the run; the main process writes.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.run_dir, self.made_of = parts.config, parts.run_dir, parts.made_of
        self.processes, self.journal = parts.processes, parts.journal

    def begin(self, rows: Any, offset: int | None) -> None:
        """Open the journal's log, cut back to where the resumed checkpoint left it; trackers are started. Collective.

        Args:
            rows: what became of the rows of the data so far.
            offset: bytes of the log that belong to the run; None for a new one.
        """
        settings, path, progress = (
            redact(self.config.to_dict()),
            self.run_dir / "metrics.jsonl",
            self.processes.progress,
        )
        with self.processes.together():
            try:
                log = MetricsLog(path, enabled=self.processes.is_main)
            except OSError as error:
                raise TrainingError(
                    f"{path} cannot be opened: {error.strerror}; move it away, or make it writable"
                ) from error
            log.truncate_to(progress.step, offset or 0)
            if self.processes.is_main:
                self._write("config.json", settings)
                self.write_summary(rows)
            plain = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
            self.processes.accelerator.init_trackers("rlft", config=plain)
        self.journal.log = log
        if offset is not None and path.exists():  # callbacks of every process read it
            progress.log_history = list(read_metrics(path))

    def write_summary(self, rows: Any) -> None:
        """Leave ``summary.json``: what became of the rows, and what computed and from where. On the main process."""
        data = {"rows": rows.rows, "kept": rows.kept, "skipped": rows.skipped, "format": rows.format}
        shown = ("versions", "sources", "chat_template")
        self._write(
            "summary.json", {"data": data, **{name: self.made_of[name] for name in shown if name in self.made_of}}
        )

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        data = (json.dumps(values, indent=2) + "\n").encode()
        try:
            replace_file("settings", self.run_dir / name, data)
        except OSError as error:
            trouble = disk_trouble(error, self.run_dir, len(data))
            raise TrainingError(f"{self.run_dir / name} could not be written: {trouble}") from error
