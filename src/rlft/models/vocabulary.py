"""Small tokenizers trained on the data at hand: for models from scratch, demos and tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlft import _check

__all__ = ["KINDS", "train_tokenizer"]

KINDS = ("char", "word", "bpe")
_MOST = 1_000_000  # memory for all of it is taken at once, and where there is none the process would be ended
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def train_tokenizer(
    rows: Iterable[Any], *, kind: str = "bpe", vocab_size: int = 2000, chat_template: str | None = None
) -> Any:
    """A fast tokenizer of the texts in ``rows``, with ``<pad>``, ``<bos>``, ``<eos>``, ``<unk>`` as ids 0 to 3.

    Args:
        rows: texts, or dataset rows whose strings (nested ones too) are the texts.
        kind: ``char``: one token per character; ``word``: split at white space; ``bpe``: byte-level merges.
        vocab_size: upper bound of the vocabulary.
        chat_template: Jinja template for conversations; default for ``messages`` data: role and content by line.

    Returns:
        A ``PreTrainedTokenizerFast``. Words and characters that are not in ``rows`` become ``<unk>``.

    Raises:
        ValueError: for an unknown kind, or a vocabulary smaller than the special tokens or larger than a million.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer kind {kind!r} is unknown{_check.suggestion(kind, KINDS)}")
    if not isinstance(vocab_size, int) or not len(_SPECIAL) < vocab_size <= _MOST:
        raise ValueError(
            f"vocab_size must be an integer above {len(_SPECIAL)} and up to {_MOST}, got {vocab_size!r}; change vocab_size"
        )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        core = Tokenizer(models.WordLevel(unk_token="<unk>"))
        if kind == "word":
            core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            core.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
    core.train_from_iterator(_texts(rows), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template or (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


def _texts(value: Any) -> Iterator[str]:
    """Every string inside rows, columns, messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _texts(inner)
