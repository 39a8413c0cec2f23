"""Small runs that between them carry over everything a checkpoint can hold; made by one version of rlft, continued by another.

As a script it makes them, with whatever rlft ``PYTHONPATH`` names::

    PYTHONPATH=<src> python -m tests.trainer.old_runs <src> <folder>

As a module it tells the test which runs there are and builds the same trainers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.tiny import char_tokenizer, tiny_llama

if TYPE_CHECKING:
    from torch import Tensor

    from rlft import Trainer

HERE = "tests.trainer.old_runs"

PROMPTS = [{"prompt": f"{i}+{i}="} for i in range(12)]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "0", "rejected": "1"} for i in range(4)]
LABELLED = [{"prompt": f"{i}+{i}=", "completion": str(2 * i + i % 2), "label": i % 2 == 0} for i in range(12)]
#: One answer of six tokens among short ones: an epoch is three steps, and one of them has it.
ANSWERS = [{"prompt": f"{i}=", "completion": "ab"[i % 2] * (6 if i == 5 else 1 + i % 3)} for i in range(12)]


# -- what settings name ---------------------------------------------------------------------------------------------------
def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that nearly always differs within a group."""
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that is often the same in a group of two."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def moody(completion_ids: list[list[int]], trainer_state: Any = None, **columns: Any) -> list[float | None]:
    """Equal rewards in the first two steps, none in the fourth to sixth."""
    if trainer_state.global_step < 2:
        return [1.0] * len(completion_ids)
    if 3 <= trainer_state.global_step < 6:
        return [None] * len(completion_ids)
    return list(varied(completion_ids))


def longer(completions: list[str], opponents: list[str], **columns: Any) -> list[float]:
    """A judge: the longer answer wins, with a probability that depends on both lengths."""
    return [1 / (1 + math.exp(len(b) - len(a))) for a, b in zip(completions, opponents, strict=True)]


def undefined_for_long_answers(logps: Tensor, mask: Tensor) -> Tensor:
    """Supervised training whose loss is not a number for a batch with an answer of six tokens."""
    return torch.where(mask.sum(-1).max() > 6, torch.full_like(logps, math.nan), -logps)


# -- the runs -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """A run, where it is stopped, and what its checkpoint must hold there for the stop to be a test of it.

    Attributes:
        settings: beside those of :data:`COMMON`; ``{folder}`` stands for the folder that all runs share.
        stops: steps after which it is stopped; each is continued by itself.
        rows: training rows, or the name of a file with them.
        tensors: files that the checkpoint must have beside weights and random state.
        record: values that its ``trainer.json`` must have.
        queued: steps of the present generation that must be waiting.
        half_logged: whether it must hold averages that are not yet in the log.
        reward_model: a scalar head in place of a language model's.
        held_out: evaluate on rows of its own.
        signal: a second run is stopped by SIGTERM while it scores the answers of its next step, and that one is continued;
            else the checkpoint is one of the run that was never stopped.
    """

    settings: dict[str, Any]
    stops: tuple[int, ...] = (3,)
    rows: list[dict[str, Any]] | str = field(default_factory=lambda: PROMPTS)
    tensors: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    queued: int = 0
    half_logged: bool = False
    reward_model: bool = False
    held_out: bool = False
    signal: bool = False


COMMON: dict[str, Any] = {
    "max_steps": 6, "learning_rate": 1e-2, "max_prompt_length": 8, "max_completion_length": 4, "per_device_train_batch_size": 4,
    "save_steps": 1, "save_total_limit": None, "self_checks": False, "disable_tqdm": True, "report_to": [],
}  # fmt: skip
SAMPLED: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 4}
ONLINE: dict[str, Any] = {**SAMPLED, "rewards": [f"{HERE}:varied"]}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
PROPORTIONAL: dict[str, Any] = {"type": "proportional", "target": 0.05, "horizon": 100.0}
STOPS: dict[str, Any] = {"stop_token_ids": list(range(40, 90, 5))}  # answers of many lengths
CRITIC: dict[str, Any] = {"critic": "{folder}/critic"}

_DPO = Run(
    {"objective": "dpo", "beta": 0.1, **LORA, "lora_dropout": 0.1, "disable_dropout": False, "lr_scheduler_type": "cosine",
     "warmup_steps": 4, "per_device_train_batch_size": 5, "logging_steps": 2, "eval_steps": 3, "weight_decay": 0.1},
    rows=PAIRS, held_out=True, half_logged=True, tensors=("optimizer",), record={"evaluated_at": 3},
)  # fmt: skip
_REPLAY = Run(
    {"objective": "agro_off_policy", "beta": 0.05, **ONLINE, **LORA, "replay_probability": 0.5, "sync_ref_model": True,
     "ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 2},
    rows=PROMPTS[:4], tensors=("replay", "reference"),
)  # fmt: skip

RUNS: dict[str, Run] = {
    # offline
    "dpo": _DPO,
    "dpo-begun-from-a-checkpoint": replace(_DPO, settings={**_DPO.settings, "resume": "{folder}/dpo/checkpoint-2"}),
    "dpo-moving-reference": Run(
        {"objective": "dpo", "beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 2},
        rows=PAIRS, tensors=("reference",),
    ),
    "dpo-token-budget": Run(
        {"objective": "dpo", "beta": 0.1, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 20,
         "precompute_ref_log_probs": True, "ref_cache_dir": "{folder}/ref-log-probs"},
        rows=PAIRS,
    ),
    "kto": Run({"objective": "kto", "beta": 0.1}, rows=LABELLED),
    "sft-streaming": Run(
        {"objective": "sft", "streaming": True, "shuffle_buffer": 4, "per_device_train_batch_size": 5}, rows="answers.jsonl"
    ),
    "sft-streaming-ahead": Run(
        {"objective": "sft", "streaming": True, "shuffle_buffer": 4, "per_device_train_batch_size": 5, "dataloader_num_workers": 1},
        rows="answers.jsonl",
    ),
    "sft-steps-left-out": Run(
        {"objective": f"{HERE}:undefined_for_long_answers", "max_nonfinite_steps": 2, "max_completion_length": 8},
        rows=ANSWERS, record={"nonfinite_steps": 1},
    ),
    "reward-model": Run({"objective": "bradley_terry"}, rows=PAIRS, reward_model=True),
    # online
    "grpo-inside-a-generation": Run(
        {"objective": "grpo", "beta": 0.04, **ONLINE, "steps_per_generation": 2, "num_iterations": 2, "self_checks": True},
        tensors=("source",), queued=1, record={"sampler_agrees": True, "rollouts": 1, "checked": True},
    ),
    "grpo-token-budget": Run(
        {"objective": "grpo", "beta": 0.04, **ONLINE, **STOPS, "gradient_accumulation_steps": 2, "num_iterations": 2, "top_p": 0.9,
         "max_tokens_per_micro_batch": 25, "logging_steps": 2},
        tensors=("source",), queued=1, half_logged=True,
    ),
    "grpo-without-a-lesson": Run(
        {"objective": "grpo", "beta": 0.04, **ONLINE, "rewards": [f"{HERE}:moody"], "self_checks": True, "max_steps": 7},
        stops=(1, 5), record={"equal_steps": {1: 1, 5: 0}, "unscored_steps": {1: 0, 5: 2}, "checked": {1: False, 5: True}},
    ),
    "dapo-refills": Run(
        {"objective": "dapo", **ONLINE, "rewards": [f"{HERE}:parity"], "num_generations": 2, "per_device_train_batch_size": 4,
         "dynamic_sampling": True},
    ),
    "agro-replay": _REPLAY,
    "agro-replay-signal": replace(_REPLAY, signal=True),
    "agro-policy-that-sampled": Run(
        {"objective": "agro_off_policy_rb", "beta": 0.1, **ONLINE, "num_iterations": 3}, tensors=("source", "behaviour"), stops=(2,),
        queued=1,
    ),
    "kl-in-the-loss": Run({"objective": "rloo", "beta": 0.05, **ONLINE, "kl_controller": PROPORTIONAL}),
    "kl-in-the-reward": Run(
        {"objective": "reinforce", "beta": 0.05, "objective_args": {"kl": "reward", "kl_value": "k1"}, **ONLINE,
         "num_iterations": 2, "kl_controller": PROPORTIONAL},
        tensors=("source",), queued=1,
    ),
    "kl-of-the-step": Run(
        {"objective": "ppo_penalty", "beta": 0.5, "objective_args": {"advantage": "leave_one_out"}, **ONLINE,
         "num_iterations": 3, "kl_controller": {"type": "halve_double", "target": 0.02}},
        tensors=("source",), queued=2, stops=(4,),
    ),
    "ppo-shared-critic": Run(
        {"objective": "ppo", **ONLINE, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
         "steps_per_generation": 4, "num_iterations": 2, "eval_steps": 2, "mask_truncated_completions": True, **STOPS},
        tensors=("source",), queued=1, held_out=True, record={"evaluated_at": 2},
    ),
    "ppo-own-critic": Run({"objective": "ppo", **ONLINE, **LORA, **CRITIC, "kl_controller": PROPORTIONAL}),
    "trpo-own-critic": Run(
        {"objective": "trpo", **ONLINE, **LORA, **CRITIC, "objective_args": {"advantage": "gae"}, "max_steps": 4},
        stops=(2,), tensors=("optimizer",),
    ),
    "nash-average-as-opponent": Run(
        {"objective": "nash_md_pg", "beta": 0.1, **SAMPLED, **STOPS, "judge": f"{HERE}:longer", "opponent_ema_decay": 0.7},
        tensors=("opponent",),
    ),
    "dpo-sampled-pairs": Run(
        {"objective": "dpo", "beta": 0.1, **ONLINE, **STOPS, "pair_selection": "all", "keep": "rejection", "keep_beta": 0.5,
         "steps_per_generation": 2, "num_iterations": 2},
        tensors=("source",), queued=1,
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write what the runs read: a stream's rows and a critic."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    tiny_llama(seed=5, hidden_size=16, num_hidden_layers=1).save_pretrained(folder / "critic")
    char_tokenizer().save_pretrained(folder / "critic")


def trainer(
    name: str, folder: Path, output: Path, *, kind: type[Trainer] | None = None, callbacks: Iterable[Any] = ()
) -> Trainer:
    """Build a run.

    Args:
        name: of the run.
        folder: where all runs lie, with what they read.
        output: folder of the run itself.
        kind: a subclass of Trainer.
        callbacks: as of Trainer.
    """
    from rlft import Trainer

    run = RUNS[name]
    settings = {key: _filled(value, folder) for key, value in {**COMMON, **run.settings}.items()}
    head: dict[str, Any] = {"head": "classifier", "num_labels": 1} if run.reward_model else {}
    return (kind or Trainer)(
        tiny_llama(hidden_size=16, num_hidden_layers=1, **head),
        {**settings, "output_dir": str(output)},
        train_dataset=str(folder / run.rows) if isinstance(run.rows, str) else run.rows,
        eval_dataset=HELD_OUT if run.held_out else None,
        processing_class=char_tokenizer(),
        callbacks=callbacks,
    )


def _filled(value: Any, folder: Path) -> Any:
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def stopped(name: str, stop: int, folder: Path) -> Path:
    """Where the run lies that was stopped after this step."""
    return folder / f"{name}-stopped-{stop}"


def _stop(name: str, stop: int, folder: Path) -> None:
    """Leave the folder that a run has which was stopped after this step."""
    from rlft import Trainer
    from rlft.errors import Interrupted

    whole, cut = folder / name, stopped(name, stop, folder)
    if not RUNS[name].signal:  # killed right after the save: the log may have gone on, and the next start must cut it
        shutil.copytree(whole, cut, ignore=lambda path, names: ["model"] if Path(path) == whole else [])
        for newer in range(stop + 1, 1 + max(int(path.name.partition("-")[2]) for path in cut.glob("checkpoint-*"))):
            shutil.rmtree(cut / f"checkpoint-{newer}")
        return

    class Cut(Trainer):
        def score(self, examples: Any, completions: Any, completion_ids: Any) -> Any:
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().score(examples, completions, completion_ids)

    try:
        trainer(name, folder, cut, kind=Cut).train()
    except Interrupted:
        return
    raise AssertionError(f"{name} was not stopped")


def main() -> None:
    """Make every run and its stopped copies."""
    import rlft

    source, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    assert Path(rlft.__file__).resolve().is_relative_to(source), f"{rlft.__file__} is not of {source}"
    prepare(folder)
    for name, run in RUNS.items():
        trainer(name, folder, folder / name).train()
        for stop in run.stops:
            _stop(name, stop, folder)


if __name__ == "__main__":
    main()
