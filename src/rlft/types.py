"""The records that flow between stages: :class:`Batch` in, :class:`LossOutput` out.

Shape letters, the same everywhere::

    B  rows (sequences) of a batch          G  groups (prompts) of a batch     P  preference pairs
    T  tokens of the longest completion     L  tokens of the longest prompt    N  scored tokens   D  hidden size   V  vocabulary

Rows are completions. A preference pair is a group of two (chosen first), a supervised example is a group of one,
a rollout is a group of n. Masks have one polarity everywhere: True is a token that counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check, reduce
from rlft.reduce import Reduction

__all__ = ["Batch", "LossOutput", "Reduction"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What every loss returns.

    Attributes:
        loss: unreduced and zero where masked: ``[P]`` pairs, ``[B]`` sequences or ``[B, T]`` tokens. Carries gradient.
        metrics: detached, unreduced tensors, each ``[P]``, ``[B]`` or ``[B, T]``.
        reduction: the averaging of the paper, one of :data:`rlft.reduce.REDUCTIONS`.
        mask: which entries of ``loss`` count; None means all of them.
    """

    loss: Float[Tensor, "..."]
    metrics: dict[str, Tensor]
    reduction: Reduction
    mask: Bool[Tensor, "..."] | None = None

    @property
    def counted(self) -> Bool[Tensor, "..."]:
        """The mask, all True where none was given."""
        return torch.ones_like(self.loss, dtype=torch.bool) if self.mask is None else self.mask

    def mean(self, *, length: int | None = None) -> Float[Tensor, ""]:
        """Average over this batch the way the paper does: ``losses.dpo(...).mean().backward()``.

        Under gradient accumulation or several processes, divide by counts over the whole step instead
        (:func:`rlft.reduce.numerator`, :func:`rlft.reduce.denominator`); the trainer does.
        """
        return reduce.average(self.loss, self.counted, self.reduction, length=length)


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch for every objective. Immutable: a stage returns a new one by :meth:`replace`.

    Attributes:
        prompt_ids: ``[G, L]`` each prompt once, right-padded.
        prompt_mask: ``[G, L]`` True where a prompt token exists.
        completion_ids: ``[B, T]`` right-padded.
        completion_mask: ``[B, T]`` True where a completion token exists (EOS included); a prefix of each row.
        mask: ``[B, T]`` True where a token is trained on; a subset of ``completion_mask``.
        group_ids: ``[B]`` which row of ``prompt_ids`` a completion answers; ragged groups, any order.
        rewards: ``[B]`` sequence rewards, NaN where unscored.
        old_logps: ``[B, T]`` log-probs under the policy that sampled.
        ref_logps: ``[B, T]`` log-probs under the reference.
        ref_states: ``[B, T, D]`` the reference's hidden states that predict each token, kept where exact KL is asked for
            more than once.
        advantages: ``[B]`` or ``[B, T]``.
        values: ``[B, T]`` the critic's values when the batch was sampled.
        returns: ``[B, T]`` regression targets of the critic.
        labels: ``[B]`` bool, True = desirable (unpaired preferences).
        extras: further per-row tensors (``[B]`` or ``[B, T]``) that an objective may name as parameters.
        behaviour_states: ``[B, T, D]`` the same of the policy that sampled, kept where an objective needs its distribution
            more than once.

    Raises:
        ValueError: when shapes or dtypes do not fit, or a stored tensor requires grad.
    """

    prompt_ids: Int[Tensor, "G L"]
    prompt_mask: Bool[Tensor, "G L"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    group_ids: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"] | None = None
    old_logps: Float[Tensor, "B T"] | None = None
    ref_logps: Float[Tensor, "B T"] | None = None
    ref_states: Float[Tensor, "B T D"] | None = None
    advantages: Float[Tensor, "..."] | None = None
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    labels: Bool[Tensor, " B"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    behaviour_states: Float[Tensor, "B T D"] | None = None

    def __post_init__(self) -> None:
        _check.bool_mask(self.prompt_mask, self.prompt_ids, name="prompt_mask", like_name="prompt_ids")
        _check.bool_mask(self.completion_mask, self.completion_ids, name="completion_mask", like_name="completion_ids")
        _check.bool_mask(self.mask, self.completion_ids, name="mask", like_name="completion_ids")
        _check.group_ids(self.group_ids, self.completion_ids, count_name="completion_ids")
        for name in ("old_logps", "ref_logps", "values", "returns"):
            tensor = getattr(self, name)
            if tensor is not None:
                _check.same_shape(completion_ids=self.completion_ids, **{name: tensor})
        for name in ("rewards", "labels"):
            tensor = getattr(self, name)
            if tensor is not None:
                _check.rows(self.completion_ids, count_name="completion_ids", **{name: tensor})
        for name in ("ref_states", "behaviour_states"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[:2] != self.completion_ids.shape):
                raise ValueError(
                    f"{name} must be [B, T, D] with [B, T] = {list(self.completion_ids.shape)}, got {list(tensor.shape)}"
                )
        if self.advantages is not None:
            _check.tokens_or_rows(self.completion_ids, advantages=self.advantages)
        for name, tensor in self._row_tensors().items():
            if tensor.shape[:1] != self.completion_ids.shape[:1]:
                raise ValueError(f"{name} must have {self.num_rows} rows, got shape {list(tensor.shape)}")
            if tensor.requires_grad:
                raise ValueError(f"{name} requires grad; a Batch stores constants: pass {name}.detach()")

    # -- counts ---------------------------------------------------------------------------------------------------
    @property
    def num_rows(self) -> int:
        return self.completion_ids.shape[0]

    @property
    def num_groups(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens that exist, each prompt once."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    @property
    def device(self) -> torch.device:
        return self.completion_ids.device

    # -- new batches ----------------------------------------------------------------------------------------------
    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, extras={name: tensor.to(device) for name, tensor in self.extras.items()})

    def select(self, rows: Int[Tensor, " R"]) -> Batch:
        """The given rows, in that order, with the prompts they answer; padding columns that became empty are cut."""
        rows = rows.to(self.device)
        groups, group_ids = torch.unique(self.group_ids[rows], return_inverse=True)
        prompt_width = max(1, int(self.prompt_mask[groups].sum(-1).max())) if groups.numel() else 1
        width = max(1, int(self.completion_mask[rows].sum(-1).max())) if rows.numel() else 1

        def cut(tensor: Tensor) -> Tensor:
            picked = tensor[rows]
            return picked[:, :width] if picked.ndim > 1 and picked.shape[1] == self.completion_ids.shape[1] else picked

        kept = {name: cut(tensor) for name, tensor in self._row_tensors().items() if name not in self.extras}
        return replace(
            self,
            **kept,
            completion_ids=cut(self.completion_ids),
            completion_mask=cut(self.completion_mask),
            mask=cut(self.mask),
            group_ids=group_ids.to(self.group_ids.dtype),
            prompt_ids=self.prompt_ids[groups][:, :prompt_width],
            prompt_mask=self.prompt_mask[groups][:, :prompt_width],
            extras={name: cut(tensor) for name, tensor in self.extras.items()},
        )

    def split(self, max_rows: int, *, keep_groups: bool = True) -> list[Batch]:
        """Micro-batches of at most ``max_rows`` rows.

        Args:
            max_rows: rows of a micro-batch.
            keep_groups: never split a group; one that is larger than ``max_rows`` is a micro-batch by itself.

        Returns:
            Batches that hold every row once.
        """
        if not keep_groups:
            return [self.select(rows) for rows in torch.arange(self.num_rows).split(max_rows)]
        pieces: list[list[int]] = [[]]
        for members in self._members():
            if pieces[-1] and len(pieces[-1]) + len(members) > max_rows:
                pieces.append([])
            pieces[-1] += members
        return [self.select(torch.tensor(piece, dtype=torch.long)) for piece in pieces if piece]

    def split_groups(self, groups_each: int) -> list[Batch]:
        """Batches of ``groups_each`` whole groups, in order (the last may be smaller)."""
        members = [m for m in self._members() if m]
        chunks = [members[i : i + groups_each] for i in range(0, len(members), groups_each)]
        return [self.select(torch.tensor([row for m in chunk for row in m], dtype=torch.long)) for chunk in chunks]

    def _members(self) -> list[list[int]]:
        """Row numbers of each group, in order of the groups."""
        order = torch.argsort(self.group_ids, stable=True).tolist()
        sizes = torch.bincount(self.group_ids, minlength=self.num_groups).tolist()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    @staticmethod
    def concat(batches: list[Batch], *, pad_id: int = 0) -> Batch:
        """Stack batches; group ids are renumbered, rows and prompts padded to the widest.

        Args:
            batches: at least one; all carry the same tensors.
            pad_id: token id in padded places.

        Raises:
            ValueError: for an empty list, or batches that carry different tensors.
        """
        if not batches:
            raise ValueError("concat needs at least one batch, got an empty list")
        width = max(b.completion_ids.shape[1] for b in batches)
        prompt_width = max(b.prompt_ids.shape[1] for b in batches)

        def pad(tensor: Tensor, size: int, fill: float | bool) -> Tensor:
            after = (0, 0) * (tensor.ndim - 2)  # pad counts dimensions from the last one
            return torch.nn.functional.pad(tensor, (*after, 0, size - tensor.shape[1]), value=fill)

        merged: dict[str, Any] = {
            "prompt_ids": torch.cat([pad(b.prompt_ids, prompt_width, pad_id) for b in batches]),
            "prompt_mask": torch.cat([pad(b.prompt_mask, prompt_width, False) for b in batches]),
            "completion_ids": torch.cat([pad(b.completion_ids, width, pad_id) for b in batches]),
            "completion_mask": torch.cat([pad(b.completion_mask, width, False) for b in batches]),
            "mask": torch.cat([pad(b.mask, width, False) for b in batches]),
        }
        offset, ids = 0, []
        for b in batches:
            ids.append(b.group_ids + offset)
            offset += b.num_groups
        merged["group_ids"] = torch.cat(ids)
        extras: dict[str, Tensor] = {}
        names = batches[0]._row_tensors().keys()
        for b in batches[1:]:
            if b._row_tensors().keys() != names:
                raise ValueError(f"batches carry different tensors: {sorted(names)} and {sorted(b._row_tensors())}")
        for name in names:
            parts = [b._row_tensors()[name] for b in batches]
            per_token = [
                p.ndim > 1 and p.shape[1] == b.completion_ids.shape[1] for p, b in zip(parts, batches, strict=True)
            ]
            joined = torch.cat([pad(p, width, 0) if t else p for p, t in zip(parts, per_token, strict=True)])
            (extras if name in batches[0].extras else merged)[name] = joined
        return Batch(**merged, extras=extras)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name (``extras.`` before the extra ones), for checkpoints; see :meth:`from_tensors`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return {**own, **{f"extras.{name}": tensor for name, tensor in self.extras.items()}}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Batch:
        """The batch that :meth:`tensors` came from."""
        extras = {name.removeprefix("extras."): t for name, t in tensors.items() if name.startswith("extras.")}
        return Batch(**{name: t for name, t in tensors.items() if not name.startswith("extras.")}, extras=extras)

    def _row_tensors(self) -> dict[str, Tensor]:
        """Every optional per-row tensor that is present, by name, extras included."""
        sampled = ("rewards", "old_logps", "ref_logps", "ref_states", "behaviour_states", "values", "labels")
        optional = (*sampled, "advantages", "returns")
        present = {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        return {**present, **self.extras}
