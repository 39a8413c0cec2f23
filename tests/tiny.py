"""Tiny models and a character tokenizer, built in memory from a seed: ``from tests.tiny import tiny_llama``.

Every builder leaves the global random state as it found it, and draws weights large enough (std 0.2) that a wrong
position, mask or temperature is far outside any tolerance.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch

CHARS = "".join(chr(c) for c in range(32, 127)) + "\n"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
VOCAB = len(SPECIALS) + len(CHARS)  # 100

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def char_tokenizer(
    *, pad: bool = True, bos: bool = True, eos: bool = True, add_bos: bool = False, chat_template: bool | str = False
) -> Any:
    """One token per printable ASCII character; ``<pad>``, ``<bos>``, ``<eos>``, ``<unk>`` are ids 0 to 3.

    Args:
        pad, bos, eos: whether the tokenizer names that special token (the id exists either way).
        add_bos: put ``<bos>`` in front of every encoded text (``add_special_tokens=True``).
        chat_template: True for a small template, or a template of your own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *CHARS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
        )
    backend.add_special_tokens(list(SPECIALS))
    named = {"unk_token": "<unk>"}
    named |= {"pad_token": "<pad>"} if pad else {}
    named |= {"bos_token": "<bos>"} if bos else {}
    named |= {"eos_token": "<eos>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE if chat_template is True else chat_template
    return tokenizer


_IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def _build(config: Any, *, seed: int, dtype: torch.dtype, head: str = "causal") -> Any:
    import transformers

    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():  # norms and biases start at 1 and 0: move them, or a bug in them stays invisible
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.__class__ = _exact(type(module))
    return model.to(dtype).eval()


@functools.cache
def _exact(norm: type) -> type:
    """An RMS norm without the float32 inside: in a float64 model it would limit every gradient to 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return norm.forward(self, x)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    return type(norm.__name__, (norm,), {"forward": forward})


@functools.cache
def _exact_attention() -> None:
    """Gemma 2's eager attention without the float32 softmax inside, for float64 models.

    It rounds float64 scores to float32: two ways to one number that are 1e-16 apart come out 1e-8 apart, on some processors
    and not on others.
    """
    from transformers.models.gemma2 import modeling_gemma2

    eager, softmax = modeling_gemma2.eager_attention_forward, torch.nn.functional.softmax

    def forward(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.dtype != torch.float64:
            return eager(module, query, *args, **kwargs)
        with mock.patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)):
            return eager(module, query, *args, **kwargs)

    modeling_gemma2.eager_attention_forward = forward


def _rope(config_name: str, overrides: dict[str, Any], defaults: dict[str, Any] | None = None) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **_IDS,
    }
    return getattr(transformers, config_name)(**{**settings, **(defaults or {}), **overrides})


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Llama, two layers of 32, rotary positions, grouped-query attention, untied head (about 17k parameters)."""
    return _build(_rope("LlamaConfig", config), seed=seed, dtype=dtype, head=head)


def tiny_qwen2(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Qwen2: biases in the attention, tied embeddings."""
    config.pop("head_dim", None)
    settings = _rope("Qwen2Config", config, {"tie_word_embeddings": True})
    return _build(settings, seed=seed, dtype=dtype, head=head)


def tiny_qwen3(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Qwen3: normalised queries and keys."""
    return _build(_rope("Qwen3Config", config), seed=seed, dtype=dtype, head=head)


def tiny_mistral(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Mistral with a sliding window of 6 tokens, shorter than most test rows."""
    return _build(_rope("MistralConfig", config, {"sliding_window": 6}), seed=seed, dtype=dtype, head=head)


def tiny_gemma2(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Gemma 2: logits soft-capped at 3 (low, so that the cap bites), tied embeddings scaled by sqrt(D).

    In float64 its eager attention gives NaN where a window of 6 sees padding alone: keep float64 rows short.
    """
    defaults = {
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "tie_word_embeddings": True,
    }
    _exact_attention()
    return _build(_rope("Gemma2Config", config, defaults), seed=seed, dtype=dtype, head=head)


def tiny_phi(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Phi: a bias in the head, partial rotary."""
    config.pop("head_dim", None)
    return _build(_rope("PhiConfig", config), seed=seed, dtype=dtype, head=head)


def tiny_cohere(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Cohere: logits multiplied by ``logit_scale``."""
    defaults = {"logit_scale": 0.25, "tie_word_embeddings": True}
    return _build(_rope("CohereConfig", config, defaults), seed=seed, dtype=dtype, head=head)


def tiny_granite(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """Granite: logits divided by ``logits_scaling``."""
    return _build(_rope("GraniteConfig", config, {"logits_scaling": 2.0}), seed=seed, dtype=dtype, head=head)


def tiny_gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "causal", **config: Any) -> Any:
    """GPT-2: absolute positions, tied head; dropout 0 unless asked (``resid_pdrop=0.1, ...``)."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_IDS,
    }
    return _build(transformers.GPT2Config(**{**settings, **config}), seed=seed, dtype=dtype, head=head)


FAMILIES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "phi": tiny_phi,
    "cohere": tiny_cohere,
    "granite": tiny_granite,
    "gpt2": tiny_gpt2,
}


def random_batch(
    *,
    groups: int = 3,
    per_group: int = 2,
    prompt_lengths: tuple[int, int] = (1, 6),
    lengths: tuple[int, int] = (1, 5),
    vocab: int = VOCAB,
    seed: int = 0,
) -> Any:
    """A ragged :class:`rlft.types.Batch` of random ids (never a special token), prompts and rows right-padded."""
    from rlft.types import Batch

    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    rows = groups * per_group
    prompt_length, length = draw(*prompt_lengths, (groups,)), draw(*lengths, (rows,))
    prompt_length[0], length[0] = prompt_lengths[1], lengths[1]  # the widest is always there
    prompt_mask = torch.arange(prompt_lengths[1])[None] < prompt_length[:, None]
    completion_mask = torch.arange(lengths[1])[None] < length[:, None]
    return Batch(
        prompt_ids=draw(len(SPECIALS), vocab - 1, tuple(prompt_mask.shape)).where(prompt_mask, PAD_ID),
        prompt_mask=prompt_mask,
        completion_ids=draw(len(SPECIALS), vocab - 1, tuple(completion_mask.shape)).where(completion_mask, PAD_ID),
        completion_mask=completion_mask,
        mask=completion_mask.clone(),
        group_ids=torch.arange(groups).repeat_interleave(per_group),
    )
