"""Tokenizers: a stop token is required, a pad token is never the stop token."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from rlft.models import folder_checks
from rlft.models.scorer import unwrap

__all__ = ["check_tokenizer", "load_tokenizer"]

# Names under which families keep a token for padding, unused otherwise.
_PAD_NAMES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unused0>",
    "<|endoftext|>",
)
# The token of a NUL byte (byte-level and sentencepiece spelling): no text that is trained on holds one.
_NUL_NAMES = ("<0x00>", "\u0100")


def load_tokenizer(source: Any, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer, or take one from memory, and give it a pad token of its own.

    Args:
        source: a hub id, a local folder (an adapter folder without tokenizer leads to its base model), or a tokenizer.
        revision: the hub revision; pin it for a run that must be repeatable.
        trust_remote_code: run tokenizer code that comes with the model. Off unless you read it.

    Returns:
        A transformers tokenizer with ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ValueError: without an end-of-sequence token, without anything to pad with, or when local files ask for code.
    """
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "encode") or not hasattr(source, "eos_token_id"):
            raise ValueError(f"source must be a hub id, a folder or a tokenizer, got {type(source).__name__}")
        return _complete(source)
    from transformers import AutoTokenizer

    if folder_checks.is_local(source):
        folder = Path(source).expanduser()
        folder_checks.check_folder(folder, trust_remote_code=trust_remote_code)
        has_own = any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        )
        adapter = folder / "adapter_config.json"
        if not has_own and adapter.is_file():
            base = folder_checks.read_json(adapter).get("base_model_name_or_path")
            if not base:
                raise ValueError(f"{folder} holds an adapter without tokenizer or base model name; name the tokenizer")
            return load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
        source = folder
    extra = {} if revision is None else {"revision": revision}
    try:
        loaded = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code, **extra)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(source, Path):
            said = next(iter(str(error).strip().splitlines()), "").rstrip(". :")
            raise ValueError(
                f"{source} gives no tokenizer ({type(error).__name__}: {said:.300}); save one there "
                f"(tokenizer.save_pretrained), or name another"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise ValueError(folder_checks.not_from_hub("tokenizer", source, error)) from error
    return _complete(loaded)


def _complete(tokenizer: Any) -> Any:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no completion could ever end; set tokenizer.eos_token to the "
            "token that ends an answer"
        )
    if tokenizer.pad_token_id is None:
        token = _own_pad(tokenizer)
        tokenizer.pad_token = token
        warnings.warn(
            f"the tokenizer has no pad token; {token!r} (id {tokenizer.pad_token_id}) is used. Padding is masked by length, "
            f"so this changes no result; the end-of-sequence token is never used, or the model would not learn to stop",
            stacklevel=3,
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.warn(
            f"pad and end-of-sequence token are the same ({tokenizer.eos_token!r}); completions are masked by their length, "
            f"so the end-of-sequence token is still trained on",
            stacklevel=3,
        )
    return tokenizer


def _own_pad(tokenizer: Any) -> str:
    vocab, eos = tokenizer.get_vocab(), tokenizer.eos_token
    named = [name for name in _PAD_NAMES if name in vocab]
    special = [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token is not None]
    silent = [name for name in _NUL_NAMES if name in vocab]
    for token in (*named, *special, *silent):
        if token != eos:
            return token
    raise ValueError(
        "the tokenizer has no pad token and no other token that could serve as one; set tokenizer.pad_token to a token "
        "that never appears in your texts, and not to the end-of-sequence token"
    )


def check_tokenizer(tokenizer: Any, model: nn.Module | None = None) -> None:
    """Refuse a tokenizer that cannot end an answer, or produces ids the model has no embedding for.

    A missing pad token is filled in, as by :func:`load_tokenizer`.

    Args:
        tokenizer: a transformers tokenizer.
        model: the model it feeds; None checks the tokenizer alone.

    Raises:
        ValueError: without an end-of-sequence token; or naming the largest id and the size of the embedding.
    """
    _complete(tokenizer)
    if model is not None:
        check_embedding(tokenizer, model)


def check_embedding(tokenizer: Any, model: nn.Module) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        ValueError: naming the largest id and the size of the embedding.
    """
    base = unwrap(model)
    weight = base.get_input_embeddings().weight
    packed = not weight.is_floating_point()  # a quantised embedding
    rows = int(base.config.get_text_config().vocab_size) if packed else int(weight.shape[0])
    largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest[1] >= rows:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, up to {largest[0]!r} with id {largest[1]}, and the model embeds "
            f"{rows}; they do not belong together, or the model needs model.resize_token_embeddings({largest[1] + 1})"
        )
