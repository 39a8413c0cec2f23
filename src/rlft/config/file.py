"""Settings from a YAML file and from ``key=value`` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlft.config.config import Config
from rlft.config.values import ConfigError

__all__ = ["load_config", "parse_overrides"]

#: Lists and mappings inside each other: no setting needs more than a few, and a parser takes quadratic time over thousands.
_DEEPEST = 64


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check.

    Args:
        path: a YAML file (safe subset: no aliases, no duplicate keys), or None for overrides alone.
        overrides: ``key=value``; ``objective_args.beta=0.1`` reaches into mappings; values are YAML.

    Raises:
        ConfigError: for a broken file, an unknown key or a value that cannot work.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from None
        values = _yaml(text, str(path)) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    for key, value in parse_overrides(overrides).items():
        head, _, tail = key.partition(".")
        if tail:
            inner = values.setdefault(head, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {head} is not a mapping, so {tail!r} cannot be set inside it")
            inner[tail] = value
        else:
            values[head] = value
    return Config.from_dict(values)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["beta=0.1", "rewards=[math]"]`` -> ``{"beta": 0.1, "rewards": ["math"]}``."""
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is not key=value; e.g. beta=0.1")
        parsed[key.strip().lstrip("-")] = _yaml(value, text)
    return parsed


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        """SafeLoader that refuses duplicate keys and aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ConfigError(f"{where}: YAML aliases are not supported; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                try:
                    repeated = key in seen
                except TypeError:
                    raise ConfigError(f"{where}: a key must be text, got {key!r}") from None
                if repeated:
                    raise ConfigError(
                        f"{where}: key {key!r} appears twice (line {key_node.start_mark.line + 1}); keep one"
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    depth = 0
    for mark in text:
        depth += (mark in "[{") - (mark in "]}")
        if depth > _DEEPEST:
            raise ConfigError(
                f"{where} is not valid YAML for settings: brackets nest deeper than {_DEEPEST}; close them"
            )
    try:
        return Strict(text).get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # `!!int` and its like on text that is none ends in whatever the parser stumbled over
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
