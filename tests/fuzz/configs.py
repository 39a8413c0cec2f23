"""Mutated configurations: settings, YAML and overrides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rlft import recipes
from rlft.config import Config, load_config
from tests.fuzz import mutate
from tests.fuzz.bounds import Tally

ROOT = Path(__file__).parents[2]
FIELDS = [f.name for f in dataclasses.fields(Config)]
#: What decides how large a model or a run is: left alone where a run is built.
_SIZES = frozenset(
    {"model", "tokenizer", "ref_model", "reward_model", "train_data", "eval_data", "rewards", "output_dir", "critic"}
)


def bases() -> list[dict[str, Any]]:
    """Every configuration that comes with the library, and one with each field at its default."""
    found = [
        yaml.safe_load(p.read_text()) for p in sorted(ROOT.glob("configs/*/*.yaml")) if p.parent.name != "accelerate"
    ]
    return [*found, {**dataclasses.asdict(Config()), "objective": "dpo", "beta": 0.1}]


def mutated(rng: Random, base: dict[str, Any]) -> tuple[bytes, list[str]]:
    """A file and overrides."""
    settings = dict(base)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        settings = mutate.value(rng, settings, FIELDS)
        if not isinstance(settings, dict):
            break
    if rng.random() < 0.5:
        written = mutate.as_json(settings)
    else:
        try:
            written = yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, RecursionError):
            written = mutate.as_json(settings)
    kind = rng.random()
    if kind < 0.3:
        written = mutate.text(rng, written)
    elif kind < 0.5:
        written = mutate.raw(rng, written)
    overrides = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        key = rng.choice(
            (
                rng.choice(FIELDS),
                rng.choice(FIELDS),
                "objective_args.beta",
                "objective_args",
                "a.b.c",
                "",
                "=",
                "--beta",
            )
        )
        said = json.dumps(mutate.odd(rng)) if rng.random() < 0.5 else rng.choice(mutate.TOKENS)
        overrides.append(f"{key}={said}" if rng.random() < 0.9 else f"{key}{said}")
    return written, overrides


def series(count: int, folder: Path, *, start: int = 0) -> Tally:
    """Load each file; where that works, hash it and look the objective up."""
    tally, starts = Tally("configurations"), bases()
    path = folder / "run.yaml"

    def attempt() -> None:
        config = load_config(path, overrides)
        config.digest()
        hyper = config.objective_hyper()
        if config.objective:
            recipes.build(config.objective, **hyper)

    for seed in range(start, start + count):
        rng = Random(f"config/{seed}")
        written, overrides = mutated(rng, rng.choice(starts))
        path.write_bytes(written)
        tally.run(f"config {seed}", attempt)
    return tally


def small(folder: Path) -> dict[str, Any]:
    """A run of a few thousand weights."""
    from tests.bad_input.common import MODEL, PAIRS

    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return {
        "objective": "dpo", "beta": 0.1, "model": MODEL, "tokenizer": {"kind": "char"}, "train_data": str(data), "max_steps": 1,
        "per_device_train_batch_size": 4, "output_dir": str(folder / "run"), "report_to": [], "disable_tqdm": True,
        "max_prompt_length": 8, "max_completion_length": 6,
    }  # fmt: skip


def commands(count: int, folder: Path, said: Callable[[], str], *, start: int = 0) -> Tally:
    """``rlft train --dry-run`` on settings that parse: exit code 0 or 2, one message, no traceback.

    Args:
        count: how many.
        folder: where files go.
        said: what the command has printed since the last call.
        start: number of the first.
    """
    from rlft import cli

    tally, base = Tally("commands"), small(folder)
    path = folder / "run.yaml"
    usable = [name for name in FIELDS if name not in _SIZES]

    def attempt() -> None:
        code = cli.main(["train", str(path), "--dry-run"])
        heard = said()
        if code not in (0, 2) or "Traceback" in heard or "--traceback shows where" in heard:
            raise RuntimeError(f"exit code {code}: {heard[-300:]}")
        if code:
            raise ValueError("refused")

    path.write_bytes(mutate.as_json(base))
    assert cli.main(["train", str(path), "--dry-run"]) == 0, said()  # imports are over
    for seed in range(start, start + count):
        rng = Random(f"command/{seed}")
        settings = dict(base)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(usable)
            default = getattr(Config(), key)
            settings[key] = mutate.value(rng, default) if rng.random() < 0.7 else mutate.odd(rng)
        path.write_bytes(mutate.as_json(settings))
        tally.run(
            f"command {seed} {settings.keys() - base.keys()}",
            attempt,
            lambda e: type(e) is ValueError and str(e) == "refused",
        )
    return tally
