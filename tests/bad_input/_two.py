"""Run by test_two_processes.py, once per rank: every bad input that can meet a run, one after the other.

Each case runs under a watchdog that ends the process with a stack dump, and in a process group of its own that is left as the end
of a process leaves it. What each rank met is written down line by line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from rlft import Trainer
from rlft.runlock import RunLock
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, RANKED, trainer, varied
from tests.tiny import char_tokenizer, tiny_llama

#: Seconds a case may take before its process is ended.
PATIENCE = 60
NAN = math.nan
CHAT = [
    {"prompt": [{"role": "user", "content": f"{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
    for i in range(8)
]
THUMBS = [{"prompt": f"{i}=", "completion": "ab"[i % 2], "label": i % 2 == 0} for i in range(8)]

Run = Callable[[Path, bool], Any]
#: name (row of the table, what, whose) -> how it must end, and the run; its second argument: is this rank the bad one.
CASES: dict[str, tuple[str, Run]] = {}


def case(name: str, end: str, objective: str, rows: Any, **extra: Any) -> None:
    """The same bad input on every rank."""
    CASES[name] = (end, lambda folder, bad: _go(trainer(folder, objective, rows, **_fresh(extra))))


def _fresh(extra: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value() if key in ("model", "ref_model", "processing_class") and callable(value) else value
        for key, value in extra.items()
    }


def _go(t: Trainer) -> None:
    t.train()


class Reward:
    """Good, but on bad ranks wrong from the second call on."""

    __name__ = "sometimes"

    def __init__(self, wrong: Callable[[list[float]], Any], bad: bool) -> None:
        self.wrong, self.bad, self.calls = wrong, bad, 0

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        self.calls += 1
        good = varied(completions, completion_ids)
        return self.wrong(good) if self.bad and self.calls > 1 else good


def reward(number: str, end: str, wrong: Callable[[list[float]], Any], **extra: Any) -> None:
    """A reward that goes wrong on both ranks, on the first alone, on the second alone."""
    for whose in ("both", "first", "second"):

        def run(folder: Path, bad: bool, whose: str = whose) -> None:
            settings = {"beta": 0.0, "max_steps": 3, "save_steps": 1, **extra}
            _go(
                trainer(
                    folder,
                    "rloo",
                    PROMPTS,
                    reward=Reward(wrong, whose == "both" or bad == (whose == "second")),
                    **settings,
                )
            )

        CASES[f"{number} {whose}"] = (end, run)


def forward(number: str, end: str, spoil: Callable[[Trainer], None], **extra: Any) -> None:
    """A run in which something breaks at step 2, on both ranks or on one."""
    for whose in ("both", "first", "second"):

        def run(folder: Path, bad: bool, whose: str = whose) -> None:
            t = trainer(folder, "sft", ANSWERS * 4, max_steps=3, save_steps=1, **extra)
            if whose == "both" or bad == (whose == "second"):
                spoil(t)
            _go(t)

        CASES[f"{number} {whose}"] = (end, run)


def _raise(error: BaseException) -> Any:
    raise error


def _out_of_memory(t: Trainer) -> None:
    compute = t.compute_loss
    t.compute_loss = lambda *a: _raise(torch.OutOfMemoryError("CUDA out of memory.")) if t.step == 1 else compute(*a)  # type: ignore[method-assign]


def _not_finite(t: Trainer) -> None:
    compute = t.compute_loss
    t.compute_loss = lambda *a: compute(*a) * (NAN if t.step == 1 else 1.0)  # type: ignore[method-assign]


def _minus_infinity(t: Trainer) -> None:
    compute = t.forward

    def broken(*a: Any) -> Any:
        outputs = compute(*a)
        return {**outputs, "logps": outputs["logps"] - math.inf} if t.step == 1 else outputs

    t.forward = broken  # type: ignore[method-assign]


def _wrong_shape(t: Trainer) -> None:
    compute = t.forward

    def broken(*a: Any) -> Any:
        outputs = compute(*a)
        return {**outputs, "logps": outputs["logps"][:, :-1]} if t.step == 1 else outputs

    t.forward = broken  # type: ignore[method-assign]


def _interrupt_in_step(t: Trainer) -> None:
    compute = t.compute_loss
    t.compute_loss = lambda *a: _raise(KeyError("a bug")) if t.step == 1 else compute(*a)  # type: ignore[method-assign]


def again(number: str, end: str, **changes: Any) -> None:
    """A second run in the folder of a first."""

    def run(folder: Path, bad: bool) -> None:
        _go(trainer(folder, "rloo", RANKED, beta=0.1, save_steps=1))
        _go(trainer(folder, "rloo", changes.pop("rows", RANKED), **{"beta": 0.1, "save_steps": 1, **changes}))

    CASES[number] = (end, run)


def _damaged(folder: Path, bad: bool) -> None:
    t = trainer(folder, "rloo", RANKED, beta=0.1, save_steps=1)
    _go(t)
    t.accelerator.wait_for_everyone()
    if t.is_main:
        (folder / "run" / "checkpoint-2" / "trainable.safetensors").write_bytes(b"")
    t.accelerator.wait_for_everyone()
    _go(trainer(folder, "rloo", RANKED, beta=0.1, save_steps=1))


def _file(text: str) -> Run:
    def run(folder: Path, bad: bool) -> None:
        path = folder / f"rows{int(bad)}.jsonl"
        path.write_text(text)
        _go(trainer(folder, "sft", str(path)))

    return run


def evaluation(name: str, rows: Any, count: int, **extra: Any) -> None:
    """Processes have unequal numbers of batches to evaluate, or none."""

    def run(folder: Path, bad: bool) -> None:
        more = {"eval_dataset": rows[:count], "eval_steps": 1, "per_device_eval_batch_size": 2, **extra}
        _go(trainer(folder, more.pop("objective"), rows, **more))

    CASES[f"20 evaluation of {count}, {name}"] = ("trains", run)


def _pad_is_eos() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _same_object(folder: Path, bad: bool) -> None:
    model = tiny_llama()
    _go(trainer(folder, "dpo", PAIRS, beta=0.1, model=model, ref_model=model))


def _file_in_the_way(folder: Path, bad: bool) -> None:
    (folder / f"file{int(bad)}").write_text("in the way")
    _go(trainer(folder, "sft", ANSWERS, output_dir=str(folder / f"file{int(bad)}" / "run")))


def _two_runs(folder: Path, bad: bool) -> None:
    t = trainer(folder, "sft", ANSWERS)
    with contextlib.ExitStack() as stack:
        if not bad:
            stack.enter_context(RunLock(folder / "run"))
        _go(t)


# -- rows of data
case("01 column missing", "refused", "dpo", [{"prompt": "1", "chosen": "2"}] * 8, beta=0.1, data_format="preference")
case("02 column misspelt", "refused", "dpo", [{"prompt": "1", "choosen": "2", "rejected": "3"}] * 8, beta=0.1)
case("03 no rows", "refused", "sft", [])
case("04 all rows filtered out", "refused", "sft", [{"prompt": "", "completion": "a"}] * 8, max_bad_fraction=1.0)
case("05 empty prompt", "refused", "sft", [*ANSWERS, {"prompt": "", "completion": "a"}])
case("05 empty prompt skipped", "trains", "sft", [*ANSWERS, {"prompt": "", "completion": "a"}], max_bad_fraction=0.5)
case("06 empty completion", "trains", "sft", [*ANSWERS, {"prompt": "1", "completion": ""}], max_bad_fraction=0.5)
case("07 cell without text", "trains", "sft", [*ANSWERS, {"prompt": "1", "completion": None}], max_bad_fraction=0.5)
case(
    "08 chosen equals rejected",
    "trains",
    "dpo",
    [*PAIRS, {"prompt": "1", "chosen": "a", "rejected": "a"}],
    beta=0.1,
    max_bad_fraction=0.5,
)
case("10 prompt too long", "trains", "sft", [*ANSWERS, {"prompt": "1" * 99, "completion": "a"}], max_bad_fraction=0.5)
case("11 completion cut", "trains", "sft", [{"prompt": "1", "completion": "a" * 99}] * 8)
case("13 lone surrogate", "trains", "sft", [*ANSWERS, {"prompt": "1", "completion": "\ud800"}], max_bad_fraction=0.5)
case("14 unknown role", "refused", "sft", [{"prompt": [{"role": "wizard", "content": "1"}], "completion": "a"}] * 8,
     processing_class=lambda: char_tokenizer(chat_template=True))  # fmt: skip
case("15 ends with the user", "refused", "sft", [{"messages": [{"role": "user", "content": "1"}]}] * 8,
     processing_class=lambda: char_tokenizer(chat_template=True))  # fmt: skip
case("16 rows repeated", "trains", "sft", [ANSWERS[0]] * 8)
CASES["17 broken line"] = ("refused", _file('{"prompt": "1", "completion": "a"}\n{"prompt": \n'))
case("18 overlap", "trains", "sft", ANSWERS, eval_dataset=ANSWERS[:3], eval_steps=1)
case("19 fewer rows than a step", "refused", "sft", ANSWERS[:3])
case("20 last batch uneven", "trains", "sft", [*ANSWERS, *ANSWERS[:3]], max_steps=None, num_train_epochs=1.0)
for count in (1, 3, 5):
    evaluation("pairs", PAIRS, count, objective="dpo", beta=0.1)
    evaluation("thumbs", THUMBS, count, objective="kto", beta=0.1)
    evaluation("prompts", PROMPTS, count, objective="rloo", beta=0.0, reward=varied)
# -- models
case("21 no pad token", "trains", "sft", ANSWERS, processing_class=lambda: char_tokenizer(pad=False))
case("23 no eos token", "refused", "sft", ANSWERS, processing_class=lambda: char_tokenizer(eos=False))
case("24 no chat template", "refused", "sft", CHAT)
case("27 embedding too small", "refused", "sft", ANSWERS, model=lambda: tiny_llama(vocab_size=90))
case("28 reference of another vocabulary", "refused", "dpo", PAIRS, beta=0.1,
     ref_model=lambda: tiny_llama(vocab_size=120).requires_grad_(False))  # fmt: skip
case("30 reference trains", "refused", "dpo", PAIRS, beta=0.1, ref_model=lambda: tiny_llama(seed=1))
case("57 fp16 on a CPU", "refused", "sft", ANSWERS, mixed_precision="fp16")
case("58 weights in half precision", "refused", "sft", ANSWERS, model=lambda: tiny_llama(dtype=torch.bfloat16))
case("60 nothing trains", "refused", "sft", ANSWERS, model=lambda: tiny_llama().requires_grad_(False))
case("63 rank 0", "refused", "sft", ANSWERS, use_peft=True, lora_r=0)
case("22 pad is eos", "trains", "sft", ANSWERS, processing_class=_pad_is_eos)
CASES["29 reference is the policy"] = ("refused", _same_object)
case("59 LoRA on nothing", "refused", "sft", ANSWERS, use_peft=True, lora_target_modules=["c_attn"])
# -- rewards
reward("34 NaN", "refused", lambda good: [NAN, *good[1:]])
reward("35 None", "trains", lambda good: [None, *good[1:]])
reward("36 all None", "trains", lambda good: [None] * len(good))
reward("37 bool", "trains", lambda good: [bool(r % 2) for r in good])
reward("38 text", "refused", lambda good: ["1.0"] * len(good))
reward("39 too few", "refused", lambda good: good[:-1])
reward("40 raises", "refused", lambda good: _raise(KeyError("x")))
reward("41 hangs", "refused", lambda good: time.sleep(20), reward_timeout=0.3)
reward("42 huge", "either", lambda good: [1e30, *good[1:]])
reward("43 equal", "trains", lambda good: [0.5] * len(good))
case("45 group of one", "refused", "rloo", PROMPTS, reward=varied, beta=0.1, num_generations=1)
case("46 groups do not fit", "refused", "grpo", PROMPTS, reward=varied, per_device_train_batch_size=6)
# -- settings
case("47 beta", "refused", "dpo", PAIRS, beta=-0.1)
case("48 beta 0", "refused", "dpo", PAIRS, beta=0.0)
case("49 clip", "refused", "grpo", PROMPTS, reward=varied, epsilon=0.0)
case("50 temperature", "refused", "grpo", PROMPTS, reward=varied, temperature=0.0)
case("51 objective", "refused", "gppo", PAIRS)
case("52 idle option", "refused", "dpo", PAIRS, beta=0.1, epsilon=0.3)
case("53 misspelt key", "refused", "sft", ANSWERS, learning_rat=0.1)
case("54 wrong type", "refused", "sft", ANSWERS, use_peft="yes")
case("55 warm-up", "refused", "sft", ANSWERS, warmup_steps=3)
case("56 accumulation 0", "refused", "sft", ANSWERS, gradient_accumulation_steps=0)
# -- in a step
forward("67 wrong shape", "refused", _wrong_shape)
forward("69 -inf", "refused", _minus_infinity)
forward("69 NaN in the loss", "refused", _not_finite)
forward("84 out of memory", "refused", _out_of_memory)
forward("84 another error", "refused", _interrupt_in_step)
# -- folders
again("75 folder of another run", "refused", resume="never")
again("80 other settings", "refused", beta=0.2)
again("80 other data", "refused", rows=RANKED[::-1])
again("82 complete", "trains")
CASES["76 a file in the way"] = ("refused", _file_in_the_way)
CASES["77 two runs in one folder"] = ("refused", _two_runs)
CASES["78 newest checkpoint damaged"] = ("trains", _damaged)


def part() -> None:
    """Leave the others as the end of a process does: connections are closed, and who waits for this one hears of it."""
    gc.collect()  # a wrapper of the model holds the connections too
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


def main(folder: Path) -> None:
    rank, ports = int(os.environ["RANK"]), json.loads((folder / "ports.json").read_text())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with (folder / f"said{rank}.jsonl").open("w") as out:
        for number, (name, (_, run)) in enumerate(CASES.items()):
            place = folder / f"case{number}"
            place.mkdir(exist_ok=True)
            os.environ["MASTER_PORT"] = str(ports[number])
            print(f"== {name}", flush=True)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            started, said = time.monotonic(), ""
            try:
                run(place, rank == 1)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            part()
            faulthandler.cancel_dump_traceback_later()
            out.write(json.dumps({"name": name, "said": said, "seconds": time.monotonic() - started}) + "\n")
            out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
