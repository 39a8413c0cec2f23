"""Each prompt once, as it is trained: adapters, recomputed layers and bfloat16, for every family that the manual names."""

from __future__ import annotations

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from rlft.types import Batch
from tests.models.test_shared_layout import ROUNDED, SHARING, agree, both, ragged, upstream

NAMED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2")
WANT = frozenset({"logps", "entropy", "entropy_grad", "token_kl", "values"})


def maker(family: str, dtype: torch.dtype, *, lora: bool):
    def make():
        model = SHARING[family](dtype=dtype)
        return add_lora(model, LoraSettings(r=2)) if lora else model

    return make


def rows(prompts: list[int], answers: list[list[int]]) -> Batch:
    """Random tokens: prompt lengths, and for each prompt the lengths of its answers."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([n for group in answers for n in group])
    group_ids = torch.tensor([i for i, group in enumerate(answers) for _ in group])
    exists = torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]
    prompt_exists = torch.arange(max(prompts))[None] < torch.tensor(prompts)[:, None]
    ids = [torch.randint(4, 100, mask.shape, generator=generator) for mask in (prompt_exists, exists)]
    return Batch(ids[0], prompt_exists, ids[1], exists, exists, group_ids)


SHAPES = {
    "ragged groups of any size": ragged(),
    "groups of one": rows([3, 7, 1, 5], [[4], [1], [9], [2]]),
    "answers without a token": rows([4, 2, 6], [[0, 3, 0], [5, 0], [0, 1]]),
    "one answer without a token in each group": rows([4, 2], [[3, 0], [0, 8]]),
    "a group of one answer without a token": rows([4, 2], [[0], [3, 3, 3]]),
    "answers of one token": rows([1, 1], [[1, 1, 1], [1, 1]]),
    "long and short": rows([40, 2], [[1, 60, 2], [33, 33]]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_of_every_shape(family: str, shape: str) -> None:
    agree(both(maker(family, torch.float64, lora=False), SHAPES[shape]), 1e-10)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", NAMED)
def test_adapters_and_recomputed_layers(family: str, lora: bool, checkpointing: bool) -> None:
    if not checkpointing and not lora:
        pytest.skip("in test_shared_layout.py")
    results = both(maker(family, torch.float64, lora=lora), ragged(2), checkpointing=checkpointing)
    agree(results, 1e-6 if family in ROUNDED else 1e-10)


def gradients(make, layout: str, *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    policy = Policy(make(), critic="shared", layout=layout)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as an optimizer would, and to the same weights whatever precision they are held in
        for p in policy.parameters():
            if p.requires_grad:
                noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_((p.double() + noise).bfloat16())
    if checkpointing:
        policy.enable_gradient_checkpointing()
    out = policy(ragged(), want=WANT)
    assert layout == "padded" or policy.layout_used.computed < policy.layout_used.repeated
    grads = torch.autograd.grad(upstream(out), [p for p in policy.model.parameters() if p.requires_grad])
    return {name: x.detach().double() for name, x in out.items()}, torch.cat([g.double().flatten() for g in grads])


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", NAMED)
def test_bfloat16_gradients_are_as_near_to_float32_as_those_of_the_padded_layout(family: str, lora: bool) -> None:
    """The same rounding in another order. A wrong token is tens of percent."""

    rounded = maker(family, torch.bfloat16, lora=lora)

    def exact():
        return rounded().float()

    truth, true_grads = gradients(exact, "padded", checkpointing=False)
    errors: dict[str, dict[str, float]] = {}
    for layout in ("padded", "shared"):
        out, grads = gradients(rounded, layout, checkpointing=layout == "shared")
        errors[layout] = {name: relative(x, truth[name]) for name, x in out.items()}
        errors[layout]["gradient"] = relative(grads, true_grads)
    for name, padded in errors["padded"].items():
        assert 0.0 < errors["shared"][name] < 1.5 * padded, (name, errors)
    assert errors["shared"]["logps"] < 0.02, errors
