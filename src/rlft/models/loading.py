"""Models from a hub id, a folder, a config or memory: safetensors only, no foreign code unless asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlft.models import adapters, folder_checks, pretrained
from rlft.models.lora import full_precision

__all__ = ["load_adapter", "load_causal_lm", "load_sequence_classifier"]


def load_causal_lm(
    source: str | Path | nn.Module | Mapping[str, Any],
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config: Any = None,
    seed: int = 0,
) -> Any:
    """A causal language model.

    Args:
        source: a hub id; a folder that ``save_pretrained`` wrote (a peft adapter folder gives its base with the adapter
            on top, trainable); a config (``{"model_type": "llama", "hidden_size": 64, ...}``) for a model from scratch;
            or a model in memory, which is returned as it is.
        dtype: of the weights. Weights that are trained belong in float32: a bfloat16 weight of 0.02 swallows every
            step below 2e-5.
        revision: the hub revision; pin it for a run that must be repeatable.
        trust_remote_code: run model code that comes with the weights. Off unless you read it.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``; None lets transformers choose.
        load_in_4bit, load_in_8bit: frozen base weights in 4 or 8 bits (bitsandbytes), for an adapter on top; ``dtype``
            is then what 4-bit layers multiply in.
        quantization_config: quantisation settings of transformers, in place of the two above.
        seed: of weights that no file holds. The global random state is left as it was.

    Returns:
        A ``PreTrainedModel`` (or ``PeftModel``) in eval mode.

    Raises:
        ValueError: when the source is unclear, unsafe or incomplete, or an option cannot have an effect.
        ImportError: when quantization is asked for and bitsandbytes is missing.
    """
    options = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "quantization_config": quantization_config,
        "seed": seed,
    }
    if folder := _adapter_folder(source):
        return load_adapter(folder, **options)
    model, missing = pretrained.load("AutoModelForCausalLM", source, {}, **options)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a causal language model ({missing[0]}, ...), which would be random; "
            f"it may hold another kind of model, or be incomplete"
        )
    return model


def load_sequence_classifier(
    source: str | Path | nn.Module | Mapping[str, Any],
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config: Any = None,
    seed: int = 0,
) -> Any:
    """A sequence classifier with one output (a reward model), for training or for scoring.

    From a language model's weights it gets a new, random score head; that is remembered, and the model is refused for
    scoring until it has been trained.

    Args:
        source, dtype, revision, trust_remote_code, attn_implementation: as for :func:`load_causal_lm`.
        load_in_4bit, load_in_8bit, quantization_config: the same.
        seed: of the new score head.

    Returns:
        A ``PreTrainedModel`` (or ``PeftModel``) in eval mode.

    Raises:
        ValueError: when the source is unclear, unsafe or incomplete, or has several outputs.
    """
    options = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "quantization_config": quantization_config,
        "seed": seed,
    }
    if folder := _adapter_folder(source):
        return load_adapter(folder, classifier=True, **options)
    model, missing = pretrained.load("AutoModelForSequenceClassification", source, {"num_labels": 1}, **options)
    body = [name for name in missing if not pretrained.is_head(name)]
    if body:
        raise ValueError(
            f"{source} lacks {len(body)} weights of the model itself ({body[0]}, ...), which would be random; "
            f"it may hold another kind of model, or be incomplete"
        )
    if not isinstance(source, nn.Module):
        pretrained.remember_new(model, missing)
    return model


def load_adapter(folder: str | Path, *, model: Any = None, classifier: bool = False, **options: Any) -> Any:
    """A base model with the adapter of a folder on top, trainable.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base; None loads the one the adapter names.
        classifier: load that base as a sequence classifier (a reward model).
        options: for :func:`rlft.models.load_causal_lm`, when the base is loaded.

    Returns:
        A ``PeftModel``.

    Raises:
        ValueError: when the files are unsafe, or the adapter does not fit the base tensor by tensor.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    folder = Path(folder).expanduser()
    folder_checks.check_folder(
        folder, trust_remote_code=bool(options.get("trust_remote_code", False)), weights="adapter_model"
    )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} has no adapter_model.safetensors; give the folder that save_pretrained wrote")
    config = folder_checks.read_json(folder / "adapter_config.json")
    _check_rank(weights, config)
    base_name = config.get("base_model_name_or_path")
    if model is None:
        if not base_name:
            raise ValueError(
                f"{folder} names no base model (base_model_name_or_path); load the base yourself and pass "
                f"load_adapter(folder, model=base)"
            )
        load = load_sequence_classifier if classifier else load_causal_lm
        model = load(base_name, **{"revision": config.get("revision"), **_given(options)})
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=adapters._cuda_devices(model)):
            warnings.filterwarnings("ignore", message=".*[Mm]issing.*keys.*")  # checked below, and refused
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # peft, huggingface_hub and safetensors raise whatever a damaged file makes of them
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = reason if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"the adapter in {folder} does not fit {type(model).__name__} (it was trained on {base_name!r}): {reason}"
        ) from error
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    with safe_open(str(weights), framework="pt") as stored:
        saved = set(stored.keys())
        missing, unknown = sorted(loaded.keys() - saved), sorted(saved - loaded.keys())
        unknown = [name for name in unknown if not _is_base_weight(name, before)]
        if missing or unknown:
            raise ValueError(
                f"the adapter in {folder} does not fit {type(model).__name__} (it was trained on {base_name!r}): "
                f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} without a place {unknown[:2]}; "
                f"load it onto the base it was trained on"
            )
        for name in sorted(loaded):
            value: Tensor = stored.get_tensor(name)
            if not torch.equal(value.to(loaded[name]), loaded[name].detach()):
                raise ValueError(
                    f"adapter tensor {name} of {folder} was not loaded as stored; report this with the file"
                )
    if all(any(name.endswith(f".{new}") for name in loaded) for new in pretrained.new_head(model)):
        pretrained.trained(model)  # the adapter brought the score head
    full_precision(wrapped)
    return wrapped


def _adapter_folder(source: Any) -> Path | None:
    """The folder, when the source is one that holds a peft adapter."""
    if isinstance(source, (str, Path)) and folder_checks.is_local(source):
        folder = Path(source).expanduser()
        return folder if (folder / "adapter_config.json").is_file() else None
    return None


def _check_rank(weights: Path, config: dict[str, Any]) -> None:
    """Refuse a rank that is not that of the stored tensors, before memory for it is asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), framework="pt") as stored:
            ranks = {stored.get_slice(name).get_shape()[0] for name in stored.keys() if ".lora_A." in name}
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{weights} is not a safetensors file that can be read ({error}); save the adapter again"
        ) from None
    if ranks and not config.get("rank_pattern") and any(rank != config.get("r") for rank in ranks):
        raise ValueError(
            f"{weights.parent / 'adapter_config.json'} says rank r={config.get('r')!r:.40} and the stored tensors have "
            f"{', '.join(map(str, sorted(ranks)))}; use the config that was saved with them"
        )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not (name == "revision" and value is None)}


def _is_base_weight(name: str, base: dict[str, tuple[int, ...]]) -> bool:
    """Whether peft stored a base weight (a resized embedding) beside the adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "") in base
