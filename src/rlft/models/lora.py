"""LoRA adapters: made and checked, so that what should train does and nothing else."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlft.models import adapters
from rlft.models.scorer import unwrap

__all__ = ["LoraSettings", "TrainableReport", "add_lora", "check_trainable", "full_precision"]


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter ``W + (alpha / r) B A``.

    Attributes:
        r: rank, >= 1.
        alpha: scale, > 0; the adapter's output is multiplied by ``alpha / r``.
        dropout: on the adapter's input, in [0, 1). Only used by a ``Policy(..., dropout=True)``.
        target_modules: ``"all-linear"``, or names of linear layers (``["q_proj", "v_proj"]``).
        modules_to_save: names of modules that are trained in full beside the adapter.

    Raises:
        ValueError: when a value is out of range.

    References:
        Hu et al. 2021, arXiv 2106.09685.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora r must be a whole number >= 1 (the rank), got {self.r!r}")
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"lora alpha must be a finite number > 0 (the scale is alpha / r), got {self.alpha!r}")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora dropout must be >= 0 and < 1, got {self.dropout!r}")
        if not self.target_modules:
            raise ValueError("lora target_modules is empty; name linear layers, or use 'all-linear'")


@dataclass(frozen=True)
class TrainableReport:
    """What an optimizer would change.

    Attributes:
        names: of the trainable tensors.
        count: their number of elements.
        total: elements of all tensors of the model.
        dtype: the dtype of the trainable tensors.
    """

    names: tuple[str, ...]
    count: int
    total: int
    dtype: torch.dtype

    def __str__(self) -> str:
        share = 100.0 * self.count / max(self.total, 1)
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.count:,} of {self.total:,} parameters train ({share:.3g} %), {len(self.names)} tensors, {kind}"


def check_trainable(model: nn.Module) -> TrainableReport:
    """List what trains, and refuse a run that cannot learn.

    Raises:
        ValueError: when nothing is trainable, or a trainable tensor is in half precision (its small updates would be
            rounded away).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    if not named:
        raise ValueError(
            "no parameter is trainable, so a run would change nothing; add an adapter (rlft.models.add_lora), load the "
            "adapter trainable (is_trainable=True), or call model.requires_grad_(True)"
        )
    for name, p in named:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"trainable parameter {name} is {p.dtype}; updates below 1/256 of a weight are rounded away there: load the "
                f"model with dtype='float32', or freeze it and train a LoRA adapter (adapters are float32)"
            )
    return TrainableReport(tuple(name for name, _ in named), sum(p.numel() for _, p in named), total, named[0][1].dtype)


def add_lora(model: Any, settings: LoraSettings | Any = None, *, seed: int = 0) -> Any:
    """Freeze a model and put a fresh LoRA adapter on it; until it is trained the model's outputs do not change.

    Args:
        model: a transformers model without adapters. It is changed in place.
        settings: :class:`LoraSettings`, None for its defaults, or a peft config of your own.
        seed: of the adapter's first factor. The global random state is left as it was.

    Returns:
        A ``PeftModel`` whose adapter is trainable and float32 (float64 for float64 models), whatever the base's dtype.

    Raises:
        ValueError: when the model has an adapter already, a name in ``target_modules`` or ``modules_to_save``
            matches nothing, or the rank is above that of every targeted matrix.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if adapters.is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model already has an adapter; train that one, or merge it first (merge_and_unload)")
    settings = LoraSettings() if settings is None else settings
    if not isinstance(settings, LoraSettings) and hasattr(settings, "lora_alpha"):
        # a config of peft's own, which takes any alpha: an alpha of NaN would make every output NaN
        LoraSettings(r=settings.r, alpha=settings.lora_alpha, dropout=settings.lora_dropout)
    targets, saved = settings.target_modules, settings.modules_to_save
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, (list, tuple, set)) or (isinstance(settings, LoraSettings) and targets != "all-linear"):
        targets = [targets] if isinstance(targets, str) else sorted(targets)
        _match(targets, names, what="target_modules", candidates=_linear_names(model))
    if not isinstance(targets, str) or targets == "all-linear":
        _check_use(model, settings.r, targets)
    if saved:
        _match(saved, names, what="modules_to_save", candidates={n.split(".")[-1] for n in names})
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config: Any = settings
    if isinstance(settings, LoraSettings):
        classifier = type(model).__name__.endswith("ForSequenceClassification")
        if targets != "all-linear" and (name := _tied_among(model, targets)):
            raise ValueError(
                f"lora target_modules names {name!r}, whose weight is embedding and head at once (tie_word_embeddings); a "
                f"merged adapter would count twice: leave it out, train it in full (modules_to_save=[{name!r}]), or untie"
            )
        config = LoraConfig(
            ensure_weight_tying=bool(saved and _tied_among(model, saved)),
            r=settings.r,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=float(settings.dropout),
            target_modules=targets,
            modules_to_save=None if saved is None else list(saved),
            bias="none",
            task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        )
    with torch.random.fork_rng(devices=adapters._cuda_devices(model)), warnings.catch_warnings():
        # GPT-2's Conv1D stores its weight transposed; peft sees that, sets the flag by itself, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    full_precision(wrapped)
    return wrapped


def _linear_names(model: nn.Module) -> set[str]:
    """Last components of the names of layers a LoRA can sit on, most useful first."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
            names.add(name.split(".")[-1])
    return names


def _match(wanted: Iterable[str], names: list[str], *, what: str, candidates: set[str]) -> None:
    for target in wanted:
        if not any(name == target or name.endswith("." + target) for name in names):
            close = difflib.get_close_matches(target, sorted(candidates), n=3, cutoff=0.5) or sorted(candidates)
            raise ValueError(f"lora {what} {target!r} matches no module of the model; it has {', '.join(close[:12])}")


def _check_use(model: nn.Module, r: int, targets: Any) -> None:
    """Refuse a rank that no targeted matrix can have: it would take memory and time, and add nothing."""
    wanted = None if targets == "all-linear" else {str(name) for name in targets or ()}
    sizes = [
        min(weight.shape)
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()  # else packed, of another shape
        and (wanted is None or any(name == end or name.endswith(f".{end}") for end in wanted))
    ]
    if sizes and r > max(sizes):
        raise ValueError(
            f"lora r={r} is more than the rank that any targeted matrix can have ({max(sizes)}), so it only takes memory; lower "
            f"r (lora_r) to {max(sizes)} or less"
        )


def _tied_among(model: Any, wanted: Iterable[str]) -> str | None:
    """The first name that means an embedding which is also the head."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    both = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = [name for name, module in model.named_modules() if any(module is m for m in both)]
    return (
        next((w for w in wanted if any(n == w or n.endswith("." + w) for n in names)), None) if len(both) > 1 else None
    )


def full_precision(model: Any) -> None:
    """Trainable tensors in float32; modules trained in full get and give the dtype their neighbours expect."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    from peft.utils.other import ModulesToSaveWrapper

    head = unwrap(model).get_output_embeddings() if hasattr(unwrap(model), "get_output_embeddings") else None
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        outside = next((p.dtype for p in module.original_module.parameters()), torch.float32)
        if outside not in (torch.bfloat16, torch.float16):
            continue
        for copied in module.modules_to_save.values():
            copied.register_forward_pre_hook(_inputs_float)
            if module is not head:
                copied.register_forward_hook(_Outputs(outside))


def _inputs_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


class _Outputs:
    """A forward hook that gives a module's output the dtype of the layers around it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) and output.is_floating_point() else output
