"""Layouts of a batch: the prompt of a group computed once, and rows packed without padding, against padded rows.

One forward and one backward pass of log-probs over all weights; the head is small, so that the trunk is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Variant
from benchmarks.worker import Tick

if TYPE_CHECKING:
    from rlft.models.scorer import Layout

__all__ = ["cases"]

HERE = "benchmarks.layouts"
SHARED, PADDED, AUTO = "each prompt once", "prompt repeated, padded", "auto"

#: Prompt tokens, answer tokens, answers of a prompt, prompts, and the shortest as a share of the longest.
SHAPES = (
    (256, 64, 8, 1, 1.0),
    (64, 256, 8, 1, 1.0),
    (1024, 64, 8, 1, 1.0),
    (1024, 256, 8, 1, 1.0),
    (2048, 64, 8, 1, 1.0),
    (512, 128, 16, 1, 1.0),
    (9, 9, 8, 8, 1.0),
    (64, 64, 8, 2, 1.0),
    (64, 64, 8, 2, 0.2),
    (256, 64, 8, 2, 0.2),
    (64, 256, 8, 2, 0.2),
    (256, 64, 2, 4, 0.5),
    (64, 64, 1, 16, 1.0),
    (64, 64, 1, 16, 0.2),
)
QUICK = ((24, 8, 4, 1, 1.0), (8, 16, 4, 2, 0.2))


def _model(hidden: int, layers: int, vocab: int) -> Any:
    from rlft.models import load_causal_lm

    torch.manual_seed(0)
    return load_causal_lm(
        {
            "model_type": "qwen2",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        }
    )


def _batch(prompts: list[int], answers: list[int], each: int, vocab: int) -> Any:
    """Prompts and answers of these lengths, ``each`` answers of a prompt."""
    from rlft.types import Batch

    generator = torch.Generator().manual_seed(0)

    def ids(lengths: list[int]) -> tuple[Tensor, Tensor]:
        exists = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return torch.randint(1, vocab, exists.shape, generator=generator), exists

    (prompt_ids, prompt_mask), (completion_ids, mask) = ids(prompts), ids(answers)
    groups = torch.arange(len(prompts)).repeat_interleave(each)
    return Batch(prompt_ids, prompt_mask, completion_ids, mask, mask, groups)


def _lengths(count: int, longest: int, shortest: float, seed: int) -> list[int]:
    """From ``shortest * longest`` to ``longest``, which is there once at least."""
    low = max(1, round(shortest * longest))
    drawn = torch.randint(low, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [longest, *drawn[1:]]


def _lognormal(count: int, total: int, longest: int) -> list[int]:
    """Lengths with the quantiles of a lognormal, scaled so that they sum to about ``total`` and the last is ``longest``."""
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    low, high = 0.01, 4.0  # sigma: the ratio of mean to longest falls as it grows
    for _ in range(60):
        sigma = (low + high) / 2
        shape = (sigma * (quantiles - quantiles[-1])).exp()
        low, high = (sigma, high) if shape.sum() * longest > total else (low, sigma)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [max(2, round(x)) for x in (shape[order] * longest).tolist()]


def _repeat(tick: Tick, model: Any, forward: Callable[[], Tensor], **facts: float) -> None:
    tick()
    while True:
        loss = forward()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        tick(loss=float(loss.detach()), grad=float(norm), **facts)


def _policy(tick: Tick, layout: Layout, model: Any, batch: Any) -> None:
    from rlft.models import Policy
    from rlft.models.shared import build_shared

    shared = build_shared(batch)
    assert shared is not None
    policy = Policy(model, reference="none", layout=layout)
    want = frozenset({"logps"})
    _repeat(tick, model, lambda: policy(batch, want=want)["logps"].sum(), bound=shared.ratio)


def rlft_groups(
    tick: Tick, *, layout: Layout, prompt: int, answer: int, group: int, prompts: int, shortest: float, **model: int
) -> None:
    lengths = _lengths(prompts, prompt, shortest, 1), _lengths(prompts * group, answer, shortest, 2)
    _policy(tick, layout, _model(**model), _batch(*lengths, group, model["vocab"]))


def rlft_rows(tick: Tick, *, layout: Layout, rows: int, prompt: int, tokens: int, longest: int, **model: int) -> None:
    answers = [n - prompt for n in _lognormal(rows, tokens, longest)]
    _policy(tick, layout, _model(**model), _batch([prompt] * rows, answers, 1, model["vocab"]))


def plain_rows(tick: Tick, *, rows: int, prompt: int, tokens: int, longest: int, **settings: int) -> None:
    """The model called on padded rows, log-probs from the logits of every token."""
    from rlft.models.layout import build_rows

    answers = [n - prompt for n in _lognormal(rows, tokens, longest)]
    model, batch = _model(**settings), _batch([prompt] * rows, answers, 1, settings["vocab"])
    model.train()
    padded = build_rows(batch)
    targets = padded.input_ids.roll(-1, 1)[..., None]
    wanted = torch.zeros(targets.shape[:2])
    wanted[padded.row, padded.column] = 1.0

    def forward() -> Tensor:
        logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
        return (logits.log_softmax(-1).gather(-1, targets).squeeze(-1) * wanted).sum()

    _repeat(tick, model, forward)


def cases(*, quick: bool = False) -> list[Case]:
    """The layouts' cases: groups that share a prompt, and rows that share nothing."""
    model = {"hidden": 64, "layers": 2, "vocab": 512} if quick else {"hidden": 256, "layers": 4, "vocab": 512}
    found = []
    for prompt, answer, group, prompts, shortest in QUICK if quick else SHAPES:
        shape = {"prompt": prompt, "answer": answer, "group": group, "prompts": prompts, "shortest": shortest}
        ragged = f", shortest {shortest:g}" if shortest < 1 else ""
        variants = [
            Variant(name, f"{HERE}:rlft_groups", {"layout": layout, **shape, **model})
            for name, layout in ((SHARED, "shared"), (PADDED, "padded"), (AUTO, "auto"))
        ]
        found.append(
            Case(
                f"layout: {prompts} x {group} answers, {prompt} + {answer}{ragged}",
                "log-probs forward and backward, each prompt computed once or repeated for every answer",
                {"model": model, **shape},
                variants,
                rounds=1 if quick else 3 if prompt >= 1024 else 5,
                same=("loss", "grad"),
                tolerance=1e-4,
                kind="layout",
            )
        )
    rows = {"rows": 8, "prompt": 4, "tokens": 150, "longest": 48}
    if not quick:
        rows, model = {"rows": 32, "prompt": 8, "tokens": 5631, "longest": 450}, {**model, "vocab": 8000}
    lengths = _lognormal(rows["rows"], rows["tokens"], rows["longest"])
    efficiency = round(sum(lengths) / (len(lengths) * max(lengths)), 3)
    packing = Case(
        "packing, rows that share nothing",
        "log-probs forward and backward of rows of lognormal length",
        {"model": model, **rows, "pad_efficiency": efficiency},
        [
            Variant("rlft, packed", f"{HERE}:rlft_rows", {"layout": "auto", **rows, **model}),
            Variant("rlft, padded", f"{HERE}:rlft_rows", {"layout": "padded", **rows, **model}),
            Variant("transformers, padded, all logits", f"{HERE}:plain_rows", {**rows, **model}),
        ],
        rounds=1 if quick else 5,
        same=("loss", "grad"),
        tolerance=1e-4,
    )
    return [*found, packing]
