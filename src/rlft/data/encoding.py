"""Rows as token ids: :class:`Encoder`.

The prompt's ids are those of the prompt alone, because generation starts from them; an answer's ids are what follows
them. Four rules hold for every row, and have tests:

1. The prompt is a token prefix of the row. Prompt and answer are tokenised together and split where the prompt ends.
   Where the tokenizer merges across that place (``"2+2="`` and ``"=4"``), the answer is tokenised on its own, in the
   way that continues the prompt (no word-start mark that the text does not have), checked by decoding, and counted;
   ``boundary="refuse"`` raises instead. Moving the split, as others do, would train on a prompt that is never seen.
2. There is one BOS at most: the tokenizer's on text, the template's on conversations. Without a BOS there is none.
3. An answer ends with one end-of-sequence token and it is trained on. It is recognised by its place, never by its id
   elsewhere, so padding with the same id is no problem. A truncated answer has none.
4. In a conversation, the assistant's turns are trained on; everything between them is there, and masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlft import _check
from rlft.data.chat import Chat, Cut
from rlft.data.parsing import EMPTY_COMPLETION, EMPTY_PROMPT, BadRow, ParsedRow

__all__ = ["Encoded", "Encoder", "Limits"]

PROMPT_LONG = "prompt longer than max_prompt_length"
PROMPT_FILLS = "prompt fills max_length"
NOTHING_LEFT = "nothing to train on within the length limit"
NO_TOKENS = "completion has no tokens of its own"
NO_BOUNDARY = "prompt is not a token prefix of the row"

TruncationMode = Literal["keep_end", "keep_start", "skip"]
# Stretches of an answer: ids, and whether the assistant wrote them.
_Pieces = list[tuple[list[int], bool]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Length limits in tokens; None = no limit.

    Attributes:
        max_prompt_length: of the prompt, its BOS included.
        max_completion_length: of each answer, its EOS included.
        max_length: of prompt and answer together; what is over is cut from the answer.
        truncation_mode: of a prompt over its limit: keep its end (and its BOS), keep its start, or skip the row.
    """

    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_end"

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of tokens >= 1, or None for no limit, got {value!r}")
        if self.truncation_mode not in ("keep_end", "keep_start", "skip"):
            hint = _check.suggestion(str(self.truncation_mode), ("keep_end", "keep_start", "skip"))
            raise ValueError(f"truncation_mode {self.truncation_mode!r} is unknown{hint}")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as tokens."""

    ids: list[int]
    mask: list[bool]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens, and what had to be done to it."""

    prompt_ids: list[int]
    answers: list[Answer]
    prompt_truncated: bool
    boundary_split: bool
    eos_added: int
    special_in_text: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """The texts of a row, before any of them is tokenised."""

    prompt: str
    answers: list[tuple[str, list[Cut]]]
    chat: bool
    language_modelling: bool = False
    special_in_text: bool = False

    def texts(self) -> Iterable[str]:
        yield self.prompt
        for text, cuts in self.answers:
            yield from (text[:end] for end, _ in cuts)


class Encoder:
    """Turns checked rows into token ids.

    Args:
        tokenizer: a transformers tokenizer.
        limits: length limits.
        add_eos: end every answer with the end-of-sequence token.
        end_token_ids: further tokens that end an answer; where one does, no other is added.
        boundary: what to do where the tokenizer merges across the end of the prompt.
        separator: text between prompt and answer of rows that are text; it belongs to the prompt.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token, or an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        limits: Limits,
        add_eos: bool = True,
        end_token_ids: Sequence[int] = (),
        boundary: Literal["split", "refuse"] = "split",
        separator: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.add_eos = add_eos
        self.separator = separator
        self.boundary = boundary
        if boundary not in ("split", "refuse"):
            raise ValueError(f"boundary must be 'split' or 'refuse', got {boundary!r}")
        self.eos_id: int | None = tokenizer.eos_token_id
        if add_eos and self.eos_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so a policy could never learn to stop; set "
                "tokenizer.eos_token, or give add_eos=False"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.ends = {int(i) for i in end_token_ids} | ({self.eos_id} if self.eos_id is not None else set())
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids) | self.ends
        self.chat = Chat(tokenizer, tuple(tokenizer.convert_ids_to_tokens(sorted(self.ends))))
        texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self.special)) if text]
        longest_first = sorted(texts, key=len, reverse=True)
        self._special_texts = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.prefix = self._automatic_prefix()
        self._blank: dict[int, bool] = {}

    def encode(self, rows: Sequence[ParsedRow]) -> list[Encoded | BadRow]:
        """Encode rows together (one call of the tokenizer).

        Returns:
            For each row its tokens, or the reason it cannot be used.

        Raises:
            ValueError: a row shows that tokenizer or template do not fit the data; ``error.row`` is its position.
        """
        plans = [self._at(i, self._plan, row) for i, row in enumerate(rows)]
        texts = list(dict.fromkeys(text for plan in plans if isinstance(plan, _Plan) for text in plan.texts()))
        ids = dict(zip(texts, self._tokens(texts), strict=True)) if texts else {}
        return [
            plan if isinstance(plan, BadRow) else self._at(i, self._assemble, plan, ids) for i, plan in enumerate(plans)
        ]

    @staticmethod
    def _at(index: int, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except BadRow as bad:
            return bad
        except ValueError as error:
            error.row = index  # pyright: ignore[reportAttributeAccessIssue]
            raise

    # -- texts ------------------------------------------------------------------------------------------------------
    def _plan(self, row: ParsedRow) -> _Plan:
        if isinstance(row.prompt, list):
            arguments = (row.tools, row.template_kwargs)
            prompt = self.chat.prompt(row.prompt, *arguments, alone=not row.completions)
            return _Plan(
                prompt,
                [self.chat.answer(prompt, row.prompt, answer, *arguments) for answer in row.completions],  # pyright: ignore
                chat=True,
                special_in_text=any(map(self._writes_special, _contents(row))),
            )
        answers: list[str] = [answer for answer in row.completions if isinstance(answer, str)]
        if not row.prompt:  # a `text` row
            whole = [(text, [(len(text), True)]) for text in answers]
            return _Plan(
                "",
                whole,
                chat=False,
                language_modelling=True,
                special_in_text=self._writes_special(*answers, bos=True, end=True),
            )
        prompt = row.prompt + self.separator
        whole = [(prompt + text, [(len(prompt + text), True)]) for text in answers]
        special = self._writes_special(prompt, bos=True) or any(
            self._writes_special(text, end=True) for text in answers
        )
        return _Plan(prompt, whole, chat=False, special_in_text=special)

    def _writes_special(self, text: str, *, bos: bool = False, end: bool = False) -> bool:
        """Whether a text writes a special token, other than a BOS at its start or an end at its end where allowed."""
        found = self._special_texts.search(text)
        while found and (
            (bos and found.start() == 0 and found.group() == self.tokenizer.bos_token)
            or (end and found.end() == len(text) and found.group() in self.chat.end_tokens)
        ):
            found = self._special_texts.search(text, found.end())
        return found is not None

    # -- tokens -----------------------------------------------------------------------------------------------------
    def _assemble(self, plan: _Plan, ids: dict[str, list[int]]) -> Encoded:
        if plan.language_modelling:
            prompt, answers, split = self._language_modelling(plan, ids)
        else:
            prompt, split = ids[plan.prompt], False
            if not prompt:
                raise BadRow(EMPTY_PROMPT)
            answers = []
            for text, cuts in plan.answers:
                pieces, was_split = self._follow(prompt, plan.prompt, text, cuts, ids)
                answers.append(pieces)
                split |= was_split
            prompt = prompt if plan.chat else self._with_prefix(prompt)
        if self.bos_id is not None and prompt[:2] == [self.bos_id, self.bos_id]:
            raise ValueError(
                f"the prompt begins with two BOS tokens ({self.tokenizer.bos_token!r}); take it out of the "
                f"{'chat template' if plan.chat else 'text'}: the tokenizer adds its own"
            )
        kept, prompt_truncated = self._cut_prompt(prompt)
        finished = [self._finish(pieces, plan.chat) for pieces in answers]
        return Encoded(
            kept,
            [self._cut_answer(len(kept), answer, mask) for answer, mask, _ in finished],
            prompt_truncated,
            split,
            sum(added for _, _, added in finished) if plan.chat else 0,
            plan.special_in_text,
        )

    def _language_modelling(self, plan: _Plan, ids: dict[str, list[int]]) -> tuple[list[int], list[_Pieces], bool]:
        """A text on its own: what the tokenizer puts in front is the prompt, else the first token is."""
        text = plan.answers[0][0]
        whole = self._with_prefix(ids[text])
        start = max(1, len(self.prefix))
        if len(whole) <= start:
            raise BadRow(EMPTY_COMPLETION)
        return whole[:start], [[(whole[start:], True)]], False

    def _follow(
        self, prompt: list[int], prompt_text: str, text: str, cuts: list[Cut], ids: dict[str, list[int]]
    ) -> tuple[_Pieces, bool]:
        """The ids of each stretch of ``text`` after the prompt, so that earlier ids are always a prefix."""
        so_far, before, split = list(prompt), prompt_text, False
        pieces: _Pieces = []
        for end, trained in cuts:
            whole = ids[text[:end]]
            if whole[: len(so_far)] == so_far:
                new = whole[len(so_far) :]
            else:
                new = self._continuation(so_far, before, text[:end], whole)
                split = True
            pieces.append((new, trained))
            so_far += new
            before = text[:end]
        return pieces, split

    def _continuation(self, so_far: list[int], before: str, text: str, whole: list[int]) -> list[int]:
        """Tokenise what follows ``before`` so that ids so far and new ids decode to the whole text."""
        if self.boundary == "refuse":
            same = next((i for i, (a, b) in enumerate(zip(so_far, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                f"the prompt's tokens are not a prefix of the row's tokens: the prompt ends "
                f"{self._decode(so_far[same:])!r}, together with the answer the tokenizer writes "
                f"{self._decode(whole[same : same + 2])!r}; end the prompt with a separator (separator='\\n'), move "
                f"the white space between them, or give boundary='split' to tokenise the answer on its own"
            )
        rest = text[len(before) :]
        goal = self._decode(whole)
        # An anchor in front keeps tokenizers that mark the start of a text from marking the start of the answer.
        for anchor in ("", "\n", ":", "0", "a"):
            start, joined = (self._tokens([anchor, anchor + rest])) if anchor else ([], self._tokens([rest])[0])
            if joined[: len(start)] == start and self._decode([*so_far, *joined[len(start) :]]) == goal:
                return joined[len(start) :]
        raise BadRow(NO_BOUNDARY)

    def _finish(self, pieces: _Pieces, chat: bool) -> tuple[list[int], list[bool], int]:
        """Join the stretches; end the last one with one end-of-sequence token."""
        while pieces and not pieces[-1][1]:
            pieces = pieces[:-1]
        ids: list[int] = []
        mask: list[bool] = []
        for index, (piece, trained) in enumerate(pieces):
            keep = self._turn_end(piece) if trained and chat else len(piece)
            last = index == len(pieces) - 1
            ids += piece[:keep] if last else piece
            mask += [trained] * keep + [False] * (0 if last else len(piece) - keep)
        if not ids:  # e.g. an unknown character that the prompt's last unknown token swallows
            raise BadRow(NO_TOKENS)
        added = int(self.add_eos and ids[-1] not in self.ends)
        if added:
            assert self.eos_id is not None
            ids, mask = [*ids, self.eos_id], [*mask, True]
        return ids, mask, added

    def _turn_end(self, ids: list[int]) -> int:
        """How many tokens of a turn the assistant writes: up to the token that ends it, not the white space after."""
        tail = len(ids)
        while tail > 0 and (ids[tail - 1] in self.special or self._is_blank(ids[tail - 1])):
            tail -= 1
        ends = [i for i in range(tail, len(ids)) if ids[i] in self.ends]
        if ends:
            return ends[0] + 1
        special = [i for i in range(tail, len(ids)) if ids[i] in self.special]
        return special[-1] + 1 if special else tail

    # -- limits -----------------------------------------------------------------------------------------------------
    def _cut_prompt(self, ids: list[int]) -> tuple[list[int], bool]:
        limit = self.limits.max_prompt_length
        if limit is None or len(ids) <= limit:
            return ids, False
        if self.limits.truncation_mode == "skip":
            raise BadRow(PROMPT_LONG)
        if self.limits.truncation_mode == "keep_start":
            return ids[:limit], True
        lead = (
            len(self.prefix) if self.prefix and ids[: len(self.prefix)] == self.prefix else int(ids[0] == self.bos_id)
        )
        if lead >= limit:
            return ids[len(ids) - limit :], True
        return ids[:lead] + ids[len(ids) - (limit - lead) :], True

    def _cut_answer(self, prompt_length: int, ids: list[int], mask: list[bool]) -> Answer:
        room = self.limits.max_completion_length or len(ids)
        if self.limits.max_length is not None:
            if prompt_length >= self.limits.max_length:
                raise BadRow(PROMPT_FILLS)
            room = min(room, self.limits.max_length - prompt_length)
        truncated = len(ids) > room
        if not any(mask[:room]):
            raise BadRow(NOTHING_LEFT)
        return Answer(ids[:room], mask[:room], truncated)

    # -- the tokenizer ----------------------------------------------------------------------------------------------
    def _tokens(self, texts: list[str]) -> list[list[int]]:
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._decode([token]).strip()
        return self._blank[token]

    def _automatic_prefix(self) -> list[int]:
        """What the tokenizer itself puts in front of a text: its BOS, or nothing."""
        for text in ("a", "0", "."):
            plain = self._tokens([text])[0]
            if plain:
                full = self.tokenizer(text)["input_ids"]
                starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
                return full[: starts[0]] if starts else []
        raise ValueError(
            "the tokenizer turns 'a', '0' and '.' into no token at all; check that it is loaded completely"
        )

    def _with_prefix(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]


def _contents(row: ParsedRow) -> Iterator[str]:
    """The texts of a conversation's messages."""
    for messages in (row.prompt, *row.completions):
        for message in messages:
            if isinstance(message, dict):
                yield str(message.get("content", ""))
