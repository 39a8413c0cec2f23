"""Each prompt once, as it is trained: adapters, recomputed layers and bfloat16, for every family that the manual names."""

from __future__ import annotations

import warnings

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora, attention
from rlft.models.attention import attend, plan_segments
from rlft.models.layout import build_rows
from rlft.types import Batch
from tests.models.oracle import close, perturb, trained_lora
from tests.models.test_shared_layout import ALL, LOGPS, ROUNDED, SHARING, agree, both, ragged, upstream
from tests.tiny import tiny_gpt2, tiny_llama

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


@pytest.mark.parametrize(("lora", "checkpointing"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("family", NAMED)
def test_adapters_and_recomputed_layers(family: str, lora: bool, checkpointing: bool) -> None:
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


# -- dropout: a prompt before each answer, and no padding -------------------------------------------------------------
def with_dropout(model, **options) -> Policy:
    return Policy(model, dropout=True, **options)


def gapless(data: Batch) -> int:
    """Tokens of all rows, each with a prompt of its own and without its last token."""
    lengths = data.completion_mask.sum(-1)
    tokens = data.prompt_mask[data.group_ids].sum(-1) + lengths - 1
    return int(tokens[lengths > 0].sum())


def lora_with_dropout(rate: float, dtype: torch.dtype = torch.float64):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained_lora(SHARING["llama"](dtype=dtype), dropout=rate)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeated_prompts_in_a_packed_row(family: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of a run with dropout, where every rate is 0: outputs and gradients of the padded layout."""
    monkeypatch.setattr("rlft.models.policy.PAYS", 0.0)
    data, results = SHAPES[shape], []
    for layout in ("padded", "auto"):
        policy = with_dropout(maker(family, torch.float64, lora=False)(), critic="shared", layout=layout)
        perturb(policy)
        out = policy(data, want=ALL)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        results.append((out, list(torch.autograd.grad(upstream(out), parameters, allow_unused=True))))
        used = policy.layout_used
        if layout == "auto":
            assert used.computed == gapless(data)
    agree(results, 1e-10)


def test_a_run_with_dropout_is_packed() -> None:
    data = ragged()
    policy = with_dropout(lora_with_dropout(0.5), reference="none")
    out = policy(data, want=LOGPS)["logps"]
    assert out.requires_grad
    assert policy.layout_used.computed == gapless(ragged())
    assert policy.layout_used.computed < int(build_rows(data).input_ids.numel()) / 3
    with torch.no_grad():  # no dropout, so prompts are shared
        policy(data, want=LOGPS)
    assert policy.layout_used.computed < gapless(data)


RATES = {
    "adapter": lambda rate: lora_with_dropout(rate),
    "attention": lambda rate: tiny_llama(attention_dropout=rate, dtype=torch.float64),
    "gpt2": lambda rate: tiny_gpt2(attn_pdrop=rate, resid_pdrop=rate, embd_pdrop=rate, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", RATES)
def test_equal_answers_have_noise_of_their_own_and_its_law(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six equal answers: their first tokens differ, though all follow one prompt; means are those of the padded layout."""
    monkeypatch.setattr("rlft.models.policy.PAYS", 0.0)
    data = rows([5], [[4] * 6])
    data = data.replace(completion_ids=data.completion_ids[:1].expand(6, -1).contiguous())
    torch.manual_seed(0)
    means = {}
    for layout in ("padded", "auto"):
        policy = with_dropout(RATES[kind](0.1), reference="none", layout=layout)
        draws = []
        for _ in range(100):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                draws.append(policy(data, want=LOGPS)["logps"].detach())
        assert len(draws[0][:, 0].unique()) == 6
        assert policy.layout_used.computed == {"padded": 6 * 9, "auto": 6 * 8}[layout]
        draws = torch.cat(draws)
        means[layout] = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    (padded, error), (packed, other) = means["padded"], means["auto"]
    assert ((packed - padded).abs() < 4.5 * (error.square() + other.square()).sqrt()).all()
    torch.testing.assert_close(error, other, rtol=0.25, atol=0)  # as much noise, too


@pytest.mark.parametrize("kind", RATES)
def test_a_recomputed_layer_drops_the_same(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        # the layer that checkpoints counts as training and would drop by itself
        policy = with_dropout(RATES[kind](0.2), reference="none")
        if checkpointing:
            policy.enable_gradient_checkpointing()
        policy(ragged(), want=LOGPS)
        torch.manual_seed(1)
        out = policy(ragged(), want=LOGPS)["logps"]
        assert policy.layout_used.computed == gapless(ragged())
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found.append(
            [out, *torch.autograd.grad((out * weight).sum(), [p for p in policy.parameters() if p.requires_grad])]
        )
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_attention_dropout_of_a_packed_row_drops_weights_alone() -> None:
    """With the weights of one segment known, the mean over many draws is attention without dropout; and at rate 0 it is it."""
    plan = plan_segments([(0, 5), (5, 5), (10, 9), (19, 1)], [], device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    truth = attend(q, k, v, plan, scale=0.4)
    exact = attention._dropped(q, k, v, plan, 0.0, 0.4)
    close(exact, truth, 1e-12)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (exact, truth)), strict=True):
        close(a, b, 1e-11)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([attention._dropped(q, k, v, plan, 0.3, 0.4) for _ in range(400)])
    error = (draws.mean(0) - truth).abs() / (draws.std(0) / 20)
    assert error.max() < 5
    assert draws.std(0).min() > 0
