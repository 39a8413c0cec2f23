"""One flat configuration: YAML or keyword arguments in, checked values out.

Names are those of TRL and transformers where they have one, so that a script moves over by changing an import. Keys are
strict: an unknown one is refused with the closest known one, a wrong type with the type expected, and a setting that
would do nothing is refused rather than ignored.
"""

from __future__ import annotations

from rlft.config.checks import SELF_CHECKS
from rlft.config.config import Config
from rlft.config.config import digest_of as digest_of
from rlft.config.file import load_config, parse_overrides
from rlft.config.values import ConfigError

__all__ = ["SELF_CHECKS", "Config", "ConfigError", "load_config", "parse_overrides"]
