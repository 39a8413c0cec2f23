"""One token for every live row of a Llama-like model, without going through the model's modules.

transformers runs dozens of small operations per layer and token. Many of them prepare what does not change (masks,
repeated heads, dtype conversions) or are done one by one where one product would do. :class:`LlamaStep` computes the
same function from the same weights: queries, keys and values in one product, gate and up in one, the rotary angles and
the mask once per step. Which models it knows is decided by :func:`rlft.rollout.llama_structure.unknown`, and
:func:`disagreement` holds its logits to the model's own before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft.models.float32_view import difference
from rlft.ops import gemm
from rlft.rollout.llama_structure import plain
from rlft.rollout.prompt_rows import PromptRows
from rlft.rollout.row_cache import FixedRows, RowCache
from rlft.rollout.shared_rows import SharedRows, can_share

__all__ = ["LlamaStep", "disagreement"]

_PROBED = 64  # tokens of a prompt that the comparison with the model's own forward reads
_STEPS = 3  # tokens that it adds: the later ones read keys that the step itself wrote


class _Budget:
    """How many bytes of weights may still be held a second time."""

    def __init__(self, left: int) -> None:
        self.left = left

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self.left:
            return False
        self.left -= size
        return True


def _packs(x: Tensor, weight: Tensor) -> bool:
    return gemm.pays(x, weight) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class _Product:
    """``x @ concatenated weights.T + biases``: in one product where the weights may be copied, else one after the other.

    A copy is stored in the order that oneDNN's kernels read, where :mod:`rlft.ops.gemm` takes oneDNN: a fifth to a third
    faster than giving it the weight as it is. (MKL's own packing was measured too, and gains nothing.)
    """

    def __init__(self, linears: Sequence[Any], rows: int, budget: _Budget) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        self.parts = list(zip(weights, biases, strict=True))
        self.packed: Tensor | None = None
        x = weights[0].new_empty(rows, weights[0].shape[1])
        if (len(weights) == 1 and not _packs(x, weights[0])) or not budget.takes(weights):
            return
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        filled = [weight.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        self.bias = torch.cat(filled) if any(bias is not None for bias in biases) else None
        if _packs(x, weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            self.parts = []
        else:
            self.parts = [(weight, self.bias)]

    def __call__(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R N"]:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if len(self.parts) == 1:
            return gemm.linear(x, *self.parts[0])
        return torch.cat([gemm.linear(x, *part) for part in self.parts], dim=-1)


def _rms_norm(x: Float[Tensor, "... D"], weight: Tensor, eps: float) -> Float[Tensor, "... D"]:
    """As transformers rounds it: in float32 whatever the dtype, and back before the weight."""
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Product
    output: _Product
    gate_up: _Product
    down: _Product
    activation: Any
    before_attention: Tensor
    before_mlp: Tensor
    qk_norm: Tensor | None  # [H + K, d]


class LlamaStep:
    """The decode step of a model whose structure is known, over its weights as they are when this is made.

    Args:
        model: a transformers model for which :func:`rlft.rollout.llama_structure.unknown` gives None, adapters merged.
        rows: the most rows of a step; products are prepared for them.
        copy_bytes: weights may be held once more, fused and in the order that the processor reads fastest, up to so many
            bytes; 0: they are used where they are.
    """

    def __init__(self, model: Any, *, rows: int, copy_bytes: int) -> None:
        budget = _Budget(copy_bytes)
        self.trunk = model.model
        first = self.trunk.layers[0].self_attn
        self.size = first.head_dim
        self.heads = plain(first.q_proj).out_features // self.size
        self.kv_heads = plain(first.k_proj).out_features // self.size
        self.scale = first.scaling
        self.eps = self.trunk.norm.variance_epsilon
        self.layers = [self._layer(layer, rows, budget) for layer in self.trunk.layers]
        self.norm = self.trunk.norm.weight.detach()
        self.embedding = self.trunk.embed_tokens.weight.detach()
        self.head = _Product([plain(model.lm_head)], rows, budget)

    def _layer(self, layer: Any, rows: int, budget: _Budget) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if hasattr(attention, "q_norm"):
            each = (attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.kv_heads, -1))
            qk_norm = torch.cat(each).detach()
        return _Layer(
            _Product([plain(attention.q_proj), plain(attention.k_proj), plain(attention.v_proj)], rows, budget),
            _Product([plain(attention.o_proj)], rows, budget),
            _Product([plain(mlp.gate_proj), plain(mlp.up_proj)], rows, budget),
            _Product([plain(mlp.down_proj)], rows, budget),
            mlp.act_fn,
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            qk_norm,
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[PromptRows, Float[Tensor, "P V"]]:
        """Run prompts through the model: their keys and values, and the logits of the token after each."""
        lengths = [len(prompt) for prompt in prompts]
        device = self.embedding.device
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        rows = PromptRows(lengths, len(self.layers))
        return rows, self(tokens, positions, rows, last=last)

    def __call__(
        self,
        tokens: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        cache: RowCache | FixedRows | SharedRows | PromptRows,
        *,
        last: Int[Tensor, " P"] | None = None,
    ) -> Float[Tensor, "P V"]:
        """Append tokens to their rows, and score what may follow.

        Args:
            tokens: one for each live row (or every token of prompts that :class:`PromptRows` knows).
            positions: how many tokens of its row stand before each.
            cache: holds the keys of those tokens, and gets those of the new ones.
            last: after which tokens to score; default: after each.

        Returns:
            Logits, in the model's dtype.
        """
        size = self.size
        turned = self.heads + self.kv_heads  # heads that carry a position
        x = torch.nn.functional.embedding(tokens, self.embedding)
        cos, sin = (part.transpose(0, 1) for part in self.trunk.rotary_emb(x, positions[None]))  # [N, 1, d] each
        # rotate_half(x) * sin is the two halves of x exchanged, times sin with its first half negated
        sin = torch.cat((-sin[..., : size // 2], sin[..., size // 2 :]), dim=-1)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(_rms_norm(x, layer.before_attention, self.eps)).view(len(x), -1, size)
            qk = qkv[:, :turned]
            if layer.qk_norm is not None:
                qk = _rms_norm(qk, layer.qk_norm, self.eps)
            exchanged = qk.unflatten(-1, (2, size // 2)).flip(-2).flatten(-2)
            if x.dtype.itemsize > 2:
                qk = torch.addcmul(qk * cos, exchanged, sin)
            else:  # rounded after each product, as the model's modules do: greedy rows then choose what they choose
                qk = qk * cos + exchanged * sin
            q = qk[:, : self.heads].view(len(x), self.kv_heads, -1, size)  # the queries that share a key, together
            found = cache.attend(index, q, qk[:, self.heads :], qkv[:, turned:], scale=self.scale)
            x = x + layer.output(found.reshape(len(x), -1))
            gate, up = layer.gate_up(_rms_norm(x, layer.before_mlp, self.eps)).chunk(2, dim=-1)
            x = x + layer.down(layer.activation(gate).mul_(up))
        return self.head(_rms_norm(x if last is None else x[last], self.norm, self.eps))


def disagreement(model: Any, step: LlamaStep, prompts: Sequence[Sequence[int]], *, pad_id: int) -> str | None:
    """How the step differs from the model's own forward on the longest and the shortest prompt; None where it does not.

    Three rows, two of them of one prompt, are given the same tokens by both; the model reads the prompts padded.
    """
    ordered = sorted(prompts, key=len)
    chosen = [list(prompt[-_PROBED:]) for prompt in (ordered[-1], ordered[0])]
    shares = can_share(model.device, model.dtype)  # as it is used, whatever precision it is compared in
    broken: list[bool] = []

    def compute() -> tuple[Tensor, Tensor]:
        pairs = _probed(model, step, chosen, pad_id=pad_id, shares=shares)
        truth, found = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        broken.append(not bool(torch.isfinite(truth).all()))
        return truth, found

    try:
        worst = difference(model, compute, device=model.device, layers=len(step.layers))
    except Exception as failure:  # whatever the model is: it is found here, and its own forward still serves
        return f"it stopped with {type(failure).__name__}: {failure}"
    if worst is None or any(broken):  # a broken model is named where a token is drawn
        return None
    return f"its logits differ by {worst:.1e} of their size"


def _probed(
    model: Any, step: LlamaStep, chosen: Sequence[Sequence[int]], *, pad_id: int, shares: bool
) -> list[tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]]:
    """Logits by the model and by the step: after the prompts, and after each of some tokens that are added."""
    from transformers import DynamicCache

    device, width = model.device, len(chosen[0])
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in chosen], device=device)
    start = torch.tensor([width - len(row) for row in chosen], device=device)
    known = DynamicCache()

    def own(new: Tensor) -> Tensor:
        columns = torch.arange(known.get_seq_length() + new.shape[1], device=device)
        return model(
            input_ids=new,
            attention_mask=(columns >= start[:, None]).long(),
            position_ids=(columns - start[:, None]).clamp(min=0)[:, -new.shape[1] :],
            past_key_values=known,
            logits_to_keep=1,
            use_cache=True,
        ).logits[:, -1]

    source = torch.tensor([0, 1, 0], device=device)
    lengths = torch.tensor([len(row) for row in chosen], device=device)[source]
    rows = RowCache(len(step.layers), 3)
    shared = SharedRows(len(step.layers), 3, 2) if shares else None
    truth = own(ids)
    prefilled, found = step.prefill(chosen)
    pairs = [(truth, found)]
    rows.admit(prefilled, source, columns=width, reserve=_STEPS)
    if shared is not None:
        names, sizes = source.tolist(), lengths.tolist()
        shared.admit(prefilled, source, columns=0, reserve=_STEPS, names=names, lengths=sizes)
    for added in range(_STEPS):
        # of the prompts, so that every call reads the same tokens, whatever its rounding would choose
        tokens = torch.tensor([row[-1 - added % len(row)] for row in chosen], device=device)
        truth = own(tokens[:, None])[source]
        rows.open(start[source])
        pairs.append((truth, step(tokens[source], lengths + added, rows)))
        if shared is not None:
            shared.open(torch.zeros_like(source))
            pairs.append((truth, step(tokens[source], lengths + added, shared)))
    return pairs
