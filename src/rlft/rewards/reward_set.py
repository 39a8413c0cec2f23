"""Several reward functions, called the way TRL calls them, checked, and added up."""

from __future__ import annotations

import functools
import logging
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlft import _check
from rlft.errors import out_of_memory
from rlft.rewards.call import RewardError, Wait, When, accepted, is_async, run_guarded, run_together

__all__ = ["RewardError", "RewardFunction", "RewardOutput", "RewardSet", "function_name"]

logger = logging.getLogger("rlft.rewards")

RewardFunction = Callable[..., Any]

_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state")
_DROPPED = ("prompt", "completion")  # per-row fields that the plural arguments already carry


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """The rewards of one batch.

    Attributes:
        rewards: ``[B]`` float32, the weighted sum over the functions that scored the row; NaN where none did.
        each: ``[B, K]`` float32, unweighted, one column per function; NaN where it returned None.
        names: the K metric names, in column order.
    """

    rewards: Float[Tensor, " B"]
    each: Float[Tensor, "B K"]
    names: tuple[str, ...]

    @property
    def unscored(self) -> int:
        """Rows that no function with a weight scored."""
        return int(torch.isnan(self.rewards).sum())

    @property
    def all_unscored(self) -> bool:
        """Whether there is nothing to learn from: rows, but not one reward."""
        return self.rewards.numel() > 0 and self.unscored == self.rewards.numel()

    def metrics(self) -> dict[str, float]:
        """``rewards/{name}/mean``, ``rewards/{name}/std`` (unbiased; 0 for one row) and the share ``rewards/unscored``.

        Means are over the rows that the function scored; where it scored none, its keys are absent.
        """
        found: dict[str, float] = {}
        for index, name in enumerate(self.names):
            column = self.each[:, index].double()
            column = column[~torch.isnan(column)]
            if column.numel():
                found[f"rewards/{name}/mean"] = column.mean().item()
                found[f"rewards/{name}/std"] = column.std().item() if column.numel() > 1 else 0.0
        if self.rewards.numel():
            found["rewards/unscored"] = self.unscored / self.rewards.numel()
        return found


class RewardSet:
    """Reward functions, their weights and their checks.

    A function is called once per batch by keyword, ``f(prompts=, completions=, completion_ids=, trainer_state=,
    **columns)``, every list with one entry per completion, and returns one number or None per completion. It may be
    ``async def``; all such functions of a set run at once. A function without ``**kwargs`` gets only the keywords it
    names. None means "cannot score this row": the row's reward is the weighted sum over the other functions, and
    a row that no function scored is unscored (NaN), not zero.

    Args:
        funcs: one function or several.
        weights: one number per function; 1 each by default. A function of weight 0 is called and logged, and
            alone does not make a row scored.
        names: metric names; by default each function's ``__name__`` (equal names get ``_2``, ``_3``, ...).
        timeout: seconds that one call of one function may take; None = no limit. Functions run in the thread that calls the
            set; in the main thread they may set alarms (``SIGALRM``) of their own. When time is up an exception is
            raised inside the function, and comes out as a :class:`RewardError`. One that is inside a library which
            does not come back to Python, or holds the interpreter lock, is waited for.

    Raises:
        ValueError: for no function, something not callable, wrong counts, weights that are not finite.
    """

    def __init__(
        self,
        funcs: RewardFunction | Sequence[RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> None:
        listed = [funcs] if callable(funcs) else list(funcs)
        if not listed:
            raise ValueError("a RewardSet needs at least one reward function, got none; pass reward_funcs")
        for position, func in enumerate(listed):
            if not callable(func):
                raise ValueError(
                    f"reward function {position} is not callable: {func!r}; "
                    f"turn a name into a function with load_reward()"
                )
        if weights is not None and len(weights) != len(listed):
            raise ValueError(f"reward_weights must have one number per function ({len(listed)}), got {len(weights)}")
        for weight in weights or ():
            _check.number("reward_weights", weight)
        if names is not None and len(names) != len(listed):
            raise ValueError(f"names must have one entry per reward function ({len(listed)}), got {len(names)}")
        if names is not None and len(set(names)) != len(names):
            raise ValueError(f"names of reward functions must differ, got {list(names)}")
        if timeout is not None:
            _check.number("timeout", timeout, low=0.0, open_low=True)
        self.funcs = tuple(listed)
        self.weights = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(listed)
        if not any(self.weights):
            raise ValueError("every reward weight is 0, so no row would have a reward; set one reward_weights entry")
        self.names = tuple(names) if names is not None else _unique([function_name(f) for f in listed])
        self.timeout = timeout
        self._told: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self.funcs)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        trainer_state: Any = None,
        *,
        poll: Callable[[], None] | None = None,
    ) -> RewardOutput:
        """Score a batch of B completions.

        Args:
            prompts: one prompt (string or messages) per completion: a prompt with n completions appears n times.
            completions: strings, or lists of messages.
            completion_ids: the token ids of each completion.
            columns: the other columns of the dataset, one entry per completion.
            trainer_state: handed on to the functions; errors name the step that follows its ``global_step`` finished ones, or, where
                its ``is_training`` is False, the evaluation after them.
            poll: called between functions and, from another thread, while one runs; what it raises comes through.

        Returns:
            The rewards, weighted and each.

        Raises:
            ValueError: when the arguments do not have one entry per completion, or a function needs a missing column.
            RewardError: when a function raises, hangs past the limit, returns a wrong count, or returns a value that
                is not a finite number or None.
        """
        keywords = self._keywords(prompts, completions, completion_ids, columns or {}, trainer_state)
        when = When.of(trainer_state)
        returned = self._call(keywords, when, poll)
        count = len(completions)
        each = torch.full((count, len(self.funcs)), math.nan, dtype=torch.float64)
        for index, name in enumerate(self.names):
            for row, value in enumerate(self._listed(name, returned[index], count, when)):
                if value is None:
                    self._tell(
                        name, "none", f"reward function {name!r} returned None: rows without a reward are left out"
                    )
                else:
                    each[row, index] = self._number(name, value, row, when)
        output = self._sum(each, when)
        if output.all_unscored:
            self._tell("", "all", "no completion of a batch has a reward (every function returned None)")
        return output

    # -- calling --------------------------------------------------------------------------------------------------
    def _keywords(
        self, prompts: Any, completions: Any, completion_ids: Any, columns: Mapping[str, Any], trainer_state: Any
    ) -> dict[str, Any]:
        lists = {"prompts": prompts, "completion_ids": completion_ids, **columns}
        for name, values in lists.items():
            if name in _RESERVED and name in columns:
                raise ValueError(f"the column name {name!r} is an argument of every reward function; rename the column")
            if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != len(completions):
                came = (
                    len(values) if hasattr(values, "__len__") and not isinstance(values, str) else type(values).__name__
                )
                raise ValueError(f"{name} must have one entry per completion ({len(completions)}), got {came}")
        kept = {name: list(values) for name, values in columns.items() if name not in _DROPPED}
        fixed = {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
        return {**kept, **fixed, "trainer_state": trainer_state}

    def _call(self, keywords: dict[str, Any], when: When, poll: Callable[[], None] | None) -> list[Any]:
        returned: list[Any] = [None] * len(self.funcs)
        calls = [self._one(index, keywords) for index in range(len(self.funcs))]
        together = [index for index, func in enumerate(self.funcs) if is_async(func)]
        for index, call in enumerate(calls):
            if index in together:
                continue
            if poll is not None:
                poll()
            try:
                returned[index] = run_guarded(_blamed(call), timeout=self.timeout, poll=poll)
            except Wait as caught:
                raise self._hung([index], keywords, when) from caught
            except _UserError as caught:
                raise self._raised(index, caught.error, keywords, when, poll) from caught.error
        if together:
            if poll is not None:
                poll()
            try:
                outcomes = run_together([calls[index] for index in together], timeout=self.timeout, poll=poll)
            except Wait as caught:
                raise self._hung([together[position] for position in caught.unfinished], keywords, when) from caught
            for index, outcome in zip(together, outcomes, strict=True):
                if isinstance(outcome, (Exception, SystemExit)):
                    raise self._raised(index, outcome, keywords, when, poll) from outcome
                returned[index] = outcome
        return returned

    def _one(self, index: int, keywords: dict[str, Any]) -> Callable[[], Any]:
        """One function with what it takes of these keywords."""
        func, name = self.funcs[index], self.names[index]
        return functools.partial(func, **_own_lists(accepted(func, name, keywords)))

    def _hung(self, indices: Sequence[int], keywords: dict[str, Any], when: When) -> RewardError:
        names = ", ".join(self.names[index] for index in indices)
        return RewardError(
            f"reward function {names!r} did not return within {self.timeout:g} s{when.text}, for {_rows(keywords)}; raise the "
            f"reward timeout, or return None for rows that take too long",
            function=names,
            step=when.step,
        )

    def _raised(
        self,
        index: int,
        error: BaseException,
        keywords: dict[str, Any],
        when: When,
        poll: Callable[[], None] | None,
    ) -> RewardError:
        name, row = self.names[index], None
        if out_of_memory(error):
            what = f"ran out of memory ({str(error).strip()[:200] or type(error).__name__}){when.text}, for {_rows(keywords)}"
            remedy = (
                "score fewer at once inside it (a reward model has batch_size), move its model to another device, or "
                f"lower {when.batch_size}"
            )
        else:
            row = self._alone(index, error, keywords, poll)
            place = f"in {_rows(keywords)}" if row is None else f"for row {row}, found by scoring rows one by one"
            what = f"raised {type(error).__name__}: {str(error)[:500]}{when.text}, {place}"
            remedy = "return None for rows it cannot score"
        return RewardError(f"reward function {name!r} {what}; {remedy}", function=name, step=when.step, row=row)

    def _alone(
        self, index: int, error: BaseException, keywords: dict[str, Any], poll: Callable[[], None] | None
    ) -> int | None:
        """The first row for which the function raises the same when it has that row alone; None where it never does.

        All these calls together have the time that one call has.
        """
        end = None if self.timeout is None else time.monotonic() + self.timeout
        for row in range(len(keywords["completions"])):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return None
            single = {name: [value[row]] if isinstance(value, list) else value for name, value in keywords.items()}
            call = self._one(index, single)
            try:
                if is_async(self.funcs[index]):
                    raised = run_together([call], timeout=left, poll=poll)[0]
                else:
                    raised = run_guarded(_outcome(call), timeout=left, poll=poll)
            except Wait:
                return None
            if type(raised) is type(error) and str(raised) == str(error):
                return row
        return None

    # -- reading what came back -----------------------------------------------------------------------------------
    def _listed(self, name: str, returned: Any, count: int, when: When) -> list[Any]:
        if isinstance(returned, Tensor):
            if returned.requires_grad:
                raise RewardError(
                    f"reward function {name!r} returned a tensor that requires grad{when.text}; rewards are constants: "
                    f"compute them under torch.no_grad() and return .tolist()",
                    function=name,
                    step=when.step,
                )
            returned = returned.tolist() if returned.ndim == 1 else returned
        elif type(returned).__module__ == "numpy" and getattr(returned, "ndim", 0) == 1:
            returned = returned.tolist()
        if not isinstance(returned, (list, tuple)):
            raise RewardError(
                f"reward function {name!r} must return a list with one number or None per completion ({count}), "
                f"got {type(returned).__name__}{_shape(returned)}{when.text}",
                function=name,
                step=when.step,
            )
        if len(returned) != count:
            raise RewardError(
                f"reward function {name!r} returned {len(returned)} rewards for {count} completions{when.text}; "
                f"return one number or None per completion",
                function=name,
                step=when.step,
            )
        return list(returned)

    def _number(self, name: str, value: Any, row: int, when: When) -> float:
        if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
            value = value.item()
        elif type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if not isinstance(value, numbers.Real):
            grad = isinstance(value, Tensor) and value.requires_grad
            what = "a tensor that requires grad" if grad else f"{str(value)[:80]!r} of type {type(value).__name__}"
            raise RewardError(
                f"reward function {name!r} returned {what} for row {row}{when.text}; "
                f"return a plain float, or None where the row cannot be scored",
                function=name,
                step=when.step,
                row=row,
            )
        if not isinstance(value, float):
            kind = type(value).__name__
            self._tell(name, kind, f"reward function {name!r} returned {value!r:.40} of type {kind}: taken as a float")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {name!r} returned {number} for row {row}{when.text}; a reward must be finite: "
                f"return None where the row cannot be scored",
                function=name,
                step=when.step,
                row=row,
            )
        return number

    def _sum(self, each: Float[Tensor, "B K"], when: When) -> RewardOutput:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        present = ~torch.isnan(each) & (weights != 0)
        total = (each.nan_to_num(0.0) * weights).where(present, 0.0).sum(-1)
        total = total.where(present.any(-1), math.nan)
        # Finite in float64 may be infinite in float32, or inf - inf in the sum: neither may pass for "unscored".
        single, single_each = total.float(), each.float()
        bad_rows = present.any(-1) & ~torch.isfinite(single)
        bad = torch.cat([bad_rows[:, None], torch.isinf(single_each)], dim=1).nonzero().tolist()
        if bad:
            row, column = bad[0]
            name = ", ".join(self.names) if column == 0 else self.names[column - 1]
            raise RewardError(
                f"the reward of row {row} ({name}) does not fit float32{when.text}; "
                f"scale the reward or its weight down",
                function=name,
                step=when.step,
                row=row,
            )
        return RewardOutput(rewards=single, each=single_each, names=self.names)

    def _tell(self, name: str, kind: str, message: str) -> None:
        """One warning per function and kind, not one per row."""
        if (name, kind) not in self._told:
            self._told.add((name, kind))
            logger.warning(message)


class _UserError(Exception):
    """Carries what a reward function raised past the watchdog, apart from what ``poll`` raises."""

    def __init__(self, error: Exception | SystemExit) -> None:
        super().__init__(str(error))
        self.error = error


def _blamed(call: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        try:
            return call()
        except (Exception, SystemExit) as caught:  # a function that exits would end the run without a word
            raise _UserError(caught) from caught

    return wrapped


def _outcome(call: Callable[[], Any]) -> Callable[[], Any]:
    """What a call raises, as its result; None where it raises nothing."""

    def wrapped() -> Any:
        try:
            call()
        except (Exception, SystemExit) as caught:
            return caught
        return None

    return wrapped


def _rows(keywords: dict[str, Any]) -> str:
    count = len(keywords["completions"])
    return "row 0" if count == 1 else f"rows 0 to {count - 1}"


def _own_lists(keywords: dict[str, Any]) -> dict[str, Any]:
    """A list of its own for every function: one that sorts or pops must not disturb the next."""
    return {name: list(value) if isinstance(value, list) else value for name, value in keywords.items()}


def _shape(returned: Any) -> str:
    return f" of shape {list(returned.shape)}" if hasattr(returned, "shape") else ""


def function_name(func: Any) -> str:
    """The metric name of a reward function: ``__name__``, looked up through ``functools.partial``, else the class."""
    while isinstance(func, functools.partial):
        func = func.func
    name = getattr(func, "__name__", None)
    return name if isinstance(name, str) and name else type(func).__name__


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in found:
            count += 1
            candidate = f"{name}_{count}"
        found.append(candidate)
    return tuple(found)
