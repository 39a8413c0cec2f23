"""Calling user code safely: which keywords it takes, how long it may take, and who is to blame when it fails."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlft import _check

__all__ = ["RewardError", "Wait", "accepted", "is_async", "run_guarded", "run_together"]

_SLICE = 0.05  # seconds between two looks at a waiting thread, so that poll() answers a signal soon


class RewardError(RuntimeError):
    """A reward function failed: it raised, hung, or returned something that is no reward.

    Attributes:
        function: the name of the function (several are joined by ", " when they hung together).
        step: the training step, None where the caller gave no trainer state.
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
    """``call()``, given up after ``timeout`` seconds.

    Without a limit the call runs in this thread. With one it runs in a daemon thread that this one watches: when time
    is up control returns, but Python cannot kill the thread, which goes on until it ends by itself or the process
    does. A call that never releases the interpreter lock (one long regular expression, say) cannot be interrupted.

    Raises:
        Wait: when time is up. Whatever ``call`` or ``poll`` raises comes through.
    """
    grad = torch.is_grad_enabled()
    if timeout is None:
        with torch.set_grad_enabled(grad):  # whatever the call leaves behind is put back
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
        thread.join(min(_SLICE, left))
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
        run_guarded(lambda: asyncio.run(everything()), timeout=limit, poll=poll)
    except Wait:
        pass
    if not all(done):
        raise Wait([index for index, finished in enumerate(done) if not finished])
    return outcomes
