"""The plain way to score a batch: each row alone, no padding, full logits, no library code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlft.types import Batch
from tests.tiny import random_batch, tiny_llama


def row_ids(batch: Batch, i: int) -> tuple[Tensor, Tensor]:
    group = int(batch.group_ids[i])
    return batch.prompt_ids[group][batch.prompt_mask[group]], batch.completion_ids[i][batch.completion_mask[i]]


def alone(model: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """``[B, T, V]`` log-softmax at the positions that predict completion tokens, zero elsewhere."""
    rows = []
    for i in range(batch.num_rows):
        prompt, completion = row_ids(batch, i)
        logits = model(torch.cat([prompt, completion])[None]).logits[0] / temperature
        logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        rows.append(torch.nn.functional.pad(logp, (0, 0, 0, batch.completion_ids.shape[1] - len(completion))))
    return torch.stack(rows)


def pick(logp: Tensor, batch: Batch) -> Tensor:
    """``[B, T]`` log-probs of the completion tokens."""
    ids = batch.completion_ids.where(batch.completion_mask, 0)
    return logp.gather(-1, ids[..., None]).squeeze(-1).where(batch.completion_mask, 0.0)


def exact_kl(logp: Tensor, ref: Tensor) -> Tensor:
    """``[B, T]`` ``KL(policy || reference)``."""
    return (logp.exp() * (logp - ref)).sum(-1)


def entropy(logp: Tensor, batch: Batch) -> Tensor:
    return -(logp.exp() * logp).sum(-1).where(batch.completion_mask, 0.0)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trained_lora(model: Any = None, *, seed: int = 3, **settings: Any) -> Any:
    """A LoRA whose B is not zero: an adapter that was trained before."""
    from rlft.models import LoraSettings, add_lora

    wrapped = add_lora(tiny_llama(dtype=torch.float64) if model is None else model, LoraSettings(r=2, **settings))
    perturb(wrapped, seed=seed)
    return wrapped


def perturb(model: Any, *, seed: int = 3, size: float = 0.3) -> None:
    """Move every trainable tensor, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def batch(**changes: Any) -> Batch:
    return random_batch(**changes)
