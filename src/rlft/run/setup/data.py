"""The data of a run from its settings: rows, tokenizer, tokens; refused where the objective cannot train on them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlft.config import Config, ConfigError
from rlft.objective import Objective

__all__ = [
    "check_data",
    "check_held_out",
    "check_tokens",
    "load_data",
    "load_setting",
    "note_positions",
    "tokenized",
    "tokenizer_for",
    "trusting",
]

logger = logging.getLogger("rlft")
#: How :mod:`rlft.models` asks for trust.
_PASS = "pass trust_remote_code=True"


# -- rows -----------------------------------------------------------------------------------------------------------------
def load_setting(config: Config, name: str, given: Any) -> Any:
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
        return _stream(config, train), _limited(config, load_setting(config, "eval_data", held_out)), None
    rows, held = load_setting(config, "train_data", train), load_setting(config, "eval_data", held_out)
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
        for name in ("eval_steps", "eval_rows", "metric_for_best_model"):
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


# -- tokens ---------------------------------------------------------------------------------------------------------------
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
    with trusting("policy"):
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


@contextlib.contextmanager
def trusting(model: str) -> Iterator[None]:
    """What a folder that holds code of its own is refused with, in words of the setting that lets it run."""
    try:
        yield
    except ValueError as error:
        if _PASS not in str(error):
            raise
        raise ConfigError(str(error).replace(_PASS, f"set trust_remote_code: [{model}]")) from error


# -- what the objective can train on ---------------------------------------------------------------------------------------
def check_data(config: Config, objective: Objective, data: Any, *, online: bool) -> None:
    _check_imitation(objective, data)
    kinds = {"preference": objective.needs_pairs, "unpaired": "labels" in objective.needs}
    wanted = [kind for kind, needed in kinds.items() if needed]
    if wanted and not online and data.format not in wanted:
        raise ConfigError(
            f"objective {objective.name!r} trains on {wanted[0]} data, got {data.format!r} rows{_lacks(data, wanted[0])}; "
            f"see docs/data"
        )
    if (
        objective.needs_rewards
        and not online
        and data.format != "ranked"
        and not (data.format == "preference" and config.pair_rewards)
    ):
        raise ConfigError(
            f"objective {objective.name!r} needs rewards: give `rewards` to train online, rows with several scored completions, "
            f"or preference rows with pair_rewards: [0.5, -0.5]; got {data.format!r} rows"
        )
    if objective.needs_rewards and not online and data.format == "ranked" and objective.min_group > 1:
        small = [e.index for e in data.examples if len(e.completions) < objective.min_group]
        if small:
            raise ConfigError(
                f"objective {objective.name!r} compares answers of one prompt: completions must hold at least "
                f"{objective.min_group}, got 1 in {len(small)} of {len(data.examples)} rows (first: row {small[0]}); leave "
                f"those rows out, or use an objective without a baseline, e.g. dro"
            )
    scored = [sum(c.reward is not None and c.reward == c.reward for c in e.completions) for e in data.examples]
    if objective.needs_rewards and not online and data.format == "ranked" and max(scored) < objective.min_group:
        raise ConfigError(
            f"objective {objective.name!r} compares answers of one prompt, and no row has {objective.min_group} that are scored "
            f"(null and NaN mean unscored); give scores"
        )
    if config.pair_rewards is not None and (data.format != "preference" or not objective.needs_rewards):
        raise ConfigError(
            f"pair_rewards does nothing for objective {objective.name!r} on {data.format!r} rows; drop it"
        )
    if not online and not data.examples[0].completions:
        raise ConfigError(
            f"the rows hold prompts only{_lacks(data, 'prompt_completion')}; give `rewards` to sample answers online, or "
            f"rows with completions"
        )


def _check_imitation(objective: Objective, data: Any) -> None:
    """Bad answers are imitated where that was said in so many words, and nowhere else."""
    bad = {"preference": "rejected", "unpaired": "undesired"}.get(data.format)
    if bad is not None and any(term.imitates and term.rows is None for term in objective.terms):
        remedy = {
            "rejected": "set data_format: prompt_completion and columns: {completion: chosen}",
            "undesired": "give rows with desired answers alone",
        }[bad]
        raise ConfigError(
            f"objective {objective.name!r} on {data.format!r} rows would imitate the {bad} answers too; {remedy}. In a sum give "
            f"sft rows='chosen'; where both kinds are meant, rows='all' (objective_args: {{rows: all}})"
        )
    kept = any(term.rows == "chosen" for term in objective.terms)
    if bad is None and kept and not any(term.prefers for term in objective.terms):
        raise ConfigError(
            f"objective {objective.name!r} keeps a term to the chosen rows (rows='chosen'), and {data.format!r} rows have none; "
            f"give preference or unpaired rows, or drop rows"
        )


def check_held_out(config: Config, objective: Objective, train: Any, held_out: Any, *, online: bool) -> None:
    """Refuse evaluation rows that the objective could not train on: their numbers would mean something else.

    Raises:
        ConfigError: beginning with ``eval_data``.
    """
    try:
        check_data(config, objective, held_out, online=online)
    except ConfigError as error:
        raise ConfigError(f"eval_data: {error}") from error
    pairs = {"preference", "unpaired", "ranked"}
    if train.format != held_out.format and not online and {train.format, held_out.format} & pairs:
        raise ConfigError(
            f"eval_data holds {held_out.format!r} rows and train_data {train.format!r} rows; give evaluation rows of the same "
            f"format"
        )


def check_tokens(config: Config, tokenizer: Any) -> None:
    """Refuse ids that the tokenizer does not have: they would never end an answer."""
    known = max(tokenizer.get_vocab().values())
    for name in ("stop_token_ids", "end_token_ids"):
        for token in getattr(config, name):
            if token > known:
                raise ConfigError(
                    f"{name} holds {token}, and the ids of the tokenizer end at {known}, so it does nothing; correct it, or drop "
                    f"{name}"
                )


def note_positions(config: Config, model: Any, data: Any, *, online: bool) -> None:
    """Say once that rows are longer than what the model was made for: rotary positions go on, the model's sense may not."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(limit, int) or rope.get("rope_type", "default") != "default":
        return
    longest = max(len(e.prompt_ids) + max((len(c.ids) for c in e.completions), default=0) for e in data.examples)
    if online:
        longest = max(len(e.prompt_ids) for e in data.examples) + config.max_completion_length
    if longest > limit:
        logger.warning(
            f"rows may have {longest} tokens and the model was made for max_position_embeddings={limit}; where it has not "
            f"learned more, lower max_prompt_length (now {config.max_prompt_length}) or max_completion_length (now "
            f"{config.max_completion_length})"
        )


def _lacks(data: Any, form: str) -> str:
    """What keeps rows from being of another format, near misses of column names included."""
    from rlft.data.formats import check_format

    try:
        check_format(form, data.examples[0].columns)
    except ValueError as error:
        return f" ({error})"
    return ""
