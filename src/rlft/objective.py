"""Binds a loss's parameter names to a batch's tensors, so that the trainer knows no algorithm.

``Objective(losses.grpo, advantage="group_norm", clip_eps=0.2, beta=0.04)`` reads the signature of ``losses.grpo``:
positional parameters are the tensors it needs, keyword-only ones its hyper-parameters. Whether a reference pass, a
critic or a group happens in a run follows from the names alone, and so does a user's own function.

An online algorithm is four choices: **advantage** x **surrogate** (the loss) x **KL** x **averaging**; each is an
argument here. Objectives add up: ``0.8 * Objective(losses.dpo, beta=0.1) + 0.2 * Objective(losses.sft)``, where ``sft``
learns the chosen answers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import _check, kl, reduce
from rlft._advantage import (
    ADVANTAGES,
    PER_TOKEN,
    SIBLINGS,
    WHOLE_STEP,
    Everyone,
    check_to_go,
    drop_lone,
    drop_unscored,
    group_advantages,
    to_go,
    with_gae,
)
from rlft._terms import (
    FORWARD,
    MADE,
    REFERENCE,
    LossFunction,
    Term,
    beside,
    check_rows,
    evaluate,
    probe,
    split_signature,
)
from rlft.trust_region import TrustRegion
from rlft.types import Batch, LossOutput

__all__ = ["ADVANTAGES", "Objective", "Term"]

#: What a critic gives.
VALUES = frozenset({"values", "old_values", "start_values"})


class Objective:
    """A weighted sum of losses with the choices that complete it.

    Args:
        loss: a function of :mod:`rlft.losses`, or your own of the same form: positional parameters are tensors by
            glossary name (any other name is looked up in ``Batch.extras``), keyword-only ones hyper-parameters; returns
            a :class:`~rlft.types.LossOutput`, or an unreduced tensor ``[P]``, ``[B]`` or ``[B, T]``.
        advantage: how rewards become advantages when the loss asks for ``advantages``: ``reward``, ``group_mean``,
            ``leave_one_out``, ``group_norm``, ``batch_norm``, ``gae``, ``reward_to_go``, or a function of (rewards, group_ids).
        kl: where a KL term to the reference goes that the loss does not carry itself: ``None``, ``"reward"`` or ``"loss"``.
        kl_value: estimator of its value: ``k1`` (the default in the reward), ``k2``, ``k3`` (the default in the loss) or
            ``exact``. Without ``kl`` this and ``kl_gradient`` go to a loss that has them among its own settings, and are refused by any other.
        kl_gradient: estimator whose gradient it has (``"loss"`` only); default: the value's own.
        averaging: replaces the averaging that the loss names; see :mod:`rlft.reduce`.
        length: the constant of ``averaging="fixed_length"``.
        name: shown in tables and logs.
        rename: parameter name -> quantity, where they differ.
        rows: ``"chosen"`` keeps a loss per token or sequence to the chosen answers of pairs (of labelled rows, the desired
            ones); ``"all"`` lets ``sft`` or ``distillation`` imitate both. Default: all rows, and for those two in a sum
            with a preference loss the chosen ones. A KL term (``kl``) is on all rows.
        trust_region: limits of a natural-gradient step with line search, which then replaces the optimizer's for the
            policy; None for the optimizer.
        **hyper: hyper-parameters of the loss, of the advantage (``eps``, ``gamma``, ``lam``) and of the KL (``beta``).

    Raises:
        ValueError: for a missing or an unused hyper-parameter, an unknown choice, or a choice that does nothing.
    """

    def __init__(
        self,
        loss: LossFunction,
        *,
        advantage: str | Callable[..., Tensor] | None = None,
        kl: str | None = None,
        kl_value: str | None = None,
        kl_gradient: str | None = None,
        averaging: str | None = None,
        length: int | None = None,
        name: str | None = None,
        rename: Mapping[str, str] | None = None,
        rows: str | None = None,
        trust_region: TrustRegion | None = None,
        **hyper: Any,
    ) -> None:
        tensors, keywords = split_signature(loss)
        self.name = name or getattr(loss, "__name__", type(loss).__name__)
        self.advantage = advantage
        self.kl = kl
        # of the three, only k1 as a reward leads to the optimum of E[r] - beta KL
        self.kl_value = kl_value or ("k1" if kl == "reward" else "k3")
        self.trust_region = trust_region
        given = dict(hyper)
        own = {key: given.pop(key) for key in list(given) if key in keywords}
        for key, choice in (("kl_value", kl_value), ("kl_gradient", kl_gradient)):
            if kl is None and choice is not None:
                if key not in keywords:
                    raise ValueError(f"{key}={choice!r} does nothing: {self.name!r} has no KL term; set kl as well")
                own[key] = choice
        missing = [k for k, p in keywords.items() if p.default is p.empty and k not in own]
        if missing:
            raise ValueError(f"objective {self.name!r} needs {', '.join(missing)}; give a number for each")
        reduction, length = self._reduction(loss, tensors, own, rename or {}, averaging, length)
        self.terms: tuple[Term, ...] = (Term(loss, tensors, own, 1.0, reduction, length, dict(rename or {}), rows),)
        check_rows(self.terms[0])
        self._set_advantage(tensors, given)
        self._set_kl(kl_gradient, given)
        if given:
            known = [*keywords, *(["beta"] if kl else [])]
            word = next(iter(given))
            raise ValueError(
                f"objective {self.name!r} does not use {word}={given[word]!r}{_check.suggestion(word, known) if known else ''}"
            )

    # -- construction -----------------------------------------------------------------------------------------------
    def _reduction(
        self,
        loss: LossFunction,
        tensors: tuple[str, ...],
        own: dict[str, Any],
        rename: Mapping[str, str],
        averaging: str | None,
        length: int | None,
    ) -> tuple[str, int | None]:
        native = getattr(loss, "reduction", None)
        if native is None or getattr(loss, "__module__", "").startswith("rlft."):
            # called once on a tiny example: a bad hyper-parameter is refused here, not at the first step
            native = probe(Term(loss, tensors, own, rename=rename), self.name)
        chosen = averaging or native
        if chosen not in reduce.REDUCTIONS:
            raise ValueError(f"averaging {chosen!r} is unknown{_check.suggestion(chosen, reduce.REDUCTIONS)}")
        if averaging is not None and (native == "mean") != (averaging == "mean"):
            kind = (
                "per sequence or pair, averaged by 'mean'" if native == "mean" else f"per token, averaged by {native!r}"
            )
            raise ValueError(f"averaging {averaging!r} does not fit {self.name!r}: its loss is {kind}")
        reduce._known(chosen, torch.ones(1, dtype=torch.bool) if chosen == "mean" else torch.ones(1, 1).bool(), length)
        return chosen, length

    def _set_advantage(self, tensors: tuple[str, ...], given: dict[str, Any]) -> None:
        self.advantage_args: dict[str, Any] = {}
        if "advantages" not in tensors:
            if self.advantage is not None:
                raise ValueError(f"advantage={self.advantage!r} does nothing: {self.name!r} takes no advantages")
            return
        if self.advantage is None or self.advantage == "given":
            self.advantage = "given"
            return
        if isinstance(self.advantage, str) and self.advantage not in {*ADVANTAGES, *PER_TOKEN}:
            known = [*ADVANTAGES, *PER_TOKEN, "given"]
            raise ValueError(f"advantage {self.advantage!r} is unknown{_check.suggestion(self.advantage, known)}")
        function = self.advantage if callable(self.advantage) else {**ADVANTAGES, **PER_TOKEN}[self.advantage]
        keywords = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        self.advantage_args = {key: given.pop(key) for key in list(given) if key in keywords}
        missing = [k for k, p in keywords.items() if p.default is p.empty and k not in self.advantage_args]
        if missing:
            raise ValueError(f"advantage {self.advantage!r} needs {', '.join(missing)}; give a number for each")
        if self.advantage == "reward_to_go":
            per_token = self.terms[0].reduction != "mean"
            check_to_go(self.advantage_args, penalised=self.kl == "reward", per_token=per_token, name=self.name)

    def _set_kl(self, kl_gradient: str | None, given: dict[str, Any]) -> None:
        self.beta = float(self.terms[0].hyper.get("beta", 0.0))
        if self.kl is None:
            return
        if self.kl not in ("reward", "loss"):
            raise ValueError(f"kl={self.kl!r} is unknown; use 'reward', 'loss' or None")
        if "beta" in self.terms[0].hyper:
            raise ValueError(f"{self.name!r} carries its own KL term with beta; kl={self.kl!r} would count it twice")
        if "beta" not in given:
            raise ValueError(f"kl={self.kl!r} needs beta, the weight of the KL term")
        self.beta = float(given.pop("beta"))
        _check.number("beta", self.beta, low=0.0)
        if self.kl == "reward":
            if self.terms[0].tensors.count("advantages") == 0 or self.advantage == "given":
                raise ValueError(f"kl='reward' does nothing: {self.name!r} computes no advantages from rewards")
            if self.kl_value not in ("k1", "k2", "k3") or kl_gradient is not None:
                raise ValueError("kl='reward' takes kl_value k1, k2 or k3, and no kl_gradient (it carries none)")
            return
        if self.terms[0].reduction == "mean":
            raise ValueError(f"kl='loss' adds a term per token; {self.name!r} is per sequence: use kl='reward'")
        exact = self.kl_value == "exact"
        function = _exact_kl_loss if exact else _sampled_kl_loss
        hyper = {} if exact else {"value": self.kl_value, "gradient": kl_gradient or self.kl_value}
        tensors, _ = split_signature(function)
        if self.beta > 0:
            main = self.terms[0]
            self.terms += (Term(function, tensors, hyper, self.beta, main.reduction, main.length),)

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        owners = [o for o in (self, other) if o.advantage not in (None, "given")]
        if len(owners) == 2 and (owners[0].advantage, owners[0].beta) != (owners[1].advantage, owners[1].beta):
            raise ValueError("two objectives with different advantages cannot be added: a batch holds one advantage")
        base = owners[0] if owners else self
        regions = {o.trust_region for o in (self, other) if o.trust_region is not None}
        if len(regions) == 2:
            raise ValueError("two objectives with different trust regions cannot be added: a step has one limit")
        joined = object.__new__(Objective)
        joined.__dict__.update(base.__dict__)
        joined.terms = beside(self.terms + other.terms)
        joined.trust_region = next(iter(regions), None)
        joined.name = f"{self.name} + {other.name}"
        return joined

    def __rmul__(self, factor: float) -> Objective:
        _check.number("weight", factor)
        scaled = object.__new__(Objective)
        scaled.__dict__.update(self.__dict__)
        scaled.terms = tuple(replace(term, weight=factor * term.weight) for term in self.terms)
        scaled.name = f"{factor:g} {self.name}"
        return scaled

    __mul__ = __rmul__

    def renamed(self, name: str) -> Objective:
        """The same objective under another name."""
        copy = object.__new__(Objective)
        copy.__dict__.update(self.__dict__)
        copy.name = name
        return copy

    def without_values(self) -> Objective:
        """The terms that the critic has no part in."""
        copy = self.renamed(self.name)
        copy.terms = tuple(term for term in self.terms if not term.quantities & VALUES)
        return copy

    # -- what a run needs ---------------------------------------------------------------------------------------------
    @property
    def needs(self) -> frozenset[str]:
        """Every quantity that must exist before the loss can be computed, under glossary names."""
        names: set[str] = set()
        for term in self.terms:
            names |= term.quantities
        if "start_values" in names:
            names = (names - {"start_values"}) | {"values"}
        if "old_values" in names:
            names |= {"values"}
        if self.advantage == "gae":
            names |= {"values", "rewards"}
        elif self.advantage not in (None, "given"):
            names |= {"rewards"}
        if self.kl == "reward" and self.beta > 0:
            names |= {"ref_logps"}
        return frozenset(names)

    @property
    def forward_needs(self) -> frozenset[str]:
        """What the forward pass with gradient must return, given that constants are already in the batch."""
        names = {name for term in self.terms for name in term.quantities}
        if names & {"start_values", "old_values"}:
            names |= {"values"}
        wanted = names & FORWARD
        if any(inspect.unwrap(term.function) is entropy_bonus for term in self.terms):
            wanted |= {"entropy_grad"}
        return frozenset(wanted)

    @property
    def needs_reference(self) -> bool:
        return bool(self.needs & REFERENCE)

    @property
    def needs_groups(self) -> bool:
        """True when rows of one prompt must meet in one micro-batch."""
        return any("group_ids" in t.tensors or t.per_pair or t.rows == "chosen" for t in self.terms)

    @property
    def columns(self) -> frozenset[str]:
        """Quantities that the trainer does not make: numeric dataset columns, or what ``Trainer.prepare`` adds."""
        return frozenset(name for term in self.terms for name in term.quantities) - MADE

    @property
    def couples_rows(self) -> bool:
        """True when rows of different prompts are compared: the step must be one micro-batch on one process."""
        return any(bool(getattr(term.function, "couples_rows", False)) for term in self.terms)

    @property
    def advantage_weighted(self) -> bool:
        """True when a row whose advantages are 0 has neither loss nor gradient, in any term."""
        return all(getattr(t.function, "advantage_weighted", False) and not t.hyper.get("beta") for t in self.terms)

    @property
    def needs_pairs(self) -> bool:
        return any(term.per_pair for term in self.terms)

    @property
    def needs_rewards(self) -> bool:
        return "rewards" in self.needs

    @property
    def needs_critic(self) -> bool:
        return "values" in self.needs

    @property
    def min_group(self) -> int:
        baseline = (
            self.advantage_args.get("baseline", "leave_one_out") if self.advantage == "reward_to_go" else self.advantage
        )
        siblings = 2 if baseline in SIBLINGS else 1
        return max(siblings, *(term.min_group for term in self.terms))

    @property
    def on_policy_only(self) -> bool:
        """True when the estimator is unbiased only for samples of the current policy."""
        return any(
            bool(getattr(t.function, "on_policy_only", False)) or t.hyper.get("lr_coef", 0.0) for t in self.terms
        )

    @property
    def normalises_step(self) -> bool:
        """True when advantages have the mean and variance of a whole step, over all processes."""
        to_go = self.advantage == "reward_to_go" and bool(self.advantage_args.get("whiten"))
        return to_go or (isinstance(self.advantage, str) and self.advantage in WHOLE_STEP)

    # -- per step -------------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch, everyone: Everyone | None = None) -> Batch:
        """Mask what cannot be used and fill in ``advantages`` (and ``returns``). No gradient.

        Args:
            batch: whole groups; for advantages that are normalised over a step, the whole step of this process.
            everyone: gathers a tensor ``[n]`` over processes, for those; None where this process is the only one.

        Returns:
            The batch with what a loss needs.
        """
        if self.needs_rewards:
            batch = drop_unscored(batch, self.min_group, self.name)
        else:
            batch = drop_lone(batch, max(getattr(term.function, "min_group", 1) for term in self.terms))
        if self.advantage in (None, "given"):
            return batch
        if batch.rewards is None:
            raise ValueError(f"objective {self.name!r} needs rewards; give reward functions or a dataset with scores")
        penalty = self._reward_penalty(batch)
        if self.advantage == "gae":
            return with_gae(batch, penalty, self.name, **self.advantage_args)
        if self.advantage == "reward_to_go":
            return batch.replace(advantages=to_go(batch, penalty, everyone, **self.advantage_args))
        rewards = batch.rewards - reduce.sequence_sum(penalty, batch.mask) if penalty is not None else batch.rewards
        values = group_advantages(self.advantage, rewards, batch, everyone, **self.advantage_args)
        return batch.replace(advantages=torch.nan_to_num(values).to(torch.promote_types(values.dtype, torch.float32)))

    def _reward_penalty(self, batch: Batch) -> Tensor | None:
        if self.kl != "reward" or self.beta == 0:
            return None
        if batch.ref_logps is None or batch.old_logps is None:
            raise ValueError(
                f"objective {self.name!r} puts a KL term in the reward: the batch needs old_logps and ref_logps"
            )
        return self.beta * getattr(kl, self.kl_value)(batch.old_logps, batch.ref_logps, batch.mask)

    def denominators(self, batch: Batch) -> Tensor:
        """One float64 count per term, from the masks alone: additive over micro-batches and processes."""
        return torch.stack(
            [reduce.denominator(t.entries(t.mask(batch)), t.reduction, length=t.length) for t in self.terms]  # type: ignore[arg-type]
        )

    def compute(
        self, outputs: Mapping[str, Tensor], batch: Batch, denominators: Tensor
    ) -> tuple[Tensor, list[LossOutput]]:
        """The step's loss contribution of this batch, and every term's output.

        Args:
            outputs: what the forward pass returned, ``[B, T]`` by name (``scores [B]`` from a reward model).
            batch: constants.
            denominators: ``[number of terms]``, counted over the whole global step.

        Returns:
            A scalar with gradient whose sum over micro-batches and processes is the step's loss, and the outputs.
        """
        total, results = None, []
        for term, count in zip(self.terms, denominators.tolist(), strict=True):
            output = evaluate(term, outputs, batch, self.name)
            part = reduce.numerator(output.loss, output.counted, term.reduction, length=term.length)  # type: ignore[arg-type]
            part = part * (term.weight / count if count > 0 else 0.0)
            total = part if total is None else total + part
            results.append(output)
        assert total is not None
        return total, results

    # -- words ------------------------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, str]:
        """The choices that make this objective, for the table shown before a run."""
        advantage = self.advantage if isinstance(self.advantage, str) else getattr(self.advantage, "__name__", None)
        inside = any("ref_logps" in t.sources or "token_kl" in t.sources or t.per_pair for t in self.terms)
        place = {"reward": f"{self.kl_value} in the reward", "loss": f"{self.kl_value} in the loss"}.get(
            self.kl or "", ""
        )
        reference = self.needs_reference
        region = self.trust_region
        step = {} if region is None else {"step": region.describe()}
        return {
            "objective": self.name,
            "loss": " + ".join(
                (f"{t.weight:g} {t.name}" if t.weight != 1 else t.name) + (f" ({t.rows} rows)" if t.rows else "")
                for t in self.terms
            ),
            "hyper-parameters": ", ".join(f"{k}={v}" for t in self.terms for k, v in t.hyper.items()) or "-",
            "advantage": advantage or "inside the loss" if self.needs_rewards else "-",
            "KL to the reference": (place or ("inside the loss" if inside and reference else "none"))
            + (f", beta={self.beta:g}" if reference and self.beta else ""),
            "averaging": ", ".join(
                dict.fromkeys(f"{t.reduction}({t.length})" if t.length else t.reduction for t in self.terms)
            ),
            **step,
        }


def entropy_bonus(entropy: Tensor, mask: Tensor) -> LossOutput:
    """``-entropy`` per token: with weight c_e it rewards a spread-out policy (Schulman et al. 2017, eq. 9)."""
    return LossOutput((-entropy).where(mask, 0.0), {}, "token_mean", mask)


entropy_bonus.reduction = "token_mean"  # type: ignore[attr-defined]


def _sampled_kl_loss(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, *, value: kl.KLValue, gradient: kl.KLGradient
) -> LossOutput:
    estimate = kl.penalty(logps, ref_logps, mask, value=value, gradient=gradient)
    return LossOutput(estimate, {"kl": estimate.detach()}, "token_mean", mask)


def _exact_kl_loss(token_kl: Tensor, mask: Tensor) -> LossOutput:
    exact = token_kl.where(mask, 0.0)
    return LossOutput(exact, {"kl": exact.detach()}, "token_mean", mask)
