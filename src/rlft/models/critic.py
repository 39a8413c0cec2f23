"""The value head, and a critic with a trunk of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlft.models.layout import Rows
from rlft.models.scorer import CausalScorer, Layout, unwrap
from rlft.models.shared import SharedRows

__all__ = ["CriticModel", "ValueHead"]


class ValueHead(nn.Module):
    """One number per hidden state: a linear layer that starts at zero, in float32 (float64 for float64 models).

    Starting at zero, the first advantages are the plain returns instead of a random function of the text.
    """

    def __init__(self, hidden_size: int, *, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """``[..., D]`` to ``[...]``, never in half precision."""
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).squeeze(-1)


class CriticModel(nn.Module):
    """A critic that shares nothing with the policy.

    Args:
        model: any transformers model over the same vocabulary. A sequence classifier with one label (a reward model)
            lends its score head as the starting point; otherwise the head starts at zero.
        layout: as of the policy.
    """

    def __init__(self, model: nn.Module, *, layout: Layout = "padded") -> None:
        super().__init__()
        self.model: Any = model
        self._scorer = CausalScorer(model, layout=layout)
        base = unwrap(model)
        trunk = self._scorer.trunk
        if trunk is None:
            raise ValueError(
                f"{type(base).__name__} has no trunk (base_model) to put a value head on; pass a causal LM"
            )
        reference = next(trunk.parameters())
        dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
        size = base.config.get_text_config().hidden_size
        self.head = ValueHead(size, dtype=dtype, device=reference.device)
        score = getattr(base, "score", None)
        weight = getattr(score, "weight", None)
        if weight is not None and weight.shape == self.head.weight.shape:
            with torch.no_grad():
                self.head.weight.copy_(weight)
        for unused in (getattr(base, "lm_head", None), score):
            # They take no part in the forward: a trainable one would wait for a gradient that never comes. A head tied
            # to the embedding is the embedding, and stays trainable.
            if isinstance(unused, nn.Module):
                tied = {id(p) for p in trunk.parameters()}
                for parameter in unused.parameters():
                    if id(parameter) not in tied:
                        parameter.requires_grad_(False)

    def forward(self, rows: Rows, shared: SharedRows | None = None) -> Tensor:
        """``[N]`` value of the state before each scored token; with each prompt once where the model allows it."""
        return self.head(self._scorer.hidden_states(rows, shared))
