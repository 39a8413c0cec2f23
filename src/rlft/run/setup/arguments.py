"""What is passed to the Trainer in memory: of the right kind, or refused in words before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlft import _check
from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.run.callbacks import is_of_transformers

__all__ = ["callbacks", "check_kinds", "check_module", "optimizer", "settings"]


def settings(args: Any) -> Config:
    """The configuration of a run, from what was passed as ``args``.

    Raises:
        ConfigError: for anything but a Config, a mapping or None.
    """
    if isinstance(args, Config):
        return args
    if args is not None and not isinstance(args, Mapping):
        raise ConfigError(
            _wrong("args", args, "a rlft.Config or a mapping of its fields (a file: rlft.config.load_config)")
        )
    return Config.from_dict(args or {})


def optimizer(given: Any) -> torch.optim.Optimizer | None:
    """The optimizer of ``optimizers``, or None.

    Raises:
        ConfigError: for anything but a pair of an optimizer (or None) and None.
    """
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and given[1] is None
    if given is not None and not (pair and (given[0] is None or isinstance(given[0], torch.optim.Optimizer))):
        expected = "a pair (optimizer or None, None): with an optimizer of your own the learning rate is yours too, set it in a callback"
        raise ConfigError(_wrong("optimizers", given, expected))
    return None if given is None else given[0]


def check_kinds(given: Any, objective: Any) -> None:
    """Refuse arguments of a kind that cannot be used; None is fine for each of them.

    Args:
        given: what was passed to the Trainer, a :class:`rlft.run.setup.parts.Given`.
        objective: as it was passed.

    Raises:
        ConfigError: naming the argument, what came and what to pass.
    """
    text = (str, Path)
    expected: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
        "model": (
            given.model,
            lambda x: isinstance(x, (*text, Mapping, nn.Module)),
            "a hub id, a folder, a mapping of a model's settings, or a model",
        ),
        "objective": (objective, lambda x: isinstance(x, Objective) or callable(x), "an Objective or a loss function"),
        "processing_class": (
            given.tokenizer,
            lambda x: isinstance(x, text) or (hasattr(x, "eos_token_id") and hasattr(x, "get_vocab")),
            "a tokenizer, or the hub id or folder of one",
        ),
        "reward_funcs": (given.reward_funcs, _rewards, "functions, names, or folders of reward models"),
        "judge": (given.judge, lambda x: isinstance(x, str) or callable(x), "a function, or module:function"),
        "peft_config": (
            given.peft_config,
            lambda x: isinstance(x, Mapping) or hasattr(x, "target_modules"),
            "a peft.LoraConfig, LoraSettings, or a mapping of its fields",
        ),
        "sampler": (given.sampler, lambda x: callable(getattr(x, "sample", None)), "a Sampler, with a method sample"),
    }
    for name, (value, fits, what) in expected.items():
        if value is not None and not fits(value):
            raise ConfigError(_wrong(name, value, what))
    if isinstance(given.peft_config, Mapping):
        from rlft.models import LoraSettings

        known = [f.name for f in dataclasses.fields(LoraSettings)]
        for key in given.peft_config:
            if key not in known:
                raise ConfigError(f"peft_config has no {key!r}{_check.suggestion(str(key), known)}")


def callbacks(given: Any) -> list[Any]:
    """The callbacks of a run as a list: functions, and ``TrainerCallback`` objects; of a class, one is made.

    Raises:
        ConfigError: for anything else.
    """
    listed: list[Any] = list(given or ()) if given is None or isinstance(given, Iterable) else [None]
    if not all(callable(one) or is_of_transformers(one) for one in listed):
        raise ConfigError(
            _wrong(
                "callbacks",
                given,
                "a list of functions (event, trainer, values) or transformers.TrainerCallback objects",
            )
        )
    return [one() if isinstance(one, type) and is_of_transformers(one) else one for one in listed]


def check_module(model: Any, objective: Objective) -> None:
    """Refuse a module in memory that is no model of the kind that the objective trains.

    Args:
        model: loaded or as it was passed.
        objective: of the run.

    Raises:
        ConfigError: saying what it is and how to load what is needed.
    """
    kind = type(model).__name__
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise ConfigError(
            _wrong("model", model, "a model of transformers or peft (a Policy needs its config and embeddings)")
        )
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ConfigError(f"model {kind} has no weights yet ({empty} is on the meta device); load them first")
    if "scores" in objective.needs:  # whose module says itself what it lacks
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.get_output_embeddings() is None:
        raise ConfigError(
            f"objective {objective.name!r} trains a causal language model, and {type(base).__name__} has no head over the "
            f"vocabulary; load it with rlft.models.load_causal_lm or AutoModelForCausalLM"
        )


def _rewards(given: Any) -> bool:
    # a module is callable, and takes ids: ModelReward is what makes a reward function of it
    return (callable(given) or isinstance(given, (Path, Iterable))) and not _module(given)


def _wrong(name: str, value: Any, expected: str) -> str:
    more = (
        "; make a reward function of it: rlft.models.ModelReward" if name == "reward_funcs" and _module(value) else ""
    )
    return f"{name} must be {expected}, got {type(value).__name__}{more}"


def _module(value: Any) -> bool:
    return isinstance(value, nn.Module) or (
        isinstance(value, (list, tuple)) and any(isinstance(one, nn.Module) for one in value)
    )
