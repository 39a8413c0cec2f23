"""Each prompt once, on a GPU: the log-probs and gradients of the padded layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.shared import build_shared
from rlft.types import Batch
from tests.gpu.common import CUDA, apart, peak_of_device, pytestmark, reset_peak, small_qwen2  # noqa: F401
from tests.models.oracle import perturb
from tests.models.test_shared_layout import ragged
from tests.tiny import random_batch, tiny_gpt2, tiny_llama

ALL = frozenset({"logps", "entropy", "entropy_grad", "token_kl", "ref_logps", "values"})
GRADED = ("logps", "entropy", "token_kl", "values")
LOGPS = frozenset({"logps"})

BATCHES = {
    "ragged": ragged,  # groups of 4, 3, 2, 1, 1 and 0, empty answers, a prompt padded on the left
    "groups of one": lambda: random_batch(groups=9, per_group=1, prompt_lengths=(1, 40), lengths=(1, 90), seed=2),
    "long": lambda: random_batch(groups=3, per_group=8, prompt_lengths=(100, 300), lengths=(1, 120), seed=3),
}
MODELS = {"llama": tiny_llama, "qwen2": small_qwen2, "gpt2": lambda **k: tiny_gpt2(n_positions=512, **k)}


def score(
    make: Callable[[], Any], data: Batch, layout: Any, *, dtype: torch.dtype, checkpointing: bool = False
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor | None]]:
    """Outputs and gradients, with the same weights whatever the layout and dtype."""
    policy = Policy(make(), critic="shared", layout=layout)
    perturb(policy, size=0.05)
    for p in policy.parameters():  # the float32 model that bfloat16 is compared with has its weights
        p.data = p.data.to(torch.bfloat16).to(p.dtype)
    policy.to(CUDA)
    for model in (policy.model, policy.reference_model):
        if model is not None:
            model.to(dtype)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    with warnings.catch_warnings():  # falling back to the padded layout would pass every comparison
        warnings.filterwarnings("error", message=".*cannot compute the prompt of a group once.*")
        out = policy(data.to(CUDA), want=ALL)
    assert layout == "padded" or policy.layout_used.computed == build_shared(data).used.computed
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (out[name].double() * torch.randn(out[name].shape, generator=generator, dtype=torch.float64).to(CUDA)).sum()
        for name in GRADED
    )
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return out, list(torch.autograd.grad(total, parameters, allow_unused=True))


def flat(grads: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([g.detach().double().flatten().cpu() for g in grads if g is not None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_float32_equals_the_padded_layout(model: str, batch: str, lora: bool, checkpointing: bool) -> None:
    def make() -> Any:
        made = MODELS[model]()
        return add_lora(made, LoraSettings(r=4)) if lora else made

    data = BATCHES[batch]()
    results = [
        score(make, data, layout, dtype=torch.float32, checkpointing=checkpointing) for layout in ("padded", "shared")
    ]
    for name in results[0][0]:
        assert apart(results[1][0][name], results[0][0][name]) < 1e-4, name
    assert apart(flat(results[1][1]), flat(results[0][1])) < 1e-3


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_float64_equals_the_padded_layout(model: str) -> None:
    """Every index of the layout, without any rounding to hide behind."""
    results = [
        score(lambda: MODELS[model](dtype=torch.float64), ragged(), layout, dtype=torch.float64)
        for layout in ("padded", "shared")
    ]
    for name in results[0][0]:
        assert apart(results[1][0][name], results[0][0][name]) < 1e-9, name
    assert apart(flat(results[1][1]), flat(results[0][1])) < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_bfloat16_is_as_near_to_float32_as_the_padded_layout(
    model: str, batch: str, lora: bool, checkpointing: bool
) -> None:
    def make() -> Any:
        made = MODELS[model]()
        return add_lora(made, LoraSettings(r=4)) if lora else made

    data = BATCHES[batch]()
    exact = score(make, data, "padded", dtype=torch.float32)
    results = {
        layout: score(make, data, layout, dtype=torch.bfloat16, checkpointing=checkpointing)
        for layout in ("padded", "shared")
    }
    for name in ("logps", "entropy", "values"):
        errors = {layout: apart(out[name], exact[0][name]) for layout, (out, _) in results.items()}
        assert errors["shared"] < 1.5 * errors["padded"] + 1e-3, (name, errors)
    errors = {layout: apart(flat(grads), flat(exact[1])) for layout, (_, grads) in results.items()}
    assert errors["shared"] < 1.5 * errors["padded"] + 1e-3, errors


def test_autocast_of_a_float32_model_shares_too() -> None:
    data = BATCHES["long"]().to(CUDA)
    policy = Policy(small_qwen2().to(CUDA), reference="none", layout="shared")
    exact = Policy(small_qwen2().to(CUDA), reference="none", layout="padded")(data, want=LOGPS)["logps"]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = policy(data, want=LOGPS)["logps"]
    out.sum().backward()
    assert apart(out, exact) < 2e-2
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in policy.parameters())


def test_a_siblings_token_changes_nothing_to_the_last_bit() -> None:
    policy = Policy(small_qwen2(dtype=torch.bfloat16).to(CUDA), reference="none", layout="shared")
    data = ragged().to(CUDA)
    with torch.no_grad():
        before = policy(data, want=LOGPS)["logps"]
        ids = data.completion_ids.clone()
        ids[1, 3] = 4 + (ids[1, 3] + 1) % 90
        after = policy(data.replace(completion_ids=ids), want=LOGPS)["logps"]
    others = torch.arange(data.num_rows, device=CUDA) != 1
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[1], before[1])


def test_auto_shares_and_takes_less_memory() -> None:
    data = random_batch(groups=4, per_group=8, prompt_lengths=(512, 512), lengths=(64, 64)).to(CUDA)
    peaks = {}
    for layout in ("padded", "auto"):
        policy = Policy(small_qwen2(dtype=torch.bfloat16).to(CUDA), reference="none", layout=layout)  # type: ignore[arg-type]
        policy(data, want=LOGPS)["logps"].sum().backward()  # the checks of first use
        reset_peak()
        before = torch.cuda.memory_allocated()
        policy(data, want=LOGPS)["logps"].sum().backward()
        peaks[layout] = peak_of_device() - before
        assert (policy.layout_used.computed < 5000) == (layout == "auto")
    assert peaks["auto"] < peaks["padded"] / 2, peaks
