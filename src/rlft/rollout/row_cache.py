"""A key-value cache whose rows come and go: the memory behind continuous batching.

Every layer keeps one buffer ``[slots, heads, columns, head_dim]``. Live rows are the first ones, and all of them end
at the same column, so one write per step serves them all; a row that is shorter begins at a later column, and what
stands before it is masked. A finished row is overwritten by the last live one, a new row is copied into the first
free slot: neither moves the others.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["RowCache"]

_GROWTH = 1.5


class _RowLayer(DynamicLayer):
    """One layer: a view of its buffer is what attention sees, so no step copies the past."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.columns = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def _expose(self) -> None:
        assert self._keys is not None
        assert self._values is not None
        self.keys = self._keys[: self.rows, :, : self.columns]
        self.values = self._values[: self.rows, :, : self.columns]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token per live row; the keys and values of every column so far."""
        added = key_states.shape[-2]
        assert self._keys is not None, "rows are admitted before the first step"
        if self.columns + added > self._keys.shape[2]:
            self.relayout(self.columns, capacity=int((self.columns + added) * _GROWTH))
        where = slice(self.columns, self.columns + added)
        self._keys[: self.rows, :, where] = key_states
        self._values[: self.rows, :, where] = value_states
        self.columns += added
        self._expose()
        return self.keys, self.values

    def relayout(self, columns: int, *, capacity: int) -> None:
        """Make live rows end at ``columns``, in a buffer of at least ``capacity`` columns.

        What then no longer fits on the left is dropped; the caller knows that it is masked. Columns that become free on
        the left hold old or zero numbers: never uninitialised memory, whose NaN would survive a weight of zero.
        """
        assert self._keys is not None
        assert self._values is not None
        kept = min(columns, self.columns)
        old_columns = slice(self.columns - kept, self.columns)
        for name in ("_keys", "_values"):
            old = new = getattr(self, name)
            moved = old[: self.rows, :, old_columns]
            if capacity > old.shape[2]:
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                setattr(self, name, new)
            else:
                moved = moved.clone()  # source and target overlap
            new[: self.rows, :, columns - kept : columns] = moved
        self.columns = columns
        self._expose()

    def admit(self, layer: Any, source: Int[Tensor, " M"], *, slots: int, capacity: int) -> None:
        """Append rows, copied from the rows ``source`` of a prefilled layer, ending where the live ones end."""
        if self._keys is None:
            self.lazy_initialization(layer.keys, layer.values)
            shape = (slots, layer.keys.shape[1], capacity)
            self._keys = layer.keys.new_zeros((*shape, layer.keys.shape[3]))
            self._values = layer.values.new_zeros((*shape, layer.values.shape[3]))
        assert self._values is not None
        width = min(layer.keys.shape[2], self.columns)
        to = slice(self.rows, self.rows + len(source))
        columns = slice(self.columns - width, self.columns)
        self._keys[to, :, columns] = layer.keys[source, :, layer.keys.shape[2] - width :]
        self._values[to, :, columns] = layer.values[source, :, layer.values.shape[2] - width :]
        self.rows += len(source)
        self._expose()

    def move(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"], rows: int) -> None:
        """Copy rows ``source`` over rows ``target`` and keep the first ``rows``."""
        assert self._keys is not None
        assert self._values is not None
        if len(source):
            self._keys[target, :, : self.columns] = self.keys[source]
            self._values[target, :, : self.columns] = self.values[source]
        self.rows = rows
        self._expose()


class RowCache(Cache):
    """The cache of every layer; see the module's text.

    Args:
        layers: how many attention layers the model has.
        slots: the most rows that live at once.
    """

    def __init__(self, layers: int, slots: int) -> None:
        super().__init__(layers=[_RowLayer() for _ in range(layers)])
        self.slots = slots

    @property
    def columns(self) -> int:
        """How many columns there are: the next token's key goes to the one after the last."""
        return self.layers[0].columns

    def admit(self, prefilled: Cache, source: Int[Tensor, " M"], *, columns: int, reserve: int) -> None:
        """Add rows from a prefilled cache, after making the live rows end at ``columns``.

        Args:
            prefilled: the cache of left-padded prompts.
            source: which of its rows to copy, in the order of the new slots; a row may be copied many times.
            columns: where every row shall end.
            reserve: columns to allocate beyond, when memory is allocated anyway.
        """
        self.relayout(columns, reserve=reserve)
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.admit(theirs, source, slots=self.slots, capacity=columns + reserve)

    def relayout(self, columns: int, *, reserve: int) -> None:
        """Make live rows end at ``columns``."""
        for layer in self.layers:
            if layer._keys is None:
                layer.columns = columns
            elif columns != layer.columns:
                capacity = layer._keys.shape[2]
                layer.relayout(columns, capacity=capacity if columns <= capacity else columns + reserve)

    def move(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"], rows: int) -> None:
        """Copy rows ``source`` over rows ``target``, then keep the first ``rows``."""
        for layer in self.layers:
            layer.move(source, target, rows)
