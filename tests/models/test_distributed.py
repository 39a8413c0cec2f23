"""Two processes: replicated (DDP) and sharded (FSDP2) policies give the gradients of one process."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from tests.tiny import random_batch, tiny_llama

WANT = frozenset({"logps", "entropy", "token_kl", "ref_logps", "values"})


def build(lora: bool) -> Policy:
    model = tiny_llama(dtype=torch.float64)
    policy = Policy(add_lora(model, LoraSettings(r=2)) if lora else model, critic="shared")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "value_head" in name:
                p.fill_(0.05)
    return policy


def loss(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return (0.7 * out["logps"] + out["token_kl"] + out["values"]).sum()


def work(rank: int, kind: str, lora: bool, folder: str) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    policy, data = build(lora), random_batch(groups=4)
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    out = policy(data, want=WANT)
    truth = dict(zip(trainable, torch.autograd.grad(loss(out), list(trainable.values())), strict=True))
    rows = torch.arange(4) + 4 * rank
    mine = data.select(rows)
    width = mine.completion_ids.shape[1]
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
    else:
        from torch.distributed.fsdp import fully_shard

        for model in (policy._scorer.base, policy.reference_model):
            for layer in model.model.layers if model is not None else ():
                fully_shard(layer)
        wrapped = fully_shard(policy)
    got = wrapped(mine, want=WANT)
    for name, value in got.items():
        torch.testing.assert_close(value, out[name][rows, :width], rtol=1e-10, atol=1e-10)
    (loss(got) * 2).backward()  # both wrappers average over processes
    for name, p in policy.named_parameters():
        if p.requires_grad:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, truth[name], rtol=1e-10, atol=1e-10)
    state = policy.trainable_state()
    assert {name: value.shape for name, value in state.items()} == {name: g.shape for name, g in truth.items()}
    policy.load_trainable_state({name: value + 0.01 for name, value in state.items()})
    assert not torch.allclose(policy(mine, want=WANT)["logps"], got["logps"])
    torch.testing.assert_close(policy.reference_logps(mine), got["ref_logps"], rtol=1e-10, atol=1e-10)
    if policy.reference_kind == "snapshot":
        policy.update_reference(1.0)
        policy.load_reference_state(policy.reference_state())
        torch.testing.assert_close(policy.reference_logps(mine), policy(mine, want=WANT)["logps"])
    policy.load_trainable_state(state)
    torch.testing.assert_close(policy(mine, want=WANT)["logps"], got["logps"])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(kind: str, lora: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (kind, lora, str(tmp_path)), nprocs=2)
