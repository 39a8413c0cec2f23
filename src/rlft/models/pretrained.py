"""One model as transformers makes it, from files or from a config, with errors that say what is wrong with the source.

What is loaded here is a base: :mod:`rlft.models.loading` decides which class it is and puts adapters on top.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlft import _check
from rlft.models import folder_checks
from rlft.models.scorer import unwrap

__all__ = ["is_head", "load", "new_head", "parse_dtype", "quantization", "remember_new", "trained"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Where a classifier keeps the name of weights that no file held, so that a random reward model is not asked for rewards.
_NEW = "rlft_new_parameters"


def parse_dtype(dtype: str | torch.dtype, *, name: str = "dtype") -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``; dtypes pass through."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{name} {dtype!r} is unknown{_check.suggestion(str(dtype), tuple(_DTYPES))}")
    return _DTYPES[dtype]


def quantization(load_in_4bit: bool, load_in_8bit: bool, dtype: torch.dtype) -> Any:
    """The transformers settings of 4-bit (nf4, quantised scales) or 8-bit base weights; None for neither.

    Raises:
        ValueError: when both are asked for.
        ImportError: when bitsandbytes is not installed.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit exclude each other; choose one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit and load_in_8bit need bitsandbytes; install it with: pip install 'rlft[quant]'")
    from transformers import BitsAndBytesConfig

    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load(
    auto: str,
    source: str | Path | nn.Module | Mapping[str, Any],
    config_changes: dict[str, Any],
    *,
    dtype: str | torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
    load_in_4bit: bool,
    load_in_8bit: bool,
    quantization_config: Any,
    seed: int,
) -> tuple[Any, list[str]]:
    """The model, and the names of weights that no file held."""
    torch_dtype = parse_dtype(dtype)
    if isinstance(source, (nn.Module, Mapping)):
        quantised = load_in_4bit or load_in_8bit or quantization_config is not None
        for name, value in (("revision", revision), ("quantisation", quantised or None)):
            if value is not None:
                what = "a model in memory" if isinstance(source, nn.Module) else "a model from a config"
                raise ValueError(f"{name}={value!r} has no effect on {what}; leave it out")
    if isinstance(source, nn.Module):
        if attn_implementation is not None:
            raise ValueError("attn_implementation has no effect on a model in memory; load the model with it")
        return source, []
    import transformers

    auto_class = getattr(transformers, auto)
    if isinstance(source, Mapping):
        with torch.random.fork_rng(devices=[]), _sound(source):
            config = _config(source, config_changes)
            torch.manual_seed(seed)
            extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            model = auto_class.from_config(config, **extra)
        every = [name for name, _ in model.named_parameters() if is_head(name)] if config_changes else []
        return model.to(torch_dtype).eval(), every
    if folder_checks.is_local(source):
        source = Path(source).expanduser()
        if not (source / "config.json").is_file():
            raise ValueError(f"{source} has no config.json; give the folder that save_pretrained wrote")
        folder_checks.check_folder(source, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": torch_dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    options |= config_changes
    if revision is not None:
        options["revision"] = revision
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization_config is not None and (load_in_4bit or load_in_8bit):
        raise ValueError("quantization_config says it all; leave out load_in_4bit and load_in_8bit")
    settings = quantization_config or quantization(load_in_4bit, load_in_8bit, torch_dtype)
    if settings is not None:
        options["quantization_config"] = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = auto_class.from_pretrained(str(source), output_loading_info=True, **options)
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
                raise ValueError(_mismatch(source, config_changes, revision, trust_remote_code)) from error
            if isinstance(error, OSError) and not isinstance(source, Path):
                raise ValueError(folder_checks.not_from_hub("model", source, error)) from error
            if not isinstance(source, Path):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(
                f"{source} could not be loaded ({type(error).__name__}: {reason:.300}); a file of it may be damaged or missing: "
                f"download or save it again"
            ) from error
    return model.eval(), sorted(info["missing_keys"])


@contextlib.contextmanager
def _sound(source: Mapping[str, Any]) -> Iterator[None]:
    """What transformers and torch make of sizes that fit no model, in words of the config that holds them."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        if type(error) is ValueError and "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(_no_model(source, error)) from error
    except Exception as error:
        raise ValueError(_no_model(source, error)) from error


def _no_model(source: Mapping[str, Any], error: Exception) -> str:
    said = " ".join(str(error).split("Model type should be one of")[0].split())
    return (
        f"no model can be made of the config {dict(source)!r:.300} ({type(error).__name__}: {said:.300}); correct its sizes, or "
        f"its model_type"
    )


def _mismatch(source: Any, changes: Mapping[str, Any], revision: str | None, trust_remote_code: bool) -> str:
    """Why weights of another shape than the model's were found."""
    from transformers import AutoConfig

    extra = {} if revision is None else {"revision": revision}
    labels = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code, **extra).num_labels
    if "num_labels" in changes and labels != changes["num_labels"]:
        return (
            f"{source} is a classifier with num_labels={labels}; a reward model has one output: use one that was trained "
            f"with num_labels=1, or write a reward function that makes one number of its outputs"
        )
    return f"weights of {source} have other shapes than its config.json says; save the model again, or mend the config"


def _config(source: Mapping[str, Any], changes: dict[str, Any]) -> Any:
    """A transformers config; unknown keys are refused (transformers would keep and ignore them)."""
    from transformers import CONFIG_MAPPING

    settings = {**source, **changes}
    if "auto_map" in settings:
        raise ValueError(
            "a config with auto_map names Python code; remove auto_map, and use a family transformers ships"
        )
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        known = tuple(CONFIG_MAPPING.keys())
        hint = _check.suggestion(str(kind), known) if kind is not None else "; for example 'llama', 'qwen2' or 'gpt2'"
        raise ValueError(f"the config's model_type {kind!r} is no family of transformers{hint[:300]}")
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    known = set(default.to_dict()) | set(vars(default)) | set(getattr(config_class, "attribute_map", {}))
    known |= {"num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "architectures"}
    for key in settings:
        if key not in known:
            raise ValueError(f"{key!r} is no setting of a {kind} config{_check.suggestion(key, tuple(sorted(known)))}")
    return config_class(**settings)


def new_head(model: nn.Module) -> tuple[str, ...]:
    """The weights of a classifier that were drawn at random when it was loaded, and not trained since."""
    return tuple(getattr(model, _NEW, ()) or getattr(unwrap(model), _NEW, ()))


def remember_new(model: nn.Module, names: Sequence[str]) -> None:
    """Write down the weights of a classifier that no file held, for :func:`new_head`."""
    setattr(model, _NEW, tuple(names))


def trained(model: nn.Module) -> None:
    """Forget that a head was new: the caller trains it."""
    for holder in (model, unwrap(model)):
        if getattr(holder, _NEW, None):
            setattr(holder, _NEW, ())


def is_head(name: str) -> bool:
    return name.split(".")[0] in ("score", "classifier", "v_head") or name.startswith("classification_head")
