"""Masked sums, denominators and the averagings.

An averaging is a pair of additive numbers, a numerator and a denominator, so that a step may be cut into any
micro-batches and spread over any processes: sum both, divide once. ``loss [N]`` (pairs or sequences) knows one
averaging, ``"mean"``; ``loss [B, T]`` (tokens) knows four:

==================  ==========================================  ======================  =======================
name                numerator                                   denominator             used by
==================  ==========================================  ======================  =======================
``token_mean``      sum over all tokens                         tokens                  DAPO, PPO, SFT
``sequence_mean``   sum over rows of (row sum / row's tokens)   rows                    GRPO
``sequence_sum``    sum over all tokens                         rows                    REINFORCE, RLOO, AGRO
``fixed_length``    sum over all tokens                         rows x ``length``       Dr. GRPO
==================  ==========================================  ======================  =======================

A row whose mask is all False counts in no denominator.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft import _check

Reduction = Literal["mean", "token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

__all__ = [
    "REDUCTIONS",
    "Reduction",
    "average",
    "denominator",
    "masked_mean",
    "numerator",
    "segment_sum",
    "sequence_sum",
]


def sequence_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Sum over a row's unmasked tokens; whatever sits in a masked slot (NaN, inf) is never touched.

    Args:
        values: ``[B, T]`` one number per token.
        mask: ``[B, T]`` True = a token that counts.

    Returns:
        ``[B]`` sums, zero for a row without an unmasked token.
    """
    return values.where(mask, 0.0).sum(-1)


def masked_mean(values: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean over unmasked entries, zero when there is none.

    Args:
        values: any shape.
        mask: the same shape, True = an entry that counts.

    Returns:
        A scalar.
    """
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def segment_sum(values: Float[Tensor, "B ..."], index: Int[Tensor, " B"], size: int) -> Float[Tensor, "G ..."]:
    """Sum rows that share an index: ``out[g] = sum of values[b] with index[b] == g``.

    Args:
        values: ``[B, ...]`` what to sum.
        index: ``[B]`` in ``0 .. size - 1``.
        size: rows of the result, G.

    Returns:
        ``[G, ...]`` sums, zero where no row has the index.
    """
    return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)


def _known(reduction: str, mask: Tensor, length: int | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"averaging {reduction!r} is unknown{_check.suggestion(reduction, REDUCTIONS)}")
    if (reduction == "mean") != (mask.ndim == 1):
        kind = "per pair or per sequence [N]" if mask.ndim == 1 else "per token [B, T]"
        fit = "'mean'" if mask.ndim == 1 else ", ".join(repr(r) for r in REDUCTIONS[1:])
        raise ValueError(f"averaging {reduction!r} does not fit a loss that is {kind}; use {fit}")
    if reduction == "fixed_length":
        if length is None or length < 1:
            raise ValueError(f"averaging 'fixed_length' divides by a constant: give length > 0, got {length!r}")
    elif length is not None:
        raise ValueError(f"length={length!r} does nothing under averaging {reduction!r}; only 'fixed_length' uses it")


def numerator(
    loss: Float[Tensor, "..."], mask: Bool[Tensor, "..."], reduction: Reduction, *, length: int | None = None
) -> Float[Tensor, ""]:
    """The part of an averaging that carries gradient; additive over micro-batches and processes.

    Args:
        loss: ``[N]`` per pair or sequence, or ``[B, T]`` per token.
        mask: the same shape, True = an entry that counts.
        reduction: one of :data:`REDUCTIONS`.
        length: the constant of ``fixed_length``, tokens; None for the others.

    Returns:
        A scalar with gradient.

    Raises:
        ValueError: for an unknown averaging, one that does not fit the shape, or a ``length`` that does nothing.
    """
    _check.same_shape(loss=loss, mask=mask)
    _known(reduction, mask, length)
    kept = loss.where(mask, 0.0)
    if reduction == "sequence_mean":
        return (kept.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    return kept.sum()


def denominator(mask: Bool[Tensor, "..."], reduction: Reduction, *, length: int | None = None) -> Float[Tensor, ""]:
    """The count of an averaging; additive over micro-batches and processes.

    Args:
        mask: ``[N]`` or ``[B, T]`` True = an entry that counts.
        reduction: one of :data:`REDUCTIONS`.
        length: the constant of ``fixed_length``, tokens; None for the others.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: for an unknown averaging, one that does not fit the shape, or a ``length`` that does nothing.
    """
    _known(reduction, mask, length)
    if reduction in ("mean", "token_mean"):
        return mask.sum().double()
    row_count = mask.any(-1).sum().double()
    return row_count * length if length is not None else row_count


def average(
    loss: Float[Tensor, "..."], mask: Bool[Tensor, "..."], reduction: Reduction, *, length: int | None = None
) -> Float[Tensor, ""]:
    """``numerator / denominator`` of one batch; zero, with zero gradient, when nothing is unmasked.

    Args:
        loss: ``[N]`` per pair or sequence, or ``[B, T]`` per token.
        mask: the same shape, True = an entry that counts.
        reduction: one of :data:`REDUCTIONS`.
        length: the constant of ``fixed_length``, tokens; None for the others.

    Returns:
        A scalar with gradient, in the dtype of ``loss``.

    Raises:
        ValueError: for an unknown averaging, one that does not fit the shape, or a ``length`` that does nothing.
    """
    count = denominator(mask, reduction, length=length).clamp(min=1)  # it is whole, and zero when nothing is unmasked
    total = numerator(loss, mask, reduction, length=length)
    return total / count.to(total.dtype)
