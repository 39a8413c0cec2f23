"""From what a user writes in a config or script to a reward function."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlft import _check
from rlft.rewards.math_library import MathVerifyReward
from rlft.rewards.shaping import LengthReward, RegexReward, RepetitionPenalty, SoftOverlong, TagFormat
from rlft.rewards.verifiers import EquationVerifier, ExactMatch, MathVerifier

__all__ = ["BUILTIN_REWARDS", "load_reward"]

BUILTIN_REWARDS: dict[str, Callable[..., Any]] = {
    "equation": EquationVerifier,
    "exact_match": ExactMatch,
    "format": TagFormat,
    "length": LengthReward,
    "math": MathVerifier,
    "math_verify": MathVerifyReward,
    "regex": RegexReward,
    "repetition": RepetitionPenalty,
    "soft_overlong": SoftOverlong,
}
"""Names that a config may use, and the class behind each."""


def load_reward(spec: str | Mapping[str, Any] | Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A reward function from a callable, a built-in name, or a reference to a user's own code.

    Args:
        spec: one of

            * a callable, returned as it is;
            * a built-in name: ``"math"``, ``"math_verify"``, ``"exact_match"``, ``"equation"``, ``"format"``, ``"regex"``,
              ``"length"``, ``"repetition"``, ``"soft_overlong"``;
            * a mapping ``{"name": <a name>, **options}``, as YAML gives it;
            * ``"module:function"`` or ``"path/to/file.py:function"``.
        **options: keyword arguments of the built-in's class (``max_length=...``); a mapping's options win.

    Returns:
        A function with TRL's reward signature.

    Raises:
        ValueError: for an unknown name or option, a module, file or function that is not there, or options for a
            function of the user's own.

    Security:
        ``module:function`` imports, and so runs, code. Pass only what the user wrote in a config or on a command line;
        never a string from a checkpoint, a dataset or a model's folder. Nothing is evaluated as an expression.
    """
    if isinstance(spec, Mapping):
        if not isinstance(spec.get("name"), str):
            raise ValueError(f"a reward given as a mapping needs a 'name', got the keys {sorted(map(str, spec))}")
        return load_reward(spec["name"], **{**options, **{key: value for key, value in spec.items() if key != "name"}})
    if callable(spec) or (isinstance(spec, str) and ":" in spec):
        if options:
            raise ValueError(
                f"options {sorted(options)} do nothing for {spec!r}: only built-in rewards take them; "
                f"set them in the function (functools.partial)"
            )
        return spec if callable(spec) else _own_code(spec)
    if not isinstance(spec, str):
        raise ValueError(f"a reward is a callable, a name or a mapping, got {type(spec).__name__}")
    if spec not in BUILTIN_REWARDS:
        raise ValueError(
            f"reward {spec!r} is unknown{_check.suggestion(spec, list(BUILTIN_REWARDS))}; "
            f"write 'module:function' or 'file.py:function' for your own"
        )
    try:
        return BUILTIN_REWARDS[spec](**options)
    except TypeError as error:
        raise ValueError(f"reward {spec!r} does not take these options: {error}") from error


def _own_code(spec: str) -> Callable[..., Any]:
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"reward {spec!r} must read 'module:function' or 'path/to/file.py:function'")
    module = _from_file(Path(source)) if source.endswith(".py") else _from_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        offered = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{source!r} has no function {name!r}{_check.suggestion(name, offered)}")
    return function


def _from_module(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is no module name; write 'package.module:function' or 'path/to/file.py:function'")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the reward's module {name!r} cannot be imported: {error}; is it on PYTHONPATH?") from error
    except Exception as error:
        raise ValueError(
            f"the reward's module {name!r} cannot be imported: {type(error).__name__}: {error}; try `python -m {name}`"
        ) from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"the reward's file {str(path)!r} does not exist (looked from {str(Path.cwd())!r})")
    # One module per file, under a name of its own, so that two files called rewards.py do not meet.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"_rlft_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise ValueError(f"the reward's file {str(path)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"the reward's file {str(path)!r} cannot be run: {type(error).__name__}: {error}; try `python {path}`"
        ) from error
    except BaseException:
        del sys.modules[name]
        raise
    return module
