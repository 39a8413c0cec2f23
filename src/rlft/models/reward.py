"""Reward models: one that is trained on batches, and one that scores text as a reward function."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlft import _check
from rlft._failpoint import instant
from rlft.models import adapters, loading, modes, pretrained
from rlft.models.attention import DEVICES
from rlft.models.layout import LayoutUsed, Rows, build_rows
from rlft.models.scorer import CausalScorer, Layout, unwrap
from rlft.models.shared import PAYS, SharedRows, build_shared
from rlft.models.trainable import TrainableModule, under
from rlft.types import Batch

__all__ = ["ModelReward", "RewardScorer"]

#: Texts per forward, unless tokens are counted.
_TEXTS = 8


class RewardScorer(TrainableModule):
    """A sequence classifier over prompt and completion; the score is read at the last existing token.

    Args:
        model: a transformers sequence classifier with one output (or a PeftModel around one).
        layout: ``auto`` packs rows without padding, with the prompt of a pair once, where the model allows it and it
            pays; ``padded`` never does.

    Raises:
        ValueError: when the model has no single-output score head.
    """

    def __init__(self, model: nn.Module, *, layout: Layout = "auto") -> None:
        super().__init__()
        self.layout: Layout = layout
        self.model: Any = model
        base = unwrap(model)
        labels = getattr(base.config, "num_labels", None)
        if not type(base).__name__.endswith("ForSequenceClassification") or labels != 1:
            raise ValueError(
                f"a reward model is a sequence classifier with one output (num_labels=1), got {type(base).__name__} with "
                f"num_labels={labels}; load it with rlft.models.load_sequence_classifier"
            )
        self._scorer = CausalScorer(model, layout=layout)
        self._by_trunk = isinstance(getattr(base, "score", None), nn.Module) and self._scorer.trunk is not None
        self.train()

    def forward(self, batch: Batch, *, want: frozenset[str] = frozenset({"scores"})) -> dict[str, Float[Tensor, " B"]]:
        """Score each row.

        Args:
            batch: prompts and completions.
            want: ``{"scores"}``.

        Returns:
            ``{"scores": [B]}``, float32 (float64 for float64 models), with gradient. Dropout is off.
        """
        for name in sorted(frozenset(want) - {"scores"}):
            raise ValueError(f"want holds {name!r}; a RewardScorer computes 'scores'")
        self._settle()
        shared = None
        if self.may_share:
            shared = build_shared(batch, at_least=PAYS if self.layout == "auto" else 0.0, keep_last=True)
        return {"scores": self.score_rows(build_rows(batch), shared)}

    def score_rows(self, rows: Rows, shared: SharedRows | None = None) -> Float[Tensor, " B"]:
        """Scores of laid-out rows."""
        self._scorer.check_rows(rows)
        if self._by_trunk:
            scores = unwrap(self.model).score(self._scorer.last_states(rows, shared))
        else:  # encoders pool by themselves, with the attention mask
            inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "return_dict": True}
            scores = self.model(**inputs).logits
        if scores.ndim != 2 or scores.shape[1] != 1:
            raise ValueError(
                f"the reward model returned {list(scores.shape)} for {rows.input_ids.shape[0]} rows; it must return one "
                f"number per row: use a classifier with num_labels=1"
            )
        return _check.upcast(scores.squeeze(-1))

    def train(self, mode: bool = True) -> RewardScorer:
        """Set the mode; the model inside stays without dropout."""
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        modes.scoring(self.model, dropout=False, tracking=torch.is_grad_enabled())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layer activations in the backward."""
        modes.enable_checkpointing(self.model)

    @property
    def may_share(self) -> bool:
        """Whether rows may be packed with common starts once, as far as is known before the first pass."""
        return self.layout != "padded" and self._by_trunk and self._scorer.not_shared is None

    @property
    def layout_used(self) -> LayoutUsed:
        """Token counts of the last pass through the model."""
        return self._scorer.used

    @property
    def hf_model(self) -> Any:
        """The transformers model or PeftModel."""
        return self.model

    def save_pretrained(self, directory: str | Path, *, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter (peft layout) or the full model. Its head counts as trained from here on.

        Args:
            directory: made where it is missing.
            whole: of :meth:`whole_state`, where the parameters are spread over processes; one process writes then.
        """
        pretrained.trained(self.model)
        options: dict[str, Any] = {} if whole is None else {"state_dict": under("model.", whole)}
        if adapters.is_peft(self.model):
            name = adapters.active_adapter(self.model)
            options |= {"selected_adapters": [name], "save_embedding_layers": False}
        with instant("weights.write"):
            self.model.save_pretrained(str(directory), **options)


class ModelReward:
    """A reward function made of a sequence classifier: ``f(prompts, completions, **columns) -> list[float | None]``.

    Texts are tokenised by the reward model's own tokenizer. Conversations go through its chat template.

    Args:
        model: a hub id, a folder, or a classifier in memory.
        tokenizer: the reward model's tokenizer; None loads it from the same source.
        batch_size: texts per forward.
        max_tokens: tokens per forward (texts x longest text) in place of ``batch_size``; a longer text is scored alone.
        max_length: texts of more tokens are not scored (None, and a warning); None takes the model's own limit.
        add_eos: end plain texts with the end-of-sequence token, as in training.
        name: of the reward in the log.
        options: for :func:`rlft.models.load_sequence_classifier`.

    Raises:
        ValueError: when the score head was never trained, there is no single output, or a size is below 1 or does nothing.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        *,
        batch_size: int = _TEXTS,
        max_length: int | None = None,
        add_eos: bool = True,
        name: str | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        from rlft.models.tokenizer import check_tokenizer, load_tokenizer

        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1 (texts per forward), got {batch_size}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1 (texts x longest text of a forward), got {max_tokens}")
        if max_tokens is not None and batch_size != _TEXTS:
            raise ValueError(f"batch_size={batch_size} does nothing beside max_tokens={max_tokens}; drop one")
        if tokenizer is None:
            if isinstance(model, nn.Module):
                raise ValueError("a reward model in memory needs its tokenizer: ModelReward(model, tokenizer)")
            shared = {k: v for k, v in options.items() if k in ("revision", "trust_remote_code")}
            tokenizer = load_tokenizer(model, **shared)
        loaded = loading.load_sequence_classifier(model, **options)
        if new := pretrained.new_head(loaded):
            raise ValueError(
                f"{model if not isinstance(model, nn.Module) else type(model).__name__} has no trained score head ({new[0]} "
                f"is random), so its rewards would be noise; train it first with a reward-model objective"
            )
        check_tokenizer(tokenizer, loaded)
        self.scorer = RewardScorer(loaded).requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.tokens_of_run: int | None = None  # a run's limit, where none was given here
        self.add_eos = add_eos
        limit = self.scorer._scorer.max_positions
        self.max_length = limit if max_length is None else min(max_length, limit or max_length)
        self.__name__ = name or _name(model)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: Any = None, **options: Any) -> ModelReward:
        """Load classifier and tokenizer from one source, onto a device."""
        reward = cls(source, **options)
        if device is not None:
            reward.scorer.to(device)
        return reward

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """Score prompt and completion, one number per row; None where a text is too long."""
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts and {len(completions)} completions; give one prompt per completion"
            )
        ids = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores: list[float | None] = [None] * len(ids)
        fitting = [i for i, row in enumerate(ids) if self.max_length is None or len(row) <= self.max_length]
        if len(fitting) < len(ids):
            warnings.warn(
                f"{len(ids) - len(fitting)} of {len(ids)} texts are longer than the reward model's {self.max_length} tokens "
                f"and stay unscored; lower max_completion_length",
                stacklevel=2,
            )
        device = next(self.scorer.parameters()).device
        if self.scorer.may_share and device.type in DEVICES:
            fitting.sort(key=lambda i: ids[i])  # answers of one prompt side by side
        else:
            fitting.sort(key=lambda i: len(ids[i]))  # neighbours of one length waste the least padding
        for chunk in self._chunks(fitting, [len(row) for row in ids]):
            for i, score in zip(chunk, self._score([ids[i] for i in chunk], device), strict=True):
                scores[i] = score
        return scores

    def _chunks(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """``order`` in pieces for one forward each."""
        budget = self.tokens_of_run if self.max_tokens is None else self.max_tokens
        chunks: list[list[int]] = []
        width = 0
        for i in order:
            width = max(width, lengths[i])
            count = len(chunks[-1]) + 1 if chunks else 1
            full = count > self.batch_size if budget is None else count * width > budget
            if not chunks or full:
                chunks.append([])
                width = lengths[i]
            chunks[-1].append(i)
        return chunks

    @torch.no_grad()
    def _score(self, ids: list[list[int]], device: torch.device) -> list[float]:
        self.scorer.eval()
        heads, owner = _common_starts(ids)
        prompts, prompt_mask = _padded(heads)
        tails, mask = _padded([row[len(heads[group]) :] for row, group in zip(ids, owner, strict=True)])
        batch = Batch(
            prompt_ids=prompts,
            prompt_mask=prompt_mask,
            completion_ids=tails,
            completion_mask=mask,
            mask=mask,
            group_ids=torch.tensor(owner),
        )
        return self.scorer(batch.to(device))["scores"].tolist()

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        tokenizer = self.tokenizer
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = tokenizer(prompt + completion)["input_ids"]
            end = tokenizer.eos_token_id
            return [*ids, end] if self.add_eos and ids[-1:] != [end] else list(ids)
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are conversations and the reward model's tokenizer has no chat template; set "
                "tokenizer.chat_template, or use plain text prompts"
            )
        text = tokenizer.apply_chat_template([*messages, *answer], tokenize=False)
        # The template writes its own BOS; a second one would be a text the reward model never saw.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_starts(ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Rows that begin alike, answers of one prompt for the most part: what they share, and whose each row is.

    Neighbours in sorted order that have at least half of the shorter row in common are put together.
    """
    heads: list[list[int]] = []
    owner = [0] * len(ids)
    before: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: ids[i]):
        row = ids[i]
        known = heads[-1] if heads else []
        common = next(
            (n for n, (a, b) in enumerate(zip(known, row, strict=False)) if a != b), min(len(known), len(row))
        )
        alike = heads and 2 * common >= min(len(before), len(row))
        if alike:
            heads[-1] = known[:common]
        else:
            heads.append(list(row))
        owner[i], before = len(heads) - 1, row
    return heads, owner


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """``[B, W]`` ids and which of them exist."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    exists = torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]
    tokens[exists] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return tokens, exists


def _name(model: Any) -> str:
    source = str(model) if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "")
    return Path(source).name or "reward_model"
