"""Stop strings as automata over tokens: one table look-up per row and token, and no text is decoded while sampling.

Text may be cut into tokens anywhere, so a stop string may begin in the middle of one token and end in the middle of a
later one. How much of it stands at the end of a row is the state of an automaton over bytes (Aho and Corasick 1975); a
token moves that state by all its bytes at once, which is tabulated for every state and token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["IDLE", "STOPPED", "StopStrings"]

IDLE = 0  # the state of a row without stop strings: no token moves it
STOPPED = 1  # of a row in which one is complete
_KEPT = 8  # tables kept for later calls
_REPLACEMENT = "�"  # what stands for bytes that are no character


class StopStrings:
    """The tables of a tokenizer's tokens, made when they are first asked for.

    Args:
        tokenizer: gives the bytes of every token; special tokens count by their text.
        vocab: how many tokens the model knows; those that the tokenizer does not know have no text.
    """

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self._bytes: list[bytes] | None = None
        self._tables: dict[tuple[str, ...], Tensor] = {}

    def table(self, strings: tuple[str, ...]) -> Int[Tensor, "S V"]:
        """The next state by state and token: 0 :data:`IDLE`, 1 :data:`STOPPED` (both stay), 2 the beginning of a row.

        Raises:
            ValueError: for a tokenizer that cannot say the text of its tokens.
        """
        if strings not in self._tables:
            if self._bytes is None:
                self._bytes = _token_bytes(self.tokenizer, self.vocab)
            while len(self._tables) >= _KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[strings] = _by_token([string.encode() for string in strings], self._bytes)
        return self._tables[strings]

    def joint(self, sets: Sequence[tuple[str, ...]]) -> tuple[Int[Tensor, "S V"], list[int]]:
        """One table for several sets of strings, and the state in which a row of each begins."""
        parts, begins, size = [], [], 2
        for strings in sets:
            if not strings:
                begins.append(IDLE)
                continue
            table = self.table(strings)
            begins.append(size)
            if not parts:
                parts.append(table[:2])
            parts.append(table[2:] + (size - 2) * (table[2:] > STOPPED))
            size += len(table) - 2
        return torch.cat(parts), begins

    def cut(self, ids: Sequence[int], strings: tuple[str, ...]) -> int | None:
        """How many tokens it takes until a string is complete; None where none is."""
        if not strings:
            return None
        table, state = self.table(strings), 2
        for place, token in enumerate(ids):
            state = int(table[state, token])
            if state == STOPPED:
                return place + 1
        return None


def _by_token(strings: list[bytes], tokens: list[bytes]) -> Int[Tensor, "S V"]:
    prefixes = sorted({string[:length] for string in strings for length in range(len(string))}, key=len)
    number = {prefix: 2 + index for index, prefix in enumerate(prefixes)}  # that of b"" is 2
    letters = {letter: 1 + index for index, letter in enumerate(sorted({*b"".join(strings)}))}
    step = torch.full((2 + len(prefixes), 1 + len(letters)), 2)  # column 0: a byte that is in no string
    step[IDLE], step[STOPPED] = IDLE, STOPPED
    for prefix, state in number.items():
        for letter, column in letters.items():
            text = prefix + bytes([letter])
            if any(text.endswith(string) for string in strings):
                step[state, column] = STOPPED
            else:
                step[state, column] = next(number[text[k:]] for k in range(len(text) + 1) if text[k:] in number)
    # Longest tokens first: those that still have a byte at some place are then the first ones.
    order = sorted(range(len(tokens)), key=lambda token: -len(tokens[token]))
    state = torch.arange(len(step))[:, None].repeat(1, len(tokens))
    live = len(order)
    for place in range(len(tokens[order[0]])):
        while live and len(tokens[order[live - 1]]) <= place:
            live -= 1
        here = torch.tensor([letters.get(tokens[token][place], 0) for token in order[:live]])
        state[:, :live] = step[state[:, :live], here]
    found = torch.empty_like(state, dtype=torch.int32)
    found[:, torch.tensor(order)] = state.int()
    return found


def _token_bytes(tokenizer: Any, vocab: int) -> list[bytes]:
    """The bytes that each token adds to a text behind another token (in front, some tokenizers drop a space)."""
    known = min(vocab, len(tokenizer))
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    start, *texts = _decoded(tokenizer, [before, *([*before, token] for token in range(known))])
    found = []
    for token, whole in enumerate(texts):
        if not whole.startswith(start):
            raise ValueError(
                f"stop_strings cannot be used with this {type(tokenizer).__name__}: token {token} changes the text "
                f"before it; end rows by stop_token_ids"
            )
        added = whole[len(start) :]
        found.append(_pieces(tokenizer.convert_ids_to_tokens(token)) if _REPLACEMENT in added else added.encode())
    return found + [b""] * (vocab - known)


def _decoded(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "decode_batch"):  # what decode calls as well, without its cost for each of so many
        return backend.decode_batch(rows, skip_special_tokens=False)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(row, **options) for row in rows]


def _pieces(token: str) -> bytes:
    """Bytes of a token that is no whole character: SentencePiece writes ``<0xE2>``, GPT-2 one letter for each byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    letters = _byte_letters()
    return bytes([letters[letter] for letter in token]) if all(x in letters for x in token) else token.encode()


@functools.cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + index): b for index, b in enumerate(others)}
