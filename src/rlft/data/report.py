"""What happened to the data: :class:`DataReport`, and a look at one example: :func:`preview`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rlft.data.example import Example

__all__ = ["DataReport", "preview"]

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

#: What of a report is no count.
_NO_COUNT = {"format", "prompt_lengths", "completion_lengths"}

_DIM, _TRAINED, _RESET = "\x1b[2m", "\x1b[30;42m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class DataReport:
    """Counts of what became of every row.

    Attributes:
        format: of the data.
        rows: rows read.
        kept: rows that became examples.
        skipped: rows that did not, by reason.
        first: where the first row of each reason is.
        truncated_prompts: prompts cut to ``max_prompt_length``.
        truncated_completions: answers cut to their limit.
        completions: answers in all.
        boundary_splits: rows whose tokenizer merges across the end of the prompt, tokenised apart.
        eos_added: conversational answers whose template does not end with the end-of-sequence token.
        special_in_text: rows whose own text writes a special token, which the tokenizer makes of it.
        duplicates: rows that repeat an earlier one.
        trained_tokens: tokens that are trained on.
        prompt_lengths, completion_lengths: tokens at the quantiles 0, 0.5, 0.9, 0.99 and 1, after truncation.
    """

    format: str
    rows: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_completions: int = 0
    completions: int = 0
    boundary_splits: int = 0
    eos_added: int = 0
    special_in_text: int = 0
    duplicates: int = 0
    trained_tokens: int = 0
    prompt_lengths: tuple[int, ...] = ()
    completion_lengths: tuple[int, ...] = ()

    @property
    def num_skipped(self) -> int:
        """Rows skipped, for whatever reason."""
        return sum(self.skipped.values())

    def skip(self, reason: str, where: str) -> None:
        """Count one row that cannot be used."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def counts(self) -> dict[str, Any]:
        """All counts as plain JSON values, for a checkpoint."""
        names = [f.name for f in fields(self) if f.name not in _NO_COUNT]
        return {name: dict(value) if isinstance(value := getattr(self, name), dict) else value for name in names}

    def load_counts(self, counts: Mapping[str, Any]) -> None:
        """Go on from :meth:`counts`; names that this version does not know are left out."""
        for f in fields(self):
            if f.name in counts and f.name not in _NO_COUNT:
                value = counts[f.name]
                setattr(self, f.name, dict(value) if isinstance(value, dict) else int(value))

    def reasons(self) -> str:
        """``3 empty prompt (first: train.jsonl:17), 1 ...``"""
        ordered = sorted(self.skipped.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {reason} (first: {self.first[reason]})" for reason, count in ordered)

    def __str__(self) -> str:
        lines = [f"{self.format}: {self.kept} of {self.rows} rows kept"]
        lines += [
            f"  skipped   {self.skipped[reason]:>8}  {reason} (first: {self.first[reason]})" for reason in self.skipped
        ]
        for count, text in (
            (self.truncated_prompts, f"of {self.kept} prompts cut to the limit"),
            (self.truncated_completions, f"of {self.completions} answers cut to the limit; they hold no EOS"),
            (self.boundary_splits, "rows whose tokens merge across the end of the prompt, tokenised apart"),
            (self.eos_added, "answers whose chat template does not end with EOS; it was added"),
            (self.special_in_text, "rows whose text writes a special token; it becomes that token"),
            (self.duplicates, "rows that repeat an earlier one"),
        ):
            if count:
                lines.append(f"  note      {count:>8}  {text}")
        if self.prompt_lengths:
            lines.append(f"  {'tokens':<12}" + "".join(f"{label:>8}" for label in ("min", "50%", "90%", "99%", "max")))
            lines.append(f"  {'prompt':<12}" + "".join(f"{n:>8}" for n in self.prompt_lengths))
        if self.completion_lengths:
            lines.append(f"  {'completion':<12}" + "".join(f"{n:>8}" for n in self.completion_lengths))
            lines.append(f"  {'trained':<12}{self.trained_tokens:>8}  in all")
        return "\n".join(lines)


def quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths at :data:`QUANTILES`: each the smallest that at least this share does not exceed."""
    ordered = sorted(lengths)
    if not ordered:
        return ()
    # ceil(q n) - 1, in whole numbers: 0.9 * 10 is not 9 in floating point
    return tuple(ordered[max(0, -(-len(ordered) * round(q * 100) // 100) - 1)] for q in QUANTILES)


def preview(example: Example, tokenizer: Any, *, max_completions: int = 2, colour: bool = True) -> str:
    """An example as a terminal shows it: prompt dim, trained tokens highlighted, masked tokens plain.

    Control characters in the text are shown as escapes, so data cannot steer the terminal.

    Args:
        example: what to show.
        tokenizer: decodes its ids; special tokens are shown.
        max_completions: at most this many answers.
        colour: False puts trained tokens between ``[|`` and ``|]`` instead.

    Returns:
        Text with ANSI colours, one line of heading per answer.
    """
    dim, trained, reset = (_DIM, _TRAINED, _RESET) if colour else ("", "[|", "|]")
    lines = [f"{dim}{_decode(tokenizer, [], example.prompt_ids)}{reset if colour else ''}"]
    for number, completion in enumerate(example.completions[:max_completions], 1):
        heading = f"answer {number} of {len(example.completions)}"
        heading += f", {len(completion.ids)} tokens, {sum(completion.mask)} trained"
        heading += "" if completion.reward is None else f", reward {completion.reward:g}"
        heading += "" if completion.label is None else f", label {completion.label}"
        heading += ", truncated" if completion.truncated else ""
        text, start = "", 0
        while start < len(completion.ids):
            end = start + 1
            while end < len(completion.ids) and completion.mask[end] == completion.mask[start]:
                end += 1
            shown = _decode(tokenizer, [*example.prompt_ids, *completion.ids[:start]], completion.ids[start:end])
            text += f"{trained}{shown}{reset}" if completion.mask[start] else shown
            start = end
        lines.append(f"--- {heading}\n{text}")
    return "\n".join(lines)


def _decode(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode ids in their place: some tokenizers drop a space at the start of what they decode."""
    head = (
        tokenizer.decode(list(before), skip_special_tokens=False, clean_up_tokenization_spaces=False) if before else ""
    )
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not whole.startswith(head):  # a character whose bytes two tokens share
        whole, head = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False), ""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", whole[len(head) :])
