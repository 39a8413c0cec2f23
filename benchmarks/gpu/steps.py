"""Whole optimizer steps on a GPU: rlft's trainer, and TRL's on the same model, rows and settings where it is installed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import workload
from benchmarks.gpu.measure import Case, Recorder, Row, Skipped, need
from benchmarks.gpu.phases import build

__all__ = ["run"]

LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}


def tokenizer(vocab: int) -> Any:
    """Every word ``t17`` is one token, so lengths are exact."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*workload.SPECIALS, *(f"t{i}" for i in range(len(workload.SPECIALS), vocab))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


class Clock:
    """Called at each step: times between calls, the first steps left out; stops the run after enough of them."""

    def __init__(self, recorder: Recorder, row: Row, steps: int) -> None:
        self.recorder, self.row, self.left, self.warm = recorder, row, steps, 2
        self.base, self.last = 0, 0.0

    def __call__(self) -> None:
        self.recorder.wait()
        now = time.perf_counter()
        if self.warm > 0:
            self.warm -= 1
            if self.warm == 0:
                self.base = self.recorder.reset_peak()
                now = time.perf_counter()
        else:
            self.row.ms.append(1000 * (now - self.last))
            self.left -= 1
        self.last = now

    def finish(self, tokens: float | None = None) -> None:
        self.row.peak_mib = (self.recorder.peak() - self.base) / 2**20
        if tokens:
            self.row.facts["tokens"] = tokens


def run(recorder: Recorder) -> None:
    """A DPO step and a GRPO step with LoRA."""
    quick = recorder.quick
    steps = 2 if quick else 6
    vocab = 512 if quick else 151_936
    pairs = {
        "pairs": 2 if quick else 8,
        "prompt": 16 if quick else 256,
        "lengths": [8, 4] if quick else [256, 192, 128, 64],
    }
    groups = {"prompts": 2, "group": 4, "prompt": 16, "answer": 6} if quick else {
        "prompts": 8, "group": 8, "prompt": 512, "answer": 128}  # fmt: skip
    note = "Wall time between steps; the first two are left out."
    with recorder.section("DPO step"):
        case = recorder.case("DPO step, LoRA", "one optimizer step on preference pairs", pairs, note=note)
        rows = workload.pairs(pairs["pairs"], prompt_length=pairs["prompt"], lengths=pairs["lengths"], vocab=vocab)
        for name, work in (("rlft dpo", _rlft_dpo), ("TRL DPOTrainer", _trl_dpo)):
            _variant(recorder, case, name, steps, partial(work, recorder, pairs, rows, steps))
    with recorder.section("GRPO step"):
        what = "sample, score and one optimizer step; KL to the reference in the loss"
        case = recorder.case("GRPO step, LoRA", what, groups, note=note)
        prompts = workload.prompts(groups["prompts"] * 16, length=groups["prompt"], vocab=vocab)
        for name, sampler in (("rlft grpo", "auto"), ("rlft grpo, transformers generate", "transformers")):
            _variant(recorder, case, name, steps, partial(_rlft_grpo, recorder, groups, prompts, steps, sampler))
        _variant(recorder, case, "TRL GRPOTrainer", steps, partial(_trl_grpo, recorder, groups, prompts, steps))


def _variant(recorder: Recorder, case: Case, name: str, steps: int, work: Callable[[Clock], None]) -> None:
    row = Row(name)
    case.rows.append(row)
    try:
        work(Clock(recorder, row, steps))
        if not row.ms:
            row.skipped = "failed: no step was timed"
    except Skipped as error:
        row.skipped = str(error)
    except torch.OutOfMemoryError:
        row.skipped = "out of memory"
    except Exception as error:  # one trainer's failure is a line of the table
        row.skipped = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    recorder.finish(case, row)


# -- rlft -------------------------------------------------------------------------------------------------------------
def _rlft(recorder: Recorder, clock: Clock, settings: dict[str, Any], steps: int, **arguments: Any) -> None:
    from rlft import Trainer

    model = build(recorder)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            {
                "max_steps": steps + 2,
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant",
                "use_peft": True,
                "mixed_precision": "bf16" if recorder.device.type == "cuda" else "no",
                "report_to": [],
                "disable_tqdm": True,
                "output_dir": output,
                **settings,
            },
            processing_class=tokenizer(model.config.vocab_size),
            callbacks=[lambda event, _, values: clock() if event == "step" else None],
            **arguments,
        )
        trainer.train()
    clock.finish()


def _rlft_dpo(recorder: Recorder, shape: dict[str, Any], rows: Any, steps: int, clock: Clock) -> None:
    settings = {
        "objective": "dpo",
        "beta": 0.1,
        "per_device_train_batch_size": shape["pairs"],
        "max_prompt_length": shape["prompt"],
        "max_completion_length": max(shape["lengths"]),
    }
    _rlft(recorder, clock, settings, steps, train_dataset=rows)


def _rlft_grpo(recorder: Recorder, shape: dict[str, Any], rows: Any, steps: int, sampler: str, clock: Clock) -> None:
    settings = {
        "objective": "grpo",
        "beta": 0.04,
        "num_generations": shape["group"],
        "per_device_train_batch_size": shape["prompts"] * shape["group"],
        "max_prompt_length": shape["prompt"],
        "max_completion_length": shape["answer"],
        "sampler": sampler,
    }
    _rlft(recorder, clock, settings, steps, train_dataset=rows, reward_funcs=[workload.even_tokens])


# -- TRL --------------------------------------------------------------------------------------------------------------
def _trl(
    recorder: Recorder, clock: Clock, kind: str, settings: dict[str, Any], steps: int, rows: Any, **more: Any
) -> None:
    trl, datasets = need("trl"), need("datasets")
    from peft import LoraConfig
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock()

    model = build(recorder)
    on_gpu = recorder.device.type == "cuda"
    with tempfile.TemporaryDirectory() as output:
        config = getattr(trl, f"{kind}Config")(
            output_dir=output, max_steps=steps + 2, learning_rate=1e-5, lr_scheduler_type="constant", optim="adamw_torch",
            gradient_checkpointing=False, bf16=on_gpu, use_cpu=not on_gpu, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, gradient_accumulation_steps=1, **settings,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(model.config.vocab_size),
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
            callbacks=[Turns()],
            **more,
        )
        trainer.train()
    clock.finish()


def _trl_dpo(recorder: Recorder, shape: dict[str, Any], rows: Any, steps: int, clock: Clock) -> None:
    settings = {
        "beta": 0.1,
        "per_device_train_batch_size": shape["pairs"],
        "max_length": shape["prompt"] + max(shape["lengths"]),
    }
    _trl(recorder, clock, "DPO", settings, steps, rows)


def _trl_grpo(recorder: Recorder, shape: dict[str, Any], rows: Any, steps: int, clock: Clock) -> None:
    settings = {
        "loss_type": "grpo",
        "beta": 0.04,
        "num_generations": shape["group"],
        "per_device_train_batch_size": shape["prompts"] * shape["group"],
        "max_completion_length": shape["answer"],
        "temperature": 1.0,
    }
    _trl(recorder, clock, "GRPO", settings, steps, rows, reward_funcs=workload.even_tokens)
