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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft._files import hash_file, make_dir, move, remove_file, replace_file
from rlft.checkpoint._tensorfile import read_tensors, tensor_bytes, write_tensors
from rlft.config import Config
from rlft.run.step.collate import RefLogps
from rlft.run.step.parts import Parts

__all__ = ["RefLogpCache", "key", "ref_logps_dir"]

#: Files on their way to a name, and seconds without a write after which their run is taken for gone.
_WORK, _LEFT = re.compile(r"\.tmp-(.*\.json-)?[0-9a-f]{32}"), 3600.0
#: Of the files; another number is another key.
FORMAT = 1


def ref_logps_dir(config: Config) -> Path:
    """Where the files are: shared by all runs beside each other, unless the run names a place."""
    given = config.ref_cache_dir
    return Path(given) if given is not None else Path(config.output_dir).parent / "ref-log-probs"


def key(facts: dict[str, Any]) -> str:
    """A name for everything that decides the numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class RefLogpCache:
    """Reads or computes the log-probs of whole datasets. It holds nothing of its own.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.policy, self.pad_id = parts.config, parts.policy, parts.tokenizer.pad_token_id or 0
        self.processes, self.journal, self.stages = parts.processes, parts.journal, parts.stages
        self.rows_at_once, self.temperature = max(1, parts.sizes.micro_batch_rows), parts.temperature
        self.folder = ref_logps_dir(parts.config)

    def of(self, datasets: Mapping[str, Any]) -> RefLogps:
        """Read or compute the log-probs of named datasets; one that is None is left out. Collective."""
        found = RefLogps()
        if self.processes.is_main:
            _clear(self.folder)
        reference = self._digest()
        for name, data in datasets.items():
            if data is None:
                continue
            found.add(data.examples, self._read_or_compute(name, data, self._facts(data, reference)))
        return found

    def _facts(self, data: Any, reference: str) -> dict[str, Any]:
        import transformers

        from rlft._version import __version__

        return {
            "format": FORMAT,
            "versions": [__version__, torch.__version__, transformers.__version__],
            "reference": reference,
            "data": data.fingerprint,
            "precision": [self.config.dtype, self.config.mixed_precision],
            "temperature": self.temperature,
            "tokens": sum(len(answer.ids) for e in data.examples for answer in e.completions),
        }

    def _digest(self) -> str:
        """SHA-256 of the reference: its config, and name, type, shape and bytes of its tensors. Collective where sharded."""
        configs, tensors = self.policy.reference_identity()
        digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
        for name in sorted(tensors):
            tensor: Any = tensors[name].detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    # -- one dataset --------------------------------------------------------------------------------------------------------
    def _read_or_compute(self, name: str, data: Any, facts: dict[str, Any]) -> Tensor:
        place, stem, is_main = self.folder, key(facts), self.processes.is_main
        flat = _read(place, stem, facts["tokens"]) if is_main else None
        if float(self.processes.sum(torch.tensor([float(is_main and flat is None)]))):
            self.journal.note(f"reference log-probs of the {name} data: computing {facts['tokens']:,} tokens")
            flat = self._compute(data.examples)
            if is_main:
                _write(place, stem, flat, facts)
            return flat
        self.journal.note(f"reference log-probs of the {name} data: read from {place / stem}.json")
        if self.processes.world_size > 1:
            from accelerate.utils import broadcast

            double = next(self.policy.parameters()).dtype == torch.float64
            empty = torch.zeros(facts["tokens"], dtype=torch.float64 if double else torch.float32)
            flat = broadcast((empty if flat is None else flat).to(self.processes.device)).cpu()  # type: ignore[union-attr]
        assert flat is not None
        return flat

    @torch.no_grad()
    def _compute(self, examples: Sequence[Any]) -> Tensor:
        """``[N]`` log-probs of all answers' tokens, in order; every process scores its share."""
        from rlft.data import collate

        processes = self.processes
        counts = [sum(len(c.ids) for c in e.completions) for e in examples]
        mine = range(processes.rank, len(examples), processes.world_size)
        # neighbours of one length waste the least padding
        order = sorted(
            mine, key=lambda i: (len(examples[i].prompt_ids) + max(len(c.ids) for c in examples[i].completions), i)
        )
        chunks = self._chunks([examples[i] for i in order])
        found = []
        for turn in range(processes.most(len(chunks))):  # sharded passes wait for each other: as many on every process
            processes.poll(boundary=True)
            batch = collate(chunks[min(turn, len(chunks) - 1)], pad_id=self.pad_id).to(processes.device)
            with self.journal.meter.phase("reference"):
                logps = self.stages.forward(batch, frozenset({"ref_logps"}))["ref_logps"]
            if turn < len(chunks):
                found.append(logps[batch.completion_mask].cpu())
        flat = torch.cat(found)
        parts = dict(zip(order, flat.split([counts[i] for i in order]), strict=True))
        if processes.world_size > 1:
            parts = self._from_all(torch.cat([parts[i] for i in mine]), counts)
        return torch.cat([parts[i] for i in range(len(examples))])

    def _chunks(self, examples: Sequence[Any]) -> list[list[Any]]:
        """Examples for one forward pass each: as many rows as a micro-batch, or as many tokens as one may have."""
        budget = self.config.max_tokens_per_micro_batch
        chunks: list[list[Any]] = []
        rows = 0
        for example in examples:
            count = len(example.completions)
            width = len(example.prompt_ids) + max(len(c.ids) for c in example.completions)  # they come by length
            full = (rows + count) * width > budget if budget is not None else rows + count > self.rows_at_once
            if not chunks or full:
                chunks.append([])
                rows = 0
            chunks[-1].append(example)
            rows += count
        return chunks

    def _from_all(self, flat: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
        """Every process's share, by example."""
        world = self.processes.world_size
        shares = [[counts[i] for i in range(rank, len(counts), world)] for rank in range(world)]
        width = max(sum(share) for share in shares)
        everything = self.processes.gather(torch.nn.functional.pad(flat, (0, width - flat.numel()))[None]).cpu()
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


def _clear(place: Path) -> None:
    """Delete what killed runs were writing. A younger file may be on its way: other runs share the folder."""
    for path in place.glob(".tmp-*") if place.is_dir() else ():
        with contextlib.suppress(OSError):  # another run may have cleared it, or may not let this one do it
            if _WORK.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _LEFT:
                remove_file("ref_cache.stale", path)
