"""Bad input 64-74 and 84 on two processes: masks, shapes and values, in a run and in a loop of one's own around a pure loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlft import Trainer
from rlft.run.processes import launch
from rlft.types import Batch
from tests.bad_input._two_case import BOTH, EACH, NAN, ONE, Hold, add, fails
from tests.bad_input.common import ANSWERS, RANKED, trainer
from tests.bad_input.test_rows_of_tensors import LOSSES, masked_run, tensors

Spoil = Callable[[Trainer], None]


# -- in a run ---------------------------------------------------------------------------------------------------------
def step(
    row: int, what: str, end: str, spoil: Spoil, *words: str, told: bool = False, whose: Any = EACH, **rest: Any
) -> None:
    """A run in which something breaks at step 2, on both processes or on one."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        settings = {"objective": "sft", "rows": ANSWERS * 4, **rest}
        hold.trainer = t = trainer(
            folder, settings.pop("objective"), settings.pop("rows"), max_steps=3, save_steps=1, **settings
        )
        if met:
            spoil(t)
        t.train()
        hold.value = digest(t)

    add(row, what, end, run, whose=whose, words=words, told=told, at=1 if end == "refused" else 3)


def digest(t: Trainer) -> str:
    """Of the trained weights, bit for bit."""
    parts = [p.detach().numpy().tobytes() for _, p in sorted(t.policy.named_parameters()) if p.requires_grad]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def outputs(change: Callable[[dict[str, Tensor], Batch], dict[str, Tensor]]) -> Spoil:
    """The model's outputs are changed in the second step."""

    def spoil(t: Trainer) -> None:
        forward = t.forward

        def broken(batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
            made = forward(batch, want)
            return {**made, **change(made, batch)} if t.step == 1 else made

        t.forward = broken  # type: ignore[method-assign]

    return spoil


def batches(change: Callable[[Batch], Batch]) -> Spoil:
    """Batches are changed in the second step, before anything is computed from them."""

    def spoil(t: Trainer) -> None:
        prepare = t.prepare
        t.prepare = lambda batch: change(prepare(batch)) if t.step == 1 else prepare(batch)  # type: ignore[method-assign]

    return spoil


def loss(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(t: Trainer) -> None:
        compute = t.compute_loss
        t.compute_loss = lambda *a: change(compute(*a)) if t.step == 1 else compute(*a)  # type: ignore[method-assign]

    return spoil


def with_nan_in_masked_slots(made: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    return {"logps": made["logps"].masked_fill(~batch.mask, NAN)}


STOPPED = ("step 2", "was not applied", "weights are those of step 1")
step(
    66,
    "mask of numbers",
    "refused",
    batches(lambda b: b.replace(mask=b.mask.float())),
    "step 2",
    "mask must be a bool tensor",
    "mask.bool()",
)
step(67, "wrong shape", "refused", outputs(lambda made, b: {"logps": made["logps"][:, :-1]}), "mask must have the shape of logps",
     "reshape", *STOPPED)  # fmt: skip
step(68, "shape that would broadcast", "refused", outputs(lambda made, b: {"logps": made["logps"][:, :1]}),
     "mask must have the shape of logps, [4, 1]", "never broadcast", *STOPPED)  # fmt: skip
step(
    69,
    "-inf",
    "refused",
    outputs(lambda made, b: {"logps": made["logps"] - math.inf}),
    *STOPPED,
    "log-probs must be finite",
    told=True,
)
step(69, "NaN in the loss", "refused", loss(lambda value: value * NAN), *STOPPED, "Lower learning_rate", told=True)
step(70, "NaN that is masked", "trains", outputs(with_nan_in_masked_slots))
step(70, "nothing wrong", "trains", lambda t: None, whose=BOTH)
step(71, "positive log-prob", "refused", outputs(lambda made, b: {"logps": made["logps"] + 99.0}), "logps holds", "cannot be positive",
     "log-softmax outputs, not logits", *STOPPED)  # fmt: skip
step(72, "integer log-probs", "refused", outputs(lambda made, b: {"logps": made["logps"].long()}), "logps must be floating point",
     "torch.int64", "logps.float()", *STOPPED)  # fmt: skip
REFERENCE = {"objective": "rloo", "rows": RANKED * 4, "beta": 0.1}
step(73, "constant that requires grad", "refused",
     batches(lambda b: b.replace(ref_logps=torch.zeros(b.mask.shape, requires_grad=True))),
     "ref_logps requires grad", "pass ref_logps.detach()", **REFERENCE)  # fmt: skip
step(74, "group ids of no integers", "refused", batches(lambda b: b.replace(group_ids=b.group_ids.float())),
     "group_ids must be integers", "torch.float32", **REFERENCE)  # fmt: skip
step(84, "out of memory", "refused", loss(lambda value: fails(torch.OutOfMemoryError("CUDA out of memory."))), "step 2: out of memory",
     "per_device_train_batch_size=4", "raise gradient_accumulation_steps", "newest checkpoint is intact")  # fmt: skip
step(0, "another error", "refused", loss(lambda value: fails(KeyError("a bug"))), "a bug")


def unfinished(row: int, what: str, end: str, finished: Callable[[int], bool], *words: str, **rest: Any) -> None:
    """Answers without an end are masked; those of the process that meets it end as ``finished`` says."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        hold.trainer = masked_run(folder, finished if met else lambda i: True)
        hold.trainer.train()

    add(row, what, end, run, words=words, **rest)


unfinished(64, "answer without a token", "trains", lambda i: i != 3, whose=EACH, at=3,
           warns=("step 1", "have no token to train on", "contribute 0", "max_completion_length=6"))  # fmt: skip
unfinished(
    65,
    "no token at all",
    "refused",
    lambda i: False,
    "step 1",
    "every answer was masked",
    "Raise max_completion_length (now 6)",
)
unfinished(65, "no token here", "trains", lambda i: False, whose=("first", "second"), at=3)


# -- a loop of one's own around a pure loss ---------------------------------------------------------------------------
def own_loop(row: int, what: str, end: str, name: str, spoil: Callable[[dict[str, Tensor]], Any], *words: str) -> None:
    """Both processes call the loss in an initialised group and add their gradients up, as a training loop does."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        launch.meet()
        x = tensors()
        if met:
            spoil(x)
        (gradient,) = torch.autograd.grad(LOSSES[name](x).mean(), x["logps"])
        hold.value = gradient.norm().item()
        dist.all_reduce(gradient)
        assert bool(torch.isfinite(gradient).all())

    add(row, f"{what} in {name}", end, run, whose=ONE, words=words, told=False)


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Replace one tensor by a changed copy that is a leaf like it."""

    def spoil(x: dict[str, Tensor]) -> None:
        made = change(x[key].detach().clone())
        x[key] = made.requires_grad_(x[key].requires_grad and made.is_floating_point())

    return spoil


def at(place: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return change


def masked_nan(x: dict[str, Tensor]) -> None:
    x["mask"][0, 2] = False
    put("logps", at((0, 2), NAN))(x)
    put("ref_logps", at((0, 2), math.inf))(x)


def other_order(x: dict[str, Tensor]) -> None:
    """Rows of a group apart from each other; their gradient, added up, is the same."""
    order = torch.tensor([1, 0, 3, 2])
    for key in x:
        put(key, lambda t: t[order])(x)


own_loop(64, "row without a token", "trains", "agro_off_policy", put("mask", at(3, False)))
own_loop(65, "batch without a token", "trains", "grpo", put("mask", torch.zeros_like))
own_loop(
    66, "mask of numbers", "refused", "sft", put("mask", Tensor.float), "mask must be a bool tensor", "mask.bool()"
)
own_loop(
    67,
    "wrong shape",
    "refused",
    "grpo",
    put("old_logps", lambda t: t[:, :2]),
    "old_logps must have the shape of logps, [4, 3], got [4, 2]",
)
own_loop(
    67,
    "wrong device",
    "refused",
    "rloo",
    put("ref_logps", lambda t: t.to("meta")),
    "ref_logps is on meta",
    "move them to one device",
)
own_loop(
    68,
    "shape that would broadcast",
    "refused",
    "rloo",
    put("rewards", lambda t: t[:, None]),
    "rewards",
    "[4, 1]",
    "[4]",
)
own_loop(
    69,
    "-inf",
    "refused",
    "ppo_clip",
    put("logps", at((1, 2), -math.inf)),
    "logps holds -inf at [1, 2]",
    "check the model's output",
)
own_loop(70, "NaN that is masked", "trains", "rloo", masked_nan)
own_loop(
    71,
    "positive log-prob",
    "refused",
    "sft",
    put("logps", at((2, 0), 1.0)),
    "logps holds",
    "at [2, 0]",
    "cannot be positive",
)
own_loop(
    72,
    "integer log-probs",
    "refused",
    "sft",
    put("logps", Tensor.long),
    "logps must be floating point",
    "logps.float()",
)
own_loop(73, "constant that requires grad", "trains", "grpo", lambda x: x["old_logps"].requires_grad_())
own_loop(74, "rows in another order", "trains", "agro_off_policy", other_order)
