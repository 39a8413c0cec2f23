"""A key-value cache whose rows come and go: the memory behind continuous batching.

Every layer keeps one buffer ``[slots, heads, columns, head_dim]``. Live rows are the first ones, and all of them end
at the same column, so one write per step serves them all; a row that is shorter begins at a later column, and what
stands before it is masked. A finished row is overwritten by the last live one, a new row is copied into the first
free slot: neither moves the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["FixedRows", "RowCache", "padding_mask"]

_GROWTH = 1.5


def padding_mask(start: Int[Tensor, " R"], columns: int, dtype: torch.dtype) -> Float[Tensor, "R 1 1 S"]:
    """What is added to scores: -inf in columns before ``start``, else 0."""
    gone = torch.arange(columns, device=start.device) < start[:, None]
    return torch.zeros_like(gone, dtype=dtype).masked_fill_(gone, -torch.inf)[:, None, None]


class _RowLayer(DynamicLayer):
    """One layer: a view of its buffer is what attention sees, so no step copies the past."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.columns = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[slots, heads, columns, head_dim]`` each."""
        assert self._buffers is not None, "rows are admitted before anything else"
        return self._buffers

    @property
    def capacity(self) -> int | None:
        """Columns there is memory for; None before the first admission."""
        return None if self._buffers is None else self._buffers[0].shape[2]

    @property
    def live(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the live part, ``[rows, heads, columns, head_dim]`` each."""
        keys, values = self.buffers
        return keys[: self.rows, :, : self.columns], values[: self.rows, :, : self.columns]

    def _expose(self) -> tuple[Tensor, Tensor]:
        """Make the live part what attention and the other methods of the base class see."""
        self.keys, self.values = found = self.live
        return found

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token per live row; the keys and values of every column so far."""
        until = self.columns + key_states.shape[-2]
        self.reserve(until)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.columns : until] = states
        self.columns = until
        return self._expose()

    def reserve(self, columns: int) -> None:
        """Memory for so many columns, and more when it is taken anew."""
        if columns > self.buffers[0].shape[2]:
            self.relayout(self.columns, capacity=int(columns * _GROWTH))

    def relayout(self, columns: int, *, capacity: int) -> None:
        """Make live rows end at ``columns``, in a buffer of at least ``capacity`` columns.

        What then no longer fits on the left is dropped; the caller knows that it is masked. Columns that become free on
        the left hold old or zero numbers: never uninitialised memory, whose NaN would survive a weight of zero.
        """
        kept = min(columns, self.columns)
        new = []
        for old in self.buffers:
            moved = old[: self.rows, :, self.columns - kept : self.columns]
            if capacity > old.shape[2]:
                old = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
            else:
                moved = moved.clone()  # source and target overlap
            old[: self.rows, :, columns - kept : columns] = moved
            new.append(old)
        self._buffers = (new[0], new[1])
        self.columns = columns
        self._expose()

    def admit(
        self, layer: Any, source: Int[Tensor, " M"], *, slots: int, capacity: int, width: int | None = None
    ) -> None:
        """Append rows, copied from the rows ``source`` of a prefilled layer, ending where the live ones end."""
        given = (layer.keys, layer.values)
        if self._buffers is None:
            self.lazy_initialization(*given)
            keys, values = (s.new_zeros((slots, s.shape[1], capacity, s.shape[3])) for s in given)
            self._buffers = (keys, values)
        kept = min(layer.keys.shape[2], self.columns) if width is None else width
        rows = slice(self.rows, self.rows + len(source))
        for buffer, states in zip(self.buffers, given, strict=True):
            buffer[rows, :, self.columns - kept : self.columns] = states[source, :, states.shape[2] - kept :]
        self.rows += len(source)
        self._expose()

    def move(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"], rows: int) -> None:
        """Copy rows ``source`` over rows ``target`` and keep the first ``rows``."""
        if len(source):
            for buffer in self.buffers:
                buffer[target, :, : self.columns] = buffer[source, :, : self.columns]
        self.rows = rows
        self._expose()


class RowCache(Cache):
    """The cache of every layer; see the module's text.

    Args:
        layers: how many attention layers the model has.
        slots: the most rows that live at once.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self._rows = [_RowLayer() for _ in range(layers)]
        super().__init__(layers=list(self._rows))
        self.slots = slots
        self.mask: Tensor | None = None  # of the step that is under way

    @property
    def columns(self) -> int:
        """How many columns there are: the next token's key goes to the one after the last."""
        return self._rows[0].columns

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; known after the first admission."""
        return self._rows[0].buffers[0].dtype

    def admit(
        self, prefilled: Any, source: Int[Tensor, " M"], *, columns: int, reserve: int, width: int | None = None
    ) -> None:
        """Add rows from a prefilled cache, after making the live rows end at ``columns``.

        Args:
            prefilled: keys and values of prompts, each ending at the last column.
            source: which of its rows to copy, in the order of the new slots; a row may be copied many times.
            columns: where every row shall end.
            reserve: columns to allocate beyond, when memory is allocated anyway.
            width: how many of the last columns to copy; default: all.
        """
        self.relayout(columns, reserve=reserve)
        for mine, theirs in zip(self._rows, prefilled.layers, strict=True):
            mine.admit(theirs, source, slots=self.slots, capacity=columns + reserve, width=width)

    def relayout(self, columns: int, *, reserve: int) -> None:
        """Make live rows end at ``columns``."""
        for layer in self._rows:
            if layer.capacity is None:
                layer.columns = columns
            elif columns != layer.columns:
                fits = columns <= layer.capacity
                layer.relayout(columns, capacity=layer.capacity if fits else columns + reserve)

    def reserve(self, columns: int) -> None:
        """Memory for so many columns in every layer, as :meth:`append` would take it one layer after the other."""
        for layer in self._rows:
            layer.reserve(columns)

    def memory(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer with all slots and columns, ``[slots, K, capacity, d]`` each."""
        return [layer.buffers for layer in self._rows]

    def advance(self) -> None:
        """Count a column that was written into :meth:`memory` for every live row."""
        for layer in self._rows:
            layer.columns += 1
            layer._expose()

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the live rows in one layer, ``[R, K, columns, d]`` each."""
        return self._rows[layer].live

    def open(self, start: Int[Tensor, " R"]) -> None:
        """Before the layers of a step: ``start`` is the column at which each live row begins."""
        self.mask = padding_mask(start, self.columns + 1, self.dtype) if start.any() else None

    def append(self, layer: int, keys: Float[Tensor, "R K d"], values: Float[Tensor, "R K d"]) -> tuple[Tensor, Tensor]:
        """Add one token to every live row of one layer; its keys and values, ``[R, K, columns, d]``."""
        return self._rows[layer].update(keys[:, :, None], values[:, :, None])

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "R K G d"],
        keys: Float[Tensor, "R K d"],
        values: Float[Tensor, "R K d"],
        *,
        scale: float,
    ) -> Float[Tensor, "R K G d"]:
        """Append one token to every live row of one layer, and let its queries see the row up to and with it.

        Args:
            layer: which one.
            queries: those that share a key stand together: the keys are never repeated.
            keys, values: of the new token.
            scale: the scores are multiplied by it.
        """
        k, v = self.append(layer, keys, values)
        return torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=self.mask, scale=scale)

    def move(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"], rows: int) -> None:
        """Copy rows ``source`` over rows ``target``, then keep the first ``rows``."""
        for layer in self._rows:
            layer.move(source, target, rows)


class FixedRows:
    """The first rows and columns of a :class:`RowCache`, for a step whose shapes never change.

    Args:
        layers: keys and values of each layer, ``[slots, K, capacity, d]``; written in place.
        rows, columns: how many of them the step computes, at most what there is.
        start: ``[rows]`` the column at which each row begins; not beyond ``column``.
        column: ``[1]`` where the new token's key goes.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        rows: int,
        columns: int,
        start: Int[Tensor, " R"],
        column: Int[Tensor, " 1"],
    ) -> None:
        self.layers = [(keys[:rows, :, :columns], values[:rows, :, :columns]) for keys, values in layers]
        self.column = column
        place = torch.arange(columns, device=start.device)
        hidden = (place < start[:, None]) | (place > column)
        mask = torch.zeros_like(hidden, dtype=self.layers[0][0].dtype)
        self.mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "R K G d"],
        keys: Float[Tensor, "R K d"],
        values: Float[Tensor, "R K d"],
        *,
        scale: float,
    ) -> Float[Tensor, "R K G d"]:
        """As :meth:`RowCache.attend`."""
        k, v = self.layers[layer]
        k.index_copy_(2, self.column, keys[:, :, None])
        v.index_copy_(2, self.column, values[:, :, None])
        return torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=self.mask, scale=scale)
