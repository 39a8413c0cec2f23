"""What is looked at before a folder from elsewhere is handed to a loader: no code, no pickles, no way out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["check_folder", "is_local", "not_from_hub", "read_json"]


def is_local(source: str | Path) -> bool:
    """Whether a source means a folder on this machine rather than a hub id.

    Raises:
        ValueError: when it is spelt like a path and no folder is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return True
    text = str(source)
    if isinstance(source, Path) or text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise ValueError(
            f"there is no folder {text}; give a folder with a config.json, or a hub id such as 'name/model'"
        )
    return False


def not_from_hub(what: str, source: Any, error: Exception) -> str:
    """What to say when the hub did not give something."""
    said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return (
        f"the {what} {str(source)!r} could not be loaded from the hub ({type(error).__name__}: {said:.300}); check the name, the "
        f"revision, your access (HF_TOKEN) and the connection, or give a local folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: naming the file, when it is not valid JSON or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers with thousands of digits, and nesting without end
        raise ValueError(f"{path} is not valid JSON ({error}); download or save it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_folder(folder: str | Path, *, trust_remote_code: bool, weights: str = "model") -> None:
    """Refuse a model folder that asks for its own code, holds only pickled weights, or points outside itself.

    Args:
        folder: the folder.
        trust_remote_code: allow ``auto_map`` (the folder's own Python code).
        weights: stem of the weight file, ``"model"`` or ``"adapter_model"``.

    Raises:
        ValueError: saying which file and what to do.
    """
    folder = Path(folder).expanduser()
    # loaders read more than is named here (tokenizer.json, vocabularies, templates), and know other names tomorrow
    templates = folder / "additional_chat_templates"
    for path in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        if path.is_file() or path.is_symlink():
            _contained(folder, str(path.relative_to(folder)), listed_in="the folder")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            if not trust_remote_code and _asks_for_code(read_json(path)):
                raise ValueError(
                    f"{path} names Python code of its own (auto_map), which would run on this machine; read that code "
                    f"first, then pass trust_remote_code=True, or use a model of a family that transformers ships"
                )
    for index in sorted(folder.glob("*.index.json")):
        mapping = read_json(index).get("weight_map", {})
        if not isinstance(mapping, dict):
            raise ValueError(f"weight_map of {index} must be an object of tensor name -> file name")
        for name in sorted({str(value) for value in mapping.values()}):
            if not name.endswith(".safetensors") and index.name.endswith(".safetensors.index.json"):
                raise ValueError(f"{index} lists {name!r}; only .safetensors files are loaded (pickles run code)")
            _contained(folder, name, listed_in=index.name)
    safe = sorted(folder.glob(f"{weights}*.safetensors"))
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(folder.glob(pattern))]
    if not safe and pickled:
        raise ValueError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is read; convert it to "
            f"safetensors with a machine you can lose (model.save_pretrained writes safetensors)"
        )


def _asks_for_code(config: dict[str, Any]) -> bool:
    """``auto_map`` anywhere in a config, also in those of its parts."""
    return any(
        (key == "auto_map" and bool(value)) or (isinstance(value, dict) and _asks_for_code(value))
        for key, value in config.items()
    )


def _contained(folder: Path, name: str, *, listed_in: str) -> None:
    """Refuse a file name that leads out of the folder, by its spelling or through a link."""
    parts = Path(name).parts
    if not name or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(
            f"{listed_in} of {folder} names {name!r}, which leads out of the folder; do not use this model"
        )
    roots = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":  # the hub's cache: files are links into a folder beside it
        roots.append((folder.absolute().parent.parent / "blobs").resolve())
    target = (folder / name).resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{folder / name} is a link to a file outside the folder; copy the file into it")
