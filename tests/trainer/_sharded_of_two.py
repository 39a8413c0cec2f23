"""Run by tests/trainer/test_sharded_of_two.py, once per process of two: weights spread over both (FSDP2), and not.

accelerate leaves FSDP out on CPUs; here it is told that it has it, after which everything is what a GPU would get: its own
``fully_shard`` of the policy, its exchange of the optimizer's parameters, DTensors over gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from rlft import Trainer, checkpoint
from rlft.errors import Interrupted
from rlft.run.setup import build
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(16)]
HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "0", "rejected": "1"} for i in range(4)]
#: The step after which a run is stopped; evaluations fall on saved steps.
STOP, STEPS = 3, 6
_COMMON = {
    "beta": 0.1, "max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "max_prompt_length": 8, "max_completion_length": 4, "eval_steps": 2, "save_steps": 2, "save_total_limit": None, "disable_tqdm": True,
    "report_to": [], "dtype": "float64", "max_grad_norm": 0.5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {**_COMMON, "objective": "dpo"},
    "lora": {**_COMMON, "objective": "dpo", "use_peft": True, "lora_r": 2, "lora_alpha": 4},
    "reward_model": {**_COMMON, "objective": "bradley_terry", "beta": None},
}


def shard(on: bool) -> None:
    """What ``accelerate launch`` with configs/accelerate/fsdp.yaml sets."""
    kind = DistributedType.FSDP if on else DistributedType.MULTI_CPU
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = kind
    AcceleratorState._shared_state["fsdp_plugin"] = (
        FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        if on
        else None
    )  # fmt: skip


@contextlib.contextmanager
def sharded(on: bool) -> Any:
    """The accelerator of the next Trainer spreads weights, or not."""
    real = build.accelerator_for

    def accelerator_for(config: Any) -> Any:
        accelerator = real(config)
        shard(on)
        return accelerator

    build.accelerator_for = accelerator_for
    try:
        yield
    finally:
        build.accelerator_for = real


def run(folder: Path, kind: str, *, on: bool, stop: bool = False) -> Trainer:
    """Train to the end, or to the signal after step 3."""

    def signalled(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    model: Any = tiny_llama(dtype=torch.float64, tie_word_embeddings=kind == "lora")
    if kind == "reward_model":
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        model.config.num_labels = 1
        model.config.pad_token_id = 0
        scorer: Any = LlamaForSequenceClassification(model.config)
        model = scorer.to(torch.float64)
    with sharded(on):
        t = Trainer(
            model, {**KINDS[kind], "output_dir": str(folder / kind)}, train_dataset=PAIRS, eval_dataset=HELD_OUT,
            processing_class=char_tokenizer(), callbacks=[signalled] if stop else (),
        )  # fmt: skip
    with contextlib.suppress(Interrupted) if stop else contextlib.nullcontext():
        t.train()
    return t


def facts(t: Trainer) -> dict[str, Any]:
    """Which parameters are spread and which modules gather alone; a hash of what trains."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    weights = checkpoint.fingerprint(t.policy.trainable_state())
    own = [p for p in t.policy.parameters() if p.requires_grad]
    moments = [v for s in t.optimizer.state.values() for v in s.values() if v.ndim]
    return {
        "step": t.step, "weights": weights, "spread": all(isinstance(p, DTensor) for p in own),
        "moments_spread": bool(moments) and all(isinstance(m, DTensor) for m in moments),
        "alone": sum(isinstance(m, FSDPModule) for m in t.policy.modules()),
    }  # fmt: skip


def main(folder: Path) -> None:
    rank, said = int(os.environ["RANK"]), dict[str, Any]()
    torch.set_num_threads(1)
    for kind in KINDS:
        said[f"ddp {kind}"] = facts(run(folder / "ddp", kind, on=False))
        said[f"whole {kind}"] = facts(run(folder / "whole", kind, on=True))
        said[f"cut {kind}"] = facts(run(folder / "cut", kind, on=True, stop=True))
        torch.manual_seed(123)
        said[f"resumed {kind}"] = facts(run(folder / "cut", kind, on=True))
    # the same file continues either way
    run(folder / "to_ddp", "dpo", on=True, stop=True)
    said["to_ddp"] = facts(run(folder / "to_ddp", "dpo", on=False))
    run(folder / "from_ddp", "dpo", on=False, stop=True)
    said["from_ddp"] = facts(run(folder / "from_ddp", "dpo", on=True))
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
