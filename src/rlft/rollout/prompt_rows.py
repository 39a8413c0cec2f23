"""Prompts on their way through a model all at once, end to end and without padding; and the column where rows end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["PromptRows", "fitted"]

_TRIM = 0.75  # rows move left when they would then need less than this share of the columns


def fitted(columns: int, needed: int) -> int:
    """The column where rows shall end that end at ``columns``, when the longest needs ``needed``."""
    return needed if needed > columns or needed < _TRIM * columns else columns


@dataclass(frozen=True, slots=True)
class _Layer:
    keys: Float[Tensor, "P K W d"]
    values: Float[Tensor, "P K W d"]


class PromptRows:
    """Causal attention of each prompt to itself, and its keys and values for :meth:`RowCache.admit`.

    Args:
        lengths: tokens of each prompt; equal ones that follow each other go through one call.
        layers: how many attention layers there are.
    """

    def __init__(self, lengths: Sequence[int], layers: int) -> None:
        self.lengths = list(lengths)
        self.width = max(lengths)
        self._layers: list[_Layer | None] = [None] * layers

    @property
    def layers(self) -> list[_Layer]:
        """Keys and values per layer, each prompt ending at the last column, zeros before it."""
        return [layer for layer in self._layers if layer is not None]

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "N K G d"],
        keys: Float[Tensor, "N K d"],
        values: Float[Tensor, "N K d"],
        *,
        scale: float,
    ) -> Float[Tensor, "N K G d"]:
        """Attention of ``N`` tokens, those of the first prompt first."""
        _, kv, group, size = queries.shape
        out = torch.empty_like(queries)
        kept = [x.new_zeros(len(self.lengths), kv, self.width, size) for x in (keys, values)]
        row = token = 0
        for length, same in itertools.groupby(self.lengths):
            count = len(list(same))
            rows, tokens = slice(row, row + count), slice(token, token + count * length)
            q = queries[tokens].reshape(count, length, kv * group, size).transpose(1, 2)
            for new, buffer in zip((keys, values), kept, strict=True):
                buffer[rows, :, self.width - length :] = new[tokens].view(count, length, kv, size).transpose(1, 2)
            k, v = (buffer[rows, :, self.width - length :] for buffer in kept)
            found = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1
            )
            out[tokens] = found.transpose(1, 2).reshape(-1, kv, group, size)
            row, token = rows.stop, tokens.stop
        self._layers[layer] = _Layer(*kept)
        return out
