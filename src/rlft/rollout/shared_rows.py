"""Rows of a cache whose prompt is held once, however many rows answer it.

The keys of a prompt are the same in every row that begins with it, and reading keys is most of what a decode step does
beside its matrix products. Here they are stored once per prompt and read once per step: the queries of all its rows
attend to them in one call, each row attends to its own tokens in another, and the two are merged by their log-sum-exps.

References:
    Juravsky et al. 2024, Hydragen (https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft.rollout.prompt_rows import fitted
from rlft.rollout.row_cache import RowCache, padding_mask

__all__ = ["SharedRows", "can_share"]


def can_share(device: torch.device, dtype: torch.dtype, *, greedy: bool = False) -> bool:
    """Whether torch has a kernel that gives log-sum-exps for these.

    Args:
        device, dtype: of the model.
        greedy: whether rows take the most probable token. In bfloat16 a row in two parts rounds otherwise than the whole
            row of the model's own attention, which is seen wherever two tokens are equally probable but for rounding.
    """
    known = dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and not greedy)
    return device.type == "cpu" and known and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _attend(
    queries: Float[Tensor, "B K Q d"], keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Float[Tensor, "B Q K d"], Float[Tensor, "B Q K"]]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, False, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


class SharedRows:
    """A :class:`~rlft.rollout.row_cache.RowCache` of completions over another one of prompts.

    Args:
        layers: how many attention layers the model has.
        slots: the most rows that live at once.
        prompts: the most prompts that they answer.
    """

    def __init__(self, layers: int, slots: int, prompts: int) -> None:
        self.own, self.prompts = RowCache(layers, slots), RowCache(layers, min(slots, prompts))
        self._names: list[int] = []  # of the prompts held
        self._start: list[int] = []  # the column at which each of them begins
        self._home: list[int] = []  # which of them each row answers
        self._arranged = False

    @property
    def columns(self) -> int:
        """Columns of the completions; prompts are not counted."""
        return self.own.columns

    def admit(
        self,
        prefilled: Any,
        source: Int[Tensor, " M"],
        *,
        columns: int,
        reserve: int,
        names: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Add rows that are empty so far.

        Args:
            prefilled: keys and values of prompts, each ending at the last column.
            source: which of them each row answers.
            columns: where the live rows shall end, and the new ones begin.
            reserve: columns to allocate beyond, when memory is allocated anyway.
            names: any number for the prompt of each row: those of one name share it.
            lengths: tokens of that prompt.
        """
        self.own.admit(prefilled, source, columns=columns, reserve=reserve, width=0)
        indices = source.tolist()
        new = {name: row for row, name in enumerate(names) if name not in self._names}
        if new:
            self._align(max(lengths[row] for row in new.values()))
            columns = self.prompts.columns
            chosen = torch.tensor([indices[row] for row in new.values()], device=source.device)
            self.prompts.admit(prefilled, chosen, columns=columns, reserve=0)
            self._names += new
            self._start += [columns - lengths[row] for row in new.values()]
        self._home += [self._names.index(name) for name in names]
        self._arranged = False

    def _align(self, incoming: int) -> None:
        """Make prompts end further right for a longer one, or further left when much has become empty."""
        before = self.prompts.columns if self._names else 0
        columns = fitted(before, max([incoming, *(before - start for start in self._start)]))
        if columns != before:
            self.prompts.relayout(columns, reserve=0)
            self._start = [start + columns - before for start in self._start]

    def relayout(self, columns: int, *, reserve: int) -> None:
        """Make live rows end at ``columns``."""
        self.own.relayout(columns, reserve=reserve)

    def move(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"], rows: int) -> None:
        """Copy rows ``source`` over rows ``target``, then keep the first ``rows``, and the prompts they answer."""
        self.own.move(source, target, rows)
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            self._home[new] = self._home[old]
        del self._home[rows:]
        self._arranged = False
        used = set(self._home)
        if len(used) < len(self._names):
            kept = len(used)
            holes = [p for p in range(kept) if p not in used]
            movers = [p for p in range(kept, len(self._names)) if p in used]
            old, new = (torch.tensor(p, dtype=torch.long, device=source.device) for p in (movers, holes))
            self.prompts.move(old, new, kept)
            renamed = dict(zip(movers, holes, strict=True))
            for mover, hole in renamed.items():
                self._names[hole], self._start[hole] = self._names[mover], self._start[mover]
            self._home = [renamed.get(p, p) for p in self._home]
            del self._names[kept:], self._start[kept:]
            if kept:
                self._align(0)

    def open(self, start: Int[Tensor, " R"]) -> None:
        """Before the layers of a step: ``start`` is the column at which each row begins."""
        self.own.open(start)
        if not self._arranged:
            self._arrange(start.device)

    def _arrange(self, device: torch.device) -> None:
        """Where the queries of each row stand among those of its prompt: a table ``[prompts, most rows of one]``."""
        members: list[list[int]] = [[] for _ in self._names]
        place = []
        for row, home in enumerate(self._home):
            place.append((home, len(members[home])))
            members[home].append(row)
        self._most = max(map(len, members))
        table = [rows + rows[:1] * (self._most - len(rows)) for rows in members]
        self._table = torch.tensor(table, device=device).flatten()
        self._place = torch.tensor([home * self._most + index for home, index in place], device=device)
        begins = torch.tensor(self._start, device=device)
        self._mask = padding_mask(begins, self.prompts.columns, self.prompts.dtype) if any(self._start) else None
        self._arranged = True

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "R K G d"],
        keys: Float[Tensor, "R K d"],
        values: Float[Tensor, "R K d"],
        *,
        scale: float,
    ) -> Float[Tensor, "R K G d"]:
        """As :meth:`rlft.rollout.row_cache.RowCache.attend`."""
        _, kv, group, size = queries.shape
        mine, mine_lse = _attend(queries, *self.own.append(layer, keys, values), self.own.mask, scale)
        asked = queries.index_select(0, self._table).view(-1, self._most, kv, group, size).transpose(1, 2)
        asked = asked.reshape(-1, kv, self._most * group, size)
        read, read_lse = _attend(asked, *self.prompts.past(layer), self._mask, scale)
        read = read.reshape(-1, group, kv, size).index_select(0, self._place)
        read_lse = read_lse.reshape(-1, group, kv).index_select(0, self._place)
        weight = torch.sigmoid(mine_lse - read_lse).to(queries.dtype)
        return torch.lerp(read, mine, weight[..., None]).transpose(1, 2)
