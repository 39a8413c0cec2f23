"""How a :class:`rlft.types.Batch` becomes rows of token ids for a model: the one place that knows the layout.

Everything above it (policy, critic, reward model) asks for ``[N]`` scored tokens and gets ``[B, T]`` back, so packing
without padding or sharing a prompt between its completions can replace this file alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.types import Batch

__all__ = ["LayoutUsed", "Rows", "build_rows"]


class LayoutUsed(NamedTuple):
    """Token counts of one forward pass.

    Attributes:
        computed: tokens that went through the model, padding included.
        tokens: those of them that exist.
        repeated: tokens that exist when each answer has a prompt of its own.
        scored: tokens that get a log-prob.
        rows: answers.
    """

    computed: int = 0
    tokens: int = 0
    repeated: int = 0
    scored: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """``[prompt | completion]`` rows, and where each scored token sits in them.

    Attributes:
        input_ids: ``[B, W]``.
        attention_mask: ``[B, W]`` 1 where a token exists.
        position_ids: ``[B, W]`` 0, 1, 2, ... from each row's first token, whatever the padding.
        row, column: ``[N]`` where the hidden state that predicts each scored token sits (one before it).
        targets: ``[N]`` the scored tokens, row by row.
        last: ``[B]`` column of each row's last existing token.
        scored: ``[B, T]`` the tokens that get a log-prob, for :meth:`scatter`.
        tokens: how many tokens exist in all rows.
    """

    input_ids: Int[Tensor, "B W"]
    attention_mask: Int[Tensor, "B W"]
    position_ids: Int[Tensor, "B W"]
    row: Int[Tensor, " N"]
    column: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    last: Int[Tensor, " B"]
    scored: Bool[Tensor, "B T"]
    tokens: int = 0

    @property
    def used(self) -> LayoutUsed:
        """Token counts of a pass over these rows."""
        return LayoutUsed(
            self.input_ids.numel(), self.tokens, self.tokens, self.targets.shape[0], self.input_ids.shape[0]
        )

    def gather(self, states: Float[Tensor, "B W ..."]) -> Float[Tensor, "N ..."]:
        """The entries that predict scored tokens."""
        return states[self.row, self.column]

    def gather_last(self, states: Float[Tensor, "B W ..."]) -> Float[Tensor, "B ..."]:
        """The entry at each row's last existing token."""
        return states[torch.arange(states.shape[0], device=states.device), self.last]

    def scatter(self, values: Float[Tensor, "N ..."]) -> Float[Tensor, "B T ..."]:
        """Back to ``[B, T]``, zero where no token is scored. Differentiable."""
        shape = (*self.scored.shape, *values.shape[1:])
        zeros = torch.zeros(shape, dtype=values.dtype, device=values.device)
        mask = self.scored.reshape(*self.scored.shape, *[1] * (values.ndim - 1))
        return zeros.masked_scatter(mask, values)


def build_rows(
    batch: Batch, *, padding_side: Literal["right", "left"] = "right", scored: Bool[Tensor, "B T"] | None = None
) -> Rows:
    """Lay out each row as its prompt's tokens followed by its completion's tokens, without gaps.

    Masked slots of ``prompt_ids`` and ``completion_ids`` are dropped wherever they sit, so a left-padded prompt gives
    the same row as a right-padded one.

    Args:
        batch: any :class:`~rlft.types.Batch`.
        padding_side: where the padding of the rows goes; log-probs do not depend on it.
        scored: ``[B, T]`` the completion tokens that are to get a log-prob; None: all that exist. Tokens outside are
            context for those after them.

    Returns:
        :class:`Rows`.

    Raises:
        ValueError: when a row with completion tokens has an empty prompt: nothing predicts its first token.
    """
    groups = batch.group_ids.long()  # an index of bytes would be read as a mask
    prompt_mask = batch.prompt_mask[groups]
    ids = torch.cat([batch.prompt_ids[groups], batch.completion_ids], 1)
    exists = torch.cat([prompt_mask, batch.completion_mask], 1)
    rows_n, device = ids.shape[0], ids.device
    lengths = exists.sum(-1)
    prompt_lengths = prompt_mask.sum(-1)
    empty = (prompt_lengths == 0) & batch.completion_mask.any(-1)
    widest = lengths.max() if rows_n else lengths.new_zeros(())
    width, has_empty, tokens = torch.stack([widest, empty.any(), lengths.sum()]).tolist()  # one look at the device
    if has_empty:
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has an empty prompt, so nothing predicts its first completion token; "
            f"give every prompt at least one token (a BOS token will do)"
        )
    width = max(int(width), 1)
    start = torch.zeros_like(lengths) if padding_side == "right" else width - lengths
    # Slot `width` is a bin for what does not exist; it is cut off again.
    slot = torch.where(exists, start[:, None] + exists.cumsum(-1) - 1, width)
    input_ids = torch.zeros(rows_n, width + 1, dtype=torch.long, device=device).scatter_(1, slot, ids.long())[:, :width]
    columns = torch.arange(width, device=device)[None]
    attention = (columns >= start[:, None]) & (columns < (start + lengths)[:, None])
    scored = batch.completion_mask if scored is None else scored
    row, t = scored.nonzero(as_tuple=True)
    return Rows(
        input_ids=input_ids,
        attention_mask=attention.long(),
        position_ids=(columns - start[:, None]).clamp(min=0),
        row=row,
        column=slot[row, prompt_mask.shape[1] + t] - 1,
        targets=batch.completion_ids[row, t].long(),
        last=(start + lengths - 1).clamp(min=0),
        scored=scored,
        tokens=tokens,
    )
