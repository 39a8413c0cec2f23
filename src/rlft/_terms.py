"""One loss function with its hyper-parameters, and the tensors behind its parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlft import _check, reduce
from rlft.types import Batch, LossOutput

__all__ = [
    "BEHAVIOUR",
    "FORWARD",
    "MADE",
    "REFERENCE",
    "LossFunction",
    "Term",
    "beside",
    "bind",
    "check_rows",
    "evaluate",
    "probe",
    "split_signature",
]

LossFunction = Callable[..., LossOutput | Tensor]

#: Expectations over the next token, under the policy that sampled and under the policy itself (see ``rlft.ops.moments``).
BEHAVIOUR = {"behaviour_log_ratio", "behaviour_log_ratio_sq"}
MOMENTS = BEHAVIOUR | {"token_log_ratio_sq"}
#: What the policy's forward pass can give, and what asks for it.
FORWARD = {"logps", "ref_logps", "token_kl", "entropy", "values"} | MOMENTS
REFERENCE = {"ref_logps", "token_kl"} | MOMENTS
PAIR = {
    "chosen_logps": "logps",
    "rejected_logps": "logps",
    "ref_chosen_logps": "ref_logps",
    "ref_rejected_logps": "ref_logps",
    "chosen_rewards": "scores",
    "rejected_rewards": "scores",
    "chosen_lengths": "mask",
    "rejected_lengths": "mask",
    "margins": "margin",
    "chosen_win_rates": "win_rates",
}


#: Every quantity that the trainer makes; any other name is looked up in ``Batch.extras``, which dataset columns fill.
MADE = frozenset(
    {
        *FORWARD,
        *PAIR,
        *PAIR.values(),
        *Batch.__dataclass_fields__,
        "kl_baseline",
        "old_values",
        "start_values",
        "sampler_logps",
    }
) - {"win_rates", "extras"}


@dataclass(frozen=True)
class Term:
    """One loss function with its hyper-parameters, weight and averaging.

    Attributes:
        function: a loss of :mod:`rlft.losses` or one of the same form.
        tensors: the names of its positional parameters, in order.
        hyper: its keyword arguments.
        weight: factor in the weighted sum.
        reduction: the averaging; ``"mean"`` for a loss per pair or sequence.
        length: the constant of ``fixed_length``.
        rename: parameter name -> quantity it is bound to, where they differ (``values`` of DRO is V(x)).
        rows: ``chosen`` for the chosen answers of pairs (the desired ones of labelled rows) alone, ``all``; None: all, and
            nobody said so.
    """

    function: LossFunction
    tensors: tuple[str, ...]
    hyper: Mapping[str, Any]
    weight: float = 1.0
    reduction: str = "mean"
    length: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    rows: str | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def sources(self) -> tuple[str, ...]:
        """The quantity behind each positional parameter."""
        return tuple(self.rename.get(name, name) for name in self.tensors)

    @property
    def per_pair(self) -> bool:
        return any(name in PAIR for name in self.sources)

    @property
    def quantities(self) -> frozenset[str]:
        """What must exist for this term; at beta = 0 the reference has no part in it, and no pass is spent on it."""
        names = {PAIR.get(name, name) for name in self.sources}
        return frozenset(names - REFERENCE if self.hyper.get("beta") == 0 else names)

    @property
    def imitates(self) -> bool:
        """Whether the loss makes every answer it sees more likely."""
        return bool(getattr(self.function, "imitates", False))

    @property
    def prefers(self) -> bool:
        """Whether the loss tells better answers from worse by their place in a pair, or by their label."""
        sources = {*self.sources}
        grouped = "group_ids" in sources and not sources & {"rewards", "advantages"} and not self.quantities - MADE
        return self.per_pair or "labels" in sources or grouped

    def mask(self, batch: Batch) -> Tensor:
        """``[B, T]``: the batch's mask, on the rows that this term acts on."""
        return batch.mask & _chosen(batch)[:, None] if self.rows == "chosen" else batch.mask

    @property
    def min_group(self) -> int:
        return int(getattr(self.function, "min_group", 2 if "group_ids" in self.tensors else 1))

    @property
    def lr_coef(self) -> float:
        """The weight of AGRO's likelihood-ratio term; 0 for a loss without one."""
        parameter = inspect.signature(self.function).parameters.get("lr_coef")
        return float(self.hyper.get("lr_coef", parameter.default)) if parameter is not None else 0.0

    def entries(self, mask: Tensor) -> Tensor:
        """Which entries of this loss count, from the mask of its rows: tokens, sequences or pairs."""
        if self.reduction != "mean":
            return mask
        alive = mask.any(-1)
        return alive[0::2] & alive[1::2] if self.per_pair else alive


def beside(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms of a sum: one that imitates answers takes the chosen alone where another says which those are.

    Unless it was made with ``rows``. In RPO, MPO and CPO the likelihood term is on the chosen answer.
    """
    if not any(term.prefers for term in terms):
        return terms
    return tuple(replace(t, rows="chosen") if t.imitates and t.rows is None else t for t in terms)


def check_rows(term: Term) -> None:
    """Refuse a choice of rows that a loss cannot have, or that would do nothing.

    Raises:
        ValueError: naming the choice and the remedy.
    """
    if term.rows is None:
        return
    if term.rows not in ("all", "chosen"):
        raise ValueError(f"rows {term.rows!r} is unknown{_check.suggestion(term.rows, ['all', 'chosen'])}")
    if term.prefers or {"group_ids", "rewards", "advantages"} & set(term.sources):
        raise ValueError(
            f"rows={term.rows!r} does nothing: {term.name!r} compares answers, and needs all of them; drop rows"
        )
    if term.rows == "all" and not term.imitates:
        raise ValueError(f"rows='all' does nothing: {term.name!r} acts on all rows as it is; drop rows")


def _chosen(batch: Batch) -> Tensor:
    """``[B]``: the first answer of each pair, or the rows whose label is True."""
    if batch.labels is not None:
        return batch.labels
    if not _paired(batch):
        raise ValueError(f"rows='chosen' needs pairs, rows in twos, chosen first, or labels; got {batch.num_rows} rows")
    return torch.arange(batch.num_rows, device=batch.device) % 2 == 0


def _paired(batch: Batch) -> bool:
    return batch.num_rows % 2 == 0 and torch.equal(batch.group_ids[0::2], batch.group_ids[1::2])


def split_signature(function: LossFunction) -> tuple[tuple[str, ...], dict[str, inspect.Parameter]]:
    name = getattr(function, "__name__", repr(function))
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has no readable signature; wrap it in a def with named tensors") from error
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(
            f"{name} takes *args or **kwargs; name its tensors as positional parameters (logps, mask, ...) "
            f"and its hyper-parameters after a *, so that rlft knows what it needs"
        )
    tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    if not tensors:
        raise ValueError(f"{name} takes no tensors; its positional parameters name what it needs, e.g. (logps, mask)")
    return tensors, {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def bind(name: str, outputs: Mapping[str, Tensor], batch: Batch, objective: str) -> Tensor:
    """The tensor behind a parameter name."""
    if name in PAIR:
        source = PAIR[name]
        if source == "mask":
            per_row = batch.mask.sum(-1).clamp(min=1)  # a masked pair counts nowhere, and must not divide by zero
        elif source in ("scores", "margin", "win_rates"):
            per_row = outputs["scores"] if source == "scores" else bind(f"extras.{source}", outputs, batch, objective)
        else:
            # a blank row is no answer of probability one, which some losses refuse
            alive = batch.mask.any(-1)
            per_row = reduce.sequence_sum(bind(source, outputs, batch, objective), batch.mask).where(alive, -1.0)
        if not _paired(batch):
            raise ValueError(
                f"objective {objective!r} needs pairs: rows in twos, chosen first; got {batch.num_rows} rows"
            )
        if source in ("scores", "margin", "win_rates"):  # a pair that counts nowhere may hold anything
            alive = batch.mask.any(-1).reshape(-1, 2).all(-1)
            per_row = per_row.where(alive.repeat_interleave(2), 0.0)
        return per_row[1::2] if "rejected" in name else per_row[0::2]
    stored = {"old_values": "values"}.get(name, name)
    if name != "values" and getattr(batch, stored, None) is not None and stored not in ("extras",):
        return getattr(batch, stored)
    if name in outputs:
        return outputs[name]
    derived: dict[str, Callable[[], Tensor]] = {
        "old_logps": lambda: outputs["logps"].detach(),
        "old_values": lambda: outputs["values"].detach(),
        "start_values": lambda: outputs["values"][:, 0],
    }
    if name in derived:
        return derived[name]()
    key = name.removeprefix("extras.")
    if key in batch.extras:
        return batch.extras[key]
    present = sorted(
        {*outputs, *batch.extras, *(k for k in ("rewards", "labels", "advantages") if getattr(batch, k) is not None)}
    )
    raise ValueError(
        f"objective {objective!r} needs {key!r}, and neither the model nor the data gives it (there are: "
        f"{', '.join(present)}); add a numeric dataset column of that name, fill Batch.extras in Trainer.prepare, "
        f"or use another objective"
    )


def evaluate(term: Term, outputs: Mapping[str, Tensor], batch: Batch, objective: str) -> LossOutput:
    """A term's loss on a batch, unreduced, with the mask of the entries that count.

    Args:
        term: of an objective.
        outputs: what the forward pass returned, by name.
        batch: constants.
        objective: its name, for messages.

    Raises:
        ValueError: for a quantity that nothing gives, or a loss of another form or shape.
    """
    if term.rows == "chosen":
        batch = batch.replace(mask=term.mask(batch))
    if term.hyper.get("beta") == 0:
        zeros = {name: torch.zeros_like(outputs["logps"]) for name in REFERENCE & set(term.sources)}
        outputs = {**zeros, **({"ref_logps": outputs["logps"].detach()} if "ref_logps" in zeros else {}), **outputs}
    tensors = [bind(name, outputs, batch, objective) for name in term.sources]
    entries = term.entries(batch.mask)
    apart = term.per_pair and getattr(term.function, "couples_rows", False)
    output = _of_alive(term, tensors, entries) if apart else term.function(*tensors, **term.hyper)
    if isinstance(output, Tensor):
        output = LossOutput(output, {}, term.reduction)  # type: ignore[arg-type]
    if not isinstance(output, LossOutput):
        raise ValueError(f"{term.name} must return a LossOutput or an unreduced tensor, got {type(output).__name__}")
    if output.loss.shape != entries.shape:
        raise ValueError(
            f"{term.name} returned a loss of shape {list(output.loss.shape)}, expected {list(entries.shape)}: "
            f"return it unreduced, one entry per {'token' if entries.ndim > 1 else 'pair' if term.per_pair else 'sequence'}"
        )
    return replace(output, mask=output.counted & entries)


def _of_alive(term: Term, tensors: list[Tensor], alive: Tensor) -> LossOutput:
    """A loss that ranks pairs among each other, on those that count alone; 0 for the others."""
    kept = [t[alive] for t in tensors]
    output = term.function(*kept, **term.hyper)
    if isinstance(output, Tensor):
        output = LossOutput(output, {}, "mean")
    if not isinstance(output, LossOutput) or output.loss.shape != kept[0].shape:
        return output  # refused by the caller, in words

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(alive.shape).masked_scatter(alive, values)

    metrics = {name: placed(values) for name, values in output.metrics.items()}
    mask = None if output.mask is None else placed(output.mask)
    return replace(output, loss=placed(output.loss), metrics=metrics, mask=mask)


def probe(term: Term, name: str) -> str:
    """Learn a user's averaging by calling the loss once on four rows of three tokens: two prompts of two, or one of four."""
    logps = torch.full((4, 3), -1.0, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    batch = Batch(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        completion_ids=torch.zeros(4, 3, dtype=torch.long),
        completion_mask=mask,
        mask=mask,
        group_ids=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.25]),
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        old_logps=logps.detach().clone(),
        ref_logps=logps.detach() - 0.1,
        values=torch.zeros(4, 3),
        returns=torch.zeros(4, 3),
        labels=torch.tensor([True, False, True, False]),
    )
    outputs = {
        "logps": logps,
        **dict.fromkeys(("token_kl", *MOMENTS), logps * 0 + 0.1),
        "entropy": logps * 0 + 1,
        "values": logps * 0,
        "scores": logps.sum(-1),
    }
    own = {n for n in term.sources if n not in {*PAIR, *outputs, "start_values", "old_values", "mask", "group_ids"}}
    hints = {term.rename.get(n, n): str(p.annotation) for n, p in inspect.signature(term.function).parameters.items()}
    unknown = {
        n: torch.zeros(4, 3) if "B T" in hints.get(n, "") else torch.zeros(4)
        for n in own
        if getattr(batch, n, None) is None
    }
    batch = batch.replace(
        extras={**unknown, "margin": torch.zeros(4), "kl_baseline": torch.zeros(4), "win_rates": torch.full((4,), 0.5)}
    )
    with torch.enable_grad():
        try:
            try:
                output = term.function(*(bind(n, outputs, batch, name) for n in term.sources), **term.hyper)
            except ValueError as error:
                if "needs groups of at least" not in str(error):
                    raise
                batch = batch.replace(group_ids=torch.zeros(4, dtype=torch.long))
                output = term.function(*(bind(n, outputs, batch, name) for n in term.sources), **term.hyper)
        except Exception as error:
            if isinstance(error, ValueError) and getattr(term.function, "__module__", "").startswith("rlft."):
                raise
            raise ValueError(f"objective {name!r} failed on a tiny example of 4 rows and 3 tokens: {error}") from error
    loss = output.loss if isinstance(output, LossOutput) else output
    if isinstance(output, LossOutput):
        return output.reduction
    if not isinstance(loss, Tensor) or loss.ndim not in (1, 2):
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective {name!r} must return an unreduced loss ([P], [B] or [B, T]) or a LossOutput, got {shape}: "
            f"the trainer averages over the whole step, so do not call .mean() inside"
        )
    return "mean" if loss.ndim == 1 else "token_mean"
