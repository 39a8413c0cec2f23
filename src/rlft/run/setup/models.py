"""The parts of a run from its settings: data, tokenizer, models, rewards, optimizer."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlft.config import Config, ConfigError
from rlft.objective import Objective
from rlft.run.processes import launch as launched
from rlft.run.processes import processes as meeting

if TYPE_CHECKING:
    pass


logger = logging.getLogger("rlft")
#: How :mod:`rlft.models` asks for trust.
_PASS = "pass trust_remote_code=True"

__all__ = [
    "accelerator_for",
    "adamw",
    "check_trust",
    "critic_for",
    "freeze_unused_head",
    "judge_for",
    "load",
    "load_data",
    "lora_settings",
    "policy_model",
    "reference_for",
    "rewards_for",
    "tokenized",
    "tokenizer_for",
]


def accelerator_for(config: Config) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if config.mixed_precision == "fp16":  # the loss scale would never be updated
        raise ConfigError(
            "mixed_precision='fp16' needs a CUDA device and loss scaling, which is not supported; use 'no' or 'bf16'"
        )
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"mixed_precision='bf16' is not supported by {torch.cuda.get_device_name()}; use 'no'")
    missing = [t for t in config.report_to if t != "tensorboard" and t in _TRACKERS and not _importable(_TRACKERS[t])]
    if missing:
        raise ConfigError(
            f"report_to={config.report_to} needs {_TRACKERS[missing[0]]}, which is not installed, so nothing would be reported; "
            f"install it, or drop {missing[0]!r}"
        )
    launched.check()
    meeting.meet()
    trackers: list[Any] = [t for t in config.report_to if t != "tensorboard" or importlib.util.find_spec("tensorboard")]
    # DistributedDataParallel waits for the gradient of every trained tensor, unless it looks first which are used
    unused: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if config.unused_weights else []
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=unused,
    )


#: Trackers of accelerate, by the package that each is.
_TRACKERS = {
    "aim": "aim", "clearml": "clearml", "comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow", "swanlab": "swanlab",
    "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load(config: Config, name: str, given: Any) -> Any:
    """The rows of a setting (``train_data`` or ``eval_data``), or those given in memory, renamed; None without either."""
    from rlft.data import load_rows

    source = _expanded(name, given if given is not None else getattr(config, name))
    part = _configuration(config, name, source)
    try:
        return load_rows(source, columns=config.columns or None, name=part) if source is not None else None
    except ValueError as error:
        if name == "train_data":
            raise
        raise ValueError(f"{name}: {error}") from error


def load_data(config: Config, train: Any, held_out: Any) -> tuple[Any, Any, Any]:
    """Rows to train on, rows held out, and the rows that a tokenizer may be made of: the whole file but the held-out."""
    if config.streaming:
        return _stream(config, train), _limited(config, load(config, "eval_data", held_out)), None
    rows, held = load(config, "train_data", train), load(config, "eval_data", held_out)
    if rows is None:
        raise ConfigError("train_data is missing; give a path, a hub name or rows in memory")
    if config.eval_fraction is not None:
        rows, held = rows.split(config.eval_fraction, seed=0)
    texts = rows
    if config.train_slice is not None:
        start, stop = (round(part * len(rows)) for part in config.train_slice)
        if start == stop:
            raise ConfigError(f"train_slice={config.train_slice} of {len(rows)} rows holds none; widen it, or add data")
        rows = rows.select(range(start, stop))
    return rows, _limited(config, held), texts


def _limited(config: Config, held: Any) -> Any:
    """The rows to evaluate on."""
    if held is None:
        for name in ("eval_steps", "eval_rows"):
            if getattr(config, name) is not None:
                raise ConfigError(f"{name} does nothing without evaluation data; give eval_data or eval_fraction")
        if config.eval_on_start:
            raise ConfigError("eval_on_start does nothing without evaluation data; give eval_data or eval_fraction")
    elif config.eval_rows is not None:
        held = held.select(range(min(config.eval_rows, len(held))))
    return held


def _stream(config: Config, given: Any) -> Any:
    """What reads the training rows one by one."""
    from rlft.data import stream_rows

    source = _expanded("train_data", given if given is not None else config.train_data)
    if source is None:
        raise ConfigError("train_data is missing; give a path, an iterable of rows, or a function that returns one")
    return stream_rows(source, columns=config.columns or None, name=_configuration(config, "train_data", source))


def _configuration(config: Config, name: str, source: Any) -> str | None:
    """Which configuration of a hub dataset is meant; refused where the source has none.

    Raises:
        ConfigError: for files, folders and rows in memory.
    """
    from rlft.data.hub import is_hub_name

    setting = {"train_data": "dataset_config", "eval_data": "eval_dataset_config"}[name]
    value = getattr(config, setting)
    listed = source if isinstance(source, list) and source else [source]
    if value is None or all(is_hub_name(item) for item in listed):
        return value
    paths = all(isinstance(item, (str, Path)) for item in listed)
    what = (
        f"{name} is not given"
        if source is None
        else f"{name}={source!r} names no hub dataset"
        if paths
        else "rows are given in memory"
    )
    remedy = f"; drop it, or name the sub-folder in {name}" if paths else "; drop it"
    raise ConfigError(f"{setting}={value!r} does nothing: {what}, and only those have configurations{remedy}")


def _expanded(name: str, paths: Any) -> Any:
    """Paths with ``${NAME}`` read from the environment."""
    if isinstance(paths, list):
        return [_expanded(name, path) for path in paths]
    if isinstance(paths, str) and "$" in (path := os.path.expandvars(paths)):
        raise ConfigError(
            f"{name}={paths!r} names an environment variable that is not set (it became {path!r}); set it"
        )
    return os.path.expandvars(paths) if isinstance(paths, str) else paths


def tokenizer_for(config: Config, given: Any, source: Any, rows: Any) -> Any:
    from rlft import models
    from rlft.models.vocabulary import train_tokenizer

    if given is not None and not isinstance(given, (str, Path)):
        models.check_tokenizer(given)
        return given
    name = given if given is not None else config.tokenizer
    if isinstance(name, Mapping):
        if rows is None:
            raise ConfigError(
                f"tokenizer={dict(name)!r} is made from all training rows, and streaming does not hold them; give a tokenizer"
            )
        return train_tokenizer(rows, **name)
    if name is None and isinstance(source, (str, Path)):
        name = source
    if name is None:
        path = getattr(getattr(source, "config", None), "_name_or_path", "")
        if not path:
            raise ConfigError("the tokenizer is missing; pass processing_class, or set tokenizer")
        name = path
    with _trusting("policy"):
        return models.load_tokenizer(name, revision=config.model_revision, trust_remote_code=config.trusts("policy"))


def tokenized(config: Config, rows: Any, tokenizer: Any, *, online: bool) -> Any:
    from rlft.data import tokenize, tokenize_stream

    form = "prompt" if online and config.data_format == "auto" else config.data_format
    streamed: dict[str, Any] = (
        {"shuffle_buffer": config.shuffle_buffer or 0, "seed": config.seed} if callable(rows) else {}
    )
    work: Any = tokenize_stream if callable(rows) else tokenize
    return work(
        rows,
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        end_token_ids=config.end_token_ids,
        format=form,
        max_bad_fraction=config.max_bad_fraction,
        separator=config.separator,
        workers=config.dataloader_num_workers,
        **streamed,
    )


def rewards_for(config: Config, specs: list[Any], device: torch.device, tokenizer: Any) -> Any:
    from rlft import models
    from rlft.rewards import RewardSet, load_reward

    functions = []
    for spec in specs:
        if isinstance(spec, (str, Path)) and Path(spec).is_dir():
            with _trusting("reward"):
                scorer = models.ModelReward(spec, trust_remote_code=config.trusts("reward"))
            scorer.scorer.to(device)
            functions.append(scorer)
        else:
            functions.append(load_reward(str(spec) if isinstance(spec, Path) else spec))
        if isinstance(functions[-1], models.ModelReward) and _other_tokens(functions[-1].tokenizer, tokenizer):
            warnings.warn(
                f"reward model {functions[-1].__name__!r} has another tokenizer than the policy: answers are decoded, and "
                f"their text is encoded again for it, so both read the same text but not the same tokens",
                stacklevel=5,
            )
    _limit_tokens(config, [f for f in functions if isinstance(f, models.ModelReward)])
    return RewardSet(functions, weights=config.reward_weights, timeout=config.reward_timeout)


def _limit_tokens(config: Config, reward_models: list[Any]) -> None:
    """Reward models score as many tokens at a time as the run says, unless they were made with a limit of their own."""
    free = [model for model in reward_models if model.max_tokens is None]
    if config.max_tokens_per_reward_batch is not None and not free:
        why = "every reward model has max_tokens of its own" if reward_models else "no reward is a reward model"
        raise ConfigError(
            f"max_tokens_per_reward_batch={config.max_tokens_per_reward_batch} does nothing: {why}; drop it"
        )
    for model in free:
        model.tokens_of_run = config.max_tokens_per_reward_batch or config.max_tokens_per_micro_batch


def judge_for(config: Config, given: Any) -> Any:
    """The judge, called and checked like a reward function."""
    from rlft.rewards import RewardSet, load_reward

    if isinstance(given, str) and ":" not in given:
        raise ConfigError(
            f"judge={given!r} must read module:function or path/to/file.py:function; rewards have names, judges none"
        )
    judge = load_reward(given)
    try:
        parameters = inspect.signature(judge).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        parameters = None
    if parameters is not None and not any(p.name == "opponents" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigError(
            f"judge {given!r} takes no `opponents`, so it cannot compare; a judge is a reward function that also takes opponents, "
            f"one other answer for each completion, and returns probabilities. Give a function of the rewards as `rewards`"
        )
    return RewardSet(judge, timeout=config.reward_timeout)


def _other_tokens(one: Any, other: Any) -> bool:
    return one is not other and one.get_vocab() != other.get_vocab()


def policy_model(config: Config, source: Any, tokenizer: Any, objective: Objective) -> Any:
    from rlft import models

    if isinstance(source, Mapping):
        source = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
                  "bos_token_id": tokenizer.bos_token_id, **source}  # fmt: skip
    load = models.load_sequence_classifier if "scores" in objective.needs else models.load_causal_lm
    try:
        with _trusting("policy"):
            return load(
                source,
                dtype=config.dtype,
                revision=config.model_revision,
                trust_remote_code=config.trusts("policy"),
                attn_implementation=config.attn_implementation,
                seed=config.seed,
                load_in_4bit=config.load_in_4bit,
                load_in_8bit=config.load_in_8bit,
            )
    except ImportError as error:
        if config.attn_implementation is None or config.load_in_4bit or config.load_in_8bit:
            raise
        raise ConfigError(
            f"attn_implementation={config.attn_implementation!r} cannot be used here: {str(error).rstrip('.')}; install it, or "
            f"drop attn_implementation"
        ) from error


@contextlib.contextmanager
def _trusting(model: str) -> Iterator[None]:
    """What a folder that holds code of its own is refused with, in words of the setting that lets it run."""
    try:
        yield
    except ValueError as error:
        if _PASS not in str(error):
            raise
        raise ConfigError(str(error).replace(_PASS, f"set trust_remote_code: [{model}]")) from error


def check_trust(
    config: Config, objective: Objective, *, source: Any, tokenizer: Any, reference: Any, specs: list[Any]
) -> None:
    """Refuse ``trust_remote_code`` for a model that is not loaded from a folder or a hub.

    Raises:
        ConfigError: naming the model.
    """
    from_files = {
        "policy": isinstance(source, (str, Path))
        or (not isinstance(tokenizer, Mapping) and not hasattr(tokenizer, "encode")),
        "reference": isinstance(reference, (str, Path)) and objective.needs_reference,
        "critic": config.critic not in (None, "shared") and objective.needs_critic,
        "reward": any(isinstance(spec, (str, Path)) and Path(spec).is_dir() for spec in specs),
    }
    for model, loaded in from_files.items():
        if config.trusts(model) and not loaded:
            raise ConfigError(
                f"trust_remote_code={config.trust_remote_code!r} does nothing for the {model}: none is loaded from a folder or "
                f"a hub; drop it"
            )


def lora_settings(config: Config, given: Any) -> Any:
    from rlft.models import LoraSettings

    if given is not None:
        return LoraSettings(**given) if isinstance(given, Mapping) else given
    return LoraSettings(
        r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=config.lora_target_modules
    )


def reference_for(config: Config, given: Any, objective: Objective) -> Any:
    if not objective.needs_reference:
        return "none"
    target = given if given is not None else config.ref_model
    if target is None:
        return "copy" if config.sync_ref_model else "auto"
    from rlft.models import load_causal_lm

    if not isinstance(target, (str, Path)):
        return target
    with _trusting("reference"):
        trusted = config.trusts("reference")
        return load_causal_lm(target, dtype=config.dtype, trust_remote_code=trusted).requires_grad_(False)


def critic_for(config: Config, objective: Objective) -> Any:
    if not objective.needs_critic:
        return "none"
    if config.critic in (None, "shared"):
        return "shared"
    from rlft.models import load_causal_lm

    with _trusting("critic"):
        return load_causal_lm(config.critic, dtype=config.dtype, trust_remote_code=config.trusts("critic"))


def freeze_unused_head(model: Any, objective: Objective) -> None:
    """Where a loss reads values alone, the language model's head gets no gradient: it is not trained then.

    A trainable tensor without gradient would stop the run under DDP, and count as trained everywhere.
    """
    head = model.get_output_embeddings()
    if objective.forward_needs <= {"values"} and head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        if not tied:
            head.requires_grad_(False)


def adamw(config: Config, policy: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable weights; vectors (norms, biases) are not decayed."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
