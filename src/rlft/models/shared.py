"""The second layout: one packed row without padding, in which the prompt of a group is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.models.attention import GroupMask, plan_segments
from rlft.models.layout import LayoutUsed
from rlft.models.segments import Piece
from rlft.types import Batch

__all__ = ["PAYS", "SharedRows", "build_shared", "why_not"]

# Sharing is chosen where the padded layout holds this many times its tokens: below, the gain drowns in overhead.
PAYS = 1.15


@dataclass(frozen=True, slots=True)
class SharedRows:
    """One packed row: each prompt once, then the completions of its group (or a prompt before each completion).

    A completion's last token is left out where only log-probs are wanted: nothing that is scored depends on it.

    Attributes:
        input_ids: ``[1, N]``.
        attention_mask: who attends to whom; see :class:`rlft.models.attention.GroupMask`.
        position_ids: ``[1, N]`` each token's place in its own prompt and completion.
        index: ``[M]`` where the hidden state sits that predicts each scored token; the end of a prompt once per child.
        longest: tokens of the longest prompt and completion together.
        ratio: tokens of the padded layout for one token of this one.
        repeated: tokens when each completion has a prompt of its own.
        rows: completions.
        last: ``[B]`` where each row's last token is; only with ``keep_last``.
    """

    input_ids: Int[Tensor, "1 N"]
    attention_mask: GroupMask
    position_ids: Int[Tensor, "1 N"]
    index: Int[Tensor, " M"]
    longest: int
    ratio: float
    repeated: int
    rows: int
    last: Int[Tensor, " B"] | None = None

    @property
    def used(self) -> LayoutUsed:
        """Token counts of a pass over this row."""
        count = self.input_ids.shape[1]
        return LayoutUsed(count, count, self.repeated, self.index.shape[0], self.rows)

    def gather(self, states: Float[Tensor, "1 N ..."]) -> Float[Tensor, "M ..."]:
        """The entries that predict completion tokens, in the order of :class:`rlft.models.layout.Rows`."""
        return states[0].index_select(0, self.index)


def build_shared(
    batch: Batch,
    *,
    at_least: float = 0.0,
    keep_last: bool = False,
    scored: Bool[Tensor, "B T"] | None = None,
    repeat_prompts: bool = False,
) -> SharedRows | None:
    """Lay a batch out as one packed row.

    A prompt whose group has a single completion with more than one token is packed together with it.

    Args:
        batch: any batch; :func:`rlft.models.layout.build_rows` has refused empty prompts.
        at_least: the least ratio of token counts that pays.
        keep_last: lay out every token, and rows without a completion too: for a score at each row's end.
        scored: as of :func:`rlft.models.layout.build_rows`.
        repeat_prompts: give each completion a prompt of its own, so that nothing is saved but padding: with dropout,
            whose noise completions must not share.

    Returns:
        The row; None when nothing is scored, or when the ratio is lower.
    """
    if batch.num_rows == 0:
        return None
    if repeat_prompts:
        batch = _prompt_for_each(batch)
    prompt_lengths: list[int] = batch.prompt_mask.sum(-1).tolist()
    lengths: list[int] = batch.completion_mask.sum(-1).tolist()
    group_ids: list[int] = batch.group_ids.tolist()
    drop = 0 if keep_last else 1
    children: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        if lengths[row] or keep_last:
            children.setdefault(group, []).append(row)
    if not children:
        return None
    total = sum(prompt_lengths[g] for g in children) + sum(max(n - drop, 0) for n in lengths)
    longest = max(prompt_lengths[g] + n for g, n in zip(group_ids, lengths, strict=True))
    ratio = batch.num_rows * longest / total
    if ratio < at_least or total < 2:  # one token: transformers takes it for a step of generation
        return None

    places = place(children, prompt_lengths, lengths, drop)
    device = batch.device
    # Where each token comes from: prompts, then completions, as (start in the row) + (rank in its own sequence).
    input_ids = torch.zeros(total, dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)

    def fill(ids: Tensor, exists: Tensor, begin: Tensor, offset: Tensor) -> None:
        rank = exists.cumsum(-1)[exists] - 1
        owner = exists.nonzero()[:, 0]
        slot = begin[owner] + rank
        input_ids[slot] = ids[exists].long()
        position_ids[slot] = offset[owner] + rank

    picked = torch.tensor(list(places.prompts), device=device)
    fill(
        batch.prompt_ids[picked],
        batch.prompt_mask[picked],
        torch.tensor(list(places.prompts.values()), device=device),
        torch.zeros(len(places.prompts), dtype=torch.long, device=device),
    )
    rank = batch.completion_mask.cumsum(-1) - 1
    sizes = torch.tensor(lengths, device=device)
    begin = torch.tensor(places.completions, device=device)
    end = torch.tensor([places.prompts.get(g, 0) + prompt_lengths[g] - 1 for g in group_ids], device=device)
    fill(
        batch.completion_ids,
        batch.completion_mask & (rank < sizes[:, None] - drop),
        begin,
        torch.tensor([prompt_lengths[g] for g in group_ids], device=device),
    )
    # Token t is predicted at token t - 1 of its completion; the first one at the end of the prompt.
    before = torch.where(rank > 0, begin[:, None] + rank - 1, end[:, None])
    return SharedRows(
        input_ids=input_ids[None],
        attention_mask=GroupMask(plan_segments(places.segments, places.groups, device=device), device),
        position_ids=position_ids[None],
        index=before[batch.completion_mask if scored is None else scored],
        longest=longest,
        ratio=ratio,
        repeated=sum(prompt_lengths[g] + n for g, n in zip(group_ids, lengths, strict=True)),
        rows=batch.num_rows,
        last=(begin + sizes - 1).where(sizes > 0, end) if keep_last else None,
    )


def _prompt_for_each(batch: Batch) -> Batch:
    """The same rows as groups of one, each with a copy of its prompt."""
    owner = batch.group_ids.long()  # an index of bytes would be read as a mask
    return batch.replace(
        prompt_ids=batch.prompt_ids[owner],
        prompt_mask=batch.prompt_mask[owner],
        group_ids=torch.arange(batch.num_rows, device=batch.device),
    )


class Places(NamedTuple):
    """Where prompts and completions stand in a packed row.

    Attributes:
        prompts: group -> where its prompt begins, the longest prompts first.
        completions: where each completion begins; 0 for one of which nothing is laid out.
        segments: what attends to itself.
        groups: for each prompt with several completions, all of these and the prompt.
    """

    prompts: dict[int, int]
    completions: list[int]
    segments: list[Piece]
    groups: list[tuple[Piece, Piece]]


def place(children: dict[int, list[int]], prompt_lengths: list[int], lengths: list[int], drop: int) -> Places:
    """The order of a packed row: prompts with siblings to keep apart, their completions, then the rest.

    Of each kind the longest comes first. So what one kernel call takes lies side by side.

    Args:
        children: group -> its rows.
        prompt_lengths: tokens of each group's prompt.
        lengths: tokens of each row's completion.
        drop: tokens at the end of each completion that are left out.
    """
    longer = {group: [row for row in rows if lengths[row] > drop] for group, rows in children.items()}
    for rows in longer.values():
        rows.sort(key=lengths.__getitem__, reverse=True)
    tokens = {group: (prompt_lengths[group], sum(lengths[row] for row in rows)) for group, rows in longer.items()}
    order = sorted(children, key=tokens.__getitem__, reverse=True)
    split, whole = [g for g in order if len(longer[g]) > 1], [g for g in order if len(longer[g]) <= 1]
    whole.sort(key=lambda group: sum(tokens[group]), reverse=True)
    found = Places(dict.fromkeys(order, 0), [0] * len(lengths), [], [])
    at = 0
    for group in split:
        found.prompts[group] = at
        found.segments.append((at, prompt_lengths[group]))
        at += prompt_lengths[group]
    for group in split:
        first = at
        for row in longer[group]:
            found.completions[row] = at
            found.segments.append((at, lengths[row] - drop))
            at += lengths[row] - drop
        found.groups.append(((first, at - first), (found.prompts[group], prompt_lengths[group])))
    for group in whole:
        found.prompts[group] = at
        at += prompt_lengths[group]
        for row in longer[group]:
            found.completions[row] = at
            at += lengths[row] - drop
        found.segments.append((found.prompts[group], at - found.prompts[group]))
    return found


def why_not(base: Any) -> tuple[str | None, int | None]:
    """What a model's config says about sharing prompts.

    Args:
        base: a transformers model.

    Returns:
        Why it is impossible (None: it may be possible), and the longest row for which it is (None: any).
    """
    config = base.config.get_text_config() if hasattr(base, "config") else None
    if config is None:
        return "it has no transformers config", None
    name = getattr(config, "_attn_implementation", None)
    if name != "sdpa":
        return f"its attention implementation is {name!r}, not 'sdpa'", None
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder", None
    for cap in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(config, cap, None) is not None:
            return "its attention scores are soft-capped", None
    kinds = set(getattr(config, "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of type {odd[0]!r}", None
    limits = [getattr(config, "attention_chunk_size", None)]
    if not kinds or "sliding_attention" in kinds:
        limits.append(getattr(config, "sliding_window", None))
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if settings.get("rope_type") in ("dynamic", "longrope"):  # frequencies that depend on the longest row
            limits.append(
                settings.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or getattr(config, "max_position_embeddings", None)
            )
    return None, min((int(limit) for limit in limits if limit), default=None)
