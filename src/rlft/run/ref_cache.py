"""Reference log-probs of a dataset, computed once and kept on disk.

A file belongs to a key: the reference's weights and config, the tokens of the data (and with them the tokenizer, the template
and the lengths), the precision, and the versions that computed it. Anything else is another key and is computed anew.

``<key>.json`` names a safetensors file and its SHA-256 and is renamed into place last, so a reader finds a whole entry or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlft._files import hash_file, make_dir, move, remove_file, replace_file
from rlft.checkpoint._tensorfile import read_tensors, tensor_bytes, write_tensors
from rlft.run import display
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.data import Example
    from rlft.trainer import Trainer

__all__ = ["RefLogps", "folder", "key", "prepare"]

#: Files on their way to a name, and seconds without a write after which their run is taken for gone.
_WORK, _LEFT = re.compile(r"\.tmp-(.*\.json-)?[0-9a-f]{32}"), 3600.0
#: Of the files; another number is another key.
FORMAT = 1


class RefLogps:
    """Log-probs of every answer of some datasets under the reference."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}
        self._kept: list[Sequence[Example]] = []  # an id belongs to its object for as long as that lives

    def add(self, examples: Sequence[Example], flat: Tensor) -> None:
        """Take in a dataset.

        Args:
            examples: its examples.
            flat: the log-probs of all tokens of all answers, in order.
        """
        self._kept.append(examples)
        pieces = iter(flat.split([len(c.ids) for e in examples for c in e.completions]))
        for example in examples:
            self._rows[id(example)] = [next(pieces) for _ in example.completions]

    def fill(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        """The batch with ``ref_logps``, where all its examples are known; else as it is."""
        if not all(id(example) in self._rows for example in examples):
            return batch
        padded = pad_sequence([row for example in examples for row in self._rows[id(example)]], batch_first=True)
        width = batch.completion_ids.shape[1]
        padded = torch.nn.functional.pad(padded, (0, width - padded.shape[1]))
        return batch.replace(ref_logps=padded.to(batch.device))


def prepare(trainer: Trainer) -> RefLogps:
    """Read or compute the log-probs of the training and the held-out data, if the run asks for it. Collective."""
    found = RefLogps()
    if not trainer.config.precompute_ref_log_probs:
        return found
    if trainer.is_main:
        _clear(folder(trainer))
    reference = _digest(trainer)
    for name, data in (("training", trainer.train_data), ("held-out", trainer.eval_data)):
        if data is not None:
            facts = _facts(trainer, data, reference)
            found.add(data.examples, _read_or_compute(trainer, name, data, facts))
    return found


def folder(trainer: Trainer) -> Path:
    """Where the files are: shared by all runs beside each other, unless the run names a place."""
    given = trainer.config.ref_cache_dir
    return Path(given) if given is not None else trainer.run_dir.parent / "ref-log-probs"


def key(facts: dict[str, Any]) -> str:
    """A name for everything that decides the numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _facts(trainer: Trainer, data: Any, reference: str) -> dict[str, Any]:
    import transformers

    from rlft._version import __version__

    c = trainer.config
    return {
        "format": FORMAT,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "reference": reference,
        "data": data.fingerprint,
        "precision": [c.dtype, c.mixed_precision],
        "temperature": trainer.scoring_temperature,
        "tokens": sum(len(answer.ids) for e in data.examples for answer in e.completions),
    }


def _digest(trainer: Trainer) -> str:
    """SHA-256 of the reference: its config, and name, type, shape and bytes of its tensors. Collective where sharded."""
    configs, tensors = trainer.policy.reference_identity()
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor: Any = tensors[name].detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _clear(place: Path) -> None:
    """Delete what killed runs were writing. A younger file may be on its way: other runs share the folder."""
    for path in place.glob(".tmp-*") if place.is_dir() else ():
        with contextlib.suppress(OSError):  # another run may have cleared it, or may not let this one do it
            if _WORK.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _LEFT:
                remove_file("ref_cache.stale", path)


# -- one dataset ------------------------------------------------------------------------------------------------------
def _read_or_compute(trainer: Trainer, name: str, data: Any, facts: dict[str, Any]) -> Tensor:
    place, stem = folder(trainer), key(facts)
    flat = _read(place, stem, facts["tokens"]) if trainer.is_main else None
    missing = torch.tensor([float(trainer.is_main and flat is None)], device=trainer.device)
    if float(trainer.accelerator.reduce(missing, reduction="sum")):
        display.note(trainer, f"reference log-probs of the {name} data: computing {facts['tokens']:,} tokens")
        flat = _compute(trainer, data.examples)
        if trainer.is_main:
            _write(place, stem, flat, facts)
        return flat
    display.note(trainer, f"reference log-probs of the {name} data: read from {place / stem}.json")
    if trainer.world_size > 1:
        from accelerate.utils import broadcast

        double = next(trainer.policy.parameters()).dtype == torch.float64
        empty = torch.zeros(facts["tokens"], dtype=torch.float64 if double else torch.float32)
        flat = broadcast((empty if flat is None else flat).to(trainer.device)).cpu()  # type: ignore[union-attr]
    assert flat is not None
    return flat


@torch.no_grad()
def _compute(trainer: Trainer, examples: Sequence[Example]) -> Tensor:
    """``[N]`` log-probs of all answers' tokens, in order; every process scores its share."""
    from rlft.data import collate

    counts = [sum(len(c.ids) for c in e.completions) for e in examples]
    mine = range(trainer.rank, len(examples), trainer.world_size)
    # neighbours of one length waste the least padding
    order = sorted(
        mine, key=lambda i: (len(examples[i].prompt_ids) + max(len(c.ids) for c in examples[i].completions), i)
    )
    chunks = _chunks(trainer, [examples[i] for i in order])
    most = torch.tensor([len(chunks)], device=trainer.device)
    most = int(trainer.accelerator.gather(most).max())
    pad_id, found = trainer.tokenizer.pad_token_id or 0, []
    for turn in range(most):  # sharded forward passes wait for each other: as many on every process
        trainer.poll(boundary=True)
        batch = collate(chunks[min(turn, len(chunks) - 1)], pad_id=pad_id).to(trainer.device)
        with trainer.meter.phase("reference"):
            logps = trainer.forward(batch, frozenset({"ref_logps"}))["ref_logps"]
        if turn < len(chunks):
            found.append(logps[batch.completion_mask].cpu())
    flat = torch.cat(found)
    parts = dict(zip(order, flat.split([counts[i] for i in order]), strict=True))
    if trainer.world_size > 1:
        parts = _from_all(trainer, torch.cat([parts[i] for i in mine]), counts)
    return torch.cat([parts[i] for i in range(len(examples))])


def _chunks(trainer: Trainer, examples: Sequence[Example]) -> list[list[Example]]:
    """Examples for one forward pass each: as many rows as a micro-batch, or as many tokens as one may have."""
    budget, rows_at_once = trainer.config.max_tokens_per_micro_batch, max(1, trainer.plan.micro_batch_rows)
    chunks: list[list[Example]] = []
    rows = 0
    for example in examples:
        count = len(example.completions)
        width = len(example.prompt_ids) + max(len(c.ids) for c in example.completions)  # they come by length
        full = (rows + count) * width > budget if budget is not None else rows + count > rows_at_once
        if not chunks or full:
            chunks.append([])
            rows = 0
        chunks[-1].append(example)
        rows += count
    return chunks


def _from_all(trainer: Trainer, flat: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """Every process's share, by example."""
    world = trainer.world_size
    shares = [[counts[i] for i in range(rank, len(counts), world)] for rank in range(world)]
    width = max(sum(share) for share in shares)
    padded = torch.nn.functional.pad(flat, (0, width - flat.numel()))[None].to(trainer.device)
    everything = trainer.accelerator.gather(padded).cpu()
    parts: dict[int, Tensor] = {}
    for rank, share in enumerate(shares):
        for turn, piece in enumerate(everything[rank, : sum(share)].split(share)):
            parts[rank + turn * world] = piece
    return parts


# -- on disk ------------------------------------------------------------------------------------------------------------
def _read(place: Path, stem: str, tokens: int) -> Tensor | None:
    """The values of an entry; None where there is none, or, with a warning, where it does not verify."""
    record = place / f"{stem}.json"
    if not record.exists():
        return None
    try:
        said = json.loads(record.read_text(encoding="utf-8"))
        path = place / Path(str(said["file"])).name
        if hash_file(path).sha256 != said["sha256"]:
            raise ValueError(f"{path.name} is not the file that was written")
        flat = read_tensors(path)["ref_logps"]
        if flat.shape != (tokens,) or not bool(torch.isfinite(flat).all()):
            raise ValueError(f"{path.name} holds {list(flat.shape)} values, expected {tokens} finite ones")
        return flat
    except (OSError, ValueError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        warnings.warn(
            f"the reference log-probs in {record} cannot be used ({error}) and are computed again; delete the file if this "
            f"comes back",
            stacklevel=2,
        )
        return None


def _write(place: Path, stem: str, flat: Tensor, facts: dict[str, Any]) -> None:
    """Values first, then the record that names them. A disk that refuses costs the cache, not the run."""
    try:
        make_dir("ref_cache.mkdir", place, exist_ok=True)
        work = place / f".tmp-{uuid.uuid4().hex}"
        try:
            written = write_tensors(work, {"ref_logps": flat})
            file = f"{stem}-{written.sha256[:12]}.safetensors"  # another run's values never stand under this record
            move("ref_cache.rename", work, place / file)
        finally:
            if work.exists():
                remove_file("ref_cache.discard", work)
        record = {"file": file, "sha256": written.sha256, "facts": facts}
        replace_file("ref_cache", place / f"{stem}.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        warnings.warn(
            f"reference log-probs could not be kept in {place}: {error}; the next run computes them again. Set ref_cache_dir to "
            f"a folder that can be written",
            stacklevel=2,
        )
