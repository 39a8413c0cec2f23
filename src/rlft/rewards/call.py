"""Calling user code safely: which keywords it takes, how long it may take, and who is to blame when it fails."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlft import _check
from rlft.rewards.watch import SLICE, Watch, can_interrupt

__all__ = ["RewardError", "Wait", "When", "accepted", "is_async", "run_guarded", "run_together"]


class RewardError(RuntimeError):
    """A reward function failed: it raised, hung, or returned something that is no reward.

    Attributes:
        function: the name of the function (several are joined by ", " when they hung together).
        step: the training step, counted from 1; in an evaluation, the last finished one; None where the caller gave no
            trainer state.
        row: the completion in the batch, None where the whole call failed.
    """

    def __init__(self, message: str, *, function: str, step: int | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.function, self.step, self.row = function, step, row


class Wait(Exception):
    """Internal: the time limit passed while these calls were still running."""

    def __init__(self, unfinished: Sequence[int]) -> None:
        super().__init__(list(unfinished))
        self.unfinished = list(unfinished)


@dataclass(frozen=True, slots=True)
class When:
    """Where a run stands, for errors.

    Attributes:
        step: as in :class:`RewardError`.
        text: the same in words, such as " at step 3"; empty where it is not known.
        batch_size: the setting that says how many completions are scored at once.
    """

    step: int | None
    text: str
    batch_size: str

    @classmethod
    def of(cls, trainer_state: Any) -> When:
        """From what reward functions get as ``trainer_state``: a mapping or an object, or None."""
        known = trainer_state if isinstance(trainer_state, Mapping) else {}
        done = getattr(trainer_state, "global_step", known.get("global_step"))
        training = getattr(trainer_state, "is_training", known.get("is_training", True))
        size = f"per_device_{'train' if training else 'eval'}_batch_size"
        if not isinstance(done, int):
            return cls(None, "", size)
        return (
            cls(done + 1, f" at step {done + 1}", size)
            if training
            else cls(done, f" after step {done}, in evaluation", size)
        )


def is_async(func: Callable[..., Any]) -> bool:
    """Whether calling ``func`` gives a coroutine (an ``async def`` function, method or ``__call__``)."""
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(type(func), "__call__", None))  # noqa: B004


def accepted(func: Callable[..., Any], name: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that ``func`` takes: all of them with ``**kwargs``, else those it names.

    Raises:
        ValueError: when it needs a parameter that is no column, with the columns there are.
    """
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature: hand it everything and let it complain
        return dict(keywords)
    kinds = inspect.Parameter
    for parameter in parameters:
        required = parameter.default is kinds.empty and parameter.kind in (
            kinds.POSITIONAL_OR_KEYWORD,
            kinds.KEYWORD_ONLY,
            kinds.POSITIONAL_ONLY,
        )
        if required and (parameter.name not in keywords or parameter.kind is kinds.POSITIONAL_ONLY):
            known = sorted(keywords)
            raise ValueError(
                f"reward function {name!r} needs the parameter {parameter.name!r}, and the batch offers "
                f"{', '.join(known)}{_check.suggestion(parameter.name, known).split('; known')[0]}; "
                f"add the column {parameter.name!r} to the dataset or rename the parameter"
            )
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters):
        return dict(keywords)
    named = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    return {key: value for key, value in keywords.items() if key in named}


def run_guarded(call: Callable[[], Any], *, timeout: float | None, poll: Callable[[], None] | None) -> Any:
    """``call()``, given up after ``timeout`` seconds, or when ``poll`` raises.

    In the main thread the call has that thread, where it may set alarms of its own, and another one watches: the call is
    ended by an exception inside it. Code that does not come back to Python, in a library, say, is waited for. In any
    other thread the call gets one of its own, which is left behind when time is up; it goes on until it ends by itself
    or the process does. Either way, one long call that holds the interpreter lock (a regular expression) goes on.

    Raises:
        Wait: when time is up. Whatever ``call`` or ``poll`` raises comes through.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # whatever the call leaves behind is put back
        if timeout is None and poll is None:
            return call()
        return (_watched if can_interrupt() else _in_a_thread)(call, timeout, poll)


def _watched(call: Callable[[], Any], timeout: float | None, poll: Callable[[], None] | None) -> Any:
    watch = Watch(Wait([0]), timeout=timeout, poll=poll)
    value = None
    try:
        watch.begin()
        value = call()
    except BaseException:
        if watch.why is None:  # the call's own, or meant for a watch around this one
            raise
    finally:
        watch.end()
    if watch.why is not None:
        raise watch.why
    return value


def _in_a_thread(call: Callable[[], Any], timeout: float | None, poll: Callable[[], None] | None) -> Any:
    grad = torch.is_grad_enabled()
    if timeout is None:
        return call()
    context = contextvars.copy_context()
    result: list[Any] = []
    error: list[BaseException] = []

    def work() -> None:
        torch.set_grad_enabled(grad)  # grad mode belongs to a thread: carry the caller's over
        try:
            result.append(context.run(call))
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=work, name="rlft-reward", daemon=True)
    thread.start()
    end = time.monotonic() + timeout
    while thread.is_alive():
        left = end - time.monotonic()
        if left <= 0:
            break
        thread.join(min(SLICE, left))
        if poll is not None:
            poll()
    if error:
        raise error[0]
    if not result:
        raise Wait([0])
    return result[0]


def run_together(
    calls: Sequence[Callable[[], Any]], *, timeout: float | None, poll: Callable[[], None] | None
) -> list[Any]:
    """Await all ``calls`` (functions that give a coroutine) at once; an entry is the result or the exception raised.

    They run in an event loop of their own, in a thread of their own, so this also works where a loop is already
    running (a notebook).

    Raises:
        Wait: when ``timeout`` seconds passed, with the indices still unfinished.
    """
    outcomes: list[Any] = [None] * len(calls)
    done = [False] * len(calls)

    async def one(index: int) -> None:
        try:
            outcomes[index] = await calls[index]()
        except (Exception, SystemExit) as caught:
            outcomes[index] = caught
        done[index] = True

    async def everything() -> None:
        tasks = [asyncio.ensure_future(one(index)) for index in range(len(calls))]
        # Leaving by a cancelled task, not by an abandoned thread, where the functions do await.
        _, pending = await asyncio.wait(tasks, timeout=timeout)
        for task in pending:
            task.cancel()

    # The thread gets a moment more than the tasks, to cancel them; it alone guards against a coroutine that blocks.
    limit = 1e9 if timeout is None else timeout + min(1.0, timeout)
    try:
        _in_a_thread(lambda: asyncio.run(everything()), limit, poll)
    except Wait:
        pass
    if not all(done):
        raise Wait([index for index, finished in enumerate(done) if not finished])
    return outcomes
