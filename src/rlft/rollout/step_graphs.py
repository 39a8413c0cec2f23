"""The decode step as CUDA graphs: one launch per token instead of one for each of hundreds of small kernels.

A graph replays kernels on the memory that they were recorded with, so a recorded step has fixed shapes, and everything
that changes from step to step stands in buffers that stay where they are: tokens, positions, where each row begins, and
the column to write. Rows are rounded up to a power of two and columns to a multiple of 256; what is beyond the live ones
is masked, and the slots beyond the live rows are free. Each such bucket is one graph; all share one pool of memory.

References:
    CUDA C++ Programming Guide, "CUDA Graphs"; torch.cuda.graphs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft.rollout.llama_step import LlamaStep
from rlft.rollout.row_cache import FixedRows, RowCache

__all__ = ["Capture", "CudaCapture", "StepGraphs"]

logger = logging.getLogger("rlft")

_COLUMNS = 256  # a bucket's columns are a multiple of it
_EAGER = 2  # steps of a bucket that run without a graph: those few are quicker than a recording
_PROVED = 2  # replays of a graph that are compared: the first on what it was recorded with, the second on other numbers
_MOST = 32  # graphs kept; the oldest goes
#: The most that a replay may differ by, relative to a row's logits. The same kernels on the same shapes mostly agree to the
#: bit; products may be split otherwise. A stale buffer or a number that was recorded as a constant changes far more.
_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF = 0.03


class Capture(Protocol):
    """Runs a function while recording it; what it gives back runs the same kernels again, on the same memory."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """The replay, and the tensor that each replay writes."""
        ...


class CudaCapture:
    """Recording by torch's CUDA graphs, in one pool of memory: graphs that share it must not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self._stream is None:  # not before the first recording, whose failures are looked after
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        # The outer stream comes back even where the end of a failed recording raises.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            self._stream.wait_stream(torch.cuda.current_stream())
            # Libraries set themselves up on the first calls, which must not be recorded.
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do on the device (pinned copies of a data loader) does not break it
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = run()
        return graph.replay, out


@dataclass(slots=True)
class _Graph:
    replay: Callable[[], None]
    logits: Float[Tensor, "R V"]
    column: int  # that the recording wrote
    compared: int = 0


class StepGraphs:
    """Decode steps of one call, from graphs where one is recorded.

    A step without a graph, or after any failure, is the plain one. The first replays of each graph are compared with the
    same step run kernel by kernel; when a recording fails or a replay differs there is one warning, and no graph any more.

    Args:
        step: the decode step.
        cache: the rows' keys; graphs are thrown away when it moves them to other memory.
        capture: records, :class:`CudaCapture`.

    Attributes:
        failed: why graphs are no longer used; None while they are.
        recorded, replayed: how many graphs were recorded, how many steps came from one.
    """

    def __init__(self, step: LlamaStep, cache: RowCache, capture: Capture, *, device: torch.device) -> None:
        self.step, self.cache, self.capture = step, cache, capture
        slots = cache.slots
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._start = torch.zeros_like(self._tokens)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._logits: Tensor | None = None
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._uses: dict[tuple[int, int], int] = {}
        self._memory: list[tuple[int, torch.Size]] = []  # addresses alone: the cache's old memory must be free to go
        self.failed: str | None = None
        self.recorded = self.replayed = 0

    def __call__(
        self, tokens: Int[Tensor, " R"], positions: Int[Tensor, " R"], start: Int[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """Append a token to every live row, and score what may follow.

        Args:
            tokens: one for each live row.
            positions: how many tokens of its row stand before each.
            start: the column at which each live row begins.

        Returns:
            Logits, in the model's dtype; overwritten by the next call.
        """
        if self.failed is not None:
            return self._plain(tokens, positions, start)
        self._follow()
        live, columns = len(tokens), self.cache.columns
        rows = min(self.cache.slots, 1 << (live - 1).bit_length())
        bucket = (rows, min(-(-(columns + 1) // _COLUMNS) * _COLUMNS, self.cache.memory()[0][0].shape[2]))
        graph = self._graphs.get(bucket)
        if graph is None:
            self._uses[bucket] = self._uses.get(bucket, 0) + 1
            if self._uses[bucket] <= _EAGER:
                return self._plain(tokens, positions, start)
        for buffer, new in ((self._tokens, tokens), (self._positions, positions), (self._start, start)):
            buffer[:live].copy_(new)
        self._start[live:].fill_(columns)  # rows that do not live see their own token alone
        self._column.fill_(columns)
        if graph is None:
            try:
                graph = self._record(bucket)
            except Exception as error:  # whatever the driver or a kernel objects to: the plain step still serves
                self._give_up(f"recording stopped with {type(error).__name__}: {error}")
                return self._plain(tokens, positions, start)
        if graph.compared < _PROVED:
            logits = self._compared(bucket, graph, live)
        else:
            graph.replay()
            logits = graph.logits
        self.replayed += 1
        self.cache.advance()
        return logits[:live]

    def _plain(self, tokens: Tensor, positions: Tensor, start: Tensor) -> Float[Tensor, "R V"]:
        self.cache.open(start)
        return self.step(tokens, positions, self.cache)

    def _follow(self) -> None:
        """Room for one more column; graphs of memory that is no longer the cache's are dropped."""
        self.cache.reserve(self.cache.columns + 1)
        now = [(part.data_ptr(), part.shape) for pair in self.cache.memory() for part in pair]
        if now != self._memory:
            self._graphs.clear()
            self._uses.clear()
            self._memory = now

    def _fixed(self, bucket: tuple[int, int]) -> Float[Tensor, "R V"]:
        rows, columns = bucket
        cache = FixedRows(self.cache.memory(), rows, columns, self._start[:rows], self._column)
        return self.step(self._tokens[:rows], self._positions[:rows], cache)

    def _record(self, bucket: tuple[int, int]) -> _Graph:
        while len(self._graphs) >= _MOST:
            del self._graphs[next(iter(self._graphs))]
        if self._logits is None:
            found = self._fixed(bucket)
            self._logits = found.new_zeros(self.cache.slots, found.shape[1])
        out = self._logits[: bucket[0]]
        # One buffer for all graphs: their own logits would stay in the pool for as long as they do.
        replay, logits = self.capture(lambda: out.copy_(self._fixed(bucket)))
        self.recorded += 1
        self._graphs[bucket] = _Graph(replay, logits, self.cache.columns)
        return self._graphs[bucket]

    def _compared(self, bucket: tuple[int, int], graph: _Graph, live: int) -> Float[Tensor, "R V"]:
        """Replay, then run the step kernel by kernel, whose logits and keys are the ones that count."""
        graph.compared += 1
        # A replay that does not read the column writes the one of its recording, whose keys are other steps'.
        there = [(part, part[: bucket[0], :, graph.column].clone()) for pair in self.cache.memory() for part in pair]
        graph.replay()
        found = graph.logits.clone()
        for part, kept in there:
            part[: bucket[0], :, graph.column] = kept
        truth = self._fixed(bucket)
        mine, right = found[:live].double(), truth[:live].double()
        if not torch.isfinite(right).all():  # a broken model is named where a token is drawn
            return truth
        bound = _BOUNDS.get(truth.dtype, _HALF)
        worst = float(((mine - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)).max())
        if not worst <= bound:
            self._give_up(f"the logits of a replay differ by {worst:.1e} of their size, more than {bound:.0e}")
        return truth

    def _give_up(self, why: str) -> None:
        self.failed = why
        self._graphs.clear()
        warnings.warn(
            f"the built-in sampler's decode steps are launched kernel by kernel, without CUDA graphs (slower for small "
            f"models): {why}. Pass cuda_graphs=False to do without them from the beginning",
            stacklevel=2,
        )
