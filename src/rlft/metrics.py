"""Metrics: exact averages over masks, micro-batches and processes, and the log they are written to.

An average is a sum and a count, both float64, divided once at the very end. So it does not depend on how a step was
cut into micro-batches or spread over processes, and a masked slot never counts. Nothing is filtered: a NaN that counts
makes the average NaN, and NaN is what the log says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlft import _check
from rlft._metrics_log import LOG_NAME, MetricsLog, comparable, read_metrics
from rlft._redact import redact
from rlft.types import LossOutput

__all__ = ["LOG_NAME", "PHASES", "MetricSums", "MetricsLog", "comparable", "read_metrics", "redact"]

#: What a run's time is spent on, in the order of a step; what none of them covers is ``other``.
PHASES: tuple[str, ...] = (
    "sample",
    "reward",
    "reference",
    "forward_backward",
    "optimizer",
    "evaluate",
    "save",
    "other",
)

_EMPTY = {"mean": 0.0, "min": math.inf, "max": -math.inf}


class MetricSums:
    """Running averages and extremes of named metrics.

    ::

        sums = MetricSums()
        sums.add("kl", token_kl, mask)                  # [B, T] over unmasked tokens
        sums.add("reward", rewards, ~rewards.isnan())   # [B] over scored rows
        sums.add("lr", 1e-5)                            # a plain number
        sums.add_min("completions/min_length", lengths)
        values = sums.reduce(accelerator.gather).means()

    Nothing is read back from the device before :meth:`means` or :meth:`as_tensor`.
    """

    def __init__(self) -> None:
        self._cells: dict[str, tuple[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, name: str, values: Tensor | float | bool, mask: Tensor | None = None, *, weight: float = 1.0) -> None:
        """Take part in an average.

        Args:
            name: the metric.
            values: a tensor of any shape (tokens ``[B, T]``, rows ``[B]``, pairs ``[P]``, a scalar), or a number.
            mask: bool, of exactly that shape: True counts. None counts every entry. Masked values are never touched.
            weight: how much each entry counts.

        Raises:
            ValueError: when the mask does not fit, or the name already holds an extreme.
        """
        plain, counted = _plain(name, values, mask)
        _check.number("weight", weight, low=0.0)
        total = plain.where(counted, 0.0).sum() * weight
        self._put(name, "mean", torch.stack([total, counted.sum().double() * weight]))

    def add_min(self, name: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Take part in a minimum; arguments as in :meth:`add`."""
        plain, counted = _plain(name, values, mask)
        self._put(name, "min", _extreme(plain.where(counted, math.inf), counted, torch.amin, math.inf))

    def add_max(self, name: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Take part in a maximum; arguments as in :meth:`add`."""
        plain, counted = _plain(name, values, mask)
        self._put(name, "max", _extreme(plain.where(counted, -math.inf), counted, torch.amax, -math.inf))

    def add_output(self, output: LossOutput, token_mask: Tensor, *, prefix: str = "") -> None:
        """All metrics of a loss, each under the mask that fits its shape.

        NaN is a loss's word for "does not apply" (the reward of a chosen answer in a row that was not chosen) and is
        left out; that the loss itself is finite is checked where the step is applied.

        Args:
            output: what the loss returned.
            token_mask: ``[B, T]`` the batch's mask.
            prefix: put before every name, for instance ``"eval_"``.

        Raises:
            ValueError: when a metric fits no mask.
        """
        masks = (output.counted, token_mask, token_mask.any(-1))
        for name, values in output.metrics.items():
            mask = next((mask for mask in masks if mask.shape == values.shape), None)
            if mask is None and values.ndim:
                raise ValueError(
                    f"metric {name!r} has shape {list(values.shape)}, which fits neither the loss "
                    f"{list(output.loss.shape)} nor the batch {list(token_mask.shape)}; return one entry per token, "
                    f"per row or per pair, or a scalar"
                )
            applies = ~values.detach().isnan()
            self.add(prefix + name, values, applies if mask is None else mask & applies)

    def merge(self, other: MetricSums) -> None:
        """Take in everything that another accumulator has seen."""
        for name, (kind, cell) in other._cells.items():
            self._put(name, kind, cell)

    def _put(self, name: str, kind: str, cell: Tensor) -> None:
        if name not in self._cells:
            self._cells[name] = (kind, cell)
            return
        known, old = self._cells[name]
        if known != kind:
            raise ValueError(f"metric {name!r} is a {known} already and cannot be a {kind} too; use another name")
        if old.device != cell.device:
            old, cell = old.cpu(), cell.cpu()
        self._cells[name] = (kind, _joined(kind, torch.stack([old, cell])))

    # -- over a stop and a resume ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far as plain values, exact: name -> kind, value, count."""
        names = sorted(self._cells)
        table = _to_cpu([self._cells[name][1] for name in names]).tolist()
        return {name: [self._cells[name][0], *row] for name, row in zip(names, table, strict=True)}

    @classmethod
    def from_state(cls, state: Mapping[str, Sequence[Any]]) -> MetricSums:
        """Inverse of :meth:`state_dict`."""
        sums = cls()
        for name, (kind, value, count) in state.items():
            if kind not in _EMPTY:
                raise ValueError(f"metric {name!r} has the kind {kind!r}; expected one of {', '.join(_EMPTY)}")
            sums._cells[name] = (kind, torch.tensor([value, count], dtype=torch.float64))
        return sums

    # -- over processes ---------------------------------------------------------------------------------------------
    def layout(self) -> list[str]:
        """``kind:name`` of every metric, sorted: the rows of :meth:`as_tensor`."""
        return sorted(f"{kind}:{name}" for name, (kind, _) in self._cells.items())

    def as_tensor(self, layout: Sequence[str] | None = None) -> Tensor:
        """Float64 ``[K, 2]`` on the CPU: value (sum or extreme) and count per row of the layout.

        Args:
            layout: the rows, common to all processes (default: :meth:`layout`); what is unknown here is empty.

        Raises:
            ValueError: when the layout lacks a metric that this accumulator has.
        """
        own = self.layout()
        layout = own if layout is None else layout
        lost = sorted(set(own) - set(layout))
        if lost:
            raise ValueError(f"the layout lacks {lost[0]!r}, which was measured here; use the union of all processes")
        rows = []
        for entry in layout:
            kind, name = entry.split(":", 1)
            rows.append(self._cells[name][1] if name in self._cells else torch.tensor([_EMPTY[kind], 0.0]).double())
        return _to_cpu(rows)

    @classmethod
    def from_tensors(cls, layout: Sequence[str], gathered: Tensor) -> MetricSums:
        """Merge the ``[W, K, 2]`` tensors of W processes that used one layout."""
        sums = cls()
        for index, entry in enumerate(layout):
            kind, name = entry.split(":", 1)
            sums._cells[name] = (kind, _joined(kind, gathered[:, index].double()))
        return sums

    def reduce(self, gather: Callable[[Tensor], Tensor], *, device: torch.device | str = "cpu") -> MetricSums:
        """Merge over all processes, which may have measured different metrics. Three small collectives.

        Args:
            gather: concatenates a tensor of equal shape over processes along its first dimension
                (``accelerator.gather``).
            device: where the collectives want their tensors.
        """
        text = torch.tensor(list(json.dumps(self.layout()).encode()), dtype=torch.uint8)
        lengths = gather(torch.tensor([text.numel()], device=device)).tolist()
        padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
        padded[0, : text.numel()] = text
        texts = gather(padded.to(device)).cpu()
        rows = [bytes(row[:length].tolist()).decode() for row, length in zip(texts, lengths, strict=True)]
        layout = sorted({entry for row in rows for entry in json.loads(row)})
        if not layout:
            return MetricSums()
        return MetricSums.from_tensors(layout, gather(self.as_tensor(layout)[None].to(device)).cpu())

    def means(self) -> dict[str, float]:
        """Every metric as a number, sorted by name; NaN where nothing counted. Reads the device once."""
        names = sorted(self._cells)
        table = _to_cpu([self._cells[name][1] for name in names]).tolist()
        values = {}
        for name, (value, count) in zip(names, table, strict=True):
            if count == 0:
                values[name] = math.nan
            else:
                values[name] = value / count if self._cells[name][0] == "mean" else value
        return values


def _plain(name: str, values: Tensor | float | bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    tensor = values.detach() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    if mask is not None:
        _check.bool_mask(mask, tensor, name=f"the mask of {name!r}", like_name=f"metric {name!r}")
    if tensor.device.type == "mps":  # has no float64
        tensor, mask = tensor.cpu(), None if mask is None else mask.cpu()
    return tensor.double(), torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask


def _extreme(values: Tensor, counted: Tensor, pick: Callable[[Tensor], Tensor], empty: float) -> Tensor:
    value = pick(values) if values.numel() else values.new_tensor(empty)
    return torch.stack([value, counted.sum().double()])


def _joined(kind: str, cells: Tensor) -> Tensor:
    """Merge ``[W, 2]`` cells of one metric."""
    values, counts = cells[:, 0], cells[:, 1]
    value = values.sum() if kind == "mean" else values.amin() if kind == "min" else values.amax()
    return torch.stack([value, counts.sum()])


def _to_cpu(rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.zeros(0, 2, dtype=torch.float64)
    if len({row.device for row in rows}) > 1:
        rows = [row.cpu() for row in rows]
    return torch.stack(list(rows)).cpu()
