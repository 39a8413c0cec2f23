"""What all trainers are given: a random Llama with a word tokenizer in a local folder, prompts and pairs of fixed length.

Every word ``t17`` is one token, so lengths are exact. A random model ends an answer with probability 1 / vocabulary per
token: answers have the full length, the same for everyone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["even_tokens", "make_model", "pairs", "prompts", "sampled_tokens"]

SPECIALS = ("<pad>", "<eos>", "<unk>")


def make_model(folder: str | Path, *, hidden: int, layers: int, vocab: int, heads: int = 4) -> None:
    """Write a random causal language model and its tokenizer to a folder.

    Args:
        folder: where.
        hidden: width of the model; the feed-forward layers are 8/3 as wide.
        layers: how many.
        vocab: tokens, special ones included.
        heads: attention heads; half as many for keys and values.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = [*SPECIALS, *(f"t{i}" for i in range(len(SPECIALS), vocab))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)


def _words(generator: random.Random, count: int, vocab: int) -> str:
    return " ".join(f"t{generator.randrange(len(SPECIALS), vocab)}" for _ in range(count))


def prompts(count: int, *, length: int, vocab: int) -> list[dict[str, Any]]:
    """Rows with a ``prompt`` of exactly ``length`` tokens."""
    generator = random.Random(0)
    return [{"prompt": _words(generator, length, vocab)} for _ in range(count)]


def pairs(count: int, *, prompt_length: int, lengths: Sequence[int], vocab: int) -> list[dict[str, Any]]:
    """Preference rows: prompts of one length, answers whose lengths take turns through ``lengths``.

    The EOS that trainers append is counted in ``lengths``.
    """
    generator = random.Random(1)
    rows = []
    for i in range(count):
        chosen, rejected = lengths[2 * i % len(lengths)], lengths[(2 * i + 1) % len(lengths)]
        rows.append(
            {
                "prompt": _words(generator, prompt_length, vocab) + " ",
                "chosen": _words(generator, chosen - 1, vocab),
                "rejected": _words(generator, rejected - 1, vocab),
            }
        )
    return rows


class _Seen:
    """How many answer tokens the reward saw last."""

    tokens = 0


def sampled_tokens() -> int:
    """Answer tokens of the last rollout, as its reward function saw them."""
    return _Seen.tokens


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    _Seen.tokens = sum(len(ids) for ids in completion_ids)
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]
