"""Where a run's time goes: seconds per phase, tokens per second, memory, and how near the device's limit it is.

Phases do not overlap: what is inside another counts for the inner one, but for evaluation and saving, which own all that
happens in them. On a CPU the clock is read at each change; on CUDA an event is recorded there, and all of them are read at
once when a line is logged, so nothing waits for the device between two lines.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlft.metrics import PHASES
from rlft.models.device_limits import Device, ModelCost, device_named, model_cost
from rlft.models.layout import LayoutUsed
from rlft.run.processes.processes import Processes

__all__ = ["PHASES", "Meter"]

_OWNERS = ("evaluate", "save")


class Meter:
    """Counts and times of a run since its last logged line; metrics named ``meter/...``.

    Args:
        device: that the run computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.total = dict.fromkeys(PHASES, 0.0)
        self._stack = ["other"]
        self._last = time.perf_counter()
        self._events: list[tuple[str, Any]] = []  # (phase that begins here, event)
        self._cost: ModelCost | None = None
        self._peak: Device | None = None
        self._sampled = self._tokens_before = 0
        self._update = self._floor = 0.0  # operations of the updates; least seconds of everything

    def start(self, policy: Any, *, tokens_seen: int, mixed_precision: str) -> str | None:
        """Begin to count: what was spent before the first step is not a step's.

        Args:
            policy: the module that is trained, unwrapped.
            tokens_seen: tokens trained on before.
            mixed_precision: of the run.

        Returns:
            What is missing for a comparison with what the device could do; None where nothing is.
        """
        self._tokens_before = tokens_seen
        self._stack, self._events = ["other"], []
        self._last = time.perf_counter()
        if hasattr(policy, "around_reference"):  # a reward model has none
            policy.around_reference(lambda: self.phase("reference"))
        if self.device.type != "cuda":
            return None
        self._mark("other")
        name = torch.cuda.get_device_name(self.device)
        self._peak = device_named(name)
        if not hasattr(policy, "reference_kind"):
            return None
        self._cost = model_cost(policy, mixed_precision=mixed_precision)
        if self._peak is None:
            return f"what a {name!r} can do at most is not in the table (rlft.models.device_limits.DEVICES)"
        if self._cost is None:
            return "how many operations this model takes is not known (experts, or quantised weights)"
        return None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside for ``name``, one of :data:`PHASES`."""
        outer = self._stack[-1]
        if outer in _OWNERS:
            yield
            return
        self._mark(name)
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark(outer)
            self._stack.pop()

    def _mark(self, begins: str) -> None:
        """One phase ends here and ``begins`` begins."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((begins, event))
            return
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """The part of each phase in everything up to the last line, the largest first."""
        together = sum(self.total.values())
        ordered = sorted(self.total.items(), key=lambda item: -item[1])
        return {name: spent / together for name, spent in ordered if spent > 0} if together > 0 else {}

    def sampled(self, lengths: Sequence[int]) -> None:
        """Take in one generation of this process: tokens of each answer."""
        self._sampled += sum(lengths)
        if self._cost is not None and self._peak is not None and lengths:
            mean = sum(lengths) / len(lengths)
            self._floor += self._cost.decoding(self._peak, steps=max(lengths), tokens=sum(lengths), length=mean)

    def passed(self, used: LayoutUsed, *, backward: bool = False, passes: int = 1) -> None:
        """Take in what went through the model.

        Args:
            used: token counts of one pass.
            backward: whether a gradient was computed in the first of the passes.
            passes: models that saw these tokens: 2 where the reference was scored as well.
        """
        if self._cost is None or self._peak is None or not used.rows:
            return
        length = used.repeated / used.rows
        forward = self._cost.forward(used.tokens, used.scored, length)
        update = self._cost.update(used.tokens, used.scored, length) if backward else 0.0
        self._update += update
        self._floor += (update + forward * (passes - backward)) / self._cost.peak(self._peak)

    def flush(self, processes: Processes, *, tokens_seen: int) -> dict[str, float]:
        """Metrics since the last call; collective on several processes. Times are those of this process."""
        self._mark(self._stack[-1])
        if self._events:
            self._read_events()
        seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        wall = sum(seconds.values())
        for name, spent in seconds.items():
            self.total[name] += spent
        sampled, memory = self._over_processes(processes)
        tokens = tokens_seen - self._tokens_before
        # without evaluation and saving, which would halve the rate of their line
        working = max(wall - sum(seconds[name] for name in _OWNERS), 1e-9)
        values = {f"meter/share/{name}": spent / max(wall, 1e-9) for name, spent in seconds.items() if spent > 0}
        values |= {"meter/seconds": wall, "meter/peak_memory_gib": memory}
        values["meter/trained_tokens_per_second"] = tokens / working
        if sampled:
            values["meter/sampled_tokens_per_second"] = sampled / working
        if self._cost is not None and self._peak is not None:
            values["meter/fraction_of_floor"] = self._floor / working
            if seconds["forward_backward"] > 0:
                values["meter/mfu"] = self._update / self._cost.peak(self._peak) / seconds["forward_backward"]
        self._tokens_before, self._sampled = tokens_seen, 0
        self._update = self._floor = 0.0
        return values

    def _read_events(self) -> None:
        torch.cuda.synchronize(self.device)
        for (name, begin), (_, end) in zip(self._events, self._events[1:], strict=False):
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._events = self._events[-1:]

    def _over_processes(self, processes: Processes) -> tuple[float, float]:
        """Tokens sampled by all processes, and the largest memory peak of any, in GiB."""
        mine = torch.tensor([[float(self._sampled), _peak_memory(self.device)]], dtype=torch.float64)
        if processes.world_size > 1:
            mine = processes.gather(mine).cpu()
        return float(mine[:, 0].sum()), float(mine[:, 1].max())


def _peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, else resident in memory; the most since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 2**10 if sys.platform != "darwin" else 1  # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
