"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder ``<run>/checkpoint-<step>`` of safetensors and JSON files with a manifest (sizes, SHA-256). It
is written under a temporary name, forced to disk, and renamed when it is whole; only then are older ones deleted. So at
every instant the last finished checkpoint is there and whole. Nothing here reads or writes pickle.

    save(run_dir, step, tensors={"model": ..., "optimizer": ...}, records={"trainer": {...}}, config_hash=...)
    checkpoint = load_latest(run_dir)
"""

from __future__ import annotations

from rlft._json import config_diff, config_hash
from rlft.checkpoint._errors import CheckpointError, CheckpointVersionError, CheckpointWarning
from rlft.checkpoint._manifest import FORMAT_VERSION, MANIFEST, Manifest, verify
from rlft.checkpoint._read import (
    Checkpoint,
    CheckpointInfo,
    checkpoint_name,
    find_best,
    find_latest,
    inspect,
    load,
    load_latest,
)
from rlft.checkpoint._remove import discard_newer, remove_stale, rotate
from rlft.checkpoint._state import fingerprint, optimizer_from_tensors, optimizer_to_tensors, rng_state, set_rng_state
from rlft.checkpoint._write import save

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointVersionError",
    "CheckpointWarning",
    "Manifest",
    "checkpoint_name",
    "config_diff",
    "config_hash",
    "discard_newer",
    "find_best",
    "find_latest",
    "fingerprint",
    "inspect",
    "load",
    "load_latest",
    "optimizer_from_tensors",
    "optimizer_to_tensors",
    "remove_stale",
    "rng_state",
    "rotate",
    "save",
    "set_rng_state",
    "verify",
]
