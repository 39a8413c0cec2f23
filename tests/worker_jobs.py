"""Jobs for tests of worker processes. Imports next to nothing, so that a worker starts at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Answers:
    """Answers a task by what it asks for."""

    name: str = "job"

    def open(self, alive: Callable[[], None], *arguments: Any) -> Callable[[Any], Any]:
        if arguments == ("refuse",):
            raise ValueError("nothing to open")

        def work(task: Any) -> Any:
            kind, value = task
            if kind == "arguments":
                return self.name, arguments, os.getpid()
            if kind == "echo":
                return value
            if kind == "sleep":
                time.sleep(value)
            if kind == "busy":  # long, and alive
                for _ in range(value):
                    alive()
                    time.sleep(0.1)
            if kind == "exit":
                os._exit(value)
            if kind == "value":
                raise ValueError(value)
            if kind == "key":
                raise KeyError(value)
            if kind == "unsendable":
                return lambda: None
            return kind

        return work


def sleeper(path: str) -> None:
    """Start two workers, one of them at work, say their ids in a file, and wait to be killed."""
    from rlft._workers import Workers

    pool = Workers(2, Answers(), [(), ()])
    for n in range(2):
        pool.send(n, ("echo", n))
    for n in range(2):
        pool.receive(n)
    pool.send(0, ("sleep", 600))
    if os.fork() == 0:  # holds the pipes open when its parent is gone
        time.sleep(60)
        os._exit(0)
    with open(path + ".part", "w") as file:
        file.write(" ".join(map(str, pool.pids)))
    os.rename(path + ".part", path)
    time.sleep(600)
