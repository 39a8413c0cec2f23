"""rlft: RL fine-tuning of language models, from pure loss functions to one trainer.

``import rlft.losses`` needs torch alone; the trainer and its friends are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlft._redact import guard_logs
from rlft._version import __version__

_LAZY = {
    "Batch": "rlft.types",
    "LossOutput": "rlft.types",
    "Objective": "rlft.objective",
    "Config": "rlft.config",
    "Trainer": "rlft.trainer",
}

__all__ = ["Batch", "Config", "LossOutput", "Objective", "Trainer", "__version__"]

if TYPE_CHECKING:
    from rlft.config import Config
    from rlft.objective import Objective
    from rlft.trainer import Trainer
    from rlft.types import Batch, LossOutput


guard_logs()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rlft' has no attribute {name!r}")
