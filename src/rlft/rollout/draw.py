"""From logits to a token and its log-prob: filters and the inverse-CDF draw, each one pass over the vocabulary."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.rollout.types import SamplingParams

__all__ = ["draw", "filter_logits", "greedy", "keep_min_p", "keep_top_k", "keep_top_p", "penalise"]

_BLOCK = 256


def filter_logits(
    logits: Float[Tensor, "B V"], params: SamplingParams, seen: Bool[Tensor, "B V"] | None
) -> Float[Tensor, "B V"]:
    """Repetition penalty, temperature, top-k, top-p and min-p, with transformers' order and meaning.

    Args:
        logits: float32; may be changed in place.
        params: the filters.
        seen: which tokens occur in a row's prompt or completion; needed for the repetition penalty alone.

    Returns:
        The scores whose softmax is the distribution sampled from; -inf where a filter removed the token.
    """
    if params.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError("a repetition penalty needs the tokens seen so far; pass seen")
        logits = penalise(logits, params.repetition_penalty, seen)
    if params.greedy:
        return logits
    if params.temperature != 1.0:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = keep_top_p(logits, 1.0 - params.top_p)
    if params.min_p > 0.0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def keep_top_k(logits: Float[Tensor, "B V"], largest: int, k: Int[Tensor, "B 1"] | None = None) -> Float[Tensor, "B V"]:
    """-inf for all but the ``k`` most likely tokens of each row, ``k`` between 1 and ``largest``; without it, ``largest``."""
    highest = logits.topk(largest, dim=-1).values
    kth = highest[:, -1:] if k is None else highest.gather(-1, k - 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Float[Tensor, "B V"], rest: float | Float[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """-inf for the least likely tokens, as many as have a probability of at most ``rest`` together: 1 - top-p."""
    ordered, order = logits.sort(dim=-1, descending=False)
    # Summed from the least likely up, so that a tail of tiny probabilities is not lost beside a large sum.
    dropped = ordered.softmax(-1).cumsum(-1) <= rest
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Float[Tensor, "B V"], share: float | Float[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """-inf for tokens less likely than ``share`` times the most likely one."""
    probs = logits.softmax(-1)
    top, best = probs.max(-1, keepdim=True)
    return logits.masked_fill((probs < share * top).scatter(-1, best, False), -torch.inf)


def penalise(
    logits: Float[Tensor, "B V"], penalty: float | Float[Tensor, "B 1"], seen: Bool[Tensor, "B V"]
) -> Float[Tensor, "B V"]:
    """Make seen tokens less likely: positive logits are divided by ``penalty``, negative ones multiplied.

    References:
        Keskar et al., "CTRL" (arXiv:1909.05858), section 4.1, in transformers' form for negative logits.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _finite(highest: Float[Tensor, " B"]) -> None:
    """Refuse rows whose maximum is NaN or infinite: one synchronisation."""
    bad = (~torch.isfinite(highest)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"the logits of row {row} have no finite maximum ({highest[row].item()}), so no token can be drawn: "
            f"the model's weights or activations overflowed; lower learning_rate, or look at the weights"
        )


def greedy(scores: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The most likely token and its log-prob; NaN or infinite scores are refused as in :func:`draw`."""
    tokens = scores.argmax(-1)  # NaN counts as the largest
    highest = scores.gather(-1, tokens[:, None])
    _finite(highest[:, 0])
    return tokens, -(scores - highest).exp_().sum(-1).log()


def draw(scores: Float[Tensor, "B V"], u: Float[Tensor, " B"]) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The token at quantile ``u`` of softmax(scores), and its log-prob.

    The cumulative sum is taken over blocks of 256 first and then within one block, in float64: one pass over the
    vocabulary, and no error that grows along it. A token of probability zero is never drawn.

    Args:
        scores: float32 ``[B, V]``, -inf where filtered out; not changed.
        u: float64 ``[B]`` in [0, 1).

    Raises:
        ValueError: when a row's scores hold NaN or +inf, or nothing but -inf.
    """
    rows, vocab = scores.shape
    highest = scores.amax(-1, keepdim=True)  # max(-1) looks for the place as well, at ten times the price
    _finite(highest[:, 0])
    blocks = -(-vocab // _BLOCK)
    weights = scores.new_empty((rows, blocks * _BLOCK))
    weights[:, vocab:] = 0.0
    torch.sub(scores, highest, out=weights[:, :vocab])
    weights[:, :vocab].exp_()
    blocked = weights.view(rows, blocks, _BLOCK)
    edges = blocked.sum(-1).double().cumsum(-1)
    total = edges[:, -1]
    target = torch.minimum(
        u * total, torch.nextafter(total, torch.zeros_like(total))
    )  # u * total may round up to total
    block = torch.searchsorted(edges, target[:, None], right=True)[:, 0].clamp(max=blocks - 1)
    below = torch.where(block > 0, edges.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocked[torch.arange(rows, device=scores.device), block]
    cumulative = inside.double().cumsum(-1)
    offset = torch.searchsorted(cumulative, (target - below)[:, None], right=True)[:, 0]
    # Rounding may leave the target a hair past the block's own sum: then take its likeliest token.
    offset = torch.where(offset < _BLOCK, offset, inside.argmax(-1))
    tokens = block * _BLOCK + offset
    return tokens, (scores.gather(-1, tokens[:, None])[:, 0] - highest[:, 0]).double() - total.log()
