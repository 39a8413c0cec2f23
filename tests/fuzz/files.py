"""Mutated files of every kind that is read: checkpoints, tensors, adapters, data, logs."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from rlft import checkpoint, models
from rlft._json import loads
from rlft.checkpoint._manifest import _sealed
from rlft.checkpoint._tensorfile import read_tensors, write_tensors
from rlft.data import load_rows, tokenize
from rlft.metrics import read_metrics
from tests.fuzz import mutate
from tests.fuzz.bounds import Tally

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "bias": torch.arange(3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(4)],
    "completion": [{"prompt": f"{i}=", "completion": "a, b" * (i + 1), "answer": i, "weight": i / 3} for i in range(4)],
    "ranked": [{"prompt": f"{i}=", "completions": ["a", "bc"], "scores": [1.0, 0.5]} for i in range(4)],
    "chat": [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "completion": [{"role": "assistant", "content": "ja"}]} for i in range(4)
    ],
}  # fmt: skip


def header(rng: Random, given: bytes) -> bytes:
    """A safetensors file whose header is sound JSON and says something else."""
    size = int.from_bytes(given[:8], "little")
    parsed = json.loads(given[8 : 8 + size])
    for _ in range(rng.randint(1, 2)):
        parsed = mutate.value(rng, parsed)
    text = mutate.as_json(parsed)
    return len(text).to_bytes(8, "little") + text + given[8 + size :]


def damaged(rng: Random, given: bytes, *deeper: Callable[[Random, bytes], bytes]) -> bytes:
    """Bytes mutated as bytes, as text, or by what knows the format."""
    return rng.choice((mutate.raw, mutate.raw, *deeper, *deeper))(rng, given)


def json_values(rng: Random, given: bytes) -> bytes:
    """JSON whose values are others."""
    return mutate.as_json(mutate.value(rng, json.loads(given)))


# -- checkpoints --------------------------------------------------------------------------------------------------------
def tensors(count: int, folder: Path, *, start: int = 0) -> Tally:
    """A safetensors file as the checkpoint reader meets it after its hash was found right."""
    tally, path = Tally("safetensors"), folder / "t.safetensors"
    write_tensors(path, TENSORS)
    sound = path.read_bytes()
    for seed in range(start, start + count):
        rng = Random(f"tensors/{seed}")
        path.write_bytes(damaged(rng, sound, header))
        tally.run(f"safetensors {seed}", lambda: read_tensors(path))
    return tally


def manifests(count: int, folder: Path, *, start: int = 0) -> Tally:
    """Manifests, sealed again or not, and records under a manifest that fits them."""
    tally = Tally("manifests")
    run = folder / "run"
    checkpoint.save(
        run, 3, tensors={"model": TENSORS}, records={"trainer": {"a": 1, "b": [1.5, None, "x"]}}, config_hash="0" * 64
    )
    place = run / "checkpoint-3"
    path, record = place / checkpoint.MANIFEST, place / "trainer.json"
    sound, kept = path.read_bytes(), record.read_bytes()
    body = {key: value for key, value in loads(sound).items() if key != "seal"}
    for seed in range(start, start + count):
        rng = Random(f"manifest/{seed}")
        kind = rng.randrange(4)
        record.write_bytes(kept)
        if kind == 0:
            written = damaged(rng, sound, mutate.text, json_values)
        elif kind == 1:
            record.write_bytes(changed := damaged(rng, kept, mutate.text, json_values))
            entry = {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
            written = _sealed({**body, "files": {**body["files"], "trainer.json": entry}})
        else:
            try:
                written = _sealed(mutate.value(rng, body))
            except (ValueError, TypeError, AttributeError):  # has no exact JSON form
                written = json_values(rng, sound)
        path.write_bytes(written)
        tally.run(f"manifest {seed}", lambda: checkpoint.load(place))
        assert all(isinstance(info.problem, str) for info in checkpoint.inspect(run))
    return tally


# -- adapters -----------------------------------------------------------------------------------------------------------
def adapters(count: int, folder: Path, *, start: int = 0) -> Tally:
    """An adapter folder loaded onto the base it was made for."""
    from tests.tiny import tiny_llama

    tally, place = Tally("adapters"), folder / "adapter"
    base = tiny_llama()
    wrapped = models.add_lora(copy.deepcopy(base), models.LoraSettings(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(place)
    config, weights = place / "adapter_config.json", place / "adapter_model.safetensors"
    sound, bits = config.read_bytes(), weights.read_bytes()
    for seed in range(start - 1, start + count):
        rng = Random(f"adapter/{seed}")
        config.write_bytes(sound)
        weights.write_bytes(bits)
        if seed >= start:
            if rng.random() < 0.7:
                config.write_bytes(damaged(rng, sound, json_values, json_values, mutate.text))
            else:
                weights.write_bytes(damaged(rng, bits, header))
        model = copy.deepcopy(base)
        if seed < start:  # imports are over
            models.load_adapter(place, model=model)
            continue
        tally.run(f"adapter {seed}", lambda model=model: models.load_adapter(place, model=model))
    return tally


def models_on_disk(count: int, folder: Path, *, start: int = 0) -> Tally:
    """The weights of a model folder."""
    from tests.tiny import tiny_llama

    tally, place = Tally("model weights"), folder / "model"
    tiny_llama().save_pretrained(place)
    path = place / "model.safetensors"
    sound = path.read_bytes()
    models.load_causal_lm(place)  # imports are over
    for seed in range(start, start + count):
        rng = Random(f"model/{seed}")
        path.write_bytes(rng.choice((mutate.raw, header, header))(rng, sound))
        tally.run(f"model {seed}", lambda: models.load_causal_lm(place))
    return tally


# -- data ---------------------------------------------------------------------------------------------------------------
def data_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every kind of data file with every kind of rows it can hold."""
    import pyarrow as pa
    import pyarrow.parquet

    for name, rows in ROWS.items():
        yield f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
        yield f"{name}.json", json.dumps(rows).encode()
        table = pa.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "x.parquet")
        yield f"{name}.parquet", (folder / "x.parquet").read_bytes()
        with pa.OSFile(str(folder / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        yield f"{name}.arrow", (folder / "x.arrow").read_bytes()
        if name in ("preference", "completion"):
            lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
            yield f"{name}.csv", "\n".join(lines).encode()


def data(
    count: int, folder: Path, *, start: int = 0, kinds: tuple[str, ...] = ("jsonl", "json", "csv", "parquet", "arrow")
) -> Tally:
    """Data files, read and tokenised."""
    from tests.tiny import char_tokenizer

    tally, tokenizer = Tally("data files"), char_tokenizer(chat_template=True)
    place = folder / "data"
    place.mkdir()
    found = [(name, sound) for name, sound in data_files(folder) if name.rpartition(".")[2] in kinds]

    def attempt() -> None:
        tokenize(load_rows(path), tokenizer, max_prompt_length=16, max_completion_length=16, max_bad_fraction=1.0)

    for seed in range(start - 1, start + count):
        rng = Random(f"data/{seed}")
        name, sound = found[rng.randrange(len(found))]
        path = place / name
        if seed < start:
            path.write_bytes(sound)
            attempt()
            continue
        if name.endswith((".jsonl", ".json", ".csv")):
            inner = [] if name.endswith(".csv") else [json_rows(name)]
            path.write_bytes(damaged(rng, sound, mutate.text, *inner, *inner))
        else:
            path.write_bytes(mutate.raw(rng, sound))
        tally.run(f"data {seed} {name}", attempt)
        path.unlink()
    return tally


def json_rows(name: str) -> Callable[[Random, bytes], bytes]:
    """Rows with other values."""

    def change(rng: Random, given: bytes) -> bytes:
        if name.endswith(".json"):
            return json_values(rng, given)
        lines = given.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json_values(rng, lines[at])
        return b"\n".join(lines)

    return change


# -- logs ---------------------------------------------------------------------------------------------------------------
def logs(count: int, folder: Path, *, start: int = 0) -> Tally:
    """The log of a run."""
    tally, path = Tally("logs"), folder / "metrics.jsonl"
    sound = "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "kl": "nan"}) + "\n" for i in range(4)).encode()
    for seed in range(start, start + count):
        rng = Random(f"log/{seed}")
        path.write_bytes(damaged(rng, sound, mutate.text, json_rows("x.jsonl")))
        tally.run(f"log {seed}", lambda: read_metrics(path))
    return tally


SERIES: dict[str, Callable[..., Tally]] = {
    "safetensors": tensors,
    "manifests": manifests,
    "adapters": adapters,
    "models": models_on_disk,
    "data": data,
    "logs": logs,
}


def clean(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
