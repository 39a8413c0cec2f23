"""Datasets of the hub by name, through ``datasets``: read whole into its usual cache, or row by row over the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlft.data.files import SUFFIXES

__all__ = ["HubRows", "fetch", "is_hub_name"]

_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def is_hub_name(source: Any) -> bool:
    """Whether a source is text that can only be a name on the hub: no file or folder is there, and it does not look like one."""
    if not isinstance(source, str) or not _NAME.fullmatch(source):
        return False
    path = Path(source)
    return path.suffix.lower() not in SUFFIXES and not path.exists()


def fetch(path: str, *, split: str, name: str | None, revision: str | None, **options: Any) -> Any:
    """``datasets.load_dataset``. Remote code is never run: datasets that are scripts are refused.

    Args:
        path: name on the hub (or a folder laid out like one).
        split: part of the dataset.
        name: configuration, such as ``main``; None for the only one.
        revision: git revision.
        options: further ones of ``load_dataset``.

    Raises:
        ValueError: it could not be loaded, with the reason.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(path, name=name, split=split, revision=revision, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        said = " ".join(str(error).split())
        remedy = "; set dataset_config (eval_dataset_config)" if "Config name is missing" in said else ""
        raise ValueError(
            f"{path!r} is no file or folder here and could not be loaded from the hub (split {split!r}, "
            f"configuration {name!r}, revision {revision!r}): {type(error).__name__}: {said}{remedy}"
        ) from error


@dataclass(frozen=True)
class HubRows:
    """The rows of a hub dataset from their beginning, at every call; plain values, so that it can be sent to a worker.

    Attributes:
        path, split, name, revision: as for :func:`fetch`.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None

    def __call__(self) -> Iterator[Mapping[str, Any]]:
        """Rows as plain dicts.

        Raises:
            ValueError: as :func:`fetch`.
            OSError: the connection broke off in the middle.
        """
        opened = fetch(self.path, split=self.split, name=self.name, revision=self.revision, streaming=True)
        rows = iter(opened.with_format(None))
        count = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of whichever library holds the connection
                raise OSError(
                    f"{self.path!r} on the hub ended after {count} rows: {type(error).__name__}: {error}"
                ) from error
            count += 1
            yield row
