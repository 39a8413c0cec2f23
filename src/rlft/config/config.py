"""The configuration of a run: its fields, checked when they are set, and views of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlft import _check, recipes
from rlft.config import checks
from rlft.config.fields import Fields
from rlft.config.values import ConfigError, typed

__all__ = ["Config", "digest_of"]


@dataclass
class Config(Fields):
    """Everything a run needs. See ``rlft train --help`` or the documentation for the table of fields."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, typed(f.name, getattr(self, f.name), hints[f.name]))
        self.check()

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: naming the field, its value and what to set.
        """
        checks.check_values(self)

    # -- views --------------------------------------------------------------------------------------------------------
    def checks_itself(self, name: str) -> bool:
        """Whether one of :data:`SELF_CHECKS` is on: all are, but for those that ``self_checks`` switches off."""
        return self.self_checks.get(name, True) if isinstance(self.self_checks, dict) else self.self_checks

    def trusts(self, model: str) -> bool:
        """Whether code beside the weights of ``policy``, ``reference``, ``critic`` or ``reward`` may run."""
        trusted = self.trust_remote_code
        return trusted and model == "policy" if isinstance(trusted, bool) else model in trusted

    @property
    def unused_weights(self) -> bool:
        """Whether trained tensors without a gradient are said to be right, by switching off that check by name."""
        return isinstance(self.self_checks, dict) and self.self_checks.get("gradients") is False

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps that one pass over a generation feeds."""
        return (self.steps_per_generation or self.gradient_accumulation_steps) // self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: a resumed run must agree on them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("free")}

    def digest(self) -> str:
        """A hash of :meth:`identity`."""
        return digest_of(self.identity())

    def objective_hyper(self) -> dict[str, Any]:
        """Hyper-parameters under the names of the loss functions."""
        aliases = {"beta": self.beta, "clip_eps": self.epsilon, "clip_eps_high": self.epsilon_high}
        hyper = {name: value for name, value in aliases.items() if value is not None}
        both = set(hyper) & set(self.objective_args)
        if both:
            raise ConfigError(f"{', '.join(sorted(both))} given twice, as a field and in objective_args; keep one")
        return {**hyper, **self.objective_args}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from a mapping; unknown keys are refused with the closest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                objective = values.get("objective")
                if isinstance(objective, str) and key in recipes.parameters(objective):
                    raise ConfigError(
                        f"{key!r} is a setting of objective {objective!r}; write objective_args: {{{key}: {values[key]!r}}} "
                        f"(on the command line objective_args.{key}={values[key]})"
                    )
                raise ConfigError(f"unknown setting {key!r}{_check.suggestion(str(key), known)}")
        return cls(**values)

    @classmethod
    def groups(cls) -> dict[str, list[dataclasses.Field[Any]]]:
        """Fields by topic, for help and documentation."""
        table: dict[str, list[dataclasses.Field[Any]]] = {}
        for f in dataclasses.fields(cls):
            table.setdefault(f.metadata["group"], []).append(f)
        return table


def digest_of(settings: Mapping[str, Any]) -> str:
    """A hash of settings, by name and value."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
