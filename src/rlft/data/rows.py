"""Where rows come from: :func:`load_rows` reads files, folders, globs, hub names and objects in memory.

Files are read here, row by row, into plain Python objects: nothing is cached or written, every row remembers its file
and line, and nothing is guessed into it (Arrow tables fill absent keys of messages and tools with None).
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from rlft import _check
from rlft.data.files import SUFFIXES, read_file
from rlft.data.hub import fetch, is_hub_name

__all__ = ["Rows", "load_rows"]

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_METADATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})


class Rows(Sequence[dict[str, Any]]):
    """Rows of a dataset: a sequence of dicts that knows its column names and where each row came from.

    Args:
        table: a list of mappings or a ``datasets.Dataset``; never changed.
        places: for each row a text such as ``train.jsonl:17``, used in messages.
        columns: renames, expected name -> name in the data.
        indices: which rows of ``table``, in which order; None means all.
    """

    __slots__ = ("_indices", "_places", "_renames", "_table", "column_names")

    def __init__(
        self,
        table: Any,
        *,
        places: Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._table = table
        self._places = places
        self._indices = indices
        if hasattr(table, "column_names"):
            present: list[str] = list(table.column_names)
        else:
            present = list(dict.fromkeys(name for row in table for name in row))
        self._renames = _renames(columns or {}, present)
        self.column_names: list[str] = [self._renames.get(name, name) for name in present]

    def __len__(self) -> int:
        return len(self._table) if self._indices is None else len(self._indices)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        position = range(len(self))[index]
        return self._renamed(self._table[position if self._indices is None else self._indices[position]])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._indices is None:  # a datasets.Dataset is much faster this way than row by row
            return map(self._renamed, iter(self._table))
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows, columns {self.column_names})"

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {self._renames.get(name, name): value for name, value in row.items()}

    def where(self, index: int) -> str:
        """The place a row came from, for messages: ``train.jsonl:17``, or ``row 16``."""
        original = index if self._indices is None else self._indices[index]
        return f"row {original}" if self._places is None else self._places[original]

    def select(self, indices: Sequence[int]) -> Rows:
        """The given rows, in that order."""
        chosen = [range(len(self))[i] for i in indices]
        picked = Rows.__new__(Rows)
        picked._table, picked._places, picked._renames = self._table, self._places, self._renames
        picked._indices = chosen if self._indices is None else [self._indices[i] for i in chosen]
        picked.column_names = self.column_names
        return picked

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Rows, Rows]:
        """Hold rows out: ``(kept, held_out)``, with every prompt on one side only.

        Which side a prompt falls on is drawn from ``seed``; rows keep their order. Repeated prompts go together, so
        the held-out share is ``fraction`` up to the size of one such set.

        Args:
            fraction: share of the rows to hold out, between 0 and 1, both excluded.
            seed: of the draw.

        Raises:
            ValueError: the fraction is out of range, or leaves a side without rows.
        """
        _check.number("fraction", fraction, low=0.0, high=1.0, open_low=True)
        members: dict[str, list[int]] = {}
        for index, row in enumerate(self):
            key = next((row[name] for name in ("prompt", "messages", "chosen", "text") if row.get(name)), row)
            members.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(index)
        keys = sorted(members, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode("utf-8", "replace")).digest())
        held: set[int] = set()
        goal = max(1, round(fraction * len(self)))
        for key in keys:
            if len(held) >= goal:
                break
            held.update(members[key])
        kept = [i for i in range(len(self)) if i not in held]
        if not kept or not held:
            raise ValueError(
                f"holding out {fraction:g} of {len(self)} rows with {len(keys)} different prompts leaves one side "
                f"empty; give more rows or another fraction"
            )
        return self.select(kept), self.select(sorted(held))


def _renames(columns: Mapping[str, str], present: list[str]) -> dict[str, str]:
    """``{name in the data: expected name}``, checked."""
    for expected, name in columns.items():
        if name not in present:
            raise ValueError(
                f"columns={{{expected!r}: {name!r}}} names a column that is not there{_check.suggestion(name, present)}"
            )
        if expected in present and columns.get(expected) == expected:
            continue
        if expected in present and expected not in columns.values():
            raise ValueError(
                f"columns={{{expected!r}: {name!r}}} would hide the data's own column {expected!r}; "
                f"rename that one too, or drop the rename"
            )
    if len(set(columns.values())) != len(columns):
        raise ValueError(f"columns={dict(columns)} uses one column of the data under two names; keep one")
    return {name: expected for expected, name in columns.items()}


def load_rows(
    source: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> Rows:
    """Rows from wherever they are.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.arrow`` file, a glob, a list of those; a folder
            of such files (``train.jsonl``, ``data/test-00000.parquet``, or one made by ``save_to_disk``); the name of
            a dataset on the hub (fetched by ``datasets`` into its usual cache); a ``datasets.Dataset`` or
            ``DatasetDict``; a list of dicts; or :class:`Rows`.
        split: which part of a folder, hub dataset or ``DatasetDict``.
        columns: renames, expected name -> name in the data, e.g. ``{"prompt": "question"}``.
        name: configuration of a hub dataset, or sub-folder of a folder.
        revision: revision of a hub dataset.

    Returns:
        The rows. Remote code is never run: datasets that are scripts are refused.

    Raises:
        ValueError: nothing is there, it is empty, or it cannot be read; the message names the file and line.
    """
    rows = _load(source, split, name, revision)
    if len(rows) == 0:
        raise ValueError(f"{_describe(source)} holds no rows (split {split!r}); give data with at least one row")
    if columns:
        rows = Rows(rows, places=_Places(rows), columns=columns)
    return rows


class _Places(Sequence[str]):
    """The places of rows that are wrapped again."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows.where(index)


def _describe(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"


def _load(source: Any, split: str, name: str | None, revision: str | None) -> Rows:
    if isinstance(source, Rows):
        return source
    if isinstance(source, (str, Path)):
        return _load_path(source, split, name, revision)
    if type(source).__module__.partition(".")[0] == "datasets":
        return _from_datasets(source, split)
    if isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        return _concatenate([_load_path(item, split, name, revision) for item in source])
    if isinstance(source, Sequence):
        for index, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {index} must be a dict {{column: value}}, got {type(row).__name__}")
        return Rows(list(source))
    raise ValueError(
        f"cannot read rows from a {type(source).__name__}; give a path, a hub name, a datasets.Dataset or a list of "
        f"dicts (with streaming: true also a function that yields rows)"
    )


def _from_datasets(source: Any, split: str) -> Rows:
    import datasets

    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise ValueError(
                f"the DatasetDict has no split {split!r}{_check.suggestion(split, [str(key) for key in source])}"
            )
        source = source[split]
    if not isinstance(source, datasets.Dataset):
        raise ValueError(f"a {type(source).__name__} has no length; give a datasets.Dataset, or set streaming: true")
    return Rows(source.with_format(None))  # a "torch" or "numpy" format would turn cells into tensors


def _concatenate(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part]
    return Rows(rows, places=[part.where(i) for part in parts for i in range(len(part))])


# -- paths -------------------------------------------------------------------------------------------------------------
def _load_path(source: str | Path, split: str, name: str | None, revision: str | None) -> Rows:
    path = Path(source).expanduser()
    if path.is_file():
        return _read([path])
    if path.is_dir():
        return _load_folder(path / name if name else path, split)
    text = str(source)
    if glob.has_magic(text):
        found = sorted(Path(item) for item in glob.glob(str(path), recursive=True))
        found = [item for item in found if item.is_file()]
        if not found:
            raise ValueError(f"{text!r} matches no file; check the pattern (it is relative to the working directory)")
        root = Path(*_before_magic(path))
        return _read([_contained(item, root) for item in found])
    if not is_hub_name(source):
        raise ValueError(f"{text!r} is not there; give a file, a folder, a glob or the name of a dataset on the hub")
    return _load_hub(text, split, name, revision)


def _before_magic(path: Path) -> Iterator[str]:
    for part in path.parts:
        if glob.has_magic(part):
            return
        yield part


def _contained(path: Path, root: Path) -> Path:
    """Refuse a link that leads out of the folder (the hub's cache, whose snapshots are links to blobs, excepted)."""
    real, base = path.resolve(), root.resolve()
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ValueError(f"{path} is a link out of {root}; copy the file there, or give its own path")
    return path


def _read(paths: list[Path]) -> Rows:
    parts = []
    for path in paths:
        rows, places = read_file(path)
        parts.append(Rows(rows, places=places))
    return _concatenate(parts)


def _load_folder(folder: Path, split: str) -> Rows:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name must be a sub-folder of the data")
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        splits = sorted(item.name for item in folder.iterdir() if (item / "state.json").is_file())
        if split not in splits:
            raise ValueError(f"{folder} has no split {split!r}{_check.suggestion(split, splits)}")
        folder = _contained(folder / split, folder)
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        return _load_saved(folder)

    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in relative.parts)
        if path.is_file() and path.suffix.lower() in SUFFIXES and path.name not in _METADATA and not hidden:
            found.setdefault(_split_of(relative), []).append(_contained(path, folder))
    if not found:
        raise ValueError(f"{folder} holds no data file; expected {', '.join(SUFFIXES)}")
    if list(found) == [None]:  # no file says which part it is
        found = {"train": found[None]}
    wanted = next((key for key, words in _SPLIT_WORDS.items() if split in words), split)
    if wanted not in found:
        raise ValueError(f"{folder} has no split {split!r}{_check.suggestion(wanted, [key for key in found if key])}")
    kinds = {path.suffix.lower() for path in found[wanted]}
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} holds the split {split!r} as {' and '.join(sorted(kinds))}, perhaps twice the same; give files"
        )
    return _read(found[wanted])


def _split_of(relative: Path) -> str | None:
    """``train`` for ``train.jsonl``, ``data/train-00000-of-00001.parquet`` and ``train/part.jsonl``."""
    for part in (relative.stem, *reversed(relative.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            for split, words in _SPLIT_WORDS.items():
                if word in words:
                    return split
    return None


def _load_saved(folder: Path) -> Rows:
    """A folder made by ``Dataset.save_to_disk``; the file names in it are data and are held inside the folder."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is not what save_to_disk writes ({error}); save it again") from None
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} holds an index over its rows; save it again after flatten_indices()")
    paths = []
    for filename in names:
        path = folder / str(filename)
        if path.suffix != ".arrow" or Path(filename).name != filename:
            raise ValueError(f"{folder / 'state.json'} names {filename!r}; expected .arrow files of the same folder")
        paths.append(_contained(path, folder))
    return _read(paths)


# -- the hub -----------------------------------------------------------------------------------------------------------
def _load_hub(path: str, split: str, name: str | None, revision: str | None, **options: Any) -> Rows:
    return _from_datasets(fetch(path, split=split, name=name, revision=revision, **options), split)
