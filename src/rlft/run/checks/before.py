"""What a run proves about itself before its first step: seconds now, against hours spent on a wrong model.

Each check returns None, or a sentence on what it expected, what came, the likely causes and what to do. All of them
together are one forward pass of a few rows and one small write; none draws a random number or changes a weight.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft._words import byte_size
from rlft.checkpoint import CheckpointError
from rlft.errors import TrainingError
from rlft.run.step.parts import Parts
from rlft.run.step.passes import Passes
from rlft.run.step.probes import EXACT, LOOKED_AT, apart, batch_of, exact, probe_batch, probe_rows
from rlft.run.step.step_errors import StepErrors

__all__ = ["SelfChecks", "failed", "peak_memory"]


def failed(name: str, what: str) -> str:
    """The message of a failed check, with its own switch."""
    return f"self-check {name}: {what}. self_checks: {{{name}: false}} leaves this check out"


class SelfChecks:
    """The checks of a run, by the names that ``self_checks`` has for them. It holds nothing of its own.

    Args:
        parts: of the run.
        passes: scores a few rows.
        errors: what goes wrong, in words.
        rehearse: writes a checkpoint and reads it back, see :meth:`rlft.run.keep.checkpoints.Checkpoints.rehearse`.
    """

    def __init__(self, parts: Parts, passes: Passes, errors: StepErrors, rehearse: Callable[[], str | None]) -> None:
        self.parts, self.config, self.objective, self.policy = parts, parts.config, parts.objective, parts.policy
        self.processes, self.journal, self.tokenizer = parts.processes, parts.journal, parts.tokenizer
        self.passes, self.errors, self._rehearse = passes, errors, rehearse
        self.exact = exact(parts.policy, parts.config.mixed_precision)
        self.checks: dict[str, Callable[[], str | None]] = {
            "trainable": self.trainable,
            "sample": self.sample,
            "memory": self.memory,
            "reference": self.reference,
            "padding": self.padding,
            "dry_checkpoint": self.dry_checkpoint,
        }

    def run(self) -> None:
        """Run the checks that are on, say what they cost, and stop at the first that fails, on every process.

        Raises:
            TrainingError: naming the check, what was expected, what came and what to do.
        """
        spent: dict[str, float] = {}
        for name, check in self.checks.items():
            if self.config.checks_itself(name):
                started = time.perf_counter()
                with self.processes.together(), self.errors.explained("self_checks"):
                    said = check()
                    if said is not None:
                        raise TrainingError(failed(name, said))
                spent[name] = time.perf_counter() - started
        if spent:
            parts = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in spent.items())
            self.journal.note(f"self-checks passed in {sum(spent.values()):.2f} s ({parts})")

    def reference(self) -> str | None:
        """The reference is the policy as it was passed, so both give the same log-probs."""
        if getattr(self.policy, "reference_kind", "none") not in ("adapter_off", "adapter_copy", "snapshot"):
            return None
        batch = probe_batch(self.parts.train_data.examples[:2], self.tokenizer.pad_token_id).to(self.processes.device)
        outputs = self.passes.outputs(batch, frozenset({"logps", "ref_logps"}), everything=True)
        gap = float((outputs["logps"] - outputs["ref_logps"]).abs().max())
        if gap <= EXACT:
            return None
        return (
            f"policy and reference should be one model before the first step, but their log-probs differ by up to {gap:.3g} "
            f"(bound {EXACT:g}); likely causes: dropout, a trained adapter under a bare reference, weights changed after the "
            f"Trainer was built, or mixed precision. Build the Trainer from the model in its final state"
        )

    @torch.no_grad()
    def padding(self) -> str | None:
        """A row's log-probs do not depend on the row beside it, nor on padding at its left."""
        rows = sorted(probe_rows(self.parts.train_data.examples[:LOOKED_AT]), key=lambda row: len(row[0]) + len(row[1]))
        (prompt, answer), other = rows[0], rows[-1]
        if other == rows[0]:  # one row, or equal ones: make room for padding
            other = ([*prompt, *answer], answer)
        pad_id, device = self.tokenizer.pad_token_id, self.processes.device
        alone = batch_of([(prompt, answer)], pad_id).to(device)
        both = batch_of([(prompt, answer), other], pad_id).to(device)
        reward = "scores" in self.objective.needs
        name = "scores" if reward else "logps"
        expected = self.parts.stages.forward(alone, frozenset({name}))[name]
        if not bool(torch.isfinite(expected).all()):
            return f"the model's {name} of the first rows must be finite, got NaN or infinity; look for spoilt weights"
        kept = getattr(self.policy, "layout", "padded")  # a reward model has one layout
        for layout in ("auto", "padded") if kept == "auto" else (kept,):
            try:
                if layout != kept:
                    self.policy.layout = layout
                got = self.parts.stages.forward(both, frozenset({name}))[name][0]
            finally:
                if layout != kept:
                    self.policy.layout = kept
            gap = apart(got[: len(answer)] if not reward else got, expected[0], exact=self.exact)
            if gap is not None:
                return _padding_message(f"beside a longer row ({layout} layout)", gap)
        if reward or not self.parts.online:
            return None
        gap = apart(self._left_padded(prompt, answer, 3), self._left_padded(prompt, answer, 0), exact=self.exact)
        return None if gap is None else _padding_message("with three tokens of padding at its left", gap)

    def _left_padded(self, prompt: Sequence[int], answer: Sequence[int], gap: int) -> Tensor:
        """``[T]`` log-probs of an answer by the bare model, as samplers run it: padding first, positions given."""
        device = self.processes.device
        ids = torch.tensor([[self.tokenizer.pad_token_id or 0] * gap + [*prompt, *answer]], device=device)
        columns = torch.arange(ids.shape[1], device=device)[None]
        logits = self.policy.hf_model(
            input_ids=ids,
            attention_mask=(columns >= gap).long(),
            position_ids=(columns - gap).clamp(min=0),
            use_cache=False,
        ).logits[0, -len(answer) - 1 : -1]
        logps = (logits.double() / self.parts.temperature).log_softmax(-1)
        return logps.gather(-1, ids[0, -len(answer) :, None])[:, 0]

    def sample(self) -> str | None:
        """Rows begin with at most one BOS, and answers that were not cut end with a token that is trained and ends them."""
        examples = self.parts.train_data.examples[:LOOKED_AT]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and bos not in (eos, self.tokenizer.pad_token_id):
            counts = [
                e.prompt_ids.count(bos) + max((c.ids.count(bos) for c in e.completions), default=0) for e in examples
            ]
            if min(counts) > 1:
                return (
                    f"a row should hold one BOS token ({self.tokenizer.bos_token!r}), got {counts[0]} in row "
                    f"{examples[0].index} and more than one in each of the first {len(counts)} rows; likely cause: the chat "
                    f"template or the text writes one and the tokenizer adds its own. Take it out of the template or the text"
                )
        whole = [(e, c) for e in examples for c in e.completions if not c.truncated and c.ids]
        ends = {eos, *self.config.end_token_ids}
        open_ended = [e for e, c in whole if c.ids[-1] not in ends or not c.mask[-1]]
        if whole and len(open_ended) == len(whole):
            return (
                f"an answer that was not cut should end with a trained end token (one of "
                f"{sorted(i for i in ends if i is not None)}), got none in the first {len(whole)} answers (row "
                f"{open_ended[0].index} ends with {whole[0][1].ids[-3:]}, trained: {list(whole[0][1].mask[-3:])}); the model "
                f"would never learn to stop. Name the chat model's end of turn in end_token_ids, or look at the masks"
            )
        return None

    def trainable(self) -> str | None:
        """Something trains, the optimizer holds just that, and every LoRA target is a layer of the model."""
        from rlft import models

        try:
            models.check_trainable(self.policy)
        except ValueError as error:
            return str(error).rstrip(".")
        if missed := _unmatched_targets(self.policy.hf_model):
            return (
                f"every LoRA target should match a layer, got {', '.join(map(repr, missed))} in target_modules that match none; "
                f"those layers would not train. Correct the names, or use all-linear"
            )
        # the optimizer of a trust region holds the critic alone
        if self.processes.sharded or self.objective.trust_region is not None:
            return None
        held = {id(p) for group in self.parts.optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        left = [name for name, p in named.items() if id(p) not in held]
        strange = len(held - {id(p) for p in named.values()})
        if not left and not strange:
            return None
        return (
            f"the optimizer should hold the {len(named)} trainable tensors and no other, but {len(left)} are missing"
            f"{' (' + left[0] + ', ...)' if left else ''} and {strange} are not trained; likely causes: an optimizer made before "
            f"adapters or a value head were added, or weights frozen after it. Make it from the final model, or leave it out"
        )

    def memory(self) -> str | None:
        """The longest micro-batch fits into what is free: refused where twice that would not do, told where it is close."""
        if "scores" in self.objective.needs and not hasattr(self.policy, "hf_model"):
            return None
        c = self.config
        estimate = peak_memory(self.parts)
        wanted = sum(size for name, size in estimate.items() if name not in ("weights", "reference"))  # those are there
        free = _free_memory(self.processes.device)
        if free is None or wanted <= free:
            return None
        text = f"the longest rows need about {byte_size(wanted)} besides the weights, and {byte_size(free)} are free"
        remedy = (
            f"Lower per_device_train_batch_size (now {c.per_device_train_batch_size}) and raise "
            f"gradient_accumulation_steps by the same factor"
            + ("" if c.gradient_checkpointing else ", set gradient_checkpointing: true")
            + ("" if c.use_peft else ", set use_peft: true")
            + f", or shorten max_completion_length (now {c.max_completion_length})"
        )
        if wanted > 2 * free:  # the estimate is right within a factor of two
            return f"{text}: even half of the estimate would not fit. {remedy}"
        self.journal.warn_once("memory", f"{text} (a rough estimate). If the run ends out of memory: {remedy}")
        return None

    def dry_checkpoint(self) -> str | None:
        """A whole checkpoint can be written here and read back: disk, permissions, and what is in it."""
        try:
            wrong = self._rehearse()
        except (CheckpointError, OSError) as error:
            said = str(error).rstrip(".")
            return f"a checkpoint could not be written and read back: {said}. Make room, or set another output_dir"
        if wrong is None:
            return None
        return (
            f"{wrong} came back from a checkpoint with other values; likely cause: a disk or a file system that does not keep "
            f"its word"
        )


def peak_memory(parts: Parts) -> dict[str, int]:
    """Bytes of a step on the longest rows, by what they are for; see :func:`rlft.models.memory_estimate`."""
    from rlft.models import memory_estimate

    config, sizes, examples = parts.config, parts.sizes, parts.train_data.examples
    prompt = max(len(e.prompt_ids) for e in examples)
    answer = max((len(c.ids) for e in examples for c in e.completions), default=0)
    row = prompt + (config.max_completion_length if parts.online else answer)
    longest = sizes.micro_batch_rows * row
    if (budget := config.max_tokens_per_micro_batch) is not None:
        group = row * max(1, sizes.micro_batch_rows // sizes.micro_batch_groups)
        least = group if parts.objective.needs_groups else row  # what is never split
        longest = max(least, min(budget, group * sizes.groups_per_step))
    return memory_estimate(parts.policy, tokens=longest, gradient_checkpointing=config.gradient_checkpointing)


def _padding_message(where: str, apart: str) -> str:
    return (
        f"a row should have the same log-probs alone and {where}, got a difference of {apart}; likely causes: a model that "
        f"ignores attention_mask or position_ids, an attention implementation that does, or layers that mix rows. Set "
        f"attn_implementation: sdpa or eager, or use per_device_train_batch_size: 1"
    )


def _unmatched_targets(model: Any) -> list[str]:
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, (set, list, tuple)):  # a pattern, or not LoRA
        return []
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers))


def _free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [_meminfo(Path("/proc/meminfo")), _cgroup(Path("/sys/fs/cgroup"))]
    known = [size for size in found if size is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def _meminfo(path: Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _cgroup(folder: Path) -> int | None:
    """What a container may still take; its page cache is given back when it is needed."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(statistics.get("file", 0))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
