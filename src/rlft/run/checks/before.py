"""What a run proves about itself before its first step: seconds now, against hours spent on a wrong model.

Each check returns None, or a sentence on what it expected, what came, the likely causes and what to do. All of them
together are one forward pass of a few rows and one small write; none draws a random number or changes a weight.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft.checkpoint import CheckpointError
from rlft.errors import TrainingError
from rlft.run import display
from rlft.run.keep import checkpoints as state
from rlft.run.step import update as guard
from rlft.types import Batch

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["batch_of", "before", "exact", "failed", "probe_batch"]

logger = logging.getLogger("rlft")

#: Rows of the data that are looked at.
LOOKED_AT = 16
#: Largest difference of a log-prob that is computed twice, where arithmetic is float32 or better; elsewhere of the mean.
EXACT, ROUGH = 1e-4, 0.05


def before(trainer: Trainer) -> None:
    """Run the checks that are on, say what they cost, and stop at the first that fails, on every process.

    Raises:
        TrainingError: naming the check, what was expected, what came and what to do.
    """
    spent: dict[str, float] = {}
    for name, check in CHECKS.items():
        if trainer.config.checks_itself(name):
            started = time.perf_counter()
            with guard.together(trainer), guard.explained(trainer, "self_checks"):
                said = check(trainer)
                if said is not None:
                    raise TrainingError(failed(name, said))
            spent[name] = time.perf_counter() - started
    if spent:
        parts = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in spent.items())
        display.note(trainer, f"self-checks passed in {sum(spent.values()):.2f} s ({parts})")


def failed(name: str, what: str) -> str:
    """The message of a failed check, with its own switch."""
    return f"self-check {name}: {what}. self_checks: {{{name}: false}} leaves this check out"


def exact(trainer: Trainer) -> bool:
    """Whether log-probs are computed in float32 or better, so that two ways to one number agree closely."""
    narrow = {p.dtype for p in trainer.policy.parameters()} - {torch.float32, torch.float64}
    return not narrow and trainer.config.mixed_precision == "no"


def _apart(trainer: Trainer, one: Tensor, other: Tensor) -> str | None:
    """How far two computations of the same log-probs are apart, where that is too far."""
    gap = (one.double() - other.double()).abs()
    if exact(trainer):
        largest = float(gap.max())
        return None if largest <= EXACT else f"up to {largest:.3g} (bound {EXACT:g})"
    mean = float(gap.mean())
    return None if mean <= ROUGH else f"{mean:.3g} on average (bound {ROUGH:g})"


# -- the checks, in order ---------------------------------------------------------------------------------------------
def reference(trainer: Trainer) -> str | None:
    """The reference is the policy as it was passed, so both give the same log-probs."""
    if getattr(trainer.policy, "reference_kind", "none") not in ("adapter_off", "adapter_copy", "snapshot"):
        return None
    from rlft.run.step import passes as constants

    batch = probe_batch(trainer, trainer.train_data.examples[:2])
    outputs = constants.no_grad_outputs(trainer, batch, frozenset({"logps", "ref_logps"}), everything=True)
    gap = float((outputs["logps"] - outputs["ref_logps"]).abs().max())
    if gap <= EXACT:
        return None
    return (
        f"policy and reference should be one model before the first step, but their log-probs differ by up to {gap:.3g} "
        f"(bound {EXACT:g}); likely causes: dropout, a trained adapter under a bare reference, weights changed after the "
        f"Trainer was built, or mixed precision. Build the Trainer from the model in its final state"
    )


@torch.no_grad()
def padding(trainer: Trainer) -> str | None:
    """A row's log-probs do not depend on the row beside it, nor on padding at its left."""
    rows = sorted(_rows(trainer.train_data.examples[:LOOKED_AT]), key=lambda row: len(row[0]) + len(row[1]))
    (prompt, answer), other = rows[0], rows[-1]
    if other == rows[0]:  # one row, or equal ones: make room for padding
        other = ([*prompt, *answer], answer)
    alone, both = batch_of(trainer, [(prompt, answer)]), batch_of(trainer, [(prompt, answer), other])
    reward = "scores" in trainer.objective.needs
    name = "scores" if reward else "logps"
    expected = trainer.forward(alone, frozenset({name}))[name]
    if not bool(torch.isfinite(expected).all()):
        return f"the model's {name} of the first rows must be finite, got NaN or infinity; look for spoilt weights"
    kept = getattr(trainer.policy, "layout", "padded")  # a reward model has one layout
    for layout in ("auto", "padded") if kept == "auto" else (kept,):
        try:
            if layout != kept:
                trainer.policy.layout = layout
            got = trainer.forward(both, frozenset({name}))[name][0]
        finally:
            if layout != kept:
                trainer.policy.layout = kept
        apart = _apart(trainer, got[: len(answer)] if not reward else got, expected[0])
        if apart is not None:
            return _padding_message(f"beside a longer row ({layout} layout)", apart)
    if reward or not trainer.online:
        return None
    apart = _apart(trainer, _left_padded(trainer, prompt, answer, 3), _left_padded(trainer, prompt, answer, 0))
    return None if apart is None else _padding_message("with three tokens of padding at its left", apart)


def _padding_message(where: str, apart: str) -> str:
    return (
        f"a row should have the same log-probs alone and {where}, got a difference of {apart}; likely causes: a model that "
        f"ignores attention_mask or position_ids, an attention implementation that does, or layers that mix rows. Set "
        f"attn_implementation: sdpa or eager, or use per_device_train_batch_size: 1"
    )


def _left_padded(trainer: Trainer, prompt: Sequence[int], answer: Sequence[int], gap: int) -> Tensor:
    """``[T]`` log-probs of an answer by the bare model, as samplers run it: padding first, positions given."""
    ids = torch.tensor([[trainer.tokenizer.pad_token_id or 0] * gap + [*prompt, *answer]], device=trainer.device)
    columns = torch.arange(ids.shape[1], device=trainer.device)[None]
    model = trainer.policy.hf_model
    logits = model(
        input_ids=ids,
        attention_mask=(columns >= gap).long(),
        position_ids=(columns - gap).clamp(min=0),
        use_cache=False,
    ).logits[0, -len(answer) - 1 : -1]
    logps = (logits.double() / trainer.scoring_temperature).log_softmax(-1)
    return logps.gather(-1, ids[0, -len(answer) :, None])[:, 0]


def sample(trainer: Trainer) -> str | None:
    """Rows begin with at most one BOS, and answers that were not cut end with a token that is trained and ends them."""
    examples = trainer.train_data.examples[:LOOKED_AT]
    bos, eos = trainer.tokenizer.bos_token_id, trainer.tokenizer.eos_token_id
    if bos is not None and bos not in (eos, trainer.tokenizer.pad_token_id):
        counts = [e.prompt_ids.count(bos) + max((c.ids.count(bos) for c in e.completions), default=0) for e in examples]
        if min(counts) > 1:
            return (
                f"a row should hold one BOS token ({trainer.tokenizer.bos_token!r}), got {counts[0]} in row "
                f"{examples[0].index} and more than one in each of the first {len(counts)} rows; likely cause: the chat "
                f"template or the text writes one and the tokenizer adds its own. Take it out of the template or the text"
            )
    whole = [(e, c) for e in examples for c in e.completions if not c.truncated and c.ids]
    ends = {eos, *trainer.config.end_token_ids}
    open_ended = [e for e, c in whole if c.ids[-1] not in ends or not c.mask[-1]]
    if whole and len(open_ended) == len(whole):
        return (
            f"an answer that was not cut should end with a trained end token (one of "
            f"{sorted(i for i in ends if i is not None)}), got none in the first {len(whole)} answers (row "
            f"{open_ended[0].index} ends with {whole[0][1].ids[-3:]}, trained: {list(whole[0][1].mask[-3:])}); the model "
            f"would never learn to stop. Name the chat model's end of turn in end_token_ids, or look at the masks"
        )
    return None


def trainable(trainer: Trainer) -> str | None:
    """Something trains, the optimizer holds just that, and every LoRA target is a layer of the model."""
    from rlft import models

    try:
        models.check_trainable(trainer.policy)
    except ValueError as error:
        return str(error).rstrip(".")
    if missed := _unmatched_targets(trainer.policy.hf_model):
        return (
            f"every LoRA target should match a layer, got {', '.join(map(repr, missed))} in target_modules that match none; "
            f"those layers would not train. Correct the names, or use all-linear"
        )
    if guard.sharded(trainer) or trainer.trust_step is not None:  # whose optimizer holds the critic alone
        return None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
    left = [name for name, p in named.items() if id(p) not in held]
    strange = len(held - {id(p) for p in named.values()})
    if not left and not strange:
        return None
    return (
        f"the optimizer should hold the {len(named)} trainable tensors and no other, but {len(left)} are missing"
        f"{' (' + left[0] + ', ...)' if left else ''} and {strange} are not trained; likely causes: an optimizer made before "
        f"adapters or a value head were added, or weights frozen after it. Make it from the final model, or leave it out"
    )


def _unmatched_targets(model: Any) -> list[str]:
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, (set, list, tuple)):  # a pattern, or not LoRA
        return []
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers))


def memory(trainer: Trainer) -> str | None:
    """The longest micro-batch fits into what is free: refused where twice that would not do, told where it is close."""
    if "scores" in trainer.objective.needs and not hasattr(trainer.policy, "hf_model"):
        return None
    estimate = display.peak_memory(trainer)
    wanted = sum(size for name, size in estimate.items() if name not in ("weights", "reference"))  # those are there
    free = _free_memory(trainer.device)
    if free is None or wanted <= free:
        return None
    text = f"the longest rows need about {display.byte_size(wanted)} besides the weights, and {display.byte_size(free)} are free"
    remedy = (
        f"Lower per_device_train_batch_size (now {trainer.config.per_device_train_batch_size}) and raise "
        f"gradient_accumulation_steps by the same factor"
        + ("" if trainer.config.gradient_checkpointing else ", set gradient_checkpointing: true")
        + ("" if trainer.config.use_peft else ", set use_peft: true")
        + f", or shorten max_completion_length (now {trainer.config.max_completion_length})"
    )
    if wanted > 2 * free:  # the estimate is right within a factor of two
        return f"{text}: even half of the estimate would not fit. {remedy}"
    guard.told(trainer, "memory", f"{text} (a rough estimate). If the run ends out of memory: {remedy}")
    return None


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


def dry_checkpoint(trainer: Trainer) -> str | None:
    """A whole checkpoint can be written here and read back: disk, permissions, and what is in it."""
    try:
        wrong = state.rehearse(trainer)
    except (CheckpointError, OSError) as error:
        return f"a checkpoint could not be written and read back: {str(error).rstrip('.')}. Make room, or set another output_dir"
    if wrong is None:
        return None
    return f"{wrong} came back from a checkpoint with other values; likely cause: a disk or a file system that does not keep its word"


CHECKS: dict[str, Callable[[Trainer], str | None]] = {
    "trainable": trainable,
    "sample": sample,
    "memory": memory,
    "reference": reference,
    "padding": padding,
    "dry_checkpoint": dry_checkpoint,
}


# -- a few real tokens ------------------------------------------------------------------------------------------------
def probe_batch(trainer: Trainer, examples: Sequence[Any]) -> Batch:
    """The answers of some examples where there are some, else their prompts scored as answers; each row its own group."""
    return batch_of(trainer, _rows(examples))


def _rows(examples: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    answers = [(list(e.prompt_ids), list(c.ids)) for e in examples for c in e.completions if c.ids]
    return answers or [(list(e.prompt_ids[:1]), list(e.prompt_ids[1:] or e.prompt_ids)) for e in examples]


def batch_of(trainer: Trainer, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """A batch of (prompt, answer) token ids, each row its own group, every answer token trained."""

    def padded(lists: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, lists))
        ids = torch.tensor([[*row, *[trainer.tokenizer.pad_token_id or 0] * (width - len(row))] for row in lists])
        lengths = torch.tensor([len(row) for row in lists])
        return ids, torch.arange(width)[None] < lengths[:, None]

    prompts, prompt_mask = padded([prompt for prompt, _ in rows])
    answers, exists = padded([answer for _, answer in rows])
    return Batch(prompts, prompt_mask, answers, exists, exists, torch.arange(len(rows))).to(trainer.device)
